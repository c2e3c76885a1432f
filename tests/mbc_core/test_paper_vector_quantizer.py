"""The paper's vector quantizer against values typed out and against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from mbc_core.errors import UsageError
from mbc_core.paper.config import PaperConfig
from mbc_core.paper.vector_quantizer import VectorQuantizer, perplexity


def value(tensor: torch.Tensor) -> float:
    return float(tensor.detach())


def quantizer(words, **changes) -> VectorQuantizer:
    words = torch.tensor(words)
    config = PaperConfig(codewords=len(words), code_width=words.shape[1], **changes)
    made = VectorQuantizer(config)
    made.codebook.data.copy_(words)
    return made.train()


FOUR = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]


def z_of(*rows) -> torch.Tensor:
    return torch.tensor([rows])


def test_the_papers_defaults():
    config = PaperConfig()
    assert (config.codewords, config.tokens, config.beta, config.lambda_vq) == (512, 12, 0.25, 1.0)
    assert (config.usage_decay, config.dead_below, config.codebook_by) == (0.99, 1e-4, "gradient")
    made = VectorQuantizer(config)
    assert made.codebook.shape == (512, 576)
    assert made.codebook.requires_grad
    words = made.codebook.detach()
    assert 0.99 / 512 < value(words.abs().max()) <= 1 / 512
    assert abs(value(words.mean())) < 1e-5
    assert value(words.std()) == pytest.approx(1 / 512 / math.sqrt(3), rel=0.01)


def test_codes_loss_perplexity_and_usage_as_typed_out():
    made = quantizer(FOUR, reset=False)
    found = made(z_of([0.1, 0.0], [0.9, 0.1], [0.2, 0.0]))
    assert found.indices.tolist() == [[0, 1, 0]]
    assert found.vectors.tolist() == [[[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]
    assert value(found.loss) == pytest.approx(1.25 * 0.07 / 6, rel=1e-6)
    assert value(found.perplexity) == pytest.approx(math.exp(math.log(1.5) * 2 / 3 + math.log(3) / 3), rel=1e-6)
    assert int(found.used) == 2
    assert made.usage.tolist() == pytest.approx([0.02, 0.01, 0.0, 0.0])
    assert made.codebook.tolist() == FOUR


def test_a_reset_takes_the_lowest_dead_code_the_mean_usage_and_stays_when_stepped_again():
    made = quantizer(FOUR)
    first = made(z_of([0.1, 0.0], [0.1, 0.0], [0.1, 0.0]))
    # One distinct vector, three dead codes: only the lowest gets a word. mean(n) = .03 / 4, before the reset.
    assert first.indices.tolist() == [[0, 0, 0]]
    assert first.reset_rows.tolist() == [1]
    word = [pytest.approx(0.1), 0.0]
    assert made.codebook.tolist() == [[0.0, 0.0], word, [0.0, 1.0], [5.0, 5.0]]
    assert made.usage.tolist() == pytest.approx([0.03, 0.0075, 0.0, 0.0])

    again = made(z_of([0.1, 0.0], [0.1, 0.0], [0.1, 0.0]))
    # Served exactly now: no vector differs from its codeword, so nothing is given away twice.
    assert again.indices.tolist() == [[1, 1, 1]]
    assert again.reset_rows.tolist() == []
    assert made.usage.tolist() == pytest.approx([0.0297, 0.0075 * 0.99 + 0.03, 0.0, 0.0])

    third = made(z_of([0.3, 0.3], [0.1, 0.0], [0.1, 0.0]))
    usage = [0.0297 * 0.99, (0.0075 * 0.99 + 0.03) * 0.99 + 0.03, 0.0, 0.0]
    assert third.reset_rows.tolist() == [2]
    assert made.codebook.tolist() == [[0.0, 0.0], word, [pytest.approx(0.3)] * 2, [5.0, 5.0]]
    assert made.usage.tolist() == pytest.approx([*usage[:2], sum(usage) / 4, 0.0])
    assert int(made.resets) == 2
    assert int(made.forwards) == 3


def test_an_ema_codebook_as_typed_out_and_its_reset_holds_in_the_next_step():
    made = quantizer([[0.0], [1.0], [4.0]], codebook_by="ema")
    assert not made.codebook.requires_grad
    first = made(z_of([0.2], [0.4], [1.2]))
    assert value(first.loss) == pytest.approx(0.25 * (0.04 + 0.16 + 0.04) / 3)
    assert first.reset_rows.tolist() == [2]
    word = value(made.codebook[2])
    assert any(word == pytest.approx(one) for one in (0.2, 0.4, 1.2))
    assert made.codebook[:2, 0].tolist() == pytest.approx([0.3, 1.2])
    assert made.usage.tolist() == pytest.approx([0.02, 0.01, 0.01])
    assert made.sum[:, 0].tolist() == pytest.approx([0.006, 0.012, 0.01 * word])

    far = 3 * [[-9.0]]
    made(z_of(*far))
    # Code 2 was not hit; had the reset left count or sum behind, m / N would no longer be its word.
    assert value(made.codebook[2]) == pytest.approx(word, rel=1e-5)
    nearest = int(np.argmin([abs(one + 9) for one in (0.3, 1.2, word)]))
    kept = [0.02, 0.01, 0.01][nearest] * 0.99
    total = [0.006, 0.012, 0.01 * word][nearest] * 0.99 - 0.27
    assert value(made.codebook[nearest]) == pytest.approx(total / (kept + 0.03), rel=1e-5)


class Oracle:
    """The same rule by plain loops over Python numbers."""

    def __init__(self, words, ema, reset):
        self.words = [list(map(float, one)) for one in words]
        self.count = [0.0] * len(words)
        self.sum = [[0.0] * len(words[0]) for _ in words]
        self.ema, self.reset, self.step = ema, reset, 0

    def __call__(self, rows):
        old = [list(one) for one in self.words]
        codes = [min(range(len(old)), key=lambda k: (dist(row, old[k]), k)) for row in rows]
        self.step += 1
        for k in range(len(old)):
            mine = [row for row, code in zip(rows, codes, strict=True) if code == k]
            self.count[k] = 0.99 * self.count[k] + 0.01 * len(mine)
            for i in range(len(self.sum[k])):
                self.sum[k][i] = 0.99 * self.sum[k][i] + 0.01 * sum(row[i] for row in mine)
            if self.ema and self.count[k] > 1e-6:
                self.words[k] = [one / self.count[k] for one in self.sum[k]]
        if self.reset:
            self._reset(sorted({tuple(row) for row, code in zip(rows, codes, strict=True) if row != old[code]}))
        return codes

    def _reset(self, candidates):
        generator = torch.Generator().manual_seed(self.step)
        order = torch.randperm(len(candidates), generator=generator).tolist()
        dead = [k for k, count in enumerate(self.count) if count < 1e-4]
        mean = sum(self.count) / len(self.count)
        for k, place in zip(dead, order, strict=False):
            self.words[k] = list(candidates[place])
            self.count[k] = mean
            self.sum[k] = [mean * one for one in candidates[place]]


def dist(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


GRID = st.integers(-40, 40).map(lambda number: number / 8)  # exact in binary: no tie turns on rounding
BATCHES = st.lists(st.lists(st.tuples(GRID, GRID), min_size=4, max_size=4), min_size=1, max_size=6)


@given(batches=BATCHES, ema=st.booleans(), reset=st.booleans())
def test_steps_equal_a_plain_loop(batches, ema, reset):
    words = [[0.0, 0.0], [1.0, 0.5], [-2.0, 1.0], [5.0, 5.0], [0.25, -3.0], [-4.0, -4.0]]
    made = quantizer(words, codebook_by="ema" if ema else "gradient", reset=reset)
    oracle = Oracle(words, ema, reset)
    for rows in batches:
        if ema:  # words are quotients now: carry the oracle's on, so that a near tie cannot part the two
            made.codebook.data.copy_(torch.tensor(oracle.words))
            oracle.words = made.codebook.double().tolist()
        found = made(torch.tensor(rows).view(2, 2, 2))
        assert found.indices.flatten().tolist() == oracle([list(row) for row in rows])
        assert made.codebook.tolist() == [pytest.approx(one, abs=1e-5) for one in oracle.words]
        assert made.usage.tolist() == pytest.approx(oracle.count, abs=1e-6)
        if ema:
            assert made.sum.tolist() == [pytest.approx(one, abs=1e-5) for one in oracle.sum]


def test_reset_words_are_distinct_vectors_of_the_batch_and_nobodys_codeword():
    torch.manual_seed(0)
    made = VectorQuantizer(PaperConfig(codewords=64, code_width=8)).train()
    z = torch.randn(5, 4, 8)
    z[4] = z[3]  # repeated passages must not become repeated codewords
    found = made(z)
    words = made.codebook[found.reset_rows]
    pool = {tuple(row) for row in z.view(-1, 8).tolist()}
    assert len(pool) == 16
    assert {tuple(row) for row in words.tolist()} == pool
    assert len(words) == 16
    dead = [code for code in range(64) if code not in found.indices]
    assert found.reset_rows.tolist() == dead[:16]
    rows = [tuple(row) for row in made.codebook.tolist()]
    assert len(set(rows)) == 64
    for _ in range(6):
        made(torch.randn(5, 4, 8))
    assert len({tuple(row) for row in made.codebook.tolist()}) == 64


def test_the_first_forwards_fill_the_codebook():
    """Reset doubles as a data-dependent start: no code is dead after K / (B·T) forwards and a few."""
    torch.manual_seed(0)
    made = VectorQuantizer(PaperConfig(codewords=64, code_width=8)).train()
    for _ in range(6):
        made(torch.randn(4, 4, 8))
    assert value(made.usage.min()) > 1e-4


def test_a_code_that_is_never_used_dies_at_the_threshold_and_not_before():
    made = quantizer(FOUR, reset=True)
    made.usage.fill_(0.01)
    z = z_of([0.1, 0.0], [1.1, 0.0], [0.0, 1.1])  # all but the last code
    forwards = 0
    while not len(made(z).reset_rows):
        forwards += 1
    assert forwards == math.floor(math.log(1e-4 / 0.01) / math.log(0.99))


def test_gradients_pass_straight_through_and_the_value_is_the_codeword_bit_for_bit():
    torch.manual_seed(1)
    made = VectorQuantizer(PaperConfig(codewords=16, code_width=4)).train()
    z = torch.randn(2, 3, 4, requires_grad=True)
    words = made.codebook.detach().clone()
    found = made(z)
    assert torch.equal(found.vectors, words[found.indices])
    weights = torch.randn(2, 3, 4)
    (gradient,) = torch.autograd.grad((found.vectors * weights).sum(), z, retain_graph=True)
    assert torch.equal(gradient, weights)
    to_z, to_words = torch.autograd.grad(found.loss, [z, made.codebook])
    assert torch.allclose(to_z, 0.25 * 2 * (z - words[found.indices]).detach() / z.numel())
    expected = torch.zeros_like(words)
    for row, code in zip(z.detach().view(-1, 4), found.indices.flatten(), strict=True):
        expected[code] += 2 * (words[code] - row) / z.numel()
    assert torch.allclose(to_words, expected, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adams_moments_of_reset_rows_are_cleared(kind):
    def run(watch):
        made = quantizer([[0.0, 0.0], [1.0, 0.0], [3.0, 3.0]])
        optimizer = kind([made.codebook], lr=0.1, weight_decay=0.0)
        if watch:
            made.watch(optimizer)
        for _ in range(3):  # all three codes learn and gather moments
            optimizer.zero_grad()
            made(z_of([0.2, 0.0], [1.2, 0.0], [3.2, 3.0])).loss.backward()
            optimizer.step()
        made.usage[2] = 0.0  # as 700 forwards without a hit would leave it
        optimizer.zero_grad()
        found = made(z_of([0.2, 0.0], [1.2, 0.0], [1.2, 0.0]))
        word = made.codebook[2].detach().clone()
        assert found.reset_rows.tolist() == [2]
        found.loss.backward()
        optimizer.step()
        return word, made.codebook[2].detach(), optimizer.state[made.codebook]

    word, after, state = run(watch=True)
    assert torch.equal(word, after)
    assert state["exp_avg"][2].tolist() == [0.0, 0.0]
    assert state["exp_avg_sq"][2].tolist() == [0.0, 0.0]
    assert state["exp_avg"][:2].abs().max() > 0
    word, after, _ = run(watch=False)
    assert not torch.equal(word, after), "without clearing, the new word moves on in the old one's direction"


def test_autocast_changes_no_code():
    torch.manual_seed(0)
    made = VectorQuantizer(PaperConfig(codewords=64, code_width=16)).eval()
    made.codebook.data.copy_(1 + 0.002 * torch.randn(64, 16))
    z = 1 + 0.002 * torch.randn(8, 12, 16)
    exact = (z.double()[:, :, None] - made.codebook.double()).square().sum(-1).argmin(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(z).indices, exact)
        naive = (made.codebook.square().sum(1) - 2 * (z @ made.codebook.T)).argmin(-1)
        assert not torch.equal(naive, exact), "the case must be one that bfloat16 gets wrong"
    assert torch.equal(made(z).indices, exact)


def test_quantization_off_is_macs_memory():
    made = quantizer(FOUR, quantize=False)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    z = torch.randn(2, 3, 2, requires_grad=True)
    found = made(z)
    assert found.vectors is z
    assert found.indices is None
    assert value(found.loss) == 0.0
    assert not made.codebook.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_evaluation_changes_nothing():
    made = quantizer(FOUR).eval()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert not len(made(torch.randn(2, 3, 2)).reset_rows)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_the_pooled_rule_waits_and_never_gives_one_document_away():
    made = quantizer(FOUR, reset_rule="pooled")
    torch.manual_seed(0)
    z = torch.cat([0.1 * torch.randn(3, 1, 2), torch.tensor([1.0, 0.0]) + 0.1 * torch.randn(2, 1, 2)])
    waited = 0
    while not len(rows := made(z).reset_rows):
        waited += 5
    assert waited + 5 == 20 * 4  # twenty vectors a codeword, five a forward
    assert rows.tolist() == [2]  # codes 2 and 3 are dead; five documents make one pool
    assert torch.allclose(made.codebook[2], z.mean(dim=(0, 1)), atol=1e-6)
    assert value(made.usage[2]) == pytest.approx(value(made.usage[:2].sum()) / 4)
    assert int(made.vectors) == 0
    assert not len(made(z).reset_rows)


def test_the_pooled_rule_needs_five_documents():
    made = quantizer(FOUR, reset_rule="pooled")
    for _ in range(30):
        assert not len(made(torch.randn(4, 1, 2) * 0.1).reset_rows)


def test_decay_may_follow_the_number_of_vectors():
    made = quantizer(FOUR, usage_tau=10.0, reset=False)
    made.usage.fill_(1.0)
    made(z_of([0.1, 0.0], [0.1, 0.0], [0.1, 0.0]))
    decay = math.exp(-0.3)
    assert made.usage.tolist() == pytest.approx([decay + (1 - decay) * 3, decay, decay, decay])


def test_perplexity():
    assert value(perplexity(torch.tensor([3, 3, 3, 3, 0]))) == pytest.approx(4.0)
    assert value(perplexity(torch.tensor([0, 7]))) == pytest.approx(1.0)


def test_equal_batches_and_seeds_give_equal_codebooks_and_a_resumed_one_goes_on_alike():
    def batches():
        generator = torch.Generator().manual_seed(5)
        return [torch.randn(3, 2, 4, generator=generator) for _ in range(6)]

    config = PaperConfig(codewords=32, code_width=4)
    whole = VectorQuantizer(config).train()
    for z in batches():
        whole(z)
    first = VectorQuantizer(config).train()
    for z in batches()[:3]:
        first(z)
    resumed = VectorQuantizer(config).train()
    resumed.load_state_dict(first.state_dict())
    for z in batches()[3:]:
        resumed(z)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_another_width_is_refused():
    with pytest.raises(UsageError, match=r"another shape.*\[1, 3, 3\].*\[B, T, 2\]"):
        quantizer(FOUR)(torch.zeros(1, 3, 3))


def test_the_loss_is_the_papers_formula():
    torch.manual_seed(3)
    made = VectorQuantizer(PaperConfig(codewords=8, code_width=4, beta=0.7)).eval()
    z = torch.randn(3, 2, 4)
    found = made(z)
    chosen = made.codebook[found.indices]
    expected = functional.mse_loss(chosen, z) + 0.7 * functional.mse_loss(z, chosen)
    assert value(found.loss) == pytest.approx(value(expected), rel=1e-6)


def test_standardized_vectors_as_typed_out_and_a_passage_never_depends_on_its_neighbours_online():
    made = quantizer([[1.0], [-1.0]], standardize=True, tokens=2, reset=False)
    batches = [torch.tensor([[[10.0], [3.0]], [[last], [3.5]]]) for last in (12.0, 16.0)]
    for z in batches:  # each token by its own mean and deviation in the batch
        found = made(z.requires_grad_())
        assert found.indices.tolist() == [[1, 1], [0, 0]]
        assert value(found.loss) == pytest.approx(0.0, abs=1e-9)
        weights = torch.tensor([[[1.0], [1.0]], [[3.0], [5.0]]])
        (gradient,) = torch.autograd.grad((found.vectors * weights).sum(), z)
        assert gradient.sum(0).flatten().tolist() == pytest.approx([0.0, 0.0], abs=1e-6), "no common drift"
    mean = (0.1 * 0.9 * 11 + 0.1 * 13) / (0.1 * 0.9 + 0.1)
    square = (0.1 * 0.9 * 122 + 0.1 * 178) / (0.1 * 0.9 + 0.1)
    z = torch.tensor([[[12.0], [3.25]]])
    found = made.eval().standardized(z)
    assert found.flatten().tolist() == pytest.approx([(12 - mean) / math.sqrt(square - mean**2), 0.0], abs=1e-4)
    assert torch.equal(made.standardized(torch.cat([z, 9 * z]))[:1], found)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made(z)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    made.set_scale(torch.tensor([[10.0], [3.0]]), torch.tensor([[104.0], [9.25]]))
    assert made.standardized(z).flatten().tolist() == pytest.approx([1.0, 0.5], abs=1e-4)


def test_the_gradient_of_standardized_vectors_is_batch_normalizations():
    torch.manual_seed(5)
    made = VectorQuantizer(PaperConfig(tokens=3, codewords=8, code_width=4, standardize=True, quantize=False)).train()
    z = (torch.randn(6, 3, 4) * torch.rand(3, 4) + torch.randn(3, 4)).requires_grad_()
    weights = torch.randn(6, 3, 4)
    found = made(z).vectors
    wanted = functional.batch_norm(z.flatten(1), None, None, training=True, eps=1e-6).view_as(z)
    assert torch.allclose(found, wanted, atol=1e-5)
    (own,) = torch.autograd.grad((found * weights).sum(), z)
    (other,) = torch.autograd.grad((wanted * weights).sum(), z)
    assert torch.allclose(own, other, atol=1e-4) and other.abs().max() > 0.1


def test_commitment_does_not_narrow_standardized_vectors():
    torch.manual_seed(6)
    made = VectorQuantizer(
        PaperConfig(tokens=2, codewords=8, code_width=4, standardize=True, codebook_by="ema", usage_decay=0.9)
    ).train()
    z = torch.nn.Parameter(torch.randn(64, 2, 4))
    before = z.detach().std(0)
    optimizer = torch.optim.Adam([z], lr=2e-2)
    for _ in range(150):
        optimizer.zero_grad()
        made(z).loss.backward()
        optimizer.step()
    assert (z.detach().std(0) > 0.7 * before).all()
