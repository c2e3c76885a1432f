"""Greedy generation: what one question gets alone it gets in any company, and it is the plain argmax."""

from __future__ import annotations

import pytest
import torch

from mbc_core.errors import UsageError
from mbc_core.reader.generate import _agreed, answer_prompts, greedy
from mbc_core.reader.prompt import PromptFormat
from tests.mbc_core.tiny_reader import language_model

pytestmark = pytest.mark.usefixtures("single_thread")

LENGTHS = (3, 40, 11, 11, 70, 5)


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]


def plain_greedy(model, ids, stop_ids, new_tokens):
    """No cache, no batch, no padding: the whole sequence again for every token."""
    made: list[int] = []
    for _ in range(new_tokens):
        with torch.no_grad():
            made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
        if made[-1] in stop_ids:
            break
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_batch_equals_the_plain_loop_on_each_prompt_alone(kind):
    found = language_model(kind)
    expected = [plain_greedy(found.model, one, [256], 12) for one in prompts()]
    assert greedy(found, prompts(), [256], 12) == expected
    assert [greedy(found, [one], [256], 12)[0] for one in prompts()] == expected
    assert len({tuple(one) for one in expected}) > 3  # the prompts do matter


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_row_stops_at_its_stop_token_while_others_go_on(kind):
    found = language_model(kind)
    free = [plain_greedy(found.model, one, [], 12) for one in prompts()]
    stop = free[1][2]  # a token that some rows reach early and others later or never
    expected = [one[: one.index(stop) + 1] if stop in one else one for one in free]
    assert greedy(found, prompts(), [stop], 12) == expected
    assert {len(one) for one in expected} != {12}


def test_answers_come_in_the_order_of_the_prompts_whatever_the_batches():
    found = language_model()
    form = PromptFormat(found.tokenizer)
    told = []
    in_one = answer_prompts(found, form, prompts(), new_tokens=6)
    in_many = answer_prompts(found, form, prompts(), new_tokens=6, batch_tokens=80, progress=told.append)
    alone = [answer_prompts(found, form, [one], new_tokens=6)[0] for one in prompts()]
    assert in_one == in_many == alone
    assert sum(told) == len(LENGTHS) and len(told) > 2


def test_no_prompts_no_answers():
    found = language_model()
    assert answer_prompts(found, PromptFormat(found.tokenizer), []) == []


TIED = [[0.5, 0.2, 0.3], [1.0], [0.6, 0.4]]
"""Weights of the six prompts as three questions."""


def plain_mixture(model, rows, weights, stop_ids, new_tokens):
    """No cache, no batch, no padding: each prompt alone, and the weighted mean of what they say."""
    made: list[int] = []
    for _ in range(new_tokens):
        said = torch.zeros(model.config.vocab_size, dtype=torch.float64)
        for ids, weight in zip(rows, weights, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids + made])).logits[0, -1]
            said += weight * logits.double().softmax(-1)
        made.append(int(said.argmax()))
        if made[-1] in stop_ids:
            break
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tied_prompts_equal_the_plain_loop_alone_and_in_company(kind):
    found, rows = language_model(kind), prompts()
    groups = [rows[:3], rows[3:4], rows[4:]]
    free = [plain_mixture(found.model, own, weights, [], 12) for own, weights in zip(groups, TIED, strict=True)]
    stop = free[0][3]
    expected = [one[: one.index(stop) + 1] if stop in one else one for one in free]
    assert greedy(found, rows, [stop], 12, tied=TIED) == expected
    alone = [greedy(found, own, [stop], 12, tied=[weights])[0] for own, weights in zip(groups, TIED, strict=True)]
    assert alone == expected
    assert expected != greedy(found, [own[0] for own in groups], [stop], 12), "the other prompts must matter"


def test_a_prompt_alone_is_read_as_if_it_were_not_tied():
    found = language_model()
    assert greedy(found, prompts(), [256], 12, tied=[[1.0]] * len(LENGTHS)) == greedy(found, prompts(), [256], 12)


def test_tied_answers_come_in_the_order_of_the_questions_whatever_the_batches():
    found, form, told = language_model(), PromptFormat(language_model().tokenizer), []
    in_one = answer_prompts(found, form, prompts(), new_tokens=6, tied=TIED)
    in_many = answer_prompts(found, form, prompts(), new_tokens=6, batch_tokens=80, progress=told.append, tied=TIED)
    assert in_one == in_many and len(in_one) == sum(told) == len(TIED) and len(told) > 1


def test_equally_likely_tokens_are_told_apart_by_their_number():
    """Two prompts that say the opposite: the mean is a tie, and the smaller id is taken; unequal weights decide."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 0.0], [0.0, 1.0, 3.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    assert _agreed(logits, [[0.5, 0.5], [1.0]]).tolist() == [1, 1, 0]
    assert _agreed(logits, [[0.4, 0.6], [1.0]]).tolist() == [2, 2, 0]


@pytest.mark.parametrize("tied", [[[1.0]], [[0.5, 0.5], [1.0], [1.0], [1.0], []], [*TIED, [1.0]]])
def test_other_weights_than_prompts_are_refused(tied):
    found = language_model()
    with pytest.raises(UsageError, match="the prompts cannot be tied"):
        greedy(found, prompts(), [256], 2, tied=tied)
