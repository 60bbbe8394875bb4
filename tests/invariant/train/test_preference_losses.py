"""Preference losses at step 0, under shifts, at extreme numbers, in float32; their table, their mixtures, and bad input."""

import inspect
import math
import subprocess
import sys

import pytest
import torch

from tests.invariant.house.test_imports import ROOT
from tests.preference_table import NATS, TOKENS, step_0, variant_table
from train import (
    PREFERENCE_DETAILS,
    PREFERENCE_LOSSES,
    LossDetails,
    aot_pairs,
    f_divergence,
    kto_unpaired,
    kto_z,
    ld_token_weights,
    parse_losses,
    transform_log_ratios,
    wpo_weights,
)
from train.losses.mixture import preference_loss_names
from train.runs.errors import TrainError

LN2 = math.log(2)
BETA, EPSILON = 0.1, 0.1
AVERAGE = NATS  # log-probability a token of the replies of step 0
STEP_0 = {  # (loss, gradient by log π of the chosen reply, of the rejected one) at beta 0.1, label_smoothing 0.1, 10 tokens
    "sigmoid": (LN2, -BETA / 2, BETA / 2),
    "conservative": (LN2, -BETA / 2 * 0.8, BETA / 2 * 0.8),
    "robust": (LN2, -BETA / 2 / 0.8, BETA / 2 / 0.8),
    "hinge": (1, -BETA, BETA),
    "ipo": (25, -1 / BETA / TOKENS, 1 / BETA / TOKENS),
    "ipo_sum": (25, -1 / BETA, 1 / BETA),
    "sigmoid_norm": (LN2, -BETA / 2 / TOKENS, BETA / 2 / TOKENS),
    "exo_pair": (-LN2 - math.log(0.1 * 0.9) / 2, -BETA / 4 * math.log(9), BETA / 4 * math.log(9)),
    "discopop": (LN2 / 2 + 0.5, BETA * (5 * (1 - LN2) - 0.75), -BETA * (5 * (1 - LN2) - 0.75)),
    "dpop": (LN2, -BETA / 2, BETA / 2),
    "cpo": (LN2, -BETA / 2, BETA / 2),
    "simpo": (math.log1p(math.e), -BETA / TOKENS / (1 + 1 / math.e), BETA / TOKENS / (1 + 1 / math.e)),
    "orpo": (BETA * LN2, *(sign * BETA / 2 / (1 - math.exp(AVERAGE)) / TOKENS for sign in (-1, 1))),
    "nca_pair": (2 * LN2, -BETA / 4, BETA / 4),
    "bco_pair": (2 * LN2, -BETA / 2, BETA / 2),
    "sppo_hard": (50, -1 / BETA, 1 / BETA),
    "apo_zero": (1, -BETA / 4, BETA / 4),
    "apo_down": (1, 0, BETA / 4),
    "kto": (0.5, -BETA / 8, BETA / 8),
    "aot": (LN2, -BETA / 2 * 0.8, BETA / 2 * 0.8),
    "aot_unpaired": (LN2, -BETA / 2 * 0.8, BETA / 2 * 0.8),
}
PUBLISHED = {"exo_pair": 0.510826, "discopop": 0.846574, "nca_pair": 1.386294, "sigmoid": 0.693147}


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_step_0(name):
    """DPO's gradient at step 0 is −β/2 by the chosen reply, not zero."""
    smoothing = {"label_smoothing": EPSILON} if "label_smoothing" in PREFERENCE_DETAILS[name].settings else {}
    assert step_0(name, beta=BETA, **smoothing) == pytest.approx(STEP_0[name], rel=1e-12)
    assert name not in PUBLISHED or STEP_0[name][0] == pytest.approx(PUBLISHED[name], abs=5e-7)


def arguments(*, dtype=torch.float64, pairs=6, scale=1.0):
    """Sums of policy and reference, and lengths."""
    lengths = torch.randint(1, 12, (2, pairs))
    sums = [-scale * lengths[side] * torch.rand(pairs, dtype=dtype) for side in (0, 1, 0, 1)]
    return sums, {"chosen_length": lengths[0], "rejected_length": lengths[1]}


def lengths_of(name, lengths):
    return lengths if PREFERENCE_DETAILS[name].needs_lengths else {}


