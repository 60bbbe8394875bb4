"""Adapters' folders, PEFT's and ours, each opened by the other: the same outputs."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora.peft_io as peft_io
import model.hub
from lora.config import (
    AdaloraConfig,
    AdapterConfig,
    AdapterError,
    DoraConfig,
    Ia3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    PtuningConfig,
)
from lora.inject import activate, add_adapters, parts
from tests.compare import Error, relative
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import CLASSES, ROUNDING, how
from tests.oracle.wide import Wide, widen


def twin(config, folder, head_class=None) -> nn.Module:
    """transformers' model of a folder, float64, its casts to float32 undone."""
    kind = head_class or CLASSES[config.architecture]
    return widen(kind.from_pretrained(folder, dtype=torch.float64, attn_implementation=how(config)).eval())


def inputs(config) -> dict:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 61, (2, 7), generator=generator)
    second = {"decoder_input_ids": torch.randint(3, 61, (2, 5), generator=generator)}
    return {"input_ids": ids} | (second if config.architecture == "encoder-decoder" else {})


@torch.no_grad()
def shake(module: nn.Module) -> None:
    """Every trained parameter, norms and biases too: at the start most adapters do nothing. AdaLoRA's ranknum, which PEFT
    lists among them, is a count that is not saved."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and "ranknum" not in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))


def peft_folder(theirs: nn.Module, config, folder, change=lambda adapted: None):
    """A random adapter of PEFT's on `theirs`, saved."""
    with Wide():
        adapted = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    shake(adapted)
    change(adapted)
    adapted.save_pretrained(folder)
    return folder


def opened_by_peft(config, base, folder, head_class=None) -> nn.Module:
    theirs = twin(config, base, head_class)
    with Wide():  # it reads prompt vectors into float32
        return peft.PeftModel.from_pretrained(theirs, folder, autocast_adapter_dtype=False).eval()


def gap(one, other) -> Error:
    """Relative; PEFT gives logits of a prompt's positions too."""
    return relative(one, other[:, -one.size(1) :])


