"""bfloat16 is chosen only where every round of the measurement agrees."""

import torch

import train.precision
from train.precision import autocast, bf16_speedup, choose_precision


def test_one_slow_neighbour_does_not_decide(monkeypatch):
    """A clock that makes float32 look slow in all rounds but one: the one that disagrees wins."""

    def clock(ratios):
        now, steps = 0.0, iter([s for ratio in ratios for s in (0, ratio, 0, 1)])
        while True:
            now += next(steps)
            yield now

    for last, chosen in ((0.9, "fp32"), (5.0, "bf16")):
        ticks = clock([5.0] * 6 + [last])  # two small rounds, five that count
        monkeypatch.setattr(train.precision.time, "perf_counter", lambda ticks=ticks: next(ticks))
        assert choose_precision(torch.device("cpu"), 128, 352) == chosen


def test_emulated_bfloat16_is_told_by_a_small_try(monkeypatch):
    rows = []
    linear = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: rows.append(len(x)) or linear(self, x))
    ticks = iter([0, 1, 1, 101] * 2)  # float32: 1 s, bfloat16: 100 s
    monkeypatch.setattr(train.precision.time, "perf_counter", lambda: next(ticks))
    assert bf16_speedup(128, 352) == 0.01 and len(rows) == 4 and max(rows) < 500


def test_autocast_is_what_it_says():
    x, weight = torch.randn(4, 4), torch.randn(4, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision)():
            assert (x @ weight).dtype == dtype
