"""`mbc eval` from the QA file to the printed tables, on tiny models: banks come from the pipeline, twice the same."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import pytest
import tiny_reader
import torch
from tiny import POISON, TinyEncoder, TinySpec, rotation, settings

from mbc_core import defaults
from mbc_core.bank import Bank
from mbc_core.cli import evaluate as command
from mbc_core.cli.app import run
from mbc_core.cli.evaluate import make
from mbc_core.evaluation.qa_file import QaDocument
from mbc_core.evaluation.sheet import READS
from mbc_core.lexicon import Lexicon
from mbc_core.memory import Memory
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora, save_adapter, trainable
from pipelines.evaluate import PipelineBanks, Remembering, RememberingEncoder
from pipelines.ingest import run_ingest
from schemas.results import EvalResult, MeasuredRow


@pytest.fixture(autouse=True)
def single_thread():
    """On a busy machine torch's threads make tiny models many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(count: int = 12) -> list[dict[str, object]]:
    """Two questions a town; every third document has no date."""
    found = []
    for number, town in enumerate(tiny_reader.documents(count)):
        fields = {"id": town.doc_id, "text": town.text, "timestamp": town.timestamp if number % 3 else None}
        found.append({**fields, "question": town.question, "answer": town.answer, "split": "test"})
        year = str(1500 + 7 * number)
        found.append(
            {**fields, "question": f"When was {town.question[12:-1]} founded?", "answers": [year], "split": "dev"}
        )
    return found


