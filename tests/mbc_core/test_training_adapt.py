"""Adaptation in two steps: what the bank recalls becomes examples; examples become a candidate that is judged."""

from __future__ import annotations

import gzip
import json
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
from mbc_core.training.adapt import AdaptRun, adapt
from mbc_core.training.adapt_prompts import AdaptBatches, compose, learned_end
from mbc_core.training.candidate import read_candidate
from mbc_core.training.gate import GateRule, decide, mean_scores
from mbc_core.training.judge import documents_of, judge_questions
from mbc_core.training.replay_set import build_training_set, document_name
from mbc_core.training.set_file import Example, SetHeader, TrainingSet, load_set, save_set
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
    examples = build_training_set(memory, lines=4).examples
    assert sorted(one.question for one in examples) == sorted(one.question for one in DOCS)
    for one in examples:
        recalled = memory.recall([one.question], 4)[0]
        doc = next(doc for doc in DOCS if doc.question == one.question)
        assert list(one.lines) == [found.words for found in recalled] and one.answer == doc.answer
        places = [place for place, found in enumerate(recalled) if found.doc_id == doc.doc_id]
        assert one.true == (places[0] if places else None)
        assert one.document == document_name(recalled[places[0]].key) if places else one.document
        assert one.window == f"{doc.timestamp}T00:00:00Z"
        assert doc.answer in one.true_line.split()


def test_held_out_documents_are_new_or_old_by_their_time(memory):
    splits = {one.answer: one.split for one in build_training_set(memory).examples}
    held = [doc for doc in DOCS if doc.split == "heldout"]
    assert [splits[doc.answer] for doc in held] == ["old"] * 4 + ["new"] * 2  # the newest third
    assert {splits[doc.answer] for doc in DOCS if doc.split == "train"} == {"train"}


def test_what_was_added_since_the_last_adaptation_is_new(tmp_path):
    bank = make_bank(tmp_path / "bank", DOCS[:16])
    since = datetime.now(UTC)
    add_documents(bank, DOCS[16:], "second")
    splits = {one.answer: one.split for one in build_training_set(open_memory(bank), since=since).examples}
    held = [doc for doc in DOCS if doc.split == "heldout"]
    assert [splits[doc.answer] for doc in held] == ["old"] * 4 + ["new"] * 2
    nothing_newer = build_training_set(open_memory(bank), since=datetime.now(UTC))
    assert nothing_newer.counts["new"]  # judged by event time again


def test_new_and_old_documents_are_mixed_in_training(tmp_path):
    bank = make_bank(tmp_path / "bank", DOCS[:16])
    since = datetime.now(UTC)
    add_documents(bank, DOCS[16:], "second")
    opened, is_old = open_memory(bank), {one.question for one in DOCS[:16]}

    def drawn(most: int, share: float) -> tuple[int, int]:
        found = build_training_set(opened, train=most, since=since, new_share=share).of_split("train")
        old = sum(one.question in is_old for one in found)
        return len(found) - old, old

    assert drawn(8, 0.5) == (4, 4)
    assert drawn(8, 0.25) == (2, 6)
    assert drawn(16, 0.5) == (6, 10)  # there are no more new ones: old ones fill
    assert drawn(18, 0.0) == (6, 12)  # and new ones fill what old ones do not
    assert drawn(16, 1.0) == (6, 0)  # without old replay nothing fills


def test_the_set_is_of_one_instant(tmp_path):
    bank = make_bank(tmp_path / "bank", DOCS[:16])
    moment = datetime.now(UTC)
    before = build_training_set(Memory.open(bank, BagOfWords(), as_of=moment, lexicon=lexicon(), rotation=ROTATION))
    add_documents(bank, DOCS[16:], "second")
    memory = Memory.open(bank, BagOfWords(), as_of=moment, lexicon=lexicon(), rotation=ROTATION)
    again = build_training_set(memory, as_of=moment)
    assert again.examples == before.examples and again.header.passages == before.header.passages == 16
    assert again.header.as_of == moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
    assert len(build_training_set(open_memory(bank)).examples) == 24


