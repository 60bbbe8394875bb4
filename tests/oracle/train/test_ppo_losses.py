"""PPO's rewards, returns, advantages and losses: by hand, beside plain loops, and beside OpenRLHF's and TRL's functions.

Neither library installs beside the other oracles, so that values of theirs are recorded: those of OpenRLHF 0.11 (commit
3c3be62, `compute_reward`, `get_advantages_and_returns`, `ValueLoss`, `PolicyLoss`, `AdaptiveKLController`) and of TRL 1.9
(`masked_whiten`) in float64 on the batch below, to 14 decimals.
"""

import math

import pytest
import torch
from torch import Tensor

from tests.compare import absolute
from train.losses.gae import gae, token_rewards, whiten
from train.losses.kl import kl_estimate
from train.losses.kl_control import AdaptiveKL, FixedKL
from train.losses.policy import POLICY_LOSSES
from train.losses.value import ppo_value_loss
from train.runs.errors import TrainError

OPENRLHF, RECORDED = "openrlhf 0.11", "recorded to 14 decimals"
LENGTHS = (6, 4, 1)
MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]


def wave(number: int) -> Tensor:
    """Numbers between -1 and 1 that every machine computes alike."""
    place = torch.arange(3)[:, None] * 6 + torch.arange(6) + 1
    return (place * (number + 1) * 0.7).double().sin()


def numbers(text: str) -> Tensor:
    return torch.tensor([float(each) for each in text.split()], dtype=torch.float64)


LOGPS, OLD, ADVANTAGES, VALUES, OLD_VALUES, RETURNS, KL = map(wave, range(7))
SCORES = numbers("1.5 -0.5 2.0")

# ---- recorded

REWARDS_M = numbers(
    "0.29473577845114 0.10994379201499 -0.25372407987482 -0.20458916972092 0.17740725895954 1.77076633318759 -0.07640492118759 "
    "-0.29926724165993 -0.03522892425168 -0.21387420417216 1.77106003743202"
)
GAE_M = numbers(
    "0.15069731167912 1.05429134578471 -0.63341438004075 1.88356777374924 0.30198966037969 2.65833301529897 -1.10950320836238 "
    "0.00925751622055 -0.207662240064 -0.48477999248003 2.734380876118"
)
RETURNS_M = numbers(
    "0.48568550676369 0.42302463394866 0.22118472614037 0.90439000587784 1.29259701607456 1.77076633318759 -0.42753930929264 "
    "-0.38829781687261 -0.14045530936021 -0.21387420417216 1.77106003743202"
)
WHITENED_M = numbers(  # TRL's mask in float64: of a mask of integers its correction is float32
    "0.94481204865631 -1.36496197832066 -0.18211891434514 0.93334788097799 -1.3757734341118 -0.15973881060116 "
    "0.92156168338833 -1.38625314805025 -0.13737072906977 0.90945710876014 0.89703829271603"
)
MEAN = 2.40560105697786 - 0.94481204865631
VALUE = {  # clip: loss, gradient
    0.2: (
        0.86590241599716,
        "0.10968762490803 -0.13507871072883 0.07463423916737 0 0 -0.08679760116501 0.14404712209349 -0.11048386053082 "
        "-0.00304630974806 0.10794793965668 0",
    ),
    None: (
        0.48551106274944933,
        "0.10968762490803 -0.13507871072883 0.07463423916737 -0.00832828052364 0.0139956106508 -0.08679760116501 "
        "0.14404712209349 -0.11048386053082 -0.00304630974806 0.10794793965668 -0.00307903119744",
    ),
}
POLICY = {  # dual clip: loss, gradient
    None: (
        -0.012078943467431859,
        "-0.05578639375415 0.15184632000193 0 0 0 -0.00054396231653 -0.04152732400209 0.11426261466905 -0.0045074407855 "
        "-0.05448342530464 0",
    ),
    1.5: (
        -0.045074034527940725,
        "-0.05578639375415 0 0 0 0 -0.00054396231653 -0.04152732400209 0.11426261466905 -0.0045074407855 -0.05448342530464 0",
    ),
}