def in_the_difference() -> list[str]:
    return [
        *(name for name in PREFERENCE_LOSSES if PREFERENCE_DETAILS[name].takes_divergence),
        *("cpo", "simpo", "aot", "aot_unpaired"),
    ]


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_common_prefix_cancels(name):
    """Tokens that both replies begin with add one number to both; with means over tokens, as long as the lengths are equal."""
    (chosen, rejected, *reference), lengths = arguments()
    lengths = lengths_of(name, lengths | {"rejected_length": lengths["chosen_length"]})
    loss = PREFERENCE_LOSSES[name]
    before, after = (loss(chosen - x, rejected - x, *reference, beta=0.3, **lengths) for x in (0.0, 0.37))
    assert torch.allclose(before, after, rtol=0, atol=1e-12) == (name in in_the_difference())


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_reference_is_read_or_ignored(name):
    sums, lengths = arguments()
    details, loss = PREFERENCE_DETAILS[name], PREFERENCE_LOSSES[name]
    options = {"beta": 0.3, **lengths_of(name, lengths)}
    if details.needs_reference:
        with pytest.raises(ValueError, match=rf"^{name}: it needs reference_chosen, one number a pair \(6\)"):
            loss(*sums[:2], None, None, **options)
        assert not torch.equal(loss(*sums, **options), loss(*sums[:2], *(2 * x for x in sums[2:]), **options))
    else:
        free = loss(*sums[:2], None, None, **options)
        assert torch.equal(free, loss(*sums, **options)) and torch.equal(free, loss(*sums[:2], **options))
        with_zero = {"cpo": "sigmoid", "simpo": "sigmoid_norm"}.get(name)  # log-probabilities of 0, not a missing term
        if with_zero:
            zero = torch.zeros(6, dtype=torch.float64)
            free = loss(*sums[:2], **options, **dict.fromkeys(details.settings, 0.0))  # gamma
            other = PREFERENCE_LOSSES[with_zero](*sums[:2], zero, zero, beta=0.3, **lengths_of(with_zero, lengths))
            assert torch.equal(free, other)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_other_pairs_matter_where_the_details_say(name):
    sums, lengths = arguments()
    loss, lengths = PREFERENCE_LOSSES[name], lengths_of(name, lengths)
    whole = loss(*sums, beta=0.3, **lengths)
    rows = torch.arange(6).split(1)
    alone = [loss(*(x[row] for x in sums), beta=0.3, **{key: x[row] for key, x in lengths.items()}) for row in rows]
    assert torch.equal(whole, torch.cat(alone)) == (name not in ("aot", "aot_unpaired"))
    assert PREFERENCE_DETAILS[name].sees_batch == (name in ("aot", "aot_unpaired", "kto"))  # kto by its z


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_extreme_numbers(name):
    """Replies of thousands of tokens, far from the reference or certain: finite losses and gradients in float32."""
    far = torch.tensor([-1e-7, -1e-30, -6000.0, -5000.0, -0.0, -2e4, -0.69])
    policy = [far.clone().requires_grad_(), far.flip(0).clone().requires_grad_()]
    reference = torch.full((7,), -100.0)
    lengths = {"chosen_length": torch.tensor([1, 10, 900, 1, 7, 9000, 1]), "rejected_length": torch.arange(1, 8)}
    loss = PREFERENCE_LOSSES[name](*policy, reference, reference, beta=0.1, **lengths_of(name, lengths))
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss.sum(), policy))


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_divergences(kind):
    """0 and of slope 1 where the policy is the reference (of ½ for js), so step 0 stays; finite scores far from it."""
    c = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    score = f_divergence(c, kind, alpha=0.3)
    assert score.item() == pytest.approx(0, abs=1e-15)
    assert torch.autograd.grad(score, c)[0].item() == {"js": 0.5}.get(kind, 1.0)
    far = torch.tensor([-1e4, 1e4])
    assert f_divergence(far, kind, alpha=0.3).isfinite().all() and f_divergence(far, kind, alpha=3.0).isfinite().all()
    sums, _ = arguments()
    changed = transform_log_ratios(*sums, kind=kind, alpha=0.3)
    same = torch.allclose(PREFERENCE_LOSSES["sigmoid"](*changed, beta=1.0), PREFERENCE_LOSSES["sigmoid"](*sums, beta=1.0))
    assert same == (kind == "reverse_kl")


