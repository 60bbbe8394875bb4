"""`python -m lora merge` loses nothing: a base that is not whole is refused as for loading, and at the end every tensor of the
adapter has come into a weight that was written. Each way to lose one, built in on purpose, is told."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora.merge_folder
import model.hub
from lora.__main__ import main
from lora.base_weights import BaseWeights
from lora.config import AdaloraConfig, AdapterError, DoraConfig, Ia3Config, LoraConfig
from lora.inject import add_adapters
from lora.layer import AdaptedLayer
from lora.lora import EmbeddingLora, FusedLora
from lora.merge_folder import merge_to_folder
from lora.merged_weights import Coverage, MergedWeights
from lora.peft_io import open_network, save
from lora.vocabulary import same_change
from model.folders import HubError
from tests.conftest import randomized, tiny_config
from tests.oracle.lora.test_peft_io import inputs, peft_folder, shake
from tests.oracle.model.test_network import CLASSES

UNTIED = {"tie_embeddings": False}
KINDS = {  # name: (family, changes, config)
    "lora, biases": ("gpt2", {}, LoraConfig(r=2, targets="attention", bias="all")),
    "lora, whole": ("llama", UNTIED, LoraConfig(r=2, targets="query", train_whole=("^head$", r"0\.mlp\.up"))),
    "lora, embeddings": ("llama", UNTIED, LoraConfig(r=2, targets="embedding|^head$")),
    "dora, adapted biases": ("bert", {}, DoraConfig(r=2, targets="attention", bias="adapted")),
    "adalora": ("roformer", {}, AdaloraConfig(initial_r=4, r=2, targets="query|key")),
    "ia3": ("gpt2", {}, Ia3Config()),
    "two stacks": ("t5", {}, LoraConfig(r=2, targets="attention")),
}


def folders(name: str, root) -> tuple:
    family, changes, config = KINDS[name]
    model.hub.save(randomized(tiny_config(family, **changes)), root / "base")
    network = add_adapters(model.hub.load(root / "base"), config).eval()
    shake(network)
    save(network, root / "adapter")
    return root / "base", root / "adapter", root / "out"


@pytest.mark.parametrize("name", KINDS)
def test_all_comes_into_the_weights(name, tmp_path, monkeypatch):
    """The account closes, and holds every tensor of the file once; what is written is what the adapter says beside its base."""
    closed = []
    close = Coverage.close
    monkeypatch.setattr(Coverage, "close", lambda self: (closed.append(self), close(self)))
    base, adapter, out = folders(name, tmp_path)
    merge_to_folder(base, adapter, out)
    (account,) = closed
    assert set(account.module_of) == set(load_file(adapter / "adapter_model.safetensors")) and not account.unwritten
    network, batch = open_network(adapter, base=base), inputs(model.hub.read_config(base))
    assert torch.allclose(model.hub.load(out)(**batch).logits, network(**batch).logits, rtol=0, atol=1e-9)


def without(call, fits):
    """A function that loses those of its results that fit."""
    return lambda *given, **named: [each for each in call(*given, **named) if not fits(each)]


QKV, UP = "attention.project.qkv", "body.blocks.0.mlp.up.weight"
LOST = {  # name: (adapter, owner, attribute, how it is broken, what is said)
    "a part": (
        "lora, biases",
        AdaptedLayer,
        "active_parts",
        lambda call: lambda self: [],
        "not used in any weight: base_model",
    ),
    "a tensor of the base": (
        "lora, biases",
        BaseWeights,
        "tensors",
        lambda call: without(call, lambda each: each[2] is not None and each[2].endswith(f"1.{QKV}.weight")),
        f"not written: body.blocks.1.{QKV}.weight",
    ),
    "a trained bias": (
        "lora, biases",
        MergedWeights,
        "is_changed",
        lambda call: lambda self, ours: call(self, ours) and ours not in self.trained,
        "not used in any weight: .*bias",
    ),
    "a copy of a module": (
        "lora, whole",
        MergedWeights,
        "is_changed",
        lambda call: lambda self, ours: call(self, ours) and ours != UP,
        "not used in any weight: .*up_proj.weight",
    ),
    "an item of the plan": (
        "two stacks",
        lora.merge_folder,
        "plan_files",
        lambda call: lambda *given, **named: {name: items[1:] for name, items in call(*given, **named).items()},
        "not used in any weight: .*lora_A.weight, .*lora_B.weight",
    ),
    "a weight that is written twice": (
        "lora, biases",
        Coverage,
        "uses",
        lambda call: lambda self, weight, parameters: call(self, weight, [p for each in self.all for p in each]),
        "would change both",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_what_would_be_lost_is_told(name, tmp_path, monkeypatch):
    kind, owner, attribute, broken, message = LOST[name]
    given = folders(kind, tmp_path)
    monkeypatch.setattr(Coverage, "all", [], raising=False)
    if name == "a weight that is written twice":
        made = Coverage.__init__
        monkeypatch.setattr(Coverage, "__init__", lambda self, base, read, places: (
            made(self, base, read, places), setattr(self, "all", [[entry.parameter] for entry in places.values()])
        )[0])  # fmt: skip
    monkeypatch.setattr(owner, attribute, broken(getattr(owner, attribute)))
    with pytest.raises(AdapterError, match=message):
        merge_to_folder(*given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# ---- a base that is not whole

Q = "model.layers.1.self_attn.q_proj"


def packed(tensors: dict) -> None:
    """As AutoGPTQ wrote folders before config.json had a quantization_config."""
    for name in [name for name in tensors if "proj" in name]:
        value = tensors.pop(name)
        tensors[name.replace("weight", "qweight")] = torch.zeros(value.size(1) // 8, value.size(0), dtype=torch.int32)


def lost(name: str):
    return lambda tensors: tensors.pop(name)


BASES = {  # name: (what happens to the base, what is said)
    "an adapted weight is missing": (lost(f"{Q}.weight"), f"lacks {Q}.weight"),
    "another one is missing": (lost("model.norm.weight"), "lacks model.norm.weight"),
    "the head is missing": (lost("lm_head.weight"), "lacks lm_head.weight"),
    "GPTQ": (packed, r"holds 'model\.layers\.\d\..*\.qweight', which llama with this config does not have"),
    "a tensor of another family": (lambda t: t.update(extra=torch.ones(2)), "holds 'extra', which llama with this config"),
    "misshapen": (lambda t: t.update({f"{Q}.weight": torch.ones(20, 24)}), rf"{Q}.weight' has shape \(20, 24\)"),
    "codes": (
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].char()}),
        f"{Q}.weight' is of int8: neither floating-point nor a complete quantized weight",
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    root = tmp_path_factory.mktemp("account")
    model.hub.save(randomized(tiny_config("llama", **UNTIED), dtype=torch.float32), root / "base")
    theirs = CLASSES["decoder"].from_pretrained(root / "base")
    peft_folder(theirs, peft.LoraConfig(r=2, target_modules=["q_proj"]), root / "adapter")
    return root


@pytest.mark.parametrize("name", BASES)
def test_a_base_that_is_not_whole(name, llama, tmp_path, capsys):
    change, message = BASES[name]
    tensors = load_file(llama / "base" / "model.safetensors")
    change(tensors)
    (tmp_path / "base").mkdir()
    save_file({each: value.contiguous() for each, value in tensors.items()}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text((llama / "base" / "config.json").read_text())
    for act in (model.hub.load, lambda folder: merge_to_folder(folder, llama / "adapter", tmp_path / "out")):
        with pytest.raises(HubError, match=message):
            act(tmp_path / "base")
    assert main(["merge", str(tmp_path / "base"), str(llama / "adapter"), "--out", str(tmp_path / "out")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_tied_matrix_in_two_versions(tmp_path):
    """BERT's folder has a place for one; the copy differs."""
    base, adapter, out = folders("dora, adapted biases", tmp_path)
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["bert.embeddings.word_embeddings.weight"]
    save_file(tensors | {"cls.predictions.decoder.weight": embedding + 1}, base / "model.safetensors")
    with pytest.raises(HubError, match=r"decoder\.weight' differs from '.*word_embeddings\.weight', though config\.json says"):
        merge_to_folder(base, adapter, out, any_base=True)


