"""Log-probabilities of sequences from hidden states and the head's matrix, beside their plain twin that has all logits."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from tests.bench.loss import peak_bytes
from tests.compare import Error, absolute, relative
from tests.oracle.train.test_losses import HALVES, TORCH, leaf
from train.losses.sequence import sequence_log_probs, sequence_log_probs_reference

ROUNDING = "float64 rounding; sums in another order"
ROWS, LENGTH, WIDTH, WORDS = 5, 7, 12, 31
FROZEN = {"": (), "matrix": (1,), "bias": (2,), "matrix and bias": (1, 2), "hidden states": (0,)}


def case(dtype=torch.float64):
    """(hidden, matrix, bias), labels of rows of 0 to 7 tokens, one with a gap; weights of tokens; a factor of each row."""
    labels_BT = torch.randint(0, WORDS, (ROWS, LENGTH))
    labels_BT[0, :3] = labels_BT[1, 5] = labels_BT[2] = labels_BT[3, 1:] = -100
    inputs = leaf(ROWS, LENGTH, WIDTH, dtype=dtype), leaf(WORDS, WIDTH, dtype=dtype), leaf(WORDS, dtype=dtype)
    weights_BT = torch.rand(ROWS, LENGTH, dtype=torch.float64)
    upstream_B = torch.tensor([-1.3, 0.4, 2.0, -0.2, 0.9], dtype=torch.float64)
    return inputs, labels_BT, weights_BT, upstream_B


def of(function, inputs, labels_BT, upstream_B, **options):
    """(log-probabilities, the gradients of their sum times a factor a row by those inputs that have one)."""
    hidden, weight, bias = inputs
    found_B = function(hidden, weight, labels_BT, bias, **options)
    learned = [each for each in inputs if each is not None and each.requires_grad]
    return found_B.detach(), *torch.autograd.grad((found_B * upstream_B.to(found_B.dtype)).sum(), learned)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize("frozen", FROZEN)
def test_values_and_gradients(frozen, chunk_rows, is_weighted, parity):
    """Rows of different factors, as a loss of pairs has them: positive, negative, for a matrix that learns and one that does
    not."""
    inputs, labels_BT, weights_BT, upstream_B = case()
    for index in FROZEN[frozen]:
        inputs[index].requires_grad_(False)
    weights = {"token_weights_BT": weights_BT} if is_weighted else {}
    expected = of(sequence_log_probs_reference, inputs, labels_BT, upstream_B, **weights)
    ours = of(sequence_log_probs, inputs, labels_BT, upstream_B, chunk_rows=chunk_rows, **weights)
    assert len(ours) == 4 - len(FROZEN[frozen]) and ours[0][2] == 0 and ours[0][3] != 0
    assert frozen == "hidden states" or (ours[1][2] == 0).all(), "a row without labels"
    name = f"log-probabilities of sequences: {frozen or 'nothing'} frozen, {chunk_rows} rows"
    parity(name + ", weighted" * is_weighted, f"{TORCH} log_softmax", absolute(ours, expected), 1e-12, ROUNDING)


@pytest.mark.parametrize("way", ["trained", "frozen matrix"])
def test_mutants_are_seen(way):
    """A factor that is lost, or that of a neighbour; a label that is not shifted as it should be; -100 taken for a class."""
    inputs, labels_BT, _, upstream_B = case()
    inputs[1].requires_grad_(way == "trained"), inputs[2].requires_grad_(way == "trained")
    expected = of(sequence_log_probs_reference, inputs, labels_BT, upstream_B)
    for mutant in (torch.ones_like(upstream_B), upstream_B.roll(1), upstream_B.abs()):
        assert relative(of(sequence_log_probs, inputs, labels_BT, mutant)[1:], expected[1:]) > 0.1
    for mutant_BT in (labels_BT.roll(1, dims=1), labels_BT.clamp(min=0)):
        assert absolute(of(sequence_log_probs, inputs, mutant_BT, upstream_B)[0], expected[0]) > 0.1


@pytest.mark.parametrize("way", ["trained", "frozen matrix"])
def test_no_rows_and_no_labels(way):
    """A rank without a pair, and one whose pairs only fill a batch up: zeros, and gradients of 0 by what is trained."""
    inputs, labels_BT, _, upstream_B = case()
    inputs[1].requires_grad_(way == "trained"), inputs[2].requires_grad_(way == "trained")
    empty = (inputs[0].detach()[:0].requires_grad_(), *inputs[1:])
    for rows, labels in ((empty, labels_BT[:0]), (inputs, torch.full_like(labels_BT, -100))):
        found_B, *gradients = of(sequence_log_probs, rows, labels, upstream_B[: len(labels)])
        assert found_B.shape == (len(labels),) and not found_B.any()
        assert len(gradients) == (3 if way == "trained" else 1) and not any(gradient.any() for gradient in gradients)


def test_nothing_leaks_from_tokens_that_are_not_scored():
    inputs, labels_BT, _, upstream_B = case()
    expected = of(sequence_log_probs, inputs, labels_BT, upstream_B)
    with torch.no_grad():
        inputs[0][labels_BT == -100] = torch.nan
    ours = of(sequence_log_probs, inputs, labels_BT, upstream_B)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_without_gradient_none_is_computed(monkeypatch, parity):
    """A reference's log-probabilities: the products of the gradients are not taken, with a matrix that may learn, too."""
    inputs, labels_BT, weights_BT, _ = case()
    expected_B = sequence_log_probs_reference(*inputs[:2], labels_BT, inputs[2], token_weights_BT=weights_BT)
    monkeypatch.setattr("train.losses.chunked.add_matmul_", None)
    monkeypatch.setattr("train.losses.chunked.wide_matmul", None)
    with torch.no_grad():
        ours_B = sequence_log_probs(*inputs[:2], labels_BT, inputs[2], token_weights_BT=weights_BT, chunk_rows=3)
        plain_B = sequence_log_probs(*inputs[:2], labels_BT)
        assert absolute(plain_B, sequence_log_probs_reference(*inputs[:2], labels_BT)) < 1e-12
    assert not ours_B.requires_grad
    error = absolute(ours_B, expected_B)
    parity("log-probabilities of sequences: without gradient", f"{TORCH} log_softmax", error, 1e-12, ROUNDING)


