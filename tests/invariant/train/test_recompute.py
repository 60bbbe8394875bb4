"""Recomputed blocks: the same gradients, bit for bit, from less memory and more forwards."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import CheckpointPolicy

from tests.conftest import RATES, TINY_FAMILIES, randomized, tiny_config
from train.objective import Objective
from train.parallel.ranks import disconnect
from train.recompute import block_lists, expensive_operators, recompute, save_products

WAYS = [("blocks", 1), ("blocks", 2), ("selective", 1)]
DROPPED = dict.fromkeys(RATES, 0.1)


def gradients(network, mode="none", every=1, cast=nullcontext, prepare=lambda block: None) -> dict[str, torch.Tensor | None]:
    """name -> gradient of one forward and backward in training mode, always of the same batch and random numbers."""
    network = recompute(copy.deepcopy(network), mode, every).train()
    for block in (block for blocks in block_lists(network) for block in blocks):
        prepare(block)
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    with cast():
        term = Objective(network)({"input_ids": ids, "labels": ids}).terms["loss"]
    term.sum.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def equal(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys()
    return all((a is None and b is None) or (a is not None and b is not None and a.equal(b)) for a, b in zip_values(one, other))


def zip_values(one: dict, other: dict):
    return zip(one.values(), other.values(), strict=True)


@pytest.mark.parametrize(("mode", "every"), WAYS)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_gradients_are_the_same_with_dropout(family, mode, every):
    network = randomized(tiny_config(family, **DROPPED))
    assert equal(gradients(network), gradients(network, mode, every))


@pytest.mark.parametrize("mode", ["blocks", "selective"])
def test_mutant_that_forgets_the_random_state_is_caught(mode, monkeypatch):
    network, real = randomized(tiny_config("llama", **DROPPED)), torch.utils.checkpoint.checkpoint

    def forgetful(*inputs, preserve_rng_state, **options):
        return real(*inputs, preserve_rng_state=False, **options)

    expected = gradients(network)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", forgetful)
    assert not equal(expected, gradients(network, mode))


def frozen(family: str):
    """All frozen but one matrix in each block, as an adapter is: no block's input needs a gradient before the first one."""
    network = randomized(tiny_config(family, **DROPPED)).requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith("attention.out.weight"))
    return network


@pytest.mark.parametrize(("mode", "every"), WAYS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "bart"])
def test_a_frozen_base_keeps_its_adapters_gradients(family, mode, every):
    network = frozen(family)
    found = gradients(network, mode, every)
    assert equal(gradients(network), found)
    assert all((found[name] is not None) == p.requires_grad for name, p in network.named_parameters())


