"""The paper's model end to end: its loss, its switches, and who gets gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mbc_core.errors import UsageError
from mbc_core.paper.aggregation import Memory
from mbc_core.paper.config import PaperConfig
from mbc_core.paper.model import PaperModel
from mbc_core.reader.prefix_cache import prefix_cache
from tests.mbc_core.paper_parts import ANSWERS, PASSAGES, address_model, batch, bert, paper_model
from tests.mbc_core.tiny_reader import language_model

KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def value(tensor: torch.Tensor) -> float:
    return float(tensor.detach())


@KINDS
@pytest.mark.parametrize("make", [paper_model, address_model])
@torch.no_grad()
def test_the_loss_is_cross_entropy_of_answer_tokens_alone(kind, make):
    model = make(kind).eval()
    shown = batch(model)
    found = model(shown)
    memory, _ = model.batch_memory(shown)
    queries = model.queries(shown.question_ids, shown.question_mask, shown.question_embeddings)
    pairs = model.read(queries, memory)
    places = 2 + torch.arange(shown.ids.shape[1]).expand(len(shown.ids), -1)
    logits = model.language_model.model(shown.ids, position_ids=places, past_key_values=prefix_cache(pairs)).logits
    losses = []
    for place, target in zip(shown.places.tolist(), shown.targets.tolist(), strict=True):
        row, column = divmod(place, shown.ids.shape[1])
        assert int(shown.ids[row, column + 1]) == target
        losses.append(-value(logits[row, column].log_softmax(-1)[target]))
    assert len(losses) == sum(len(one) + 2 for one in ANSWERS)  # a space, its bytes, end of text
    assert value(found.answer) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    padded = replace(shown, ids=torch.nn.functional.pad(shown.ids, (0, 9), value=3))
    width = shown.ids.shape[1]
    moved = replace(padded, places=shown.places // width * (width + 9) + shown.places % width)
    assert value(model(moved).answer) == pytest.approx(value(found.answer), rel=1e-5)


@torch.no_grad()
def test_lambda_weighs_the_quantization_loss():
    found = paper_model(lambda_vq=2.5).eval()
    losses = found(batch(found))
    assert value(losses.vq) > 0.01
    assert value(losses.total) == pytest.approx(value(losses.answer) + 2.5 * value(losses.vq))


@torch.no_grad()
def test_a_batchs_own_passages_are_its_bank():
    model = paper_model().eval()
    shown = batch(model)
    other = batch(model, passages=[*PASSAGES[:3], "Elsinore is cold."])
    assert value(model(shown).answer) != value(model(other).answer)
    shuffled = batch(model, passages=PASSAGES[::-1])
    assert value(model(shuffled).answer) == pytest.approx(value(model(shown).answer), rel=1e-5), "no order in a bank"
    memory, _ = model.batch_memory(other)
    assert value(model(shown, memory=memory).answer) == pytest.approx(value(model(other).answer), rel=1e-6)


@pytest.mark.parametrize("make", [paper_model, address_model])
@torch.no_grad()
def test_several_banks_in_a_batch_are_separate(make):
    model = make().eval()
    shown = batch(model)
    memory, _ = model.batch_memory(shown)
    halves = memory.vectors.chunk(2)
    queries = model.queries(shown.question_ids, shown.question_mask, shown.question_embeddings)
    alone = torch.cat([model.aggregator(a, Memory(b)) for a, b in zip(queries.chunk(2), halves, strict=True)])
    loss = model.answer_loss(shown.ids, shown.places, shown.targets, model.prefix(alone))
    assert value(model(replace(shown, banks=2)).answer) == pytest.approx(value(loss), rel=1e-5)
    assert value(model(shown).answer) != pytest.approx(value(loss), rel=1e-5)


@torch.no_grad()
def test_closed_reads_no_memory_but_keeps_the_rest():
    model = paper_model().eval()
    shown = batch(model)
    closed = model(shown, closed=True)
    assert value(closed.answer) == value(model(batch(model, passages=PASSAGES[:1]), closed=True).answer)
    assert value(closed.answer) != value(model(shown).answer)
    assert value(closed.vq) == 0.0
    assert closed.quantized is None
    plain = model.answer_loss(shown.ids, shown.places, shown.targets, None)
    assert value(plain) != value(closed.answer)


def gradients(model: PaperModel, shown) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(shown).answer.backward()
    found = {name: one.grad for name, one in model.amortizer.named_parameters() if one.grad is not None}
    return {name: one.clone() for name, one in found.items()}


def test_backprop_keep_is_the_share_that_gets_gradients():
    """The reference's ``backprop_drop`` 0.75 keeps 75%, MAC's "dropout 0.75" keeps 25%: ours says what it keeps."""
    model = paper_model(lora_dropout=0.0).train()
    model.quantizer.config = replace(model.config, reset=False)
    shown = batch(model)
    whole = gradients(model, shown)
    parts = [gradients(model, replace(shown, kept=torch.tensor([i == place for i in range(4)]))) for place in range(4)]
    for name, gradient in whole.items():
        assert torch.allclose(sum(part[name] for part in parts), gradient, atol=1e-5, rtol=1e-3), name
        assert not torch.allclose(parts[0][name], gradient)
    none = gradients(model, replace(shown, kept=torch.zeros(4, dtype=torch.bool)))
    assert none == {}
    some = model(replace(shown, kept=torch.tensor([False, True, True, False])))
    assert value(some.answer) == pytest.approx(value(model(shown).answer), rel=1e-5)


@pytest.mark.parametrize(("keep", "expected"), [(1.0, 4), (0.75, 3), (0.25, 1), (0.01, 1)])
def test_backprop_keep_draws_the_passages(keep, expected):
    model = paper_model(backprop_keep=keep).train()
    shown = batch(model)
    z = model.amortize(shown.document_ids, shown.document_mask)
    reached = 0
    for row in range(4):
        model.zero_grad()
        z[row].sum().backward(retain_graph=True) if z.requires_grad else None
        grad = model.amortizer.queries.grad
        reached += grad is not None and bool(grad.abs().max() > 0)
    assert reached == expected
    assert torch.allclose(model.eval().amortize(shown.document_ids, shown.document_mask), z, atol=1e-6)


@KINDS
def test_a_step_trains_everything_but_the_base(kind):
    model = paper_model(kind, train_encoder=True, dead_below=0.0).train()
    frozen = {name: one.clone() for name, one in model.named_parameters() if not one.requires_grad}
    before = {name: one.detach().clone() for name, one in model.learned_parameters().items()}
    optimizer = torch.optim.Adam(model.learned_parameters().values(), lr=1e-2)
    shown = batch(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(shown).total.backward()
        optimizer.step()
    still = {name for name, one in model.learned_parameters().items() if torch.equal(one, before[name])}
    # Positions past the longest text, and token types that no text has, have nothing to learn from.
    assert {name for name in still if "embeddings" not in name} == set()
    assert all(torch.equal(one, frozen[name]) for name, one in model.named_parameters() if not one.requires_grad)
    assert {name.rsplit(".", 4)[1] for name in frozen if "lora" in name} == set()
    lora = [name for name in before if "lora_" in name]
    assert len(lora) == (12 if kind == "llama" else 6)
    assert all(any(part in name for part in ("k_proj", "v_proj", "c_attn")) for name in lora)


def test_learning_falls_below_the_closed_loss():
    """The model can learn to use its memory: a handful of passages, told apart by nothing but their codes."""
    model = paper_model(question="embedding", embedding_width=8, kv_lora=False, standardize=True).train()
    shown = batch(model)
    same = replace(shown, question_embeddings=shown.question_embeddings[:1].expand(4, -1), banks=4)
    optimizer = torch.optim.Adam(model.learned_parameters().values(), lr=3e-3)
    model.quantizer.watch(optimizer)
    for _ in range(60):
        optimizer.zero_grad()
        model(same).total.backward()
        optimizer.step()
    model.eval().calibrate([(shown.document_ids, shown.document_mask)])
    with torch.no_grad():
        found = value(model(same).answer)
        rolled = {name: getattr(same, name).roll(1, 0) for name in ("document_ids", "document_mask")}
        wrong = value(model(replace(same, **rolled)).answer)
    assert found < wrong - 0.1


@torch.no_grad()
def test_kv_lora_off_reads_and_carries_no_adapter():
    model = paper_model(kv_lora=False).eval()
    assert not hasattr(model.language_model.model, "peft_config")
    assert value(model(batch(model)).answer) > 0
    assert [name for name in model.learned_parameters() if "lora" in name] == []


def test_kv_lora_has_the_configured_size():
    model = paper_model(lora_r=3, lora_alpha=12, lora_last_n=2)
    lora = {name: one for name, one in model.learned_parameters().items() if "lora_" in name}
    assert len(lora) == 2 * 2 * 2
    assert not [name for name in lora if "layers.0." in name]
    assert {min(one.shape) for one in lora.values()} == {3}
    layer = model.language_model.model.get_base_model().model.layers[1].self_attn.k_proj
    assert layer.scaling["default"] == 4.0
    assert all(float(one.detach().abs().max()) == 0 for name, one in lora.items() if "lora_B" in name)


@torch.no_grad()
def test_codes_under_autocast_are_the_codes_online():
    """bf16 training and float32 use must not disagree about a passage's codes."""
    model = paper_model(reset=False).train()
    shown = batch(model)
    online = model.encode_documents(shown.document_ids, shown.document_mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(shown).quantized.indices, online)
        assert torch.equal(model.encode_documents(shown.document_ids, shown.document_mask), online)
    assert model.training


