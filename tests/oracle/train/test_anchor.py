"""The penalties of --anchor beside autograd, and F beside torch's per-example gradients and closed forms."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, one_hot

from tests.compare import absolute, relative
from tests.conftest import randomized, tiny_config
from train.anchor import Anchor, DrawnLabels, draw_labels, fisher_diagonal, penalty_reference, uniforms
from train.losses.cross_entropy import linear_cross_entropy
from train.objective import Objective
from train.parallel.ranks import Ranks

TORCH = f"torch {torch.__version__}"
SHAPES = {"matrix": (5, 3), "bias": (7,), "number": ()}
V, D, T = 6, 3, 8


def weights(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def gradients(term: torch.Tensor, named: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return dict(zip(named, torch.autograd.grad(term, list(named.values())), strict=True))


@pytest.mark.parametrize("fishers", [None, weights(2)])
def test_the_penalty_equals_autograds(parity, fishers):
    named, starts = {name: nn.Parameter(value) for name, value in weights(0).items()}, weights(1)
    ours = Anchor(named, starts, fishers, weight=0.7).penalty()
    plain = penalty_reference(named.values(), starts.values(), fishers and fishers.values(), 0.7)
    mine, theirs = gradients(3 * ours, named), gradients(3 * plain, named)
    parity("anchor: penalty", f"{TORCH} autograd", relative(ours, plain), 1e-14, "float64, sums in another order")
    parity("anchor: gradient", f"{TORCH} autograd", relative(mine, theirs), 1e-14, "float64, products in another order")
    assert absolute(ours, penalty_reference(named.values(), starts.values(), None, 0.8)) > 0.1


def test_ewc_with_a_fisher_of_one_is_l2_sp(parity):
    named, starts = {name: nn.Parameter(value) for name, value in weights(0).items()}, weights(1)
    ones = {name: torch.ones_like(value) for name, value in starts.items()}
    ewc, l2 = (Anchor(named, starts, fishers, weight=0.3).penalty() for fishers in (ones, None))
    mine, theirs = gradients(ewc, named), gradients(l2, named)
    parity("anchor: EWC with F = 1", "L2-SP", absolute(ewc, l2), 1e-12, "the same sum")
    parity("anchor: EWC with F = 1, gradient", "L2-SP", absolute(mine, theirs), 1e-12, "the same products")
    assert absolute(theirs, {name: 0.3 * (named[name] - starts[name]) for name in named}) < 1e-15


def test_at_the_start_it_is_zero_and_frozen_weights_are_left_out():
    named = {name: nn.Parameter(value.round()) for name, value in weights(0).items()}
    starts = {name: value.detach().clone() for name, value in named.items()}
    anchor = Anchor(named, starts, None, weight=1.0)
    assert anchor.penalty().item() == 0 and not any(value.any() for value in gradients(anchor.penalty(), named).values())
    with torch.no_grad():
        for value in named.values():
            value.add_(1)
    assert anchor.penalty().item() == (15 + 7 + 1) / 2
    named["bias"].requires_grad_(False)  # as gradual unfreezing does, and takes back
    assert anchor.penalty().item() == (15 + 1) / 2
    anchor.penalty().backward()
    assert named["bias"].grad is None and bool((named["matrix"].grad == 1).all())
    for value in named.values():
        value.requires_grad_(False)  # below a new head, all of them are for a while
    term = anchor.penalty()
    (2 * term).backward()
    assert term.item() == 0 and term.dtype == torch.float64


def test_16_bit_weights_have_a_wide_anchor():
    """The difference is not rounded to bfloat16; gradients have the weights' format."""
    named = {name: nn.Parameter(value) for name, value in weights(0, torch.bfloat16).items()}
    starts = {name: value.detach().float() + 1e-4 for name, value in named.items()}
    term = Anchor(named, starts, None, weight=2.0).penalty()
    term.backward()
    assert term.dtype == torch.float32 and named["matrix"].grad.dtype == torch.bfloat16
    assert term.item() == pytest.approx(23e-8, rel=1e-2)


def test_other_names_or_shapes_are_refused():
    named = {name: nn.Parameter(value) for name, value in weights(0).items()}
    with pytest.raises(ValueError, match="the anchor holds no weight"):
        Anchor({}, {}, None, weight=1.0)
    with pytest.raises(ValueError, match="start tensors are not of the same weights: \\['bias'\\]"):
        Anchor(named, {name: value for name, value in weights(0).items() if name != "bias"}, None, weight=1.0)
    with pytest.raises(ValueError, match="fisher tensors are not of the same weights: \\['more'\\]"):
        Anchor(named, weights(0), weights(0) | {"more": torch.ones(1)}, weight=1.0)
    with pytest.raises(ValueError, match=r"fisher.bias is \(1,\), expected \(7,\)"):
        Anchor(named, weights(0), weights(0) | {"bias": torch.ones(1)}, weight=1.0)


