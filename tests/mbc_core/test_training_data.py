from __future__ import annotations

import gzip
import json

import pytest

from mbc_core.errors import DamagedFile, UsageError
from mbc_core.training.data import (
    DEV_SHARE,
    SHIP_EXCLUDED_SOURCES,
    TrainingPassage,
    cut_passages,
    load_dev_passages,
    load_extracts,
    load_training_passages,
    split_of,
)


def row(name: str, **fields: object) -> dict[str, object]:
    return {"doc_id": name, "text": f"Text of {name}.", "qas": [["Of what?", name]]} | fields


def write(path, *rows: object):
    lines = "".join(json.dumps(one) + "\n" for one in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def test_forbidden_sources_and_late_rows_are_left_out_and_counted(tmp_path):
    rows = [row(f"{source}:1", source=source) for source in sorted(SHIP_EXCLUDED_SOURCES)]
    rows += [row("squad:1", source="squad_train"), row("race:9")]  # without `source` the id's prefix is the source
    rows += [row("news:1", timestamp="2024-06-30"), row("news:2", timestamp="2024-07-01"), row("news:3", split="test")]
    rows += [row("news:4", split="train", timestamp="2026-01-01T00:00:00Z")]
    lines: list[str] = []
    found = load_training_passages([write(tmp_path / "train.jsonl.gz", *rows)], log=lines.append)
    assert [one.passage_id for one in found] == ["squad:1", "news:1"]
    assert [one.source for one in found] == ["squad_train", "news"]
    report = "\n".join(lines)
    assert "2 passages" in lines[0]
    assert "2 questions" in lines[0]
    for text in ["left out, source race: 2 rows", "dated from 2024-07-01 on: 2 rows", "marked test: 1 rows"]:
        assert text in report


def test_rows_of_one_passage_are_merged_and_repeated_questions_dropped(tmp_path):
    one = write(tmp_path / "a.jsonl", row("p:1", qas=[["Q1?", "A"], ["Q2?", "B"]]))
    other = write(
        tmp_path / "b.jsonl",
        {"doc_id": "p:1", "text": "Text of p:1.", "question": "Q2?", "answer": "C"},
        {"doc_id": "p:1", "text": "Text of p:1.", "question": "Q3?", "answer": "D", "answers": ["D", "d", "D"]},
    )
    (found,) = load_training_passages([one, other])
    assert found.questions == (("Q1?", ("A",)), ("Q2?", ("B",)), ("Q3?", ("D", "d")))


def test_the_held_out_share_is_by_text_and_about_two_percent():
    texts = [f"passage number {number}" for number in range(20_000)]
    held = sum(split_of(text) == "dev" for text in texts)
    assert abs(held / len(texts) - DEV_SHARE) < 0.004
    assert split_of("a  b\nc") == split_of("a b c")


def test_dev_files_give_rows_without_a_split_or_marked_dev_of_any_date(tmp_path):
    rows = [row("n:1", split="train"), row("n:2", split="dev", timestamp="2025-01-01"), row("n:3", split="test")]
    rows += [row("n:4"), row("race:5")]
    found = load_dev_passages([write(tmp_path / "dev.jsonl", *rows)], log=[].append)
    assert [one.passage_id for one in found] == ["n:2", "n:4"]
    assert {one.split for one in found} == {"dev"}


def test_long_texts_are_cut_and_questions_go_to_the_part_that_answers():
    text = "Ann was born in Rome. Bob moved to Rome in May. Cy likes tea."
    questions = (
        ("Who likes tea?", ("Cy",)),
        ("When did Bob move to Rome?", ("Rome",)),  # in two parts: shared words decide
        ("Where was Ann born?", ("Paris", "Rome")),
        ("Is Bob in May?", ("no",)),  # in no part: shared words decide
    )
    passage = TrainingPassage("p:1", "s", text, questions, "dev")
    parts = cut_passages([passage], lambda part: len(part.split()), max_pieces=7)
    assert [one.text for one in parts] == ["Ann was born in Rome. ", "Bob moved to Rome in May. ", "Cy likes tea."]
    assert [one.passage_id for one in parts] == ["p:1", "p:1#1", "p:1#2"]
    assert [[question for question, _ in one.questions] for one in parts] == [
        ["Where was Ann born?"],
        ["When did Bob move to Rome?", "Is Bob in May?"],
        ["Who likes tea?"],
    ]
    assert {(one.source, one.split) for one in parts} == {("s", "dev")}


def test_short_and_blank_texts():
    short = TrainingPassage("p:1", "s", "One two.", (("Q?", ("A",)),), "train")
    blank = TrainingPassage("p:2", "s", "  ", (("Q?", ("A",)),), "train")
    assert cut_passages([short, blank], lambda part: len(part.split())) == [short]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"{", "line 1 of a training file.*Expecting property"),
        (b'{"doc_id": "a", "text": "b", "qas": []}\n{"doc_id": 1, "text": "b", "qas": []}', "line 2.*strings"),
        (b'{"doc_id": "a", "text": "b"}', "neither `qas` nor"),
        (b"\n\n[1]", "line 3.*not an object"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, content, cause):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DamagedFile, match=f"(?s){cause}"):
        load_training_passages([tmp_path / "a.jsonl"])


def test_a_truncated_archive_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", row("a:1"))
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(DamagedFile, match=r"training file cannot be read.*a\.jsonl\.gz"):
        load_training_passages([path])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"a training file is missing.*none\.jsonl"):
        load_training_passages([tmp_path / "none.jsonl"])


def test_nothing_left_says_why(tmp_path):
    with pytest.raises(UsageError, match=r"no passage is left.*1 × source race"):
        load_training_passages([write(tmp_path / "a.jsonl", row("race:1"))])


def test_extracts(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps({"A": {"extract": "Text a."}, "B": {"extract": "Text b.", "x": 1}}))
    assert load_extracts(tmp_path / "w.json") == ["Text a.", "Text b."]
    (tmp_path / "w.json").write_text('["A"]')
    with pytest.raises(DamagedFile, match="a file of extracts cannot be read"):
        load_extracts(tmp_path / "w.json")
