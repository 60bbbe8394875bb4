"""Runs of several ranks under torchrun: a rank that dies, a restart, a signal, and the run that goes on with fewer."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import model.__main__ as model_command
import model.hub
from tests.ranks import in_two_ranks
from tests.runs import (
    ROOT,
    STEPS,
    arguments,
    assert_same_end,
    command,
    further,
    last_checkpoint,
    steps_of,
    wait_for_step,
    write_corpus,
)
from train.engine import Engine
from train.parallel.mesh import Mesh
from train.parallel.parallelize import replicated
from train.parallel.ranks import OtherRankError, Ranks, own_rows
from train.reports.log import read_metrics
from train.runs.checkpoint import step_of
from train.runs.sharded import ShardedTensors

CHANGES = {"optimizer": "adamw", "lr": "1e-3", "dropout": "0.0", "save-every": "20"}


@contextmanager
def torchrun(*options: object, restarts: int = 0) -> Iterator[subprocess.Popen]:
    """`torchrun --nproc-per-node 2 -m train …`; nothing of it outlives the block."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    line += ["--standalone", "-m", "train", *map(str, options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as running:
        try:
            yield running
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)


def workers(agent: subprocess.Popen) -> list[int]:
    """Process numbers of the ranks, the first one first."""
    found = []
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = dict(part.partition("=")[::2] for part in status.read_text(errors="replace").split("\0"))
            if f"\nPPid:\t{agent.pid}\n" in (status.parent / "status").read_text():
                found.append((environment.get("RANK", ""), int(status.parent.name)))
        except OSError:
            continue
    return [number for rank, number in sorted(found) if rank]


def test_a_restart_does_not_go_on_with_another_run(options, finished, monkeypatch):
    """The first attempt is refused, as the folder holds a run; the second must not take that for its own."""
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    said = command(*options, "--optimizer", "muon", "--steps", 200, "--out", finished)
    assert said.code == 2 and "already holds another run (steps = 160, not 200)" in said.err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_norms_compute_alike_in_parts(precision, options, tmp_path):
    """A LayerNorm takes no weights in 16 bits beside float32 inputs; with and without parts, nearly the same numbers."""
    changes = CHANGES | {"precision": precision, "steps": "12", "eval-every": "6"}
    run, whole = tmp_path / "run", tmp_path / "whole"
    with torchrun(*options, *arguments(changes), "--mesh", "shard", "--recompute", "blocks", "--out", run) as running:
        _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    assert command(*options, *arguments(changes), "--out", whole).code == 0
    assert losses(run) == pytest.approx(losses(whole), abs=2e-3)


@pytest.fixture(scope="module")
def as_two(options, tmp_path_factory) -> Path:
    """An uninterrupted run of two ranks."""
    run = tmp_path_factory.mktemp("two") / "run"
    with torchrun(*options, *arguments(CHANGES), "--out", run) as running:
        out, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    assert "2 ranks (replicate)" in out and out.count("done at step") == 1
    return run


def test_two_ranks_end_where_one_does(as_two, uninterrupted):
    alone = uninterrupted(**CHANGES)
    assert steps_of(alone) == steps_of(as_two)
    assert losses(as_two) == pytest.approx(losses(alone), abs=2e-5)  # sums in another order, over 160 steps
    one, two = ([row["tokens"] for row in read_metrics(run / "metrics.jsonl")] for run in (alone, as_two))
    assert one == two


@pytest.mark.slow
def test_two_ranks_train_one_adapter(options, uninterrupted, tmp_path):
    """AdaLoRA: its penalty is of the weights, not of the batch, and both ranks let the same ranks of matrices go."""
    changes = {"steps": "40", "eval-every": "20", "adapter": "adalora", "adalora.every": "4", "adalora.warmup": "0.1"}
    changes |= {"init": str(uninterrupted(**CHANGES))}  # without dropout, whose noise each rank draws for itself
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert command(*further(options), *arguments(changes), "--out", alone).code == 0
    with torchrun(*further(options), *arguments(changes), "--out", two) as running:
        _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    assert losses(two) == pytest.approx(losses(alone), abs=2e-5)
    kept = [load_file(last_checkpoint(run) / "raw.safetensors") for run in (alone, two)]
    masks = [{name: value for name, value in each.items() if name.endswith("kept")} for each in kept]
    assert masks[0] and all(torch.equal(value, masks[1][name]) for name, value in masks[0].items())
    assert not all(value.all() for value in masks[0].values())


@pytest.mark.slow
def test_two_ranks_draw_one_mixture(options, tmp_path):
    """The same shares are drawn from the same rows, and a further corpus has the same loss; so it is after a kill."""
    at = options.index("--corpus")
    write_corpus(tmp_path / "other", documents=12, seed=5)
    mixed = [*options[:at], *options[at + 2 :], "--corpus", f"a={options[at + 1]}:1", f"b={tmp_path}/other:1"]
    changes = CHANGES | {"steps": "40", "eval-every": "20", "mix": "documents", "eval-corpus": f"more={tmp_path}/other"}
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert command(*mixed, *arguments(changes), "--out", alone).code == 0
    with torchrun(*mixed, *arguments(changes), "--out", two, restarts=1) as running:
        wait_for_step(running, two, 26)
        os.kill(workers(running)[1], signal.SIGKILL)
        _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    rows = [read_metrics(run / "metrics.jsonl") for run in (alone, two)]
    drawn = [[(row["step"], row["drawn_a"], row["drawn_b"]) for row in each if row["split"] == "train"] for each in rows]
    assert drawn[0] == drawn[1] and len({share for _, share, _ in drawn[0]}) > 5
    more = [[row["loss_more"] for row in each if row["split"] == "validation"] for each in rows]
    assert more[0] == pytest.approx(more[1], abs=2e-5) and losses(two) == pytest.approx(losses(alone), abs=2e-5)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_a_restart_goes_on(victim, options, as_two, tmp_path):
    run = tmp_path / "run"
    with torchrun(*options, *arguments(CHANGES), "--out", run, restarts=1) as running:
        wait_for_step(running, run, 50)
        os.kill(workers(running)[victim], signal.SIGKILL)
        out, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    assert "another rank was gone" in err and "-m train --resume" in err
    assert re.search(r"steps (40|60|80) to 160", out), out
    assert_same_end(run, as_two)


