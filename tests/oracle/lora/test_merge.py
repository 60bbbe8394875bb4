"""`python -m lora merge`: what it writes is what PEFT's merge_and_unload makes (and where that is wrong, as in a tied matrix,
what PEFT computes without merging), opened by transformers."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora.peft_io as peft_io
import model.hub
from lora.__main__ import main
from lora.config import AdapterConfig, AdapterError, LoraConfig, PromptConfig
from lora.inject import add_adapters
from lora.merge_folder import merge_to_folder
from model.config import ModelConfig
from model.init import build_network
from tests.compare import relative
from tests.conftest import randomized, tiny_config
from tests.oracle.lora.test_peft_io import inputs, peft_folder, shake
from tests.oracle.model.test_network import CLASSES
from tests.oracle.wide import widen

SAME = (1e-12, "float64 rounding; W + s B A in another order")
SINGLE = (1e-5, "float32 rounding")
CASES = {  # name: (family, changes, PEFT's config, --untie)
    "gpt2": ("gpt2", {}, peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], bias="all", fan_in_fan_out=True), False),
    "gpt2-square": ("gpt2", {"mlp_width": 24}, peft.LoraConfig(r=4, target_modules=["c_proj", "c_fc"], use_rslora=True), False),
    "gpt2-dora": ("gpt2", {"mlp_width": 24}, peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], use_dora=True), False),
    "gpt2-ia3": ("gpt2", {}, peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"]), False),
    "gpt2-head": ("gpt2", {}, peft.LoraConfig(r=4, target_modules=["lm_head", "c_fc"]), True),
    "gpt2-embedding": ("gpt2", {}, peft.LoraConfig(r=4, target_modules=["wte", "c_fc"]), True),
    "llama": ("llama", {}, peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"]), False),
    "llama-untied": (
        "llama",
        {"tie_embeddings": False},
        peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], modules_to_save=[]),
        False,
    ),
    "llama-whole-head": ("llama", {}, peft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"]), True),
    "bert": ("bert", {}, peft.LoraConfig(r=4, target_modules=["query", "dense"], bias="lora_only"), False),
    "roformer": ("roformer", {}, peft.LoraConfig(r=4, target_modules=["query", "key", "value"], bias="all"), False),
    "roformer-dora": ("roformer", {}, peft.LoraConfig(r=4, target_modules=["query", "key"], use_dora=True), False),
    "roformer-ia3": ("roformer", {}, peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[]), False),
    "t5": ("t5", {}, peft.LoraConfig(r=4, target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM"), False),
    "t5-head": ("t5", {}, peft.LoraConfig(r=4, target_modules=["q", "lm_head"], task_type="SEQ_2_SEQ_LM"), True),
    "adalora": ("llama", {}, peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["v_proj"]), False),
}


def opened(folder, dtype, kind):
    return CLASSES[kind].from_pretrained(folder, dtype=dtype).eval()


IN_FLOAT32 = ("gpt2", "llama", "roformer-dora", "t5-head")


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in CASES), *((name, torch.float32) for name in IN_FLOAT32)]
)
def test_the_folder_is_what_peft_merges(name, dtype, tmp_path, parity, capsys):
    family, changes, config, untie = CASES[name]
    network = randomized(tiny_config(family, **changes), dtype=dtype)
    kind = network.config.architecture
    model.hub.save(network, tmp_path / "base", shard_bytes=9000 if name in ("gpt2", "llama", "t5-head") else 10**9)
    adapter = peft_folder(opened(tmp_path / "base", dtype, kind), config, tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "base"), str(adapter), "--out", str(tmp_path / "out"), *["--untie"] * untie]) == 0
    assert "try it:" in capsys.readouterr().out
    theirs = peft.PeftModel.from_pretrained(opened(tmp_path / "base", dtype, kind), adapter, autocast_adapter_dtype=False)
    theirs = theirs.to(dtype).eval()
    if not untie:  # a matrix that is tied PEFT changes in both places
        theirs = theirs.merge_and_unload(safe_merge=True)
    ours, batch = opened(tmp_path / "out", dtype, kind), inputs(network.config)
    assert next(ours.parameters()).dtype == dtype
    error = relative(ours(**batch).logits, theirs(**batch).logits)
    # the same, and not by chance: the base says something else
    base = opened(tmp_path / "base", dtype, kind)
    assert (base(**batch).logits - theirs(**batch).logits).abs().max() > 1e-3
    parity(f"merged folders: {name}", "PEFT, transformers", error, *(SAME if dtype == torch.float64 else SINGLE))
    again = model.hub.load(tmp_path / "out")
    assert again.config.tie_embeddings == (network.config.tie_embeddings and not untie)
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names  # files stay as they were


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral", "t5", "bart", "vaswani", "bert"])
@pytest.mark.parametrize("end", ["head", "embedding"])
def test_a_tied_matrix_is_not_changed_in_silence(family, end, tmp_path, capsys):
    model.hub.save(randomized(tiny_config(family, tie_embeddings=True)), tmp_path / "base")
    targets = {"head": "^head$", "embedding": r"^body\.embedding$"}[end]
    network = add_adapters(model.hub.load(tmp_path / "base"), LoraConfig(r=2, targets=targets)).eval()
    shake(network)
    peft_io.save(network, tmp_path / "adapter")
    given = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "would change both" in said and "--untie" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]  # nothing half-made
    code = main([*given, "--untie"])
    if family == "bert":  # its folder has one table for both
        assert code == 2 and "cannot be untied" in capsys.readouterr().err
        return
    assert code == 0
    merged, batch = model.hub.load(tmp_path / "out"), inputs(network.config)
    assert not merged.config.tie_embeddings
    assert torch.allclose(merged(**batch).logits, network(**batch).logits, rtol=0, atol=1e-11)
    assert not torch.equal(merged.head.weight, merged.body.embedding.weight)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_two_matrices_where_one_would_do(family, tmp_path, capsys):
    """--untie always unties, or says why not; the network computes the same."""
    model.hub.save(randomized(tiny_config(family, tie_embeddings=True)), tmp_path / "base")
    network = add_adapters(model.hub.load(tmp_path / "base"), LoraConfig(r=2, targets="all-linear")).eval()
    shake(network)
    peft_io.save(network, tmp_path / "adapter")
    given = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--out"]
    assert main([*given, str(tmp_path / "tied")]) == 0 and main([*given, str(tmp_path / "untied"), "--untie"]) == 0
    tied, untied = model.hub.load(tmp_path / "tied"), model.hub.load(tmp_path / "untied")
    assert "head.weight" not in dict(tied.named_parameters())
    assert "lm_head.weight" in load_file(tmp_path / "untied" / "model.safetensors")
    if family != "t5":  # of a T5 the files decide, as in transformers: two that are equal are one
        assert tied.config.replace(tie_embeddings=False) == untied.config != tied.config
    ends = untied.head.weight, untied.body.embedding.weight
    assert torch.equal(*ends) and (ends[0] is ends[1]) == (family == "t5")
    batch = inputs(network.config)
    assert torch.equal(tied(**batch).logits, untied(**batch).logits)
    theirs = widen(opened(tmp_path / "untied", torch.float64, network.config.architecture))(**batch).logits
    assert torch.allclose(untied(**batch).logits, theirs, rtol=0, atol=1e-11)
    if family == "t5":
        return
    capsys.readouterr()
    again = ["merge", str(tmp_path / "untied"), str(tmp_path / "adapter"), "--any-base", "--out", str(tmp_path / "again")]
    assert main([*again, "--untie"]) == 2
    assert capsys.readouterr().err == (
        "error: --untie (untie=…) would have no effect: the head has a matrix of its own already\n"
    )
    assert main([*given, str(tmp_path / "again"), "--labels", "3"]) == 2
    assert "--labels 3 (labels=…): " in capsys.readouterr().err
    assert main([*given, str(tmp_path / "again"), "--labels", "3", "--head", "lm"]) == 2
    assert "--labels would have no effect: this head has no classes" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["lm_head", "q"])
def test_a_t5_whose_head_scales_with_and_without_a_tie(end, tmp_path, parity):
    """As transformers writes it: its flag of the tie says nothing, another one says the scale. Untied, the head keeps its
    scale; an untied folder takes an adapter too."""
    model.hub.save(randomized(tiny_config("t5")), tmp_path / "ours")
    opened(tmp_path / "ours", torch.float64, "encoder-decoder").save_pretrained(tmp_path / "base")
    base, batch = tmp_path / "base", inputs(model.hub.read_config(tmp_path / "base"))
    for step, target in enumerate(("lm_head", end)):
        theirs = opened(base, torch.float64, "encoder-decoder")
        config = peft.LoraConfig(r=2, target_modules=[target], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
        adapter = peft_folder(theirs, config, tmp_path / f"adapter {step}")
        out = tmp_path / f"out {step}"
        if step == 0:
            with pytest.raises(AdapterError, match="would change both"):
                merge_to_folder(base, adapter, out)
        merge_to_folder(base, adapter, out, untie=step == 0)
        expected = peft.PeftModel.from_pretrained(opened(base, torch.float64, "encoder-decoder"), adapter).double().eval()
        said = opened(out, torch.float64, "encoder-decoder")(**batch).logits
        error = relative(said, expected(**batch).logits)
        parity(f"merged folders: t5, untied, {target}, step {step}", "PEFT, transformers", error, *SAME)
        merged = model.hub.read_config(out)
        assert (merged.tie_embeddings, merged.scale_head) == (False, True)
        base = out


@pytest.fixture
def llama(tmp_path):
    """A base of several files with a tokenizer's beside them, and an adapter of it."""
    model.hub.save(randomized(tiny_config("llama"), dtype=torch.bfloat16), tmp_path / "base", shard_bytes=5000)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "optimizer.safetensors").write_bytes(b"no weights of the network")
    network = add_adapters(model.hub.load(tmp_path / "base"), LoraConfig(r=2)).eval()
    shake(network)
    peft_io.save(network, tmp_path / "adapter")
    return tmp_path