LORA = dict(r=4, lora_alpha=6, init_lora_weights=False)
CAUSAL = dict(task_type="CAUSAL_LM")
SEQ2SEQ = dict(task_type="SEQ_2_SEQ_LM")
ADALORA = dict(init_r=4, target_r=2, total_step=9, lora_alpha=6)
UNTIED = {"tie_embeddings": False}
CASES = {  # name: (family, changes, PEFT's config)
    "lora gpt2": ("gpt2", {}, peft.LoraConfig(**LORA, **CAUSAL, target_modules=["c_attn", "c_fc", "c_proj"])),
    "lora gpt2, embeddings": ("gpt2", {}, peft.LoraConfig(**LORA, **CAUSAL, target_modules=["wte", "wpe", "lm_head"])),
    "lora gpt2, ranks": (
        "gpt2",
        {},
        peft.LoraConfig(
            **LORA,
            target_modules=r".*\.(c_attn|c_fc)",
            use_rslora=True,
            rank_pattern={"h.1.attn.c_attn": 2, r"h\.0\.mlp.*": 3},
            alpha_pattern={"c_fc": 5},
        ),
    ),
    "lora gpt2, biases": ("gpt2", {}, peft.LoraConfig(**LORA, **CAUSAL, target_modules=["c_attn"], bias="all")),
    "lora llama": ("llama", {}, peft.LoraConfig(**LORA, **CAUSAL, target_modules="all-linear")),
    "lora llama, whole head": (
        "llama",
        UNTIED,
        peft.LoraConfig(**LORA, target_modules=["k_proj", "embed_tokens"], modules_to_save=["lm_head"]),
    ),
    "lora llama, one layer": ("llama", {}, peft.LoraConfig(**LORA, target_modules=["o_proj"], layers_to_transform=[1])),
    "lora bert": ("bert", {}, peft.LoraConfig(**LORA, target_modules=["query", "dense", "decoder"], bias="lora_only")),
    "lora bert, biases": ("bert", {}, peft.LoraConfig(**LORA, target_modules=["value", "decoder"], bias="all")),
    "lora t5": ("t5", {}, peft.LoraConfig(**LORA, **SEQ2SEQ, target_modules=["q", "v", "wi", "lm_head"])),
    "lora bart": (
        "bart",
        {},
        peft.LoraConfig(**LORA, **SEQ2SEQ, target_modules=["q_proj", "fc2"], bias="all", modules_to_save=["lm_head"]),
    ),
    "lora roformer": ("roformer", {}, peft.LoraConfig(**LORA, target_modules=["query", "key", "value"], bias="lora_only")),
    "lora roformer, biases": ("roformer", {}, peft.LoraConfig(**LORA, target_modules=["dense"], bias="all")),
    "dora gpt2": ("gpt2", {}, peft.LoraConfig(**LORA, **CAUSAL, target_modules=["c_attn", "c_fc"], use_dora=True)),
    "dora llama": ("llama", {}, peft.LoraConfig(**LORA, target_modules=["q_proj", "k_proj", "embed_tokens"], use_dora=True)),
    "dora roformer": ("roformer", {}, peft.LoraConfig(**LORA, target_modules=["query", "key"], use_dora=True)),
    "adalora gpt2": ("gpt2", {}, peft.AdaLoraConfig(**ADALORA, **CAUSAL, target_modules=["c_attn", "c_fc"])),
    "adalora llama": ("llama", {}, peft.AdaLoraConfig(**ADALORA, target_modules=["v_proj"], bias="none")),
    "adalora roformer": ("roformer", {}, peft.AdaLoraConfig(**ADALORA, target_modules=["query"])),
    "ia3 gpt2": ("gpt2", {}, peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "ia3 llama": (
        "llama",
        {},
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "ia3 t5": ("t5", {}, peft.IA3Config(**SEQ2SEQ, target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "ia3 roformer": ("roformer", {}, peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[])),
    "prompt gpt2": ("gpt2", {}, peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=5)),
    "prompt llama": ("llama", {}, peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=5)),
    "prompt t5": ("t5", {}, peft.PromptTuningConfig(**SEQ2SEQ, num_virtual_tokens=5)),
    "ptuning gpt2": ("gpt2", {}, peft.PromptEncoderConfig(**CAUSAL, num_virtual_tokens=5, encoder_hidden_size=9)),
    "ptuning t5": ("t5", {}, peft.PromptEncoderConfig(**SEQ2SEQ, num_virtual_tokens=5, encoder_hidden_size=9)),
    "prefix gpt2": ("gpt2", {}, peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=5)),
    "prefix llama": ("llama", {}, peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=5)),
    "prefix gpt2, made": (
        "gpt2",
        {},
        peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=9),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path, parity):
    """PEFT's folder opened here says what PEFT says with it; saved here, PEFT opens it and says the same again."""
    family, changes, config = CASES[name]
    model.hub.save(randomized(tiny_config(family, **changes)), tmp_path / "base")
    network = model.hub.load(tmp_path / "base")
    plain, batch = network(**inputs(network.config)).logits, inputs(network.config)
    folder = peft_folder(twin(network.config, tmp_path / "base"), config, tmp_path / "theirs")
    theirs = opened_by_peft(network.config, tmp_path / "base", folder)(**batch).logits
    ours = peft_io.load(network, folder)(**batch).logits
    part = name.split()[0]
    parity(f"peft folders, {part} in: {name}", "PEFT", gap(ours, theirs), *ROUNDING)
    assert (ours - plain).abs().max() > 1e-2

    peft_io.save(network, tmp_path / "ours")
    back = opened_by_peft(network.config, tmp_path / "base", tmp_path / "ours")(**batch).logits
    parity(f"peft folders, {part} out: {name}", "PEFT", gap(back, theirs), *ROUNDING)
    again = peft_io.open_network(tmp_path / "ours")
    assert torch.equal(again(**batch).logits, ours)