def test_rewards_and_advantages(parity):
    rewards_BT = token_rewards(SCORES, KL, MASK, 0.3)
    parity("rewards of tokens: KL penalty and score", OPENRLHF, absolute(rewards_BT[MASK], REWARDS_M), 1e-13, RECORDED)
    advantages_BT, returns_BT = gae(rewards_BT, VALUES, MASK, gamma=0.9, lam=0.8)
    parity("generalised advantage estimation: advantages", OPENRLHF, absolute(advantages_BT[MASK], GAE_M), 1e-13, RECORDED)
    parity("generalised advantage estimation: returns", OPENRLHF, absolute(returns_BT[MASK], RETURNS_M), 1e-13, RECORDED)
    assert not any(each[~MASK].any() for each in (rewards_BT, advantages_BT, returns_BT))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean, parity):
    ours_BT = whiten(ADVANTAGES * 3 + 1, MASK, shift_mean=shift_mean)
    expected_M = WHITENED_M if shift_mean else WHITENED_M + MEAN
    name = f"whitening{'' if shift_mean else ', with its mean'}"
    parity(name, "trl 1.9.0", absolute(ours_BT[MASK], expected_M), 1e-13, RECORDED)
    assert not ours_BT[~MASK].any()


@pytest.mark.parametrize("clip", VALUE)
def test_value_loss(clip, parity):
    loss, gradient = VALUE[clip]
    values_BT = VALUES.clone().requires_grad_()
    total, count = ppo_value_loss(values_BT, OLD_VALUES, RETURNS, MASK, clip=clip)
    assert count == sum(LENGTHS)
    (total / count).backward()
    ours = torch.cat([(total / count).detach()[None], values_BT.grad[MASK]])
    parity(f"loss of values, clip {clip}", OPENRLHF, absolute(ours, numbers(f"{loss} {gradient}")), 1e-13, RECORDED)
    assert not values_BT.grad[~MASK].any()


@pytest.mark.parametrize("dual_clip", POLICY)
def test_policy_loss(dual_clip, parity):
    loss, gradient = POLICY[dual_clip]
    logps_BT = LOGPS.clone().requires_grad_()
    total, count = POLICY_LOSSES["ppo"](logps_BT, OLD, ADVANTAGES, MASK, dual_clip=dual_clip)
    (total / count).backward()
    ours = torch.cat([(total / count).detach()[None], logps_BT.grad[MASK]])
    parity(f"policy loss ppo, dual clip {dual_clip}", OPENRLHF, absolute(ours, numbers(f"{loss} {gradient}")), 1e-13, RECORDED)


def test_adaptive_coefficient(parity):
    control, found = AdaptiveKL(0.05, target=6.0, horizon=100), []
    for kl in (9.0, 6.3, 2.0):
        control.update(kl, 16)
        found.append(control.coefficient)
    expected = [0.05160000000000001, 0.052012800000000005, 0.050348390400000005]
    error = absolute(torch.tensor(found).double(), torch.tensor(expected).double())
    parity("adaptive KL coefficient", OPENRLHF, error, 1e-16, RECORDED)


# ---- by hand


def test_two_tokens_by_hand():
    """Left padding, then tokens with r = 0, 2 and V = 1, 3: γ 0.5, λ 0.5."""
    mask_BT = torch.tensor([[0, 1, 1, 0]])
    rewards_BT, values_BT = numbers("9 0 2 9")[None], numbers("7 1 3 7")[None]
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=0.5, lam=0.5)
    # δ_1 = 2 + 0 - 3 = -1;  δ_0 = 0 + 0.5 · 3 - 1 = 0.5;  A_1 = -1;  A_0 = 0.5 + 0.25 · (-1) = 0.25
    assert advantages_BT.tolist() == [[0, 0.25, -1, 0]] and returns_BT.tolist() == [[0, 1.25, 2, 0]]


def test_a_gap_is_passed():
    """A tool's words between two tokens: the second token follows the first one."""
    rewards_BT, values_BT = numbers("0 9 9 2")[None], numbers("1 7 7 3")[None]
    advantages_BT, _ = gae(rewards_BT, values_BT, torch.tensor([[1, 0, 0, 1]]), gamma=0.5, lam=0.5)
    assert advantages_BT.tolist() == [[0.25, 0, 0, -1]]