# ---- F


@pytest.fixture(scope="module")
def network():
    return randomized(tiny_config("llama"), attention="reference")


@pytest.fixture(scope="module")
def rows(network):
    """Five texts, with 5 to 9 scored labels."""
    ids_BT = torch.randint(0, network.config.vocab_size, (5, 10), generator=torch.Generator().manual_seed(3))
    labels_BT = ids_BT.roll(-1, 1)
    for row in range(5):
        labels_BT[row, : row + 1] = -100
    return ids_BT, labels_BT


def row_likelihood(network, rows, loss):
    objective = Objective(network, loss)

    def log_likelihood(row: int):
        if isinstance(loss, DrawnLabels):
            loss.row = row
        term = objective({"input_ids": rows[0][row : row + 1], "labels": rows[1][row : row + 1]}).terms["loss"]
        return term.sum, term.count

    return log_likelihood


def per_example(network, ids_BT, labels_BT) -> dict[str, torch.Tensor]:
    """Each row's gradient of its summed log-likelihood, by torch.func."""

    def nats(named, ids_T, labels_T):
        logits_TV = functional_call(network, named, (ids_T[None],)).logits[0]
        kept_T = labels_T != -100
        return (kept_T * cross_entropy(logits_TV, labels_T.clamp_min(0), reduction="none")).sum()

    named = {name: value.detach() for name, value in network.named_parameters()}
    return vmap(grad(nats), in_dims=(None, 0, 0))(named, ids_BT, labels_BT)


@pytest.mark.parametrize("labels", ["drawn", "the text's own"])
def test_fisher_equals_per_example_gradients(parity, network, rows, labels):
    """Every tensor, the tied matrix once; the mutant, the square of the mean gradient, is another number."""
    loss = DrawnLabels(5) if labels == "drawn" else linear_cross_entropy
    ours = fisher_diagonal(row_likelihood(network, rows, loss), dict(network.named_parameters()), range(5))
    ids_BT, labels_BT = rows
    if labels == "drawn":
        with torch.no_grad():
            hidden_BTD = network.body(ids_BT).hidden
        drawn_BT = labels_BT.clone()
        for row in range(5):
            kept_T = labels_BT[row] != -100
            uniform_N = torch.from_numpy(uniforms(5, row, int(kept_T.sum())))
            head = network.head
            drawn_BT[row, kept_T] = draw_labels(head.features(hidden_BTD[row, kept_T]), head.weight, head.bias, uniform_N)
        assert not torch.equal(drawn_BT, labels_BT)
        labels_BT = drawn_BT
    found = per_example(network, ids_BT, labels_BT)
    count = int((labels_BT != -100).sum())
    theirs = {name: each.square().sum(0) / count for name, each in found.items()}
    parity(f"anchor: F, {labels} labels", f"{TORCH} torch.func", relative(ours, theirs), 1e-10, "float64, other kernels")
    mean = {name: each.sum(0).square() / count for name, each in found.items()}
    assert relative(mean, theirs) > 0.5


def test_fisher_over_ranks(network, rows):
    """Rows shared by ranks give the same F: sums over rows and counts are added, then divided once."""
    named = dict(network.named_parameters())
    likelihood = row_likelihood(network, rows, linear_cross_entropy)
    whole, parts = fisher_diagonal(likelihood, named, range(5)), [range(0, 5, 2), range(1, 5, 2)]
    counts = [sum(int((rows[1][row] != -100).sum()) for row in part) for part in parts]
    halves = [fisher_diagonal(likelihood, named, part) for part in parts]

    class Two(Ranks):
        """The other rank is told what it would have sent, in order."""

        def sum(self, value):
            return value + others.pop(0)

    others = [torch.tensor(counts[1]), *(halves[1][name] * counts[1] for name in named)]
    assert relative(fisher_diagonal(likelihood, named, parts[0], ranks=Two(0, 2)), whole) < 1e-13
    assert relative(halves[0], whole) > 1e-3


def test_rows_without_labels(network, rows):
    likelihood = row_likelihood(network, (rows[0], torch.full_like(rows[1], -100)), linear_cross_entropy)
    with pytest.raises(ValueError, match="no row has a scored label"):
        fisher_diagonal(likelihood, dict(network.named_parameters()), range(2))
    named = {"reached": nn.Parameter(torch.ones(2)), "not": nn.Parameter(torch.ones(2))}
    found = fisher_diagonal(lambda row: (3 * named["reached"].sum(), row), named, [0, 2])
    assert found["reached"].tolist() == [4.5, 4.5] and found["not"].tolist() == [0, 0] and list(named) == list(found)


# ---- a linear softmax, whose F has a closed form


