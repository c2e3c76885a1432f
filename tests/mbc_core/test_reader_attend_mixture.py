"""Passages read apart: their weights against a plain loop, their answers against a plain mixture of prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.errors import UsageError
from mbc_core.reader.attend_mixture import TEMPERATURE, passage_weights
from mbc_core.reader.attend_prompt import answer_attend, attend_prompt, read_vectors, soft_embedding
from mbc_core.reader.generate import greedy
from mbc_core.reader.prompt import PromptFormat
from tests.mbc_core.test_reader_attend import projector, unit
from tests.mbc_core.tiny_reader import language_model, tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")

ASKED = ["Who founded Avalon in the year 1500?", "Why?", "Where is it?"]
SCORES = [[0.61, 0.6, 0.55], [], [0.4]]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8), st.floats(-3, 3))
def test_weights_are_a_softmax_of_differences(scores, moved):
    raw = [math.exp((one - max(scores)) / TEMPERATURE) for one in scores]
    expected = [one / sum(raw) for one in raw]
    assert passage_weights(scores) == pytest.approx(expected, abs=1e-12)
    assert passage_weights([one + moved for one in scores]) == pytest.approx(expected, abs=1e-9)


def test_typed_out_weights():
    assert passage_weights([]) == []
    assert passage_weights([-7.0]) == [1.0]
    assert passage_weights([0.3, 0.3]) == [0.5, 0.5]
    assert passage_weights([0.5, 0.5 - TEMPERATURE * math.log(3)]) == pytest.approx([0.75, 0.25])
    assert passage_weights(np.array([0.9, -0.9], np.float32)) == [1.0, pytest.approx(0, abs=1e-30)]
    with pytest.raises(UsageError, match="a passage's score is not a number"):
        passage_weights([0.1, math.nan])


def plain(model, form, made, passages, question, vector, weights):
    """One question, its prompts built one by one and tied by hand."""
    embeddings = model.model.get_input_embeddings().weight
    soft = [read_vectors(made, [passages[n : n + 1]], vector, embeddings)[0] for n in range(len(passages))]
    prompts = [attend_prompt(form, 1, question, made.config.soft_tokens, model.pad_id) for _ in soft]
    shown = soft_embedding(model, form, prompts, soft)
    ids = [one.ids for one in prompts]
    (found,) = greedy(
        model, ids, form.stop_ids, 14, lambda padded: shown(list(range(len(ids))), padded), tied=[weights]
    )
    return form.text(found), sum(len(one) for one in ids)


def test_scored_passages_are_read_apart_alone_and_in_company():
    model, form, made = language_model(), PromptFormat(tokenizer()), projector()
    passages, questions = [unit(3, 6), unit(0, 6), unit(1, 6)], unit(3, 6)
    together, prompts = answer_attend(model, made, form, passages, ASKED, questions, SCORES)
    assert [one.lines for one in prompts] == [3, 0, 1]
    expected, tokens = plain(model, form, made, passages[0], ASKED[0], questions[:1], passage_weights(SCORES[0]))
    assert together[0] == expected and len(prompts[0].ids) == tokens
    for n in range(3):
        given_ = ([passages[n]], [ASKED[n]], questions[n : n + 1])
        assert answer_attend(model, made, form, *given_, [SCORES[n]])[0] == together[n : n + 1]
    whole, _ = answer_attend(model, made, form, passages, ASKED, questions)
    assert whole[1:] == together[1:] and whole[0] != together[0]


def test_a_score_that_leaves_no_doubt_reads_the_best_passage_alone():
    model, form, made = language_model(), PromptFormat(tokenizer()), projector()
    passages, questions = [unit(3, 6)], unit(1, 6)
    sure, _ = answer_attend(model, made, form, passages, ASKED[:1], questions, [[9.0, 0.0, 0.0]])
    best, _ = answer_attend(model, made, form, [passages[0][:1]], ASKED[:1], questions)
    assert sure == best


def test_one_passage_each_is_read_as_without_scores():
    model, form, made = language_model(), PromptFormat(tokenizer()), projector()
    passages, questions = [unit(1, 6), unit(1, 6), unit(0, 6)], unit(3, 6)
    scored = answer_attend(model, made, form, passages, ASKED, questions, [[0.2], [0.9], []])
    assert scored == answer_attend(model, made, form, passages, ASKED, questions)


def test_other_scores_than_passages_are_refused():
    model, form, made = language_model(), PromptFormat(tokenizer()), projector()
    with pytest.raises(UsageError, match="the scores do not fit the passages"):
        answer_attend(model, made, form, [unit(2, 6)], ASKED[:1], unit(1, 6), [[0.5]])
