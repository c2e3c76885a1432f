"""Gradient clipping by parts: limits, what is usual, and what a burst can do to a part that Adam moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mbc_core.errors import UsageError
from mbc_core.training.paper_bursts import BurstClip, part_of

CPU = torch.device("cpu")


def clipped(
    clip: BurstClip, parameters: dict[str, nn.Parameter], **norms: float
) -> tuple[dict[str, float], list[bool]]:
    """Give each part a gradient of such a norm, clip; norms after it and which were bursts."""
    for name, one in parameters.items():
        wanted = norms.get(part_of(name))
        one.grad = None if wanted is None else torch.full_like(one, wanted / one.numel() ** 0.5)
    told, cut = clip.clip()
    assert told.tolist() == pytest.approx([norms.get(part, 0.0) for part in clip.parts], rel=1e-5)
    left = {part_of(name): float(one.grad.norm()) for name, one in parameters.items() if one.grad is not None}
    return left, cut.tolist()


def two() -> dict[str, nn.Parameter]:
    return {"amortizer.a": nn.Parameter(torch.zeros(9)), "aggregator.b": nn.Parameter(torch.zeros(2, 2))}


def test_parts_go_by_their_first_name_and_adapters_together():
    assert part_of("prefix.inner.weight") == "prefix" and part_of("reader.x.lora_A.default.weight") == "kv_lora"


def test_without_bursts_it_is_one_norm_of_all_as_torch_clips():
    parameters = two()
    clip = BurstClip(parameters, 1.0, None, CPU)
    left, cut = clipped(clip, parameters, amortizer=12.0, aggregator=5.0)
    assert left == pytest.approx({"amortizer": 12 / 13, "aggregator": 5 / 13}, rel=1e-5) and cut == [False, False]
    left, _ = clipped(clip, parameters, amortizer=0.3, aggregator=0.4)
    assert left == pytest.approx({"amortizer": 0.3, "aggregator": 0.4}, rel=1e-5)


def test_no_part_scales_another():
    parameters = two()
    left, _ = clipped(BurstClip(parameters, 1.0, 3.0, CPU), parameters, amortizer=1000.0, aggregator=0.5)
    assert left == pytest.approx({"amortizer": 1.0, "aggregator": 0.5}, rel=1e-4)


def test_a_burst_is_cut_to_a_multiple_of_what_is_usual():
    parameters = two()
    clip = BurstClip(parameters, 1.0, 3.0, CPU)
    for step in range(40):
        left, cut = clipped(clip, parameters, amortizer=0.1, aggregator=0.01 if step else 0.02)
        assert cut == [False, False]
    left, cut = clipped(clip, parameters, amortizer=0.1, aggregator=0.9)
    assert cut == [False, True] and left["amortizer"] == pytest.approx(0.1, rel=1e-5)
    assert 3 * 0.01 < left["aggregator"] < 3 * 0.0125
    for _ in range(120):  # what stays becomes usual
        left, cut = clipped(clip, parameters, amortizer=0.1, aggregator=0.9)
    assert left["aggregator"] == pytest.approx(0.9, rel=1e-4) and cut == [False, False]


def test_a_part_that_had_no_gradient_can_begin():
    parameters = two()
    clip = BurstClip(parameters, 1.0, 3.0, CPU)
    for _ in range(60):
        clipped(clip, parameters, amortizer=0.1)
    left = {}
    for _ in range(400):
        left, _ = clipped(clip, parameters, amortizer=0.1, aggregator=0.5)
    assert left["aggregator"] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(("burst", "beta2", "farthest"), [(None, 0.999, (5.0, 7.0)), (3.0, 0.98, (0.5, 1.5))])
def test_how_far_a_burst_moves_a_part(burst, beta2, farthest):
    """In learning rates a step, at the worst step of ten large gradients after 1,000 small ones."""
    torch.manual_seed(0)
    parameters = two()
    clip = BurstClip(parameters, 1.0, burst, CPU)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1.0, betas=(0.9, beta2), weight_decay=0.0)
    worst = 0.0
    for step in range(1010):
        small = 1e-3 if step < 1000 else 0.9
        for one in parameters.values():
            direction = torch.randn_like(one) if step < 1000 else torch.ones_like(one)
            one.grad = small * direction / direction.norm()
        clip.clip()
        before = parameters["aggregator.b"].detach().clone()
        optimizer.step()
        if step >= 1000:
            worst = max(worst, float((parameters["aggregator.b"].detach() - before).abs().max()))
    assert farthest[0] < worst < farthest[1]


def test_a_multiple_of_one_or_less_is_refused():
    with pytest.raises(UsageError, match="not above one"):
        BurstClip(two(), 1.0, 1.0, CPU)
