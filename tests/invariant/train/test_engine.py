"""The engine through the real command: each way of training ends where it would have, stopped or not, and says what it did."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import model.hub
from model.weights import role_of
from tests.conftest import randomized, tiny_config
from tests.runs import STEPS, arguments, assert_same_end, command, last_checkpoint, stopped_at
from train.engine import Engine
from train.evaluate import evaluate
from train.objective import Objective
from train.optimizers.build import build_optimizer
from train.optimizers.ema import EMA
from train.optimizers.scaler import GradScaler
from train.parallel.mesh_sizes import mesh_sizes
from train.parallel.ranks import Ranks
from train.reports.log import read_metrics
from train.runs.errors import TrainError
from train.tasks.clm import CausalTask
from train.token_task import BlockBatches

WAYS = {
    "fp16": {"precision": "fp16", "optimizer": "adamw"},
    "bf16-pure": {"precision": "bf16-pure", "optimizer": "muon"},
    "averages": {"ema": "0.9", "optimizer": "muon"},
    "sgd": {"optimizer": "sgd", "lr": "0.05", "schedule": "slanted_triangular"},
    "recomputed": {"recompute": "blocks", "recompute-every": "2", "optimizer": "adamw"},
    "loss": {"loss": "chunked", "label-smoothing": "0.1", "z-loss": "1e-4", "optimizer": "adamw"},
}


LONG = ("fp16", "bf16-pure")  # 16-bit products are emulated where a CPU has none


@pytest.mark.parametrize("way", [pytest.param(way, id=n, marks=[pytest.mark.slow] * (n in LONG)) for n, way in WAYS.items()])
def test_stopped_and_resumed_ends_in_the_same_bytes(way, options, uninterrupted, tmp_path):
    whole, run = uninterrupted(**way), tmp_path / "run"
    said = stopped_at(50, *options, *arguments(way), "--out", run)
    assert said.code == 130, said.err
    said = command("--resume", run)
    assert said.code == 0, said.err
    assert_same_end(run, whole)


def test_recomputation_changes_nothing(uninterrupted):
    """Dropout 0.1 included: the same noise the second time."""
    plain, again = (
        load_file(last_checkpoint(uninterrupted(**way)) / "model.safetensors")
        for way in ({"optimizer": "adamw"}, WAYS["recomputed"])
    )
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_sixteen_bits_are_stored_where_asked(uninterrupted):
    folder = last_checkpoint(uninterrupted(**WAYS["bf16-pure"]))
    state = load_file(folder / "optimizer.safetensors") | load_file(folder / "model.safetensors")
    assert {value.dtype for name, value in state.items() if not name.endswith(".step")} == {torch.bfloat16}
    folder = last_checkpoint(uninterrupted(**WAYS["fp16"]))
    state = load_file(folder / "optimizer.safetensors") | load_file(folder / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_fp16_logs_its_scale(uninterrupted):
    """It begins at 2^16; each step that is skipped halves it, and nothing else does."""
    run = uninterrupted(**WAYS["fp16"])
    scales = [row["loss_scale"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "train"]
    engine = json.loads((last_checkpoint(run) / "state.json").read_text())["engine"]
    assert scales[-1] == engine["scaler"]["scale"] == 2.0 ** (16 - engine["skipped"])
    assert engine["step"] == STEPS and engine["skipped"] < 8
    steps = load_file(last_checkpoint(run) / "optimizer.safetensors")["optimizer.body.norm.weight.step"]
    assert int(steps) == STEPS - engine["skipped"]


def test_averages_are_what_is_used_and_raw_weights_what_goes_on(uninterrupted):
    folder = last_checkpoint(uninterrupted(**WAYS["averages"]))
    used = dict(model.hub.load(folder).named_parameters())
    averages, raw = load_file(folder / "averages.safetensors"), load_file(folder / "raw.safetensors")
    assert int(averages["averages.updates"]) == STEPS
    for name, parameter in used.items():
        assert torch.equal(parameter, averages[f"averages.{name}"])
    assert any(not torch.equal(parameter, raw[f"weights.{name}"]) for name, parameter in used.items())


def test_averages_are_what_is_validated_and_sampled(options, tmp_path, monkeypatch):
    run, seen = tmp_path / "run", {}

    def weights(network):
        return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    def evaluated(objective, *inputs, **settings):
        seen["validated"] = weights(objective.network)
        return evaluate(objective, *inputs, **settings)

    def sampled(self, network, device):
        seen["sampled"] = weights(network)
        return "", ""

    monkeypatch.setattr("train.loop.evaluate", evaluated)
    monkeypatch.setattr(CausalTask, "sample", sampled)
    assert command(*options, "--steps", 4, "--ema", 0.9, "--sample-every", 4, "--out", run).code == 0
    averages = load_file(last_checkpoint(run) / "averages.safetensors")
    for what in ("validated", "sampled"):
        assert all(torch.equal(value, averages[f"averages.{name}"]) for name, value in seen[what].items()), what


def small_engine(seed: int = 0, rank: int = 0) -> Engine:
    network = randomized(tiny_config("gpt2"), dtype=torch.float32).train()
    optimizers = build_optimizer("adamw", network.named_parameters(), lambda name: role_of(network.config, name), lr=1e-3)
    averages, scaler = EMA(network.named_parameters(), 0.9), GradScaler(enabled=True)
    return Engine(Objective(network), optimizers, averages=averages, scaler=scaler, ranks=Ranks(rank), seed=seed)


def batch() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 61, (2, 9))
    return [{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}]


def test_noise_is_of_the_seed_the_step_and_the_rank():
    """Each rank drops its own numbers; but what all of them hold, all of them must round alike."""
    dropout, rounding = {}, {}
    for seed in (0, 1):
        for rank in (0, 1):
            engine = small_engine(seed, rank)
            for step in (0, 1):
                engine.train(batch())
                dropout[seed, rank, step] = torch.initial_seed()
                rounding[seed, rank, step] = engine.rounding.initial_seed()
    assert len(set(dropout.values())) == 8 and len(set(rounding.values())) == 4
    assert all(value == rounding[seed, 1 - rank, step] for (seed, rank, step), value in rounding.items())


def test_a_skipped_step_moves_no_average_and_is_counted(monkeypatch, tmp_path):
    """And all of it is found again in a checkpoint."""
    engine = small_engine()
    engine.train(batch())
    before = {name: value.clone() for name, value in engine.tensors().items()}
    with monkeypatch.context() as patched:
        patched.setattr(engine.scaler, "scale", lambda loss: loss * torch.inf)
        assert not engine.train(batch()).is_updated
    after = engine.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    state = engine.state()
    assert (state["step"], state["skipped"], state["scaler"]["scale"], state["scaler"]["_growth_tracker"]) == (2, 1, 2.0**15, 0)

    engine.save(tmp_path)
    other = small_engine()
    other.load(tmp_path, json.loads(json.dumps(engine.state())))
    again = other.tensors()
    assert other.state() == engine.state() and again.keys() == after.keys()
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert any(not torch.equal(after[f"weights.{n}"], after[f"averages.{n}"]) for n, _ in engine.network.named_parameters())


def test_smoothing_is_for_training_alone(uninterrupted):
    """What is validated is the loss itself: it compares with other runs'."""
    run = uninterrupted(**WAYS["loss"])
    rows = read_metrics(run / "metrics.jsonl")
    validation = [row["loss"] for row in rows if row["split"] == "validation"][-1]
    smoothed = [row["loss"] for row in rows if row["split"] == "train"][-1]
    plain = [row["loss"] for row in read_metrics(uninterrupted(optimizer="adamw") / "metrics.jsonl") if row["split"] == "train"]
    assert smoothed > plain[-1] + 0.2 and validation < smoothed


