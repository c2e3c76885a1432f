"""`python -m tests.bench.bench_paper` end to end on a tiny model, and the samples of its data step."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from mbc_core.evaluation.methods import document_of
from mbc_core.evaluation.qa_file import QaDocument, QaQuestion, QaSet
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora, save_adapter
from mbc_core.reader.language_model import load_language_model
from mbc_core.training.prepared import load_prepared
from tests.bench.bench_paper import main
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
