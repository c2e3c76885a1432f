"""Batches of the attend read against plain loops; the naming loss; what a step teaches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mbc_core.reader.attend import AttendConfig, AttendProjector
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.attend import ATTEND_MIXTURE
from mbc_core.training.attend_data import AttendData, attend_source, joined
from mbc_core.training.attend_loop import AttendTrainer, AuxLoss, Namer
from mbc_core.training.attend_samples import aux_targets, padded_table
from mbc_core.training.batches import Ragged
from mbc_core.training.loop import Schedule
from mbc_core.training.prepared import load_prepared
from tests.mbc_core.prepared_data import write_prepared
from tests.mbc_core.tiny_reader import SLOTS, WIDTH, BagOfWords, language_model, lexicon, pieces, tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")

SOFT, PAD = 3, 7


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_prepared(write_prepared(tmp_path_factory.mktemp("prepared"), 16))


def made(data, variants=(1.0, 0.0), bos=None, **mixture) -> AttendData:
    rotation, codebook = pieces()
    return attend_source(
        data, lexicon(), PromptFormat(tokenizer(bos)), [codebook], rotation, replace(ATTEND_MIXTURE, **mixture), SOFT,
        variants, PAD, encoder=BagOfWords(), needs_vectors=True, seed=0, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("bos", [None, "<|start|>"])
def test_a_batch_is_what_a_plain_loop_composes(data, bos):
    source = made(data, bos=bos).source
    samples = source.samples
    for batch in source.pool(seed=1, number=0, size=24, rows=8):
        flat, width = batch.ids.flatten(), batch.ids.shape[1]
        answers = iter(batch.targets.tolist())
        places = iter(batch.places.tolist())
        for row in range(batch.samples):
            lines = [n for n, at in enumerate(batch.first.tolist()) if row * width <= at < (row + 1) * width]
            expected = [*samples.start]
            for line in lines:
                assert batch.first[line] == row * width + len(expected)
                expected += [PAD] * SOFT + [*samples.newline]
            ids = batch.ids[row].tolist()
            assert ids[: len(expected)] == expected
            question = _question_of(samples, ids[len(expected) :])
            assert all(batch.asked[line] == question for line in lines)
            trues = [line for line in batch.true_lines.tolist() if line in lines]
            assert [batch.passages[line] for line in trues] == [samples.rows[question]] * bool(lines)
            assert len({int(batch.passages[line]) for line in lines}) == len(lines) in (0, 1, 3, 5)
            whole = [*expected, *_list(samples.questions, question), *_list(samples.answers, question)]
            assert ids == whole + [PAD] * (width - len(whole))
            for offset in range(len(_list(samples.answers, question))):
                at = len(whole) - len(_list(samples.answers, question)) + offset
                assert next(places) == row * width + at - 1 and next(answers) == flat[row * width + at]
        assert next(answers, None) is None and next(places, None) is None


def _list(lists: Ragged, which: int) -> list[int]:
    start = int(lists.starts[which])
    return lists.values[start : start + int(lists.lengths[which])].tolist()


def _question_of(samples, ids: list[int]) -> int:
    """The question whose tokens and answer stand here."""
    matching = [
        n
        for n in range(len(samples.rows))
        if ids[: samples.questions.lengths[n] + samples.answers.lengths[n]]
        == [*_list(samples.questions, n), *_list(samples.answers, n)]
    ]
    assert len(matching) == 1
    return matching[0]


def test_a_pool_is_a_function_of_its_seed_and_number(data):
    source = made(data).source
    one, same, other = (source.pool(1, number, 16, 8) for number in (3, 3, 4))
    assert all(
        torch.equal(a.ids, b.ids) and torch.equal(a.passages, b.passages) for a, b in zip(one, same, strict=True)
    )
    assert any(not torch.equal(a.passages, b.passages) for a, b in zip(one, other, strict=True))


def test_lines_show_the_vectors_of_their_passages_and_questions(data):
    for variants, expected in (((0.0, 1.0), data.embeddings), ((1.0, 0.0), None)):
        found = made(data, variants)
        batch = found.source.pool(0, 0, 8, 8)[0]
        passages, questions = found.tables.shown(batch)
        if expected is not None:
            assert passages.numpy() == pytest.approx(expected[batch.passages.numpy()], abs=1e-3)
        else:
            assert 0.3 < float(passages.norm(dim=1).mean()) < 0.999, "quantized vectors are shorter"
        asked = [n for n in batch.asked.tolist() if n < len(data.questions)]
        kept = [row for row, n in enumerate(batch.asked.tolist()) if n < len(data.questions)]
        assert questions[kept].numpy() == pytest.approx(data.question_embeddings[asked], abs=1e-3)


def test_without_an_encoder_no_cloze_question_is_asked(data):
    rotation, codebook = pieces()
    told = attend_source(
        data, lexicon(), PromptFormat(tokenizer()), [codebook], rotation, ATTEND_MIXTURE, SOFT, (1.0, 0.0), PAD,
        encoder=None, needs_vectors=True, seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    assert len(told.source.samples.rows) == len(data.questions) == len(told.tables.questions)


def test_tables_of_ids_end_in_nothing():
    lists = Ragged.of([[5, 6, 7], [], [8]])
    assert padded_table(lists, 2).tolist() == [[5, 6], [-1, -1], [8, -1]]
    assert padded_table(Ragged.of([[], []]), 2).tolist() == [[-1], [-1]]


def test_words_and_answer_share_the_weight():
    words, answers = torch.tensor([[4, 9, -1], [-1, -1, -1]]), torch.tensor([[3, -1], [6, 2]])
    ids, weights = aux_targets(words, answers, 0.25)
    assert ids.tolist() == [[4, 9, 0, 3, 0], [0, 0, 0, 6, 2]]
    assert weights.tolist() == [[0.375, 0.375, 0.0, 0.25, 0.0], [0.0, 0.0, 0.0, 0.125, 0.125]]


def test_naming_is_a_mixture_of_the_soft_tokens_distributions():
    torch.manual_seed(0)
    soft, embeddings = torch.randn(2, 3, 4), torch.randn(11, 4)
    ids, weights = torch.tensor([[1, 5], [7, 0]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    namer = Namer(11)
    with torch.no_grad():
        namer.scale.fill_(1.7)
        namer.bias.copy_(torch.randn(11))
    found = namer(soft, embeddings, ids, weights).detach()
    for row in range(2):
        share = torch.zeros(11)
        for token in soft[row]:
            unit = token / (token.square().mean() + 1e-6).sqrt()
            share += torch.softmax(1.7 * (embeddings @ unit) + namer.bias.detach(), 0) / 3
        expected = -sum(w * torch.log(share[n]) for n, w in zip(ids[row].tolist(), weights[row], strict=True))
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-4)


def test_the_weight_of_naming_falls_and_stays():
    aux = AuxLoss(start=1.0, end=0.2, until=0.5)
    assert [aux.weight(share) for share in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def trainer(data, found: AttendData, kind: str = "llama", **options) -> AttendTrainer:
    base = language_model(kind)
    adapted = replace(base, model=add_kv_lora(base.model, KVLoraConfig(r=2, alpha=4, dropout=0.0)))
    projector = AttendProjector(AttendConfig(WIDTH, 32, SOFT, hidden=32, rank=8, dropout=0.0), scale=0.3)
    schedule = Schedule(60, None, 5e-3)
    return AttendTrainer(adapted, projector, found.tables, schedule, aux=AuxLoss(**options))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_moves_projector_and_adapter_and_leaves_the_base(data, kind):
    found = made(data)
    learner = trainer(data, found, kind)
    frozen = {
        name: one.clone() for name, one in learner.language_model.model.named_parameters() if not one.requires_grad
    }
    before = {name: one.clone() for name, one in learner.weights.items()}
    batches = found.source.pool(0, 0, 16, 8)
    for _ in range(2):  # B starts at zero, so A moves from the second step on
        learner.step(batches)
    moved = {name for name, one in learner.weights.items() if not torch.equal(one, before[name])}
    assert {name for name in before if name.startswith(("projector.", "namer."))} <= moved
    assert any("lora_B" in name for name in moved) and any("lora_A" in name for name in moved)
    now = dict(learner.language_model.model.named_parameters())
    assert all(torch.equal(now[name], one) for name, one in frozen.items())


def test_the_answer_alone_teaches_the_projector(data):
    """Without naming, the gradient comes through the language model."""
    found = made(data, no_memory=0.0)
    learner = trainer(data, found, start=0.0, end=0.0)
    batches = found.source.pool(0, 0, 16, 16)
    before = {name: one.detach().clone() for name, one in learner.projector.named_parameters()}
    learner.step(batches)
    assert all(not torch.equal(one, before[name]) for name, one in learner.projector.named_parameters())


def test_the_loss_falls_and_answers_depend_on_the_vectors(data):
    found = made(data, no_memory=0.0, cloze=0.0, passages=(1,), weights=(1.0,))
    learner = trainer(data, found)
    batches = found.source.pool(0, 0, 16, 16)
    first = learner.loss(batches)
    for _ in range(40):
        learner.step(batches)
    assert learner.loss(batches) < 0.7 * first
    shuffled = [replace(one, passages=one.passages.roll(1)) for one in batches]
    assert learner.loss(shuffled) > learner.loss(batches)


def test_sets_are_joined_row_by_row(data):
    whole = joined([data, data])
    assert len(whole) == 2 * len(data) and whole.questions == [*data.questions, *data.questions]
    assert whole.rows.tolist() == [*data.rows.tolist(), *(data.rows + len(data)).tolist()]
    for number, row in enumerate(whole.rows.tolist()):
        assert np.array_equal(whole.embeddings[row], data.embeddings[data.rows[number % len(data.questions)]])
    assert joined([data]) is data
    assert SLOTS * pieces()[1].width == WIDTH
