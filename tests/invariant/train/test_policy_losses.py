"""Policy losses: hand-computed values, accumulation, truncated replies, extreme ratios; the mutants of each trap; bad input."""

import inspect
import math
from functools import partial

import pytest
import torch

from tests.compare import absolute
from tests.policy_table import step_0, variant_table
from train import (
    POLICY_DETAILS,
    POLICY_LOSSES,
    PolicyDetails,
    group_advantages,
    kl_estimate,
    policy_count,
    sampler_weights,
    soft_overlong_penalty,
    token_log_probs_and_entropy,
)
from train.losses.sampler import SAMPLER_KINDS
from train.runs.errors import TrainError

NAMES = "grpo bnpo dapo dr_grpo gspo cispo rloo ppo".split()
LENGTHS = (1, 9, 4, 6, 2, 7, 3, 8)
LIMIT = 16


def settings_of(name, **settings):
    return settings | ({"max_length": LIMIT} if "max_length" in POLICY_DETAILS[name].settings else {})


def batch(lengths=LENGTHS, spread=0.3, dtype=torch.float64):
    """(log-probabilities, old ones, advantages, mask) of replies."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    old = -2 * torch.rand(mask.shape, dtype=torch.float64)
    logps = old + spread * torch.randn(mask.shape, dtype=torch.float64)
    advantages = torch.randn(len(lengths), dtype=torch.float64)
    return logps.to(dtype).requires_grad_(), old.to(dtype), advantages.to(dtype), mask


def of_step(name, rows, inputs, *, count=None, **batch_values):
    """(loss, gradient) of an optimizer step whose micro-batches are `rows`; `count`: how it counts them."""
    logps, old, advantages, mask = inputs
    parts, counts = [], []
    for each in rows:
        extra = {key: value if key == "beta" else value[each] for key, value in batch_values.items()}
        total, number = POLICY_LOSSES[name](logps[each], old[each], advantages[each], mask[each], **settings_of(name), **extra)
        assert number.dtype == torch.int64 and number == policy_count(name, mask[each])
        parts.append(total)
        counts.append(number)
    loss = sum(parts) / sum(counts) if count is None else count(parts, counts)
    return loss.detach(), *torch.autograd.grad(loss, logps, retain_graph=True)


# ---- values that are known


TABLE = {"grpo": 0.0, "bnpo": 0.4, "dapo": 0.4, "dr_grpo": 4 / 32, "gspo": 0.0, "rloo": 0.0, "cispo": -0.8, "ppo": 0.4}


@pytest.mark.parametrize("name", NAMES)
def test_two_replies_of_1_and_9_tokens(name):
    """Rewards 1 and 0, before any update: the length bias, by hand. cispo: (−½ + 4½) log π / 10, log π = −2."""
    mask = torch.arange(9) < torch.tensor([[1], [9]])
    logps = torch.full((2, 9), -2.0, dtype=torch.float64)
    rewards, groups = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0, 0])
    for scale, factor in (("none", 1.0), ("group", 2 * 0.70701)):
        advantages = group_advantages(rewards, groups, scale=scale)
        total, count = POLICY_LOSSES[name](logps, logps, advantages, mask, **settings_of(name))
        assert (total / count).item() == pytest.approx(TABLE[name] * factor, rel=1e-5, abs=1e-15)
    assert name != "dapo" or (total / count).item() == pytest.approx(0.56561, abs=5e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_has_reinforce_gradient(name):
    """Ratio 1: −A a token by the aggregation's weights, so that clips, ratios and caps do nothing."""
    logps, _, advantages, mask = batch()
    _, gradient = of_step(name, [slice(None)], (logps, logps.detach(), advantages, mask))
    lengths, tokens, replies = mask.double().sum(-1, keepdim=True), mask.double().sum(), len(mask)
    weight = {"grpo": 1 / lengths / replies, "gspo": 1 / lengths / replies, "rloo": 1 / replies, "dr_grpo": 1 / replies / LIMIT}
    expected = -advantages[:, None] * weight.get(name, 1 / tokens) * mask
    assert absolute(gradient, expected) < 1e-15


def test_equal_rewards_and_groups_of_one_have_no_advantage():
    """Exactly 0, whatever the rounding of a mean, so that a constant reward moves nothing."""
    for count in (1, 3, 7, 16):
        rewards, groups = torch.full((2 * count,), 0.1), torch.arange(2).repeat(count)
        for options in ({}, {"scale": "none"}, {"scale": "batch"}, {"baseline": "others"}):
            assert group_advantages(rewards, groups, **options).tolist() == [0.0] * 2 * count
    rewards = torch.tensor([1.0, math.nan, 5.0, math.nan])
    assert group_advantages(rewards, torch.tensor([0, 0, 1, 2])).tolist() == [0.0] * 4, "one given reward, or none"