def test_some_weights_of_a_module_that_was_trained_whole(tmp_path):
    """PEFT trains BERT's last matrix and its bias; the rest of our head is the base's own. The embedding was trained as the
    same matrix, so that one is written for both."""
    model.hub.save(randomized(tiny_config("bert")), tmp_path / "base")
    theirs = CLASSES["encoder"].from_pretrained(tmp_path / "base", dtype=torch.float64)
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["word_embeddings", "decoder"])
    peft_folder(theirs, config, tmp_path / "adapter")
    given = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    with pytest.raises(AdapterError, match=r"body\.embedding was adapted, and its matrix is also that of the head"):
        merge_to_folder(*given)
    tensors = load_file(path)
    embedding = tensors["base_model.model.bert.embeddings.word_embeddings.weight"]
    save_file(tensors | {"base_model.model.cls.predictions.decoder.weight": embedding.clone()}, path)
    merge_to_folder(*given)
    network, batch = open_network(tmp_path / "adapter", base=tmp_path / "base"), inputs(tiny_config("bert"))
    assert torch.allclose(model.hub.load(tmp_path / "out")(**batch).logits, network(**batch).logits, rtol=0, atol=1e-12)
    assert not torch.allclose(model.hub.load(tmp_path / "base")(**batch).logits, network(**batch).logits, atol=1e-2)


@pytest.mark.parametrize(("alpha", "alike"), [(4.0, True), (8.0, False)])
def test_ends_with_the_same_factors_and_another_scale_are_two(alpha, alike):
    embedding = EmbeddingLora(nn.Embedding(7, 4), LoraConfig(), 2, 4.0)
    head = FusedLora(nn.Linear(4, 7), LoraConfig(), 2, alpha)
    for ours, theirs in ((embedding.A, head.B), (embedding.B, head.A)):
        ours.data.normal_(generator=torch.Generator().manual_seed(0))
        theirs.data.copy_(ours.T)
    assert same_change(embedding, head) == alike
