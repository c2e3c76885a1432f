"""Aggregation: the histogram is the flat read, exactly; the hierarchical one is right over the bank."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from mbc_core.errors import UsageError
from mbc_core.paper.aggregation import (
    Aggregator,
    Memory,
    cell_counts,
    code_counts,
    flat_memory,
    hierarchy_distance,
    histogram_memory,
)

WIDTH, T = 16, 3


def aggregator(context: int = WIDTH, seed: int = 0, **changes) -> Aggregator:
    torch.manual_seed(seed)
    made = Aggregator(context, WIDTH, heads=4, **changes)
    for name, one in made.named_parameters():
        if "norm" in name:
            one.data += 0.3 * torch.randn(one.shape)
    return made.eval()


def bank(documents: int, codewords: int = 9, width: int = WIDTH, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = 2 * torch.randn(codewords, width, generator=generator)
    skewed = torch.rand(documents, T, generator=generator).square() * codewords
    return words, skewed.long()


def queries(rows: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, T, WIDTH, generator=torch.Generator().manual_seed(seed))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def by_hand(made: Aggregator, asked: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """One question in float64: every vector, every head, softmax written out."""
    x = asked.double()
    for block in made.double().blocks:
        normal = functional.layer_norm(vectors, (WIDTH,), block.context_norm.weight, block.context_norm.bias)
        query = functional.layer_norm(x, (WIDTH,), block.query_norm.weight, block.query_norm.bias)
        q, k, v = block.query(query), block.key(normal), block.value(normal)
        found = torch.zeros_like(x)
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            for t in range(T):
                weights = [math.exp(float(q[t, part] @ one[part]) / 2) for one in k]
                found[t, part] = sum(w * one[part] for w, one in zip(weights, v, strict=True)) / sum(weights)
        x = x + block.out(found)
        hidden = functional.gelu(
            block.feed_forward[0](functional.layer_norm(x, (WIDTH,), block.norm.weight, block.norm.bias))
        )
        x = x + block.feed_forward[2](hidden)
    made.float()
    return x.float()


@torch.no_grad()
def test_the_blocks_by_hand():
    made = aggregator(blocks=2)
    words, indices = bank(5)
    asked = queries()
    flat = made(asked, flat_memory(words, indices))
    for row in range(len(asked)):
        assert error(flat[row], by_hand(made, asked[row], words[indices.flatten()].double())) < 1e-5


def test_the_papers_sizes():
    made = Aggregator(768, 768)
    assert len(made.blocks) == 4
    assert [block.heads for block in made.blocks] == [8] * 4
    assert isinstance(made.context, torch.nn.Identity)
    assert made.blocks[0].feed_forward[0].out_features == 768
    assert Aggregator(1280, 1280).blocks[0].feed_forward[0].out_features == 768
    assert not [one for one in made.modules() if isinstance(one, torch.nn.Dropout)]


VERSIONS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 10_000)), min_size=1, max_size=4)


@given(versions=VERSIONS, context=st.sampled_from([WIDTH, 5]), seed=st.integers(0, 9))
@torch.no_grad()
def test_the_histogram_is_the_flat_read(versions, context, seed):
    made, asked = aggregator(context, seed), queries(seed=seed)
    banks = [bank(documents, 9, context, place) for documents, place in versions]
    vectors = torch.cat([flat_memory(words, indices).vectors for words, indices in banks])
    counted = histogram_memory([(words, code_counts(indices, 9)) for words, indices in banks])
    assert len(counted.vectors) == 9 * len(versions)
    flat = made(asked, Memory(vectors))
    assert error(made(asked, counted), flat) < 1e-5
    shuffled = vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))]
    assert error(made(asked, Memory(shuffled)), flat) < 1e-5


@given(versions=VERSIONS, context=st.sampled_from([WIDTH, 5]), seed=st.integers(0, 9))
@torch.no_grad()
def test_with_slot_marks_the_histogram_by_slot_is_the_flat_read(versions, context, seed):
    made, asked = aggregator(context, seed, slots=T), queries(seed=seed)
    banks = [bank(documents, 9, context, place) for documents, place in versions]
    flat = [flat_memory(words, indices) for words, indices in banks]
    whole = Memory(torch.cat([one.vectors for one in flat]), None, torch.cat([one.slots for one in flat]))
    counted = histogram_memory([(words, cell_counts(indices, 9)) for words, indices in banks])
    assert len(counted.vectors) <= 9 * T * len(versions)
    assert error(made(asked, counted), made(asked, whole)) < 1e-5


@torch.no_grad()
def test_slot_marks_tell_slots_apart_and_nothing_else():
    made, asked = aggregator(slots=T), queries()
    words, indices = bank(5)
    read = made(asked, flat_memory(words, indices))
    assert error(made(asked, flat_memory(words, indices.roll(1, 0))), read) < 1e-5
    assert error(made(asked, flat_memory(words, indices.flip(1))), read) > 1e-3
    with pytest.raises(UsageError, match="which slot"):
        made(asked, Memory(words))
    plain = aggregator()
    plain.load_state_dict({name: one for name, one in made.state_dict().items() if name != "marks"})
    made.marks.data.zero_()
    assert torch.equal(made(asked, flat_memory(words, indices)), plain(asked, flat_memory(words, indices)))


def test_cells_sum_to_the_histogram():
    _, indices = bank(20)
    cells = cell_counts(indices, 9)
    assert cells.tolist() == [torch.bincount(slot, minlength=9).tolist() for slot in indices.T]
    assert torch.equal(cells.sum(0), code_counts(indices, 9))


@torch.no_grad()
def test_a_fitted_scale_gives_code_vectors_variance_one():
    words = 0.05 * torch.randn(512, 5, generator=torch.Generator().manual_seed(3)) + 0.02
    made, fitted = aggregator(5), aggregator(5)
    fitted.fit_scale(words)
    wanted = made.context((words - words.mean(0)) / words.std())
    assert error(fitted.context(words), wanted) < 1e-5
    same = aggregator()
    same.fit_scale(torch.randn(9, WIDTH))
    assert isinstance(same.context, torch.nn.Identity)


@torch.no_grad()
def test_the_histogram_holds_for_large_and_uneven_counts():
    made, asked = aggregator(), queries()
    words, _ = bank(1)
    counts = torch.tensor([0, 1, 0, 2, 5, 0, 40_000, 3, 0])
    found = made(asked, Memory(words, counts))
    unlike = made(asked, Memory(words, counts.clamp(max=1)))
    # The flat read adds 40,011 float32 terms and is itself 10⁻⁴ off; the truth is the flat read in float64.
    flat = made.double()(asked.double(), Memory(words.double().repeat_interleave(counts, 0)))
    assert error(found.double(), flat) < 1e-5
    assert error(unlike.double(), flat) > 1e-2, "counts must matter"
    assert error(made(asked.double(), Memory(words.double(), counts)), flat) < 1e-12


@torch.no_grad()
def test_counts_add_and_subtract():
    _, indices = bank(20)
    assert torch.equal(code_counts(indices, 9), code_counts(indices[:7], 9) + code_counts(indices[7:], 9))
    assert code_counts(torch.tensor([[0, 2], [2, 2]]), 4).tolist() == [1, 0, 3, 0]
    with pytest.raises(UsageError, match=r"beyond the codebook.*9.*8 codewords"):
        code_counts(torch.tensor([9]), 8)


@torch.no_grad()
def test_each_question_may_have_its_own_bank():
    made, asked = aggregator(), queries()
    words, _ = bank(1)
    counts = torch.tensor([[1, 2, 0, 0, 0, 0, 0, 0, 4], [0, 0, 0, 0, 0, 9, 1, 0, 0]])
    own = made(asked, Memory(words, counts))
    own_vectors = made(asked, Memory(torch.stack([words, words]), counts))
    for row in range(2):
        alone = made(asked[row : row + 1], Memory(words, counts[row]))
        assert error(own[row : row + 1], alone) < 1e-5
        assert error(own_vectors[row : row + 1], alone) < 1e-5
    assert error(own[1], own[0]) > 1e-2


@given(documents=st.integers(1, 24), more=st.integers(0, 3), seed=st.integers(0, 9))
@torch.no_grad()
def test_one_group_for_the_whole_bank_is_the_flat_read(documents, more, seed):
    made, asked = aggregator(seed=seed), queries()
    words, indices = bank(documents, seed=seed)
    group = max(2, documents + more)
    flat = made(asked, flat_memory(words, indices))
    assert error(made.hierarchical(asked, words, indices, group), flat) < 1e-6
    assert hierarchy_distance(made, asked, words, indices, group) < 1e-5


def grouped_by_hand(made, asked, parts, group):
    """The recursion as the paper tells it: each group of M becomes one T × w entry."""
    if len(parts) == 1:
        return parts[0]
    merged = []
    for start in range(0, len(parts), group):
        merged.append(made._read(asked, torch.cat(parts[start : start + group], dim=1), None))
    return grouped_by_hand(made, asked, merged, group)


@given(documents=st.integers(2, 40), group=st.integers(2, 9), context=st.sampled_from([WIDTH, 5]))
@torch.no_grad()
def test_groups_end_keep_the_last_one_and_do_not_mix_questions(documents, group, context):
    made, asked = aggregator(context, blocks=1), queries(3)
    words, indices = bank(documents, width=context)
    found = made.hierarchical(asked, words, indices, group)
    first = []
    for start in range(0, documents, group):
        vectors = made.context(words[indices[start : start + group].flatten()])
        first.append(made._read(asked, vectors, None))
    assert error(found, grouped_by_hand(made, asked, first, group)) < 1e-5
    for row in range(3):
        assert error(made.hierarchical(asked[row : row + 1], words, indices, group), found[row : row + 1]) < 1e-5
    changed = indices.clone()
    changed[-1] = (changed[-1] + 4) % 9  # the last document, alone in its group when M divides N − 1
    assert error(made.hierarchical(asked, words, changed, group), found) > 1e-4


@torch.no_grad()
def test_a_bank_far_longer_than_any_question_is_read_to_its_end():
    """The reference stepped over the question's length: beyond some 150 entries nothing was read."""
    made, asked = aggregator(), queries()
    words, indices = bank(400)
    found = made.hierarchical(asked, words, indices, 8)
    changed = indices.clone()
    changed[390:] = (changed[390:] + 3) % 9
    assert error(made.hierarchical(asked, words, changed, 8), found) > 1e-4


