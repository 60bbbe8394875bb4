"""Layers of quantization-aware training: they compute what their quantized forms will, learn as their rounded twins would, and
observe each step's inputs once."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from quant import int8, qat
from quant.config import QatConfig, QuantError
from quant.fake import fake_quantize
from quant.int8 import AFFINE, EPS
from quant.int8_linear import DynamicInput, Int8Linear, StaticInput
from quant.linear import quantizable_layers, quantize_linears
from quant.qat import QatLinear, convert, converted, prepare, qat_layers
from tests.conftest import randomized, tiny_config

U = 2.0**-24
SETTINGS = {  # what is asked for, and the weights' bits
    "dynamic": (QatConfig(), 8),
    "dynamic, tensor": (QatConfig("tensor"), 8),
    "dynamic, groups, 4 bits": (QatConfig("group", 8), 4),
    "dynamic, learned groups, 4 bits": (QatConfig("group", 8, learned=True), 4),
    "static, tensor, 3 bits": (QatConfig("tensor", inputs="static", observer="minmax"), 3),
    "static, learned": (QatConfig(inputs="static", learned=True), 8),
    "static, learned, tensor, 4 bits": (QatConfig("tensor", inputs="static", learned=True), 4),
}
STATIC = QatConfig(inputs="static", observer="minmax")
LEARNED = QatConfig(inputs="static", learned=True)
IDS = torch.arange(3, 17).view(2, 7)


def tiny(family: str = "llama") -> nn.Module:
    return randomized(tiny_config(family), dtype=torch.float32)


def trained(network: nn.Module, steps: int = 2) -> nn.Module:
    """Some steps away from where it began, so that no scale and no range is the first one."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    network.train()
    for step in range(steps):
        network(IDS + step).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        commit(network)
    return network.eval()


def commit(network: nn.Module) -> None:
    for layer in qat_layers(network).values():
        layer.commit()


def outputs(network: nn.Module) -> list[Tensor]:
    """Of several shapes, inputs that were not seen, and in autocast."""
    with torch.no_grad():
        found = [network(ids).logits for ids in (IDS.repeat(10, 1) + 20, IDS[:1, :1])]  # multiplied in either way
        with torch.autocast("cpu", torch.bfloat16):
            return [*found, network(IDS).logits]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def layer_of(settings: QatConfig, bits: int = 8, width: int = 24, rows: int = 10, seed: int = 0) -> QatLinear:
    torch.manual_seed(seed)
    return QatLinear(nn.Linear(width, rows), settings, bits)


# ---- conversion


@pytest.mark.parametrize("name", SETTINGS)
def test_converted_it_computes_the_same(name):
    settings, bits = SETTINGS[name]
    family = "bert" if list(SETTINGS).index(name) % 3 == 2 else "llama"
    plain = tiny(family)
    network = trained(prepare(tiny(family), settings, bits))
    layers, expected = qat_layers(network), outputs(network)
    assert all(x.isfinite().all() for x in expected) and expected[-1].dtype == torch.bfloat16
    assert set(layers) == set(quantizable_layers(plain)) and len(layers) >= 8
    assert not any(torch.equal(plain.get_submodule(path).weight, layer.weight) for path, layer in layers.items())
    assert convert(network) is network and not qat_layers(network)
    assert equal(outputs(network), expected)
    for path, layer in layers.items():
        new = network.get_submodule(path)
        assert isinstance(new, Int8Linear) and new.bias is layer.bias and not new.training
        assert isinstance(new.input, DynamicInput if settings.inputs == "dynamic" else StaticInput)
        if not settings.learned:
            group = {"granularity": settings.granularity, "group_size": settings.group_size}
            small = int8.quantize(layer.weight, grid=int8.Grid.of(bits), **group)
            assert equal([small.codes, small.scale], [new.weight.codes, new.weight.scale])
            assert (small.granularity, small.code_bits) == (new.weight.granularity, new.weight.code_bits)


def test_at_first_it_computes_what_quantizing_gives():
    """Before the first step, dynamic inputs: the network quantized after training."""
    settings = {"granularity": "group", "group_size": 8}
    direct = quantize_linears(tiny(), "int8-dynamic", **settings)
    assert equal(outputs(prepare(tiny(), QatConfig(**settings))), outputs(direct))