def test_score_at_the_last_token():
    mask_BT = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    found_BT = token_rewards(numbers("1 2 3"), torch.ones(3, 4).double(), mask_BT, 0.25)
    assert found_BT.tolist() == [[0, -0.25, 0.75, 0], [-0.25, 0, 1.75, 0], [0, 0, 0, 0]]


def test_values_by_hand():
    """V moved past the clip towards R: no gradient; away from it: one; within it: one."""
    old, returns = numbers("0 0 0")[None], numbers("1 1 1")[None]
    values = numbers("0.5 -0.5 0.1")[None].requires_grad_()
    total, count = ppo_value_loss(values, old, returns, torch.ones(1, 3), clip=0.2)
    total.backward()
    assert count == 3 and total.item() == pytest.approx(0.5 * (0.8**2 + 1.5**2 + 0.9**2))
    assert values.grad.tolist() == [[0, pytest.approx(-1.5), pytest.approx(-0.9)]]


def test_dual_clip_by_hand():
    """A ratio of 4: with A = -1 the loss is 3, not 4, and has no gradient; with A = 1 nothing changes."""
    logps = torch.full((2, 1), math.log(4.0), dtype=torch.float64).requires_grad_()
    old, advantages, mask = torch.zeros(2, 1).double(), numbers("-1 1")[:, None], torch.ones(2, 1)
    plain, _ = POLICY_LOSSES["ppo"](logps, old, advantages, mask)
    dual, _ = POLICY_LOSSES["ppo"](logps, old, advantages, mask, dual_clip=3.0)
    assert plain.item() == pytest.approx(4 - 1.2) and dual.item() == pytest.approx(3 - 1.2)
    assert torch.autograd.grad(plain, logps)[0].flatten().tolist() == [pytest.approx(4), 0]
    assert torch.autograd.grad(dual, logps)[0].flatten().tolist() == [0, 0]


# ---- plain loops, whatever the mask


