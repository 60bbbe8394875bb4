"""The head's losses against torch's cross-entropy, and the chunked one against its plain twin; each with its mutant."""

import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train.losses.chunked
from tests.bench.loss import peak_bytes
from tests.compare import Error, absolute, relative
from train.losses.choose import CHUNKED_FROM, LOSSES, choose_loss
from train.losses.chunked import chunked_linear_cross_entropy, row_loss_
from train.losses.cross_entropy import cross_entropy_reference, linear_cross_entropy

ROOT = Path(__file__).resolve().parents[3]
TORCH = f"torch {torch.__version__}"
ROUNDING = "float64 rounding; sums in another order"
ROWS, WORDS, WIDTH = 14, 31, 12
OPTIONS = {
    "plain": {},
    "smoothed": {"smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "smoothed, z-loss": {"smoothing": 0.3, "z_loss": 0.02},
    "all smooth": {"smoothing": 1.0},
}


def leaf(*shape, dtype=torch.float64, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()


def case(dtype=torch.float64, scale=1.0):
    """(hidden, weight, bias), and labels of which 4 of 14 are not scored."""
    labels = torch.randint(0, WORDS, (2, 7))
    labels[0, :3] = labels[1, 5] = -100
    return (leaf(2, 7, WIDTH, dtype=dtype), leaf(WORDS, WIDTH, dtype=dtype, scale=scale), leaf(WORDS, dtype=dtype)), labels


def with_gradients(total, inputs, factor=1.0, **options):
    return total.detach(), *torch.autograd.grad(total * factor, inputs, **options)


def of(loss, inputs, labels, factor=1.0, **options):
    """(sum, gradients by hidden states, matrix and bias) of a loss."""
    hidden, weight, bias = inputs
    return with_gradients(loss(hidden, weight, labels, bias, **options)[0], inputs, factor)


def theirs(inputs, labels, factor=1.0, smoothing=0.0, z_loss=0.0):
    """torch's cross-entropy of the scored rows alone; the z-loss written out."""
    hidden, weight, bias = inputs
    scored = labels.flatten() != -100
    logits = F.linear(hidden.flatten(0, 1)[scored], weight, bias)
    total = F.cross_entropy(logits, labels.flatten()[scored], reduction="sum", label_smoothing=smoothing)
    total = total + z_loss * logits.exp().sum(-1).log().pow(2).sum()
    return with_gradients(total, inputs, factor)


@pytest.mark.parametrize("name", OPTIONS)
def test_plain_twins(name, parity):
    inputs, labels = case()
    expected = theirs(inputs, labels, **OPTIONS[name])
    logits = F.linear(inputs[0], inputs[1], inputs[2]).flatten(0, 1)
    reference = cross_entropy_reference(logits, labels.flatten(), **OPTIONS[name])
    parity(f"cross-entropy: {name}", TORCH, absolute(with_gradients(reference, inputs), expected), 1e-12, ROUNDING)
    fast = of(linear_cross_entropy, inputs, labels, **OPTIONS[name])
    parity(f"cross-entropy, fast twin: {name}", TORCH, absolute(fast, expected), 1e-12, ROUNDING)
    assert linear_cross_entropy(inputs[0], inputs[1], labels)[1] == 10


@pytest.mark.parametrize("chunk_rows", [1, 3, 10, 1000, None])
@pytest.mark.parametrize("name", OPTIONS)
def test_chunked(name, chunk_rows, parity):
    inputs, labels = case()
    loss = partial(chunked_linear_cross_entropy, chunk_rows=chunk_rows)
    ours, expected = of(loss, inputs, labels, 3.7, **OPTIONS[name]), theirs(inputs, labels, 3.7, **OPTIONS[name])
    parity(f"chunked cross-entropy: {name}, {chunk_rows} rows", TORCH, absolute(ours, expected), 1e-12, ROUNDING)
    assert loss(inputs[0], inputs[1], labels)[1] == 10
    with torch.no_grad():  # the sum alone, and no bias
        total, _ = loss(inputs[0], inputs[1], labels, **OPTIONS[name])
        plain, _ = linear_cross_entropy(inputs[0], inputs[1], labels, **OPTIONS[name])
    assert total.item() == pytest.approx(plain.item(), rel=1e-13)


def test_mutants_are_seen():
    """What these comparisons would let through, they would not see: each of these is a mistake seen elsewhere."""
    inputs, labels = case()
    options = OPTIONS["smoothed, z-loss"]
    expected = theirs(inputs, labels, **options)

    def everywhere(hidden, weight, labels, bias, smooth, square):
        """Smoothing, or the squares, of the ignored rows too."""
        scored, logits = labels.flatten() != -100, F.linear(hidden, weight, bias).flatten(0, 1)
        total = F.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=0.3)
        total = total + 0.02 * logits.logsumexp(-1)[scored | square].square().sum()
        return total + 0.3 * smooth * -logits.log_softmax(-1).mean(-1)[~scored].sum(), scored.sum()

    right = of(everywhere, inputs, labels, smooth=False, square=False)
    assert absolute(right, expected) < 1e-12
    for mutant in (
        of(everywhere, inputs, labels, smooth=True, square=False),
        of(everywhere, inputs, labels, smooth=False, square=True),
        of(linear_cross_entropy, inputs, labels.clamp(min=0), **options),  # -100 taken for a class
        of(linear_cross_entropy, inputs, labels, smoothing=0.3),
        of(linear_cross_entropy, inputs, labels, z_loss=0.02),
        of(linear_cross_entropy, inputs, labels, smoothing=0.3 * WORDS / (WORDS - 1), z_loss=0.02),  # no share for the label
    ):
        assert relative(mutant[:1], expected[:1]) > 1e-4 and relative(mutant[1:], expected[1:]) > 1e-4


@pytest.mark.parametrize("name", ["plain", "chunked"])
def test_nothing_leaks_from_rows_that_are_not_scored(name):
    inputs, labels = case()
    expected = of(LOSSES[name], inputs, labels, smoothing=0.1, z_loss=0.01)
    with torch.no_grad():
        inputs[0][labels == -100] = torch.nan
    ours = of(LOSSES[name], inputs, labels, smoothing=0.1, z_loss=0.01)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert (ours[1][labels == -100] == 0).all() and (ours[1][labels != -100] != 0).all()


@pytest.mark.parametrize("name", ["plain", "chunked"])
def test_nothing_scored_is_zero(name):
    inputs, labels = case()
    labels.fill_(-100)
    hidden, weight, bias = inputs
    total, count = LOSSES[name](hidden, weight, labels, bias, smoothing=0.1, z_loss=0.01)
    assert total.item() == 0 and count == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(total, inputs))
    assert cross_entropy_reference(torch.randn(3, 5), labels[0, :3], smoothing=0.1) == 0