OURS = {  # name: (family, our config)
    "lora": (
        "llama",
        LoraConfig(r=3, targets="all-linear", rank_pattern={r"blocks\.0\..*query": 2}, alpha_pattern={"down": 3.0}),
    ),
    "lora, fused": ("gpt2", LoraConfig(r=3, targets="attention", rank_stabilized=True, bias="adapted")),
    "lora, head": ("gpt2", LoraConfig(r=3, targets="^head$|embedding$", train_whole=(r"blocks\.1\.mlp\.up",))),
    "lora, both stacks": ("t5", LoraConfig(r=3, targets="query-value", bias="all")),
    "dora": ("roformer", DoraConfig(r=3, targets="attention")),
    "adalora": ("bert", AdaloraConfig(initial_r=4, r=2, targets="query-value")),
    "ia3": ("roformer", Ia3Config()),
    "ia3, both stacks": ("t5", Ia3Config()),
    "prompt": ("llama", PromptConfig(tokens=3)),
    "ptuning": ("gpt2", PtuningConfig(tokens=3, width=9)),
    "prefix": ("llama", PrefixConfig(tokens=3)),
    "prefix, made": ("gpt2", PrefixConfig(tokens=3, width=9)),
}


@pytest.mark.parametrize("name", OURS)
def test_what_is_made_here_opens_in_peft(name, tmp_path, parity):
    family, config = OURS[name]
    model.hub.save(randomized(tiny_config(family)), tmp_path / "base")
    network = add_adapters(model.hub.load(tmp_path / "base"), config)
    shake(network)
    peft_io.save(network.eval(), tmp_path / "ours")
    batch = inputs(network.config)
    theirs = opened_by_peft(network.config, tmp_path / "base", tmp_path / "ours")(**batch).logits
    parity(f"peft folders, {config.method} out: made here, {name}", "PEFT", gap(network(**batch).logits, theirs), *ROUNDING)
    assert torch.equal(peft_io.open_network(tmp_path / "ours")(**batch).logits, network(**batch).logits)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", AdapterConfig(width=5)),
        ("t5", AdapterConfig(width=5, placement="pfeiffer")),
        ("t5", PrefixConfig(tokens=3)),
        ("t5", LoraConfig(r=2, targets="embedding")),
    ],
    ids=["bottleneck", "pfeiffer", "prefix-of-two-stacks", "shared-embedding"],
)
def test_what_peft_computes_otherwise_comes_back_to_us_alone(family, config, tmp_path):
    model.hub.save(randomized(tiny_config(family)), tmp_path / "base")
    network = add_adapters(model.hub.load(tmp_path / "base"), config).eval()
    shake(network)
    peft_io.save(network, tmp_path / "ours")
    said = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert said["peft_type"].startswith("TOUCHSTONE_")
    batch = inputs(network.config)
    assert torch.equal(peft_io.open_network(tmp_path / "ours")(**batch).logits, network(**batch).logits)


@pytest.mark.parametrize("layers", [2, 3])
def test_a_prefix_of_an_encoder_decoder_is_read_as_peft_does(layers, tmp_path, parity):
    """PEFT gives decoder layer i the keys and values of 2 i modulo the number of layers."""
    model.hub.save(randomized(tiny_config("bart", decoder_depth=layers)), tmp_path / "base")
    network = model.hub.load(tmp_path / "base")
    config = peft.PrefixTuningConfig(**SEQ2SEQ, num_virtual_tokens=4, num_layers=layers)
    folder = peft_folder(twin(network.config, tmp_path / "base"), config, tmp_path / "theirs")
    batch = inputs(network.config)
    theirs = opened_by_peft(network.config, tmp_path / "base", folder)(**batch).logits
    error = gap(peft_io.load(network, folder)(**batch).logits, theirs)
    parity(f"peft folders, prefix in: bart, {layers} layers", "PEFT", error, *ROUNDING)


