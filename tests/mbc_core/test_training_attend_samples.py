"""Batches of the attend read against plain loops; the dictionary; what naming and a step teach."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mbc_core.reader.attend import ANSWER, TOPIC, AttendConfig, AttendProjector
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.attend_data import AttendData, Shown, attend_source, joined
from mbc_core.training.attend_dictionary import Dictionary
from mbc_core.training.attend_loop import AttendTrainer, Projectors
from mbc_core.training.attend_naming import NamingPhase, learn_to_name, named_loss, start_from_frequencies
from mbc_core.training.attend_run import ATTEND_MIXTURE
from mbc_core.training.attend_sentences import sentence_passages
from mbc_core.training.batches import Ragged
from mbc_core.training.loop import Schedule
from mbc_core.training.prepared import load_prepared
from tests.mbc_core.prepared_data import write_prepared
from tests.mbc_core.tiny_reader import SLOTS, WIDTH, BagOfWords, documents, language_model, lexicon, pieces, tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")

SOFT, PAD = 3, 7


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_prepared(write_prepared(tmp_path_factory.mktemp("prepared"), 16))


@pytest.fixture(scope="module")
def dictionary(data):
    return Dictionary.of(data, 70, BagOfWords(), PromptFormat(tokenizer()))


def made(
    data, dictionary, variants=(1.0, 0.0), bos=None, folds=None, as_found=0.0, encoder=None, **mixture
) -> AttendData:
    rotation, codebook = pieces()
    return attend_source(
        data, lexicon(), PromptFormat(tokenizer(bos)), [codebook], rotation, replace(ATTEND_MIXTURE, **mixture),
        Shown(SOFT, variants, PAD, as_found), dictionary, encoder=encoder or BagOfWords(),
        folds=np.arange(len(data)) % 2 if folds is None else folds, seed=0, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("bos", [None, "<|start|>"])
def test_a_batch_is_what_a_plain_loop_composes(data, dictionary, bos):
    source = made(data, dictionary, bos=bos).source
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
            assert not lines or samples.rows[question] in [int(batch.passages[line]) for line in lines]
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


def test_a_pool_is_a_function_of_its_seed_and_number(data, dictionary):
    source = made(data, dictionary).source
    one, same, other = (source.pool(1, number, 16, 8) for number in (3, 3, 4))
    assert all(
        torch.equal(a.ids, b.ids) and torch.equal(a.passages, b.passages) for a, b in zip(one, same, strict=True)
    )
    assert any(not torch.equal(a.passages, b.passages) for a, b in zip(one, other, strict=True))


def test_a_share_of_samples_shows_what_recall_finds(data, dictionary):
    source = made(data, dictionary, as_found=1.0, no_memory=0.0, cloze=0.0, passages=(1,), weights=(1.0,)).source
    missed = source.samples.ranks > 0
    assert missed.any() and not missed.all()
    for batch in source.pool(0, 0, 64, 64):
        for question, passage in zip(batch.asked.tolist(), batch.passages.tolist(), strict=True):
            first = source.samples.others[question, 0] if missed[question] else source.samples.rows[question]
            assert passage == first


def test_lines_show_the_vectors_of_their_passages_and_questions(data, dictionary):
    for variants, expected in (((0.0, 1.0), data.embeddings), ((1.0, 0.0), None)):
        found = made(data, dictionary, variants)
        batch = found.source.pool(0, 0, 8, 8)[0]
        passages, questions, folds = found.tables.shown(batch)
        if expected is not None:
            assert passages.numpy() == pytest.approx(expected[batch.passages.numpy()], abs=1e-3)
        else:
            assert 0.3 < float(passages.norm(dim=1).mean()) < 0.999, "quantized vectors are shorter"
        kept = [row for row, n in enumerate(batch.asked.tolist()) if n < len(data.questions)]
        assert questions[kept].numpy() == pytest.approx(data.question_embeddings[batch.asked[kept].numpy()], abs=1e-3)
        assert torch.equal(folds, batch.passages % 2)


def test_the_dictionary_holds_the_commonest_words_as_the_encoder_sees_them(data, dictionary):
    assert len(dictionary.words) == len({word.casefold() for word in dictionary.words}) == 70
    assert {"founded", "harbour", "the"} <= {word.casefold() for word in dictionary.words[:12]}
    exact = torch.from_numpy(BagOfWords().encode_questions(dictionary.words))
    assert torch.allclose(dictionary.vectors, exact - exact.mean(0))
    form = PromptFormat(tokenizer())
    for word, tokens in zip(dictionary.words, dictionary.tokens.tolist(), strict=True):
        ids = form.encode_many([f" {word}"])[0][:4]
        assert tokens == ids + [-1] * (4 - len(ids))


def test_targets_are_salient_words_and_the_words_of_the_answer(data, dictionary):
    words, answers = dictionary.targets(data)
    assert words.shape == (16, 24) and answers.shape == (16, 6)
    for row, doc in enumerate(documents(16)):
        said, scores = data.words_of(row)
        best = [said[place].casefold() for place in np.argsort(-scores, kind="stable")[:24]]
        named = [dictionary.words[n].casefold() for n in words[row].tolist() if n >= 0]
        assert named == list(dict.fromkeys(word for word in best if word in set(named))) and named
        sought = [dictionary.words[n] for n in answers[row].tolist() if n >= 0]
        assert sought in ([doc.answer], []), "one word, if the dictionary has it"
    assert dictionary.answer_targets(["the harbour of salt"]).tolist()[0][:2] == [
        dictionary.words.index("harbour"), dictionary.words.index("salt")
    ]  # fmt: skip


def test_named_loss_is_the_mean_over_rows_that_name_anything():
    likelihood = torch.log_softmax(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), -1)
    targets = torch.tensor([[1, 4], [2, -1], [-1, -1]])
    first = -(likelihood[0, 1] + likelihood[0, 4]) / 2
    assert named_loss(likelihood, targets) == pytest.approx(float((first - likelihood[1, 2]) / 2))


def fresh(dictionary, **changes) -> AttendProjector:
    torch.manual_seed(0)
    config = AttendConfig(WIDTH, 32, len(dictionary.words), answers=2, topics=1, hidden=32, **changes)
    return AttendProjector(config, dictionary.vectors, dictionary.tokens)


def test_naming_starts_from_frequencies_and_learns(data, dictionary):
    found = made(data, dictionary, cloze=0.0)
    projector = fresh(dictionary, dropout=0.0)
    start_from_frequencies(projector, found.naming)
    counts = np.full(len(dictionary.words), 0.05)
    for row in found.naming.words.tolist():
        for word in (n for n in row if n >= 0):
            counts[word] += 1
    assert projector.bias[TOPIC].exp().detach().numpy() == pytest.approx(counts / counts.sum(), rel=1e-4)
    said: list[str] = []
    phase = NamingPhase(steps=60, batch=16, lr=3e-3, weight_decay=0.0)
    curve = learn_to_name(projector, found.naming, found.naming, phase, (1.0, 0.0), say=said.append)
    assert curve[-1]["held_out_answers"] < 0.7 * curve[0]["held_out_answers"] and len(said) == len(curve)
    assert projector.likely.abs().sum() == 0 and not projector.training
    one = found.naming
    logits = projector.logits(one.vectors[0, one.rows].float(), one.questions.float())
    now = float(named_loss(logits.log_softmax(-1)[:, ANSWER], one.answers).detach())
    assert now == pytest.approx(min(line["held_out_answers"] for line in curve), rel=0.2)


def test_the_best_projector_is_kept_and_a_fold_sees_its_own_half_only(data, dictionary):
    found = made(data, dictionary, cloze=0.0)
    other = replace(found.naming, vectors=found.naming.vectors.clone())
    other.vectors[:, 1::2] = torch.nan  # were a passage of the other half looked at, the weights would be no numbers
    projector = fresh(dictionary)
    learn_to_name(projector, other, found.naming, NamingPhase(steps=4, batch=16), (1.0, 0.0), fold=0)
    assert all(torch.isfinite(weight).all() for weight in projector.parameters())
    curve = learn_to_name(fresh(dictionary), found.naming, found.naming, NamingPhase(steps=8, lr=50.0), (1.0, 0.0))
    sums = [line["held_out_answers"] + line["held_out_words"] for line in curve]
    again = fresh(dictionary)
    learn_to_name(again, found.naming, found.naming, NamingPhase(steps=8, lr=50.0), (1.0, 0.0))
    logits = again.logits(
        found.naming.vectors[0, found.naming.rows].float(), found.naming.questions.float()
    ).log_softmax(-1)
    here = named_loss(logits[:, ANSWER], found.naming.answers) + named_loss(
        logits[:, TOPIC], found.naming.words[found.naming.rows]
    )
    assert float(here.detach()) == pytest.approx(min(sums), rel=1e-3) and min(sums) < sums[-1]


def test_a_line_is_named_by_the_projector_that_has_not_seen_its_passage(data, dictionary):
    halves = (fresh(dictionary), fresh(dictionary))
    with torch.no_grad():
        halves[0].bias[:, 3] += 50.0
        halves[1].bias[:, 5] += 50.0
    both = Projectors(fresh(dictionary), halves)
    vectors = torch.from_numpy(data.embeddings[:4])
    ids, likely = both.chosen(vectors, vectors, torch.tensor([0, 1, 0, 1]))
    first = [int(dictionary.tokens[5, 0]), int(dictionary.tokens[3, 0])]
    assert ids[:, 0].tolist() == first * 2, "fold 0 by the projector of fold 1, and the other way round"
    assert (likely[:, 0] > -1e-3).all()


def trainer(found: AttendData, dictionary, kind: str = "llama") -> AttendTrainer:
    base = language_model(kind)
    adapted = replace(base, model=add_kv_lora(base.model, KVLoraConfig(r=2, alpha=4, dropout=0.0)))
    named = [fresh(dictionary, dropout=0.0).requires_grad_(False) for _ in range(3)]
    named[0].likely.requires_grad_(True)
    return AttendTrainer(adapted, Projectors(named[0], (named[1], named[2])), found.tables, Schedule(60, None, 5e-3))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_moves_adapter_and_direction_and_leaves_base_and_naming(data, dictionary, kind):
    found = made(data, dictionary)
    learner = trainer(found, dictionary, kind)
    models = [learner.language_model.model, learner.projector, *learner.projectors.halves]
    frozen = [one for model in models for one in model.parameters() if not one.requires_grad]
    kept = [one.clone() for one in frozen]
    before = {name: one.clone() for name, one in learner.weights.items()}
    batches = found.source.pool(0, 0, 16, 8)
    for _ in range(2):  # B starts at zero, so A moves from the second step on
        learner.step(batches)
    moved = {name for name, one in learner.weights.items() if not torch.equal(one, before[name])}
    assert "projector.likely" in moved
    assert any("lora_B" in name for name in moved) and any("lora_A" in name for name in moved)
    assert all(torch.equal(one, same) for one, same in zip(frozen, kept, strict=True))


def test_the_loss_falls_and_answers_depend_on_the_vectors(data, dictionary):
    """Each passage's vector points at words of its own, so another passage's words mislead."""
    found = made(data, dictionary, no_memory=0.0, cloze=0.0, passages=(1,), weights=(1.0,))
    learner = trainer(found, dictionary)
    batches = found.source.pool(0, 0, 16, 16)
    first = learner.loss(batches)
    for _ in range(40):
        learner.step(batches)
    assert learner.loss(batches) < 0.7 * first
    shuffled = [replace(one, passages=one.passages.roll(2)) for one in batches]
    assert learner.loss(shuffled) > learner.loss(batches)


def test_held_out_passages_are_named_by_the_projector_that_is_kept(data, dictionary):
    found = made(data, dictionary)
    learner = trainer(found, dictionary)
    learner.tables = replace(found.tables, held_out=True)
    batches = found.source.pool(0, 0, 8, 8)
    before = learner.loss(batches)
    with torch.no_grad():
        for half in learner.projectors.halves:
            half.bias[:, 3] += 50.0
    assert learner.loss(batches) == before
    learner.tables = found.tables
    assert learner.loss(batches) != before


def test_sentences_become_passages_of_their_owners(data):
    made_of, owners = sentence_passages(data, BagOfWords(), 1, seed=3)
    assert len(made_of) == len(owners) == 16 and made_of.questions == []
    for row, owner in enumerate(owners.tolist()):
        text = made_of.table["text"][row].as_py()
        assert text in data.table["text"][owner].as_py()
        words, scores = made_of.words_of(row)
        salience = dict(zip(*data.words_of(owner), strict=True))
        assert words == text.replace(".", "").split()
        assert scores == pytest.approx([salience[word] for word in words])
        assert np.array_equal(made_of.embeddings[row], BagOfWords().encode_questions([text])[0])


def test_sets_are_joined_row_by_row(data):
    whole = joined([data, data])
    assert len(whole) == 2 * len(data) and whole.questions == [*data.questions, *data.questions]
    assert whole.rows.tolist() == [*data.rows.tolist(), *(data.rows + len(data)).tolist()]
    for number, row in enumerate(whole.rows.tolist()):
        assert np.array_equal(whole.embeddings[row], data.embeddings[data.rows[number % len(data.questions)]])
    assert joined([data]) is data
    assert SLOTS * pieces()[1].width == WIDTH