@torch.no_grad()
def test_calibration_takes_exact_statistics_of_passages_however_they_are_cut():
    model = paper_model(standardize=True).eval()
    shown = batch(model)
    ids, mask = shown.document_ids, shown.document_mask
    model.calibrate([(ids[:1], mask[:1]), (ids[1:], mask[1:])])
    z = model.quantizer.standardized(model.amortize(ids, mask))
    assert z.mean(0).abs().max() < 1e-3
    assert torch.allclose(z.var(0, correction=0), torch.ones(4, 32), atol=0.05)
    cut = model.quantizer.z_mean.clone()
    model.calibrate([(ids, mask)])
    assert torch.allclose(model.quantizer.z_mean, cut, atol=1e-6)
    before = model.digest()
    paper_model().calibrate([])
    with pytest.raises(UsageError, match="calibrated on nothing"):
        model.calibrate([])
    assert model.digest() == before


@torch.no_grad()
def test_quantization_off_is_mac_with_lora():
    model = paper_model(quantize=False).eval()
    shown = batch(model)
    found = model(shown)
    assert value(found.vq) == 0.0
    vectors = model.encode_documents(shown.document_ids, shown.document_mask)
    assert vectors.shape == (4, 4, 32)
    bank = Memory(vectors.flatten(0, 1))
    assert value(model(shown, memory=bank).answer) == pytest.approx(value(found.answer), rel=1e-6)


