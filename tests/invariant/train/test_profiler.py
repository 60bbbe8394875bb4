"""The profile of a few steps: which steps, what is written, and that a run may end at any moment."""

import gzip
import json
import re
import time

import pytest
import torch

import train.reports.profiler
from train.reports.profiler import Profiler

CPU = torch.device("cpu")


def work(size: int = 64) -> None:
    """One step, as it can be told from others: a product of its own size, and two sums."""
    x = torch.ones(size, size, requires_grad=True)
    (x @ x).sum().backward()


def profiled_run(folder, taken: int, **options) -> list[str]:
    """What a loop of so many steps is given to print."""
    profiler = Profiler(folder, CPU, **options)
    texts = []
    for _ in range(taken):
        work()
        texts.append(profiler.step())
    texts.append(profiler.close())
    assert profiler.close() is None  # a second time is harmless
    return [text for text in texts if text is not None]


def calls(text: str, operator: str) -> float:
    row = next(line.split() for line in text.splitlines() if line.split()[-1] == operator)
    return float(row[2])


@pytest.mark.parametrize(("steps", "seen"), [(9, 3), (5, 3), (4, 2), (3, 1)])
def test_what_is_written(tmp_path, steps, seen):
    began = time.perf_counter()
    (text,) = profiled_run(tmp_path / "profile", steps)
    assert text.startswith(f"{seen} step{'s' * (seen > 1)} profiled")
    clock = float(re.search(r"([\d.,]+) ms a step by the clock", text)[1].replace(",", "")) - 0.1  # as it is rounded
    assert clock * seen < 1000 * (time.perf_counter() - began)
    assert calls(text, "aten::mm") == 3  # forward, and two in the backward; a step
    assert (tmp_path / "profile" / "operators.txt").read_text(encoding="utf-8") == text + "\n"
    events = json.loads((tmp_path / "profile" / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 3 * seen
    shares = [float(line.split()[1].rstrip("%")) for line in text.splitlines()[2:]]
    assert sum(shares) == pytest.approx(100, abs=2) and shares[0] == max(shares[:-1])


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_too_short_leaves_nothing(tmp_path, steps):
    assert profiled_run(tmp_path / "profile", steps) == []
    assert not (tmp_path / "profile").exists()


def test_other_steps(tmp_path):
    (text,) = profiled_run(tmp_path, 3, steps=2, skip=0)
    assert text.startswith("2 steps profiled")


def test_a_large_trace_is_compressed(tmp_path, monkeypatch):
    monkeypatch.setattr(train.reports.profiler, "COMPRESS_FROM", 100)
    profiled_run(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["operators.txt", "trace.json.gz"]
    assert json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]


def test_training_is_not_changed(tmp_path):
    """The profiler looks on: the numbers are the same."""

    def run(profiler) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(8, 8, generator=generator).requires_grad_()
        for _ in range(6):
            (weight @ weight).square().mean().backward()
            with torch.no_grad():
                weight -= 0.01 * weight.grad
            if profiler is not None:
                profiler.step()
        return weight

    assert run(Profiler(tmp_path, CPU)).equal(run(None))


@pytest.mark.gpu
def test_kernels_on_a_gpu(tmp_path):
    profiler, x = Profiler(tmp_path, torch.device("cuda")), torch.randn(2048, 2048, device="cuda")
    texts = []
    for _ in range(6):
        x = (x @ x).tanh()
        texts.append(profiler.step())
    (text,) = (text for text in texts if text)
    assert "on the GPU" in text and calls(text, "aten::mm") == 1
