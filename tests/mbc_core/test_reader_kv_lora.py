"""KV-LoRA changes keys and values of every layer and nothing else, and comes back from disk as it went."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mbc_core.errors import DamagedFile, ModelError
from mbc_core.reader.kv_lora import (
    KVLoraConfig,
    adapter_config,
    adapter_state,
    add_kv_lora,
    disabled,
    load_adapter,
    resolve_targets,
    save_adapter,
    set_adapter_state,
    trainable,
)
from tests.mbc_core.tiny_reader import gpt2, llama

pytestmark = pytest.mark.usefixtures("single_thread")

CONFIG = KVLoraConfig(r=4, alpha=8, dropout=0.0)
IDS = torch.tensor([[5, 9, 200, 31, 77, 12]])
BASE = "ab" * 32


def trained(model, steps: int = 3):
    """The model with a KV-LoRA that has learned something."""
    adapted = add_kv_lora(model, CONFIG)
    optimizer = torch.optim.AdamW(trainable(adapted).values(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_exactly_the_key_and_value_projections_of_every_layer_are_adapted():
    adapted = add_kv_lora(llama(), CONFIG)
    expected = {
        f"base_model.model.model.layers.{layer}.self_attn.{part}_proj.lora_{matrix}.default.weight"
        for layer in range(3)
        for part in "kv"
        for matrix in "AB"
    }
    assert set(trainable(adapted)) == expected
    assert {name for name, one in adapted.named_parameters() if one.requires_grad} == expected
    # r · (d_in + d_out) a projection: 4 · (32 + 16) twice a layer
    assert sum(one.numel() for one in trainable(adapted).values()) == 3 * 2 * 4 * (32 + 16)


def test_fused_projections_are_found_on_gpt2_and_not_its_cross_attention_or_mlp():
    assert resolve_targets(gpt2()).names == tuple(f"transformer.h.{layer}.attn.c_attn" for layer in range(3))
    assert resolve_targets(gpt2()).fused


def test_only_the_last_layers_when_asked():
    names = resolve_targets(llama(), last_n=2).names
    assert sorted(names) == [f"model.layers.{layer}.self_attn.{part}_proj" for layer in (1, 2) for part in "kv"]
    assert {name.split(".")[4] for name in trainable(add_kv_lora(llama(), KVLoraConfig(r=2, last_n=2)))} == {"1", "2"}


@pytest.mark.parametrize("names", [("k_proj", "v_porj"), ("v_porj", "k_proj"), ("value",)])
def test_a_misspelt_projection_is_refused_before_anything_is_adapted(names):
    model = llama()
    before = [name for name, _ in model.named_modules()]
    wrong = next(one for one in names if one != "k_proj")
    with pytest.raises(ModelError, match=rf"`{wrong}` does not name one projection in each layer"):
        add_kv_lora(model, CONFIG, names=names)
    assert [name for name, _ in model.named_modules()] == before


def test_a_model_without_known_projections_is_refused_by_name():
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.kproj, layer.self_attn.k_proj = layer.self_attn.k_proj, None
    with pytest.raises(ModelError, match=r"the key and value projections cannot be found.*q_proj"):
        resolve_targets(model)


def test_a_projection_missing_in_one_layer_is_counted():
    model = llama()
    model.model.layers[1].self_attn.v_proj = None
    with pytest.raises(ModelError, match=r"`v_proj` does not name one projection in each layer: '2 of 3 layers'"):
        resolve_targets(model)


def test_peft_adapting_something_else_is_noticed(monkeypatch):
    import peft

    def careless(model, config):
        config.target_modules = ["k_proj", "v_proj", "q_proj"]
        return real(model, config)

    real = peft.get_peft_model
    monkeypatch.setattr(peft, "get_peft_model", careless)
    with pytest.raises(ModelError, match=r"peft did not adapt exactly the key and value projections.*q_proj"):
        add_kv_lora(llama(), CONFIG)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_nothing_changes_before_training_and_the_base_stays_as_it_was(make):
    plain = logits(make())
    fresh = add_kv_lora(make(), CONFIG).eval()
    assert torch.equal(logits(fresh), plain)
    adapted = trained(make())
    assert not torch.allclose(logits(adapted), plain, atol=1e-3)
    with disabled(adapted):
        assert torch.equal(logits(adapted), plain)
    assert not torch.allclose(logits(adapted), plain, atol=1e-3)


def test_disabling_a_model_without_adapter_changes_nothing():
    model = llama()
    with disabled(model) as same:
        assert same is model


def test_on_a_fused_projection_queries_stay_bit_equal_while_keys_and_values_change():
    base, adapted = gpt2(), trained(gpt2(), steps=5)
    hidden = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    for layer in range(3):
        plain = base.transformer.h[layer].attn.c_attn(hidden)
        changed = adapted.get_base_model().transformer.h[layer].attn.c_attn(hidden)
        query, key, value = changed.split(32, dim=-1)
        assert torch.equal(query, plain[..., :32])
        assert (key - plain[..., 32:64]).abs().max() > 1e-3
        assert (value - plain[..., 64:]).abs().max() > 1e-3


def test_seeds_make_the_first_weights_and_leave_the_callers_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one, same, other = (adapter_state(add_kv_lora(llama(), CONFIG, seed=seed)) for seed in (7, 7, 8))
    torch.manual_seed(3)
    add_kv_lora(llama_without_seed(), CONFIG, seed=7)
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def llama_without_seed():
    state = torch.get_rng_state()
    model = llama()
    torch.set_rng_state(state)
    return model


@pytest.mark.parametrize("make", [llama, gpt2])
def test_saved_and_loaded_the_logits_are_the_same(make, tmp_path):
    adapted = trained(make())
    half = {name: value.half().float() for name, value in adapter_state(adapted).items()}
    set_adapter_state(adapted, half, "here")  # what float16 on disk can hold
    save_adapter(adapted, tmp_path, CONFIG, base_digest=BASE, base_name="tiny")
    loaded, config = load_adapter(make(), tmp_path, base_digest=BASE)
    assert torch.equal(logits(loaded.eval()), logits(adapted))
    assert config == CONFIG == adapter_config(loaded)
    assert all(one.dtype == torch.float16 for one in load_file(tmp_path / "adapter_model.safetensors").values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_plain_peft_loads_the_folder_too(tmp_path):
    from peft import PeftModel

    adapted = trained(llama())
    save_adapter(adapted, tmp_path, CONFIG, base_digest=BASE, base_name="tiny")
    loaded, _ = load_adapter(llama(), tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), logits(loaded.eval()))


def test_only_the_last_layers_come_back_from_disk_as_well(tmp_path):
    config = KVLoraConfig(r=2, alpha=4, dropout=0.0, last_n=1)
    save_adapter(add_kv_lora(llama(), config), tmp_path, config, base_digest=BASE, base_name="tiny")
    loaded, found = load_adapter(llama(), tmp_path)
    assert found == config == adapter_config(loaded)


@pytest.fixture
def saved(tmp_path):
    save_adapter(trained(llama()), tmp_path, CONFIG, base_digest=BASE, base_name="tiny")
    return tmp_path


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    with safe_open(folder / "adapter_model.safetensors", "pt") as stored:
        metadata = stored.metadata()
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata)


def test_missing_weights_raise(saved):
    rewrite(saved, lambda tensors: tensors.pop(sorted(tensors)[0]))
    with pytest.raises(DamagedFile, match=r"weights do not match the model's projections.*missing or unexpected"):
        load_adapter(llama(), saved)


def test_unexpected_weights_raise(saved):
    rewrite(saved, lambda tensors: tensors.update({"base_model.model.model.norm.lora_A.weight": torch.zeros(2, 2)}))
    with pytest.raises(DamagedFile, match=r"1 names, first base_model.model.model.norm"):
        load_adapter(llama(), saved)


def test_weights_of_another_shape_raise(saved):
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    rewrite(saved, lambda tensors: tensors.update({name: torch.zeros(4, 31)}))
    with pytest.raises(DamagedFile, match=r"k_proj.lora_A.weight has another shape: \(4, 31\).*\(4, 32\)"):
        load_adapter(llama(), saved)


def test_an_adapter_of_another_base_is_refused(saved):
    with pytest.raises(ModelError, match=r"trained for another base model: 'abababababab'.*cdcdcdcdcdcd"):
        load_adapter(llama(), saved, base_digest="cd" * 32)


def test_an_adapter_of_another_architecture_is_refused(saved):
    with pytest.raises(DamagedFile, match=r"weights do not match"):
        load_adapter(gpt2(), saved)


@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_a_damaged_file_is_named(saved, damage):
    path = saved / "adapter_model.safetensors"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:50] if damage == "cut" else b"")
    with pytest.raises(DamagedFile, match=r"the adapter cannot be read: .*adapter_model.safetensors"):
        load_adapter(llama(), saved)


def test_weights_that_did_not_come_from_here_are_refused(saved):
    path = saved / "adapter_model.safetensors"
    save_file(load_file(path), path)  # without our metadata
    with pytest.raises(DamagedFile, match=r"the adapter cannot be read.*KeyError"):
        load_adapter(llama(), saved)


def test_another_format_version_is_named(saved, monkeypatch):
    monkeypatch.setattr("mbc_core.reader.kv_lora.FORMAT_VERSION", 9)
    with pytest.raises(DamagedFile, match=r"another format version: 1. Likely cause: this release reads version 9"):
        load_adapter(llama(), saved)


def test_plain_lora_on_a_fused_projection_is_refused_on_loading(tmp_path):
    save_adapter(trained(gpt2()), tmp_path, CONFIG, base_digest=BASE, base_name="tiny")
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"
    rewrite(tmp_path, lambda tensors: tensors[name][:32].fill_(0.5))
    with pytest.raises(DamagedFile, match=r"changes queries, not only keys and values.*h.1.attn.c_attn"):
        load_adapter(gpt2(), tmp_path)


def test_a_model_is_not_adapted_twice():
    with pytest.raises(ModelError, match=r"has an adapter already: 'PeftModelForCausalLM'"):
        add_kv_lora(add_kv_lora(llama(), CONFIG), CONFIG)


def test_writing_again_replaces_whole_files(saved):
    other = saved.parent / "other"
    shutil.copytree(saved, other)
    save_adapter(trained(llama(), steps=1), other, CONFIG, base_digest=BASE, base_name="tiny")
    assert sorted(one.name for one in other.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    load_adapter(llama(), other)
