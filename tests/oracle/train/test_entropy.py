"""Log-probabilities and entropies of tokens beside all logits in float64; gradients, temperature, chunks, memory."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from tests.bench.loss import peak_bytes
from tests.compare import Error, absolute, relative
from tests.oracle.train.test_losses import HALVES, TORCH
from tests.oracle.train.test_sequence import FROZEN, LENGTH, ROUNDING, ROWS, case
from train.losses import entropy
from train.losses.entropy import token_log_probs_and_entropy, token_log_probs_and_entropy_reference
from train.losses.sequence import token_log_probs

OUTPUTS = {"both": (True, True), "log-probabilities": (True, False), "entropies": (False, True)}


def upstream(which="both", scale=1.0):
    """Factors of each token's log-probability and entropy, of both signs."""
    return [scale * torch.randn(ROWS, LENGTH, dtype=torch.float64) if wanted else None for wanted in OUTPUTS[which]]


def weighted(outputs, factors):
    return sum((out * factor.to(out.dtype)).sum() for out, factor in zip(outputs, factors, strict=True) if factor is not None)


def of(function, inputs, labels_BT, factors, **options):
    """(log-probabilities, entropies, the gradients of both times the factors by those inputs that have one)."""
    hidden, weight, bias = inputs
    outputs = function(hidden, weight, labels_BT, bias, **options)
    learned = [each for each in inputs if each is not None and each.requires_grad]
    return *(each.detach() for each in outputs), *torch.autograd.grad(weighted(outputs, factors), learned)


def twin(hidden, weight, labels_BT, bias=None, *, temperature=1.0):
    """By torch's distribution, row by row."""
    log_p_BT, entropy_BT = [], []
    for x, label in zip(hidden.flatten(0, 1), labels_BT.flatten(), strict=True):
        logits = weight @ x + (0 if bias is None else bias)
        drawn = torch.distributions.Categorical(logits=logits / temperature)
        log_p_BT.append(drawn.log_prob(label) if label >= 0 else x.new_zeros(()))
        entropy_BT.append(drawn.entropy() if label >= 0 else x.new_zeros(()))
    return torch.stack(log_p_BT).view(labels_BT.shape), torch.stack(entropy_BT).view(labels_BT.shape)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("which", OUTPUTS)
@pytest.mark.parametrize("frozen", FROZEN)
def test_values_and_gradients(frozen, which, temperature, parity):
    """One row at a time, four, and all in one chunk; the plain twin with all logits too."""
    inputs, labels_BT, *_ = case()
    for index in FROZEN[frozen]:
        inputs[index].requires_grad_(False)
    factors = upstream(which)
    expected = of(twin, inputs, labels_BT, factors, temperature=temperature)
    found = {"plain": of(token_log_probs_and_entropy_reference, inputs, labels_BT, factors, temperature=temperature)}
    for chunk_rows in (1, 4, None):
        options = {"temperature": temperature, "chunk_rows": chunk_rows}
        found[chunk_rows] = of(token_log_probs_and_entropy, inputs, labels_BT, factors, **options)
    assert all(len(each) == 5 - len(FROZEN[frozen]) for each in found.values())
    scored = labels_BT != -100
    assert all((each[~scored] == 0).all() and (each[scored] != 0).all() for each in expected[:2])
    name = f"log-probabilities and entropies: {which}, temperature {temperature}, {frozen or 'nothing'} frozen"
    error = max(absolute(each, expected) for each in found.values())
    parity(name, f"{TORCH} Categorical", error, 1e-12, ROUNDING)


def test_mutants_are_seen():
    """A temperature that is forgotten; labels one slot off; -100 taken for a class; a factor lost or of the wrong sign."""
    inputs, labels_BT, *_ = case()
    factors = upstream()
    expected = of(twin, inputs, labels_BT, factors, temperature=0.6)
    function = partial(of, token_log_probs_and_entropy, inputs)
    ours = function(labels_BT, factors, temperature=0.6)
    assert absolute(ours, expected) < 1e-12
    for mutant in (function(labels_BT, factors), function(labels_BT.roll(1, dims=1), factors, temperature=0.6)):
        assert all(absolute(mutant[place], expected[place]) > 0.1 for place in range(5))
    assert absolute(function(labels_BT.clamp(min=0), factors, temperature=0.6)[1], expected[1]) > 0.1
    for mutant in ([factors[0], -factors[1]], [factors[0], 0 * factors[1]], [0 * factors[0], factors[1]]):
        assert relative(function(labels_BT, mutant, temperature=0.6)[2:], expected[2:]) > 0.1


