"""Adapters on a card: every method trains, compiled and in 16 bits, ends where it does on the CPU, goes on after a stop."""

import pytest

from tests.gpu.test_engine import last_loss, on_card  # noqa: F401, fixture
from tests.runs import command, further, stopped_at

pytestmark = pytest.mark.gpu
WAYS = {
    "lora --precision fp32 --compile off": 2e-3,
    "lora --precision fp32 --compile on": 2e-3,
    "lora --precision bf16 --compile on --recompute selective": 0.1,
    "lora --precision fp16 --lora.targets query-value": None,
    "dora --precision bf16 --compile on": None,
    "adalora --precision bf16 --compile on": None,
    "ia3 --precision bf16 --compile on": None,
    "adapter --precision bf16 --compile on": None,
    "prompt --precision bf16 --compile on --context 44": None,
    "ptuning --precision bf16 --compile on --context 44": None,
    "prefix --precision bf16 --compile on --context 44": None,
}


@pytest.fixture(scope="module")
def base(on_card, tmp_path_factory):  # noqa: F811
    run = tmp_path_factory.mktemp("base") / "run"
    assert command(*on_card, "--precision", "fp32", "--out", run).code == 0
    return run


@pytest.fixture(scope="module")
def on_cpu(on_card, base, tmp_path_factory) -> float:  # noqa: F811
    run = tmp_path_factory.mktemp("cpu") / "run"
    options = [*further(on_card), "--init", base, "--adapter", "lora", "--device", "cpu", "--precision", "fp32"]
    assert command(*options, "--out", run).code == 0
    return last_loss(run)


@pytest.mark.parametrize("way", WAYS)
def test_every_method_trains(way, on_card, base, on_cpu, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    said = command(*further(on_card), "--init", base, "--adapter", *way.split(), "--out", run)
    assert said.code == 0, said.err
    if WAYS[way] is not None:
        assert last_loss(run) == pytest.approx(on_cpu, abs=WAYS[way])
    assert last_loss(run) < last_loss(base) + 0.1  # a prompt first disturbs


def test_resumed_on_the_card(on_card, base, tmp_path):  # noqa: F811
    options = [*further(on_card), "--init", base, "--adapter", "lora", "--precision", "fp16", "--log-every", 1]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert command(*options, "--out", whole).code == 0
    assert stopped_at(10, *options, "--out", run).code == 130
    assert command("--resume", run).code == 0
    assert last_loss(run) == pytest.approx(last_loss(whole), abs=1e-3)