@pytest.fixture(scope="module")
def qa(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("qa") / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def mbc(work, monkeypatch):
    """Runs a command line of `mbc eval` on tiny pieces."""
    monkeypatch.setattr(defaults, "language_model", lambda *given, **named: tiny_reader.language_model())
    monkeypatch.setattr(defaults, "reader_adapter", lambda: None)

    def build(folder, device, say):
        return PipelineBanks(folder, "cpu", settings(work / "pieces"), say)

    group = click.Group("mbc", {"eval": make(build)})
    return lambda *words: run(group, ["eval", *map(str, words), "--device", "cpu"])


def write_adapter(folder: Path, seed: int) -> Path:
    base = tiny_reader.language_model()
    config = KVLoraConfig(r=4, alpha=8, dropout=0.0)
    model = add_kv_lora(base.model, config, seed=seed)
    generator = np.random.default_rng(seed)
    for name, weight in trainable(model).items():
        if "lora_B" in name:
            weight.data += weight.new_tensor(generator.standard_normal(tuple(weight.shape)))
    save_adapter(model, folder, config, base_digest=base.digest, base_name=base.name)
    return folder


@pytest.fixture(scope="module")
def rivals(work) -> list[str]:
    named = {"--adapter": 1, "--rival-text": 2, "--rival-closed": 3}
    return [word for name, seed in named.items() for word in (name, str(write_adapter(work / name[2:], seed)))]


def timeless(result) -> dict[str, object]:
    kept = [{name: one for name, one in row.items() if not name.startswith("milliseconds")} for row in result["rows"]]
    return {**result, "rows": kept}


def test_the_whole_command_twice(mbc, qa, rivals, capsys):
    assert mbc("--qa", qa, *rivals, "--k", "2,1", "--limit", 9, "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert set(EvalResult.__annotations__) == set(result)
    assert set(MeasuredRow.__annotations__) <= set(result["rows"][0])
    given = {name for name, kind in READS.items() if kind.adapter in ("own", "closed", "text")}
    assert {row["read"] for row in result["rows"]} == given, "there are no weights for the other reads of a tiny model"
    assert {row["profile"] for row in result["rows"] if row["read"] == "recall"} == {"compact", "default", "rich"}
    assert all(row["questions"] == 9 for row in result["rows"])
    closed = {one["against"] for row in result["rows"] for one in row["compared"]}
    assert closed == {"closed-equal", "text-equal@2", "text-equal@1"}
    sizes = {one["profile"]: one["words"] for one in result["bytes"]}
    assert sizes["compact"] < sizes["default"] < sizes["rich"]
    assert result["settings"]["adapter"].endswith("adapter") and result["settings"]["lm"] == "tiny-llama"
    assert "bank rich (rich): 12 documents" in captured.err and "answers by tiny-llama" in captured.err

    assert mbc("--qa", qa, *rivals, "--k", "2,1", "--limit", 9, "--json") == 0
    assert timeless(json.loads(capsys.readouterr().out)) == timeless(result)


def test_the_two_steps_give_what_the_one_gives(mbc, qa, rivals, tmp_path, capsys):
    chosen = ("--qa", qa, "--only", "split=test", "--profiles", "default", "--k", "3")
    assert mbc(*chosen, *rivals, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert mbc(*chosen, "--write-reads", tmp_path / "reads.gz", "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert written == {"written": str(tmp_path / "reads.gz"), "reads": len(READS), "questions": 12}
    assert mbc("--from-reads", tmp_path / "reads.gz", *rivals, "--json") == 0
    assert timeless(json.loads(capsys.readouterr().out)) == timeless(whole)
    assert mbc("--from-reads", tmp_path / "reads.gz", "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    assert {row["read"] for row in alone["rows"]} == {name for name, kind in READS.items() if kind.adapter == "own"}
    assert alone["settings"]["adapter"] is None


def test_people_see_tables(mbc, qa, rivals, capsys):
    assert mbc("--qa", qa, "--profiles", "compact", "--reads", "recall,closed,text", "--limit", 5, *rivals) == 0
    shown = capsys.readouterr().out
    assert "recall/compact@5" in shown and "EM*: the paper's rule" in shown
    assert "R@10" in shown and "compact: word codes" in shown and "zstd -19" in shown
    assert "share of its F1" in shown and "Retention" not in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_retention_streams_through_the_pipeline(mbc, qa, rivals, capsys):
    words = ("--qa", qa, "--retention", "--first", 3, "--reads", "recall,shuffled,closed-equal", "--k", 2)
    assert mbc(*words, *rivals, "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [row["documents"] for row in result["retention"]] == [3, 6, 12]
    assert all(row["questions"] == 6 and row["closed"] == "closed-equal" for row in result["retention"])
    first, last = result["retention"][0], result["retention"][-1]
    assert first["f1_relative"] in (100.0, None)
    assert last["above_closed"] == pytest.approx(last["f1"] - last["closed_f1"])
    assert [row["name"] for row in result["rows"]] == ["closed-equal", "shuffled/default@2", "recall/default@2"]
    assert all(row["questions"] == 24 for row in result["rows"])
    assert "6 documents have come" in captured.err
    assert mbc(*words, *rivals) == 0
    assert "Retention: 6 questions about the first 3 documents" in capsys.readouterr().out


def test_a_given_bank_is_read_as_it_is(mbc, qa, work, tmp_path, monkeypatch, capsys):
    documents = {row["id"]: {"id": row["id"], "text": row["text"]} for row in rows(12)}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents.values()))
    bank = str(tmp_path / "bank")
    given = settings(work / "pieces", profile="rich")
    run_ingest([str(tmp_path / "a.jsonl")], bank, given, show_progress=False)
    opened = Memory.open

    def open_tiny(bank, encoder):
        return opened(bank, encoder, lexicon=Lexicon([]), rotation=rotation())

    monkeypatch.setattr(Memory, "open", open_tiny)
    monkeypatch.setattr(defaults, "encoder_for", lambda manifest, device: TinyEncoder())
    words = ("--qa", qa, "--bank", bank, "--limit", 6, "--reads", "recall,text,closed")
    assert mbc(*words, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == ["closed", "recall/rich@5", "text@5"]
    inspected = Bank.open(bank).inspect()["bytes_per_passage"]
    assert {name: result["bytes"][0][name] for name in inspected} == inspected
    assert mbc(*words, "--profiles", "default") == 2
    assert "the bank has another profile: 'rich'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "Give --qa FILE, or --from-reads FILE alone"),
        (("--qa", "a", "--from-reads", "b"), "Give --qa FILE, or --from-reads FILE alone"),
        (("--from-reads", "b", "--bank", "c"), "leave out --bank, --reads, --retention"),
        (("--qa", "a", "--retention", "--bank", "b"), "leave out --bank"),
        (("--qa", "a", "--retention", "--profiles", "default,rich"), "name one profile"),
        (("--qa", "a", "--reads", "text-equal"), "give --rival-text FOLDER"),
        (("--qa", "a", "--reads", "closed-equal"), "give --rival-closed FOLDER"),
        (("--qa", "a", "--reads", "telepathy"), "telepathy is not among closed, closed-equal"),
        (("--qa", "a", "--profiles", ","), "nothing is not among paper"),
        (("--qa", "a", "--k", "5,0"), "'5,0' is not a list of numbers"),
        (("--qa", "a", "--only", "split"), "'split' is not FIELD=VALUE"),
        (("--qa", "no-such-file"), "the QA file cannot be read"),
    ],
)
def test_wrong_use(mbc, words, told, capsys):
    assert mbc(*words) == 2
    captured = capsys.readouterr()
    assert told in " ".join(captured.err.split()) and captured.out == ""


def test_without_the_pipeline_no_bank_is_built(qa, capsys):
    group = click.Group("mbc", {"eval": command.evaluate})
    assert run(group, ["eval", "--qa", str(qa)]) == 2
    assert "This command builds no banks" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ building the banks


def test_each_passage_is_encoded_once_for_all_banks(tmp_path, monkeypatch):
    seen: list[str] = []
    plain = TinyEncoder.encode

    def encode(self, texts, progress=None):
        seen.extend(texts)
        return plain(self, texts, progress)

    monkeypatch.setattr(TinyEncoder, "encode", encode)
    said: list[str] = []
    banks = PipelineBanks(tmp_path, "cpu", settings(tmp_path / "w", encoder=TinySpec("once")), said.append)
    documents = [QaDocument(f"d{number}", f"Alpha beta gamma {number}.") for number in range(5)]
    for profile in ("compact", "default"):
        banks.add(profile, profile, documents)
    passages = [text for text in seen if text.startswith("Alpha")]
    assert len(passages) == len(set(passages)) == 5
    assert [line.split(":")[0] for line in said] == ["bank compact (compact)", "bank default (default)"]
    assert [path.name for path in tmp_path.glob("*.jsonl")] == []


def test_a_bank_that_grows_is_the_bank_that_was_there(tmp_path):
    banks = PipelineBanks(tmp_path, "cpu", settings(tmp_path / "w"))
    documents = [QaDocument(f"d{number}", f"Alpha beta gamma {number}.", "2024-07-01") for number in range(8)]
    banks.add("stream", "default", documents[:5])
    before = banks.open("stream").passages
    banks.add("stream", "default", documents[5:])
    after = banks.open("stream").passages
    assert (len(before), len(after)) == (5, 8)
    kept = {row["doc_id"]: row for row in after.to_pylist()}
    assert all(kept[row["doc_id"]] == row for row in before.to_pylist()), "no stored code changes"


def test_what_cannot_be_encoded_is_told(tmp_path):
    said: list[str] = []
    banks = PipelineBanks(tmp_path, "cpu", settings(tmp_path / "w"), said.append)
    banks.add("one", "default", [QaDocument("a", "Fine words."), QaDocument("b", f"{POISON} words.")])
    assert "1 documents, 1 passages" in said[0] and said[0].endswith("1 dead letters")


def test_the_remembering_encoder_is_the_encoder():
    loaded = Remembering(TinySpec()).load()
    plain, encoder = TinyEncoder(), loaded.encoder
    assert isinstance(encoder, RememberingEncoder)
    texts = ["one two", "three", "one two"]
    told: list[int] = []
    for _ in range(2):
        for mine, theirs in zip(encoder.encode(texts, told.append), plain.encode(texts), strict=True):
            assert (mine.embedding == theirs.embedding).all() and mine.words == theirs.words
    assert sum(told) == 6, "progress counts every text that was asked for"
    assert (encoder.encoder_id, encoder.width) == (plain.encoder_id, plain.width)
    assert (encoder.encode_questions(["a b"]) == plain.encode_questions(["a b"])).all()
    assert encoder.count_pieces("a b") == plain.count_pieces("a b")
