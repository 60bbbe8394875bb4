"""Quantization-aware runs that cannot be, damaged checkpoints of them, and steps that were no numbers."""

import hashlib
import json
import math
import shutil
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

import model.hub
from quant.config import QatConfig
from quant.linear import quantize_linears
from quant.qat import prepare, qat_layers
from tests.conftest import randomized, tiny_config
from tests.fault.test_command import assert_one_clear_line, contents
from tests.runs import arguments, at_step, command, further, last_checkpoint, stopped_at
from train.engine import Engine
from train.objective import Objective, Result, Term
from train.optimizers.build import build_optimizer
from train.parallel.ranks import Ranks
from train.qat import Observers

STEPS, STOPPED, FREEZE = 6, 4, 3
SMALL = {"context": 16, "steps": STEPS, "save-every": 9, "eval-every": 9, "log-every": 1, "eval-tokens": 400, "warmup": 0}
STATIC = "--qat int8 --qat.inputs static --qat.observer minmax"
LEARNED = f"{STATIC} --qat.learned --qat.granularity tensor"
WITHOUT = "--qat.… has no effect: add --qat int8"


@pytest.fixture(scope="module")
def _stopped(options, tmp_path_factory):
    run = tmp_path_factory.mktemp("qat") / "run"
    said = stopped_at(STOPPED, *ask(options, LEARNED), "--out", run)
    assert said.code == 130, said.err
    return run


@pytest.fixture
def stopped(_stopped, tmp_path):
    """A copy of a run with learned, static scales, stopped at step 4 of 6."""
    shutil.copytree(_stopped, tmp_path / "run")
    return tmp_path / "run"


def ask(options: list[str], line: str) -> list[str]:
    return [*options, *arguments(SMALL), *line.split(" ")]


# ---- what is refused


