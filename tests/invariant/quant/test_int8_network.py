"""A network with its linear layers in INT8: three ways to the same one, and that what surrounds it goes on working."""

import copy
import gc
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import model.hub
from lora.config import LoraConfig
from lora.inject import add_adapters, merge, remove, unmerge
from model.generate import generate
from quant import int8_product
from quant.calibrate import observe
from quant.config import Int8, QuantError
from quant.int8 import AFFINE, SYMMETRIC, Codes, Int8Tensor, quantize
from quant.int8_linear import DynamicInput, Int8Linear, StaticInput
from quant.int8_product import product_cpu, product_reference
from quant.linear import dense_weight, quantize_linears, quantized_layers
from tests.conftest import TINY_FAMILIES, randomized, tiny_config

KINDS = {
    "dynamic": Int8(),
    "affine groups": Int8(bits=5, granularity="group", group_size=8, affine_weights=True, affine_inputs=True),
    "static": Int8("int8-static", granularity="tensor", affine_weights=True),
    "static, symmetric": Int8("int8-static", affine_inputs=False),
    "llm": Int8("llm-int8", threshold=2.5),
}
SOME = ["affine groups", "static", "llm"]


def tiny(family: str = "llama", seed: int = 0, **changes):
    return randomized(tiny_config(family, **changes), seed=seed, dtype=torch.float32)


def batch(network: nn.Module) -> dict:
    ids = torch.arange(3, 17).view(2, 7)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if network.config.architecture == "encoder-decoder" else {})


@torch.no_grad()
def logits(network: nn.Module) -> Tensor:
    return network(**batch(network)).logits


def observed(network: nn.Module, kind: str) -> dict[str, StaticInput]:
    grid = SYMMETRIC if KINDS[kind].affine_inputs is False else AFFINE
    return observe(network, [batch(network)], observer="minmax", grid=grid)


def settings(kind: str) -> dict:
    asked = KINDS[kind]
    names = ("bits", "granularity", "group_size", "affine_weights", "affine_inputs", "threshold")
    return {"scheme": asked.scheme} | {name: getattr(asked, name) for name in names}


def quantized(kind: str, **changes):
    network = tiny(**changes)
    return quantize_linears(network, inputs=observed(network, kind), **settings(kind))


def same_state(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in mine.items()
    )


EACH = [(family, kind) for family in TINY_FAMILIES for kind in KINDS]
FEW = {*EACH[::6], ("roformer", "llm"), ("roformer", "static")}  # each family once, each kind twice or more


@pytest.mark.parametrize("family, kind", [pytest.param(*e, marks=[] if e in FEW else pytest.mark.slow) for e in EACH])
def test_three_ways_to_the_same_network(kind, family, tmp_path):
    """Rounded when read, rounded in memory, and read as it was written: the same bits, of weights and of logits; and written
    again the same files."""
    network = tiny(family)
    skip = (r"mlp\.down",) if family.startswith("t5") else ()  # which transformers keeps wide, and so does a folder
    asked = Int8(**settings(kind), skip=skip)
    model.hub.save(network, tmp_path / "dense")
    inputs, before = observed(network, kind), logits(network)
    read = model.hub.load(tmp_path / "dense", quantization=asked, inputs=inputs)
    made = quantize_linears(network, skip=skip, inputs=inputs, **settings(kind))
    layers = quantized_layers(read)
    assert len(layers) >= 8 and layers.keys() == quantized_layers(made).keys() and same_state(read, made)
    expected = logits(read)
    assert torch.equal(logits(made), expected) and not torch.equal(expected, before)
    for name, each in {"read": read, "made": made}.items():
        model.hub.save(each, tmp_path / name)
        again = model.hub.load(tmp_path / name)
        assert same_state(again, read) and torch.equal(logits(again), expected)
        assert all(type(layer) is type(layers[path]) for path, layer in quantized_layers(again).items())
        assert all(str(layer) == str(layers[path]) for path, layer in quantized_layers(again).items())
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("read", "made"))
    assert one == other


# ---- memory and formats


