"""Loading language models: folders, GGUF files, precision, identity, and what is said when one cannot be loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mbc_core.errors import AssetError, UsageError
from mbc_core.reader.language_model import SOURCE_FILE, LanguageModel, load_language_model, weights_digest
from tests.mbc_core.tiny_reader import llama, tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def test_a_folder_is_loaded_frozen_and_as_it_was_saved(folder):
    found = load_language_model(folder, dtype="float32")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(found.model(input_ids=ids).logits, llama()(input_ids=ids).logits)
    assert not any(one.requires_grad for one in found.model.parameters()) and not found.model.training
    assert (found.device.type, found.context, found.pad_id, found.name) == ("cpu", 1024, 256, folder.name)
    assert found.digest == weights_digest(folder)


def test_precision_is_what_was_asked_for(folder, monkeypatch):
    assert load_language_model(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    for able, chosen in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("mbc_core.encoder.passage_encoder._cpu_has_bfloat16", lambda able=able: able)
        assert load_language_model(folder, dtype="auto").model.dtype == chosen
    with pytest.raises(UsageError, match=r"unknown precision: 'int3'"):
        load_language_model(folder, dtype="int3")


def test_the_digest_tells_models_apart_and_not_folders(folder, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    llama().save_pretrained(same)
    llama(seed=1).save_pretrained(other)
    assert weights_digest(same) == weights_digest(folder) != weights_digest(other)


def test_what_is_not_a_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssetError, match=rf"the language model cannot be loaded: '{tmp_path}'"):
        load_language_model(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_file_cut_short_is_named(folder, tmp_path, file):
    broken = shutil.copytree(folder, tmp_path / "broken")
    data = (broken / file).read_bytes()
    (broken / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(AssetError, match=rf"the language model cannot be loaded: '{broken}'.*fetch the model again"):
        load_language_model(broken)


def test_a_name_that_is_no_folder_is_looked_up_and_refused_offline():
    with pytest.raises(AssetError, match=r"there is no such language model: 'nobody/nothing'.*not a folder here"):
        load_language_model("nobody/nothing")


def test_a_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(AssetError, match=r"the model file cannot be read: '.*absent.gguf'"):
        load_language_model(tmp_path, "absent.gguf", cache=tmp_path / "cache")


def test_a_damaged_gguf_file_is_named_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(AssetError, match=r"the GGUF file cannot be loaded: '.*broken.gguf'"):
        load_language_model(tmp_path, "broken.gguf", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_without_pad_or_end_token_still_has_a_filler(folder):
    found = load_language_model(folder)
    found.tokenizer.eos_token = None
    assert LanguageModel(found.model, found.tokenizer, "", "").pad_id == 0


@pytest.mark.slow
def test_a_gguf_file_becomes_dense_weights_once(assets):
    cache = assets.cache / "language-models"
    found = load_language_model(assets.smollm2.folder, assets.smollm2.file, dtype="float32", cache=cache)
    (converted,) = [one.parent for one in cache.glob(f"*/{SOURCE_FILE}")]
    assert json.loads((converted / SOURCE_FILE).read_text())["digest"] == found.digest
    assert {type(one).__name__ for one in found.model.modules() if hasattr(one, "weight")} <= {
        "Linear",
        "Embedding",
        "LlamaRMSNorm",
    }
    assert sum(one.numel() for one in found.model.parameters()) == 134_515_008
    directly = load_language_model(assets.smollm2.folder, assets.smollm2.file, dtype="bfloat16")
    assert directly.digest == found.digest and directly.name == found.name
    weights = dict(found.model.named_parameters())
    assert all(torch.equal(one.float(), weights[name]) for name, one in directly.model.named_parameters())