def test_the_papers_t5_form_trains_end_to_end():
    model = paper_model("gpt2", amortizer="t5", train_encoder=True, prefix_shared=False).train()
    model(batch(model)).total.backward()
    missing = [name for name, one in model.learned_parameters().items() if one.grad is None]
    assert missing == []
    assert model.prefix.inner.weight.shape[0] == 4 * 3


def test_one_encoder_may_serve_both_sides():
    encoder = bert()
    made = paper_model().config
    model = PaperModel(replace(made, train_encoder=True), language_model(), encoder=encoder, question_encoder=encoder)
    names = [name for name in model.learned_parameters() if ".encoder." in name]
    assert names
    assert all(name.startswith("amortizer.") for name in names), "each weight once"


def test_equal_seeds_make_equal_models():
    assert paper_model(seed=3).digest() == paper_model(seed=3).digest()
    assert paper_model(seed=3).digest() != paper_model(seed=4).digest()


def test_missing_parts_and_batches_of_another_kind_are_refused():
    with pytest.raises(UsageError, match=r"lacks a part.*encoder.*question_encoder"):
        PaperModel(PaperConfig(), language_model())
    with pytest.raises(UsageError, match=r"codewords \[512, 32\]"):
        PaperModel(PaperConfig.address(12), language_model(), codewords=torch.zeros(512, 16))
    model = address_model()
    with pytest.raises(UsageError, match=r"batch lacks what.*codes"):
        model(batch(paper_model()))
    with pytest.raises(UsageError, match="address codes are not made here"):
        model.encode_documents(torch.zeros(1, 3).long(), torch.ones(1, 3).long())


def test_impossible_configurations_are_refused():
    for wrong in ({"heads": 7}, {"backprop_keep": 0.0}, {"tokens": 0}, {"codes": "both"}, {"usage_decay": 1.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            PaperConfig(**wrong)
    with pytest.raises(UsageError, match="quantize"):
        PaperConfig(codes="address", quantize=False)
    with pytest.raises(UsageError, match="T = 7, width 384"):
        PaperConfig.address(7)
    assert PaperConfig.address(24).code_width == 16