def test_mutant_that_is_reentrant_loses_an_adapters_gradient(monkeypatch):
    network, real = frozen("llama"), torch.utils.checkpoint.checkpoint

    def reentrant(*inputs, use_reentrant, **options):
        return real(*inputs, use_reentrant=True, **options)

    expected = gradients(network)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", reentrant)
    with pytest.warns(UserWarning, match="None of the inputs"):
        assert not equal(expected, gradients(network, "blocks", 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["blocks", "selective"])
def test_under_autocast(mode, dtype):
    network, cast = randomized(tiny_config("llama", **DROPPED), dtype=torch.float32), partial(torch.autocast, "cpu", dtype)
    assert equal(gradients(network, cast=cast), gradients(network, mode, cast=cast))


@pytest.mark.filterwarnings("ignore")  # torch's own, about what its compiler imports
@pytest.mark.parametrize("mode", ["blocks", "selective"])
def test_compiled_blocks(mode):
    """One graph a block, the recomputation within it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = randomized(tiny_config("llama"))
    compiled = gradients(network, mode, prepare=partial(torch.nn.Module.compile, dynamic=False, fullgraph=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    errors = [(a - b).abs().max().item() for a, b in zip_values(gradients(network), compiled)]
    assert 0 < max(errors) < 1e-12  # 0 would mean that it was not compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["blocks", "selective"])
def test_compiled_blocks_drop_the_same_numbers_again(mode):
    """Compiled dropout draws numbers of its own: the gradient must be the slope of the loss that these numbers make."""
    torch._dynamo.reset()
    network = recompute(randomized(tiny_config("llama", **DROPPED)), mode).train()
    for block in network.body.blocks:
        block.compile(dynamic=False)
    ids, objective, step = torch.randint(3, 61, (2, 20)), Objective(network), 1e-6

    def loss():
        torch.manual_seed(5)
        return objective({"input_ids": ids, "labels": ids}).terms["loss"].sum

    loss().backward()
    directions = [torch.randn_like(parameter) for parameter in network.parameters()]
    slope = sum((d * p.grad).sum().item() for d, p in zip(directions, network.parameters(), strict=True))
    ends = []
    for move in (step, -2 * step):
        with torch.no_grad():
            for direction, parameter in zip(directions, network.parameters(), strict=True):
                parameter.add_(direction, alpha=move)
        ends.append(loss().item())
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("mode", ["blocks", "selective"])
def test_sharded_blocks(mode):
    network = randomized(tiny_config("llama", **DROPPED))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = gradients(network, mode, prepare=partial(fully_shard, mesh=mesh))
        sharded = {name: getattr(gradient, "_local_tensor", gradient) for name, gradient in sharded.items()}
    finally:
        disconnect()
    assert equal(gradients(network), sharded)


@pytest.mark.parametrize(
    ("mode", "every", "again"), [("none", 1, 0), ("blocks", 1, 5), ("blocks", 2, 3), ("blocks", 3, 2), ("selective", 2, 3)]
)
def test_which_blocks_run_again(mode, every, again):
    network, calls = recompute(randomized(tiny_config("gpt2", depth=5)), mode, every).train(), []
    for index, block in enumerate(network.body.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    ids = torch.randint(3, 61, (2, 9))
    network(ids).logits.sum().backward()
    assert calls == [0, 1, 2, 3, 4, *reversed(range(0, 5, every))][: 5 + again]
    del calls[:]
    network.eval()(ids).logits.sum().backward()  # nothing in eval mode
    with torch.no_grad():
        network.train()(ids)
    assert calls == [*range(5)] * 2


@pytest.mark.parametrize("family", ["bart", "bert"])
def test_every_stack(family):
    network, calls = recompute(randomized(tiny_config(family, depth=2)), "blocks", 2).train(), []
    for name, module in network.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    network(torch.randint(3, 61, (2, 9))).hidden.sum().backward()
    twice = {name for name in calls if calls.count(name) == 2}
    stack = {"bart": ("body.encoder.blocks.0", "body.decoder.blocks.0", "body.decoder.blocks.2"), "bert": ("body.blocks.0",)}
    assert twice == {f"{name}.mlp" for name in stack[family]}


def test_attention_with_dropout_runs_again():
    """Else, on a GPU, the next dropout would get its random numbers."""
    for op in expensive_operators()[1]:
        names = [argument.name for argument in op._schema.arguments]
        for rate, policy in ((0.0, CheckpointPolicy.MUST_SAVE), (0.1, CheckpointPolicy.PREFER_RECOMPUTE)):
            inputs = [rate if name == "dropout_p" else None for name in names[: names.index("dropout_p") + 1]]
            assert save_products(None, op, *inputs) == policy
            assert save_products(None, op, *inputs[:-1], dropout_p=rate) == policy
        assert save_products(None, op, *inputs[:-1]) == CheckpointPolicy.MUST_SAVE  # its default is 0
    assert save_products(None, torch.ops.aten.gelu.default, None) == CheckpointPolicy.PREFER_RECOMPUTE


def test_names_stay_and_the_last_call_counts():
    network = randomized(tiny_config("llama"))
    names = [*network.state_dict()]
    for mode in ("blocks", "selective", "blocks"):
        assert [*recompute(network, mode).state_dict()] == names
    forward = network.body.blocks[0].forward
    assert not isinstance(forward.args[1], partial)  # not one recomputation in another
    twin = copy.deepcopy(network)
    assert twin.body.blocks[0].forward.args[0] is twin.body.blocks[0]  # a copy runs its own weights
    recompute(network, "none")
    assert not any("forward" in vars(block) for block in network.body.blocks)


@pytest.mark.parametrize(("mode", "every", "named"), [("all", 1, "'all'"), ("blocks", 0, "every=0")])
def test_wrong_values_are_named(mode, every, named):
    with pytest.raises(ValueError, match=named):
        recompute(randomized(tiny_config("llama")), mode, every)


@pytest.mark.gpu
@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["blocks", "selective"])
def test_on_a_gpu(mode, attention_dropout):
    """Under autocast, where attention is the flash kernel, with random numbers of its own."""
    rates = DROPPED | {"attention_dropout": attention_dropout}
    network = randomized(tiny_config("gpt2", width=32, **rates), dtype=torch.float32).cuda().train()
    found, ids = [], torch.randint(3, 61, (2, 24), device="cuda")
    for way in ("none", mode):
        recompute(network, way).zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cuda", torch.bfloat16):
            loss = network(ids).logits.float().logsumexp(-1).sum()
        loss.backward()
        found.append([parameter.grad.clone() for parameter in network.parameters()])
    for kept, again in zip(*found, strict=True):
        assert (kept - again).abs().max() <= 1e-3 * kept.abs().max().clamp_min(1e-6)