@pytest.mark.parametrize("way", ["trained", "frozen matrix"])
def test_backward_twice_and_not_twice_differentiable(way):
    inputs, labels_BT, _, upstream_B = case()
    inputs[1].requires_grad_(way == "trained"), inputs[2].requires_grad_(way == "trained")
    learned = [each for each in inputs if each.requires_grad]
    found_B = sequence_log_probs(*inputs[:2], labels_BT, inputs[2], chunk_rows=4)
    first = torch.autograd.grad(found_B @ upstream_B, learned, retain_graph=True)
    second = torch.autograd.grad(found_B @ (-3 * upstream_B), learned, retain_graph=True)
    assert absolute([-3 * gradient for gradient in first], second) < 1e-12
    with pytest.raises(RuntimeError, match="no gradients of their gradients"):
        torch.autograd.grad(found_B.sum(), learned, create_graph=True)


# ---- fewer bits


@pytest.mark.parametrize("way", ["autocast", "weights"])
@pytest.mark.parametrize("frozen", ["", "matrix and bias"])
@pytest.mark.parametrize("name", ["fp32", *HALVES])
def test_fewer_bits(name, frozen, way, parity):
    """Products in the number format, sums and results in float32; factors far from 1 (fp16's loss scale, many rows)."""
    dtype, tolerance, reason = ({"fp32": (torch.float32, 2e-6, "24 bits of mantissa")} | HALVES)[name]
    inputs, labels_BT, _, upstream_B = case(torch.float32 if way == "autocast" else dtype)
    for index in FROZEN[frozen]:
        inputs[index].requires_grad_(False)
    wide = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    for factor in (1.0, 2.0**16, 1e-6) if way == "autocast" else (1.0,):
        expected = of(sequence_log_probs_reference, wide, labels_BT, upstream_B * factor)
        with torch.autocast("cpu", dtype) if way == "autocast" and name != "fp32" else nullcontext():
            ours = of(sequence_log_probs, inputs, labels_BT, upstream_B * factor, chunk_rows=3)
        assert [x.dtype for x in ours] == [torch.float32] + [x.dtype for x in inputs if x.requires_grad]
        title = f"log-probabilities of sequences in fewer bits: {name}, {way}, {frozen or 'nothing'} frozen, factor {factor:g}"
        parity(title, f"{TORCH} float64", relative(ours, expected), tolerance, reason)