def test_the_header_tells_where_the_set_came_from(memory):
    found = build_training_set(memory, train=5, held_out=4, seed=3)
    told = found.header
    assert (told.profile, told.encoder, told.seed, told.lines) == ("default", BagOfWords.encoder_id, 3, 8)
    assert told.codebook_versions == (0,) and told.passages == 24 and "+" in told.code_version
    assert {split: sum(rows.values()) for split, rows in told.replay.items()} == {"train": 5, "new": 2, "old": 2}
    assert {split: sum(rows.values()) for split, rows in told.offered.items()} == {"train": 18, "heldout": 6}
    assert set(told.offered["train"]) <= {f"{doc.timestamp}T00:00:00Z" for doc in DOCS}
    assert len(told.bank) == 16 and str(memory.bank.uri) not in json.dumps(told.bank)


def test_numbers_are_bounded_and_drawn_by_the_seed(memory):
    few = build_training_set(memory, train=5, held_out=4, seed=1)
    assert few.counts == {"train": 5, "new": 2, "old": 2, "canary": 0}
    assert few.examples == build_training_set(memory, train=5, held_out=4, seed=1).examples
    assert few.examples != build_training_set(memory, train=5, held_out=4, seed=2).examples


def test_a_bank_without_questions_or_words_offers_nothing(tmp_path):
    empty = open_memory(make_bank(tmp_path / "empty", [Doc("d", "A town by the sea, far away.")]))
    with pytest.raises(UsageError, match=r"the bank offers nothing to adapt to: '0 replay questions, profile default'"):
        build_training_set(empty)
    wordless = open_memory(make_bank(tmp_path / "wordless", DOCS, words=0))
    with pytest.raises(UsageError, match=r"profile paper.*its profile has no word codes"):
        build_training_set(wordless)


def test_a_set_comes_back_from_its_file(memory, tmp_path):
    found = build_training_set(memory)
    save_set(tmp_path / "one.jsonl.gz", found)
    assert load_set(tmp_path / "one.jsonl.gz") == found
    save_set(tmp_path / "two.jsonl.gz", found)
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()


def test_odd_letters_and_an_empty_set_come_back(tmp_path):
    odd = Example("Wer?\u2028 Ünï", 'a "b"\nc', "canary", ("x\ty", ""), None, "", "00", "undated")
    for examples in ([odd], []):
        found = TrainingSet.of(examples, SetHeader(codebook_versions=(3, 4), live={"ab": {"version": "0001-x"}}))
        save_set(tmp_path / "set.jsonl.gz", found)
        assert load_set(tmp_path / "set.jsonl.gz") == found


def _cut(data: bytes) -> bytes:
    return data[:40]


def _reworded(data: bytes) -> bytes:
    return gzip.compress(gzip.decompress(data).replace(b"Who", b"Why", 1))


def _other_format(data: bytes) -> bytes:
    return gzip.compress(gzip.decompress(data).replace(b'"mbc_training_set": 1', b'"mbc_training_set": 9'))


@pytest.mark.parametrize(
    "damage", [_cut, _reworded, _other_format, lambda data: b"{}", lambda data: gzip.compress(b"[]")]
)
def test_a_damaged_set_is_refused(tmp_path, damage):
    path = tmp_path / "set.jsonl.gz"
    save_set(path, TrainingSet.of([example(1)]))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedFile, match=r"the training set cannot be read.*make it again from the bank"):
        load_set(path)


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


def test_steps_show_every_question_once_before_any_comes_again():
    form = PromptFormat(tiny_tokenizer())
    batches = AdaptBatches([example(number) for number in range(10)], [], form, 4000, 0, 4, 100_000)
    places = [place for number in range(5) for place in batches._places(number, 7)]
    assert sorted(places[:10]) == sorted(places[10:]) == list(range(10)) and places[:10] != places[10:]
    fresh = AdaptBatches(batches.training, [], form, 4000, 0, 4, 100_000)
    for number in (4, 1, 3):  # a resumed run asks for its step without the ones before
        for one, other in zip(batches.step(number, 7), fresh.step(number, 7), strict=True):
            assert torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)