def test_what_is_added_is_float32_and_rounded_once(llama):
    merge_to_folder(llama / "base", llama / "adapter", llama / "out")
    base, out = model.hub.load(llama / "base"), model.hub.load(llama / "out")
    adapter = load_file(llama / "adapter" / "adapter_model.safetensors")
    for number, block in enumerate(out.body.blocks):
        name = f"base_model.model.model.layers.{number}.mlp.down_proj.lora_"
        change = 2 * adapter[f"{name}B.weight"] @ adapter[f"{name}A.weight"]
        wanted = base.body.blocks[number].mlp.down.weight.float() + change * 4
        assert torch.equal(block.mlp.down.weight, wanted.to(torch.bfloat16))
        assert torch.equal(block.attention_norm.weight, base.body.blocks[number].attention_norm.weight)
    assert (llama / "out" / "tokenizer.json").read_text() == "{}"
    assert not (llama / "out" / "optimizer.safetensors").exists()


def test_formats_and_files_as_asked(llama, capsys):
    given = ["merge", str(llama / "base"), str(llama / "adapter"), "--out"]
    assert main([*given, str(llama / "one"), "--shard-size", "1GB", "--dtype", "fp32"]) == 0
    assert [path.name for path in sorted((llama / "one").glob("*model*"))] == ["model.safetensors"]
    assert json.loads((llama / "one" / "config.json").read_text())["dtype"] == "float32"
    assert model.hub.load(llama / "one").head.weight.dtype == torch.float32
    assert main([*given, str(llama / "many"), "--shard-size", "4KB"]) == 0
    files = sorted((llama / "many").glob("*.safetensors"))
    assert len(files) > 5 and all(path.stat().st_size < 6000 for path in files)
    assert CLASSES["decoder"].from_pretrained(llama / "many", dtype=torch.bfloat16) is not None
    one, many = model.hub.load(llama / "one"), model.hub.load(llama / "many")
    for (name, value), other in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(value.bfloat16(), other), name
    assert main([*given, str(llama / "one")]) == 2
    assert "is there already, and is not an empty folder" in capsys.readouterr().err
    assert main([*given, str(llama / "bad"), "--shard-size", "big"]) == 2