REFUSED = {
    "--qat int8 --adapter lora --init nowhere": ("--qat int8 trains all weights, and --adapter lora freezes them",),
    "--qat int8 --mesh shard": ("--qat int8 does not go with --mesh shard: replicate does",),
    "--qat int8 --mesh replicate=1,shard=1": ("--qat int8 does not go with --mesh replicate=1,shard=1",),
    "--qat int4 --precision bf16-pure": ("--qat int4: bfloat16 weights lose small updates; --precision bf16",),
    "--qat.learned": (WITHOUT,),
    "--qat.inputs static": (WITHOUT,),
    "--qat.freeze 0.25": (WITHOUT,),
    "--qat int4 --qat.granularity group --qat.group-size 5": (
        "--qat int4: body.blocks.0.",
        ".weight: rows of 32 numbers do not fall into groups of 5; to leave it as it is: --qat.skip 'body",
    ),
    "--qat int8 --qat.granularity group": ("rows of 32 numbers do not fall into groups of 64",),
    "--qat int8 --qat.skip .": ("--qat int8: no linear layer to quantize in a Network, with skip=('.',)",),
    "--qat int8 --qat.skip (": ("--qat int8: ", "not regular expressions"),
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_is_refused(given, options, tmp_path):
    out = tmp_path / "run"
    assert_one_clear_line(command(*ask(options, given), "--out", out), *REFUSED[given])
    assert not out.exists()


REFUSED_BY_TYRO = {
    "--qat int8 --qat.freeze 2": "freeze=2.0: a fraction, from 0 to 1",
    "--qat int8 --qat.freeze nan": "freeze=nan: a fraction",
    "--qat int8 --qat.group-size 0": "group_size=0: a number of weights is expected",
    "--qat int2": "int4",
    "--qat int8 --qat.observer mse": "minmax",
    "--qat int8 --qat.bits 3": "--qat.bits",
}


@pytest.mark.parametrize("given", REFUSED_BY_TYRO)
def test_what_is_refused_while_options_are_read(given, options, tmp_path):
    said = command(*ask(options, given), "--out", tmp_path / "run")
    assert said.code == 2 and REFUSED_BY_TYRO[given] in said.err and "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


def test_weights_to_begin_with(options, stopped, halfway, tmp_path):
    """One that is NaN, by its place; and such as are integers already: of a run like this one, or of a folder."""
    out, bad, packed = (tmp_path / name for name in ("out", "bad", "packed"))
    plain = ["--width", "32", "--depth", "2"]
    shutil.copytree(last_checkpoint(halfway), bad)
    shutil.copytree(last_checkpoint(halfway), packed)
    for folder in (bad, packed):
        (folder / "manifest.json").unlink()
    network = model.hub.load(bad)
    with torch.no_grad():
        network.body.blocks[1].mlp.up.weight[3, 5] = math.nan
    model.hub.save(network, bad)
    said = command(*ask(further(options), "--qat int8"), *plain, "--init", bad, "--out", out)
    assert_one_clear_line(said, "in 'transformer.h.1.mlp.c_fc.weight' the value at [5, 3] is nan")
    model.hub.save(quantize_linears(model.hub.load(packed), "int8-dynamic"), packed)
    for folder, named in ((packed, packed), (stopped, last_checkpoint(stopped))):
        said = command(*ask(further(options), "--qat int8"), *plain, "--init", folder, "--out", out)
        assert_one_clear_line(said, f"--init {named} has weights in int8", "which cannot be trained")
        assert "--adapter" not in said.err  # that does not go with --qat
    assert not out.exists()


# ---- resumes


@pytest.mark.parametrize("given", ["--qat int4", "--qat int8", "--qat.freeze 0.1", "--qat.no-learned --qat.group-size 8"])
def test_a_resume_keeps_how_it_rounds(given, stopped):
    before = contents(stopped)
    said = command("--resume", stopped, *given.split())
    assert_one_clear_line(said, "--resume goes on with the run's own settings")
    assert contents(stopped) == before


SETTINGS_CHANGED = {
    'qat = "int8"': 'qat = "none"',
    'inputs = "static"': 'inputs = "dynamic"',
    "learned = true": "learned = false",
    'granularity = "tensor"': 'granularity = "channel"',
    "[qat]": '[qat]\nskip = ["blocks.1"]',
}


@pytest.mark.parametrize("was", SETTINGS_CHANGED)
def test_settings_of_another_run(was, stopped):
    path = stopped / "config.toml"
    text = path.read_text().replace("skip = []\n", "")
    assert text.count(was) == 1
    path.write_text(text.replace(was, SETTINGS_CHANGED[was]))
    before = contents(stopped)
    expected = WITHOUT if was.startswith("qat") else f"{last_checkpoint(stopped)} does not fit this run"
    assert_one_clear_line(command("--resume", stopped), expected)
    assert contents(stopped) == before


def replace(folder, name, tensors):
    """A file of a checkpoint replaced, or left out, and the manifest believes it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if tensors is None:
        (folder / name).unlink()
        del manifest["files"][name]
    else:
        save_file(tensors, folder / name)
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


LAYER = "weights.body.blocks.1.mlp.up"
MISSING = ["observer.low", "observer.high", "frozen", "input_zero", "input_log_scale", "weight_log_scale", "weight"]


@pytest.mark.parametrize("part", MISSING)
def test_something_is_missing(part, stopped):
    folder = last_checkpoint(stopped)
    tensors = load_file(folder / "raw.safetensors")
    del tensors[f"{LAYER}.{part}"]
    replace(folder, "raw.safetensors", tensors)
    before = contents(stopped)
    said = command("--resume", stopped)
    assert_one_clear_line(said, f"{folder} does not fit this run", f"{LAYER}.{part}".removeprefix("weights."))
    assert contents(stopped) == before


def test_all_weights_are_missing(stopped):
    folder = last_checkpoint(stopped)
    replace(folder, "raw.safetensors", None)
    assert_one_clear_line(command("--resume", stopped), f"{folder} does not fit this run")


@pytest.mark.parametrize("shape", [(3,), (1, 1, 1), (1,)])
@pytest.mark.parametrize("part", ["observer.low", "weight"])
def test_something_has_another_shape(part, shape, stopped):
    """Also where torch would fill the right one with it."""
    folder = last_checkpoint(stopped)
    tensors = load_file(folder / "raw.safetensors")
    tensors[f"{LAYER}.{part}"] = torch.ones(shape)
    replace(folder, "raw.safetensors", tensors)
    assert_one_clear_line(command("--resume", stopped), f"{folder} does not fit this run", "body.blocks.1.mlp.up")


# ---- steps that move nothing


IDS = torch.arange(3, 17).view(2, 7)
BATCH = {"input_ids": IDS, "labels": IDS}


def engine_of(freeze: int, learned: bool = False) -> Engine:
    network = randomized(tiny_config("llama"), dtype=torch.float32)
    prepare(network, QatConfig(inputs="static", learned=learned))
    optimizers = build_optimizer("sgd", network.named_parameters(), lambda name: "matrix", lr=1e-3)
    engine = Engine(Objective(network), optimizers, observers=Observers(network, freeze, Ranks()))
    engine.begin(BATCH)
    assert all(layer.is_observed and layer.pending is None for layer in engine.observers.layers)
    engine.objective.train()
    return engine


def state(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.weights().items()}


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def spoilt(engine: Engine):
    """A step with other text, in which the loss is NaN, though what the layers saw was finite."""
    honest = Objective.result

    def nan(self, hidden, labels):
        return Result({"loss": Term(honest(self, hidden, labels).terms["loss"].sum * math.nan, (labels != -100).sum())})

    with patch.object(Objective, "result", nan):
        return engine.train([{name: ids + 30 for name, ids in BATCH.items()}])


@pytest.mark.parametrize("learned", [False, True])
def test_a_step_that_is_skipped_moves_no_range(learned):
    """Nor does the next one learn of it."""
    engine, other = engine_of(9, learned), engine_of(9, learned)
    before = state(engine)
    assert not spoilt(engine).is_updated and engine.skipped == 1
    assert same(before, state(engine)) and all(layer.pending is None for layer in engine.observers.layers)
    for each in (engine, other):
        assert each.train([BATCH]).is_updated
    assert same(state(engine), state(other)) and not same(before, state(engine))


def test_observers_freeze_in_time_though_a_step_is_skipped():
    engine = engine_of(2)
    engine.train([BATCH])
    assert not spoilt(engine).is_updated
    before = state(engine)
    engine.train([{name: ids + 30 for name, ids in BATCH.items()}])
    ends = {name: value for name, value in before.items() if ".observer." in name}
    assert ends and same(ends, state(engine))


def test_nothing_is_observed_after_an_early_freeze():
    engine = engine_of(0)
    before = {name: value for name, value in state(engine).items() if ".observer." in name}
    engine.train([{name: ids + 30 for name, ids in BATCH.items()}])
    assert before and same(before, state(engine)) and all(layer.frozen for layer in qat_layers(engine.network).values())


def test_a_run_that_skips_a_batch(options, tmp_path):
    """A loss that is not a number: the ranges of the checkpoint after it are those of before."""
    run, honest, seen = tmp_path / "run", Objective.result, []

    def nan(self, hidden, labels):
        found = honest(self, hidden, labels).terms["loss"]
        seen.extend([1] * self.training)
        spoil = self.training and len(seen) == 2
        return Result({"loss": Term(found.sum * (math.nan if spoil else 1), found.count)})

    with patch.object(Objective, "result", nan):
        line = f"{STATIC} --on-nonfinite skip --save-every 1 --steps 3 --optimizer adamw --qat.freeze 1"
        said = command(*ask(options, line), "--out", run)
    assert said.code == 0 and "skipped step 2" in said.out, said.err
    one, two, three = (load_file(run / "checkpoints" / f"step-{step}" / "raw.safetensors") for step in (1, 2, 3))
    assert same(one, two) and not same({k: v for k, v in two.items() if ".observer." in k}, three)


def test_weights_that_are_no_numbers_are_not_saved(options, tmp_path):
    run = tmp_path / "run"
    said = command(*ask(options, f"{STATIC} --lr 1e38 --matrix-lr 1e38 --clip 0 --save-every 1"), "--out", run)
    assert_one_clear_line(said, "step 1", "a lower --lr")


def test_killed_between_step_and_save_it_begins_again(options, tmp_path):
    """Without a checkpoint the first ranges are taken anew, from the same batch."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    line = ask(options, f"{LEARNED} --steps 3")
    assert command(*line, "--out", whole).code == 0

    def die():
        raise KeyboardInterrupt

    with at_step(2, die):
        assert command(*line, "--out", run).code == 130
    assert not (run / "checkpoints").exists()
    assert command("--resume", run).code == 0
    one, other = (load_file(last_checkpoint(each) / "raw.safetensors") for each in (whole, run))
    assert one.keys() == other.keys() and same(one, other)