@pytest.mark.parametrize("name", ["plain", "chunked"])
def test_a_class_that_is_ruled_out(name):
    """A logit of -inf: probability 0 and a finite loss, as long as no smoothing asks for it."""
    inputs, labels = case()
    labels[labels == 4] = 5
    with torch.no_grad():
        inputs[2][4] = -torch.inf
    ours = of(LOSSES[name], inputs, labels, z_loss=0.01)
    assert all(tensor.isfinite().all() for tensor in ours) and (ours[2][4] == 0).all()


def test_a_label_that_is_no_class_raises():
    inputs, labels = case()
    labels[1, 1] = WORDS
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_linear_cross_entropy(inputs[0], inputs[1], labels)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight bias"])
def test_what_is_frozen_gets_no_gradient(frozen, monkeypatch):
    inputs, labels = case()
    expected = dict(zip(("hidden", "weight", "bias"), theirs(inputs, labels)[1:], strict=True))
    named = dict(zip(("hidden", "weight", "bias"), inputs, strict=True))
    for name in frozen.split():
        named[name].requires_grad_(False)
    if "weight" in frozen:  # nor is one computed
        monkeypatch.setattr(train.losses.chunked, "add_matmul_", None)
    total, _ = chunked_linear_cross_entropy(named["hidden"], named["weight"], labels, named["bias"], chunk_rows=3)
    total.backward()
    for name, tensor in named.items():
        assert tensor.grad is None if name in frozen else absolute([tensor.grad], [expected[name]]) < 1e-12


def test_tied_weights_and_strides():
    """One matrix at both ends gets the sum of both gradients; hidden states and matrix may lie in memory as they like."""
    weight, ids = leaf(WIDTH, WORDS), torch.randint(0, WORDS, (3, 6))
    labels = torch.randint(0, WORDS, (6, 3)).T  # not contiguous
    gradients = []
    for loss in (linear_cross_entropy, partial(chunked_linear_cross_entropy, chunk_rows=4)):
        matrix = weight.T
        hidden = F.embedding(ids, matrix).tanh().permute(0, 2, 1).contiguous().permute(0, 2, 1)
        assert not (hidden.is_contiguous() or matrix.is_contiguous() or labels.is_contiguous())
        gradients += with_gradients(loss(hidden, matrix, labels)[0], [weight])
    assert absolute(gradients[:2], gradients[2:]) < 1e-12


