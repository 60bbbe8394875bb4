"""Folders in the Hugging Face layout, both ways, and what is refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import model.hub
from model.hub import HubError
from tests.conftest import randomized, tiny_config

FAMILIES = ["gpt2", "llama"]


def same(one, other) -> bool:
    names = dict(other.named_parameters())
    return all(torch.equal(value, names[name]) for name, value in one.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tied, tmp_path):
    network = randomized(tiny_config(family, tie_embeddings=tied), dtype=torch.float32)
    model.hub.save(network, tmp_path)
    loaded = model.hub.load(tmp_path)
    assert same(network, loaded) and loaded.config == network.config
    assert (loaded.head.weight is loaded.body.embedding.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)  # saved once


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_writes(family, tmp_path):
    network = randomized(tiny_config(family), dtype=torch.float32)
    model.hub.save(network, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for folder in ("whole", "sharded"):
        loaded = model.hub.load(tmp_path / folder)
        assert same(network, loaded) and loaded.config.replace(pad_id=None) == network.config


def test_reads_a_body_saved_alone(tmp_path):
    """The published GPT-2 files: no prefix, and causal masks as buffers."""
    network = randomized(tiny_config("gpt2"), dtype=torch.float32)
    model.hub.save(network, tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert same(network, model.hub.load(tmp_path))


def test_dtype_on_loading(tmp_path):
    model.hub.save(randomized(tiny_config("llama"), dtype=torch.bfloat16), tmp_path)
    assert model.hub.load(tmp_path).head.weight.dtype == torch.bfloat16
    assert model.hub.load(tmp_path, dtype=torch.float64).head.weight.dtype == torch.float64


@pytest.fixture
def folder(tmp_path):
    model.hub.save(randomized(tiny_config("llama"), dtype=torch.float32), tmp_path)
    return tmp_path


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"lacks 1 weights: {NAME}"),
        (lambda t: t.update({"model.layers.7.extra": torch.ones(1)}), "model.layers.7.extra"),
        (lambda t: t.update({NAME: torch.ones(3, 4)}), rf"{NAME}.*\(3, 4\).*\(40, 24\)"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_wrong_weights_are_named(folder, change, message):
    edit(folder, change)
    with pytest.raises(HubError, match=message):
        model.hub.load(folder)


def test_refused_folders(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(HubError, match=r"'mamba' is not supported; supported: gpt2, llama"):
        model.hub.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "yarn"}}))
    with pytest.raises(HubError, match="rope_type='yarn'"):
        model.hub.load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(HubError, match="pickle"):
        model.hub.load(folder)
    with pytest.raises(HubError, match=r"no config\.json"):
        model.hub.load(folder / "nothing")


def test_an_index_cannot_leave_its_folder(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {NAME: "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HubError, match="outside its folder"):
        model.hub.load(folder)


def test_a_cut_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(HubError, match=r"model\.safetensors cannot be read"):
        model.hub.load(folder)


def test_a_tied_head_saved_apart_must_be_the_embedding(tmp_path):
    network = randomized(tiny_config("gpt2"), dtype=torch.float32)
    model.hub.save(network, tmp_path)
    head = network.head.weight.detach().clone()
    edit(tmp_path, lambda t: t.update({"lm_head.weight": head}))
    assert same(network, model.hub.load(tmp_path))
    edit(tmp_path, lambda t: t.update({"lm_head.weight": head + 1}))
    with pytest.raises(HubError, match="differs from the embedding"):
        model.hub.load(tmp_path)


def test_a_broken_index_or_shard_is_named(folder):
    index = folder / "model.safetensors.index.json"
    for text in ("{", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(HubError, match=r"index\.json cannot be read"):
            model.hub.load(folder)
    (folder / "part.safetensors").write_bytes(b"not safetensors")
    index.write_text(json.dumps({"weight_map": {NAME: "part.safetensors"}}))
    with pytest.raises(HubError, match=r"part\.safetensors cannot be read"):
        model.hub.load(folder)
