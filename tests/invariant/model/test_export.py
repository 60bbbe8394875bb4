"""`python -m model export`: every file of the folder beside the checkpoint's, of ordinary, averaged and sharded runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import model.__main__
import model.hub
from model.init import build_network
from model.weights import to_published, weight_table
from tests.runs import command, last_checkpoint

TOKENIZER = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
SETTINGS = {"config.json", "generation_config.json"}
PARTS = 3


def exported(path: Path, out: Path) -> Path:
    said = command("export", path, "--out", out, main=model.__main__.main)
    assert said.code == 0, said.err
    return out


def assert_holds(out: Path, checkpoint: Path, expected: dict[str, Tensor]) -> None:
    """Each tensor under its published name, each other file byte for byte, and no file more; and the network's logits."""
    assert {file.name for file in out.iterdir()} == {"model.safetensors"} | SETTINGS | TOKENIZER
    for name in SETTINGS | TOKENIZER:
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes(), name
    config, written = model.hub.read_config(checkpoint), load_file(out / "model.safetensors")
    table = weight_table(config)
    published = {table[name].published: to_published(table[name], value, config) for name, value in expected.items()}
    assert written.keys() == published.keys()
    for name, value in published.items():
        assert value.dtype == written[name].dtype and torch.equal(value, written[name]), name
    twin, ids = build_network(config, seed=0, dtype=value.dtype).eval(), torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(expected[name])
        assert torch.equal(model.hub.load(out)(ids).logits, twin(ids).logits)


def parameters(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


@pytest.fixture(scope="module")
def runs(options, tmp_path_factory) -> dict[str, Path]:
    """Eight steps, ordinary and with averages; their best checkpoint is said to be that of step 4."""
    made = {}
    for name, ema in {"ordinary": 0.0, "averaged": 0.5}.items():
        run = made[name] = tmp_path_factory.mktemp(name) / "run"
        said = command(*options, "--ema", ema, "--steps", 8, "--save-every", 4, "--out", run)
        assert said.code == 0, said.err
        best = json.loads((run / "best.json").read_text())
        (run / "best.json").write_text(json.dumps(best | {"checkpoint": best["checkpoint"].replace("step-8", "step-4")}))
    return made


@pytest.mark.parametrize("kind", ["ordinary", "averaged"])
def test_the_best_checkpoint_of_a_run(kind, runs, tmp_path):
    run = runs[kind]
    best = run / "checkpoints" / "step-4"
    out = exported(run, tmp_path / "out")
    assert_holds(out, best, parameters(model.hub.load(best)))
    assert (out / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    assert command("export", tmp_path / "nothing", "--out", tmp_path / "other", main=model.__main__.main).code == 2


def test_averages(runs, tmp_path):
    """They are written where there are any, and not the weights that they follow."""
    checkpoint = last_checkpoint(runs["averaged"])
    kept = {name: load_file(checkpoint / f"{name}.safetensors") for name in ("averages", "raw")}
    expected = {n.removeprefix("averages."): value for n, value in kept["averages"].items() if n != "averages.updates"}
    assert_holds(exported(checkpoint, tmp_path / "out"), checkpoint, expected)
    assert not any(torch.equal(value, kept["raw"][f"weights.{name}"]) for name, value in expected.items())


def shard(checkpoint: Path, out: Path, averages: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint as three ranks would hold it, with random weights, written by hand; returns those to be exported."""
    out.mkdir()
    for name in {"state.json"} | TOKENIZER:
        shutil.copy(checkpoint / name, out)
    said = (checkpoint / "config.json").read_text()
    generation = json.loads((checkpoint / "generation_config.json").read_text()) | {"top_k": 7}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (out / "config.json").write_text(said.replace('"float32"', f'"{str(dtype).removeprefix("torch.")}"'))
    shapes = {name: parameter.shape for name, parameter in parameters(model.hub.load(checkpoint)).items()}
    tensors = {f"weights.{name}": torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    tensors |= {f"optimizer.{name}.momentum": torch.randn(shape) for name, shape in shapes.items()}
    if averages:
        tensors |= {f"averages.{name}": torch.randn(shape) for name, shape in shapes.items()}
        tensors["averages.updates"] = torch.tensor(7)
    files, entries = [{} for _ in range(PARTS)], {}
    for number, (name, value) in enumerate(tensors.items()):
        entries[name] = {"shape": list(value.shape)}
        if value.dim() == 0 or number % 3 == 0:  # what is not sharded stands whole in the first
            files[0][name] = value
            continue
        first, entries[name]["rows"] = 0, []
        chunks = list(value.chunk(PARTS)) + [value[:0]] * PARTS
        for file, chunk in zip(files, chunks, strict=False):
            file[name] = chunk.contiguous()
            entries[name]["rows"].append([first, first + len(chunk)])
            first += len(chunk)
    for part, file in enumerate(files, 1):
        save_file(file, out / f"tensors-{part:05}-of-{PARTS:05}.safetensors")
    (out / "tensors.json").write_text(json.dumps({"parts": PARTS, "tensors": entries}))
    kind = "averages" if averages else "weights"
    return {name: tensors[f"{kind}.{name}"].to(dtype) for name in shapes}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("averages", [False, True], ids=["weights", "averages"])
def test_sharded(averages, dtype, runs, tmp_path):
    expected = shard(last_checkpoint(runs["ordinary"]), tmp_path / "sharded", averages, dtype)
    assert_holds(exported(tmp_path / "sharded", tmp_path / "out"), tmp_path / "sharded", expected)
