"""Penalties that hold weights θ near those that a run began with, θ*, against catastrophic forgetting.

    l2-sp            λ/2 Σ_i (θ_i − θ*_i)²
    ewc              λ/2 Σ_i F_i (θ_i − θ*_i)²,   F: the diagonal of the Fisher information on the old text
    ewc-empirical    the same, with the text's own labels in F

Source: Li et al. 2018, arXiv 1802.01483 (L2-SP); Kirkpatrick et al. 2017, arXiv 1612.00796 (EWC); Kunstner et al. 2019, arXiv
1905.12558 (why the empirical Fisher is another quantity).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data.transforms.causal import IGNORE
from train.losses.cross_entropy import flatten_rows, linear_cross_entropy
from train.parallel.ranks import Ranks

STREAM = 0x616E63686F72  # "anchor", half of the key: separates these random numbers from other uses of the seed
ROWS = 256  # of logits that exist at a time, to draw labels


def penalty_reference(
    parameters: Sequence[Tensor], starts: Sequence[Tensor], fishers: Sequence[Tensor] | None, weight: float
) -> Tensor:
    """Compute weight/2 Σ_i F_i (θ_i − θ*_i)² over all tensors; without `fishers` F = 1. The plain twin of `Anchor.penalty`."""
    fishers = fishers or [torch.ones_like(start) for start in starts]
    return weight / 2 * sum((f * (p - start).square()).sum() for p, start, f in zip(parameters, starts, fishers, strict=True))


class Anchor:
    """Hold parameters near their values at the start of a run: the term to add to the loss, and its tensors.

        anchor = Anchor(named, {name: p.detach().clone() for name, p in named.items()}, fishers, weight=1.0)
        (loss + anchor.penalty()).backward()

    parameters, starts (θ*), fishers (F): by the same names. fishers None: F = 1 (L2-SP). A parameter that is frozen at present
    is left out. θ* and F are in float32, or wider for wider parameters. Errors (ValueError): no parameter; names or shapes that
    differ.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        starts: Mapping[str, Tensor],
        fishers: Mapping[str, Tensor] | None,
        *,
        weight: float,
    ):
        if not parameters:
            raise ValueError("the anchor holds no weight")
        for kind, values in (("start", starts), ("fisher", fishers)):
            if values is not None and (differ := values.keys() ^ parameters.keys()):
                raise ValueError(f"the anchor's {kind} tensors are not of the same weights: {sorted(differ)[:3]}")
            for name, value in (values or {}).items():
                if value.shape != parameters[name].shape:
                    raise ValueError(f"{kind}.{name} is {tuple(value.shape)}, expected {tuple(parameters[name].shape)}")
        self.parameters, self.starts, self.fishers, self.weight = dict(parameters), dict(starts), fishers, weight

    def penalty(self) -> Tensor:
        """Return λ/2 Σ F (θ − θ*)², a scalar with a gradient; 0 where all held parameters are frozen at present."""
        learning = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        if not learning:
            some = next(iter(self.starts.values()))
            return torch.zeros((), dtype=some.dtype, device=some.device, requires_grad=True)
        starts = [self.starts[name] for name in learning]
        fishers = None if self.fishers is None else [self.fishers[name] for name in learning]
        return QuadraticPenalty.apply(self.weight, starts, fishers, *(self.parameters[name] for name in learning))

    def tensors(self) -> dict[str, Tensor]:
        """Return θ* and F as `start.NAME` and `fisher.NAME`."""
        kinds = {"start": self.starts, "fisher": self.fishers or {}}
        return {f"{kind}.{name}": value for kind, values in kinds.items() for name, value in values.items()}


def fisher_diagonal(
    log_likelihood: Callable[[int], tuple[Tensor, Tensor | int]],
    parameters: Mapping[str, Tensor],
    rows: Iterable[int],
    *,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """Estimate the diagonal of the Fisher information, per scored label: {name: F}.

        F_i = Σ_row (∂ log_likelihood(row) / ∂θ_i)²  /  Σ_row count(row)

    log_likelihood(row) returns the row's Σ_t log p(y_t | x), a scalar (its sign does not matter), and the number of its scored
    labels. Each row's gradient is squared alone: the square of a batch's mean gradient is smaller, and no Fisher information.

    With labels drawn from the model, each by itself, the expected product of two labels' gradients is 0: F is then an unbiased
    estimate of the mean over labels of E_y (∂ log p(y) / ∂θ_i)², which no grouping into rows changes, and λ = 1 makes the
    penalty the rise of the old text's loss in nats a label, to second order and without its off-diagonal part. With the
    text's own labels (the empirical Fisher) these products remain, and a longer row gives a larger F.

    rows: this rank's; sums are over all `ranks`. In float32, or wider for wider parameters. A parameter on which no row depends
    has F = 0. Errors (ValueError): no scored label.
    """
    ranks, count = ranks or Ranks(), 0
    sums = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()}
    for row in rows:
        nats, row_count = log_likelihood(row)
        if not int(row_count):
            continue
        grads = torch.autograd.grad(nats, list(parameters.values()), allow_unused=True)
        for name, grad in zip(sums, grads, strict=True):
            if grad is not None:
                sums[name] += grad.to(sums[name].dtype).square()
        count += int(row_count)
    count = int(ranks.sum(torch.tensor(count)))
    if not count:
        raise ValueError("no row has a scored label")
    # By labels rather than rows: the loss of a step is a mean over labels too, so λ weighs nats a label against nats a label,
    # whatever the length of the old text's rows.
    return {name: ranks.sum(value).div_(count) for name, value in sums.items()}


