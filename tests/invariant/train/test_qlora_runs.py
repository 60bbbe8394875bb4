"""`python -m train --recipe qlora --init …`: what is loaded, trained, saved, resumed and merged; and what is refused."""

import json
import shutil
import tomllib

import pytest
import torch
from safetensors.torch import load_file

import lora.__main__ as lora_command
import lora.peft_io
import model.__main__ as model_command
import model.hub
from quant.config import FourBit
from quant.layer import QuantizedLinear
from quant.linear import quantized_layers
from tests.bench.qlora import SEEDS, in_16_bits, learned
from tests.bench.shown import open_task
from tests.fault.test_ranks import torchrun
from tests.runs import arguments, assert_same_end, command, further, last_checkpoint, metrics, stopped_at
from train.runs.checkpoint import step_of
from train.runs.open import resolve

STEPS = 16
SMALL = {"steps": STEPS, "eval-every": 8, "save-every": 6, "lr": "1e-2", "precision": "fp32", "lora.r": 2}


@pytest.fixture(scope="module")
def base(finished, tmp_path_factory):
    """A finished run's network as a model folder."""
    folder = tmp_path_factory.mktemp("base") / "model"
    assert model_command.main(["export", str(finished), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def run(options, base, tmp_path_factory):
    """A finished run of the recipe, in float32 (16 bits are emulated here)."""
    folder = tmp_path_factory.mktemp("qlora") / "run"
    said = command(*ask(options, base), "--out", folder)
    assert said.code == 0, said.err
    return folder, said


def ask(options, base, **changes) -> list[object]:
    return [*further(options), *arguments(SMALL | changes), "--recipe", "qlora", "--init", base]


def test_the_recipe(run, base):
    """NF4 with double quantization under LoRA on every matrix of the blocks, 8-bit AdamW, recomputation, the loss in chunks."""
    folder, said = run
    chosen = tomllib.loads((folder / "config.toml").read_text())
    assert (chosen["run"]["adapter"], chosen["run"]["quantize"]) == ("lora", "nf4")
    assert chosen["optimizer"]["optimizer"] == "adamw8bit" and chosen["lora"]["targets"] == "all-linear"
    assert (chosen["speed"]["recompute"], chosen["speed"]["loss"]) == ("blocks", "chunked")
    whole = sum(parameter.numel() for parameter in model.hub.load(base).parameters())
    opened = lora.peft_io.open_network(last_checkpoint(folder))
    added = sum(value.numel() for name, value in opened.named_parameters() if ".parts." in name)
    assert f"in all, of {whole + added:,}" in said.out  # weights of four bits are counted
    assert f"{whole + added:,} parameters, {added:,} of them trainable (lora)" in said.out
    assert "matrices in nf4 of 4." in said.out
    losses = [row["loss"] for row in metrics(folder) if row["split"] == "validation"]
    assert losses[-1] < losses[0]


def test_what_is_saved(run):
    """The adapter, its moments in eight bits where there are 4,096 numbers, and how the base was rounded."""
    folder, _ = run
    checkpoint = last_checkpoint(folder)
    assert not {"model.safetensors", "config.json"} & {path.name for path in checkpoint.iterdir()}
    note = json.loads((checkpoint / "base.json").read_text())
    assert note["quantization"] == {"scheme": "nf4", "double": True, "block_size": 64, "skip": ["lm_head"], "compute": None}
    assert all(".parts.default." in name for name in load_file(checkpoint / "optimizer.safetensors"))
    network = lora.peft_io.open_network(checkpoint)
    assert quantized_layers(network) and network.quantization == FourBit()
    blocks = [module for path, module in network.named_modules() if path.startswith("body.blocks") and hasattr(module, "base")]
    assert blocks and all(type(module.base) is QuantizedLinear for module in blocks)


def test_stopped_and_resumed_it_ends_in_the_same_bytes(run, options, base, tmp_path):
    said = stopped_at(10, *ask(options, base), "--out", tmp_path / "run")
    assert said.code == 130 and step_of(last_checkpoint(tmp_path / "run")) == 10, said.err
    said = command("--resume", tmp_path / "run")
    assert said.code == 0, said.err
    assert_same_end(run[0], tmp_path / "run", STEPS)


def test_generate_and_merge_read_the_run(run, base, tmp_path, capsys):
    """What is merged is what was trained: the base as four bits leave it, and the adapter."""
    folder, _ = run
    checkpoint = last_checkpoint(folder)
    line = ["--prompt", "the value", "--max-new-tokens", "12", "--temperature", "0"]
    assert model_command.main(["generate", str(checkpoint), *line]) == 0
    text = capsys.readouterr().out
    assert lora_command.main(["merge", str(base), str(checkpoint), "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert model_command.main(["generate", str(tmp_path / "merged"), *line]) == 0
    assert capsys.readouterr().out == text
    ids = torch.arange(3, 23)[None]
    merged, beside = model.hub.load(tmp_path / "merged"), lora.peft_io.open_network(checkpoint)
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, beside(ids).logits, rtol=0, atol=1e-4)
        plain = lora.peft_io.load(model.hub.load(base), checkpoint)  # on the base with all its bits it is something else
        assert not torch.allclose(plain(ids).logits, beside(ids).logits, rtol=0, atol=1e-3)


def test_a_base_that_is_quantized_already(options, base, tmp_path):
    """It is taken as it is: the same run. Without an adapter there is nothing to train."""
    packed = tmp_path / "packed"
    model.hub.save(model.hub.load(base, quantization=FourBit()), packed)
    for path in base.iterdir():
        if not (packed / path.name).exists():
            (packed / path.name).write_bytes(path.read_bytes())
    runs = {}
    for init in (base, packed):
        runs[init] = tmp_path / f"run-{init.name}"
        said = command(*ask(options, init, steps=3), "--out", runs[init])
        assert said.code == 0, said.err
        assert ("is quantized already" in said.out) == (init == packed)
    mine, other = (load_file(last_checkpoint(folder) / "adapter_model.safetensors") for folder in runs.values())
    assert mine.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in mine.items())
    said = command(*further(options), *arguments({"steps": 3, "init": packed}), "--out", tmp_path / "none")
    assert said.code == 2 and "weights in nf4" in said.err and "--adapter" in said.err


def test_what_is_refused(options, base, tmp_path):
    said = command(*further(options), "--init", base, "--quantize", "nf4", "--out", tmp_path / "run")
    assert said.code == 2 and "--quantize nf4" in said.err and "--adapter lora" in said.err
    said = command(*options, "--recipe", "qlora", "--out", tmp_path / "run")
    assert said.code == 2 and "--init" in said.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stored", [False, True])
def test_the_memory_that_is_predicted(stored, options, base, tmp_path):
    changes = {"steps": 2}
    if stored:  # in four bits already, and nothing is asked for
        shutil.copytree(base, tmp_path / "packed")
        model.hub.save(model.hub.load(base, quantization=FourBit()), tmp_path / "packed")
        base, changes["quantize"] = tmp_path / "packed", "none"
    said = command(*ask(options, base, **changes), "--memory-report", "--out", tmp_path / "run")
    assert said.code == 0, said.err
    rows = {line[:24].strip(): line[24:].split() for line in said.out.splitlines() if line.startswith("  ")}
    predicted, _, measured, _ = rows["weights"]
    assert abs(float(predicted) / float(measured) - 1) < 0.02, said.out


@pytest.mark.parametrize("scheme", ["fp4", "none"])
def test_other_ways_to_read_the_base(scheme, options, base, tmp_path):
    said = command(*ask(options, base, steps=1, quantize=scheme), "--out", tmp_path / "run")
    assert said.code == 0 and "quantized already" not in said.out, said.err
    assert ("matrices in fp4 of 4." in said.out) == (scheme == "fp4") and "matrices in nf4" not in said.out
    network = lora.peft_io.open_network(last_checkpoint(tmp_path / "run"))
    assert network.quantization == (FourBit("fp4") if scheme == "fp4" else None)


@pytest.mark.slow
def test_two_ranks(options, uninterrupted, tmp_path):
    """Four bits go to both ranks, once; the loss is that of one (without dropout, whose noise each rank has of its own)."""
    line = ask(options, uninterrupted(optimizer="adamw", dropout="0.0"))
    assert command(*line, "--out", tmp_path / "one").code == 0
    with torchrun(*line, "--out", tmp_path / "two") as running:
        _, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    losses = [[row["loss"] for row in metrics(tmp_path / each) if row["split"] == "validation"] for each in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_four_bits_cost_less_than_two_percent_of_the_loss(tmp_path):
    """The paper's claim, on a network of 0.9 million weights that has read Python's documentation for 300 steps."""
    assert command("--out", tmp_path / "base", "--steps", "300", "--sample-every", "0").code == 0
    task = in_16_bits(open_task(resolve(tmp_path / "base")), tmp_path)
    for seed in SEEDS:
        usual, packed = (learned(task, how, seed, steps=100) for how in (None, FourBit()))
        assert packed < 1.02 * usual
        assert packed != usual
