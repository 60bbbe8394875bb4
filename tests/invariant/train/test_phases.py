"""Time by phase: nothing twice, nothing lost, and on a GPU no waiting; and how the end of a run is told."""

import time
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.flops import flops_per_token
from train.reports.phases import MAX_PENDING, Phases
from train.reports.rate import format_flops, matmul_rate, peak_memory, speed_report, utilization

CPU = torch.device("cpu")


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_phases_add_up(monkeypatch):
    clock, phases = Clock(monkeypatch), Phases(CPU)
    for _ in range(2):
        with phases("data"):
            clock.now += 1
        clock.now += 100  # outside of all phases
        with phases("validate"):
            clock.now += 2
            with phases("forward"):
                clock.now += 8
                with phases("data"):
                    clock.now += 16
            clock.now += 4
    assert phases.seconds() == {"data": 34, "validate": 12, "forward": 16}


def test_a_phase_that_fails_has_ended(monkeypatch):
    clock, phases = Clock(monkeypatch), Phases(CPU)
    with pytest.raises(KeyError), phases("forward"):
        clock.now += 3
        raise KeyError
    clock.now += 100
    with phases("save"):
        clock.now += 1
    assert phases.seconds() == {"forward": 3, "save": 1}


def test_overhead():
    phases, start = Phases(CPU), time.perf_counter()
    for _ in range(1000):
        with phases("forward"):
            pass
    assert (time.perf_counter() - start) / 1000 < 100e-6  # about 2 of them; a step has ten phases, and takes milliseconds


class Queue:
    """A GPU in its place: events that it passes later than the program records them."""

    def __init__(self, monkeypatch):
        self.now, self.passed, self.waits = 0.0, 0, 0
        queue, self.events = self, []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                self.number, self.at = len(queue.events), queue.now
                queue.events.append(self)

            def query(self):
                return self.number < queue.passed

            def synchronize(self):
                queue.waits, queue.passed = queue.waits + 1, self.number + 1

            def elapsed_time(self, other):
                assert self.query() and other.query(), "an event was read that has not happened"
                return (other.at - self.at) * 1000

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)


def test_on_a_gpu_nothing_waits_until_it_is_asked(monkeypatch):
    queue, phases = Queue(monkeypatch), Phases(torch.device("cuda"))
    for step in range(MAX_PENDING):
        with phases("forward"):
            queue.now += 2
        with phases("backward"):
            queue.now += 4
        queue.passed = max(0, 4 * step - 40)  # it runs ten steps behind
    assert queue.waits == 0 and len(phases._pending) <= MAX_PENDING + 24
    assert phases.seconds() == {"forward": 2 * MAX_PENDING, "backward": 4 * MAX_PENDING}
    assert queue.waits == 1 and not phases._pending


@pytest.mark.gpu
def test_on_a_real_gpu():
    device = torch.device("cuda")
    phases, large = Phases(device), torch.randn(4096, 4096, device=device)
    start = time.perf_counter()
    with phases("forward"):
        for _ in range(20):
            large @ large
    with phases("backward"):
        for _ in range(60):
            large @ large
    seconds = phases.seconds()
    assert sum(seconds.values()) <= time.perf_counter() - start
    assert seconds["backward"] == pytest.approx(3 * seconds["forward"], rel=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_machine_s_rate(dtype):
    start = time.perf_counter()
    rate = matmul_rate(CPU, dtype, seconds=0.3)
    assert time.perf_counter() - start < 3
    one = torch.randn(256, 256)
    began = time.perf_counter()
    for _ in range(20):
        one @ one
    naive = 20 * 2 * 256**3 / (time.perf_counter() - began)
    assert 1e8 < rate < 1e15
    assert dtype != torch.float32 or rate > 0.3 * naive


def test_utilization_is_palm_s_formula():
    """Appendix B: MFU = tokens/s · (6 N + 12 L H Q T) / P, whose attention counts all T · T pairs."""
    config = ModelConfig.preset("gpt2")
    flops = flops_per_token(config, 1024, skip_masked=False)
    matrices = 12 * 12 * 768**2 + 50257 * 768  # of the blocks, and the head
    expected = 100_000 * (6 * matrices + 12 * 12 * 12 * 64 * 1024) / 312e12
    assert utilization(flops, 100_000, 312e12) == pytest.approx(expected, rel=1e-12)


def test_the_end_of_a_run():
    flops = flops_per_token(ModelConfig.preset("gpt2"), 1024)
    seconds, memory = {"forward": 1.0, "backward": 2.0}, peak_memory(CPU)
    text = speed_report(seconds, 4.0, tokens_per_s=1234.5, flops=flops, rate=2e12, memory=memory)
    assert "1,234 tokens/s" in text and "MFU 49." in text and format_flops(2e12) in text
    assert text.count("25 %") == 2 and "50 %" in text and "the rest" in text
    assert "the rest" not in speed_report({"forward": 4.1}, 4.0, tokens_per_s=1, flops=flops, rate=1.0, memory=(1, "it"))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux shows it there")
def test_peak_memory_is_the_system_s():
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    size, what = peak_memory(CPU)
    assert size == pytest.approx(kib * 1024, rel=0.05) and what == "the process"