def test_backward_twice_and_not_twice_differentiable():
    inputs, labels = case()
    total, _ = chunked_linear_cross_entropy(inputs[0], inputs[1], labels, inputs[2], chunk_rows=4)
    first = torch.autograd.grad(total * 2, inputs, retain_graph=True)
    second = torch.autograd.grad(total * 6, inputs)
    assert absolute([3 * gradient for gradient in first], second) < 1e-12
    total, _ = chunked_linear_cross_entropy(inputs[0], inputs[1], labels, inputs[2])
    with pytest.raises(RuntimeError, match="no gradients of its gradients"):
        torch.autograd.grad(total, inputs[:1], create_graph=True)


# ---- fewer bits

HALVES = {"bf16": (torch.bfloat16, 2e-2, "8 bits of mantissa"), "fp16": (torch.float16, 3e-3, "11 bits of mantissa")}


@pytest.mark.parametrize("way", ["autocast", "weights"])
@pytest.mark.parametrize("name", HALVES)
def test_half_precision(name, way, parity):
    """Products in 16 bits as the plain twin takes them, everything else in float32."""
    dtype, tolerance, reason = HALVES[name]
    inputs, labels = case(torch.float32 if way == "autocast" else dtype)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    expected = theirs(wide, labels, smoothing=0.1, z_loss=0.01)
    with torch.autocast("cpu", dtype) if way == "autocast" else nullcontext():
        loss = partial(chunked_linear_cross_entropy, chunk_rows=3)
        ours = of(loss, inputs, labels, smoothing=0.1, z_loss=0.01)
        plain = of(linear_cross_entropy, inputs, labels, smoothing=0.1, z_loss=0.01)
    assert [x.dtype for x in ours] == [x.dtype for x in plain] == [torch.float32] + [x.dtype for x in inputs]
    parity(f"chunked cross-entropy in 16 bits: {name}, {way}", f"{TORCH} float64", relative(ours, expected), tolerance, reason)
    assert relative(ours, expected) < 2 * relative(plain, expected)


@pytest.mark.parametrize("name", HALVES)
def test_a_second_backward_outside_autocast(name):
    """It computes anew, in the number format of the forward pass."""
    inputs, labels = case(torch.float32)
    with torch.autocast("cpu", HALVES[name][0]):
        total, _ = chunked_linear_cross_entropy(inputs[0], inputs[1], labels, inputs[2], chunk_rows=4)
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(total, inputs), strict=True))


def test_number_formats_mix_under_autocast_only():
    hidden, weight = leaf(3, WIDTH, dtype=torch.bfloat16), leaf(WORDS, WIDTH, dtype=torch.float32)
    for loss in (linear_cross_entropy, chunked_linear_cross_entropy):
        with pytest.raises((TypeError, RuntimeError), match=r"dtype|autocast"):
            loss(hidden, weight, torch.zeros(3, dtype=torch.long))


def test_autocast_leaves_float64_alone():
    inputs, labels = case()
    with torch.autocast("cpu", torch.bfloat16):
        ours = of(chunked_linear_cross_entropy, inputs, labels)
    assert absolute(ours, theirs(inputs, labels)) < 1e-12


@pytest.mark.parametrize("name", HALVES)
def test_the_matrix_s_gradient_is_summed_in_float32(name):
    """512 equal rows, one a chunk: in 16 bits the sum would stop growing once a row is less than half its last place."""
    dtype = HALVES[name][0]
    row, weight = torch.randn(1, WIDTH).to(dtype), torch.zeros(WORDS, WIDTH, dtype=dtype, requires_grad=True)
    total, _ = chunked_linear_cross_entropy(row.expand(512, -1), weight, torch.full((512,), 3), chunk_rows=1)
    (gradient,) = torch.autograd.grad(total / 512, weight)
    expected = -row.double() * (1 - 1 / WORDS)
    assert relative([gradient[3:4]], [expected]) < 1e-2
    added = torch.zeros_like(row)
    for _ in range(512):  # the mutant
        added += (expected / 8).to(dtype)
    assert relative([added / 64], [expected]) > (0.1 if name == "bf16" else 1e-3)


