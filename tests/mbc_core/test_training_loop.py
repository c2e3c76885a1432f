"""The training loop against plain computations: losses, gradients, steps, schedules, checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.errors import DamagedFile
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora, trainable
from mbc_core.training.batches import Composed, Ragged, micro_batches, prefetched, steps_of
from mbc_core.training.loop import Clock, Schedule, Trainer, load_checkpoint, save_checkpoint
from tests.mbc_core.tiny_reader import language_model

pytestmark = pytest.mark.usefixtures("single_thread")

CONFIG = KVLoraConfig(r=4, alpha=8, dropout=0.0)
PAD = 256


def samples(count: int = 12, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) pairs of different lengths."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, 200, rng.integers(3, 40)).tolist(), [*rng.integers(0, 200, rng.integers(1, 6)).tolist(), 256])
        for _ in range(count)
    ]


def composed(pairs) -> Composed:
    return Composed(
        Ragged.of([[*prompt, *answer] for prompt, answer in pairs]), np.array([len(answer) for _, answer in pairs])
    )


def batches(pairs, tokens: int = 128, rows: int = 8, seed: int = 0):
    return micro_batches(composed(pairs), PAD, tokens, rows, (seed,))


def trainer(kind: str = "llama", config: KVLoraConfig = CONFIG, **options) -> Trainer:
    base = language_model(kind)
    adapted = replace(base, model=add_kv_lora(base.model, config))
    with torch.no_grad():
        for number, weight in enumerate(trainable(adapted.model).values()):
            mask = (
                weight.abs().amax(1, keepdim=True) == 0
                if kind == "gpt2"
                else torch.ones(len(weight), 1, dtype=torch.bool)
            )
            if kind == "gpt2" and mask.any():
                mask[: len(weight) // 3] = False  # the query rows stay zero
            generator = torch.Generator().manual_seed(number)
            weight.add_(mask * 0.05 * torch.randn(weight.shape, generator=generator))
    options.setdefault("schedule", Schedule(10, None, 1e-2))
    return Trainer(adapted, **options)


def plain_loss(model, pairs) -> torch.Tensor:
    """One sample at a time, no padding, all logits, labels as transformers wants them: mean over answer tokens."""
    total, count = torch.zeros(()), 0
    for prompt, answer in pairs:
        ids = torch.tensor([[*prompt, *answer]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        count += len(answer)
    return total / count


def test_micro_batches_hold_every_sample_once_and_mark_its_answer():
    pairs = samples(30)
    seen = []
    for batch in batches(pairs):
        assert batch.ids.numel() <= 128 or batch.samples == 1
        assert batch.samples == len(batch.ids) <= 8 and batch.ids.shape[1] % 8 == 0
        flat, width = batch.ids.flatten(), batch.ids.shape[1]
        assert (flat[batch.places + 1] == batch.targets).all()
        for row in range(batch.samples):
            mine = [
                (int(p) + 1) % width for p, t in zip(batch.places, batch.targets, strict=True) if int(p) // width == row
            ]
            end = mine[-1] + 1
            assert mine == list(range(mine[0], end)) and (batch.ids[row, end:] == PAD).all()
            seen.append((batch.ids[row, : mine[0]].tolist(), batch.ids[row, mine[0] : end].tolist()))
    assert sorted(seen) == sorted(pairs)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 40))
def test_steps_take_all_batches_in_order_and_about_as_many_samples_each(sizes, wanted):
    class Sized:
        def __init__(self, samples):
            self.samples = samples

    given_batches = [Sized(one) for one in sizes]
    steps = steps_of(given_batches, wanted)
    assert [one for step in steps for one in step] == given_batches and all(steps)
    for step in steps:
        assert sum(one.samples for one in step) < wanted * 2 + 2 * 9


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_that_of_samples_one_by_one_without_padding(kind):
    pairs, made = samples(), trainer(kind)
    with torch.no_grad():
        expected = float(plain_loss(made.language_model.model.eval(), pairs))
    assert made.loss(batches(pairs)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_over_many_batches_is_one_adamw_step_on_the_whole(kind):
    pairs, made, oracle = samples(), trainer(kind), trainer(kind)
    if kind == "gpt2":  # its own dropout would differ
        for module in [*made.language_model.model.modules(), *oracle.language_model.model.modules()]:
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    made.step(batches(pairs, tokens=64))
    weights = trainable(oracle.language_model.model)
    optimizer = torch.optim.AdamW(weights.values(), lr=made.optimizer.param_groups[0]["lr"], weight_decay=0.0)
    plain_loss(oracle.language_model.model, pairs).backward()
    torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
    optimizer.step()
    for (name, ours), theirs in zip(made.weights.items(), weights.values(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), name


def test_only_the_lora_weights_change():
    made = trainer()
    before = {name: one.detach().clone() for name, one in made.language_model.model.named_parameters()}
    for _ in range(3):
        made.step(batches(samples()))
    for name, one in made.language_model.model.named_parameters():
        assert torch.equal(one, before[name]) == ("lora_" not in name), name


def test_training_lowers_the_loss():
    made = trainer(schedule=Schedule(60, None, 2e-2))
    pairs = samples(6)
    before = made.loss(batches(pairs))
    for number in range(60):
        made.step(batches(pairs, seed=number))
    assert made.loss(batches(pairs)) < before - 1.0


def test_weights_are_computed_in_the_bases_precision_and_kept_in_float32():
    base = language_model()
    adapted = replace(base, model=add_kv_lora(base.model.bfloat16(), CONFIG))
    made = Trainer(adapted, Schedule(1000, None, 1e-4))
    assert {one.dtype for one in made.weights.values()} == {torch.bfloat16}
    for _ in range(3):
        made.step(batches(samples()))
    for master, weight in zip(made.masters, made.weights.values(), strict=True):
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), weight)
    assert any(not torch.equal(one, one.bfloat16().float()) for one in made.masters)  # small updates are not lost
    made.finish()
    for master, weight in zip(made.masters, made.weights.values(), strict=True):
        assert weight.dtype == torch.float32 and torch.equal(weight, master.half().float())


def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(tmp_path):
    config = KVLoraConfig(r=4, alpha=8, dropout=0.3)  # dropout too must go on as it would have
    whole, first, second = (trainer(config=config) for _ in range(3))
    for number in range(6):
        whole.step(batches(samples(seed=number)))
    for number in range(3):
        first.step(batches(samples(seed=number)))
    save_checkpoint(tmp_path, first)
    assert load_checkpoint(tmp_path, second)
    assert second.progress == first.progress and second.progress is not first.progress
    for number in range(3, 6):
        second.step(batches(samples(seed=number)))
    for ours, theirs in zip(second.masters, whole.masters, strict=True):
        assert torch.equal(ours, theirs)
    assert second.progress == whole.progress


def test_a_checkpoint_replaces_the_one_before_and_leaves_no_other_files(tmp_path):
    made = trainer()
    for _ in range(2):
        made.step(batches(samples()))
        save_checkpoint(tmp_path, made)
    names = {one.name for one in tmp_path.iterdir()}
    assert names == {"state.json", *(f"{group}-00000002.safetensors" for group in ("weights", "exp_avg", "exp_avg_sq"))}


def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    made = trainer()
    made.step(batches(samples()))
    save_checkpoint(tmp_path, made)
    expected = [one.detach().clone() for one in made.masters]
    made.step(batches(samples()))

    def full(*arguments, **options):
        raise OSError("no space left")

    with monkeypatch.context() as patched, pytest.raises(OSError, match=r"no space left"):
        patched.setattr("mbc_core.training.loop.json.dumps", full)
        save_checkpoint(tmp_path, made)
    found = trainer()
    assert load_checkpoint(tmp_path, found) and found.progress.step == 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.masters, expected, strict=True))


def test_no_checkpoint_and_a_damaged_one(tmp_path):
    assert load_checkpoint(tmp_path, trainer()) is False
    made = trainer()
    made.step(batches(samples()))
    save_checkpoint(tmp_path, made)
    next(tmp_path.glob("weights-*")).write_bytes(b"short")
    with pytest.raises(DamagedFile, match=r"the checkpoint cannot be taken up.*remove the folder to start again"):
        load_checkpoint(tmp_path, trainer())
    with pytest.raises(DamagedFile, match=r"KeyError"):
        told = json.loads((tmp_path / "state.json").read_text())
        (tmp_path / "state.json").write_text(json.dumps({"progress": told["progress"]}))
        load_checkpoint(tmp_path, trainer())


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    schedule = Schedule(100, None, lr=1.0, warm_up=0.1, floor=0.0)
    assert schedule.rate(0.0) < 0.02 and schedule.rate(0.1) == pytest.approx(1.0)
    assert schedule.rate(0.55) == pytest.approx(0.5) and schedule.rate(1.0) == pytest.approx(0.0)
    rates = [schedule.rate(share / 50) for share in range(51)]
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)


def test_progress_is_whichever_limit_comes_first():
    both = Schedule(100, 60.0)
    assert both.progress(50, 6.0) == 0.5 and both.progress(10, 45.0) == 0.75 and both.progress(500, 1.0) == 1.0
    assert Schedule(None, 60.0).progress(10**6, 30.0) == 0.5
    assert Schedule(100, None).progress(25, 1e9) == 0.25


def test_losses_are_numbers_on_a_cpu():
    assert not math.isnan(trainer().step(batches(samples())))


def test_the_clock_counts_training_and_not_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("mbc_core.training.loop.time.monotonic", lambda: now[0])
    made = trainer()
    made.progress.seconds = 7.0
    clock = Clock(made)
    now[0] = 103.0
    clock.tick()
    assert made.progress.seconds == 10.0
    now[0] = 200.0  # an evaluation
    clock.restart()
    now[0] = 201.5
    clock.tick()
    assert made.progress.seconds == 11.5


def test_pools_are_made_ahead_and_come_in_order():
    made = []

    def make(number):
        made.append(number)
        return [[number]]

    pools = prefetched(make, 5, ahead=2)
    assert [next(pools) for _ in range(4)] == [(number, [[number]]) for number in range(5, 9)]
    pools.close()
    assert sorted(made)[:4] == [5, 6, 7, 8]


def test_an_error_in_making_a_pool_reaches_the_loop():
    def make(number):
        raise ValueError(f"pool {number} is broken")

    with pytest.raises(ValueError, match=r"pool 0 is broken"):
        next(prefetched(make, 0))
