"""Greedy generation: what one question gets alone it gets in any company, and it is the plain argmax."""

from __future__ import annotations

import pytest
import torch

from mbc_core.reader.generate import answer_prompts, greedy
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
