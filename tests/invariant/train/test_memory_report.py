"""The memory report of real steps, and which settings it proposes where there is too little."""

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.init import build_network
from model.memory import training_memory
from model.training import Training
from tests.conftest import tiny_config
from train.objective import MaskedObjective
from train.optimizers.build import build_optimizer
from train.recompute import recompute
from train.reports.memory import MARGIN, MeasuredMemory, changed_options, measure_step, memory_report, suggest_options
from train.step import train_step

CPU = torch.device("cpu")
GIB = 2**30
GPT2 = ModelConfig.preset("gpt2", dropout=0.0, attention_dropout=0.0)


def measured(config: ModelConfig, training: Training) -> MeasuredMemory:
    """The second step of a masked-language run, 15 % of whose labels are scored."""
    network = recompute(build_network(config, seed=0), training.recompute).train()
    objective = MaskedObjective(network)
    optimizers = build_optimizer("adamw", network.named_parameters(), lambda name: "matrix", lr=1e-4)
    ids = torch.randint(3, 61, (training.batch_size, training.context))
    labels = ids.where(torch.rand(ids.shape) < training.scored, -100)
    batches = [{"input_ids": ids, "labels": labels}] * training.accumulate

    def step(phase=None):
        return train_step(objective, batches, optimizers, **({"phase": phase} if phase else {}))

    step()
    return measure_step(step, CPU, network.parameters(), optimizers.named_state().values())


@pytest.mark.parametrize("kind", ["none", "blocks", "selective"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_report_of_a_masked_step(kind, accumulate):
    sizes = {"width": 64, "depth": 4, "kv_heads": 4, "mlp_width": 256, "vocab_size": 2000, "context": 64}
    config = tiny_config("bert", **sizes)
    training = Training(6, 64, recompute=kind, scored=0.15, accumulate=accumulate, device="cpu")
    seen, ours = measured(config, training), training_memory(config, training)
    for part in ("weights", "optimizer", "gradients", "forward", "peak"):
        assert getattr(ours, part) == pytest.approx(getattr(seen, part), rel=0.05), part
    lines = memory_report(config, training, seen).splitlines()
    assert [len(line) for line in lines[:6]] == [len(lines[0])] * 6 and len(lines) == 7
    assert "predicted" in lines[0] and "measured" in lines[0] and "at its highest" in lines[5]


def test_recomputation_keeps_less():
    sizes = {"width": 64, "depth": 8, "mlp_width": 256, "vocab_size": 61, "context": 64}
    training = Training(4, 64, scored=0.15, device="cpu")
    kept, blocks, selective = (
        measured(tiny_config("bert", kv_heads=4, **sizes), replace(training, recompute=kind)).forward
        for kind in ("none", "blocks", "selective")
    )
    assert blocks < 0.15 * kept < 0.5 * kept < selective < 0.8 * kept


def test_report_names_the_error():
    training = Training(device="cpu")
    ours = training_memory(GPT2, training)
    parts = (ours.weights, ours.optimizer, ours.gradients, ours.forward)
    seen = MeasuredMemory(*map(int, parts), round(ours.peak / 1.02))
    assert "the prediction is 2.0% above what was measured" in memory_report(GPT2, training, seen)
    assert "2.0% below" in memory_report(GPT2, training, replace(seen, peak=round(ours.peak / 0.98)))


@pytest.mark.parametrize(
    ("budget", "typed"),
    [
        (19.0, "--loss chunked"),
        (12.0, "--batch-size 16 --accumulate 2 --loss chunked"),
        (4.0, "--batch-size 2 --accumulate 16 --loss chunked"),
        (3.2, "--batch-size 1 --accumulate 32"),
        (2.9, "--batch-size 1 --accumulate 32 --recompute selective"),
        (2.75, "--batch-size 2 --accumulate 16 --recompute blocks --loss chunked"),
    ],
)
def test_what_would_fit(budget, typed):
    asked = Training(batch_size=32, precision="bf16")
    text = suggest_options(GPT2, asked, budget * GIB)
    assert text.endswith(f": {typed}"), text
    words = typed.split()
    changes = dict(zip((name[2:].replace("-", "_") for name in words[::2]), words[1::2], strict=True))
    changes = {name: int(value) if value.isdigit() else value for name, value in changes.items()}
    way = replace(asked, **changes)
    assert way.batch_size * way.accumulate == 32  # the same tokens a step
    assert training_memory(GPT2, way).peak * (1 + MARGIN) <= budget * GIB
    assert changed_options(asked, way) == typed


def test_a_batch_counts_the_texts_of_all_ranks():
    text = suggest_options(GPT2, Training(batch_size=32, precision="bf16"), 12 * GIB, ranks=4)
    assert text.endswith(": --batch-size 64 --accumulate 2 --loss chunked")


def test_recomputation_is_proposed_where_nothing_else_helps():
    asked = Training(batch_size=1, context=1024, precision="bf16", loss="chunked")
    needed = training_memory(ModelConfig.preset("llama-3.1-8b"), replace(asked, recompute="blocks", context=8192)).peak
    text = suggest_options(ModelConfig.preset("llama-3.1-8b"), replace(asked, context=8192), needed * (1 + MARGIN) + 1)
    assert text.endswith(": --recompute blocks")


def test_nothing_fits_or_all_does():
    asked = Training(batch_size=8, precision="bf16")
    assert "Nothing of this would fit" in suggest_options(GPT2, asked, 1.5 * GIB)
    assert "1.39 GiB; there are 1.50 GiB" in suggest_options(GPT2, asked, 1.5 * GIB)
    assert "something else holds memory" in suggest_options(GPT2, asked, 80 * GIB)