@pytest.fixture(scope="module")
def linear():
    """Inputs T D, W V D, b V, and one row's labels."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((T, D), (V, D), (V,))
    x_TD, weight_VD, bias_V = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x_TD, nn.Parameter(weight_VD), nn.Parameter(bias_V), torch.arange(T) % V


def test_fisher_of_a_linear_softmax(parity, linear):
    """F = mean over inputs of (p_v - p_v²) x_d²: the diagonal of (diag p - p pᵀ) ⊗ x xᵀ. 3 standard errors at most, though each
    row holds T labels: what two labels have in common is 0 on average."""
    x_TD, weight_VD, bias_V, labels_T = linear
    drawn = DrawnLabels(11)

    def log_likelihood(row: int):
        drawn.row = row
        return drawn(x_TD, weight_VD, labels_T, bias_V)

    named = {"weight": weight_VD, "bias": bias_V}
    every = [fisher_diagonal(log_likelihood, named, [row]) for row in range(600)]
    p_TV = (x_TD @ weight_VD.T + bias_V).softmax(-1).detach()
    variance_TV = p_TV - p_TV.square()
    exact = {"weight": torch.einsum("tv,td->vd", variance_TV, x_TD.square()) / T, "bias": variance_TV.mean(0)}
    for name in named:
        estimates = torch.stack([each[name] for each in every])
        z = (estimates.mean(0) - exact[name]) / (estimates.std(0) / len(every) ** 0.5)
        parity(f"anchor: F of a linear softmax, {name}", "closed form", absolute(z, torch.zeros_like(z)), 3, "standard errors")
    together = fisher_diagonal(log_likelihood, named, range(600))
    mean = {name: torch.stack([each[name] for each in every]).mean(0) for name in named}
    assert relative(together, mean) < 1e-12


def test_empirical_fisher_of_a_linear_softmax(parity, linear):
    """Exact, and far from F: (Σ_t (p_tv - [y_t = v]) x_td)² / T keeps what the labels have in common."""
    x_TD, weight_VD, bias_V, labels_T = linear
    named = {"weight": weight_VD, "bias": bias_V}
    found = fisher_diagonal(lambda row: linear_cross_entropy(x_TD, weight_VD, labels_T, bias_V), named, [0, 1])
    residual_TV = (x_TD @ weight_VD.T + bias_V).softmax(-1).detach() - one_hot(labels_T, V)
    exact = {"weight": (residual_TV.T @ x_TD).square() / T, "bias": residual_TV.sum(0).square() / T}
    parity("anchor: empirical F", "closed form", relative(found, exact), 1e-13, "float64")


def test_drawn_labels():
    """Frequencies within 3 standard errors; a probability of 0 is never drawn, not even by the ends of [0, 1)."""
    logits_V = torch.tensor([-torch.inf, 0.3, -1.0, 1.2, -torch.inf], dtype=torch.float64)
    draws = 40_000
    hidden_N1 = torch.ones(draws, 1, dtype=torch.float64)
    drawn_N = draw_labels(hidden_N1, torch.zeros(5, 1, dtype=torch.float64), logits_V, torch.from_numpy(uniforms(0, 0, draws)))
    p_V = logits_V.softmax(0)
    share_V = torch.bincount(drawn_N, minlength=5) / draws
    assert bool(((share_V - p_V).abs() <= 3 * (p_V * (1 - p_V) / draws).sqrt()).all())
    ends_N = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for shift in range(50):  # whatever the last sum is rounded to
        shifted_V = logits_V + 0.1 * shift * torch.arange(5)
        assert draw_labels(hidden_N1[:2], torch.zeros(5, 1, dtype=torch.float64), shifted_V, ends_N).tolist() == [1, 3]
    wide_N = torch.from_numpy(uniforms(1, 0, 300))
    narrow = (hidden_N1[:300].float(), torch.ones(5, 1), logits_V.float())  # in float32 the probabilities are in float64 too
    assert torch.equal(draw_labels(*narrow, wide_N), draw_labels(*(value.double() for value in narrow), wide_N))


def test_draws_depend_on_seed_and_row_alone(linear):
    x_TD, weight_VD, bias_V, labels_T = linear
    unscored_T = labels_T.clone()
    unscored_T[:2] = -100
    seen = []

    def record(hidden, weight, labels, bias):
        seen.append(labels.tolist())
        return linear_cross_entropy(hidden, weight, labels, bias)

    loss = DrawnLabels(4, record)
    for row in (0, 9, 0):
        loss.row = row
        loss(x_TD, weight_VD, unscored_T, bias_V)
    assert seen[0] == seen[2] != seen[1] and seen[0][:2] == [-100, -100] and min(seen[0][2:]) >= 0 and loss.calls == 3
    assert not (uniforms(4, 0, 50) == uniforms(5, 0, 50)).any() and 0 <= uniforms(4, 0, 50).min() < uniforms(4, 0, 50).max() < 1