def test_a_closed_book_sees_no_memory():
    form = PromptFormat(tiny_tokenizer())
    examples = [example(number) for number in range(4)]
    made = compose(examples, form, 4000, np.random.default_rng(0), no_memory=1.0)
    assert "line" not in form.tokenizer.decode(made.tokens.values.tolist())
    shown = AdaptBatches([], examples, form, 4000, 0, 4, 4000).shown_dev(1.0)
    assert [one.lines for one in shown] == [()] * 4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fresh_weights_are_trained_and_written(tmp_path, kind):
    examples = [*(example(number) for number in range(8)), example(8, "new"), example(9, "old")]
    said: list[str] = []
    made = adapt(examples, language_model(kind), tmp_path, RUN, say=said.append)
    assert made.steps == made.best_step == 3 and made.seconds > 0
    assert made.held_out == {"new": 1, "old": 1, "train": 8, "canary": 0}
    assert made.decision == decide(made.scores_before, made.scores_after, documents_of(examples))
    assert (made.decision.reason, made.before, made.after) == (
        "too few",
        mean_scores(made.scores_before),
        mean_scores(made.scores_after),
    )
    adapted, config = load_adapter(language_model(kind).model, tmp_path, base_digest=language_model(kind).digest)
    assert config == KVLoraConfig()
    assert any(one.abs().max() > 0 for name, one in adapter_state(adapted).items() if "lora_B" in name)
    assert said[0].startswith("before: F1") and said[-2].startswith("after: F1")
    assert said[-1] == made.decision.sentence
    kept = read_candidate(tmp_path)
    assert kept.card == json.loads(json.dumps(made.card()))
    assert kept.card["decision"]["reason"] == "too few" and kept.base_digest == language_model(kind).digest


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
    examples += [replace(example(number), answer="aa", split="old") for number in range(2)]
    made = adapt(
        examples, language_model(), tmp_path, AdaptRun(steps=60, batch=4, lr=2e-2), rule=GateRule(min_questions=2)
    )
    assert made.before["new_f1"] < 50 and made.after["new_f1"] == 100.0
    assert made.decision.promote and made.decision.reason == "promoted"
    assert made.card()["decision"]["rule"]["min_questions"] == 2


def test_judging_reads_five_lines_as_answers_do(monkeypatch):
    seen = []

    def noting(language_model, form, prompts, **options):
        seen.extend(language_model.tokenizer.decode(one) for one in prompts)
        return ["Name8"] * len(prompts)

    monkeypatch.setattr("mbc_core.training.judge.answer_prompts", noting)
    found, asked = language_model(), [example(8, "new"), example(9, "old"), example(1), example(7, "new")]
    scores = judge_questions(asked, found, PromptFormat(found.tokenizer), 4000)
    assert {split: one.tolist() for split, one in scores.items()} == {"new": [100.0, 0.0], "old": [0.0], "canary": []}
    assert mean_scores(scores) == {"new_f1": 50.0, "old_f1": 0.0}
    assert documents_of([replace(one, document=one.answer) for one in asked])["new"] == ["Name8", "Name7"]
    assert [prompt.count("\n") for prompt in seen] == [6, 6, 6] and "line84" in seen[0] and "line85" not in seen[0]


def test_time_ends_a_run_too(tmp_path):
    made = adapt([example(1)], language_model(), tmp_path, AdaptRun(steps=None, minutes=1e-6, batch=1))
    assert made.steps == 1


def test_runs_without_end_or_examples_are_told(tmp_path):
    with pytest.raises(UsageError, match=r"the adaptation has no end.*--steps or --minutes"):
        adapt([example(1)], language_model(), tmp_path, AdaptRun(steps=None))
    with pytest.raises(UsageError, match=r"there is nothing to adapt to: '2 examples'"):
        adapt([example(1, "new"), replace(example(2), true=None, true_line="")], language_model(), tmp_path, RUN)


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
    examples = build_training_set(memory, lines=4).examples
    assert learned_end(replace(language_model(), model=stub), form, examples) == [end]
    answered = form.answer(examples[0].answer)[: -len(form.end)]
    assert stub.seen[0][-len(answered) :] == answered


def test_a_fresh_adapter_learns_the_tokenizers_own_end(memory, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("the base alone has learned no end of answers")

    monkeypatch.setattr("mbc_core.training.adapt.learned_end", never)
    adapt(build_training_set(memory, lines=4), language_model(), tmp_path, replace(RUN, steps=1))