def held(network: nn.Module) -> int:
    """Bytes of memory behind all tensors of a network; what several share is counted once."""
    tensors = (*network.parameters(), *network.buffers())
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.parametrize("kind", SOME)
def test_the_dense_weights_are_given_back(kind, tmp_path):
    others = [each for each in gc.get_objects() if type(each) is nn.Parameter]  # of tests before
    network = tiny(width=64, mlp_width=128, depth=3)
    model.hub.save(network, tmp_path)
    linear = [each for path, each in network.named_modules() if isinstance(each, nn.Linear) and path != "head"]
    large, before = sum(each.weight.nbytes for each in linear), held(network)
    shapes = {tuple(each.weight.shape) for each in linear} - {tuple(network.head.weight.shape)}
    inputs = observed(network, kind)
    del linear
    quantize_linears(network, inputs=inputs, **settings(kind))
    read = model.hub.load(tmp_path, quantization=Int8(**settings(kind)), inputs=inputs)
    gc.collect()
    for each in (network, read):
        small = sum(layer.weight.nbytes for layer in quantized_layers(each).values())
        static = 8 * len(quantized_layers(each))  # a scale and a zero point of inputs
        assert small <= large / 2 and before - large + small <= held(each) <= before - large + small + static
    known = {id(each) for each in others}
    left = [each for each in gc.get_objects() if type(each) is nn.Parameter and tuple(each.shape) in shapes]
    assert [each for each in left if id(each) not in known] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_there_and_back(kind):
    """Also where weights were packed for a product before."""
    one, other = quantized(kind), quantized(kind, seed=1)
    expected = logits(one)
    assert not torch.equal(logits(other), expected)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert same_state(one, other) and torch.equal(logits(other), expected)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight\.codes"):
        other.load_state_dict(tiny().state_dict())


def test_new_codes_where_the_old_ones_lay():
    """Another tensor at the same address, and as often written to: such as load_state_dict(…, assign=True) may put there."""
    room, x = np.ones(512, dtype=np.int8), Codes(torch.ones(2, 32, dtype=torch.int8), torch.ones(2, 1), None)
    small = Int8Tensor(torch.from_numpy(room).view(16, 32), torch.ones(16, 1), dtype=torch.float32)
    assert (product_cpu(x, small) == 32).all()
    room[:] = 2
    small.codes = torch.from_numpy(room).view(16, 32)
    assert (product_cpu(x, small) == 64).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_leaves_codes_and_scales(kind):
    network = quantized(kind)
    before = {name: value.clone() for name, value in network.named_buffers()}
    for dtype in (torch.bfloat16, torch.float64):
        assert network.to(dtype) is network and {parameter.dtype for parameter in network.parameters()} == {dtype}
        now = dict(network.named_buffers())
        for path in quantized_layers(network):
            kept = {name for name in before if name.startswith(f"{path}.")}
            assert kept and all(now[n].dtype == before[n].dtype and torch.equal(now[n], before[n]) for n in kept)
        assert logits(network).dtype == dtype and logits(network).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_after_a_product(kind):
    """Weights are packed then; the copy has its own."""
    network = quantized(kind)
    expected = logits(network)
    twin = copy.deepcopy(network)
    assert same_state(twin, network) and torch.equal(logits(twin), expected)
    for layer in quantized_layers(twin).values():
        layer.weight.codes.neg_()
    assert not torch.equal(logits(twin), expected) and torch.equal(logits(network), expected)


# ---- running


@pytest.mark.parametrize("kind, rows", [("dynamic", 1), ("llm", 1), *((kind, 16) for kind in KINDS)])
def test_generation(kind, rows):
    """With a cache, of one row and of many: each token is the best by the logits that come without one, or nearly. A last bit
    of attention can move a code of what follows; and LLM.int8() looks for outliers in all that is read together."""
    network, ids = quantized(kind), torch.arange(3, 12).repeat(rows, 1) + torch.arange(rows)[:, None]
    found = generate(network, ids, max_new_tokens=8, temperature=0)
    assert found.shape == (rows, 8) and len(found.unique()) > 2
    with torch.no_grad():
        scores = network(torch.cat((ids, found), 1)).logits[:, ids.size(1) - 1 : -1]
    lost = scores.amax(-1) - scores.gather(-1, found[..., None])[..., 0]
    assert lost.max() < 0.05 * scores.abs().max() and (lost == 0).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    """What is multiplied is rounded as it comes; y is rounded once more, to autocast's format."""
    layer = quantized(kind).body.blocks[0].mlp.up
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer(x.bfloat16()).dtype == torch.bfloat16 and layer(x.double()).dtype == torch.float64
    if kind != "llm":  # there outliers, and the bias, are in y's format
        assert torch.equal(y, layer(x).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        network = quantized(kind)
        found = network(**batch(network)).logits.float()
    assert (found - logits(network)).abs().max() < 0.1 * found.abs().max()  # 2^-8 a step, and codes that it moves


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_straight_through_and_none_where_x_was_cut_off(kind):
    network = quantized(kind)
    network.requires_grad_(False)
    layer = network.body.blocks[1].mlp.up
    x = (10 * torch.randn(3, 5, 24)).requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = dy @ dense_weight(layer)
    if isinstance(layer, Int8Linear) and isinstance(layer.input, StaticInput):
        steps = (x * (1 / layer.input.scale)).round() + layer.input.zero
        inside = (steps >= -128) & (steps <= 127)
        assert inside.any() and not inside.all()
        expected = expected * inside
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)  # float32: products in another order
    assert ((x.grad == 0) == (expected == 0)).all()