class DrawnLabels:
    """A loss of `train.losses` whose labels are drawn from the model: label t of a row is drawn from softmax(logits_t).

    The inputs stay the text's own, so that every label is drawn in a context of the text. The draws are a pure function of
    (seed, row, index of the scored label) and of the logits: set `row` before each call. `calls` counts the calls, so that who
    draws for an objective sees whether it used this loss at all, and once a row: a second call would draw the same numbers.
    """

    def __init__(self, seed: int, loss: Callable = linear_cross_entropy):
        self.seed, self.loss, self.row, self.calls = seed, loss, 0, 0

    def __call__(
        self, hidden: Tensor, weight_VD: Tensor, labels: Tensor, bias_V: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.calls += 1
        hidden_ND, labels_N = flatten_rows(hidden, labels)
        scored = (labels_N != IGNORE).nonzero()[:, 0]
        uniform_N = torch.from_numpy(uniforms(self.seed, self.row, len(scored))).to(hidden.device)
        drawn_N = labels_N.clone()
        drawn_N[scored] = draw_labels(hidden_ND[scored], weight_VD, bias_V, uniform_N)
        return self.loss(hidden_ND, weight_VD, drawn_N, bias_V)


def uniforms(seed: int, row: int, count: int) -> np.ndarray:
    """Return numbers in [0, 1), float64: Philox with key (seed, STREAM) and counter (0, 0, 0, row).

    >>> bool((uniforms(1, 7, 3) == uniforms(1, 7, 5)[:3]).all())
    True
    """
    random = np.random.Philox(counter=np.array([0, 0, 0, row], dtype=np.uint64), key=np.array([seed, STREAM], dtype=np.uint64))
    return (random.random_raw(count) >> np.uint64(11)) * 2.0**-53


@torch.no_grad()
def draw_labels(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, uniform_N: Tensor) -> Tensor:
    """Draw one label a row from softmax(hidden Wᵀ + b), by the inverse of the cumulative distribution in float64.

    A label of probability 0 is never drawn.
    """
    drawn = []
    for hidden_RD, uniform_R in zip(hidden_ND.split(ROWS), uniform_N.split(ROWS), strict=True):
        cumulative_RV = nn.functional.linear(hidden_RD, weight_VD, bias_V).double().softmax(-1).cumsum(-1)
        # The last sum is not exactly 1. u times it is below it, even rounded, as u is at most 1 - 2⁻⁵³: at the sum itself
        # the search would give V, which is no label. right=True: u = 0 passes over labels of probability 0.
        threshold_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]
        drawn.append(torch.searchsorted(cumulative_RV, threshold_R1, right=True)[:, 0])
    return torch.cat(drawn)


class QuadraticPenalty(torch.autograd.Function):
    """`penalty_reference`, with its gradient λ F (θ − θ*) computed in the forward, by few kernels for all tensors.

    Between forward and backward it holds one tensor of each parameter's size; autograd would hold three. The backward makes
    another, the gradient.
    """

    @staticmethod
    def forward(ctx, weight: float, starts: list[Tensor], fishers: list[Tensor] | None, *parameters: Tensor) -> Tensor:
        pulls = torch._foreach_sub(parameters, starts)
        if fishers is None:
            sums = [delta.square().sum() for delta in pulls]
        else:
            sums = [delta.square().mul_(fisher).sum() for delta, fisher in zip(pulls, fishers, strict=True)]
            torch._foreach_mul_(pulls, fishers)  # in place: F (θ − θ*)
        ctx.pulls, ctx.weight = pulls, weight
        return weight / 2 * torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return None, None, None, *torch._foreach_mul(ctx.pulls, ctx.weight * grad)  # autograd casts to the weights' formats
