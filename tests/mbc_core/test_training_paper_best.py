"""`mbc train paper` ends with the weights of its best look: in one call or several, and not when told otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mbc_core.training.paper import PaperTrainer, train_paper
from mbc_core.training.paper_card import paper_card, read_curve
from mbc_core.training.paper_checkpoint import PaperProgress
from tests.mbc_core.tiny_paper import RUN, config, data, model, on_device

pytestmark = pytest.mark.usefixtures("single_thread")

LONG = replace(RUN, steps=12, look_every=3, flat=None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return (*data(folder), folder)


def trainer(made, losses, run=LONG, codes="learned") -> tuple[PaperTrainer, dict[int, dict[str, torch.Tensor]]]:
    """A trainer whose looks find ``losses`` (step → held-out loss), and the weights it had at each look."""
    tokens, encoder, folder = made
    learner = PaperTrainer(model(folder, config(codes)), tokens, on_device(tokens, encoder, codes), run)
    real, seen = learner.look, {}

    def look():
        found = real()
        seen[learner.progress.step] = weights(learner)
        return found | {"held_out_loss": losses[learner.progress.step]}

    learner.look = look
    return learner, seen


def weights(learner: PaperTrainer) -> dict[str, torch.Tensor]:
    everything = {**learner.parameters, **learner.buffers}
    return {name: one.detach().clone() for name, one in everything.items()}


def differing(one, other):
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("codes", ["learned", "address"])
def test_a_run_ends_with_the_weights_of_its_best_look(made, tmp_path, codes):
    learner, seen = trainer(made, {3: 2.0, 6: 1.0, 9: 1.5, 12: 1.2}, codes=codes)
    told = []
    assert train_paper(learner, tmp_path, say=told.append)
    assert differing(weights(learner), seen[6]) == [] and differing(seen[6], seen[12]) != []
    assert learner.progress.kept == 6 and told[-1] == "kept the weights of step 6, those of the best look"
    card = paper_card(learner, made[0], read_curve(tmp_path))
    assert card["kept_step"] == 6 and card["steps"] == 12


@pytest.mark.parametrize(
    ("losses", "run"),
    [
        ({3: 2.0, 6: 1.0, 9: 1.5, 12: 0.9}, LONG),  # the last look is the best
        ({3: 2.0, 6: 1.0, 9: 1.5, 12: 1.2}, replace(LONG, keep_best=False)),
    ],
)
def test_the_last_weights_stay_where_they_are_the_best_or_wanted(made, tmp_path, losses, run):
    learner, seen = trainer(made, losses, run)
    assert train_paper(learner, tmp_path)
    assert differing(weights(learner), seen[12]) == [] and learner.progress.kept is None
    assert paper_card(learner, made[0], read_curve(tmp_path))["kept_step"] == 12


def test_the_best_look_outlives_the_calls_and_a_finished_run_stays_as_it_is(made, tmp_path):
    losses = {3: 2.0, 6: 1.0, 9: 1.5, 12: 1.2}
    whole, _ = trainer(made, losses)
    train_paper(whole, tmp_path / "whole")
    calls = 0
    while True:
        part, _ = trainer(made, losses, replace(LONG, call_minutes=0))
        calls += 1
        if train_paper(part, tmp_path / "parts"):
            break
    assert calls > 1 and part.progress.kept == 6 and differing(weights(whole), weights(part)) == []
    again, _ = trainer(made, losses)
    assert train_paper(again, tmp_path / "parts") and again.progress.kept == 6
    assert differing(weights(whole), weights(again)) == []


def test_of_equal_looks_the_first_is_the_best():
    assert PaperProgress(looks=[(10, 1.5), (20, 1.0), (30, 1.0)]).best == 20
    assert PaperProgress().best is None