# ---- products


def whole(shape, low: int, high: int, generator) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)


EXTREMES = {  # (x, W), each from … to …
    "all codes": ((-128, 127), (-128, 127)),
    "largest": ((127, 127), (127, 127)),
    "least": ((-128, -128), (-128, -128)),
    "largest by least": ((127, 127), (-128, -128)),
    "nearly largest": ((125, 127), (126, 127)),
    "nearly least": ((-128, -126), (126, 127)),
    "of 4 bits": ((-128, 127), (-8, 7)),
    "one side": ((0, 127), (-128, 0)),
}
SIZES = [(1, 1, 1, 1), (3, 5, 7, 1), (5, 33, 1023, 1), (17, 9, 40, 5), (130, 16, 66, 2), (200, 70, 515, 1), (2, 3, 1024, 1)]


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("kind", EXTREMES)
def test_both_ways_are_the_plain_twin(kind, affine, monkeypatch):
    """Bit for bit, up to sums of 2^24: rows few and many, groups, odd sizes, and codes that would saturate 16 bits.

    Few rows go in two planes where the processor has no VNNI, else in one: two are exact on every processor.
    """
    measured = int8_product.has_saturating_sums()
    generator = torch.Generator().manual_seed(0)
    for rows, out, ins, groups in SIZES[: 6 if affine else None]:
        ins = min(ins, 900) if affine else ins  # (127 + 9)² a product, where symmetric codes have 128²
        q, p = (whole((n, ins), *ends, generator) for n, ends in zip((rows, out), EXTREMES[kind], strict=True))
        s, t = (torch.rand(n, g, generator=generator) + 0.1 for n, g in ((rows, 1), (out, groups)))
        z, u = (whole(each.shape, -9, 9, generator).int() if affine else None for each in (s, t))
        x, w = Codes(q, s, z), Int8Tensor(p, t, u, dtype=torch.float32)
        expected, bias = product_reference(x, w), torch.randn(out, generator=generator)
        for few, two_planes in ((0, measured), (1000, measured), (1000, True)):
            monkeypatch.setattr(int8_product, "FEW_ROWS", few)
            monkeypatch.setattr(int8_product, "has_saturating_sums", lambda two_planes=two_planes: two_planes)
            assert torch.equal(product_cpu(x, w), expected), (rows, out, ins, groups, few, two_planes)
            assert torch.equal(product_cpu(x, w, bias), product_reference(x, w, bias))


# ---- an adapter


@pytest.mark.parametrize("kind", SOME)
def test_an_adapter_is_trained_and_merged(kind):
    network = quantized(kind)
    base, before = logits(network), {path: layer for path, layer in quantized_layers(network).items()}
    codes = {path: layer.weight.codes.clone() for path, layer in before.items()}
    add_adapters(network, LoraConfig(r=3, targets=r"query|mlp\.up"))
    assert torch.equal(logits(network), base)  # at first it does nothing
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer, labels = torch.optim.SGD(trained, lr=0.5), torch.arange(14)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(network(**batch(network)).logits.flatten(0, 1), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] and all(parameter.grad.any() for parameter in trained)
    adapted = logits(network)
    deltas = {path: holder.parts["default"].delta().detach() for path, holder in holders_of(network).items()}
    merge(network)
    for path, delta in deltas.items():
        merged = network.get_submodule(path).base.weight
        torch.testing.assert_close(merged, dense_weight(before[path]) + delta, rtol=0, atol=1e-6)
    step = (logits(network) - adapted).abs().max()
    assert step < 0.1 * adapted.abs().max()  # merged weights are dense: their inputs are rounded no more
    unmerge(network)
    assert torch.equal(logits(network), adapted)
    remove(network)
    after = quantized_layers(network)
    assert after.keys() == before.keys() and all(after[path] is before[path] for path in after)
    assert all(torch.equal(after[path].weight.codes, codes[path]) for path in codes) and torch.equal(logits(network), base)