@pytest.mark.parametrize("fails", [False, True])
def test_converted_for_a_while(fails):
    network = trained(prepare(tiny(), STATIC), 1)
    modules, expected = dict(network.named_modules()), outputs(network)
    with pytest.raises(OSError) if fails else nullcontext(), converted(network) as same:
        assert same is network and not qat_layers(network) and equal(outputs(network), expected)
        assert "body.blocks.0.mlp.down.weight.codes" in network.state_dict()
        if fails:
            raise OSError
    assert all(modules[path] is module for path, module in network.named_modules()) and len(qat_layers(network)) >= 8


def floats(x, w, b_O=None):
    return F.linear((x.codes.float() - (0 if x.zero is None else x.zero)) * x.scale, w.dequantize(torch.float32), b_O)


def off_by_an_ulp(layer):
    scale, zero = QatLinear.weight_scales(layer)
    return torch.nextafter(scale, torch.tensor(math.inf)), zero


@pytest.mark.parametrize("wrong", ["a product in float32", "a scale's last bit"])
def test_the_comparison_of_outputs_sees(wrong, monkeypatch):
    network = trained(prepare(tiny(), QatConfig()), 1)
    expected = outputs(network)
    assert equal(outputs(convert(copy.deepcopy(network))), expected)
    layer = next(iter(qat_layers(network).values()))
    monkeypatch.setattr(*{
        "a product in float32": (qat, "multiply_int8", floats),
        "a scale's last bit": (layer, "weight_scales", lambda: off_by_an_ulp(layer)),
    }[wrong])
    assert not equal(outputs(network), expected)


# ---- gradients