def test_two_replies_leave_one_out():
    rewards, groups = torch.tensor([3.0, 1.5, -1.0, 4.0]), torch.tensor([0, 1, 0, 1])
    found = group_advantages(rewards, groups, scale="none", baseline="others")
    assert found.tolist() == [4.0, -2.5, -4.0, 2.5], "A = ±(R1 − R2)"


@pytest.mark.parametrize("size", [2, 3, 8])
def test_grpo_is_rloo_times_a_factor(size):
    """(G − 1)/G, without scaling: of advantages, and of the first step's gradient of replies of one length."""
    rewards, groups = torch.randn(4 * size, dtype=torch.float64), torch.arange(4).repeat(size)
    mean, others = (group_advantages(rewards, groups, scale="none", baseline=name) for name in ("mean", "others"))
    assert absolute(mean, others * (size - 1) / size) < 1e-14 and absolute(mean, others) > 0.05
    logps, _, _, mask = batch((5,) * 4 * size)
    gradients = [
        of_step(name, [slice(None)], (logps, logps.detach(), advantages, mask))[1] * scale
        for name, advantages, scale in (("grpo", mean, 5), ("rloo", others, (size - 1) / size))
    ]
    assert absolute(*gradients) < 1e-14


def test_statistics_do_not_depend_on_order():
    rewards, groups = torch.randn(24, dtype=torch.float64), torch.arange(24) % 4
    order = torch.randperm(24)
    for options in ({}, {"scale": "batch"}, {"scale": "none", "baseline": "others"}):
        found = group_advantages(rewards[order], 100 - groups[order], **options)
        assert absolute(found, group_advantages(rewards, groups, **options)[order]) < 1e-14


# ---- accumulation, masks


SPLITS = {
    "8 x 1": [slice(row, row + 1) for row in range(8)],
    "uneven": [slice(0, 3), slice(3, 4), slice(4, 8)],
    "any order": [torch.tensor([6, 1]), torch.tensor([0, 7, 3]), torch.tensor([2]), torch.tensor([5, 4])],
}


def extras(inputs):
    """KL term and weights, as a micro-batch brings them."""
    logps, old, _, mask = inputs
    reference, sampler = (old + 0.3 * torch.randn(old.shape, dtype=old.dtype) for _ in range(2))
    return {
        "kl_BT": kl_estimate(logps, reference),
        "beta": 0.2,
        "weights_BT": sampler_weights(old, sampler, mask, kind="sequence_truncate", cap=1.5),
    }


def local_means(parts, counts, divisor):
    """Local denominators: the sum of the micro-batches' means, or their mean."""
    return sum(part / count.clamp(min=1) for part, count in zip(parts, counts, strict=True)) / divisor


@pytest.mark.parametrize("name", NAMES)
def test_accumulation(name):
    """1 × 8 = 8 × 1 = micro-batches of any rows, one with a truncated reply alone; and the mutants of TRL#3021 and others."""
    inputs = batch()
    inputs[3][2] = False  # a truncated reply, alone in its micro-batch
    values = extras(inputs)
    whole = of_step(name, [slice(None)], inputs, **values)
    for rows in SPLITS.values():
        assert absolute(of_step(name, rows, inputs, **values), whole) < 1e-14
    for divisor in (1, 4):
        mutant = partial(local_means, divisor=divisor)
        assert absolute(of_step(name, SPLITS["any order"], inputs, count=mutant, **values), whole) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_truncated_replies_leave_numerator_and_denominator(name):
    """A masked row is a removed row, bit for bit in its own gradient; and nothing of padding or masked rows is read."""
    inputs = batch()
    logps, old, advantages, mask = inputs
    kept = torch.tensor([0, 2, 3, 5, 6, 7])
    mask[[1, 4]] = False
    loss, gradient = of_step(name, [slice(None)], inputs)
    alone, expected = of_step(name, [kept], inputs)
    assert absolute((loss, gradient), (alone, expected)) < 1e-15 and (gradient[[1, 4]] == 0).all()
    assert policy_count(name, mask) == (mask.sum() if POLICY_DETAILS[name].unit == "tokens" else 6)
    spoiled = [x.detach().clone() for x in (logps, old)]
    for x in spoiled:
        x[~mask] = math.nan
    nan_advantages = advantages.clone()
    nan_advantages[[1, 4]] = math.nan
    kl = torch.zeros_like(old).masked_fill(~mask, math.nan)
    spoiled = spoiled[0].requires_grad_(), spoiled[1], nan_advantages, mask
    found = of_step(name, [slice(None)], spoiled, kl_BT=kl, beta=0.1, weights_BT=kl + 1)
    assert absolute(found, (loss, gradient)) == 0
    divided_by_all = loss * policy_count(name, mask) / policy_count(name, batch()[3])
    assert abs(divided_by_all - loss) > 1e-3, "the mutant: masked in the numerator alone"


