"""Online adaptation is encode, quantize, append; and a model comes back from its folder as it was."""

from __future__ import annotations

import json

import pytest
import torch

from mbc_core.errors import DamagedFile, IncompatibleBank, ModelError, UsageError
from mbc_core.paper.files import load_paper_model, paper_state, save_paper_model
from mbc_core.paper.online import CodeBank, adapt_online, codebook_digest
from tests.mbc_core.paper_parts import PASSAGES, address_model, batch, bert, padded, paper_model, t5
from tests.mbc_core.tiny_reader import language_model


def test_adaptation_changes_no_byte_of_any_weight_and_needs_no_gradient():
    model = paper_model().train()  # even a model left in training mode
    bank = CodeBank.of(model)
    before = model.digest()
    assert adapt_online(model, bank, [1, 2, 3, 4], *padded(PASSAGES)) == 4
    assert model.digest() == before
    assert [name for name, one in model.named_parameters() if one.grad is not None] == []
    assert not bank.histogram().vectors.requires_grad
    assert model.training
    model(batch(model))
    assert model.digest() != before, "the digest must see what training changes (usage, reset words)"


@pytest.mark.parametrize("slot_marks", [False, True])
@torch.no_grad()
def test_appending_one_by_one_is_appending_at_once_and_the_histogram_is_the_bank(slot_marks):
    model = paper_model(slot_marks=slot_marks).eval()
    ids, mask = padded(PASSAGES)
    at_once, one_by_one = CodeBank.of(model), CodeBank.of(model)
    adapt_online(model, at_once, range(4), ids, mask)
    for key in range(4):
        adapt_online(model, one_by_one, [key], ids[key : key + 1], mask[key : key + 1])
    assert torch.equal(at_once.codes(), one_by_one.codes())
    assert torch.equal(at_once.codes(), model.encode_documents(ids, mask))
    shown = batch(model)
    queries = model.queries(shown.question_ids, shown.question_mask)
    flat = model.aggregator(queries, at_once.flat())
    assert float((model.aggregator(queries, at_once.histogram()) - flat).norm() / flat.norm()) < 1e-5
    assert torch.equal(model.histogram(at_once.codes()).counts, at_once.histogram().counts)


def test_a_document_counts_once_and_can_be_replaced_and_taken_out():
    """The reference stored a document once for each of its questions."""
    bank = CodeBank(torch.randn(16, 3), tokens=2)
    stamp = bank.codebook
    assert bank.add([7, 8, 7], torch.tensor([[1, 2], [3, 3], [4, 5]]), stamp) == 2
    assert bank.codes().tolist() == [[4, 5], [3, 3]]
    assert bank.add([8], torch.tensor([[0, 0]]), stamp) == 0
    assert bank.counts[:6].tolist() == [2, 0, 0, 0, 1, 1]
    assert bank.remove([7, 99]) == 1
    assert bank.counts.tolist() == [2] + 15 * [0]
    assert len(bank) == 1
    assert bank.remove([8]) == 1
    assert int(bank.counts.sum()) == 0
    assert bank.codes().shape == (0, 2)


@pytest.mark.parametrize(("codewords", "tokens", "size"), [(512, 12, 14), (512, 24, 27), (128, 12, 11), (2048, 24, 33)])
def test_codes_are_packed(codewords, tokens, size):
    bank = CodeBank(torch.randn(codewords, 2), tokens)
    codes = torch.randint(0, codewords, (5, tokens), generator=torch.Generator().manual_seed(0))
    codes[0, 0] = codewords - 1
    bank.add(range(5), codes, bank.codebook)
    assert bank.nbytes == 5 * size
    assert torch.equal(bank.codes(), codes)


def test_codes_of_another_codebook_or_shape_are_refused():
    model = paper_model().eval()
    bank = CodeBank.of(model)
    adapt_online(model, bank, range(4), *padded(PASSAGES))
    model.quantizer.codebook.data[0, 0] += 1e-3
    with pytest.raises(IncompatibleBank, match="another codebook"):
        adapt_online(model, bank, [9], *padded(PASSAGES[:1]))
    assert len(bank) == 4
    with pytest.raises(UsageError, match="another shape"):
        bank.add([1], torch.zeros(2, 4).long(), bank.codebook)
    with pytest.raises(UsageError, match="beyond the codebook"):
        bank.add([1], torch.full((1, 4), 16), bank.codebook)
    assert len(bank) == 4
    mac = paper_model(quantize=False)
    with pytest.raises(UsageError, match="vectors, not codes"):
        adapt_online(mac, CodeBank.of(mac), [1], *padded(PASSAGES[:1]))