def test_ranks_that_adalora_gave_up(tmp_path, parity):
    model.hub.save(randomized(tiny_config("gpt2")), tmp_path / "base")
    network = model.hub.load(tmp_path / "base")
    masks = {
        "transformer.h.0.attn.c_attn.lora_E": [True, False, True, False],
        "transformer.h.1.attn.c_attn.lora_E": [False] * 4,
    }

    def prune(adapted):
        adapted.peft_config["default"].rank_pattern = masks

    config = peft.AdaLoraConfig(**ADALORA, **CAUSAL, target_modules=["c_attn"])
    folder = peft_folder(twin(network.config, tmp_path / "base"), config, tmp_path / "theirs", prune)
    assert load_file(folder / "adapter_model.safetensors")["base_model.model.transformer.h.0.attn.c_attn.lora_A"].shape == (
        2,
        24,
    )
    batch = inputs(network.config)
    theirs = opened_by_peft(network.config, tmp_path / "base", folder)(**batch).logits
    error = gap(peft_io.load(network, folder)(**batch).logits, theirs)
    parity("peft folders, adalora in: pruned", "PEFT", error, *ROUNDING)
    assert [part.kept.sum().item() for part in parts(network, "default").values()] == [2, 0]


def test_a_classifier_is_trained_whole(tmp_path, parity):
    """SEQ_CLS: PEFT takes the head for granted among what is saved; the base may have another head."""
    from transformers import AutoModelForSequenceClassification as Classifier

    model.hub.save(randomized(tiny_config("bert")), tmp_path / "base")
    network = model.hub.load(tmp_path / "base", head="sequence", labels=3)
    model.hub.save(network, tmp_path / "classifier")
    config = peft.LoraConfig(**LORA, target_modules=["query"], task_type="SEQ_CLS")
    folder = peft_folder(twin(network.config, tmp_path / "classifier", Classifier), config, tmp_path / "theirs")
    batch = inputs(network.config)
    theirs = opened_by_peft(network.config, tmp_path / "classifier", folder, Classifier)(**batch).logits
    opened = peft_io.open_network(folder, base=tmp_path / "base", head="sequence", labels=3)
    parity("peft folders, lora in: classifier", "PEFT", gap(opened(**batch).logits, theirs), *ROUNDING)
    peft_io.save(opened, tmp_path / "ours")
    back = opened_by_peft(network.config, tmp_path / "classifier", tmp_path / "ours", Classifier)(**batch).logits
    parity("peft folders, lora out: classifier", "PEFT", gap(back, theirs), *ROUNDING)


def test_several_side_by_side(tmp_path):
    """Each under its own name, in two formats; the one that was opened last is active."""
    model.hub.save(randomized(tiny_config("llama")), tmp_path / "base")
    network = model.hub.load(tmp_path / "base")
    batch, said = inputs(network.config), {}
    for name, config in {"one": LoraConfig(r=2), "two": Ia3Config()}.items():
        alone = add_adapters(model.hub.load(tmp_path / "base"), config, name)
        shake(alone)
        said[name] = alone(**batch).logits
        peft_io.save(alone, tmp_path / name, name)
        peft_io.load(network, tmp_path / name, name)
        assert torch.equal(network(**batch).logits, said[name])
    assert torch.equal(activate(network, "one")(**batch).logits, said["one"])
    with pytest.raises(AdapterError, match="has an adapter 'one' already"):
        peft_io.load(network, tmp_path / "one", "one")


def test_shortest_names(tmp_path):
    """What PEFT reads is as short as a person would write it."""
    network = add_adapters(randomized(tiny_config("gpt2")), LoraConfig(targets="attention"))
    peft_io.save(network, tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["target_modules"] == ["attn.c_proj", "c_attn"] and said["fan_in_fan_out"]
    assert not (tmp_path / "base.json").exists() and said["base_model_name_or_path"] is None
    assert said["task_type"] == "CAUSAL_LM"
