"""A vocabulary that was resized before training: merged, it is PEFT's model; beside the base too; embedding, head and biases.

PEFT saves the resized matrices in several ways, by what was trained and what is tied; each is one case here.
"""

import json
import shutil

import bitsandbytes
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lora.peft_io as peft_io
import model.hub
from lora.__main__ import main
from lora.config import AdapterError
from lora.merge_folder import merge_to_folder
from quant.config import FourBit
from tests.compare import relative
from tests.conftest import randomized, tiny_config
from tests.oracle.lora.test_peft_io import inputs, shake
from tests.oracle.model.test_network import CLASSES, widen

LIBRARY = f"peft {peft.__version__}, transformers {transformers.__version__}"
DOUBLE = (1e-12, "float64 rounding; W + s B A in another order")
SINGLE = (1e-6, "float32 rounding of W + s B A")
LOGITS = (5e-6, "float32 rounding; sums in another order, through two layers")
NAMES = {"bert": ("word_embeddings", "decoder"), "gpt2": ("wte", "lm_head"), "t5": ("shared", "lm_head")}
TARGETS = {"gpt2": "c_attn", "bert": "query", "roberta": "query", "t5": "q", "t5-gated": "q"}
TIED, UNTIED = {"tie_embeddings": True}, {"tie_embeddings": False}
BOTH, EMBEDDING, HEAD = "both", "embedding", "head"
CASES = {  # name: (family, changes, trained whole, LoRA beside, ensure_weight_tying, --untie, size)
    "llama, both whole": ("llama", UNTIED, BOTH, None, False, False, 65),
    "llama, saved along": ("llama", UNTIED, None, None, False, False, 65),
    "llama, fewer tokens": ("llama", UNTIED, None, None, False, False, 53),
    "llama, both beside": ("llama", UNTIED, None, BOTH, False, False, 65),
    "llama, embedding whole": ("llama", UNTIED, EMBEDDING, None, False, False, 65),
    "llama, tied, saved along": ("llama", TIED, None, None, False, False, 65),
    "llama, tied, both whole": ("llama", TIED, BOTH, None, False, True, 65),
    "llama, tied, whole as one": ("llama", TIED, EMBEDDING, None, True, False, 65),
    "llama, tied, beside as one": ("llama", TIED, None, EMBEDDING, True, False, 65),
    "llama, tied, embedding beside": ("llama", TIED, None, EMBEDDING, False, True, 65),
    "llama, tied, head beside": ("llama", TIED, None, HEAD, False, True, 53),
    "gpt2, saved along": ("gpt2", {}, None, None, False, False, 65),
    "gpt2, both whole": ("gpt2", {}, BOTH, None, False, True, 65),
    "gpt2, PEFT knows no wte": ("gpt2", {}, EMBEDDING, None, True, True, 65),
    "bert, saved along": ("bert", {}, None, None, False, False, 65),
    "roberta, fewer tokens": ("roberta", {}, None, None, False, False, 53),
    "bart, saved along": ("bart", {}, None, None, False, False, 65),
    "t5, saved along": ("t5", {}, None, None, False, False, 65),
    "t5, head whole": ("t5", {}, HEAD, None, False, True, 65),
    "t5-gated, saved along": ("t5-gated", {}, None, None, False, False, 65),
}


def ends(family: str, which: str | None) -> list[str]:
    embedding, head = NAMES.get(family.partition("-")[0], ("embed_tokens", "lm_head"))
    return {None: [], BOTH: [embedding, head], EMBEDDING: [embedding], HEAD: [head]}[which]


def opened(folder, config, dtype=torch.float64, **options) -> nn.Module:
    return CLASSES[config.architecture].from_pretrained(folder, dtype=dtype, **options).eval()


def resized_adapter(name: str, base, folder, dtype=torch.float64) -> nn.Module:
    """PEFT's model with a random adapter on the base, resized; saved in `folder`."""
    family, _, whole, beside, tying, _, size = CASES[name]
    theirs = opened(base, model.hub.read_config(base), dtype)
    theirs.resize_token_embeddings(size)
    targets = [TARGETS.get(family, "q_proj"), *ends(family, beside)]
    saved = {"modules_to_save": ends(family, whole) or None, "ensure_weight_tying": tying}
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **saved)
    made = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False).to(dtype).eval()
    shake(made)
    made.save_pretrained(folder)
    return made


