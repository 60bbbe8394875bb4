"""The table of preference losses: what registers a loss, its details, and the checks that all share."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BATCH_VALUES = ("z", "nll", "alpha", "partners")  # keywords that a batch brings: no settings of a loss
PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {}
PREFERENCE_DETAILS: dict[str, "LossDetails"] = {}


@dataclass(frozen=True)
class LossDetails:
    """Facts about a preference loss: its formula and source, its defaults, and what a caller must bring.

    formula, convention: in c and r, the log-ratios Σ_t log π − log π_ref of the chosen and the rejected reply, n_c and n_r,
    their numbers of tokens, and Δ = c − r. `nll`: the tokens of the cross-entropy term that belongs to the loss, "none",
    "reply" (of the chosen reply) or "text" (of prompt and chosen reply).
    """

    formula: str
    source: str
    convention: str
    beta: float = 0.1  # the default
    needs_reference: bool = True
    averages: bool = False  # the log-probabilities over the tokens of the reply, so that it needs the lengths
    sees_batch: bool = False  # the loss of one pair depends on the other pairs
    takes_divergence: bool = False  # a function of Δ: c and r may be those of `transform_log_ratios`
    nll: str = "none"
    nll_weight: float = 0.0
    settings: Mapping[str, float] = field(default_factory=dict)  # the loss's own keywords, with their defaults

    @property
    def needs_lengths(self) -> bool:
        return self.averages


def log_ratios(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor):
    """Return (c, r), the log-ratios of policy and reference: of the chosen and of the rejected reply."""
    return policy_chosen - reference_chosen, policy_rejected - reference_rejected


def log_probs(policy_chosen: Tensor, policy_rejected: Tensor, *reference: Tensor | None):
    """Return the policy's log-probabilities alone: log-ratios to a reference whose log-probabilities are 0."""
    return policy_chosen, policy_rejected


def margins(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor):
    """Return (policy's, reference's) log-probability of the chosen reply over that of the rejected one."""
    return policy_chosen - policy_rejected, reference_chosen - reference_rejected


def preference_loss(formula: str, source: str, convention: str = "sums", *, reads: Callable = log_ratios, **details):
    """Register a loss under its function's name; the decorator of every loss in `preference` and the files beside it.

    Such a function is written as the papers write it, `loss(c, r, *, beta, **settings)`, with the two tensors (B) that `reads`
    returns, divided by the lengths where the loss `averages`. What replaces it, and stands in `PREFERENCE_LOSSES`, is

        loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta, chosen_length, rejected_length,
             **settings) -> Tensor

    of log-probabilities summed over the tokens of each reply, in nats (B), and numbers of tokens (B). It returns one loss a
    pair (B). The references may be None where `needs_reference` is False, the lengths where `needs_lengths` is.

    Errors (ValueError): beta that is not positive; tensors of other shapes than policy_chosen's (B); none where one is needed.
    """

    def register(written: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name, keywords = written.__name__, keywords_of(written)
        settings = {each.name: each.default for each in keywords if each.name not in ("beta", *BATCH_VALUES)}
        weight = {each.name: each.default for each in keywords}.get("alpha", 0.0)
        known = LossDetails(
            formula, source, convention, needs_reference=reads is not log_probs, nll_weight=weight, settings=settings, **details
        )

        @functools.wraps(written)
        def loss(
            policy_chosen: Tensor,
            policy_rejected: Tensor,
            reference_chosen: Tensor | None = None,
            reference_rejected: Tensor | None = None,
            *,
            beta: float,
            chosen_length: Tensor | None = None,
            rejected_length: Tensor | None = None,
            **settings,
        ) -> Tensor:
            require_positive(name, beta=beta)
            given = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected}
            if known.needs_reference:
                given |= {"reference_chosen": reference_chosen, "reference_rejected": reference_rejected}
            if known.averages:
                given |= {"chosen_length": chosen_length, "rejected_length": rejected_length}
            require_shapes(name, given)
            one_B, other_B = reads(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
            if known.averages:
                one_B, other_B = one_B / chosen_length, other_B / rejected_length
            return written(one_B, other_B, beta=beta, **settings)

        *shared, _ = inspect.signature(loss, follow_wrapped=False).parameters.values()  # without **settings
        own = [each for each in keywords if each.name != "beta"]
        loss.__signature__ = inspect.Signature([*shared, *own], return_annotation=Tensor)
        PREFERENCE_LOSSES[name], PREFERENCE_DETAILS[name] = loss, known
        return loss

    return register


def keywords_of(written: Callable) -> list[inspect.Parameter]:
    return [each for each in inspect.signature(written).parameters.values() if each.kind == each.KEYWORD_ONLY]


def require_positive(loss: str, **numbers: float) -> None:
    """Raise ValueError with the name of the number that is not finite and above 0."""
    for name, number in numbers.items():
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{loss}: {name}={number}: expected a finite number above 0")


def require_smoothing(loss: str, label_smoothing: float, *, positive: bool = False) -> None:
    """Raise ValueError unless 0 <= label_smoothing < 1/2, or 0 < where `positive`: the share of pairs labelled wrongly."""
    if not (0 <= label_smoothing < 0.5) or (positive and label_smoothing == 0):
        bound = "0 <" if positive else "0 <="
        raise ValueError(f"{loss}: label_smoothing={label_smoothing}: expected {bound} label_smoothing < 1/2")


def require_shapes(loss: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError with the name of the tensor that is missing, or that has not the shape (B) of the first."""
    first, shape = next((name, tensor.shape) for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        if tensor is None:
            raise ValueError(f"{loss}: it needs {name}, one number a pair ({len(tensors[first])})")
        if tensor.shape != shape or tensor.dim() != 1:
            shapes = f"{name} {tuple(tensor.shape)} beside {first} {tuple(shape)}"
            raise ValueError(f"{loss}: {shapes}: expected one number a pair (B)")


def add_nll(loss_B: Tensor, nll_B: Tensor | None, alpha: float) -> Tensor:
    """Return loss + alpha · nll; the loss as it is where no nll is given."""
    return loss_B if nll_B is None else torch.add(loss_B, nll_B, alpha=alpha)
