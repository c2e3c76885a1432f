"""Banks that a trained paper model is measured on, and the model as a method of the common protocol."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mbc_core.codes import quantize, to_slots
from mbc_core.errors import UsageError
from mbc_core.evaluation.methods import MethodSet
from mbc_core.paper.aggregation import Memory, flat_memory
from mbc_core.paper.files import save_paper_model
from mbc_core.reader.generate import answer_prompts
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.paper_data import as_lists
from mbc_core.training.paper_eval import CodeSet, code_set, evaluate_paper, small_banks
from mbc_core.training.paper_method import PaperMethod
from mbc_core.training.prepare import prepare
from mbc_core.training.prepared import load_prepared
from tests.mbc_core.tiny_paper import config, data, model, on_device, passages, pieces
from tests.mbc_core.tiny_reader import language_model, tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")
KINDS = {
    "learned": config(),
    "address": config("address"),
    "mac": config(quantize=False, kv_lora=False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return (*data(folder), folder)


def stirred(folder, configured):
    """A model whose answers depend on what it reads: its new parts are scaled up."""
    built = model(folder, configured).eval()
    with torch.no_grad():
        for name, one in built.prefix.named_parameters():
            if "outer" in name or "skip" in name:
                one *= 4
    return built


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_is_encoded_passage_by_passage_in_its_order(made, kind):
    tokens, encoder, folder = made
    built = model(folder, KINDS[kind]).eval()
    rows = np.array([5, 0, 17, 3])
    found = code_set(built, on_device(tokens, encoder, KINDS[kind].codes), rows)
    if kind == "address":
        assert torch.equal(found.codes, torch.from_numpy(tokens.codes[4][rows].astype(np.int64)))
        return
    lists = as_lists(tokens.passages)
    for place, row in enumerate(rows):
        ids = torch.tensor([lists[row]])
        one = built.encode_documents(ids, torch.ones_like(ids))[0]
        assert (
            torch.equal(found.codes[place], one)
            if found.counted
            else torch.allclose(found.codes[place], one, atol=1e-5)
        )


def test_a_bank_of_its_own_for_each_question_counts_its_passages():
    codes = torch.tensor([[0, 1], [1, 1], [2, 0]])
    held = CodeSet(codes, torch.eye(3))
    memory = held.memory(torch.tensor([[0, 1], [2, 0]]))
    assert memory.counts.tolist() == [[1, 3, 0], [2, 1, 1]] and torch.equal(memory.vectors, torch.eye(3))
    assert held.memory().counts.tolist() == [2, 3, 1]
    floats = CodeSet(torch.arange(12.0).reshape(3, 2, 2), torch.eye(3))
    assert floats.memory(torch.tensor([[2], [0]])).vectors.tolist() == [[[8, 9], [10, 11]], [[0, 1], [2, 3]]]


def test_small_banks_hold_the_right_passage_and_distinct_others():
    right = np.array([0, 3, 9])
    found = small_banks(right, 10, 4, seed=1)
    assert (found[:, 0] == right).all() and all(len(set(row)) == 4 for row in found.tolist())
    assert 0 <= found.min() <= found.max() <= 9 and not np.array_equal(found, small_banks(right, 10, 4, seed=2))
    assert sorted(small_banks(right, 10, 10, seed=0)[1].tolist()) == list(range(10))


@pytest.mark.parametrize("kind", KINDS)
def test_every_bank_makes_a_row_and_a_bank_of_all_is_the_whole_bank(made, kind):
    tokens, encoder, folder = made
    device = on_device(tokens, encoder, KINDS[kind].codes)
    built = stirred(folder, KINDS[kind])
    said: list[str] = []
    rows = evaluate_paper(
        built, tokens, device, PromptFormat(tokenizer()), strangers=code_set(built, device, np.arange(20)[::-1].copy()),
        banks=(1, 20, 256), limit=6, say=said.append,
    )  # fmt: skip
    names = [row["read"] for row in rows]
    permuted = [] if kind == "mac" else ["permuted"]
    assert names == ["aggregate", "shuffled", *permuted, "bank of 1", "bank of 20"] and len(said) == len(rows)
    by_name = {row["read"]: row for row in rows}
    same = ("em", "f1", "em_prefix", "k", "questions")
    assert [by_name["aggregate"][key] for key in same] == [by_name["bank of 20"][key] for key in same]
    assert by_name["aggregate"]["bytes_per_passage"] == (4 * 4 * 32 if kind == "mac" else 5)
    assert all(row["questions"] == 6 for row in rows)


def test_the_closed_book_makes_one_row_without_memory(made):
    tokens, encoder, folder = made
    built = model(folder, KINDS["address"])
    seen = []
    built.aggregator.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    (row,) = evaluate_paper(
        built, tokens, on_device(tokens, encoder, "address"), PromptFormat(tokenizer()), closed=True, limit=3
    )
    assert row["read"] == "closed" and row["bytes_per_passage"] == 0 and seen and all(one is None for one in seen)


@pytest.fixture(scope="module")
def sets(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    own = passages(12)
    prepare(made[2], None, own, folder / "own")
    prepare(made[2], None, passages(30)[12:], folder / "others")
    return MethodSet.of("towns", load_prepared(folder / "own"), load_prepared(folder / "others"))


def folder_of(made, tmp_path, kind, **card):
    built = stirred(made[2], KINDS[kind])
    save_paper_model(built, tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"run": {"closed": False, **card}}))
    return built


def method(made, folder, **options):
    return PaperMethod(language_model(), folder, name="m", encoder_folder=made[2], rotation=pieces()[0], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_reads_every_passage_it_was_given(made, sets, tmp_path, kind):
    built = folder_of(made, tmp_path, kind)
    asked = [0, 3, 5, 9]
    whole = method(made, tmp_path)
    whole.start(sets)
    whole.adapt(range(8))
    said = whole.answer(asked)
    parts = method(made, tmp_path)
    parts.start(sets)
    parts.adapt([0, 1, 2])
    parts.adapt([3, 4, 5, 6, 7])
    assert parts.answer(asked) == said
    assert said == oracle(built, made, sets, range(8), asked, kind)
    config_ = KINDS[kind]
    size = whole.size()
    assert size.entries == 8 and size.model == (tmp_path / "paper.safetensors").stat().st_size
    wanted = 4 * 4 * 32 * 8 if kind == "mac" else 9 * 4 * 8 // 8
    assert (size.kind, size.bank, size.slots) == ("floats" if kind == "mac" else "codes", wanted, config_.tokens)


def oracle(built, made, sets, documents, asked, kind):
    """Codes one passage at a time, the flat memory, answers one question at a time."""
    _, encoder, _ = made
    prepared = sets.prepared
    rows = sets.rows_of(list(documents))
    codes = []
    for row in rows:
        if kind == "address":
            slots = to_slots(prepared.embeddings[row : row + 1], pieces()[0], 4)
            codes.append(torch.from_numpy(quantize(slots, pieces()[1].codewords).astype(np.int64)))
        else:
            ids = torch.tensor([encoder.tokenize([prepared.table["text"][int(row)].as_py()])[0].ids])
            codes.append(built.encode_documents(ids, torch.ones_like(ids)))
    joined = torch.cat(codes)
    memory = Memory(joined.flatten(0, 1)) if kind == "mac" else flat_memory(built.code_vectors().detach(), joined)
    form = PromptFormat(tokenizer())
    answers = []
    for place in asked:
        question = prepared.questions[place]
        if kind == "address":
            named = {"embeddings": torch.from_numpy(prepared.question_embeddings[place : place + 1])}
        else:
            ids = torch.tensor(encoder.question_tokens([question]))
            named = {"ids": ids, "mask": torch.ones_like(ids)}
        with torch.no_grad():
            pairs = built.read(built.queries(**named), memory)
        prompt = form.build([], question, 512).ids
        answers += answer_prompts(built.language_model, form, [prompt], prefixes=lambda places, pairs=pairs: pairs)
    return answers


def test_the_shuffled_bank_holds_as_many_strangers_and_the_closed_book_none(made, sets, tmp_path):
    folder_of(made, tmp_path, "address")
    shuffled = method(made, tmp_path, shuffled=True)
    shuffled.start(sets)
    shuffled.adapt(range(5))
    shuffled.adapt(range(5, 12))
    held = torch.cat(shuffled._held)
    slots = to_slots(sets.strangers.embeddings[:12], pieces()[0], 4)
    assert torch.equal(held, torch.from_numpy(quantize(slots, pieces()[1].codewords).astype(np.int64)))
    closed_at = tmp_path / "closed"
    folder_of(made, closed_at, "address", closed=True)
    closed = method(made, closed_at)
    closed.start(sets)
    before = closed.answer([0, 1])
    closed.adapt(range(12))
    assert closed.answer([0, 1]) == before and closed.size().kind == "none" and closed.read == "none"
    assert len({shuffled.identity, closed.identity, method(made, tmp_path).identity}) == 3


def test_the_base_is_left_as_it_was(made, sets, tmp_path):
    folder_of(made, tmp_path, "address")
    base = language_model()
    before = {name: one.clone() for name, one in base.model.state_dict().items()}
    used = PaperMethod(base, tmp_path, name="m", rotation=pieces()[0])
    used.start(sets)
    used.adapt([0])
    used.answer([0])
    used.close()
    after = base.model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    again = PaperMethod(base, tmp_path, name="m", rotation=pieces()[0])
    again.start(sets)
    assert again.answer([0]) is not None


def test_what_is_missing_is_named(made, sets, tmp_path):
    folder_of(made, tmp_path, "learned")
    with pytest.raises(UsageError, match="sentence encoder"):
        PaperMethod(language_model(), tmp_path, name="m").model  # noqa: B018
    alone = PaperMethod(language_model(), tmp_path, name="m", shuffled=True)
    with pytest.raises(UsageError, match="other documents"):
        alone.start(MethodSet.of("towns", sets.prepared))
