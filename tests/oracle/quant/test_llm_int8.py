"""LLM.int8() against bitsandbytes' Linear8bitLt on a CPU: codes, outputs, gradients and files, bit for bit.

Sums of products stay below 2^24 here: above, bitsandbytes' own depend on the machine (`quant.int8_product`).
"""

import json
import logging
import math
from collections import Counter
from itertools import cycle, product

import bitsandbytes
import pytest
import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Linear8bitLt
from safetensors.torch import load_file
from torch import Tensor, nn

from quant import llm_int8
from quant.bnb_8bit_io import config_entry, find_parts, from_tensors, read_config, to_tensors
from quant.config import Int8, QuantError
from quant.int8 import Codes
from quant.llm_int8 import LlmInt8Linear, LlmInt8Tensor, quantize, quantize_rowwise, split_outliers
from tests.compare import count, differing

LIBRARY = f"bitsandbytes {bitsandbytes.__version__}"
FOLDERS = f"transformers {transformers.__version__}, {LIBRARY}"
EXACT = (0, "numbers whose bits differ")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((48, 64), (33, 50), (1, 7), (20, 1030))  # O × I


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """bitsandbytes says in each product that x is rounded to float16."""
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "level", logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def theirs(weight: Tensor, bias: Tensor | None, threshold: float) -> Linear8bitLt:
    out, ins = weight.shape
    layer = Linear8bitLt(ins, out, bias is not None, has_fp16_weights=False, threshold=threshold)
    layer.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu").eval()


def ours(weight: Tensor, bias: Tensor | None, threshold: float) -> LlmInt8Linear:
    return LlmInt8Linear(quantize(weight), None if bias is None else nn.Parameter(bias.clone()), threshold)


def record(parity, part: str, found: Counter, library: str = LIBRARY) -> None:
    for name, each in found.items():
        parity(f"{part}, {name}", library, count(each), *EXACT)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the weight


def weights() -> list[Tensor]:
    noise = [torch.randn(shape) * size for shape, size in product(SHAPES, (1e-7, 0.02, 1.0, 9e3))]
    steps = torch.arange(-127, 128) + torch.tensor([[0.0], [0.5]])  # of 127: whole ones, and half-way between
    zeros = torch.cat((torch.randn(2, 5), torch.zeros(1, 5), torch.full((1, 5), 1e-9)))
    return [*noise, steps, steps / 3, torch.full((2, 3), 65504.0), zeros, torch.randn(40, 30).T, torch.randn(9, 60)[:, ::3]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(dtype, parity, monkeypatch):
    monkeypatch.setattr(llm_int8, "CHUNK", 500)  # a few rows at a time
    wrong = Counter()
    for weight in (each.clamp(-6e4, 6e4).to(dtype) for each in weights()):
        codes, absmax = (layer := theirs(weight, None, 6.0).weight).data, layer.SCB
        small, values = quantize(weight), functional.int8_vectorwise_dequant(codes, absmax)
        wrong["codes"] += differing(small.codes, codes)
        wrong["absmax"] += differing(small.absmax, absmax)
        wrong["values"] += differing(small.dequantize(), values.to(dtype))
    record(parity, f"LLM.int8(), weight: {name_of(dtype)}", wrong)


def test_the_module_of_a_weight():
    small = quantize(torch.randn(6, 10, dtype=torch.bfloat16))
    assert (small.dequantize().dtype, small.numel(), small.nbytes, small.bits) == (torch.bfloat16, 60, 84, 11.2)
    assert (small.granularity, small.group_size, small.scale.shape) == ("channel", 10, (6, 1))
    order, which, values = torch.tensor([5, 0, 3, 1, 2, 4]), torch.tensor([7, 2]), small.dequantize(torch.float32)
    assert torch.equal(small.reordered(order).dequantize(torch.float32), values[order])
    assert torch.equal(small.columns(which), values[:, which]) and torch.equal(small.rows(2, 4), values[2:4])
    before = small.state_dict()
    after = small.half().state_dict()  # its formats are its own
    assert list(after) == ["codes", "absmax"] and all(after[name].dtype == each.dtype for name, each in before.items())


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), r"\[1, 1\] is nan"),
        (torch.tensor([[1.0, -7e4]]), r"in float16, the value at \[0, 1\] is -inf"),
        (torch.ones(2, 2, dtype=torch.int32), "int32"),
        (torch.ones(4), r"\[4\]"),
        (torch.ones(0, 4), "no numbers"),
    ],
)
def test_what_is_no_weight(weight, message):
    with pytest.raises(QuantError, match=message):
        quantize(weight)


# ---- the product