def twin(layer: QatLinear, x_NI: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(y, x̂, Ŵ, the most that each can move with its scale) by `fake_quantize` and torch's own product."""
    scale, zero = layer.weight_scales()
    grouped = layer.weight.unflatten(1, (layer.groups, -1))
    factor = 1 / math.sqrt(layer.weight.numel() / scale.numel() * layer.grid.high)
    near_OI, codes_OI = fake_quantize(grouped, scale[:, :, None], zero[:, :, None], layer.grid, factor)
    if layer.observer is None:
        steps, scale, _ = DynamicInput()(x_NI.detach())
        near_NI = x_NI + (steps * scale - x_NI).detach()
    else:
        scale, zero = layer.input_scales()
        near_NI, steps = fake_quantize(x_NI, scale, zero, AFFINE, 1 / math.sqrt(layer.in_features * 127))
        steps = steps - zero
    near_OI, y_NO = near_OI.flatten(1), F.linear(near_NI, near_OI.flatten(1), layer.bias)
    return y_NO, near_NI.detach(), near_OI.detach(), [each.abs() + 0.5 for each in (codes_OI.flatten(1), steps)]


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_the_rounded_twin(name):
    """To the roundings of float32 sums: of n products at most n times 2^-24 of what is summed, on either side."""
    settings, bits = SETTINGS[name]
    layer, x = layer_of(settings, bits), torch.randn(3, 5, 24)
    layer(x)
    layer.commit()
    x.view(-1)[::37] *= 99  # clipped, where the scale is static
    x.requires_grad_()
    leaves = {"x": x} | dict(layer.named_parameters())
    dy = torch.randn(3, 5, 10)
    y = layer.eval()(x)
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    other, near_NI, near_OI, (codes_OI, codes_NI) = twin(layer, x.reshape(15, 24))
    expected = dict(zip(leaves, torch.autograd.grad(other, list(leaves.values()), dy.view(15, 10)), strict=True))

    size_NO, size_NI, size_OI = dy.view(15, 10).abs(), near_NI.abs(), near_OI.abs()
    sum_NI, sum_OI = size_NO @ size_OI, size_NO.T @ size_NI
    terms = {"x": (10, sum_NI.view(x.shape)), "weight": (15, sum_OI), "bias": (15, size_NO.sum(0))}
    if layer.weight_log_scale is not None:
        shared = 240 // layer.weight_log_scale.numel()
        each = (sum_OI * codes_OI).unflatten(1, (layer.groups, -1)).sum(2)
        each = each.sum().view(1, 1) if layer.granularity == "tensor" else each
        scale = layer.weight_scales()[0].detach()
        terms["weight_log_scale"] = 16 + shared, scale * each / math.sqrt(shared * layer.grid.high)
    if layer.input_log_scale is not None:
        scale = layer.input_scales()[0].detach()
        terms["input_log_scale"] = 11 + 360, scale * (sum_NI * codes_NI).sum().view(1, 1) / math.sqrt(24 * 127)
    assert set(terms) == set(leaves)
    for leaf, (count, summed) in terms.items():
        assert found[leaf].shape == leaves[leaf].shape and bool(found[leaf].any())
        assert bool(((found[leaf] - expected[leaf]).abs() <= 2 * (count + 3) * U * summed).all()), leaf
    error = (y.view(15, 10) - other).abs()
    assert bool((error <= 2 * (24 + 4) * U * (size_NI @ size_OI.T + layer.bias.abs())).all())
    if layer.observer is not None:
        assert not found["x"].view(-1)[::37].any() and float((found["x"] == 0).float().mean()) < 0.1


@pytest.mark.parametrize("name", SETTINGS)
def test_converted_x_has_the_same_gradient(name):
    layer = layer_of(*SETTINGS[name])
    x, dy = torch.randn(40, 24), torch.randn(40, 10)
    layer(x)
    layer.commit()
    new, x = layer.eval().converted(), (1.5 * x).requires_grad_()
    assert torch.equal(new(x), layer(x))
    assert torch.equal(*(torch.autograd.grad(each(x), x, dy)[0] for each in (new, layer)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_formats(dtype):
    """Parameters and inputs of other formats: y in that of x, gradients in the parameters' own."""
    for settings in (QatConfig(), LEARNED):
        layer = QatLinear(nn.Linear(24, 10, dtype=dtype), settings, 8)
        x = torch.randn(5, 24, dtype=dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == dtype
        assert torch.equal(layer.eval().converted()(x), y)


# ---- what is observed


def ranges(network: nn.Module) -> list[Tensor]:
    return [torch.stack((layer.observer.low, layer.observer.high)) for layer in qat_layers(network).values()]


@pytest.mark.parametrize("settings", [QatConfig(inputs="static"), LEARNED], ids=["moving", "learned"])
def test_a_forward_that_is_computed_again_observes_nothing(settings):
    """From the first step on, whose range is taken from its own input."""
    found = []
    for again in (False, True):
        network = prepare(tiny("bert"), settings).train()
        for step in range(2):
            ids = IDS + 7 * step
            if again:
                logits = checkpoint(lambda ids, network=network: network(ids).logits, ids, use_reentrant=False)
            else:
                logits = network(ids).logits
            logits.square().sum().backward()
            commit(network)
        found.append((ranges(network), [parameter.grad for parameter in network.parameters() if parameter.grad is not None]))
    for one, other in zip(*found, strict=True):
        assert len(one) and equal(one, other)


def test_micro_batches_are_one_batch():
    """For minmax from the first on; a moving average moves once a step, by the ends of all of the step's micro-batches."""
    x = torch.randn(3, 4, 6, 24) * torch.tensor([1.0, 3.0, 0.5])[:, None, None, None]
    for observer in ("minmax", "moving"):
        layers = [layer_of(QatConfig(inputs="static", observer=observer)) for _ in range(2)]
        if observer == "moving":
            for layer in layers:
                layer(x[0, :1])
                layer.commit()
        for step in x:
            layers[0](step)
            for part in step.split(1):
                layers[1](part)
            for layer in layers:
                layer.commit()
        one, other = (layer.observer.state_dict() for layer in layers)
        assert equal(list(one.values()), list(other.values()))
    low, high = x[0, :1].aminmax()
    for step in x:
        low, high = low + 0.01 * (step.min() - low), high + 0.01 * (step.max() - high)
    assert equal([low, high], [layers[0].observer.low, layers[0].observer.high])


def test_a_range_moves_only_between_steps():
    layer, x = layer_of(STATIC), torch.randn(6, 24)
    first = layer(x)
    assert torch.equal(layer.observer.high, x.max())
    layer(5 * x)
    assert torch.equal(layer.observer.high, x.max()) and torch.equal(layer(x), first)
    layer.eval()(9 * x)
    layer.commit()
    assert torch.equal(layer.observer.high, 5 * x.max()) and not torch.equal(layer(x), first)
    layer.commit()
    assert torch.equal(layer.observer.high, 5 * x.max())


def test_frozen_it_does_not_move():
    network = prepare(tiny(), STATIC).train()
    network(IDS)
    commit(network)
    before = ranges(network)
    network(IDS + 20)
    for layer in qat_layers(network).values():
        layer.freeze()
    network(IDS + 30)
    commit(network)
    assert equal(ranges(network), before)
    again = prepare(tiny(), STATIC).train()
    again.load_state_dict(network.state_dict())
    again(IDS + 30)
    commit(again)
    assert equal(ranges(again), before)
    for layer in qat_layers(again).values():
        layer.frozen.fill_(False)
    again(IDS + 30)
    commit(again)
    assert not equal(ranges(again), before)


def test_nothing_was_observed():
    network = prepare(tiny(), STATIC).eval()
    with pytest.raises(QuantError, match="no input was observed yet"):
        network(IDS)
    before = qat_layers(network)
    with pytest.raises(QuantError, match=f"^{next(iter(before))}: no input was observed"):
        convert(network)
    assert qat_layers(network) == before
    with pytest.raises(QuantError, match="the first input, which sets the range, holds numbers from nan to nan"):
        layer_of(STATIC)(torch.full((2, 24), math.nan))


def test_no_rows():
    for settings in (QatConfig(), STATIC):
        layer = layer_of(settings)
        layer(torch.randn(6, 24))
        assert layer(torch.randn(0, 24)).shape == (0, 10)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [STATIC, LEARNED, QatConfig()], ids=["static", "learned", "dynamic"])
def test_a_number_that_is_none_is_not_rounded_away(settings, wrong):
    """y shows it, and the range does not keep it."""
    layer, x = layer_of(settings), torch.randn(6, 24)
    layer(x)
    layer.commit()
    before = copy.deepcopy(layer.state_dict())
    y = layer(x.index_fill(1, torch.tensor([3]), wrong))
    assert bool(y.isnan().all())
    layer.commit()
    assert equal(list(layer.state_dict().values()), list(before.values())) and bool(layer(x).isfinite().all())


# ---- state


GROUPS = QatConfig("group", 8, learned=True)


@pytest.mark.parametrize("settings", [STATIC, LEARNED, GROUPS], ids=["static", "learned", "groups"])
def test_state_there_and_back(settings, bits=4):
    network = trained(prepare(tiny(), settings, bits), 1)
    network.train()(IDS + 30)  # waits to be committed, and is no part of it
    other = prepare(tiny(), settings, bits)
    other.load_state_dict(network.state_dict())
    assert equal(outputs(other.eval()), outputs(network.eval()))
    assert equal(list(other.state_dict().values()), list(network.state_dict().values()))
    own, now = ({name for name, _ in each.named_parameters()} for each in (tiny(), network))
    names = ["weight_log_scale", "input_log_scale"][: settings.learned * (1 + (settings.inputs == "static"))]
    assert now == own | {f"{path}.{name}" for path in qat_layers(network) for name in names}
    assert not any("pending" in name for name in network.state_dict())
    commit(network)
    commit(other)
    if settings.inputs == "static":
        assert not equal(ranges(network), ranges(other))


def test_the_layers_keep_mode_and_parameters():
    network = tiny().train()
    network.body.blocks[0].eval()
    before = {path: (layer.weight, layer.bias, layer.training) for path, layer in quantizable_layers(network).items()}
    assert prepare(network, LEARNED) is network and not quantizable_layers(network)
    for path, layer in qat_layers(network).items():
        assert (layer.weight, layer.bias, layer.training) == before[path]
    assert isinstance(network.head, type(tiny().head))


# ---- learned scales


def test_learned_scales_begin_where_the_paper_says():
    x, size = torch.randn(6, 24), layer_of(LEARNED).weight.detach().abs()
    means = {"tensor": size.mean().view(1, 1), "channel": size.mean(1, keepdim=True), "group": size.view(10, 3, 8).mean(2)}
    for granularity, mean in means.items():
        layer = layer_of(QatConfig(granularity, 8, inputs="static", learned=True), 4)
        rounded = 4 * U + 2 * U * 8  # and of a logarithm up to 8
        torch.testing.assert_close(layer.weight_scales()[0].detach(), 2 * mean / math.sqrt(7), rtol=rounded, atol=0)
        for factor in (1, 3):  # the first range is what counts
            layer(factor * x)
            layer.commit()
            scale, zero = int8.scales_for(*x.aminmax(), AFFINE)
            assert equal([scale.view(1, 1).log(), zero.view(1, 1)], [layer.input_log_scale, layer.input_zero])
    layer.weight.data.zero_()
    assert torch.equal(layer.first_scale(), torch.full((10, 3), EPS))


def test_learned_scales_learn():
    """Scales of weights ten times too large come down by themselves, until the error is less than a tenth."""
    layer, x = layer_of(LEARNED, 4), torch.randn(64, 24)
    expected = F.linear(x, layer.weight.detach(), layer.bias.detach())
    layer(x)
    with torch.no_grad():
        layer.weight_log_scale += math.log(10)
    scales = [layer.weight_log_scale, layer.input_log_scale]
    before, optimizer, errors = [scale.detach().clone() for scale in scales], torch.optim.Adam(scales, lr=0.05), []
    for _ in range(100):
        error = (layer(x) - expected).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        layer.commit()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.1 * errors[0]
    assert bool((scales[0] < before[0] - math.log(2)).all()) and not torch.equal(scales[1], before[1])


def test_learned_scales_stay_positive():
    """Below EPS one counts as EPS; `commit` makes it twice that, where it has a gradient again."""
    layer, x = layer_of(LEARNED), torch.randn(6, 24)
    layer(x)
    with torch.no_grad():
        layer.weight_log_scale.fill_(-99.0)
        layer.input_log_scale.fill_(-99.0)
    assert bool((layer.weight_scales()[0] == EPS).all() & (layer.input_scales()[0] == EPS).all())
    layer.commit()
    for scale in (layer.weight_scales()[0], layer.input_scales()[0]):
        torch.testing.assert_close(scale.detach(), torch.full_like(scale, 2 * EPS), rtol=4 * U * 16, atol=0)  # of e^-15
    y = layer(x)
    assert torch.equal(layer.eval().converted()(x), y)
    y.square().sum().backward()
    assert bool(layer.weight_log_scale.grad.all()) and bool(layer.input_log_scale.grad.all())


# ---- errors


def test_what_cannot_be_prepared():
    network = tiny()
    modules = dict(network.named_modules())
    bad = {
        "no linear layer to quantize in a Network, with skip=": QatConfig(skip=("body",)),
        r"\.weight: rows of 24 numbers do not fall into groups of 5; to leave it as it is: --skip ": QatConfig("group", 5),
        r"mlp\.down\.weight: rows of 40 numbers do not fall into groups of 24": QatConfig("group", 24),
    }
    for message, settings in bad.items():
        with pytest.raises(QuantError, match=message):
            prepare(network, settings)
    with pytest.raises(QuantError, match="from 2 to 8"):
        prepare(network, QatConfig(), 1)
    with torch.no_grad():
        network.body.blocks[1].mlp.up.weight[3, 5] = math.nan
    with pytest.raises(QuantError, match=r"^body\.blocks\.1\.mlp\.up\.weight: the value at \[3, 5\] is nan"):
        prepare(network, QatConfig())
    with pytest.raises(QuantError, match="no values yet"):
        prepare(tiny().to("meta"), QatConfig())
    network.adapters = {"default": None}
    with pytest.raises(QuantError, match="adapters"):
        prepare(network, QatConfig())
    assert all(modules[path] is module for path, module in network.named_modules())


def test_what_is_skipped():
    """By our names, and by those that the family publishes."""
    for pattern in (r"mlp\.down", "down_proj"):
        left = prepare(tiny(), QatConfig("group", 24, skip=(pattern,)))
        paths = {path for path, module in left.named_modules() if isinstance(module, nn.Linear) and path != "head"}
        assert paths == {f"body.blocks.{n}.mlp.down" for n in range(2)}
    renamed = prepare(tiny(), QatConfig(skip=("^mine$",)), published={"body.blocks.1.mlp.down": "mine"})
    assert set(quantizable_layers(tiny())) - set(qat_layers(renamed)) == {"body.blocks.1.mlp.down"}


def test_x_that_does_not_fit():
    with pytest.raises(ValueError, match=r"x of \(2, 7\) does not go with a weight of \(10, 24\)"):
        layer_of(QatConfig())(torch.zeros(2, 7))
