"""Early stop: what is held back, when a run gives up, and which weights are kept."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.training.early_stop import Look, Watch, split_dev
from mbc_core.training.set_file import Example


def example(number: int, document: str) -> Example:
    return Example(f"q{number}", "a", "train", (), None, "line", document)


def look(step: int, loss: float) -> Look:
    return Look(step, None, loss, 0.0)


EXAMPLES = [example(number, f"d{number // 2}") for number in range(60)]  # two questions a document


def test_documents_are_held_back_whole_and_the_same_whatever_the_order():
    kept, held = split_dev(EXAMPLES, 0.2, 100, seed=1)
    assert len({one.document for one in held}) == 6 and len(held) == 12
    assert not {one.document for one in kept} & {one.document for one in held}
    assert sorted(kept + held, key=lambda one: int(one.question[1:])) == EXAMPLES
    _, again = split_dev(EXAMPLES[::-1], 0.2, 100, seed=1)
    assert set(again) == set(held)
    assert set(split_dev(EXAMPLES, 0.2, 100, seed=2)[1]) != set(held)


def test_questions_beyond_the_most_are_trained_on_by_nobody():
    kept, held = split_dev(EXAMPLES, 0.2, 5, seed=1)
    assert len(held) == 5 and len(kept) == 48


@pytest.mark.parametrize(
    ("examples", "share", "most"), [(EXAMPLES[:18], 0.2, 9), (EXAMPLES, 0.0, 9), (EXAMPLES, 0.2, 0)]
)
def test_nothing_is_held_back_of_few_documents_or_when_nothing_is_wanted(examples, share, most):
    assert split_dev(examples, share, most, seed=0) == (examples, [])


def test_questions_without_a_document_stand_alone():
    loose = [example(number, "") for number in range(20)]
    kept, held = split_dev(loose, 0.25, 100, seed=0)
    assert len(held) == 5 and len(kept) == 15


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0]), min_size=1, max_size=12), st.integers(1, 4))
def test_the_best_weights_are_those_of_the_earliest_lowest_loss(losses, patience):
    watch, weights, stopped = Watch(patience), {"w": torch.zeros(2)}, None
    for step, loss in enumerate(losses):
        weights["w"].fill_(step)
        watch.add(look(step, loss), weights)
        if watch.gives_up and stopped is None:
            stopped = step
    best = losses.index(min(losses))
    assert watch.best_look == look(best, losses[best])
    waits = [step - losses[: step + 1].index(min(losses[: step + 1])) for step in range(len(losses))]
    assert stopped == next((step for step, waited in enumerate(waits) if waited >= patience), None)
    watch.restore(weights)
    assert weights["w"].tolist() == [best, best]


def test_without_patience_nothing_gives_up_and_no_number_is_never_best():
    watch, weights = Watch(None), {"w": torch.zeros(1)}
    for step in range(20):
        assert watch.add(look(step, float(step + 1)), weights) is (step == 0)
    assert not watch.gives_up
    assert watch.add(look(20, float("nan")), weights) is False and watch.best_look == look(0, 1.0)
    broken = Watch(2)
    broken.add(look(0, float("nan")), weights)
    assert broken.add(look(1, 5.0), weights) is True and broken.best_look == look(1, 5.0)


def test_looks_come_back_from_json():
    watch = Watch(2)
    watch.add(look(0, 3.0), {"w": torch.ones(2)})
    watch.add(Look(5, 1.25, 2.0, 33.3), {"w": torch.full((2,), 7.0)})
    again = Watch(2)
    again.resume(json.loads(json.dumps(watch.to_json())), {"w": watch.best["w"]}, torch.device("cpu"))
    assert again.looks == watch.looks and again.best["w"].tolist() == [7.0, 7.0]