def outlying(x: Tensor, generator: torch.Generator) -> Tensor:
    """Some columns are large, most of their numbers above the threshold."""
    return torch.where(torch.rand(x.size(-1), generator=generator) < 0.15, 30 * x, x)


KINDS = {
    "none": lambda x, g: x,
    "columns": outlying,
    "one number": lambda x, g: x.flatten().index_fill(0, torch.tensor([x.numel() // 2]), -40.0).view(x.shape),
    "all": lambda x, g: x + 10 * x.sign(),
    "at the threshold": lambda x, g: torch.where(x > 0.9, 5.999, torch.where(x < -0.9, -6.001, x)),  # both 6 in float16
    "zeros": lambda x, g: x * (torch.rand(x.shape[:-1], generator=g) < 0.5)[..., None],
    "nothing below": lambda x, g: torch.where(x > 0, 7.0, 0.0),
    "below float16": lambda x, g: x * 1e-7,
    "beyond float16": lambda x, g: torch.where(torch.rand(x.size(-1), generator=g) < 0.1, 1e5, x),
}


def cases(dtype: torch.dtype, shapes=SHAPES):
    """weight, bias, x and threshold; thresholds also such as float16 does not have."""
    generator, thresholds = torch.Generator().manual_seed(0), cycle((6.0, 1e-3, 2.71, 65504.0, 1e30))
    batches = ((1,), True), ((5,), False), ((2, 3), True), ((150,), False)  # rows; with a bias or without
    for (out, ins), (rows, biased), kind in product(shapes, batches, KINDS):
        weight, bias = (0.1 * torch.randn(size, generator=generator) for size in ((out, ins), (out,)))
        x = KINDS[kind](0.7 * torch.randn(*rows, ins, generator=generator), generator).to(dtype)
        if x.isfinite().all():  # 1e5 is not in float16
            yield weight, bias if biased else None, x, 6.001 if kind == "at the threshold" else next(thresholds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(dtype, parity):
    wrong, apart = Counter(), []
    for weight, bias, x, threshold in cases(dtype):
        own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(weight, bias, threshold)(own), theirs(weight, bias, threshold)(other)
        wrong["y"] += differing(y, expected)
        dy = torch.randn_like(y)
        y.backward(dy), expected.backward(dy)
        wrong["gradient of x"] += differing(own.grad, other.grad)
        apart.append(int((x.half().abs() >= threshold).reshape(-1, x.size(-1)).any(dim=0).sum()))
    assert {0, 1, 1030} < set(apart)  # columns
    record(parity, f"LLM.int8(), product: {name_of(dtype)}", wrong)


def test_in_training_and_compiled_it_is_the_same():
    """In training bitsandbytes' layer takes another way on a CPU; its gradient of x is the same there too."""
    weight, bias, x = torch.randn(24, 32), torch.randn(24), 3 * torch.randn(5, 32)
    layer, library, dy = ours(weight, bias, 6.0), theirs(weight, bias, 6.0), torch.randn(5, 24)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer.train()(own)
    y.backward(dy), library.train()(other).backward(dy)
    assert torch.equal(y, layer.eval()(x)) and torch.equal(y, torch.compile(layer, backend="eager")(x))
    assert differing(own.grad, other.grad) == 0
    assert torch.equal(layer.bias.grad, dy.sum(0)) and not layer.weight.codes.requires_grad


def test_what_it_stands_for():
    """y is x Ŵᵀ + b but for the rounding of x: half a step, a/254, and float16's 2^-11, a number; and the constant."""
    weight, bias, x = torch.randn(40, 64), torch.randn(40), outlying(torch.randn(30, 64), torch.Generator().manual_seed(0))
    layer = ours(weight, bias, 6.0)
    outlier = x.abs() >= 6
    inside, columns = x.masked_fill(outlier, 0).double(), outlier.any(dim=0)
    W = layer.dequantize(torch.float64)
    step = inside.abs().amax(dim=1, keepdim=True) / 254 + inside.abs() * 2**-11
    bound = (step * ~columns) @ W.abs().T * (1 + 1e-3)
    bound += 1.81e-5 * (inside.abs() @ W.abs().T) + 1e-5  # float32, in the end
    # what lies beside an outlier in its column is not rounded at all
    assert columns.any() and (outlier.sum(0) < len(x))[columns].all()
    assert ((layer(x).double() - (x.double() @ W.T + bias)).abs() <= bound).all()


@pytest.mark.parametrize("rows", [3, 200])  # two ways of adding up
def test_rows_without_numbers(rows):
    """Zeros give b, NaN gives NaN, infinity what a product with Ŵ gives; other rows are as they were."""
    layer, x = ours(torch.randn(8, 16), torch.randn(8), 6.0), torch.randn(rows, 16)
    x[0] = 0
    plain, changed = layer(x), x.clone()
    assert torch.equal(plain[0], layer.bias)
    changed[1, 4] = torch.nan
    y = layer(changed)
    assert y[1].isnan().all() and torch.equal(y[2:], plain[2:]) and torch.equal(y[0], plain[0])
    changed[1, 4] = torch.inf
    assert torch.equal(layer(changed)[1], torch.inf * layer.dequantize()[:, 4])
    assert layer(torch.full((1, 16), torch.nan)).isnan().all()
    assert layer(x[:0]).shape == (0, 8) and torch.equal(layer(x[0]), layer.bias)


def test_autocast():
    """y is in autocast's format, outliers or not; x is rounded as it is."""
    layer, x = ours(torch.randn(8, 16), torch.randn(8), 6.0), torch.randn(5, 16).requires_grad_()
    for scale in (1, 4):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(scale * x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(scale * x), rtol=2**-6, atol=2**-4)  # Ŵ, b and y in bfloat16, sums of 16
    y.sum().backward()
    assert x.grad.dtype == layer.bias.grad.dtype == torch.float32


def test_what_is_no_input_and_no_threshold():
    layer = ours(torch.randn(8, 16), None, 6.0)
    with pytest.raises(ValueError, match="8, 16"):
        layer(torch.randn(2, 8))
    with pytest.raises(QuantError, match=r"threshold=0\.0"):
        LlmInt8Linear(layer.weight, threshold=0.0)


def divided(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    absmax_N = x_NI.abs().amax(dim=1).float()
    return (x_NI / (absmax_N[:, None] / 127)).nan_to_num_(0).round_().to(torch.int8), absmax_N


def splitting(rounded=Tensor.half, reaches=torch.ge, hide=True, clear=True):
    """`split_outliers`, one decision changed."""

    def other(x_NI: Tensor, threshold: float) -> tuple[Codes, Tensor]:
        x_NI = rounded(x_NI)
        outlier_NI = reaches(x_NI.abs(), threshold)
        codes, absmax_N = quantize_rowwise(x_NI.masked_fill(outlier_NI, 0) if hide else x_NI)
        columns = outlier_NI.any(dim=0).nonzero().squeeze(1)
        if clear:
            codes[:, columns] = 0
        return Codes(codes, absmax_N[:, None], None), columns

    return other


def columnwise(x_NI: Tensor, threshold: float) -> tuple[Codes, Tensor]:
    """The rows' scales without all of an outlier's column."""
    _, columns = split_outliers(x_NI, threshold)
    codes, absmax_N = quantize_rowwise(x_NI.half().index_fill(1, columns, 0))
    return Codes(codes, absmax_N[:, None], None), columns


MUTANTS = {  # name: (home, attribute, what is there instead)
    "1/127² with all its digits": (llm_int8, "RESCALE", 1 / 127**2),
    "divided, not multiplied": (llm_int8, "quantize_rowwise", divided),
    "x is not rounded to float16": (llm_int8, "split_outliers", splitting(rounded=Tensor.float)),
    "above the threshold": (llm_int8, "split_outliers", splitting(reaches=torch.gt)),
    "outliers measured": (llm_int8, "split_outliers", splitting(hide=False)),
    "outliers' columns twice": (llm_int8, "split_outliers", splitting(clear=False)),
    "outliers' columns not measured": (llm_int8, "split_outliers", columnwise),
    "outliers by the gradient's weight": (LlmInt8Tensor, "columns", lambda w, c: w.codes[:, c] * w.scale),
    "the gradient by the outliers' weight": (LlmInt8Tensor, "scale", property(lambda w: w.absmax[:, None] / 127)),
}


def mismatches() -> int:
    wrong = 0
    for weight, bias, x, threshold in cases(torch.float32, SHAPES[:1]):
        own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(weight, bias, threshold)(own), theirs(weight, bias, threshold)(other)
        y.sum().backward(), expected.sum().backward()
        wrong += differing(y, expected) + differing(own.grad, other.grad)
    return wrong


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_sees(name, monkeypatch):
    monkeypatch.setattr(*MUTANTS[name])
    assert mismatches()


def test_the_mutants_differ_in_one_decision(monkeypatch):
    monkeypatch.setattr(llm_int8, "split_outliers", splitting())
    assert not mismatches()


# ---- files


def test_a_state_dict_both_ways(parity):
    weight, bias, x = torch.randn(24, 32), torch.randn(24), 3 * torch.randn(5, 32)
    library = theirs(weight, bias, 6.0)
    stored = {f"a.{name}": each for name, each in library.state_dict().items()} | {"b.weight": weight}
    found = find_parts(stored)
    assert found == {"a.weight": {part: f"a.{part}" for part in ("weight", "SCB", "weight_format")}}
    small = from_tensors({part: stored[name] for part, name in found["a.weight"].items()}, "a.weight", torch.bfloat16)
    assert small.dequantize().dtype == torch.bfloat16
    written = to_tensors(small)
    for part, tensor in written.items():
        parity(f"LLM.int8(), files: state dict, {part}", LIBRARY, differing(tensor, stored[f"a.{part}"]), *EXACT)
    read = theirs(torch.zeros(24, 32), torch.zeros(24), 6.0)
    read.load_state_dict(to_tensors(quantize(weight)) | {"bias": bias})
    parity("LLM.int8(), files: state dict, y, read by it", LIBRARY, differing(read(x), library(x)), *EXACT)
    own = LlmInt8Linear(small, bias)(x)
    parity("LLM.int8(), files: state dict, y, read by us", LIBRARY, differing(own, library(x)), *EXACT)


NETWORKS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=61, n_positions=16)
    ),
}


@pytest.mark.parametrize("family", NETWORKS)
def test_folders_of_transformers(family, tmp_path, parity):
    """What stands in a file that it wrote: each weight O × I, also where its own class keeps I × O (GPT-2)."""
    network = NETWORKS[family]()
    network.save_pretrained(tmp_path / "dense")
    kept = ["lm_head", "down_proj"]
    how = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0, llm_int8_skip_modules=kept)
    small = type(network).from_pretrained(tmp_path / "dense", quantization_config=how)
    small.save_pretrained(tmp_path / "8-bit")
    stored, dense = load_file(tmp_path / "8-bit" / "model.safetensors"), network.state_dict()
    found = find_parts(stored)
    assert len(found) == {"llama": 6, "gpt2": 4}[family]
    wrong = Counter()
    for name, parts in found.items():
        weight = quantize(dense[name].T if family == "gpt2" else dense[name])
        for part, tensor in to_tensors(weight).items():
            wrong[part] += differing(tensor, stored[parts[part]])
        assert torch.equal(from_tensors({p: stored[n] for p, n in parts.items()}, name, weight.dtype).codes, weight.codes)
    record(parity, f"LLM.int8(), files: {family}", wrong, FOLDERS)
    settings = json.loads((tmp_path / "8-bit" / "config.json").read_text())["quantization_config"]
    assert read_config(settings) == Int8(scheme="llm-int8", threshold=5.0, skip=tuple(kept))
    assert config_entry(read_config(settings), kept) == settings


@pytest.mark.parametrize(
    "part, tensor, message",
    [
        ("weight", None, "no part 'weight'"),
        ("SCB", None, "no part 'SCB'"),
        ("weight", torch.zeros(4, 6), r"is float32 of \[4, 6\]"),
        ("weight", torch.zeros(24, dtype=torch.int8), r"is int8 of \[24\]"),
        ("weight", torch.zeros(6, 4, dtype=torch.int8), "SCB has 4 numbers"),
        ("SCB", torch.ones(4, dtype=torch.int32), "negative or non-finite"),
        ("SCB", torch.tensor([1.0, 1.0, 1.0, torch.nan]), "negative or non-finite"),
        ("SCB", torch.tensor([1.0, 1.0, 1.0, -1.0]), "negative or non-finite"),
        ("weight_format", torch.tensor(2, dtype=torch.uint8), r"weight_format is \[2\]"),
        ("weight_format", torch.zeros(2), r"weight_format is \[0"),
    ],
)
def test_parts_that_do_not_fit(part, tensor, message):
    parts = to_tensors(quantize(torch.randn(4, 6)))
    old = {name: each for name, each in parts.items() if name != "weight_format"}  # the oldest files have none
    assert torch.equal(from_tensors(old, "a.weight", torch.float32).codes, parts["weight"])
    changed = {name: each for name, each in (parts | {part: tensor}).items() if each is not None}
    with pytest.raises(QuantError, match=f"^a.weight.*{message}"):
        from_tensors(changed, "a.weight", torch.float32)


def test_settings():
    ours = Int8(scheme="llm-int8", threshold=4.5, skip=("a", "b"))
    assert read_config(config_entry(ours, ["a", "b"])) == ours
    assert read_config({"_load_in_8bit": True, "llm_int8_threshold": 0}).threshold == 65504  # bitsandbytes' "never"
    for wrong in (
        {"load_in_4bit": True},
        {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
        *({"load_in_8bit": True, "llm_int8_threshold": value} for value in ("6", True, -1.0, math.nan, math.inf, 10**400)),
        *({"load_in_8bit": True, "llm_int8_skip_modules": value} for value in ("lm_head", [1])),
    ):
        with pytest.raises(QuantError):
            read_config(wrong)
