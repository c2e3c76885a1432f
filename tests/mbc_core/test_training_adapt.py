"""Adaptation in two steps: what the bank recalls becomes examples; examples become a candidate that is judged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mbc_core import defaults
from mbc_core.errors import DamagedFile, UsageError
from mbc_core.memory import Memory
from mbc_core.reader.kv_lora import KVLoraConfig, adapter_state, add_kv_lora, load_adapter, save_adapter
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.adapt import AdaptRun, adapt, compose, decide, judge, learned_end
from mbc_core.training.replay_set import Example, build_training_set, load_examples, save_examples
from tests.mbc_core.tiny_reader import (
    BagOfWords,
    Doc,
    add_documents,
    documents,
    language_model,
    lexicon,
    make_bank,
    pieces,
)
from tests.mbc_core.tiny_reader import tokenizer as tiny_tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")

DOCS = documents(24)  # days 1 to 12 of July; every fourth is held out
ROTATION, _ = pieces()
RUN = AdaptRun(steps=3, batch=4, lr=1e-2)


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> Memory:
    return open_memory(make_bank(tmp_path_factory.mktemp("banks") / "bank", DOCS))


def open_memory(bank) -> Memory:
    return Memory.open(bank, BagOfWords(), lexicon=lexicon(), rotation=ROTATION)


@pytest.fixture(autouse=True)
def own_pieces(monkeypatch):
    monkeypatch.setattr(defaults, "reader_adapter", lambda: None)


# --------------------------------------------------------------------------------------------- from bank to examples


def test_examples_hold_what_the_bank_recalls_for_its_own_questions(memory):
    examples = build_training_set(memory, lines=4)
    assert sorted(one.question for one in examples) == sorted(one.question for one in DOCS)
    for one in examples:
        recalled = memory.recall([one.question], 4)[0]
        doc = next(doc for doc in DOCS if doc.question == one.question)
        assert list(one.lines) == [found.words for found in recalled] and one.answer == doc.answer
        places = [place for place, found in enumerate(recalled) if found.doc_id == doc.doc_id]
        assert one.true == (places[0] if places else None)
        assert doc.answer in one.true_line.split()


def test_held_out_documents_are_new_or_old_by_their_time(memory):
    splits = {one.answer: one.split for one in build_training_set(memory)}
    held = [doc for doc in DOCS if doc.split == "heldout"]
    assert [splits[doc.answer] for doc in held] == ["old"] * 4 + ["new"] * 2  # the newest third
    assert {splits[doc.answer] for doc in DOCS if doc.split == "train"} == {"train"}


def test_what_was_added_since_the_last_adaptation_is_new(tmp_path):
    bank = make_bank(tmp_path / "bank", DOCS[:16])
    since = datetime.now(UTC)
    add_documents(bank, DOCS[16:], "second")
    splits = {one.answer: one.split for one in build_training_set(open_memory(bank), since=since)}
    held = [doc for doc in DOCS if doc.split == "heldout"]
    assert [splits[doc.answer] for doc in held] == ["old"] * 4 + ["new"] * 2
    nothing_newer = {one.answer: one.split for one in build_training_set(open_memory(bank), since=datetime.now(UTC))}
    assert "new" in nothing_newer.values()  # judged by event time again


def test_numbers_are_bounded_and_drawn_by_the_seed(memory):
    few = build_training_set(memory, train=5, held_out=4, seed=1)
    counts = {split: sum(one.split == split for one in few) for split in ("train", "new", "old")}
    assert counts == {"train": 5, "new": 2, "old": 2}
    assert few == build_training_set(memory, train=5, held_out=4, seed=1)
    assert few != build_training_set(memory, train=5, held_out=4, seed=2)


def test_a_bank_without_questions_or_words_offers_nothing(tmp_path):
    empty = open_memory(make_bank(tmp_path / "empty", [Doc("d", "A town by the sea, far away.")]))
    with pytest.raises(UsageError, match=r"the bank offers nothing to adapt to: '0 replay questions, profile default'"):
        build_training_set(empty)
    wordless = open_memory(make_bank(tmp_path / "wordless", DOCS, words=0))
    with pytest.raises(UsageError, match=r"profile paper.*its profile has no word codes"):
        build_training_set(wordless)


def test_examples_come_back_from_their_file(memory, tmp_path):
    examples = build_training_set(memory)
    save_examples(tmp_path / "one.jsonl.gz", examples)
    assert load_examples(tmp_path / "one.jsonl.gz") == examples
    save_examples(tmp_path / "two.jsonl.gz", examples)
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()
    (tmp_path / "one.jsonl.gz").write_bytes((tmp_path / "one.jsonl.gz").read_bytes()[:40])
    with pytest.raises(DamagedFile, match=r"the training set cannot be read.*make it again from the bank"):
        load_examples(tmp_path / "one.jsonl.gz")


# ---------------------------------------------------------------------------------------- from examples to a candidate


def example(number: int, split: str = "train", true: int | None = 1) -> Example:
    lines = tuple(f"line{number}{place} words" for place in range(8))
    return Example(
        f"Who is {number}?", f"Name{number}", split, lines, true, f"line{number}{9 if true is None else true} words"
    )


def test_prompts_show_the_banks_lines_with_the_true_one_among_them():
    form = PromptFormat(tiny_tokenizer())
    examples = [example(number, true=(None, 0, 2, 7)[number % 4]) for number in range(200)]
    made = compose(examples, form, 4000, np.random.default_rng(0))
    sizes = []
    for one, start, length, answer in zip(
        examples, made.tokens.starts, made.tokens.lengths, made.answer_lengths, strict=True
    ):
        ids = made.tokens.values[start : start + length].tolist()
        *lines, question, last = form.tokenizer.decode(ids[:-answer]).split("\n")
        assert (question, last) == (f"Question: {one.question}", "Answer:")
        assert ids[-answer:] == form.answer(one.answer)
        sizes.append(len(lines))
        if lines:
            assert f" {one.true_line}" in lines and len(set(lines)) == len(lines)
            assert set(lines) - {f" {one.true_line}"} <= {f" {line}" for line in one.lines[: len(lines)]}
    assert set(sizes) == {0, 1, 3, 5, 8} and 0.01 < np.mean([one == 0 for one in sizes]) < 0.1


@pytest.mark.parametrize(
    ("before", "after", "promote", "reason"),
    [
        ((20.0, 30.0), (25.0, 30.0), True, r"new documents \+5.0, on old ones \+0.0"),
        ((20.0, 30.0), (25.0, 29.2), True, r"\+5.0, on old ones -0.8"),
        ((20.0, 30.0), (25.0, 28.9), False, r"old ones -1.1: old knowledge may lose at most 1 point"),
        ((20.0, 30.0), (20.0, 35.0), False, r"\+0.0, on old ones \+5.0: no better on new documents"),
        ((20.0, 30.0), (19.0, 30.0), False, r"-1.0, on old ones \+0.0: no better"),
    ],
)
def test_the_simple_rule(before, after, promote, reason):
    scores = [{"new_f1": new, "old_f1": old} for new, old in (before, after)]
    found, told = decide(*scores)
    assert found is promote
    assert re.search(reason, told)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fresh_weights_are_trained_and_written(tmp_path, kind):
    examples = [*(example(number) for number in range(8)), example(8, "new"), example(9, "old")]
    said: list[str] = []
    made = adapt(examples, language_model(kind), tmp_path, RUN, say=said.append)
    assert made.steps == 3 and made.seconds > 0 and made.held_out == {"new": 1, "old": 1, "train": 8}
    assert (made.promote, made.reason) == decide(made.before, made.after)
    adapted, config = load_adapter(language_model(kind).model, tmp_path, base_digest=language_model(kind).digest)
    assert config == KVLoraConfig()
    assert any(one.abs().max() > 0 for name, one in adapter_state(adapted).items() if "lora_B" in name)
    assert said[0].startswith("before: F1") and said[-1].startswith("after: F1")
    assert json.loads(json.dumps(made.card()))["decision"] == made.reason


def test_a_live_adapter_is_trained_on_from_where_it_stands(tmp_path):
    base, config = language_model(), KVLoraConfig(r=2, alpha=4, dropout=0.0)
    save_adapter(add_kv_lora(base.model, config), tmp_path / "live", config, base_digest=base.digest, base_name="tiny")
    live, _ = load_adapter(language_model().model, tmp_path / "live")
    before = {name: one.clone() for name, one in adapter_state(live).items()}
    examples = [example(number) for number in range(4)]
    adapt(examples, replace(base, model=live.eval()), tmp_path / "candidate", replace(RUN, steps=1, lr=1e-4))
    after, found = load_adapter(language_model().model, tmp_path / "candidate")
    assert found == config
    moved = {name: float((one - before[name]).abs().max()) for name, one in adapter_state(after).items()}
    assert 0 < max(moved.values()) < 1e-3


def test_training_helps_on_what_it_was_trained_on(tmp_path):
    """Two answers that never vary: a few dozen steps must learn them, and F1 must see it."""
    examples = [replace(example(number), answer="aa") for number in range(4)]
    examples += [replace(example(number), answer="aa", split="new") for number in range(2)]
    made = adapt(examples, language_model(), tmp_path, AdaptRun(steps=60, batch=4, lr=2e-2))
    assert made.before["new_f1"] < 50 and made.after["new_f1"] == 100.0 and made.promote


def test_judging_reads_five_lines_as_answers_do(monkeypatch):
    seen = []

    def noting(language_model, form, prompts, **options):
        seen.extend(language_model.tokenizer.decode(one) for one in prompts)
        return ["Name8"] * len(prompts)

    monkeypatch.setattr("mbc_core.training.adapt.answer_prompts", noting)
    found = language_model()
    scores = judge([example(8, "new"), example(9, "old"), example(1)], found, PromptFormat(found.tokenizer), 4000)
    assert scores == {"new_f1": 100.0, "old_f1": 0.0} and len(seen) == 2
    assert [prompt.count("\n") for prompt in seen] == [6, 6] and "line84" in seen[0] and "line85" not in seen[0]


def test_time_ends_a_run_too(tmp_path):
    made = adapt([example(1)], language_model(), tmp_path, AdaptRun(steps=None, minutes=1e-6, batch=1))
    assert made.steps == 1


def test_runs_without_end_or_examples_are_told(tmp_path):
    with pytest.raises(UsageError, match=r"the adaptation has no end.*--steps or --minutes"):
        adapt([example(1)], language_model(), tmp_path, AdaptRun(steps=None))
    with pytest.raises(UsageError, match=r"there is nothing to adapt to: '2 examples'"):
        adapt([example(1, "new"), replace(example(2), true=None, true_line="")], language_model(), tmp_path, RUN)


def test_the_second_step_runs_where_no_bank_can_be_opened(tmp_path):
    """torch, peft and transformers are there; everything that reads or searches a bank is not."""
    language_model().model.save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    save_examples(tmp_path / "set.jsonl.gz", [*(example(number) for number in range(4)), example(5, "new")])
    program = f"""