def test_a_sum_that_is_not_finite_is_named(llama, capsys):
    path = llama / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors[name] = tensors[name] * 1e38
    save_file(tensors, path)
    assert main(["merge", str(llama / "base"), str(llama / "adapter"), "--out", str(llama / "out"), "--dtype", "fp16"]) == 2
    assert "model.layers.1.self_attn.v_proj.weight: the merged weight is not finite in float16" in capsys.readouterr().err
    assert sorted(path.name for path in llama.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("config", [PromptConfig(tokens=2), AdapterConfig(width=3)], ids=["prompt", "bottleneck"])
def test_what_is_no_change_of_weights(config, tmp_path):
    model.hub.save(randomized(tiny_config("gpt2")), tmp_path / "base")
    peft_io.save(add_adapters(model.hub.load(tmp_path / "base"), config), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="does not change weights: it cannot be merged"):
        merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


PEAK = """
import sys
import torch
from lora.__main__ import main
base, adapter, out, *small = sys.argv[1:]
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
assert main(["merge", *small[:2], "--out", small[2]]) == 0  # what a first use imports and sets up is not counted
before = peak()
assert main(["merge", base, adapter, "--out", out]) == 0
print(peak() - before)
"""
BUFFERS = 10_000_000  # bytes, for what is read and copied a piece at a time, and for the adapter itself


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_is_that_of_one_weight_and_one_file(tmp_path, record_property):
    """Far below the network: 243 MB in files of 42 MB, the largest weight 12.6 MB."""
    model.hub.save(randomized(tiny_config("llama"), dtype=torch.float32), tmp_path / "small")
    peft_io.save(add_adapters(model.hub.load(tmp_path / "small"), LoraConfig(r=8)), tmp_path / "small adapter")
    sizes = {"width": 1024, "depth": 4, "mlp_width": 3072, "heads": 8, "kv_heads": 8, "vocab_size": 3000, "context": 64}
    network = build_network(ModelConfig.preset("tiny", **sizes, tie_embeddings=False), seed=0)
    model.hub.save(network, tmp_path / "base", shard_bytes=42_000_000)
    largest = max(parameter.numel() * 4 for parameter in network.parameters())
    shard = max(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    whole = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    network = add_adapters(model.hub.load(tmp_path / "base"), LoraConfig(r=8))
    shake(network)
    peft_io.save(network, tmp_path / "adapter")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "out", "small", "small adapter", "small out")]
    shown = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, check=True)
    grown = int(shown.stdout.splitlines()[-1])
    record_property("grown", grown)
    print(
        f"grown {grown / 1e6:.1f} MB; largest weight {largest / 1e6:.1f}, file {shard / 1e6:.1f}, network {whole / 1e6:.1f} MB"
    )
    assert grown < largest + shard + BUFFERS < whole / 2


def test_help_is_at_once():
    code = "import sys, lora.__main__; print([name for name in ('torch', 'numpy', 'safetensors') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
