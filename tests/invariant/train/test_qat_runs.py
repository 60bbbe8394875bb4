"""`python -m train --qat int8|int4`: runs of seven settings, their checkpoints, their resume, and the observed ranges."""

import json
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import model.__main__ as model_command
import model.hub
from model.init import empty_network
from quant import int8
from quant.config import QatConfig
from quant.int8 import AFFINE, EPS
from quant.int8_linear import DynamicInput, Int8Linear, StaticInput
from quant.linear import quantizable_layers, quantized_layers
from quant.qat import QatLinear, prepare, qat_layers
from tests.conftest import randomized, tiny_config
from tests.fault.test_ranks import torchrun
from tests.ranks import in_two_ranks
from tests.runs import arguments, assert_same_end, command, last_checkpoint, metrics, steps_of, stopped_at, torch_as_it_was
from train.config_toml import read_settings
from train.engine import Engine
from train.evaluate import evaluate
from train.losses.choose import LOSSES
from train.objective import Objective
from train.optimizers.build import build_optimizer
from train.optimizers.precision import autocast
from train.parallel.mesh import Mesh
from train.parallel.parallelize import replicated
from train.parallel.ranks import Ranks, disconnect, own_rows
from train.qat import Observers
from train.registry import load
from train.setup import open_data, open_network, open_optimizers

STEPS, FREEZE = 6, 3  # half of the steps, which is the default
SMALL = {"depth": 1, "context": 16, "steps": STEPS, "warmup": 0}
SMALL |= {"save-every": 2, "keep": 9, "eval-every": FREEZE, "eval-tokens": 300, "log-every": 1}
STATIC = "--qat.inputs static"
RUNS = {
    "dynamic": "--qat int8",
    "minmax": f"--qat int8 {STATIC} --qat.observer minmax --optimizer adamw",
    "moving, averages": f"--qat int8 {STATIC} --ema 0.9 --accumulate 2 --sample-every 6 --dropout 0",
    "everything": f"--qat int4 {STATIC} --qat.learned --qat.granularity group --qat.group-size 8 --ema 0.9 --recompute blocks",
    "a tensor's scale": "--qat int4 --qat.granularity tensor --precision bf16 --optimizer adamw",
    "llama, groups": f"--preset tiny --dropout 0 --qat int8 --qat.granularity group --qat.group-size 16 {STATIC}",
    "masked": f"--objective mlm --preset tiny-encoder --qat int8 {STATIC} --qat.learned --lr 1e-2",
}
SLOW = set(RUNS) - {"dynamic", "everything"}  # to resume: the two others have all the state that advances


@pytest.fixture(scope="module")
def made(options, tmp_path_factory):
    """made(name) → (the folder of a finished run, what it printed); each is trained once."""
    runs = {}

    def run(name: str) -> tuple[Path, str]:
        if name not in runs:
            folder = tmp_path_factory.mktemp("qat") / "run"
            said = command(*ask(options, name), "--out", folder)
            assert said.code == 0, said.err
            runs[name] = folder, said.out
        return runs[name]

    return run


