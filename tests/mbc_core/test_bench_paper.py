"""`python -m tests.bench.bench_paper` end to end on a tiny model, and the samples of its data step."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from click.testing import CliRunner

from mbc_core.errors import UsageError
from mbc_core.evaluation.methods import document_of
from mbc_core.evaluation.qa_file import QaDocument, QaQuestion, QaSet
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora, save_adapter
from mbc_core.reader.language_model import load_language_model
from mbc_core.training.prepared import load_prepared
from tests.bench.bench_paper import main
from tests.bench.paper_curves import load_curve
from tests.bench.paper_data import passages_of, sample_documents, without_texts, write_prepared
from tests.mbc_core.prepared_data import write_prepared as write_towns
from tests.mbc_core.tiny_reader import llama, tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sets and held-out documents of the same towns, and other towns as strangers."""
    root = tmp_path_factory.mktemp("data")
    for name, count in (("squad", 6), ("archivalqa", 5), ("heldout", 6)):
        write_towns(root / name, count)
        (root / name / "stored.json").write_text('{"12": 80.0}')
    towns = load_prepared(write_towns(root / "all", 16))
    write_prepared(root / "strangers", towns.take(np.arange(6, 16)))
    return root


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = load_language_model(lm, dtype="float32")
    config = KVLoraConfig(r=2, alpha=4)
    save_adapter(
        add_kv_lora(base.model, config), folder, config, base_digest=base.digest, base_name=base.name
    )  # fmt: skip
    return folder