def test_float64_stays():
    sums, lengths = arguments()
    for name, loss in PREFERENCE_LOSSES.items():
        assert loss(*sums, beta=0.3, **lengths_of(name, lengths)).dtype == torch.float64


def test_kto_reference_point():
    log_ratios = torch.tensor([1.0, 3.0], requires_grad=True)
    z = kto_z(log_ratios)
    assert z == 2 and not z.requires_grad and kto_z(-log_ratios) == 0
    x = torch.zeros(2, requires_grad=True)
    loss = kto_unpaired(x, torch.tensor([True, False]), beta=0.5, z=torch.tensor(2.0, requires_grad=True))
    assert loss.tolist() == pytest.approx([1 - 1 / (1 + math.exp(1)), 1 - 1 / (1 + math.exp(-1))])
    with pytest.raises(ValueError, match="kto_z: no log-ratio"):
        kto_z(torch.zeros(0))


def test_weights():
    means = torch.tensor([-1.0, 0.0], requires_grad=True), torch.tensor([-2.0, 0.0])
    assert wpo_weights(*means).tolist() == pytest.approx([math.exp(-3), 1]) and not wpo_weights(*means).requires_grad
    chosen, rejected = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    found = ld_token_weights(chosen, rejected, 0.25)
    assert [x.tolist() for x in found] == [[[0, 1, 0.25, 0], [0, 0, 1, 0]], [[0, 0, 1], [1, 0.25, 0.25]]]


# ---- the table and the signatures


def test_the_table_has_each_loss():
    lines = variant_table().splitlines()
    assert len(lines) == 2 + len(PREFERENCE_LOSSES) and list(PREFERENCE_LOSSES) == list(PREFERENCE_DETAILS)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| `sigmoid` | −log σ(βΔ) |" in lines[2] and lines[2].endswith("| 0.1 | 0.693147 | −0.05 | 0.05 |")


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_details_and_signatures(name):
    details, loss = PREFERENCE_DETAILS[name], PREFERENCE_LOSSES[name]
    parameters = inspect.signature(loss).parameters
    assert isinstance(details, LossDetails) and list(parameters)[:7] == [
        *("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"),
        *("beta", "chosen_length", "rejected_length"),
    ]
    assert set(parameters) - set(details.settings) <= {*list(parameters)[:7], "z", "nll", "alpha", "partners"}
    assert {key: parameters[key].default for key in details.settings} == details.settings
    assert details.needs_lengths == (name in ("ipo", "sigmoid_norm", "simpo", "orpo"))
    assert details.needs_reference == (name not in ("cpo", "simpo", "orpo"))
    assert (details.nll, details.nll_weight) == {"cpo": ("reply", 1.0), "orpo": ("text", 1.0)}.get(name, ("none", 0.0))
    assert loss.__name__ == name and loss.__doc__


# ---- bad input

