"""`mbc train paper` on tiny models: what a step shows, the loss, resuming, the flat rule, the closed book, ranks."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional

from mbc_core.errors import DamagedFile, UsageError
from mbc_core.paper.model import PaperBatch
from mbc_core.training.batches import Ragged
from mbc_core.training.paper import PaperTrainer, train_paper
from mbc_core.training.paper_batches import Draw
from mbc_core.training.paper_card import paper_card, read_curve, require_shippable
from mbc_core.training.paper_checkpoint import PaperProgress
from mbc_core.training.paper_data import PaperData, as_lists
from mbc_core.training.paper_layers import LayerLoop
from mbc_core.training.paper_run import PaperRun, cool_when_due, is_flat, pace
from mbc_core.training.paper_step import step_losses
from tests.mbc_core.tiny_paper import RUN, config, data, model, on_device
from tests.mbc_core.tiny_reader import tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return (*data(folder), folder)


def trainer(made, codes="learned", run=RUN, **changes) -> PaperTrainer:
    tokens, encoder, folder = made
    return PaperTrainer(model(folder, config(codes, **changes)), tokens, on_device(tokens, encoder, codes), run)


def test_data_survive_their_file_and_a_cut_file_is_named(made, tmp_path):
    tokens = made[0]
    tokens.save(tmp_path / "d.safetensors")
    again = PaperData.load(tmp_path / "d.safetensors")
    for name in ("passages", "asked", "prompts", "answers"):
        assert as_lists(getattr(again, name)) == as_lists(getattr(tokens, name))
    assert np.array_equal(again.rows, tokens.rows) and np.array_equal(again.held_out, tokens.held_out)
    assert np.array_equal(again.codes[4], tokens.codes[4]) and again.codes[4].dtype == np.uint16
    assert again.questions == tokens.questions and again.accepted == tokens.accepted and again.told == tokens.told
    assert tokens.told["sources"] == {"others": 7, "towns": 13}
    (tmp_path / "d.safetensors").write_bytes((tmp_path / "d.safetensors").read_bytes()[:-40])
    with pytest.raises(DamagedFile, match="mbc train paper-data"):
        PaperData.load(tmp_path / "d.safetensors")


def test_an_epoch_asks_every_training_question_and_no_held_out_one(made):
    tokens = made[0]
    draw = Draw(tokens, documents=4, questions=2, banks=(2,), max_tokens=64)
    wanted = set(np.flatnonzero(~tokens.held_out[tokens.rows]).tolist())
    seen: list[int] = []
    for number in range(draw.steps_per_epoch):
        chosen = draw.step(3, number)
        assert len(chosen.documents) == 4 and len(chosen.questions) == 8 and chosen.banks == 2
        assert np.array_equal(tokens.rows[chosen.questions], np.repeat(chosen.documents, 2))
        assert not tokens.held_out[chosen.documents].any()
        seen += chosen.questions.tolist()
    pairs = len(wanted) - sum(np.bincount(tokens.rows[sorted(wanted)]) == 3)  # three questions make two pairs
    assert draw.steps_per_epoch == sum(-(-n // 2) for n in np.bincount(tokens.rows[sorted(wanted)])) // 4
    assert set(seen) <= wanted and len(set(seen)) >= len(wanted) - 8 and pairs > 0
    again = draw.step(3, 1)
    assert np.array_equal(again.questions, draw.step(3, 1).questions)
    assert not np.array_equal(again.questions, draw.step(4, 1).questions)


def test_too_long_questions_are_left_out_and_counted(made):
    tokens = made[0]
    lengths = tokens.prompts.lengths + tokens.answers.lengths
    limit = int(np.median(lengths))
    draw = Draw(tokens, documents=2, questions=1, banks=(1,), max_tokens=limit)
    assert draw.left_out == int((lengths[~tokens.held_out[tokens.rows]] > limit).sum()) > 0
    for number in range(draw.steps_per_epoch):
        assert (lengths[draw.step(0, number).questions] <= limit).all()
    with pytest.raises(UsageError, match="too few passages"):
        Draw(tokens, documents=64, questions=1, banks=(1,))
    with pytest.raises(UsageError, match="does not divide"):
        Draw(tokens, documents=4, banks=(3,))


def test_every_bank_keeps_its_share_of_gradients(made):
    draw = Draw(made[0], documents=8, questions=1, banks=(4,), keep=0.5, max_tokens=64)
    kept = draw.step(0, 0).kept.reshape(2, 4)
    assert kept.sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("codes", ["learned", "address"])
@pytest.mark.parametrize("bank", [1, 2, 4])
def test_a_step_is_the_models_own_forward_pass(made, codes, bank):
    tokens, encoder, folder = made
    built, device = model(folder, config(codes)), on_device(tokens, encoder, codes)
    chosen = Draw(tokens, documents=4, questions=2, banks=(bank,), max_tokens=64).step(0, 0)
    batch = device.batch(chosen)
    built.eval()
    losses = step_losses(built, batch)
    lists = [np.array(as_lists(tokens.passages)[row]) for row in chosen.documents]
    ids = torch.zeros(4, max(map(len, lists)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(lists):
        ids[row, : len(one)], mask[row, : len(one)] = torch.from_numpy(one), 1
    plain = PaperBatch(
        batch.ids, batch.places, batch.targets, batch.asked, batch.asked_mask, batch.embeddings,
        *((None, None, batch.codes) if codes == "address" else (ids, mask)), banks=4 // bank,
    )  # fmt: skip
    wanted = built(plain)
    tokens_answered = len(batch.targets)
    assert device.answer_tokens(chosen) == tokens_answered
    assert torch.allclose(losses.answer / tokens_answered, wanted.answer, rtol=1e-5)
    assert torch.allclose(losses.vq, wanted.vq, rtol=1e-5)


@pytest.mark.parametrize("codes", ["learned", "address"])
def test_layer_by_layer_is_the_models_own_pass_in_value_and_gradient(made, codes):
    tokens, encoder, folder = made
    batch = on_device(tokens, encoder, codes).batch(
        Draw(tokens, documents=4, questions=2, banks=(2,), max_tokens=64).step(0, 0)
    )
    found = []
    for whole in (True, False):
        built = model(folder, config(codes))
        loop = None if whole else LayerLoop(built.language_model.model)
        if loop is not None:
            loop.begin()
        loss = step_losses(built, batch, "own", loop).answer
        loss.backward()
        found.append((loss.detach(), {name: one.grad for name, one in built.learned_parameters().items()}))
        if loop is not None:
            loop.end()
            numbers = [one.self_attn.layer_idx for one in loop.decoder.layers]
            assert numbers == [0, 1, 2]
    (first, ours), (second, theirs) = found
    assert torch.allclose(first, second, rtol=1e-5)
    for name, one in ours.items():
        assert (one is None) == (theirs[name] is None)
        assert one is None or torch.allclose(one, theirs[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the tracer looks at it
def test_one_compiled_program_serves_all_layers_and_lengths(made):
    tokens, encoder, folder = made
    built, device = model(folder, config("address")), on_device(tokens, encoder, "address")
    loop = LayerLoop(built.language_model.model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    for layer in loop.decoder.layers:
        layer.compile(dynamic=True, backend=counter)
    loop.begin()
    draw = Draw(tokens, documents=4, questions=2, banks=(2,), max_tokens=64)
    frames = []
    for number in range(3):
        step_losses(built, device.batch(draw.step(0, number)), "own", loop).answer.backward()
        frames.append(counter.frame_count)
    assert len(loop.decoder.layers) == 3 and frames == [frames[0]] * 3 and frames[0] < 3
    torch._dynamo.reset()


def test_cued_steps_ask_for_words_less_and_less_and_banks_grow(made):
    tokens, encoder, _ = made
    some = Ragged.of([[7, 8, row + 1] for row in range(len(tokens))])
    cued = replace(tokens, words=some)
    draw = Draw(cued, documents=4, questions=2, banks=(1, 2, 4), max_tokens=64, grow_every=10, cue_steps=40)
    steps = [draw.step(0, number) for number in range(80)]
    assert {step.bank for step in steps[:10]} == {1} and {step.bank for step in steps[10:20]} == {1, 2}
    assert {step.bank for step in steps[20:]} == {1, 2, 4}
    shares = [sum(step.cued for step in steps[start : start + 20]) for start in (0, 20, 40, 60)]
    assert shares[0] > shares[1] > 0 and shares[2:] == [0, 0]
    chosen = next(step for step in steps if step.cued)
    batch = on_device(cued, encoder).batch(chosen)
    rows = cued.rows[chosen.questions]
    assert batch.targets.tolist() == [one for row in rows for one in (7, 8, row + 1)]
    texts = tokenizer().batch_decode(batch.ids)
    assert all("\nWords:" in text for text in texts)
    assert on_device(cued, encoder).answer_tokens(chosen) == 3 * len(rows)
    with pytest.raises(UsageError, match="no words"):
        trainer(made, run=replace(RUN, cue_steps=3))


def test_a_failing_compiler_is_said_and_training_goes_on(made, tmp_path, monkeypatch):
    learner = trainer(made, "address")
    learner.layers = LayerLoop(learner.model.language_model.model)
    learner.layers.compiled = True
    monkeypatch.setattr(LayerLoop, "__call__", lambda self, ids, pairs: 1 / 0)
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: nullcontext())  # it would outlive the test
    said: list[str] = []
    assert train_paper(learner, tmp_path, say=said.append)
    assert "compiling failed (ZeroDivisionError" in said[0] and learner.progress.step == 6


def test_targets_are_the_answers_tokens(made):
    tokens, encoder, _ = made
    chosen = Draw(tokens, documents=2, questions=1, banks=(1,), max_tokens=64).step(0, 0)
    batch = on_device(tokens, encoder).batch(chosen)
    answers = as_lists(tokens.answers)
    assert batch.targets.tolist() == [one for question in chosen.questions for one in answers[question]]
    assert torch.equal(batch.ids.reshape(-1)[batch.places + 1], batch.targets)


def test_another_bank_and_none_are_other_losses(made):
    tokens, encoder, folder = made
    built, device = model(folder, config("address")), on_device(tokens, encoder, "address")
    chosen = Draw(tokens, documents=4, questions=2, banks=(2,), max_tokens=64).step(0, 0)
    batch = replace(device.batch(chosen), codes=torch.arange(16).reshape(4, 4) % 8 // torch.tensor([1, 1, 2, 4]))
    batch.codes[2:] = 7 - batch.codes[2:] // 2
    built.eval()
    own, other, none = (float(step_losses(built, batch, shown).answer.detach()) for shown in ("own", "other", "none"))
    assert len({own, other, none}) == 3
    swapped = replace(batch, codes=batch.codes.roll(2, 0))
    assert float(step_losses(built, swapped).answer.detach()) == pytest.approx(other, rel=1e-6)


def test_only_kept_passages_get_gradient(made):
    tokens, encoder, folder = made
    chosen = Draw(tokens, documents=4, questions=1, banks=(4,), keep=0.25, max_tokens=64).step(0, 0)
    built, device = model(folder, config()), on_device(tokens, encoder)
    seen = []
    real = built.amortizer.forward
    built.amortizer.forward = lambda ids, mask: seen.append((len(ids), torch.is_grad_enabled())) or real(ids, mask)
    step_losses(built, device.batch(chosen))
    assert [count for count, grad in seen if grad] == [1] and sum(count for count, _ in seen) == 4


@pytest.mark.parametrize(
    ("codes", "changes"),
    [
        ("learned", {}),
        ("learned", {"codebook_by": "ema"}),
        ("address", {}),
        ("learned", {"quantize": False}),
        ("learned", {"standardize": True}),
    ],
)
def test_a_run_in_several_calls_ends_where_one_call_does(made, tmp_path, codes, changes):
    whole = trainer(made, codes, **changes)
    assert train_paper(whole, tmp_path / "whole")
    calls = 0
    while True:
        part = trainer(made, codes, replace(RUN, call_minutes=0), **changes)
        calls += 1
        if train_paper(part, tmp_path / "parts"):
            break
        assert calls < 8
    assert calls > 1
    for name, one in whole.parameters.items():
        assert torch.equal(one, part.parameters[name]), name
    for name, one in whole.buffers.items():
        assert torch.equal(one, part.buffers[name]), name
    steps = [[line["step"] for line in read_curve(tmp_path / name)] for name in ("whole", "parts")]
    assert steps == [[3, 6], [3, 6]]


def test_training_learns_and_the_closed_book_sees_no_memory(made, tmp_path):
    long = replace(RUN, steps=60, look_every=20)
    learner = trainer(made, "address", long)
    train_paper(learner, tmp_path)
    curve = read_curve(tmp_path)
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"] and {"held_out_loss", "held_out_shuffled"} <= set(curve[0])
    closed = trainer(made, "address", replace(RUN, closed=True))
    built, seen = closed.model, []
    built.aggregator.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    train_paper(closed, tmp_path / "closed")
    assert seen and all(memory is None for memory in seen)
    assert "held_out_shuffled" not in read_curve(tmp_path / "closed")[0]


def test_a_card_says_what_was_trained_on_and_how(made, tmp_path):
    done = trainer(made)
    train_paper(done, tmp_path)
    card = paper_card(done, made[0], read_curve(tmp_path), results={"set": []})
    assert json.loads(json.dumps(card))["config"]["tokens"] == 4
    assert card["finished"] and card["ended_by"] == "steps" and card["converged"] is False and card["steps"] == 6
    assert card["data"]["sources"] == {"others": 7, "towns": 13} and card["data"]["held_out_passages"] == 4
    assert card["curve"][-1]["step"] == 6 and card["curve"][-1]["held_out_used"] >= 1 and "resets" in card["curve"][0]
    assert card["parameters"]["kv_lora"] == sum(v.numel() for k, v in done.parameters.items() if "lora_" in k) > 0


def test_standardized_codes_are_calibrated_before_every_look_and_at_the_end(made, tmp_path):
    learner = trainer(made, standardize=True)
    asked = []
    real = learner.model.calibrate
    learner.model.calibrate = lambda passages: asked.append(sum(len(ids) for ids, _ in passages)) or real(passages)
    train_paper(learner, tmp_path)
    assert asked == [16, 16, 16]  # two looks and the checkpoint, every training passage
    line = read_curve(tmp_path)[-1]
    assert 0 < line["held_out_different"] <= 1
    ids = torch.tensor(as_lists(made[0].passages)[1])[None]
    held = learner.model.quantizer.z_mean.clone()
    learner.model.encode_documents(ids, torch.ones_like(ids))
    assert torch.equal(held, learner.model.quantizer.z_mean)


def test_a_look_tells_each_parts_gradient_norms_and_bursts(made, tmp_path):
    learner = trainer(made)
    train_paper(learner, tmp_path)
    line = read_curve(tmp_path)[-1]
    assert set(learner.bursts.parts) == {"amortizer", "quantizer", "question", "aggregator", "prefix", "kv_lora"}
    for part in learner.bursts.parts:
        assert 0 <= line[f"norm_{part}"] <= line[f"peak_{part}"] + 1e-6 and line[f"bursts_{part}"] == 0
    assert line["peak_prefix"] > 0 and learner.optimizer.param_groups[0]["betas"] == (0.9, RUN.beta2)


def test_forbidden_sources_are_refused_by_name(made):
    tokens = replace(made[0], told={**made[0].told, "sources": {"race": 3, "towns": 4}})
    with pytest.raises(UsageError, match="race"):
        require_shippable(tokens)
    require_shippable(made[0])


def test_a_checkpoint_of_another_model_is_refused(made, tmp_path):
    train_paper(trainer(made, run=replace(RUN, steps=2)), tmp_path)
    with pytest.raises(DamagedFile, match="checkpoint"):
        train_paper(trainer(made, "address", replace(RUN, steps=4)), tmp_path)


@pytest.mark.parametrize(
    ("losses", "flat"),
    [
        ([3, 2, 1.5, 1.2, 1.1, 1.0], False),
        ([3, 2, 1.0, 1.0, 0.999, 0.9985], True),
        ([3, 2, 1.0, 1.0, 0.99, 0.98], False),
        ([1.0, 1.0, 1.0, 1.0], False),  # too few looks to tell
        ([2, 1.0, 1.1, 1.2, 1.3, 1.4], True),  # rising: it will not get better
    ],
)
def test_flat_is_no_better_over_the_last_third(losses, flat):
    assert is_flat([(10 * (place + 1), loss) for place, loss in enumerate(losses)], 0.002) is flat


def test_the_rate_rises_stays_and_falls_to_the_end():
    run = PaperRun(steps=100, minutes=None, warm_up=10, cool_down=0.2)
    progress, paces = PaperProgress(), []
    while not progress.finished:
        paces.append(pace(progress, run))
        progress.step += 1
        if progress.step % 10 == 0:
            cool_when_due(progress, run)
    assert len(paces) == 100 and progress.ended_by == "steps"
    assert paces[0] == pytest.approx(0.1) and paces[9:80] == [1.0] * 71 and paces[-1] == pytest.approx(0.05)
    timed = PaperProgress(step=40, seconds=50.0)
    cool_when_due(timed, PaperRun(steps=None, minutes=1.0, cool_down=0.2))
    assert timed.ended_by == "minutes" and timed.cool_steps == 8
    flat = PaperProgress(step=60, looks=[(10 * one, 1.0) for one in range(1, 7)])
    cool_when_due(flat, PaperRun(steps=None, minutes=None, flat=0.002, cool_down=0.25))
    assert flat.ended_by == "flat" and flat.cool_steps == 20


def test_held_out_loss_is_the_mean_over_the_held_out_answers(made):
    tokens = made[0]
    learner = trainer(made, "address")
    found = learner.look()
    draw, total, count = learner.held_out, 0.0, 0
    for number in range(draw.steps_per_epoch):
        chosen = draw.step(7_919, number)
        assert tokens.held_out[chosen.documents].all()
        batch = learner.on_device.batch(chosen)
        vectors = functional.embedding(batch.codes, learner.model.code_vectors())
        assert vectors.shape == (4, 4, 12)
        total, count = (
            total + float(step_losses(learner.model.eval(), batch).answer.detach()),
            count + len(batch.targets),
        )
    assert found["held_out_loss"] == pytest.approx(total / count, rel=1e-5)


def test_what_only_the_bank_knows_is_learned_from_its_codes(made, tmp_path):
    """Every passage is of one of four kinds, which its codes tell and its question does not."""
    tokens, encoder, folder = made
    kinds = np.arange(len(tokens)) % 4
    codes = np.repeat((2 * kinds).astype(np.uint16)[:, None], 4, axis=1)
    answers = [[65 + 3 * int(kinds[row]), 256] for row in tokens.rows]
    same = as_lists(tokens.prompts)[0]
    told = replace(
        tokens, codes={4: codes}, answers=Ragged.of(answers), prompts=Ragged.of([same for _ in answers]),
        asked=Ragged.of([as_lists(tokens.asked)[0] for _ in answers]),
    )  # fmt: skip
    run = replace(RUN, steps=120, look_every=120, banks=(1,), lr=1e-2, lora_lr=1e-2, held_out_bank=1)
    learner = PaperTrainer(model(folder, config("address")), told, on_device(told, encoder, "address"), run)
    train_paper(learner, tmp_path)
    last = read_curve(tmp_path)[-1]
    assert last["held_out_loss"] < 0.25 * last["held_out_shuffled"] and last["held_out_shuffled"] > 0.5