def batch_of(config, size: int) -> dict:
    """With the last token; without pads, of which RoBERTa makes positions."""
    batch = {name: ids.clamp(max=size - 2) for name, ids in inputs(config).items()}
    for ids in batch.values():
        ids[:, 0] = size - 1
    return batch


@pytest.mark.parametrize("name", CASES)
def test_merged_and_beside(name, tmp_path, parity):
    family, changes, _, _, _, untie, size = CASES[name]
    config = tiny_config(family, **changes)
    model.hub.save(randomized(config), tmp_path / "base", shard_bytes=9000 if name == "llama, both whole" else 10**9)
    theirs = resized_adapter(name, tmp_path / "base", tmp_path / "adapter")
    batch = batch_of(config, size)
    expected = theirs(**batch).logits
    given = (tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    if untie:
        with pytest.raises(AdapterError, match=r"merged, it would change both\. With --untie two matrices"):
            merge_to_folder(*given)
    merge_to_folder(*given, untie=untie)
    out = opened(tmp_path / "out", config)
    assert out.config.vocab_size == out.get_input_embeddings().weight.size(0) == size
    parity(f"resized vocabularies, merged: {name}", LIBRARY, relative(out(**batch).logits, expected), *DOUBLE)
    merged = model.hub.load(tmp_path / "out")
    assert merged.config.tie_embeddings == (config.tie_embeddings and not untie)
    widen(theirs.get_base_model())
    network = peft_io.open_network(tmp_path / "adapter", base=tmp_path / "base")
    assert network.config.vocab_size == size
    parity(f"resized vocabularies, beside: {name}", LIBRARY, relative(network(**batch).logits, theirs(**batch).logits), *DOUBLE)


def test_in_float32(tmp_path, parity):
    name, config = "llama, both whole", tiny_config("llama", **UNTIED)
    model.hub.save(randomized(config, dtype=torch.float32), tmp_path / "base")
    theirs = resized_adapter(name, tmp_path / "base", tmp_path / "adapter", torch.float32)
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    expected, out = theirs(**batch_of(config, 65)).logits, opened(tmp_path / "out", config, torch.float32)
    parity(f"resized vocabularies, float32: {name}", LIBRARY, relative(out(**batch_of(config, 65)).logits, expected), *LOGITS)
    merged, found = dict(theirs.merge_and_unload().named_parameters()), dict(out.named_parameters())
    assert merged.keys() == found.keys() and merged["lm_head.weight"].shape == (65, 24)
    parity(f"resized vocabularies, float32, weights: {name}", LIBRARY, relative(found, merged), *SINGLE)


def test_what_older_files_hold(tmp_path, parity):
    """The trained matrices alone, without what PEFT saves of them twice and of the base."""
    name, config = "llama, both whole", tiny_config("llama", **UNTIED)
    model.hub.save(randomized(config), tmp_path / "base")
    theirs = resized_adapter(name, tmp_path / "base", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {each: value for each, value in load_file(path).items() if "modules_to_save" not in each and "original" not in each}
    assert len(load_file(path)) - len(kept) == 4
    save_file(kept, path)
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    expected = theirs(**batch_of(config, 65)).logits
    found = opened(tmp_path / "out", config)(**batch_of(config, 65)).logits
    parity(f"resized vocabularies, older files: {name}", LIBRARY, relative(found, expected), *DOUBLE)


def test_on_a_base_of_four_bits(tmp_path, parity):
    """Its embedding and head have all their bits; what is written has them everywhere."""
    name, config = "llama, both whole", tiny_config("llama", width=64, mlp_width=128, **UNTIED)
    model.hub.save(randomized(config, dtype=torch.float32), tmp_path / "dense")
    model.hub.save(model.hub.load(tmp_path / "dense", quantization=FourBit(double_quantized=False)), tmp_path / "base")
    theirs = resized_adapter(name, tmp_path / "base", tmp_path / "adapter", torch.float32)
    for module in theirs.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    expected = theirs(**batch_of(config, 65)).logits
    found = opened(tmp_path / "out", config, torch.float32)(**batch_of(config, 65)).logits
    error = relative(found, expected)
    parity(f"resized vocabularies, 4 bits: {name}", LIBRARY, error, 1e-5, "float32 rounding; unpacked first")


def broken(change):
    """The adapter's file, altered."""

    def act(folder) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return act


def cut(name: str):
    return broken(lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))


EMBED = "base_model.model.model.embed_tokens"
REFUSED = {  # name: (case, what happens to the adapter, what is said)
    "no rows for the head": (
        "llama, tied, embedding beside",
        None,
        "a vocabulary of 65 tokens, its base has 61, and no lm_head.weight",
    ),
    "two sizes": ("llama, saved along", cut(f"{EMBED}.weight"), r"vocabularies of two sizes: 6[45] \(.*\) and 6[45] \(.*\)"),
    "another base's rows": (
        "llama, both beside",
        broken(lambda tensors: tensors[f"{EMBED}.base_layer.weight"].add_(1)),
        "base_layer.weight' is not this base's own",
    ),
    "a copy that differs": (
        "llama, both whole",
        broken(lambda tensors: tensors[f"{EMBED}.modules_to_save.weight"].add_(1)),
        "modules_to_save.weight' differs from",
    ),
    "a tied matrix in two versions": (
        "llama, tied, saved along",
        broken(lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1)),
        "differ, but are one matrix",
    ),
    "two ends that PEFT had as one": (
        "llama, tied, whole as one",
        broken(lambda tensors: [tensors[name].add_(1) for name in tensors if "lm_head" in name and "original" not in name]),
        "says ensure_weight_tying, but its embedding and head have different values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, tmp_path, capsys):
    case, change, message = REFUSED[name]
    family, changes, *_ = CASES[case]
    untied = name == "no rows for the head"
    model.hub.save(randomized(tiny_config(family, **(UNTIED if untied else changes))), tmp_path / "base")
    resized_adapter(case, tmp_path / "base", tmp_path / "adapter")
    if change is not None:
        change(tmp_path / "adapter")
    given = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--untie"]
    assert main(given) == 2
    with pytest.raises(AdapterError, match=message):
        peft_io.open_network(tmp_path / "adapter", base=tmp_path / "base")
    with pytest.raises(AdapterError, match=message):
        merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", untie=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_network_of_the_old_size_is_refused(tmp_path):
    model.hub.save(randomized(tiny_config("llama", **UNTIED)), tmp_path / "base")
    resized_adapter("llama, both whole", tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"for a vocabulary of 65 tokens, this network has 61: lora\.peft_io\.open_network"):
        peft_io.load(model.hub.load(tmp_path / "base"), tmp_path / "adapter")


def test_the_adapters_tokenizer_wins(tmp_path, capsys):
    """Trainers save beside an adapter the tokenizer that knows its tokens; of the base's none stays, its other files do."""
    model.hub.save(randomized(tiny_config("llama", **UNTIED)), tmp_path / "base")
    resized_adapter("llama, both whole", tmp_path / "base", tmp_path / "adapter")
    for name in ("tokenizer.model", "tokenizer.json", "added_tokens.json", "LICENSE"):
        (tmp_path / "base" / name).write_text(f"the base's {name}")
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (tmp_path / "adapter" / name).write_text(f"the adapter's {name}")
    given = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--out"]
    assert main([*given, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert f"note: the tokenizer is that of {tmp_path / 'adapter'}, not the base's: tokenizer.json, chat_template.jinja" in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    own = {"config.json", "generation_config.json", "model.safetensors"}
    assert names == own | {"tokenizer.json", "chat_template.jinja", "LICENSE"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "the adapter's tokenizer.json"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 65
    (tmp_path / "adapter" / "tokenizer.json").unlink()  # a template alone goes with the base's vocabulary
    assert main([*given, str(tmp_path / "template")]) == 0
    assert (tmp_path / "template" / "tokenizer.json").read_text() == "the base's tokenizer.json"
    assert (tmp_path / "template" / "chat_template.jinja").read_text() == "the adapter's chat_template.jinja"
    shutil.copyfile(tmp_path / "base" / "tokenizer.json", tmp_path / "adapter" / "tokenizer.json")
    (tmp_path / "adapter" / "chat_template.jinja").unlink()
    capsys.readouterr()
    assert main([*given, str(tmp_path / "same")]) == 0 and "tokenizer" not in capsys.readouterr().err