BAD = {
    r"sigmoid: beta=0: expected a finite number above 0": ("sigmoid", {"beta": 0}),
    r"hinge: beta=nan": ("hinge", {"beta": math.nan}),
    r"orpo: beta=-0.1": ("orpo", {"beta": -0.1}),
    r"robust: label_smoothing=0.5: expected 0 <= label_smoothing < 1/2": ("robust", {"label_smoothing": 0.5}),
    r"conservative: label_smoothing=-0.1": ("conservative", {"label_smoothing": -0.1}),
    r"exo_pair: label_smoothing=0.0: expected 0 < label_smoothing < 1/2": ("exo_pair", {"label_smoothing": 0.0}),
    r"aot: label_smoothing=0.7": ("aot", {"label_smoothing": 0.7}),
    r"aot_unpaired: label_smoothing=0.7": ("aot_unpaired", {"label_smoothing": 0.7}),
    r"discopop: tau=0.0": ("discopop", {"tau": 0.0}),
    r"dpop: dpop_lambda=-1.0": ("dpop", {"dpop_lambda": -1.0}),
    r"simpo: gamma=-1.0": ("simpo", {"gamma": -1.0}),
    r"kto: undesirable_weight=0.0": ("kto", {"undesirable_weight": 0.0}),
    r"ipo: it needs chosen_length, one number a pair \(6\)": ("ipo", {"chosen_length": None}),
    r"sigmoid_norm: it needs rejected_length": ("sigmoid_norm", {"rejected_length": None}),
    r"simpo: rejected_length \(2,\) beside policy_chosen \(6,\)": ("simpo", {"rejected_length": torch.ones(2)}),
    r"sigmoid: reference_rejected \(3,\) beside policy_chosen \(6,\)": ("sigmoid", {"reference_rejected": torch.zeros(3)}),
    r"cpo: policy_rejected \(1, 6\) beside policy_chosen \(6,\)": ("cpo", {"policy_rejected": torch.zeros(1, 6)}),
    r"aot: partners \(3,\)": ("aot", {"partners": (torch.zeros(3), torch.zeros(3))}),
    r"aot_unpaired: partners\[1\] \(3,\)": ("aot_unpaired", {"partners": (torch.zeros(6), torch.zeros(3))}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    name, changes = BAD[message]
    sums, lengths = arguments()
    names = "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"
    given = dict(zip(names, sums, strict=True)) | lengths | {"beta": 0.1} | changes
    with pytest.raises(ValueError, match=message):
        PREFERENCE_LOSSES[name](**given)


def test_bad_input_of_the_other_functions_is_named():
    zero = torch.zeros(3)
    with pytest.raises(ValueError, match="divergence 'kl': one of reverse_kl, forward_kl, js, alpha"):
        f_divergence(zero, "kl")
    with pytest.raises(ValueError, match="alpha=inf"):
        f_divergence(zero, "alpha", alpha=math.inf)
    with pytest.raises(ValueError, match=r"wpo: policy_rejected_mean \(2,\) beside policy_chosen_mean \(3,\)"):
        wpo_weights(zero, zero[:2])
    with pytest.raises(ValueError, match=r"ld_dpo: alpha=1\.5"):
        ld_token_weights(zero[None], zero[None], 1.5)
    with pytest.raises(ValueError, match="ld_dpo: 2 rows of rejected replies beside 1"):
        ld_token_weights(zero[None], torch.zeros(2, 3), 0.5)
    with pytest.raises(ValueError, match=r"aot_pairs: reference_rejected \(2,\)"):
        aot_pairs(zero, zero, zero, zero[:2])
    with pytest.raises(TypeError, match="label_smoothing"):
        PREFERENCE_LOSSES["sigmoid"](zero, zero, zero, zero, beta=0.1, label_smoothing=0.1)


# ---- mixtures


def test_mixtures():
    assert parse_losses("dpop") == (("dpop", 1.0),) and parse_losses("sft=2") == (("sft", 2.0),)
    assert parse_losses(" sigmoid = 1 , sft = 2e-1") == (("sigmoid", 1.0), ("sft", 0.2))
    assert parse_losses("sigmoid,sft") == (("sigmoid", 1.0), ("sft", 1.0))


@pytest.mark.parametrize(
    "text, message",
    [
        ("dpo", r"loss 'dpo': 'dpo' is not known; one of sigmoid, .*simpo.*, sft, or several: sigmoid=1,sft=0.2"),
        ("", "'' is not known"),
        ("sigmoid,", "'' is not known"),
        ("sigmoid=1,hinge=1,sigmoid=2", "sigmoid is given twice"),
        ("sigmoid=0", "sigmoid=0: expected a finite weight above 0"),
        ("sigmoid=-1", "sigmoid=-1: expected"),
        ("sigmoid=", "sigmoid=: expected"),
        ("sigmoid=inf", "sigmoid=inf: expected"),
        ("sigmoid=nan,sft=1", "sigmoid=nan: expected"),
        ("sigmoid=a", "sigmoid=a: expected"),
        ("sigmoid=1=2", "sigmoid=1=2: expected"),
    ],
)
def test_bad_mixtures_are_named(text, message):
    with pytest.raises(TrainError, match=message):
        parse_losses(text)


def test_names_are_those_of_the_functions_and_need_no_torch():
    assert list(preference_loss_names()) == list(PREFERENCE_LOSSES)
    code = "import sys; from train.losses.mixture import parse_losses as p; print(p('kto=1,sft=1'), 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "(('kto', 1.0), ('sft', 1.0)) False"