@torch.no_grad()
def test_the_hierarchical_reads_distance_is_told():
    made, asked = aggregator(), queries()
    words, indices = bank(50)
    distances = {group: hierarchy_distance(made, asked, words, indices, group) for group in (2, 5, 16, 50)}
    print(f"\nhierarchical read, distance from the exact one by group size: {distances}")
    assert distances[50] < 1e-5
    assert min(distances[group] for group in (2, 5, 16)) > 1e-3


@torch.no_grad()
def test_without_memory_only_the_feed_forward_half_is_left():
    made, asked = aggregator(), queries()
    expected = asked
    for block in made.blocks:
        expected = expected + block.feed_forward(block.norm(expected))
    assert torch.equal(made(asked, None), expected)


def test_gradients_reach_the_codewords_through_the_histogram_as_through_every_vector():
    made, asked = aggregator(), queries()
    words, indices = bank(12)
    words.requires_grad_()
    weights = queries(seed=5)
    (flat,) = torch.autograd.grad((made(asked, flat_memory(words, indices)) * weights).sum(), words)
    counted = histogram_memory([(words, code_counts(indices, 9))])
    (found,) = torch.autograd.grad((made(asked, counted) * weights).sum(), words)
    assert error(found, flat) < 1e-4


@torch.no_grad()
def test_autocast_does_not_round_the_logarithms():
    """ln(10⁶) in bfloat16 is off by .06; in the logits that would weigh a code 6% wrong."""
    made, asked = aggregator(blocks=1), queries()
    words, _ = bank(1)
    counts = torch.tensor([1_000_000, 1_040_000, 1, 1, 1, 1, 1, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        many, alike = made(asked, Memory(words, counts)), made(asked, Memory(words, counts.clamp(max=1_000_000)))
    exact = made(asked, Memory(words, counts)) - made(asked, Memory(words, counts.clamp(max=1_000_000)))
    assert float((many - alike).float().norm()) > 0.3 * float(exact.norm())


@pytest.mark.parametrize("memory", [Memory(torch.zeros(0, WIDTH)), Memory(torch.ones(2, WIDTH), torch.zeros(2))])
def test_an_empty_memory_is_refused(memory):
    with pytest.raises(UsageError, match=r"memory is empty.*closed book"):
        aggregator()(queries(), memory)


def test_what_cannot_be_read_in_groups_is_refused():
    words, indices = bank(3)
    with pytest.raises(UsageError, match="fewer than two documents"):
        aggregator().hierarchical(queries(), words, indices, 1)
    with pytest.raises(UsageError, match="memory is empty"):
        aggregator().hierarchical(queries(), words, indices[:0], 4)
    with pytest.raises(UsageError, match="no codebook version"):
        histogram_memory([])
    with pytest.raises(UsageError, match=r"3 heads, width 16"):
        Aggregator(WIDTH, WIDTH, heads=3)