def call(*arguments):
    result = CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_rates_are_tuned_and_every_method_runs_and_goes_on_from_its_answers(data, lm, adapter, tmp_path):
    tuned = tmp_path / "tuned.json"
    common = ("--data", data, "--lm", lm, "--closed", adapter, "--device", "cpu")
    shown = call("tune", *common, "--rate", 1e-4, "--rate", 1e-2, "--documents", 4, "--out", tuned)
    told = json.loads(tuned.read_text())
    assert told["documents"] == 4 and told["questions"] == 4
    assert [(one["method"], one["rate"]) for one in told["trials"]] == [
        ("closed", 0.0), ("uniform", 1e-4), ("uniform", 1e-2), ("salient", 1e-4), ("salient", 1e-2),
    ]  # fmt: skip
    for kind in ("uniform", "salient"):
        best = max((one for one in told["trials"] if one["method"] == kind), key=lambda one: one["f1"])
        assert told["rates"][kind] == best["rate"]
    assert "| uniform | 0.0001 |" in " ".join(shown.output.split())

    files = ("--keep", tmp_path / "kept.jsonl", "--json", tmp_path / "r.json", "--markdown", tmp_path / "r.md")
    run = ("run", *common, "--tuned", tuned, "--first", 2, "--single", 1, *files)
    few = call("run", *common, "--documents", 3, "--first", 2, "--set", "squad", "--group", "closed")
    assert "### squad: 3 documents (3 passages), 3 questions" in few.output
    call(*run, "--group", "closed", "--group", "uniform", "--set", "squad")
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 2
    shown = call(*run)
    kept = [json.loads(line)["read"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept == [
        "closed on squad", "uniform on squad", "salient on squad",
        "closed on archivalqa", "uniform on archivalqa", "salient on archivalqa",
    ]  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    assert [one["set"] for one in report["sets"]] == ["squad", "archivalqa"]
    rows = report["sets"][0]["rows"]
    assert [row["name"] for row in rows] == ["closed", "uniform", "salient"]
    assert [list(row["compared"]) for row in rows] == [[], ["closed"], ["closed"]]
    assert {row["documents"] for row in report["sets"][0]["retention"]} == {2, 4, 6}
    assert (tmp_path / "r.md").read_text() in shown.output


def test_a_wrong_paper_folder_or_closed_book_is_named(data, lm, tmp_path):
    for given, said in (("mbc=/nowhere", "mbc=/nowhere"), (f"mbc={tmp_path},gone", "gone"), ("mbc", "existing folder")):
        result = CliRunner().invoke(main, ["run", "--data", str(data), "--lm", str(lm), "--paper", given])
        assert result.exit_code == 2 and said in result.output


def test_samples_are_whole_documents_drawn_by_the_seed(data):
    towns = load_prepared(data / "all")
    names = [f"doc-{number // 2}" + ("#1" if number % 2 else "") for number in range(16)]
    towns = type(towns)(
        towns.table.set_column(0, "passage_id", [names]), towns.embeddings, towns.questions, towns.answers, towns.rows,
        towns.question_embeddings,
    )  # fmt: skip
    one = sample_documents(towns, 3, 0, asked=True)
    found = one.table["passage_id"].to_pylist()
    assert len(found) == 6 and [document_of(name) for name in found[::2]] == [document_of(name) for name in found[1::2]]
    assert found == sample_documents(towns, 3, 0, asked=True).table["passage_id"].to_pylist()
    assert found != sample_documents(towns, 3, 1, asked=True).table["passage_id"].to_pylist()
    few = type(towns)(
        towns.table, towns.embeddings, towns.questions[:2], towns.answers[:2], towns.rows[:2],
        towns.question_embeddings[:2],
    )  # fmt: skip
    assert len(sample_documents(few, 9, 0, asked=True)) == 2 and len(sample_documents(few, 9, 0, asked=False)) == 16
    texts = towns.table["text"].to_pylist()
    assert without_texts(towns, set(texts[2:])).table["text"].to_pylist() == texts[:2]


def test_what_is_written_is_read_again(data, tmp_path):
    towns = load_prepared(data / "all")
    write_prepared(tmp_path, towns)
    again = load_prepared(tmp_path)
    assert again.table.to_pylist() == towns.table.to_pylist()
    assert (again.questions, again.answers, again.rows.tolist()) == (
        towns.questions,
        towns.answers,
        towns.rows.tolist(),
    )
    np.testing.assert_allclose(again.embeddings, towns.embeddings, atol=1e-3)
    np.testing.assert_allclose(again.question_embeddings, towns.question_embeddings, atol=1e-3)


def test_repeated_question_rows_stay():
    documents = (QaDocument("s:a", "Text a."), QaDocument("s:b", "Text b."))
    asked = (QaQuestion("q", ("x",), 1), QaQuestion("p", ("y", "z"), 0), QaQuestion("q", ("w",), 1))
    first, second = passages_of(QaSet.of(documents, asked))
    assert (first.passage_id, first.source, first.questions) == ("s:a", "s", (("p", ("y", "z")),))
    assert second.questions == (("q", ("x",)), ("q", ("w",))) and second.text == "Text b."


# ------------------------------------------------------------------------------------------------------------- curves


def look(step, loss, of_one=None):
    told = {"step": step, "held_out_loss": loss, "loss": 9.0}
    if of_one is not None:
        told |= {"held_out_shuffled": loss + 0.01, "held_out_loss_of_one": of_one,
                 "held_out_shuffled_of_one": of_one + 0.5, "held_out_used": 7, "held_out_perplexity": 6.54,
                 "held_out_different": 0.981}  # fmt: skip
    return json.dumps(told) + "\n"


@pytest.fixture
def runs(tmp_path):
    """A finished run, a closed book of another length, and a run that wrote no card."""
    for name in ("read", "closed", "cut"):
        (tmp_path / name).mkdir()
    (tmp_path / "read" / "curve.jsonl").write_text(look(10, 4.0, 3.5) + look(20, 3.0, 2.5))
    squad = [{"read": name, "f1": f1} for name, f1 in (("aggregate", 11.26), ("bank of 1", 50), ("shuffled", 10))]
    results = {"squad": squad}
    (tmp_path / "read" / "card.json").write_text(json.dumps({"finished": True, "steps": 20, "results": results}))
    (tmp_path / "closed" / "curve.jsonl").write_text(look(10, 3.9) + look(15, 3.4))
    (tmp_path / "cut" / "curve.jsonl").write_text(look(10, 3.8, 3.7))
    return tmp_path


def named(runs):
    return [f"{name}={runs / name}" for name in ("read", "closed", "cut")]


def test_every_look_of_a_run_is_a_line(runs):
    assert call("curves", *named(runs)).output.splitlines() == [
        "read  step    10  16: 4.0000 4.0100  1: 3.5000 4.0000  codes used 7, passages with codes of their own 98.1%",
        "read  step    20  16: 3.0000 3.0100  1: 2.5000 3.0000  codes used 7, passages with codes of their own 98.1%",
        "closed  step    10  16: 3.9000",
        "closed  step    15  16: 3.4000",
        "cut  step    10  16: 3.8000 3.8100  1: 3.7000 4.2000  codes used 7, passages with codes of their own 98.1%",
    ]


def test_a_table_of_one_step_has_the_runs_that_looked_there(runs):
    def rows(step):
        lines = call("curves", *named(runs), "--table", step).output.splitlines()[2:]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]

    read = ["3.0000", "3.0100", "2.5000", "3.0000", "7", "6.5", "98.1%", "11.3 / 10.0", "–"]
    assert rows(20) == [["read", *read]]
    assert [row[0] for row in rows(10)] == ["read", "closed", "cut"]
    assert rows(10)[0][-2:] == ["–", "–"]  # it went on after that look: its answers are not that look's
    assert rows(10)[1] == ["closed", "3.9000", "–", "–", "–", "–", "–", "–", "–", "–"]


def test_a_table_of_runs_has_the_kept_look_and_what_the_closed_book_does_not_know(runs):
    def cells(*words):
        lines = call("curves", *words, "--runs").output.splitlines()[2:]
        return {line.split("|")[1].strip(): [one.strip() for one in line.split("|")[2:-1]] for line in lines if line}

    read, closed, cut = named(runs)
    found = cells(f"{read},closed", closed, cut)
    assert found["read"] == ["20", "–", "20", "–", "3.0000", "3.0100", "2.5000", "3.0000", "-0.4000", "-0.9000"]
    assert found["closed"] == ["15", "–", "15", "–", "3.4000", "–", "–", "–", "–", "–"]
    assert found["cut"][-2:] == ["–", "–"]
    losses = [4.0, 3.5, 3.2, 3.2, 3.1995, 3.21, 3.22, 3.3, 2.0]
    looks = "".join(look(10 * place, loss, 3.0) for place, loss in enumerate(losses, 1))
    (runs / "read" / "curve.jsonl").write_text(looks)
    card = {"run": {"grow_every": 5, "banks": [1, 4], "cue_steps": 0}, "cool_from": 80, "kept_step": 50, "steps": 90}
    (runs / "read" / "card.json").write_text(json.dumps(card))
    # settled from step 5 on; of looks 10 to 60 those after 43 1/3 improve by .0005 on 3.2, less than .2%
    assert cells(read)["read"] == ["90", "80", "50", "60", "3.1995", "3.2095", "3.0000", "3.5000", "–", "–"]
    card["cool_from"] = 50
    (runs / "read" / "card.json").write_text(json.dumps(card))
    assert cells(read)["read"][3] == "no"  # looks at falling rates say nothing of being flat
    result = CliRunner().invoke(main, ["curves", f"{read},nobody", "--runs"])
    assert result.exit_code == 2 and "nobody" in result.output


def test_curves_are_drawn_where_their_steps_are(runs):
    out = runs / "curves.svg"
    call("curves", *named(runs), "--out", out)
    picture = ET.fromstring(out.read_text())
    lines = picture.findall(".//{*}polyline")
    assert len(lines) == 10  # in each of two panels: two of `read`, one of `closed`, two of `cut`
    dashed = [one.get("stroke-dasharray") is not None for one in lines]
    assert dashed == [False, True, False, False, True] * 2
    assert lines[0].get("stroke") == lines[1].get("stroke") != lines[2].get("stroke")
    at = [[float(point.split(",")[0]) for point in one.get("points").split()] for one in lines]
    assert at[0][0] == at[2][0] == at[3][0] and at[2][1] == pytest.approx((at[0][0] + at[0][1]) / 2, abs=0.11)
    call("curves", *named(runs)[:2], "--out", out, "--first", 15)
    points = [one.get("points").split() for one in ET.fromstring(out.read_text()).findall(".//{*}polyline")]
    assert [len(one) for one in points] == [1, 1, 1] * 2


def test_a_folder_without_a_curve_is_named(runs):
    (runs / "empty").mkdir()
    with pytest.raises(UsageError, match="there is no curve"):
        load_curve("empty", runs / "empty")
    result = CliRunner().invoke(main, ["curves", "nothing"])
    assert result.exit_code == 2 and "NAME=FOLDER" in result.output