def test_small_gradients_outlive_float16():
    """A step's gradients are divided by its count and multiplied by the loss scale; made before both are known, most
    probabilities are below float16's smallest number. With a scale of 2^16 the plain twin keeps them, and so does ours."""
    hidden, weight = leaf(4, WIDTH, dtype=torch.float32), leaf(WORDS, WIDTH, dtype=torch.float32, scale=0.1)
    bias = torch.zeros(WORDS)
    bias[0] = 20.0  # all other words have a probability near 1e-9
    labels, scale = torch.zeros(4, dtype=torch.long), 2.0**16
    with torch.autocast("cpu", torch.float16):
        total, _ = chunked_linear_cross_entropy(hidden, weight, labels, bias)
    (ours,) = torch.autograd.grad(total * scale, weight)
    logits = F.linear(hidden.double(), weight.double(), bias.double())
    expected = ((logits.softmax(-1) - F.one_hot(labels, WORDS)).T @ hidden.double() * scale).detach()
    assert relative([ours[1:]], [expected[1:]]) < 2e-2
    assert (logits.softmax(-1)[:, 1:].half() == 0).all()  # what would be left without care


# ---- where it runs


def test_compiled_and_wrapped():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(leaf(WORDS, WIDTH).detach())

        def forward(self, hidden, labels):
            total, count = chunked_linear_cross_entropy(hidden * 2, self.weight, labels, smoothing=0.1, chunk_rows=4)
            return total / count

    inputs, labels = case()
    head = Head()
    expected = with_gradients(head(inputs[0], labels), [inputs[0], head.weight])
    compiled = torch.compile(head, backend="aot_eager")
    assert absolute(with_gradients(compiled(inputs[0], labels), [inputs[0], head.weight]), expected) < 1e-12


def test_the_choice():
    assert choose_loss(CHUNKED_FROM // 400, 100, torch.device("cpu")) == "plain"
    assert choose_loss(CHUNKED_FROM // 400 + 1, 100, torch.device("cpu")) == "chunked"
    assert choose_loss(1, 100, torch.device("cuda")) == "triton"


def test_triton_is_imported_when_first_wanted():
    code = "import sys, train.losses.choose; print('triton' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


# ---- memory


@pytest.mark.parametrize("mode", ["fp32", "bf16", "evaluation"])
def test_memory_is_an_eighth(mode, parity):
    """Above the gradients, which both must give. Nothing in one piece is as large as the logits."""
    rows, words, width = 2048, 4096, 32
    hidden, weight = leaf(rows, width, dtype=torch.float32), leaf(words, width, dtype=torch.float32)
    labels = torch.randint(0, words, (rows,))

    def step(loss) -> None:
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"), torch.set_grad_enabled(mode != "evaluation"):
            total, count = loss(hidden, weight, labels)
        if mode != "evaluation":
            (total / count).backward()

    gradients = 0 if mode == "evaluation" else hidden.nbytes + weight.nbytes
    extra, pieces = {}, {}
    for name, loss in {"plain": linear_cross_entropy, "chunked": partial(chunked_linear_cross_entropy, chunk_rows=64)}.items():
        hidden.grad = weight.grad = None
        highest, pieces[name] = peak_bytes(partial(step, loss))
        extra[name] = highest - gradients
    assert pieces["plain"] == 4 * rows * words
    assert pieces["chunked"] <= max(4 * 64 * words, hidden.nbytes, weight.nbytes)
    share = Error(extra["chunked"] / extra["plain"], "share of the memory")
    parity(f"chunked cross-entropy, memory: {mode}", "our plain twin", share, 1 / 8, "the promise")


def test_the_default_chunk_keeps_the_bar():
    """Of the logits of 8,192 rows and 128,256 words the default holds a sixteenth at a time."""
    seen = []

    def spy(logits_RV, labels_R, **options):
        seen.append(len(logits_RV))
        return row_loss_(logits_RV, labels_R, **options)

    hidden, weight, labels = torch.randn(600, 2), torch.randn(128_256, 2), torch.zeros(600, dtype=torch.long)
    chunked_linear_cross_entropy(hidden, weight, labels, row_loss_=spy)
    assert seen == [512, 88]


@pytest.mark.parametrize("loss", [linear_cross_entropy, chunked_linear_cross_entropy])
@pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.long), torch.zeros(5, dtype=torch.long), torch.zeros(4)])
def test_labels_must_be_one_a_row(loss, labels):
    with pytest.raises(ValueError, match="one label for each row of"):
        loss(torch.randn(4, 6), torch.randn(9, 6), labels)