import sys
for name in ("faiss", "deltalake", "pyarrow", "apache_beam", "gguf"):
    sys.modules[name] = None
from pathlib import Path
from mbc_core.reader.language_model import load_language_model
from mbc_core.training.adapt import AdaptRun, adapt
from mbc_core.training.replay_set import load_examples
where = Path({str(tmp_path)!r})
examples, base = load_examples(where / "set.jsonl.gz"), load_language_model(where / "lm")
made = adapt(examples, base, where / "out", AdaptRun(steps=1, batch=2))
print(made.steps, sorted(one.name for one in made.folder.iterdir()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[0] == "1 ['adapter_config.json', 'adapter_model.safetensors']"


def test_random_state_outside_is_not_needed(tmp_path, memory):
    """Two runs of one seed give the same candidate, bit for bit."""
    examples = build_training_set(memory, held_out=2)
    made = []
    for name in ("one", "two"):
        torch.manual_seed(len(made))
        adapt(examples, language_model(), tmp_path / name, RUN)
        made.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]


# ------------------------------------------------------------------------------------------------ how answers end


class EndsWith(torch.nn.Module):
    """A model to which one token is always the likeliest, another nearly so."""

    def __init__(self, likeliest: int, vocabulary: int) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(vocabulary))
        self.bias.data[likeliest] = 5.0
        self.seen: list[list[int]] = []

    def forward(self, input_ids):
        self.seen += input_ids.tolist()
        return SimpleNamespace(logits=self.bias.expand(1, input_ids.shape[1], -1))


@pytest.mark.parametrize("place", [0, -1])
def test_an_adapter_keeps_the_end_of_answers_it_has_learned(memory, place):
    form = PromptFormat(tiny_tokenizer())
    end = form.stop_ids[place]
    stub = EndsWith(end, len(tiny_tokenizer()))
    examples = build_training_set(memory, lines=4)
    assert learned_end(replace(language_model(), model=stub), form, examples) == [end]
    answered = form.answer(examples[0].answer)[: -len(form.end)]
    assert stub.seen[0][-len(answered) :] == answered


def test_a_fresh_adapter_learns_the_tokenizers_own_end(memory, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("the base alone has learned no end of answers")

    monkeypatch.setattr("mbc_core.training.adapt.learned_end", never)
    adapt(build_training_set(memory, lines=4), language_model(), tmp_path, replace(RUN, steps=1))