@pytest.mark.parametrize("chunk_rows", [1, 4, None])
def test_the_same_bits_with_and_without_gradient(chunk_rows):
    """So that the ratio of policy and old policy is exactly 1 at the first step."""
    inputs, labels_BT, *_ = case(torch.float32)
    options = {"temperature": 0.7, "chunk_rows": chunk_rows}
    with_gradient = token_log_probs_and_entropy(inputs[0], inputs[1], labels_BT, inputs[2], **options)
    with torch.no_grad():
        without = token_log_probs_and_entropy(inputs[0], inputs[1], labels_BT, inputs[2], **options)
    assert all(each.requires_grad for each in with_gradient) and not any(each.requires_grad for each in without)
    assert all(torch.equal(a, b) for a, b in zip(with_gradient, without, strict=True))


def test_log_probabilities_are_those_of_preferences(parity):
    inputs, labels_BT, *_ = case()
    ours, _ = token_log_probs_and_entropy(inputs[0], inputs[1], labels_BT, inputs[2])
    error = absolute(ours, token_log_probs(inputs[0], inputs[1], labels_BT, inputs[2]))
    parity("log-probabilities and entropies: temperature 1", "token_log_probs", error, 1e-12, ROUNDING)


def test_entropy_of_known_distributions():
    """Uniform: log V, whatever the temperature, with gradient 0; one sure class: 0; two of equal logit far above: log 2."""
    weight, label = torch.eye(4, dtype=torch.float64), torch.tensor([[1]])
    rows = {"uniform": [0.0, 0.0, 0.0, 0.0], "sure": [0.0, 2000.0, 0.0, 0.0], "two": [900.0, 900.0, 0.0, 0.0]}
    for temperature in (0.5, 1.0, 3.0):
        found = {}
        for name, row in rows.items():
            hidden = torch.tensor([[row]], dtype=torch.float64, requires_grad=True)
            _, entropy = token_log_probs_and_entropy(hidden, weight, label, temperature=temperature)
            found[name] = entropy.exp().item()
            (gradient,) = torch.autograd.grad(entropy.sum(), hidden)
            assert gradient.abs().max() < 1e-12
        assert found == pytest.approx({"uniform": 4, "sure": 1, "two": 2}, rel=1e-12)


def test_no_rows_and_nothing_leaks():
    """A rank without a reply; rows that are not scored may hold anything."""
    inputs, labels_BT, *_ = case()
    factors = upstream()
    empty = (inputs[0].detach()[:0].requires_grad_(), *inputs[1:])
    nothing = torch.full_like(labels_BT, -100)
    for rows, labels, own in ((empty, labels_BT[:0], [x[:0] for x in factors]), (inputs, nothing, factors)):
        log_p, entropy, *gradients = of(token_log_probs_and_entropy, rows, labels, own)
        assert log_p.shape == entropy.shape == labels.shape and not log_p.any() and not entropy.any()
        assert len(gradients) == 3 and not any(gradient.any() for gradient in gradients)
    expected = of(token_log_probs_and_entropy, inputs, labels_BT, factors)
    with torch.no_grad():
        inputs[0][labels_BT == -100] = torch.nan
    ours = of(token_log_probs_and_entropy, inputs, labels_BT, factors)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("chunk_rows", [4, None])
def test_backward_twice_and_not_twice_differentiable(chunk_rows):
    inputs, labels_BT, *_ = case()
    factors = upstream()
    outputs = token_log_probs_and_entropy(inputs[0], inputs[1], labels_BT, inputs[2], chunk_rows=chunk_rows)
    first = torch.autograd.grad(weighted(outputs, factors), inputs, retain_graph=True)
    second = torch.autograd.grad(-3 * weighted(outputs, factors), inputs, retain_graph=True)
    assert absolute([-3 * gradient for gradient in first], second) < 1e-12
    with pytest.raises(RuntimeError, match="no gradients of their gradients"):
        torch.autograd.grad(outputs[1].sum(), inputs, create_graph=True)