def test_autocast_leaves_float64_alone_and_mixes_formats():
    inputs, labels_BT, _, upstream_B = case()
    with torch.autocast("cpu", torch.bfloat16):
        ours = of(sequence_log_probs, inputs, labels_BT, upstream_B)
    assert absolute(ours, of(sequence_log_probs_reference, inputs, labels_BT, upstream_B)) < 1e-12
    half = inputs[0].detach().bfloat16(), inputs[1].detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert sequence_log_probs(*half, labels_BT).dtype == torch.float32
    with pytest.raises(TypeError, match="under autocast only"):
        sequence_log_probs(*half, labels_BT)


def test_shapes_that_do_not_match():
    inputs, labels_BT, *_ = case()
    with pytest.raises(ValueError, match=r"shape|labels"):
        sequence_log_probs(*inputs[:2], labels_BT[:, 1:])
    with pytest.raises(ValueError, match="int64"):
        sequence_log_probs(*inputs[:2], labels_BT.int())


@pytest.mark.slow
def test_compiled():
    inputs, labels_BT, weights_BT, upstream_B = case()

    def function(hidden, weight, labels, bias):
        return sequence_log_probs(hidden * 2, weight, labels, bias, token_weights_BT=weights_BT, chunk_rows=4)

    expected = of(function, inputs, labels_BT, upstream_B)
    assert absolute(of(torch.compile(function, backend="aot_eager"), inputs, labels_BT, upstream_B), expected) < 1e-12


# ---- memory


@pytest.mark.parametrize("way", ["trained", "frozen matrix", "without gradient"])
@pytest.mark.parametrize("words", [4096, pytest.param(128_256, marks=pytest.mark.slow)])
def test_memory_is_an_eighth(words, way, parity):
    """Above the gradients, which both must give; of Llama 3's vocabulary too. Nothing is as large as the logits."""
    rows, width = 512, 64
    hidden = leaf(8, rows // 8, width, dtype=torch.float32)
    weight = leaf(words, width, dtype=torch.float32).detach().requires_grad_(way == "trained")
    labels_BT = torch.randint(0, words, (8, rows // 8))
    learned = [each for each in (hidden, weight) if each.requires_grad and way != "without gradient"]

    def step(function) -> None:
        with torch.set_grad_enabled(way != "without gradient"):
            found_B = function(hidden, weight, labels_BT)
        if way != "without gradient":
            torch.autograd.grad(found_B.sum(), learned)

    extra, chunked = {}, partial(sequence_log_probs, chunk_rows=32 if words < 10_000 else None)
    for name, function in {"plain": sequence_log_probs_reference, "chunked": chunked}.items():
        highest, _ = peak_bytes(partial(step, function))
        extra[name] = highest - sum(each.nbytes for each in learned)
    assert extra["plain"] >= 4 * rows * words
    share = Error(extra["chunked"] / extra["plain"], "share of the memory")
    name = f"log-probabilities of sequences: memory of {words:,} words, {way}"
    parity(name, "the plain twin", share, 1 / 8, "32 rows of 512 at a time, or 32 MiB of logits")