def by_loops(rewards, values, mask, gamma, lam):
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        places = [t for t in range(rewards.size(1)) if mask[row, t]]
        deltas = [
            rewards[row, t] + (gamma * values[row, places[i + 1]] if i + 1 < len(places) else 0) - values[row, t]
            for i, t in enumerate(places)
        ]
        for i, t in enumerate(places):
            advantages[row, t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(places)))
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0), (0.0, 0.5)])
def test_sums_of_differences(gamma, lam, parity):
    mask = torch.rand(9, 12, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[4] = False
    rewards, values = (torch.randn(9, 12, dtype=torch.float64) for _ in range(2))
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = by_loops(rewards, values, mask, gamma, lam)
    name = f"generalised advantage estimation, γ {gamma}, λ {lam}"
    parity(name, "its sum, in loops", absolute(advantages, expected), 1e-12, "float64")
    assert absolute(returns, torch.where(mask, expected + values, 0)) < 1e-12
    spoilt = [torch.where(mask, each, torch.nan) for each in (rewards, values)]  # what is masked is not read
    assert all(torch.equal(*pair) for pair in zip(gae(*spoilt, mask, gamma=gamma, lam=lam), (advantages, returns), strict=True))


def test_lambda_1_is_the_return_less_the_value():
    """Whatever the values, λ = 1 and γ = 1 give the sum of later rewards as returns."""
    rewards, values = wave(1), wave(2)
    _, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    assert absolute(returns, torch.where(MASK, (rewards * MASK).flip(-1).cumsum(-1).flip(-1), 0)) < 1e-12


def test_advantages_of_tokens_in_every_loss():
    """One advantage a reply, written at each of its tokens, is the same loss to the bit; where a reply has one ratio, it is
    refused."""
    reply_B = numbers("0.5 -1 2")
    for name, loss in POLICY_LOSSES.items():
        more = {"max_length": 8} if name == "dr_grpo" else {}
        if name in ("gspo", "rloo"):
            with pytest.raises(ValueError, match=rf"{name}: advantages \(3, 6\) beside a mask \(3, 6\): expected \(3,\)"):
                loss(LOGPS, OLD, reply_B[:, None].expand(3, 6), MASK, **more)
        else:
            given = (loss(LOGPS, OLD, each, MASK, **more) for each in (reply_B, reply_B[:, None].expand(3, 6)))
            assert torch.equal(*(total for total, _ in given)), name


def test_padding_may_hold_anything():
    spoilt = torch.where(MASK, ADVANTAGES, torch.nan)
    for function in (
        lambda x: whiten(x, MASK),
        lambda x: token_rewards(SCORES, x, MASK, 0.3),
        lambda x: ppo_value_loss(x, x, x, MASK)[0],
        lambda x: POLICY_LOSSES["ppo"](x, x, x, MASK)[0],
    ):
        assert torch.equal(function(spoilt), function(torch.where(MASK, ADVANTAGES, 5.0)))


# ---- the KL penalty as a reward, by enumeration


def test_which_estimator_holds_a_policy_from_the_reward(parity):
    """Of one token of 6: E[∇ log π · k] is ∇ KL(π ‖ ref) for k1; for k3 it is that less ∇ KL(ref ‖ π): 0 to first order near
    the reference, so that k3 in the reward holds nothing."""
    draw = torch.Generator().manual_seed(7)
    logits, reference = (torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    log_p, log_r = logits.log_softmax(-1), reference.log_softmax(-1)
    p, r = log_p.exp(), log_r.exp()
    reverse, forward = (p * (log_p - log_r)).sum(), (r * (log_r - log_p)).sum()
    of_reverse, of_forward = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (reverse, forward))
    for kind, expected in (("k1", of_reverse), ("k3", of_reverse - of_forward)):
        penalty = kl_estimate(log_p, log_r, kind).detach()
        (found,) = torch.autograd.grad((p.detach() * penalty * log_p).sum(), logits, retain_graph=True)
        name = f"expected policy gradient of {kind} in the reward"
        parity(name, "gradients of KL divergences, by enumeration", absolute(found, expected), 1e-12, "float64")
    near = (log_r + 1e-3 * torch.randn(6, generator=draw, dtype=torch.float64)).log_softmax(-1)
    weights = near.exp() * kl_estimate(near, log_r, "k3")
    assert (weights - near.exp() * weights.sum()).abs().max() < 1e-5  # and of k1 about 1e-3


# ---- edges and errors


def test_one_value_and_none():
    one = torch.tensor([[1, 0]])
    assert whiten(numbers("3 7")[None], one).tolist() == [[0, 0]]
    assert whiten(numbers("3 7")[None], one, shift_mean=False).tolist() == [[3, 0]]
    assert whiten(numbers("3 7")[None], 0 * one).tolist() == [[0, 0]]


def test_a_fixed_coefficient_stays():
    control = FixedKL(0.3)
    control.update(100.0, 10_000)
    assert control.coefficient == 0.3 and control.state_dict() == {"coefficient": 0.3}
    control.load_state_dict({"coefficient": 0.5})
    assert control.coefficient == 0.5


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected one shape \(B, T\)"):
        gae(VALUES, VALUES[:, 1:], MASK)
    with pytest.raises(ValueError, match="expected one shape"):
        ppo_value_loss(VALUES, OLD_VALUES[:, 1:], RETURNS, MASK)
    with pytest.raises(ValueError, match="clip=0"):
        ppo_value_loss(VALUES, OLD_VALUES, RETURNS, MASK, clip=0.0)
    with pytest.raises(TrainError, match=r"dual_clip=1\.0"):
        POLICY_LOSSES["ppo"](LOGPS, OLD, ADVANTAGES, MASK, dual_clip=1.0)
    for name, given in (("coefficient", (0.0, 1.0, 1.0)), ("target", (0.1, 0.0, 1.0)), ("horizon", (0.1, 1.0, 0.0))):
        with pytest.raises(TrainError, match=f"{name}=0.0: must be above 0"):
            AdaptiveKL(*given)
