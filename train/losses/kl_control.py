"""Coefficients of the KL penalty: fixed, or adapted to a target.

The KL divergence is that of whole replies: the mean over replies of the sum over their tokens, in nats.
"""

from collections.abc import Mapping

from train.runs.errors import TrainError

MOST = 0.2  # the largest relative error that counts


class FixedKL:
    """A coefficient that stays."""

    def __init__(self, coefficient: float):
        self.coefficient = coefficient

    def update(self, kl: float, count: int) -> None:
        """Take the KL divergence of `count` replies into account."""

    def state_dict(self) -> dict:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping) -> None:
        self.coefficient = float(state["coefficient"])


class AdaptiveKL(FixedKL):
    """A coefficient κ that grows where the KL divergence is above its target, and shrinks below it:

        κ ← κ (1 + clip(KL / target - 1, -0.2, 0.2) · count / horizon)

    target: nats a reply. horizon: replies after which κ can have changed by a fifth. Errors (TrainError, a ValueError): a
    coefficient, target or horizon that is not above 0. Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    >>> control = AdaptiveKL(0.1, target=6.0, horizon=1000)
    >>> control.update(kl=9.0, count=100)
    >>> control.coefficient
    0.10200000000000001
    """

    def __init__(self, coefficient: float, target: float, horizon: float):
        for name, value in {"coefficient": coefficient, "target": target, "horizon": horizon}.items():
            if not value > 0:
                raise TrainError(f"{name}={value}: must be above 0")
        super().__init__(coefficient)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, count: int) -> None:
        error = min(max(kl / self.target - 1, -MOST), MOST)
        self.coefficient *= 1 + error * count / self.horizon