@pytest.mark.parametrize("way", ["autocast", "weights"])
@pytest.mark.parametrize("chunk_rows", [4, None])
@pytest.mark.parametrize("name", ["fp32", *HALVES])
def test_fewer_bits(name, chunk_rows, way, parity):
    """Products in the number format, sums and results in float32; factors far from 1 (fp16's loss scale, many tokens)."""
    dtype, tolerance, reason = ({"fp32": (torch.float32, 2e-6, "24 bits of mantissa")} | HALVES)[name]
    inputs, labels_BT, *_ = case(torch.float32 if way == "autocast" else dtype)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    for scale in (1.0, 2.0**16, 1e-6) if way == "autocast" else (1.0,):
        factors = upstream(scale=scale)
        expected = of(token_log_probs_and_entropy_reference, wide, labels_BT, factors, temperature=0.8)
        with torch.autocast("cpu", dtype) if way == "autocast" and name != "fp32" else nullcontext():
            ours = of(token_log_probs_and_entropy, inputs, labels_BT, factors, temperature=0.8, chunk_rows=chunk_rows)
        assert [x.dtype for x in ours] == [torch.float32] * 2 + [x.dtype for x in inputs]
        title = f"log-probabilities and entropies in fewer bits: {name}, {way}, {chunk_rows} rows, factors {scale:g}"
        parity(title, f"{TORCH} float64", relative(ours, expected), tolerance, reason)


def test_bad_input():
    inputs, labels_BT, *_ = case()
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"temperature=.*expected a finite number above 0"):
            token_log_probs_and_entropy(*inputs[:2], labels_BT, temperature=temperature)
    with pytest.raises(ValueError, match="chunk_rows=0"):
        token_log_probs_and_entropy(*inputs[:2], labels_BT, chunk_rows=0)
    with pytest.raises(ValueError, match=r"shape|labels"):
        token_log_probs_and_entropy(*inputs[:2], labels_BT[:, 1:])
    with pytest.raises(TypeError, match="under autocast only"):
        token_log_probs_and_entropy(inputs[0].float(), inputs[1], labels_BT)


@pytest.mark.parametrize("way", ["trained", "frozen matrix", "without gradient"])
def test_memory_is_an_eighth(way, parity, monkeypatch):
    """Above the gradients, which both must give. Nothing is as large as the logits."""
    monkeypatch.setattr(entropy, "KEPT_BYTES", 0)
    rows, width, words = 512, 64, 4096
    hidden = torch.randn(8, rows // 8, width, requires_grad=True)
    weight = torch.randn(words, width, requires_grad=way == "trained")
    labels_BT = torch.randint(0, words, (8, rows // 8))
    learned = [each for each in (hidden, weight) if each.requires_grad and way != "without gradient"]

    def step(function) -> None:
        with torch.set_grad_enabled(way != "without gradient"):
            outputs = function(hidden, weight, labels_BT)
        if way != "without gradient":
            torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), learned)

    extra = {}
    chunked = partial(token_log_probs_and_entropy, chunk_rows=32)
    for name, function in {"plain": token_log_probs_and_entropy_reference, "chunked": chunked}.items():
        highest, piece = peak_bytes(partial(step, function))
        extra[name] = highest - sum(each.nbytes for each in learned)
    assert extra["plain"] >= 4 * rows * words > piece
    share = Error(extra["chunked"] / extra["plain"], "share of the memory")
    parity(f"log-probabilities and entropies: memory, {way}", "the plain twin", share, 1 / 8, "32 rows of 512 at a time")


@pytest.mark.parametrize("terms", [(1, 1), (1, 0), (0, 1)])
def test_kept_chunks_and_computed_ones_are_the_same_bits(terms, monkeypatch):
    """Also in a second backward pass, and with a chunk that is not full."""
    inputs, labels_BT, *_ = case()
    inputs = tuple(each.detach().requires_grad_() for each in inputs)
    found = []
    for size in (0, 1 << 30):
        monkeypatch.setattr(entropy, "KEPT_BYTES", size)
        outputs = token_log_probs_and_entropy(*inputs[:2], labels_BT, chunk_rows=5)
        weighted = [(each * torch.arange(each.numel()).view(each.shape)).sum() for each in outputs]
        total = sum(factor * each for factor, each in zip(terms, weighted, strict=True) if factor)
        first, second = (torch.autograd.grad(total, inputs[:2], retain_graph=True) for _ in range(2))
        found.append([*outputs, *first])
        assert all(map(torch.equal, first, second))
    assert int((labels_BT != -100).sum()) % 5 and all(map(torch.equal, *found))