@pytest.mark.slow
def test_without_restarts_the_reason_is_told_and_one_rank_can_go_on(options, as_two, tmp_path):
    run = tmp_path / "run"
    with torchrun(*options, *arguments(CHANGES), "--mesh", "shard", "--out", run) as running:
        wait_for_step(running, run, 50)
        began = time.monotonic()
        os.kill(workers(running)[1], signal.SIGKILL)
        _, err = running.communicate(timeout=180)
    assert time.monotonic() - began < 60 and running.returncode != 0
    assert "error: rank 0: at step" in err and "another rank was gone" in err and f"--resume {run}" in err

    assert (last_checkpoint(run) / "tensors-00002-of-00002.safetensors").is_file()
    said = command("--resume", run)
    assert said.code == 0, said.err
    assert step_of(last_checkpoint(run)) == STEPS
    assert losses(run) == pytest.approx(losses(as_two), abs=2e-5)


@pytest.mark.slow
def test_a_signal_saves_in_parts_which_become_one_folder(options, tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "folder"
    with torchrun(*options, *arguments(CHANGES), "--mesh", "shard", "--ema", "0.9", "--out", run) as running:
        wait_for_step(running, run, 30)
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=180)
    assert "stopped on SIGTERM, saved at step" in out, (out, err)
    assert f"python -m model export {run} --out" in out
    stopped = step_of(last_checkpoint(run))
    assert f"saved at step {stopped}" in out

    assert model_command.main(["generate", str(run), "--prompt", "the"]) == 2
    assert "python -m model export" in capsys.readouterr().err
    shutil.rmtree(folder, ignore_errors=True)
    assert model_command.main(["export", str(last_checkpoint(run)), "--out", str(folder)]) == 0
    assert model_command.main(["generate", str(folder), "--prompt", "the", "--max-new-tokens", "5"]) == 0
    network = model.hub.load(folder)
    stored = ShardedTensors(last_checkpoint(run))
    assert all(torch.equal(parameter, stored[f"averages.{name}"]) for name, parameter in network.named_parameters())
    assert any(not torch.equal(parameter, stored[f"weights.{name}"]) for name, parameter in network.named_parameters())
    for name in ("config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (last_checkpoint(run) / name).read_bytes(), name
    assert model_command.main(["export", str(run), "--out", str(folder)]) == 2  # it is not empty
    assert "not an empty folder" in capsys.readouterr().err

    with torchrun("--resume", run) as running:
        out, err = running.communicate(timeout=180)
    assert running.returncode == 0 and f"steps {stopped} to {STEPS}" in out, err


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(options, tmp_path):
    run = tmp_path / "run"
    with torchrun(*options, *arguments(CHANGES), "--out", run) as running:
        wait_for_step(running, run, 30)
        os.kill(workers(running)[1], signal.SIGTERM)
        out, err = running.communicate(timeout=180)
    assert running.returncode == 0 and f"stopped on SIGTERM, saved at step {step_of(last_checkpoint(run))}" in out, err
    assert step_of(last_checkpoint(run)) < STEPS


def meet(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, rank)
    with pytest.raises(OSError if rank else OtherRankError), ranks.together():
        if rank:
            raise OSError("no space left on this rank")
    assert ranks.max(rank) == 1 and ranks.any(rank == 1) and not ranks.any(False)
    assert ranks.broadcast({"rank": rank, "name": "ä" * (rank + 1)}) == {"rank": 0, "name": "ä"}

    def make() -> bool:
        made = not (folder / "made").exists()
        (folder / "made").touch()
        return made

    assert ranks.local_first(make) == (rank == 0)
    network = nn.Linear(1, 1)
    nn.init.constant_(network.weight, torch.nan if rank else 1.0)
    assert not Engine.is_finite(SimpleNamespace(network=network, ranks=ranks))  # or the other would save alone
    layer = nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    wrapped = replicated(layer, Mesh(replicate=2), torch.device("cpu"))
    wrapped(torch.full((1, 3), 1.0 + 2 * rank, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad.tolist() == [[2.0] * 3]
    dist.barrier()


def test_values_that_ranks_exchange(tmp_path):
    in_two_ranks(meet, tmp_path)


@pytest.mark.parametrize("world", range(1, 6))
def test_every_rank_has_rows_and_every_row_a_rank(world):
    parts = [own_rows({"rows": torch.arange(5)}, Ranks(rank, world))["rows"] for rank in range(world)]
    assert torch.equal(torch.cat(parts), torch.arange(5)) and {5 // world, -(-5 // world)} >= {len(part) for part in parts}