def test_a_resume_draws_no_batch_of_the_past(options, halfway, monkeypatch):
    """So that it takes the same time at any step."""
    asked, batches = [], BlockBatches.batches
    monkeypatch.setattr(BlockBatches, "batches", lambda self, step, policy=None: asked.append(step) or batches(self, step))
    assert command("--resume", halfway).code == 0
    assert asked == list(range(70, STEPS))  # each once


def test_what_a_resume_may_be_given(options, tmp_path):
    run = tmp_path / "run"
    assert stopped_at(4, *options, "--out", run).code == 130
    before = (run / "config.toml").read_text()
    said = stopped_at(12, "--resume", run, "--profile", "--memory-report", "--mesh", "shard", "--on-nonfinite", "skip")
    assert said.code == 130, said.err
    assert "memory of a step" in said.out and "the prediction is" in said.out
    assert "3 steps profiled" in said.out and "aten::" in (run / "profile" / "operators.txt").read_text()
    assert json.loads((run / "profile" / "trace.json").read_text())["traceEvents"]
    assert (run / "config.toml").read_text() == before  # for this session alone
    said = command("--resume", run, "--lr", 1e-3)
    assert said.code == 2 and "--device --threads --mesh --on-nonfinite" in said.err


def test_a_resume_may_be_quiet(halfway):
    said = stopped_at(72, "--resume", halfway, "--no-verbose")
    assert said.code == 130 and "network  " not in said.out and "stopped on SIGINT" in said.out, said.err
    settings = halfway / "config.toml"
    settings.write_text(settings.read_text().replace("verbose = true", "verbose = false"))
    assert "network  " not in stopped_at(74, "--resume", halfway).out
    assert "network  " in stopped_at(76, "--resume", halfway, "--verbose").out  # though that is the default


