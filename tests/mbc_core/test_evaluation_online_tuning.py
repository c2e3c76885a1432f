"""Online fine-tuning beside plain loops: the loss, the step, the spans, the order, and the base left alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mbc_core.errors import UsageError
from mbc_core.evaluation.methods import load_method_set
from mbc_core.evaluation.online_tuning import OnlineTuning, TokenWeights, TuningRun, Weighted, merged, weighted_loss
from mbc_core.reader.kv_lora import KVLoraConfig, adapter_state, add_kv_lora, save_adapter
from mbc_core.reader.prompt import PromptFormat
from tests.mbc_core.prepared_data import write_prepared
from tests.mbc_core.tiny_reader import language_model, lexicon, tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")

UNIFORM = TuningRun("uniform", 1e-3)
SALIENT = TuningRun("salient", 1e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_method_set("towns", write_prepared(tmp_path_factory.mktemp("prepared"), 8))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = language_model()
    config = KVLoraConfig(r=2, alpha=4)
    model = add_kv_lora(base.model, config)
    generator = torch.Generator().manual_seed(5)
    for tensor in adapter_state(model).values():
        tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    save_adapter(model, folder, config, base_digest=base.digest, base_name=base.name)
    return folder


def weights_of(method):
    return {name: one.detach().clone() for name, one in method._ready().model.named_parameters()}


def started(data, run=UNIFORM, adapter=None, base=None):
    method = OnlineTuning(base or language_model(), adapter, run, lexicon=lexicon())
    method.start(data)
    return method


def test_the_loss_is_the_weighted_sum_that_a_loop_makes():
    model = language_model().model
    batch = Weighted(
        torch.tensor([[5, 9, 200, 7], [30, 31, 256, 256]]),
        torch.tensor([[0.0, 1.0, 0.25, 2.0], [0.0, 0.5, 0.0, 0.0]]),
    )
    total, weight = 0.0, 0.0
    for row, length in ((0, 4), (1, 2)):
        ids = batch.ids[row, :length].tolist()
        for place in range(1, length):
            logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double()
            surprise = math.log(sum(math.exp(one) for one in logits.tolist())) - logits[ids[place]].item()
            count = batch.weights[row, place].item()
            total, weight = total + count * surprise, weight + count
    assert weight == 3.75
    assert weighted_loss(model, batch).item() == pytest.approx(total / weight, rel=1e-5)


def test_weights_of_one_are_the_plain_language_model_loss(data):
    lm = language_model()
    batch = TokenWeights(PromptFormat(lm.tokenizer), None, UNIFORM, lm.pad_id).document(data.prepared, [0])
    assert batch.weights[0].tolist() == [0.0] + [1.0] * (batch.ids.shape[1] - 1)
    plain = lm.model(input_ids=batch.ids, labels=batch.ids).loss
    assert weighted_loss(lm.model, batch).item() == pytest.approx(plain.item(), rel=1e-6)


def test_padding_counts_for_nothing(data):
    lm = language_model()
    tokens = TokenWeights(PromptFormat(lm.tokenizer), None, UNIFORM, lm.pad_id)
    both = tokens.document(data.prepared, [0, 1])
    parts = [tokens.document(data.prepared, [row]) for row in (0, 1)]
    counts = [float(one.weights.sum()) for one in parts]
    wanted = sum(count * weighted_loss(lm.model, one).item() for count, one in zip(counts, parts, strict=True))
    assert both.ids.shape == (2, max(one.ids.shape[1] for one in parts))
    assert weighted_loss(lm.model, both).item() == pytest.approx(wanted / sum(counts), rel=1e-5)


def test_salient_weights_are_one_on_the_tokens_of_chosen_words_only(data, monkeypatch):
    monkeypatch.setattr("mbc_core.evaluation.online_tuning.SPAN_BUDGET", 10)
    lm = language_model()
    form = PromptFormat(lm.tokenizer)
    ids, weights = TokenWeights(form, lexicon(), SALIENT, lm.pad_id).passage(data.prepared, 0)
    text = data.prepared.table["text"][0].as_py()
    assert text.startswith("The town of Avalon00 was founded by Founder00 in the year 1500.")
    shown = "".join(char if weight else "·" for char, weight in zip(text, weights, strict=True))  # bytes are tokens
    assert len(ids) == len(text)
    # ten plain codes of 16 bits are 160 bits: at 8 bits a byte, two of these names and what still fits
    words = [one for one in shown.replace("·", " ").split() if one]
    assert set(words) <= set(text.replace(".", "").split()) and 0 < len(words) < 8
    assert "Avalon00" in words or "Founder00" in words or "Port00" in words
    assert not {"the", "of", "was", "every"} & set(words)


def test_a_long_passage_is_cut_and_what_starts_a_sequence_weighs_nothing(data):
    lm = replace(language_model(), tokenizer=tokenizer("<s>"))
    form = PromptFormat(lm.tokenizer)
    ids, weights = TokenWeights(form, None, replace(UNIFORM, max_tokens=5), lm.pad_id).passage(data.prepared, 0)
    assert ids == [*form.start, *[form.tokenizer.convert_tokens_to_ids(one) for one in ("T", "h", "e", "Ġ")]]
    assert weights == [0.0, 1.0, 1.0, 1.0, 1.0]


def test_words_that_are_not_the_texts_are_refused(data):
    words = data.prepared.table["words"].to_pylist()
    words[0] = ["other", *words[0][1:]]
    table = data.prepared.table.set_column(3, "words", [words])
    lm = language_model()
    tokens = TokenWeights(PromptFormat(lm.tokenizer), lexicon(), SALIENT, lm.pad_id)
    with pytest.raises(UsageError, match=r"doc-00.*mbc train prepare"):
        tokens.passage(replace(data.prepared, table=table), 0)
    with pytest.raises(UsageError, match="need a lexicon"):
        TokenWeights(PromptFormat(lm.tokenizer), None, SALIENT, lm.pad_id).passage(data.prepared, 0)


def test_steps_are_those_of_plain_adamw_over_the_documents_in_order(data):
    method = started(data)
    method.adapt([2, 0])
    method.adapt([1])
    base = language_model()
    reference = copy.deepcopy(base.model)
    parameters = [one.requires_grad_() for one in reference.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=UNIFORM.lr, weight_decay=0.0)
    for row in (2, 0, 1):
        text = data.prepared.table["text"][row].as_py()
        ids = base.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        optimizer.zero_grad()
        reference(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for name, one in reference.named_parameters():
        torch.testing.assert_close(weights_of(method)[name], one.detach(), rtol=1e-4, atol=1e-6)


def test_the_order_of_documents_matters_and_its_chunks_do_not(data):
    found = {}
    for name, chunks in (("once", [[0, 1, 2]]), ("apart", [[0], [1, 2]]), ("turned", [[2, 1, 0]])):
        method = started(data)
        for chunk in chunks:
            method.adapt(chunk)
        found[name] = weights_of(method)
    assert all(torch.equal(found["once"][name], found["apart"][name]) for name in found["once"])
    assert any(not torch.equal(found["once"][name], found["turned"][name]) for name in found["once"])


def test_the_base_is_left_alone_and_starting_again_forgets(data, adapter):
    base = language_model()
    before = {name: one.clone() for name, one in base.model.state_dict().items()}
    method = started(data, adapter=adapter, base=base)
    fresh = weights_of(method)
    method.adapt(range(4))
    assert any(not torch.equal(fresh[name], one) for name, one in weights_of(method).items())
    first = method.answer([0, 1, 2])
    assert method.size().bank == sum(4 * one.numel() for one in base.model.parameters())
    method.start(data)
    assert all(torch.equal(fresh[name], one) for name, one in weights_of(method).items())
    method.adapt(range(4))
    assert method.answer([0, 1, 2]) == first
    method.close()
    after = base.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(one.requires_grad for one in base.model.parameters())
    with pytest.raises(UsageError, match="not started"):
        method.answer([0])


def test_it_starts_from_the_model_that_the_adapter_makes(adapter):
    base = language_model()
    ids = torch.arange(40)[None]
    plain = base.model(input_ids=ids).logits
    whole = merged(base, adapter)(input_ids=ids).logits
    assert torch.equal(base.model(input_ids=ids).logits, plain)
    from mbc_core.evaluation.answers import adapted

    with adapted(base, adapter) as model:
        wanted = model.model(input_ids=ids).logits
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-4)
    assert (whole - plain).abs().max() > 0.01


def test_tuning_lowers_the_surprise_of_the_document_and_a_document_without_spans_teaches_nothing(data, monkeypatch):
    method = started(data, replace(UNIFORM, steps=4))
    batch = method._weights.document(data.prepared, [0])
    before = weighted_loss(method._ready().model, batch).item()
    method.adapt([0])
    assert weighted_loss(method._ready().model, batch).item() < before - 0.05
    monkeypatch.setattr("mbc_core.evaluation.online_tuning.SPAN_BUDGET", 0)
    idle = started(data, SALIENT)
    fresh = weights_of(idle)
    idle.adapt(range(4))
    assert all(torch.equal(fresh[name], one) for name, one in weights_of(idle).items())


def test_salient_and_uniform_learn_different_things(data):
    found = []
    for run in (UNIFORM, SALIENT):
        method = started(data, run)
        method.adapt([0, 1])
        found.append(weights_of(method))
    assert any(not torch.equal(found[0][name], one) for name, one in found[1].items())


def test_the_identity_names_everything_that_answers_depend_on(adapter):
    base = language_model()
    runs = [UNIFORM, SALIENT, replace(UNIFORM, lr=2e-3), replace(UNIFORM, steps=2), replace(UNIFORM, max_tokens=9)]
    made = [OnlineTuning(base, None, run, lexicon=lexicon()) for run in runs]
    made += [OnlineTuning(base, adapter, UNIFORM), OnlineTuning(language_model(seed=1), None, UNIFORM)]
    assert len({one.identity for one in made}) == len(made)
    assert OnlineTuning(base, None, UNIFORM).identity == made[0].identity
    assert np.all([len(one.identity) == 64 for one in made])