def ask(options: list[str], name: str, **changes: object) -> list[str]:
    return [*options, *arguments(SMALL), *RUNS.get(name, name).split(), *arguments(changes)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The float32 weights, observed ranges and learned scales of a checkpoint."""
    stored = load_file(folder / "raw.safetensors")
    return {name.removeprefix("weights."): value for name, value in stored.items()}


def ranges(folder: Path) -> dict[str, tuple[torch.Tensor, ...]]:
    """layer → (low, high, frozen), and the zero point where scales are learned."""
    has, ends = weights(folder), ("observer.low", "observer.high", "frozen", "input_zero")
    paths = [name.removesuffix(".frozen") for name in has if name.endswith(".frozen")]
    return {path: tuple(has[f"{path}.{end}"] for end in ends if f"{path}.{end}" in has) for path in paths}


def same(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys() and one
    return all(a.dtype == b.dtype and torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


# ---- training, checkpoints, validation


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_falls(name, made):
    run, said = made(name)
    asked = read_settings(run).run.qat
    layers = len(quantized_layers(model.hub.load(last_checkpoint(run))))
    assert f"{layers} matrices rounded to {asked} in every step" in said and layers >= 4
    losses = {split: [row["loss"] for row in metrics(run) if row["split"] == split] for split in ("train", "validation")}
    assert losses["train"][-1] < losses["train"][0] - 0.3
    assert len(losses["validation"]) == 2
    assert ("sample: " in said) == (name == "moving, averages")


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_holds_the_integer_network(name, made):
    """Codes and scales are those of quantizing the float32 weights beside it; with --ema, of their averages."""
    run, _ = made(name)
    folder, asked = last_checkpoint(run), read_settings(run).qat
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    static, bits = asked.inputs == "static", 8 if read_settings(run).run.qat == "int8" else 4
    (group,) = config["config_groups"].values()
    assert config["quant_method"] == "compressed-tensors" and group["input_activations"]["dynamic"] != static
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (bits, asked.granularity)

    published = load_file(folder / "model.safetensors")
    parts = ["weight_scale", *["input_scale", "input_zero_point"] * static]
    assert {name.rpartition(".")[2] for name in published} - {"bias"} == {"weight", *parts}
    network, has = model.hub.load(folder), weights(folder)
    if read_settings(run).optimizer.ema:
        raw, averages = has, load_file(folder / "averages.safetensors")
        has = raw | {name: averages.get(f"averages.{name}", value) for name, value in raw.items()}
        assert not any(torch.equal(raw[name], has[name]) for name in raw if name.endswith("weight"))
    layers = quantized_layers(network)
    assert set(layers) == set(quantizable_layers(empty_network(network.config)))
    assert all(type(each) is Int8Linear for each in layers.values())
    for part in parts:
        assert sum(name.endswith(part) for name in published) == len(layers)
    for path, layer in layers.items():
        weight, log_scale = has[f"{path}.weight"], has.get(f"{path}.weight_log_scale")
        assert (log_scale is not None) == asked.learned
        small = int8.quantize(weight, grid=int8.Grid.of(bits), granularity=asked.granularity, group_size=asked.group_size)
        if asked.learned:
            scale = log_scale.exp().clamp(min=EPS)
            codes = (weight.unflatten(1, (scale.size(1), -1)) * (1 / scale)[:, :, None]).round()
            codes = codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).flatten(1).to(torch.int8)
            assert torch.equal(layer.weight.codes, codes) and torch.equal(layer.weight.scale, scale)
            assert not torch.equal(scale, small.scale)
        else:
            assert torch.equal(layer.weight.codes, small.codes) and torch.equal(layer.weight.scale, small.scale)
        assert type(layer.input) is (StaticInput if static else DynamicInput)
        if static:
            scale, zero = int8.scales_for(has[f"{path}.observer.low"], has[f"{path}.observer.high"], AFFINE)
            if asked.learned:
                scale, zero = has[f"{path}.input_log_scale"].exp(), has[f"{path}.input_zero"]
            assert torch.equal(layer.input.scale.view(()), scale.view(())) and int(layer.input.zero) == int(zero)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_holds_the_float_weights_too(name, made):
    """raw.safetensors has every parameter of the unquantized network, in float32, and none of them is rounded."""
    run, _ = made(name)
    folder = last_checkpoint(run)
    network, has = empty_network(model.hub.read_config(folder)), weights(folder)
    names = {name for name, _ in network.named_parameters()}
    layers, asked = quantized_layers(model.hub.load(folder)), read_settings(run).qat
    static = asked.inputs == "static"
    own = ["weight_log_scale"] * asked.learned + ["input_log_scale", "input_zero"] * (asked.learned and static)
    own += ["observer.low", "observer.high", "frozen"] * static
    assert has.keys() == names | {f"{path}.{name}" for path in layers for name in own}
    for name in names:
        parameter = network.get_parameter(name)
        assert has[name].dtype == torch.float32 and has[name].shape == parameter.shape and bool(has[name].any())
    for path, layer in layers.items():
        assert not torch.equal(has[f"{path}.weight"], layer.dequantize(torch.float32))


@pytest.mark.parametrize("name", RUNS)
def test_the_integer_network_has_the_validation_s_scores(name, made):
    """Bit for bit, under autocast too: validation multiplies integers already, in the same order."""
    run, _ = made(name)
    network = model.hub.load(last_checkpoint(run))
    for step, opened in ((FREEZE, model.hub.load(at(run, FREEZE))), (STEPS, network)):
        (row,) = [row for row in metrics(run) if row["split"] == "validation" and row["step"] == step]
        scores = scored(run, opened)
        assert scores == {name: row[name] for name in scores} and len(scores) == 6
    weight = network.body.blocks[0].mlp.down.weight
    weight.codes.copy_(weight.codes.roll(1, 0))
    assert scored(run, network)["loss"] != row["loss"]


def scored(run: Path, network: nn.Module) -> dict[str, float]:
    config = read_settings(run)
    task = load(config.run.objective)(config, open_data(config, None, lambda line: None))
    with torch_as_it_was():
        torch.use_deterministic_algorithms(True)
        objective = task.objective(network, LOSSES[config.speed.loss])
        return task.scores(evaluate(objective, task.validation, autocast=autocast(torch.device("cpu"), config.speed.precision)))


def test_learned_scales_have_adamw_without_decay(made):
    """Muon is for matrices of weights."""
    run, _ = made("everything")
    network = open_network(read_settings(run), None, last_checkpoint(run), torch.device("cpu"))
    scales = {id(value) for name, value in network.named_parameters() if name.endswith("_log_scale")}
    groups = open_optimizers(read_settings(run), network).param_groups
    decays = [group["weight_decay"] for group in groups for value in group["params"] if id(value) in scales]
    assert decays == [0.0] * 2 * len(qat_layers(network)) and any(group["weight_decay"] for group in groups)
    slots = load_file(last_checkpoint(run) / "optimizer.safetensors")
    assert {name.rpartition(".")[2] for name in slots if "_log_scale" in name} == {"exp_avg", "exp_avg_sq", "step"}


@pytest.mark.parametrize("name", ["everything", "masked"])
def test_generate_and_fill_read_the_run(name, made, capsys):
    run, _ = made(name)
    line = ["fill", str(run), "the [MASK] reads"] if name == "masked" else ["generate", str(run), "--prompt", "the file"]
    assert model_command.main(line) == 0
    out = capsys.readouterr().out
    assert "%" in out if name == "masked" else out.startswith("the file") and len(out) > 20


# ---- stopped and resumed


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS])
def test_stopped_and_resumed_it_ends_in_the_same_bytes(name, made, options, tmp_path):
    """Stopped twice: before the observers freeze, and after."""
    run, (whole, _) = tmp_path / "run", made(name)
    first, second = FREEZE - 1, FREEZE + 1
    assert stopped_at(first, *ask(options, name), "--out", run).code == 130
    assert stopped_at(second, "--resume", run).code == 130
    assert {first, second} <= set(steps_of(run)) and max(steps_of(run)) == second
    frozen = {step: [bool(each[2]) for each in ranges(at(run, step)).values()] for step in (first, second)}
    assert not any(frozen[first]) and all(frozen[second])
    said = command("--resume", run)
    assert said.code == 0, said.err
    assert_same_end(run, whole, STEPS)
    for step in steps_of(whole):
        for file in at(whole, step).iterdir():
            assert file.read_bytes() == (at(run, step) / file.name).read_bytes(), (step, file.name)


# ---- observed ranges


@pytest.mark.parametrize("name", ["minmax", "moving, averages", "everything", "masked"])
def test_ranges_move_until_they_freeze(name, made):
    run, _ = made(name)
    found = {step: ranges(at(run, step)) for step in sorted(steps_of(run))}
    steps = list(found)
    assert FREEZE in steps and steps[-1] == STEPS
    for before, after in pairwise(steps):
        assert same(found[before], found[after]) == (before >= FREEZE)
    for step, each in found.items():
        assert all(bool(frozen) == (step >= FREEZE) for _, _, frozen, *_ in each.values())
    published = [load_file(at(run, step) / "model.safetensors") for step in (2, FREEZE, STEPS)]
    early, middle, late = ({k: (v,) for k, v in each.items() if "input_" in k} for each in published)
    assert not same(early, middle) and same(middle, late) == (not read_settings(run).qat.learned)


@pytest.mark.parametrize("observer", ["moving", pytest.param("minmax", marks=pytest.mark.slow)])
def test_ranges_are_those_of_the_layers_inputs(observer, options, tmp_path):
    """They begin with the first micro-batch, before the first step; each step then adds both of its micro-batches at once."""
    seen, forward = {}, QatLinear.forward

    def watched(layer, x):
        if layer.training:
            seen.setdefault(layer, []).append(x.detach().aminmax())
        return forward(layer, x)

    name = f"--qat int8 {STATIC} --qat.observer {observer} --qat.freeze 0.75 --accumulate 2"
    with patch.object(QatLinear, "forward", watched):
        said = command(*ask(options, name, steps=4), "--out", tmp_path / "run")
    assert said.code == 0, said.err
    assert len(seen) == len(ranges(last_checkpoint(tmp_path / "run")))
    for layer, saw in seen.items():
        assert len(saw) == 1 + 2 * 4
        low, high = saw[0]
        for one, other in zip(saw[1:7:2], saw[2:7:2], strict=True):
            ends = torch.minimum(one.min, other.min), torch.maximum(one.max, other.max)
            if observer == "minmax":
                low, high = torch.minimum(low, ends[0]), torch.maximum(high, ends[1])
            else:
                low, high = low + 0.01 * (ends[0] - low), high + 0.01 * (ends[1] - high)
        assert torch.equal(low, layer.observer.low) and torch.equal(high, layer.observer.high)


def test_recomputation_changes_nothing(made, options, tmp_path):
    """With dropout 0.1 too: the second forward sees the same numbers, and does not observe them again."""
    run, _ = made("everything")
    said = command(*ask(options, "everything", recompute="none"), "--out", tmp_path / "run")
    assert said.code == 0, said.err
    one, other = (load_file(last_checkpoint(each) / "raw.safetensors") for each in (run, tmp_path / "run"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


ONE_STEP = f"--qat int8 {STATIC} --qat.observer minmax --qat.freeze 1 --dropout 0 --steps 1 --optimizer sgd"


def test_micro_batches_are_one_batch(options, tmp_path):
    """Two micro-batches of 2 give the ranges of one of 4, to the bit: a row does not depend on the rows beside it."""
    begin = Engine.begin

    def alike(engine, batch):
        begin(engine, {name: value[:2] for name, value in batch.items()})

    found = []
    with patch.object(Engine, "begin", alike):
        for size, parts in ((4, 1), (2, 2)):
            run = tmp_path / f"{size}"
            said = command(*ask(options, ONE_STEP, **{"batch-size": size, "accumulate": parts}), "--out", run)
            assert said.code == 0, said.err
            found.append(ranges(last_checkpoint(run)))
    assert same(*found)


# ---- several ranks


@pytest.mark.slow
def test_two_ranks(options, tmp_path):
    """After one step the ranges equal those of one rank, to the bit. Later ones are close: gradients are summed in another
    order, and Adam's steps are nearly the learning rate, 8e-3, where a gradient is nearly 0."""
    alone, two = tmp_path / "alone", tmp_path / "two"
    line = ask(options, ONE_STEP, steps=STEPS, optimizer="adamw", **{"save-every": 1})
    assert command(*line, "--out", alone).code == 0
    with torchrun(*line, "--out", two) as running:
        _, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert same(ranges(at(alone, 1)), ranges(at(two, 1)))
    mine, theirs = ranges(at(alone, STEPS)), ranges(at(two, STEPS))
    assert mine.keys() == theirs.keys() and not same(mine, ranges(at(alone, 1)))
    for path, ends in mine.items():
        assert torch.allclose(torch.stack(ends[:2]), torch.stack(theirs[path][:2]), rtol=4e-3, atol=0)
    losses = [[row["loss"] for row in metrics(each) if row["split"] == "validation"] for each in (alone, two)]
    assert losses[0] == pytest.approx(losses[1], abs=5e-4)


BATCHES = torch.arange(3 * 5 * 8).view(3, 5, 8) * 7 % 58 + 3  # rows that two ranks do not share evenly


def steps_with(objective: nn.Module, ranks: Ranks, observer: str) -> dict[str, torch.Tensor]:
    network = objective.module.network if ranks.world > 1 else objective.network
    optimizers = build_optimizer("sgd", network.named_parameters(), lambda name: "matrix", lr=0.0)
    engine = Engine(objective, optimizers, ranks=ranks, observers=Observers(network, 3, ranks))
    batches = [{"input_ids": ids, "labels": ids} for ids in BATCHES]
    engine.begin(batches[0])
    objective.train()
    for batch in batches:
        engine.train([own_rows(batch, ranks)])
    return {f"{path}.{end}": value for path, layer in qat_layers(network).items() for end, value in layer.named_buffers()}


def rounded(observer: str) -> Objective:
    settings = QatConfig(inputs="static", observer=observer, learned=observer == "moving")
    return Objective(prepare(randomized(tiny_config("llama"), dtype=torch.float32), settings))


def in_a_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for observer in ("minmax", "moving"):
        objective = replicated(rounded(observer), Mesh(), torch.device("cpu"))
        torch.save(steps_with(objective, Ranks(rank, 2), observer), folder / f"{observer}-{rank}.pt")
    disconnect()


@pytest.mark.slow
def test_every_rank_has_the_ranges_of_all(tmp_path):
    """With constant weights they equal those of one rank, to the bit, though each rank sees half of the rows."""
    in_two_ranks(in_a_rank, tmp_path)
    for observer in ("minmax", "moving"):
        first, second = (torch.load(tmp_path / f"{observer}-{rank}.pt") for rank in range(2))
        alone = steps_with(rounded(observer), Ranks(), observer)
        for name, value in alone.items():
            assert torch.equal(first[name], second[name]) and torch.equal(first[name], value), name
        assert all(value for name, value in alone.items() if name.endswith("frozen"))