def holders_of(network: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in network.named_modules() if hasattr(module, "parts") and hasattr(module, "base")}


# ---- observing


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        y = self.first(x)
        return self.second(y) if both else y


def run(network: nn.Module, x: Tensor) -> Tensor:
    return network(x)


@pytest.mark.parametrize("observer", ["minmax", "moving", "histogram", "percentile", "mse"])
@pytest.mark.parametrize("value", [0.0, 3.0, -0.25])
def test_inputs_that_are_all_alike(observer, value):
    network, x = Two(), torch.full((2, 6), value)
    found = observe(network, [x, x], run, observer=observer)
    scale, q = found["first"].scale.item(), found["first"](x)
    if observer in ("minmax", "moving", "histogram"):
        assert scale == pytest.approx(max(abs(value) / 255, 2**-23))
    assert ((q.codes - q.zero) * q.scale - value).abs().max() <= scale  # 0 is exact, and others are within a step
    quantize_linears(network, "int8-static", inputs=found)
    assert network(x).isfinite().all()


def test_what_cannot_be_observed():
    network = Two().train()
    x = torch.randn(2, 6)
    with pytest.raises(QuantError, match="the calibration set is empty"):
        observe(network, [], run)
    with pytest.raises(QuantError, match=r"^the input of first: nothing was observed"):
        observe(network, [x[:0]], run)
    with pytest.raises(QuantError, match=r"^the input of second: nothing was observed"):
        observe(network, [x], lambda network, x: network(x, both=False))
    for value in (math.nan, math.inf):
        broken = x.clone()
        broken[1, 4] = value
        with pytest.raises(QuantError, match=rf"^the input of first: .*\[1, 4\] is {value}"):
            observe(network, [x, broken], run)
    broken = Two()
    broken.first.weight.data[2, 3] = math.nan
    with pytest.raises(QuantError, match=r"^first\.weight: the value at \[2, 3\] is nan"):
        observe(broken, [x], run)
    with pytest.raises(QuantError, match="unknown observer 'largest'; observers: minmax, moving, histogram, percentile, mse"):
        observe(network, [x], run, observer="largest")
    with pytest.raises(QuantError, match="no linear layer to observe in a Two"):
        observe(network, [x], run, skip=(".",))
    assert network.training and not any(module._forward_pre_hooks for module in network.modules())  # as it was


def test_an_empty_batch_among_others_changes_nothing():
    network, x = Two(), torch.randn(4, 6)
    one, other = observe(network, [x], run), observe(network, [x[:0], x, x[:0]], run)
    for path in ("first", "second"):
        assert torch.equal(one[path].scale, other[path].scale) and torch.equal(one[path].zero, other[path].zero)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without biases, and with
@pytest.mark.parametrize("kind", KINDS)
def test_axes_of_x(kind, family):
    """y, and the gradient of x, of one row alone, of three axes and of no rows are those of a matrix of the same rows."""
    layer, x_NI = quantized(kind, family=family).body.blocks[0].mlp.up, 3 * torch.randn(6, 24)
    for shape in ((24,), (1, 24), (2, 3, 24), (0, 24), (2, 0, 24)):
        rows = math.prod(shape[:-1])
        one, other = x_NI[:rows].view(shape).requires_grad_(), x_NI[:rows].detach().requires_grad_()
        y, expected = layer(one), layer(other)
        assert y.shape == (*shape[:-1], 40) and torch.equal(y.flatten(), expected.flatten())
        if kind != "llm":  # whose outliers' columns are those of all rows together
            assert torch.equal(y.detach().view(-1, 40), layer(x_NI)[:rows])
        dy_NO = torch.randn(rows, 40)
        y.backward(dy_NO.view(y.shape)), expected.backward(dy_NO)
        assert torch.equal(one.grad.flatten(), other.grad.flatten()) and one.grad.any() == bool(rows)
        with torch.no_grad():
            assert torch.equal(layer(one), y)


def test_layers_by_themselves():
    layer = Int8Linear(quantize(torch.randn(3, 5)), None, DynamicInput(AFFINE))
    assert not layer(torch.zeros(2, 5)).any()
    with pytest.raises(ValueError, match=r"x of \(2, 4\) does not go with a weight of \(3, 5\)"):
        layer(torch.randn(2, 4))
