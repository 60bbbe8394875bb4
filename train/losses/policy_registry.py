"""The table of policy losses: what registers a loss, its details, its ratio and its aggregation over tokens."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from train.losses.preference_registry import keywords_of
from train.runs.errors import TrainError

POLICY_LOSSES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}
POLICY_DETAILS: dict[str, "PolicyDetails"] = {}


class Replies(NamedTuple):
    """The variables of a written loss: the ratio of each token (B T) or reply (B 1), the advantage of each reply (B 1) or token
    (B T), log-probabilities under the policy (B T), lengths in tokens (B 1)."""

    ratio: Tensor
    advantages: Tensor
    logps_BT: Tensor
    lengths_B1: Tensor


# ---- the log-ratio of a reply from those of its tokens, and the aggregations: of values that are 0 where masked


def mean_over_tokens(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return each reply's mean over its tokens, B 1; 0 for a reply without."""
    return values_BT.sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp(min=1)


def sum_over_tokens(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return each reply's sum over its tokens, B 1."""
    return values_BT.sum(-1, keepdim=True)


def sum_over_limit(values_BT: Tensor, mask_BT: Tensor, *, max_length: float | None = None) -> Tensor:
    """Return each reply's sum over its tokens divided by max_length, B 1."""
    if max_length is None or not 0 < max_length < math.inf:
        raise TrainError(f"max_length={max_length}: give the largest number of tokens that a reply may have")
    return sum_over_tokens(values_BT, mask_BT) / max_length


@dataclass(frozen=True)
class PolicyDetails:
    """Facts about a policy loss: formula and source, what its count counts, the level of its ratio, its settings.

    formula: the loss of a step, of ρ, the ratio π / π_old; A, the reply's advantage; n, its tokens; min(ρA, …),
    the lower of ρA and ρA with ρ clipped to [1 − clip_low, 1 + clip_high]; R replies and N tokens of the whole step.
    unit: "replies" or "tokens". settings: the loss's own keywords with their defaults; None: it must be given.
    """

    formula: str
    source: str
    convention: str
    unit: str = "replies"
    settings: Mapping[str, float | None] = field(default_factory=dict)
    aggregate: Callable[..., Tensor] = mean_over_tokens
    sequence_log_ratio: Callable[[Tensor, Tensor], Tensor] | None = None  # (log ratios B T, 0 where masked; mask) -> B 1

    @property
    def level(self) -> str:
        """"token" or "sequence": what has a ratio of its own."""
        return "token" if self.sequence_log_ratio is None else "sequence"

    def clip_range(self, settings: Mapping[str, float | None] | None = None) -> tuple[float, float]:
        """Return the (least, greatest) ratio that is not clipped, with `settings` in the place of defaults."""
        known = {**self.settings, **(settings or {})}
        if "cap" in known:
            return 0.0, known["cap"]
        return 1 - known["clip_low"], 1 + known["clip_high"]


def policy_loss(formula: str, source: str, convention: str, **details):
    """Register a loss under its function's name; the decorator of every loss in `policy`.

    Such a function is written as the papers write it, `loss(x: Replies, **settings)`, and returns the loss of each token (B T)
    or what is that of each of a reply's tokens (B 1). What replaces it, and stands in `POLICY_LOSSES`, is

        loss(logps_BT, old_logps_BT, advantages, mask_BT, *, kl_BT=None, beta=0.0, weights_BT=None, **settings)
            -> (sum, count)

        loss of a step = Σ over its micro-batches, of all ranks, of sum / Σ of count
        each token:    weights_t · loss_t + beta · kl_t, then the aggregation of the loss

    logps, old_logps B T in nats, at the sampling temperature; advantages B, or B T where the ratio is that of tokens; mask
    B T: 1 at the tokens of a reply that are learned; a truncated reply whose row is 0 is in neither sum nor count. kl B T:
    `kl_estimate`; weights B T or B 1: `sampler_weights`. sum: a scalar in float32 or wider; count: int64. What stands where
    the mask is 0 is not read.
    Nothing is clamped but by the loss itself: a huge ratio gives a huge loss where the loss does not clip it. A ratio that is
    not finite gives NaN, though clipping would hide it in the value and give a gradient of NaN.
    Errors (ValueError): a clip or cap out of range; a negative beta, or one without kl; shapes that differ.
    """

    def register(written: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        name, own = written.__name__, keywords_of(written)
        known = PolicyDetails(formula, source, convention, **details)
        limits = keywords_of(known.aggregate)
        known = PolicyDetails(formula, source, convention, settings={x.name: x.default for x in (*own, *limits)}, **details)

        @functools.wraps(written)
        def loss(
            logps_BT: Tensor,
            old_logps_BT: Tensor,
            advantages: Tensor,
            mask_BT: Tensor,
            *,
            kl_BT: Tensor | None = None,
            beta: float = 0.0,
            weights_BT: Tensor | None = None,
            **settings: float,
        ) -> tuple[Tensor, Tensor]:
            require_settings(name, known.settings, settings, kl_BT, beta)
            require_batch(name, mask_BT, logps_BT, old_logps_BT, advantages, kl_BT, weights_BT)
            mask_BT, wide = mask_BT.bool(), torch.promote_types(logps_BT.dtype, torch.float32)

            def inside(values_BT: Tensor) -> Tensor:
                return torch.where(mask_BT, values_BT.to(wide), 0)

            logps_BT, old_logps_BT = inside(logps_BT), inside(old_logps_BT.detach())
            log_ratio = logps_BT - old_logps_BT
            if known.sequence_log_ratio is not None:
                log_ratio = known.sequence_log_ratio(log_ratio, mask_BT)
            ratio, lengths_B1 = log_ratio.exp(), mask_BT.sum(-1, keepdim=True).clamp(min=1)
            advantages = advantages.detach().to(wide)
            x = Replies(ratio, inside(advantages) if advantages.dim() == 2 else advantages[:, None], logps_BT, lengths_B1)
            loss_BT = written(x, **{key: value for key, value in settings.items() if key in {each.name for each in own}})
            loss_BT = loss_BT + (ratio - ratio + log_ratio - log_ratio).detach()  # 0, or NaN
            if weights_BT is not None:
                loss_BT = loss_BT * inside(weights_BT.detach())
            if beta:
                loss_BT = loss_BT + beta * inside(kl_BT)
            over = {key: value for key, value in settings.items() if key in {each.name for each in limits}}
            return known.aggregate(inside(loss_BT), mask_BT, **over).sum(), policy_count(name, mask_BT)

        *shared, _ = inspect.signature(loss, follow_wrapped=False).parameters.values()  # without **settings
        loss.__signature__ = inspect.Signature([*shared, *own, *limits], return_annotation=tuple[Tensor, Tensor])
        POLICY_LOSSES[name], POLICY_DETAILS[name] = loss, known
        return loss

    return register


def policy_count(name: str, mask_BT: Tensor) -> Tensor:
    """Return what a policy loss's sum is divided by, int64: its tokens, or its replies that have a token.

    Known before any forward pass, so that each micro-batch can be divided by the count of the whole optimizer step.
    Errors (KeyError): an unknown name.

    >>> from train.losses import policy  # registers them
    >>> mask_BT = torch.tensor([[1, 1, 0], [0, 0, 0]])
    >>> policy_count("dapo", mask_BT), policy_count("grpo", mask_BT)
    (tensor(2), tensor(1))
    """
    mask_BT = mask_BT.bool()
    return mask_BT.sum() if POLICY_DETAILS[name].unit == "tokens" else mask_BT.any(-1).sum()


def require_settings(loss: str, known: Mapping, settings: Mapping, kl_BT: Tensor | None, beta: float) -> None:
    """Raise TypeError for a setting that the loss lacks, and TrainError for a value out of range."""
    for name, value in settings.items():
        if name not in known:
            raise TypeError(f"{loss}: unknown setting {name!r}: it has {', '.join(known)}")
        if name == "clip_low" and not 0 <= value <= 1:
            raise TrainError(f"{loss}: clip_low={value}: expected 0 to 1: ratios below 1 − clip_low are clipped")
        if name == "clip_high" and not value >= 0:
            raise TrainError(f"{loss}: clip_high={value}: expected 0 or more: ratios above 1 + clip_high are clipped")
        if name == "dual_clip" and value is not None and not value > 1:
            raise TrainError(f"{loss}: dual_clip={value}: expected a number above 1, or None: the largest ratio where A < 0")
        if name == "cap" and not value > 0:
            raise TrainError(f"{loss}: cap={value}: expected a number above 0: the largest weight of a token")
    if not 0 <= beta < math.inf:
        raise TrainError(f"{loss}: beta={beta}: expected a finite number, 0 or more")
    if beta and kl_BT is None:
        raise ValueError(f"{loss}: beta={beta} needs kl_BT, an estimate a token (`kl_estimate`)")


def require_batch(
    loss: str,
    mask_BT: Tensor,
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages: Tensor,
    kl_BT: Tensor | None,
    weights_BT: Tensor | None,
) -> None:
    """Raise ValueError with the name of the tensor whose shape does not fit the mask's."""
    shape = tuple(mask_BT.shape)
    if len(shape) != 2:
        raise ValueError(f"{loss}: mask {shape}: expected (B, T)")
    expected = {
        "logps": (logps_BT, [shape]),
        "old_logps": (old_logps_BT, [shape]),
        "advantages": (advantages, [shape[:1], shape] if POLICY_DETAILS[loss].level == "token" else [shape[:1]]),
        "kl": (kl_BT, [shape]),
        "weights": (weights_BT, [shape, (shape[0], 1)]),
    }
    for name, (tensor, shapes) in expected.items():
        if tensor is not None and tuple(tensor.shape) not in shapes:
            fits = " or ".join(map(str, shapes))
            raise ValueError(f"{loss}: {name} {tuple(tensor.shape)} beside a mask {shape}: expected {fits}")