@pytest.mark.parametrize("name", NAMES)
def test_no_replies(name):
    """A rank whose replies are all truncated, or that has none: sum and count 0, gradient 0."""
    logps, old, advantages, mask = batch()
    for rows, own in ((slice(None), mask & False), (slice(0, 0), mask[:0])):
        total, count = POLICY_LOSSES[name](logps[rows], old[rows], advantages[rows], own, **settings_of(name))
        (gradient,) = torch.autograd.grad(total, logps)
        assert total == 0 and count == 0 and not gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_one_slot_off_is_seen(name):
    logps, old, advantages, mask = batch()
    whole = of_step(name, [slice(None)], (logps, old, advantages, mask))
    for shift in (1, -1):
        mutant = of_step(name, [slice(None)], (logps, old, advantages, mask.roll(shift, dims=1)))
        assert absolute(mutant, whole) > 1e-3


def test_statistics_over_half_a_group_are_seen():
    """Two micro-batches, or ranks, each with half of every group: it still learns, of another thing."""
    rewards, groups = torch.randn(16, dtype=torch.float64), torch.arange(16) % 2
    half = [group_advantages(rewards[rows], groups[rows]) for rows in (slice(0, 8), slice(8, 16))]
    assert absolute(torch.cat(half), group_advantages(rewards, groups)) > 0.1


def test_a_forgotten_temperature_is_seen():
    """On one side the ratio is not 1; on both it is, but the gradient is of another policy than the one that sampled."""
    hidden, weight = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    labels, advantages, mask = torch.randint(0, 11, (3, 5)), torch.randn(3, dtype=torch.float64), torch.ones(3, 5)

    def at(now, before):
        logps, old = (token_log_probs_and_entropy(hidden, weight, labels, temperature=t)[0] for t in (now, before))
        total, count = POLICY_LOSSES["dapo"](logps, old, advantages, mask)
        return (logps - old).abs().max(), *torch.autograd.grad(total / count, weight)

    gap, gradient = at(0.7, 0.7)
    assert gap == 0
    for mutant in ((1.0, 0.7), (0.7, 1.0)):
        assert at(*mutant)[0] > 0.1 and absolute(at(*mutant)[1], gradient) > 1e-2
    assert at(1.0, 1.0)[0] == 0 and absolute(at(1.0, 1.0)[1], gradient) > 1e-2


# ---- numerics


