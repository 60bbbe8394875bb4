"""Schedules against transformers', step by step and exactly."""

import math
from functools import partial

import pytest
import torch

from tests.compare import absolute
from train.optimizers.schedule import SCHEDULES, constant, cosine, inverse_sqrt, linear, slanted_triangular, wsd

transformers = pytest.importorskip("transformers")
LIBRARY = f"transformers {transformers.__version__}"
WARMUP, TOTAL = 7, 40


def factors_of(get_schedule, **arguments) -> list[float]:
    """A transformers schedule's factors at steps 0 … TOTAL, from the function that it hands to LambdaLR."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (factor,) = get_schedule(optimizer, **arguments).lr_lambdas
    return [float(factor(step)) for step in range(TOTAL + 1)]


def wsd_arguments(decay: str, final: float = 0.0) -> dict:
    steps = {"num_warmup_steps": WARMUP, "num_decay_steps": 11, "num_training_steps": TOTAL}
    return steps | {"decay_type": decay, "min_lr_ratio": final}


def transformers_twins():
    from transformers import optimization as hf

    steps = {"num_warmup_steps": WARMUP, "num_training_steps": TOTAL}
    ours = {"warmup": WARMUP, "total": TOTAL, "warmup_offset": 0}
    floor = hf.get_cosine_with_min_lr_schedule_with_warmup
    return {
        "constant": (constant, ours, hf.get_constant_schedule_with_warmup, {"num_warmup_steps": WARMUP}),
        "linear": (linear, ours, hf.get_linear_schedule_with_warmup, steps),
        "linear, no warm-up": (
            linear,
            ours | {"warmup": 0},
            hf.get_linear_schedule_with_warmup,
            steps | {"num_warmup_steps": 0},
        ),
        "cosine": (cosine, ours, hf.get_cosine_schedule_with_warmup, steps),
        "cosine to 0.1": (cosine, ours | {"final": 0.1}, floor, steps | {"min_lr_rate": 0.1}),
        "inverse_sqrt": (inverse_sqrt, ours, hf.get_inverse_sqrt_schedule, {"num_warmup_steps": WARMUP}),
        "inverse_sqrt, timescale 20": (
            inverse_sqrt,
            ours | {"timescale": 20},
            hf.get_inverse_sqrt_schedule,
            {"num_warmup_steps": WARMUP, "timescale": 20},
        ),
        "wsd, 1-sqrt": (wsd, ours | {"decay_steps": 11}, hf.get_wsd_schedule, wsd_arguments("1-sqrt")),
        "wsd, linear": (
            wsd,
            ours | {"decay_steps": 11, "decay": "linear"},
            hf.get_wsd_schedule,
            wsd_arguments("linear"),
        ),
    }


@pytest.mark.parametrize("name", transformers_twins())
def test_equals_transformers(parity, name):
    ours, arguments, get_schedule, their_arguments = transformers_twins()[name]
    theirs = factors_of(get_schedule, **their_arguments)
    error = absolute([ours(step, **arguments) for step in range(TOTAL + 1)], theirs)
    parity(f"schedule: {name}", LIBRARY, error, 0.0, "the same float operations, exact")


def test_wsd_with_a_floor_equals_transformers_after_the_warm_up(parity):
    theirs = factors_of(transformers.get_wsd_schedule, **wsd_arguments("1-sqrt", 0.1))
    ours = partial(wsd, warmup=WARMUP, total=TOTAL, final=0.1, decay_steps=11)
    error = absolute([ours(step) for step in range(WARMUP, TOTAL + 1)], theirs[WARMUP:])
    reason = "exact from the end of the warm-up, which transformers starts at the floor"
    parity("schedule: wsd to 0.1", LIBRARY, error, 0.0, reason)


def wasted(schedule, **arguments) -> list[int]:
    return [step for step in range(TOTAL) if schedule(step, warmup=WARMUP, total=TOTAL, **arguments) == 0]


@pytest.mark.parametrize("name", sorted(SCHEDULES.keys() - {"slanted_triangular"}))
def test_no_step_is_wasted_by_default(name):
    schedule = SCHEDULES[name]
    assert wasted(schedule) == []
    assert wasted(schedule, warmup_offset=0) == [0]  # the mutant: transformers' warm-up
    assert schedule(0, warmup=WARMUP, total=TOTAL) == 1 / WARMUP
    assert schedule(WARMUP - 1, warmup=WARMUP, total=TOTAL) == 1 == schedule(WARMUP, warmup=WARMUP, total=TOTAL)
    assert schedule(0, total=TOTAL) == 1  # without a warm-up


def equation_3(t: int, total: int, cut_frac: float, ratio: float) -> float:
    """Howard & Ruder 2018, as printed, for a highest rate of 1."""
    cut = math.floor(total * cut_frac)
    p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
    return (1 + p * (ratio - 1)) / ratio


@pytest.mark.parametrize(("total", "cut_frac", "ratio"), [(40, 0.1, 32), (200, 0.25, 32), (200, 0.1, 7)])
def test_slanted_triangular_equals_the_paper(parity, total, cut_frac, ratio):
    warmup = round(total * cut_frac)
    ours = partial(slanted_triangular, warmup=warmup, total=total, warmup_offset=0, ratio=ratio)
    steps = range(total + 1)
    error = absolute([ours(step) for step in steps], [equation_3(step, total, cut_frac, ratio) for step in steps])
    parity(f"schedule: slanted_triangular, ratio {ratio}", "the paper's equation 3", error, 1e-15, "float64 rounding")
    assert ours(0) == ours(total) == ours(10 * total) == 1 / ratio and ours(warmup) == 1
    assert ours(0, final=0.3) == ours(total, final=0.3) == 0.3  # `final` takes the place of 1 / ratio, at both ends


def test_slanted_triangular_takes_what_the_others_take():
    at = partial(SCHEDULES["slanted_triangular"], warmup=WARMUP, total=TOTAL, final=0.0)
    rise = [at(step) for step in range(WARMUP)]
    assert rise == sorted(rise) and rise[0] == 1 / 32 + 31 / 32 * (1 / WARMUP) and rise[-1] == at(WARMUP) == 1
    assert SCHEDULES["slanted_triangular"](0, total=TOTAL) == 1  # without a warm-up


@pytest.mark.parametrize("schedule", [linear, cosine, wsd, slanted_triangular])
def test_decays_end_at_final_and_stay(schedule):
    at = partial(schedule, warmup=WARMUP, total=TOTAL, final=0.1)
    assert all(math.isclose(at(step), 0.1, rel_tol=1e-15) for step in (TOTAL, TOTAL + 1, 10 * TOTAL))
    values = [at(step) for step in range(WARMUP, TOTAL + 1)]
    assert values == sorted(values, reverse=True) and values[-2] > 0.1


def test_final_is_a_floor_of_inverse_sqrt():
    assert inverse_sqrt(10**6, warmup=4, final=0.1) == 0.1


def test_plans_that_do_not_fit_are_refused():
    for schedule in (linear, cosine, slanted_triangular):
        with pytest.raises(ValueError, match=r"50.*total=40"):
            schedule(50, warmup=50, total=40)
    with pytest.raises(ValueError, match=r"warmup=35.*32.*total=40"):
        wsd(35, warmup=35, total=40)