CASES = {
    "default": {}, "no LoRA": {"kv_lora": False}, "trained encoder": {"train_encoder": True},
    "T5": {"amortizer": "t5", "train_encoder": True}, "EMA": {"codebook_by": "ema"}, "MAC": {"quantize": False},
    "standardized": {"standardize": True},
    "one network a slot": {"prefix_shared": False}, "last layer": {"lora_last_n": 1},
}  # fmt: skip


@pytest.mark.parametrize("changes", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_saved_model_is_the_same_model(tmp_path, changes, kind):
    model = paper_model(kind, **changes).train()
    optimizer = torch.optim.Adam(model.learned_parameters().values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch(model)).total.backward()
        optimizer.step()
    save_paper_model(model, tmp_path)
    make = t5 if changes.get("amortizer") == "t5" else bert
    loaded = load_paper_model(tmp_path, language_model(kind), encoder=make(0), question_encoder=make(1))
    assert loaded.config == model.config
    assert not loaded.training
    model.eval()
    with torch.no_grad():
        found, wanted = loaded(batch(loaded)), model(batch(model))
    assert float(found.total) == float(wanted.total)
    assert loaded.digest() == model.digest()


@torch.no_grad()
def test_half_precision_leaves_the_codebook_alone(tmp_path):
    model = paper_model().eval()
    save_paper_model(model, tmp_path / "half", dtype=torch.float16)
    save_paper_model(model, tmp_path / "whole")
    sizes = [(tmp_path / name / "paper.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.65 * sizes[1]
    loaded = load_paper_model(tmp_path / "half", language_model(), encoder=bert(0), question_encoder=bert(1))
    assert torch.equal(loaded.quantizer.codebook, model.quantizer.codebook)
    assert float(loaded(batch(loaded)).answer) == pytest.approx(float(model(batch(model)).answer), rel=1e-2)


@torch.no_grad()
def test_an_address_model_keeps_its_codebook(tmp_path):
    model = address_model().eval()
    save_paper_model(model, tmp_path)
    loaded = load_paper_model(tmp_path, language_model())
    assert codebook_digest(loaded.code_vectors()) == codebook_digest(model.code_vectors())
    assert float(loaded(batch(loaded)).total) == float(model(batch(model)).total)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    model = paper_model()
    save_paper_model(model, tmp_path)
    parts = {"encoder": bert(0), "question_encoder": bert(1)}
    with pytest.raises(ModelError, match="another language model"):
        load_paper_model(tmp_path, language_model(seed=5), **parts)
    with pytest.raises(ModelError, match="another question encoder"):
        load_paper_model(tmp_path, language_model(), encoder=bert(0), question_encoder=bert(2))
    with pytest.raises(UsageError, match="lacks a part"):
        load_paper_model(tmp_path, language_model())
    with pytest.raises(DamagedFile, match="FileNotFoundError"):
        load_paper_model(tmp_path / "nothing", language_model())


def test_a_changed_folder_is_refused(tmp_path):
    save_paper_model(paper_model(), tmp_path)
    parts = {"encoder": bert(0), "question_encoder": bert(1)}
    weights, told = tmp_path / "paper.safetensors", tmp_path / "paper.json"
    whole, text = weights.read_bytes(), told.read_text("utf-8")
    weights.write_bytes(whole[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(DamagedFile, match="does not match the digest"):
        load_paper_model(tmp_path, language_model(), **parts)
    weights.write_bytes(whole)
    for change, message in (({"format": 9}, "format 9"), ({"config": {"tokenz": 3}}, "unknown fields.*tokenz")):
        told.write_text(json.dumps(json.loads(text) | change), "utf-8")
        with pytest.raises(DamagedFile, match=message):
            load_paper_model(tmp_path, language_model(), **parts)
    wider = json.loads(text)
    wider["config"]["prefix_hidden"] = 25
    told.write_text(json.dumps(wider), "utf-8")
    with pytest.raises(DamagedFile, match=r"do not match its configuration"):
        load_paper_model(tmp_path, language_model(), **parts)


def test_the_frozen_parts_are_not_stored():
    names = set(paper_state(paper_model()))
    assert not [name for name in names if ".encoder." in name or name.startswith("reader.")]
    assert {"quantizer.codebook", "quantizer.usage", "quantizer.sum", "quantizer.forwards"} <= names
    assert len([name for name in names if name.startswith("kv_lora/")]) == 12
