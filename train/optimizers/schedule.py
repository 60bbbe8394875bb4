"""Learning-rate schedules: pure functions of the step, which return the factor of the base learning rate.

Steps count from 0; the factor of step t is used by the update that leads from weights t to weights t + 1. All take the
same arguments: `SCHEDULES[name](step, warmup=..., total=..., final=...)` calls any of them. Nothing is stored, so a resumed run
needs the step alone.

Warm-up: factor = (step + warmup_offset) / warmup while step < warmup. The default offset 1 gives the first step
1 / warmup; offset 0 is transformers' convention, whose first step has learning rate 0 and is wasted. The decays count from 0
with either offset (progress 0 at step = warmup), so the last step, total - 1, is not wasted either: `final` is reached at
step = total and stays from there (transformers' cosine rises again). Where transformers has the schedule, offset 0 equals it.
Arguments are integers of steps and fractions of the base learning rate; a decay that starts after `total` raises ValueError.
"""

import math


def _warmup_factor(step: int, warmup: int, warmup_offset: int) -> float:
    return (step + warmup_offset) / warmup


def _progress(step: int, start: int, total: int) -> float:
    if total < start:
        raise ValueError(f"the decay would start at step {start}, after the last step: total={total}")
    return min(1.0, (step - start) / max(1, total - start))


def constant(step: int, *, warmup: int = 0, total: int = 0, final: float = 0.0, warmup_offset: int = 1) -> float:
    """Warm-up, then the factor 1; `total` and `final` have no effect.

    >>> [constant(step, warmup=4) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    return _warmup_factor(step, warmup, warmup_offset) if step < warmup else 1.0


def linear(step: int, *, warmup: int = 0, total: int, final: float = 0.0, warmup_offset: int = 1) -> float:
    """Warm-up, then a straight line from 1 to `final`: final + (1 - final) (total - step) / (total - warmup).

    Source: Devlin et al. 2019, arXiv 1810.04805, appendix A.2.

    >>> [linear(step, warmup=1, total=5) for step in range(6)]
    [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup:
        return _warmup_factor(step, warmup, warmup_offset)
    _progress(step, warmup, total)  # the check
    remaining = max(0.0, (total - step) / max(1, total - warmup))
    return final + (1.0 - final) * remaining


def cosine(step: int, *, warmup: int = 0, total: int, final: float = 0.0, warmup_offset: int = 1) -> float:
    """Warm-up, then half a cosine from 1 to `final`: final + (1 - final) (1 + cos(pi progress)) / 2.

    Source: Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5, one cycle; final 0.1 as in Brown et al. 2020.

    >>> [round(cosine(step, total=4, final=0.1), 3) for step in range(6)]
    [1.0, 0.868, 0.55, 0.232, 0.1, 0.1]
    """
    if step < warmup:
        return _warmup_factor(step, warmup, warmup_offset)
    half_wave = 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup, total)))
    return half_wave * (1.0 - final) + final


WSD_DECAYS = {"1-sqrt": lambda progress: 1.0 - math.sqrt(progress), "linear": lambda progress: 1.0 - progress}


def wsd(
    step: int,
    *,
    warmup: int = 0,
    total: int,
    final: float = 0.0,
    warmup_offset: int = 1,
    decay_steps: int | None = None,
    decay: str = "1-sqrt",
) -> float:
    """Warm-up, stable at 1, then down to `final` over the last `decay_steps` (None: a fifth of `total`).

    `decay` is "1-sqrt", which Hägele et al. found best, or "linear". The warm-up starts near 0 whatever `final` is
    (transformers starts it at `final`).
    Source: Hu et al. 2024, arXiv 2404.06395, section 4; Hägele et al. 2024, arXiv 2405.18392.

    >>> [wsd(step, warmup=1, total=10, decay_steps=4, decay="linear") for step in range(5, 11)]
    [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup:
        return _warmup_factor(step, warmup, warmup_offset)
    decay_start = total - (total // 5 if decay_steps is None else decay_steps)
    if decay_start < warmup:
        raise ValueError(f"warmup={warmup} and the decay from step {decay_start} overlap: total={total}")
    if step < decay_start:
        return 1.0
    return WSD_DECAYS[decay](_progress(step, decay_start, total)) * (1.0 - final) + final


def inverse_sqrt(
    step: int,
    *,
    warmup: int = 0,
    total: int = 0,
    final: float = 0.0,
    warmup_offset: int = 1,
    timescale: int | None = None,
) -> float:
    """Warm-up, then 1 / sqrt(1 + (step - warmup) / timescale), not below `final`; `total` has no effect.

    `timescale` None: `warmup`, or 10,000 without one. With timescale = warmup it is sqrt(warmup / step), the rate of
    Vaswani et al. 2017, arXiv 1706.03762, equation 3, up to the constant.

    >>> [inverse_sqrt(step, warmup=4) for step in (0, 4, 16, 64)]
    [0.25, 1.0, 0.5, 0.25]
    """
    if step < warmup:
        return _warmup_factor(step, warmup, warmup_offset)
    timescale = timescale or warmup or 10_000
    return max(final, 1.0 / math.sqrt((step + timescale - warmup) / timescale))


def slanted_triangular(
    step: int, *, warmup: int = 0, total: int, final: float = 0.0, warmup_offset: int = 1, ratio: float = 32.0
) -> float:
    """A short linear rise from 1 / ratio to 1, then a long linear fall back to 1 / ratio.

        p = step / warmup                                    while step < warmup (the paper's cut = total · cut_frac)
        p = 1 - (step - warmup) / (total - warmup)           from there (cut · (1 / cut_frac - 1) = total - cut)
        factor = (1 + p (ratio - 1)) / ratio

    1 / ratio is the factor at both ends; a `final` above 0 replaces it, and the default 0 means the paper's 1 / 32.
    The rise starts at p = warmup_offset / warmup; offset 0 is the paper's.
    Source: Howard & Ruder 2018, arXiv 1801.06146, equation 3, where cut_frac is 0.1.

    >>> [slanted_triangular(step, warmup=2, total=6, ratio=4, warmup_offset=0) for step in range(7)]
    [0.25, 0.625, 1.0, 0.8125, 0.625, 0.4375, 0.25]
    """
    lowest = final or 1.0 / ratio
    is_rising = step < warmup
    p = _warmup_factor(step, warmup, warmup_offset) if is_rising else 1.0 - _progress(step, warmup, total)
    return lowest + (1.0 - lowest) * p


SCHEDULES = {
    "cosine": cosine,
    "constant": constant,
    "linear": linear,
    "wsd": wsd,
    "inverse_sqrt": inverse_sqrt,
    "slanted_triangular": slanted_triangular,
}
ENDLESS = ("constant", "inverse_sqrt")  # `total` has no effect on these