@pytest.mark.parametrize("name", NAMES)
def test_huge_ratios(name):
    """Nothing is clamped but by the clip: finite as long as the ratio is."""
    mask, old = torch.ones(2, 1), torch.zeros(2, 1)
    logps = torch.tensor([[60.0], [-60.0]], requires_grad=True)  # e^60: float32 holds it
    good, count = POLICY_LOSSES[name](logps, old, torch.tensor([1.0, 1.0]), mask, **settings_of(name))
    assert good.isfinite() and torch.autograd.grad(good, logps)[0].isfinite().all() and count == 2
    bad, _ = POLICY_LOSSES[name](logps[:1], old[:1], torch.tensor([-1.0]), mask[:1], **settings_of(name))
    divisor = LIMIT if name == "dr_grpo" else 1
    assert bad.item() == pytest.approx((5.0 * 60 if name == "cispo" else math.exp(60)) / divisor, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [100.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_a_ratio_that_is_not_finite_is_not_silent(name, value, advantage):
    """e^100 overflows float32: the clip would hide it, with a gradient of NaN."""
    logps = torch.tensor([[-1.0, value], [-1.0, -1.0]], requires_grad=True)
    mask = torch.ones(2, 2)
    if name == "gspo" and value == 100.0:  # of a mean
        logps = logps.detach() * torch.tensor([1.0, 2.0])
    total, _ = POLICY_LOSSES[name](logps, torch.zeros(2, 2), torch.tensor([advantage, 0.5]), mask, **settings_of(name))
    assert not total.isfinite()
    total, _ = POLICY_LOSSES[name](logps, torch.zeros(2, 2), torch.tensor([math.nan, 0.5]), mask, **settings_of(name))
    assert total.isnan()


@pytest.mark.parametrize("name", NAMES)
def test_bf16_inputs(name):
    """Computed in float32 from the rounded numbers; the gradient has the inputs' format."""
    half = batch(dtype=torch.bfloat16)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in half[:3]]
    total, _ = POLICY_LOSSES[name](*half, **settings_of(name))
    expected, _ = POLICY_LOSSES[name](*wide, half[3], **settings_of(name))
    assert total.dtype == torch.float32 and total.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(total, half[0])
    (other,) = torch.autograd.grad(expected, wide[0])
    assert gradient.dtype == torch.bfloat16 and absolute(gradient, other) < 2**-8 * other.abs().max()
    assert kl_estimate(half[0], half[1]).dtype == sampler_weights(*half[:2], half[3]).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_old_log_probabilities_and_advantages_have_no_gradient(name):
    logps, old, advantages, mask = batch()
    old.requires_grad_(), advantages.requires_grad_()
    total, _ = POLICY_LOSSES[name](logps, old, advantages, mask, **settings_of(name))
    assert torch.autograd.grad(total, (old, advantages), allow_unused=True) == (None, None)


# ---- weights for a sampler, penalties


def test_sampler_weights():
    """Exactly 1 without a mismatch, masked or for a reply without a token; a difference that is not finite is not silent."""
    logps, _, _, mask = batch()
    mask[3] = False
    for kind in SAMPLER_KINDS:
        weights = sampler_weights(logps, logps, mask, kind=kind)
        assert weights.shape == (8, 9 if kind.startswith("token") else 1) and (weights == 1).all() and not weights.requires_grad
        other = logps.detach().masked_fill(~mask, math.nan)
        assert (sampler_weights(other, logps, mask, kind=kind) == 1).all()
        for broken in (math.nan, -math.inf, math.inf):
            other[0, 0] = broken
            assert sampler_weights(logps, other, mask, kind=kind)[0, 0].isnan()
        other[0, 0] = logps[0, 0] - 1000  # a finite difference whose weight overflows
        assert sampler_weights(logps, other, mask, kind=kind)[0, 0] == (3 if "truncate" in kind else 0)
    with pytest.raises(TrainError, match="'tokens': one of token_truncate"):
        sampler_weights(logps, logps, mask, kind="tokens")
    with pytest.raises(TrainError, match="cap=0"):
        sampler_weights(logps, logps, mask, cap=0)
    with pytest.raises(ValueError, match="shapes"):
        sampler_weights(logps, logps[:, 1:], mask)


@pytest.mark.parametrize("name", NAMES)
def test_weights_scale_the_loss_and_not_the_kl(name):
    """A constant weight; a weight of 0 leaves the KL term alone; one weight a reply is the same for each of its tokens."""
    inputs = batch()
    values = extras(inputs)
    kl = {"kl_BT": values["kl_BT"], "beta": 0.2}
    loss, full = (of_step(name, [slice(None)], inputs, **each)[0] for each in ({}, kl))
    twice, none = (of_step(name, [slice(None)], inputs, weights_BT=torch.full((8, 1), w), **kl)[0] for w in (2.0, 0.0))
    assert absolute(twice, full + loss) < 1e-14 and absolute(none, full - loss) < 1e-14 and none > 0
    spread = {**values, "weights_BT": values["weights_BT"].expand(8, 9)}
    assert absolute(*(of_step(name, [slice(None)], inputs, **each) for each in (values, spread))) < 1e-15


def test_soft_overlong_penalty():
    lengths = torch.arange(0, 40)
    found = soft_overlong_penalty(lengths, 20, 8)
    expected = [0.0 if n <= 12 else (12 - n) / 8 if n <= 20 else -1.0 for n in range(40)]
    assert found.tolist() == expected and found.dtype == torch.float64
    assert soft_overlong_penalty(torch.tensor([0, 5, 10]), 10, 10).tolist() == [0.0, -0.5, -1.0]
    for margin in (0, -1, 21):
        with pytest.raises(TrainError, match=f"margin={margin}: expected 1 to max_length=20"):
            soft_overlong_penalty(lengths, 20, margin)


# ---- the table, bad input


def test_the_table():
    """Each loss has its details, and a signature that says its settings with their defaults."""
    assert list(POLICY_LOSSES) == list(POLICY_DETAILS) == NAMES
    clips = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}
    for name, details in POLICY_DETAILS.items():
        assert isinstance(details, PolicyDetails) and details.formula and details.source and details.convention
        parameters = inspect.signature(POLICY_LOSSES[name]).parameters
        shared = ["logps_BT", "old_logps_BT", "advantages", "mask_BT", "kl_BT", "beta", "weights_BT"]
        assert list(parameters) == shared + list(details.settings)
        assert {key: parameters[key].default for key in details.settings} == dict(details.settings)
        assert details.unit == ("tokens" if name in ("bnpo", "dapo", "cispo", "ppo") else "replies")
        assert details.level == ("sequence" if name in ("gspo", "rloo") else "token")
        if name != "cispo":
            assert (details.settings["clip_low"], details.settings["clip_high"]) == clips.get(name, (0.2, 0.2))
        assert POLICY_LOSSES[name].__doc__.startswith("Return ")
    assert POLICY_DETAILS["dapo"].clip_range() == (0.8, 1.28) and POLICY_DETAILS["cispo"].clip_range() == (0.0, 5.0)
    assert POLICY_DETAILS["dapo"].clip_range({"clip_high": 1.0}) == (0.8, 2.0)
    assert POLICY_DETAILS["dr_grpo"].settings["max_length"] is None, "it must be given"