def test_the_end_says_where_time_went(finished, tmp_path, options):
    said = stopped_at(20, *options, "--out", tmp_path / "run")
    for words in ("tokens/s · MFU", "GFLOP/s that this machine reaches", "at its highest", "forward", "backward", "saving"):
        assert words in said.out, words


@pytest.mark.parametrize(
    "text, world, words",
    [
        ("replicate=3", 4, "does not fit 4 ranks"),
        ("replicate=2,shard=4", 4, "does not fit 4 ranks"),
        ("shard,replicate", 4, "both lack a size"),
        ("shard=0", 4, "not AXIS or AXIS=SIZE"),
        ("shards", 4, "the axes are replicate, shard"),
        ("tensor=2", 4, "not built yet"),
        ("", 4, "not AXIS or AXIS=SIZE"),
        ("shard=2", 1, "does not fit 1 rank;"),
    ],
)
def test_a_mesh_that_cannot_be(text, world, words):
    with pytest.raises(TrainError, match=words):
        mesh_sizes(text, world)


def test_a_mesh_is_refused_before_anything_is_done(options, tmp_path):
    run = tmp_path / "run"
    said = command(*options, "--mesh", "shard=2", "--out", run)
    assert said.code == 2 and "--mesh shard=2 does not fit 1 rank;" in said.err and not run.exists()


def test_restarts_need_a_name(options, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    said = command(*options)
    assert said.code == 2 and "give --out" in said.err


def test_triton_needs_a_card(options, tmp_path):
    said = command(*options, "--loss", "triton", "--out", tmp_path / "run")
    assert said.code == 2 and "--loss triton needs a CUDA device" in said.err and not (tmp_path / "run").exists()


def test_a_checkpoint_in_parts_has_both_files_of_settings(tmp_path):
    """generation_config.json too, which an export hands on."""
    network = randomized(tiny_config("llama"), dtype=torch.float32)
    network.generation = {"eos_token_id": [2, 5], "top_k": 7}
    engine = SimpleNamespace(network=network, mesh=SimpleNamespace(shard=2, is_writer=False), ranks=Ranks())
    Engine.save(engine, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json"}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == network.generation
