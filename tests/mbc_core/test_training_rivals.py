"""The rivals' samples: whole passages of text, or the question alone; trained as many steps on as many samples."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from mbc_core.cli.train import train
from mbc_core.errors import UsageError
from mbc_core.evaluation.addresses import AddressIndex
from mbc_core.reader.kv_lora import KVLoraConfig
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training import reader as reader_module
from mbc_core.training.prepared import load_prepared
from mbc_core.training.reader import ReaderRun, train_reader
from mbc_core.training.rivals import MEMORIES, SAYS, memory_of, mixture_of
from mbc_core.training.samples import Mixture, build_source, distractors
from tests.mbc_core.prepared_data import write_prepared
from tests.mbc_core.tiny_reader import SLOTS, documents, language_model, lexicon, llama, pieces, tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")

POOL = 400


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prepared"), 16)


@pytest.fixture(scope="module")
def pools(prepared) -> dict[str, list[str]]:
    """Samples of each kind as text: memory lines, question, answer."""
    data = load_prepared(prepared).split("train")
    rotation, codebook = pieces()
    index = AddressIndex(data.embeddings, rotation, codebook.codewords, SLOTS)
    others, ranks = distractors(data.rows, index.nearest(data.question_embeddings, 25))
    passages, _ = distractors(np.arange(len(data)), index.nearest(data.embeddings, 25))
    form = PromptFormat(tokenizer())
    made = {}
    for memory in MEMORIES:
        source = build_source(data, lexicon(), form, others, ranks, passages, mixture=mixture_of(memory))
        tokens = source.pool(0, 0, POOL).tokens
        cut = [tokens.values[start : start + size] for start, size in zip(tokens.starts, tokens.lengths, strict=True)]
        made[memory] = [form.tokenizer.decode(ids) for ids in cut]
    return made


def lines(sample: str) -> list[str]:
    return sample[: sample.index("Question: ")].splitlines()


def test_words_are_the_plain_mixture():
    assert mixture_of("words") == Mixture()
    assert [memory_of(mixture_of(one)) for one in MEMORIES] == list(MEMORIES)
    assert set(SAYS) == set(MEMORIES)


def test_no_memory_is_the_question_alone(pools):
    assert all(sample.startswith(("Question: Who founded", "Question: Fill in the blank")) for sample in pools["none"])
    cloze = np.mean(["Fill in the blank" in sample for sample in pools["none"]])
    assert 0.17 < cloze < 0.33, "as many cloze questions as with memory"


def test_full_text_shows_one_three_or_five_whole_passages(pools):
    texts = {f" {one.text}"[:384] for one in documents(16)}
    counts: dict[int, int] = {}
    for sample in pools["text"]:
        shown = lines(sample)
        assert set(shown) <= texts
        counts[len(shown)] = counts.get(len(shown), 0) + 1
    assert set(counts) == {0, 1, 3, 5}
    shares = [counts[k] / POOL for k in (0, 1, 3, 5)]
    assert shares == pytest.approx([0.04, 0.96 * 0.2, 0.96 * 0.2, 0.96 * 0.6], abs=0.08)


def test_the_text_that_answers_is_always_among_them(pools):
    for sample in pools["text"]:
        asked = sample[sample.index("Question: ") :]
        if lines(sample) and "Who founded" in asked:
            town = asked.split("Who founded ")[1].split("?")[0]
            assert any(f"town of {town} " in line for line in lines(sample))


def test_words_show_up_to_eight_lines(pools):
    assert max(len(lines(sample)) for sample in pools["words"]) == 8


def test_an_unknown_memory():
    with pytest.raises(UsageError, match=r"no such memory to train on: 'dreams'.*words, text, none"):
        mixture_of("dreams")


@pytest.mark.parametrize(
    ("memory", "reads"),
    [("text", ["closed", "text", "text", "right_text"]), ("none", ["closed"]), ("words", ["closed", "recall"])],
)
def test_training_is_equal_and_the_card_says_what_was_read(prepared, tmp_path, memory, reads, monkeypatch):
    monkeypatch.setattr(reader_module, "DEFAULT_READS", reader_module._QUICK_READS)
    rotation, codebook = pieces()
    run = ReaderRun(
        steps=3, minutes=None, batch=8, batch_tokens=8192, evaluate_questions=2, evaluate_every=0.3,
        kv_lora=KVLoraConfig(r=2, alpha=4), mixture=mixture_of(memory),
    )  # fmt: skip
    monkeypatch.setattr(reader_module, "_POOL_STEPS", 1)
    base = language_model()
    card = train_reader(prepared, lexicon(), codebook, rotation, base, tmp_path, run)
    assert card["memory"] == {"kind": memory, "says": SAYS[memory]}
    assert card["run"]["mixture"]["full_text"] == mixture_of(memory).full_text
    assert (card["progress"]["step"], card["progress"]["samples"]) == (3, 24)
    assert [row["read"] for row in card["results"]["held_out"]] == reads
    looks = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    quick = {"text": "text_f1", "none": "closed_f1", "words": "recall_f1"}[memory]
    assert any(quick in line for line in looks)
    assert json.loads((tmp_path / "card.json").read_text())["memory"]["kind"] == memory


def test_the_command_takes_the_memory(prepared, tmp_path, monkeypatch):
    folder = tmp_path / "lm"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    rotation, codebook = pieces()
    lexicon().save(tmp_path / "lexicon.json")
    rotation.save(tmp_path / "rotation.safetensors")
    (tmp_path / "codebook.safetensors").write_bytes(codebook.to_bytes())
    monkeypatch.setattr(reader_module, "_POOL_STEPS", 1)
    words = [
        "reader", prepared, "--lm", folder, "--lexicon", tmp_path / "lexicon.json", "--codebook",
        tmp_path / "codebook.safetensors", "--rotation", tmp_path / "rotation.safetensors", "--memory", "none",
        "--steps", 1, "--minutes", 0, "--batch", 4, "--rank", 2, "--evaluate-questions", 2, "--device", "cpu",
    ]  # fmt: skip
    done = CliRunner().invoke(train, [str(one) for one in [*words, "--out", tmp_path / "out"]])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["memory"]["kind"] == "none"
    wrong = CliRunner().invoke(train, [str(one) for one in [*words, "--memory", "dreams", "--out", tmp_path / "out"]])
    assert wrong.exit_code == 2 and "'dreams' is not one of" in wrong.stderr


def test_equal_runs_differ_in_the_mixture_alone():
    runs = [replace(ReaderRun(steps=5), mixture=mixture_of(memory)) for memory in MEMORIES]
    assert len({replace(run, mixture=Mixture()) for run in runs}) == 1