def test_the_printed_table():
    """Numbers of two replies, by hand: A = ±½ over 2 replies, 10 tokens or 2 × 16; no cell has a bar of its own."""
    assert len(variant_table().splitlines()) == 2 + len(NAMES)
    assert {line.count("|") for line in variant_table().splitlines()} == {11}
    tokens, replies = (-0.05, 0.05), (-0.25, 0.25 / 9)
    gradients = dict.fromkeys(("bnpo", "dapo", "cispo", "ppo"), tokens) | dict.fromkeys(("grpo", "gspo"), replies)
    gradients |= {"dr_grpo": (-1 / 64, 1 / 64), "rloo": (-0.25, 0.25)}
    for name in NAMES:
        assert step_0(name) == pytest.approx((TABLE[name], *gradients[name]), rel=1e-12, abs=1e-15)


WRONG = {
    "clip_low": ("grpo", {"clip_low": 1.5}, "grpo: clip_low=1.5: expected 0 to 1"),
    "clip_high": ("rloo", {"clip_high": -0.1}, "rloo: clip_high=-0.1: expected 0 or more"),
    "clip_high nan": ("dapo", {"clip_high": math.nan}, "clip_high=nan"),
    "cap": ("cispo", {"cap": 0.0}, "cispo: cap=0.0: expected a number above 0"),
    "no max_length": ("dr_grpo", {}, "max_length=None: give the largest number of tokens"),
    "max_length": ("dr_grpo", {"max_length": 0}, "max_length=0"),
    "beta": ("grpo", {"beta": -1.0}, "grpo: beta=-1.0: expected a finite number, 0 or more"),
    "beta alone": ("grpo", {"beta": 0.1}, "grpo: beta=0.1 needs kl_BT"),
    "kl": ("grpo", {"beta": 0.1, "kl_BT": torch.zeros(8)}, "grpo: kl \\(8,\\) beside a mask \\(8, 9\\)"),
    "weights": ("grpo", {"weights_BT": torch.ones(8)}, "weights \\(8,\\) beside a mask \\(8, 9\\): expected .* or \\(8, 1\\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_settings(case):
    name, settings, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        POLICY_LOSSES[name](*batch(), **settings)


def test_bad_batches():
    logps, old, advantages, mask = batch()
    with pytest.raises(ValueError, match=r"old_logps \(8, 8\) beside a mask \(8, 9\)"):
        POLICY_LOSSES["grpo"](logps, old[:, 1:], advantages, mask)
    with pytest.raises(ValueError, match=r"advantages \(8, 8\) beside a mask"):
        POLICY_LOSSES["grpo"](logps, old, logps.detach()[:, 1:], mask)
    with pytest.raises(ValueError, match=r"mask \(9,\): expected \(B, T\)"):
        POLICY_LOSSES["grpo"](logps[0], old[0], advantages[:1], mask[0])
    with pytest.raises(TypeError, match="grpo: unknown setting 'cap': it has clip_low, clip_high"):
        POLICY_LOSSES["grpo"](logps, old, advantages, mask, cap=3.0)
    with pytest.raises(TrainError, match="KL estimate 'k4': one of k1, k2, k3"):
        kl_estimate(logps, old, "k4")
    with pytest.raises(ValueError, match="reference_logps"):
        kl_estimate(logps, old[:, 1:])
