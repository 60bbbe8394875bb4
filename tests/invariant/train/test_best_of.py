"""The best of n on a categorical policy: its distribution and KL divergence exactly, and what our sampler draws."""

import itertools
import math

import pytest
import torch

from model.rollouts import choose_tokens
from train import best_of_n_distribution, best_of_n_kl_bound, choose_best, kl_divergence
from train.rollout import draw_uniforms
from train.synthetic.samples import BEST_OF

PROBS = torch.tensor([0.4, 0.05, 0.25, 0.1, 0.2, 0.0], dtype=torch.float64)
SCORES = torch.tensor([0.0, 2.0, 1.0, 1.0, -1.0, 9.0], dtype=torch.float64)  # a tie, and a best reply that is never drawn


def enumerated(probs: torch.Tensor, scores: torch.Tensor, n: int) -> torch.Tensor:
    """The distribution of `choose_best` over all Vⁿ draws."""
    found = torch.zeros_like(probs)
    for draw in itertools.product(range(len(probs)), repeat=n):
        winner = draw[choose_best([float(scores[v]) for v in draw]).place]
        found[winner] += math.prod(float(probs[v]) for v in draw)
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_distribution_equals_enumeration(n):
    exact = best_of_n_distribution(PROBS, SCORES, n)
    assert torch.allclose(exact, enumerated(PROBS, SCORES, n), rtol=0, atol=1e-14)
    for level in SCORES.unique():  # P(best ≤ v) = F(v)ⁿ
        below = SCORES <= level
        assert float(exact[below].sum()) == pytest.approx(float(PROBS[below].sum()) ** n, abs=1e-14)
    if n == 1:
        assert torch.allclose(exact, PROBS, rtol=0, atol=1e-15)


def test_the_bound_holds_and_is_reached():
    assert best_of_n_kl_bound(4) == pytest.approx(0.636, abs=5e-4) and best_of_n_kl_bound(16) == pytest.approx(1.835, abs=5e-4)
    for seed, n in itertools.product(range(20), (1, 2, 4, 16, 64)):
        draw = torch.Generator().manual_seed(seed)
        probs = torch.rand(7, generator=draw, dtype=torch.float64).softmax(0)
        scores = torch.randint(0, 5, (7,), generator=draw).double()
        kl = kl_divergence(best_of_n_distribution(probs, scores, n), probs)
        assert -1e-12 <= kl <= best_of_n_kl_bound(n) + 1e-12
    fine = torch.full((20_000,), 1 / 20_000, dtype=torch.float64)  # nearly continuous
    for n in (2, 4, 16):
        kl = kl_divergence(best_of_n_distribution(fine, torch.arange(20_000.0), n), fine)
        assert best_of_n_kl_bound(n) - 1e-3 < kl < best_of_n_kl_bound(n)


def test_equal_scores_change_nothing():
    q = best_of_n_distribution(PROBS, torch.ones(6), 8)
    assert torch.allclose(q, PROBS, rtol=0, atol=1e-15) and kl_divergence(q, PROBS) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [2, 4])
def test_drawn_winners_have_the_distribution(n):
    """8,000 prompts by the command's noise and its sampler's draw: Pearson's χ² below the 99.9 % quantile of 4 degrees."""
    count = 8_000
    noise = draw_uniforms(0, BEST_OF, 0, range(count), n, 1)[:, 0]
    logits = PROBS.log().expand(len(noise), -1)
    token, _ = choose_tokens(logits, noise, 1.0)
    winners = [group[choose_best([float(SCORES[v]) for v in group]).place] for group in token.view(count, n).tolist()]
    seen = torch.bincount(torch.tensor(winners), minlength=6).double()
    exact = best_of_n_distribution(PROBS, SCORES, n)
    assert seen[5] == 0
    expected = exact[:5] * count
    assert float(((seen[:5] - expected) ** 2 / expected).sum()) < 18.467
    policy = PROBS[:5] * count  # the test can fail: these winners are no draws of the policy
    assert float(((seen[:5] - policy) ** 2 / policy).sum()) > 500


def test_ties_are_stable_and_reasons_are_named():
    nan = math.nan
    assert choose_best([1.0, 3.0, 3.0]).place == 1
    assert choose_best([nan, 0.0, nan]) == (1, None, 0.0)
    assert choose_best([nan, nan])[:2] == (None, "no reward")
    assert choose_best([1.0, 2.0], at_least=2.0).place == 1
    assert choose_best([1.0, 2.0], at_least=2.5) == (None, "below --at-least", 1.5)
    assert choose_best([1.0, 2.0], may_win=[True, False]) == (0, None, 1.5)
    assert choose_best([1.0, 2.0], may_win=[False, False])[:2] == (None, "every rewarded reply is cut by --max-reply")


@pytest.mark.parametrize(
    "probs, scores, n, message",
    [
        (PROBS, SCORES, 0, "n=0"),
        (PROBS, SCORES[:3], 2, r"probs_V \(6,\) and scores_V \(3,\)"),
        (PROBS * 2, SCORES, 2, "sum to 1"),
        (PROBS, SCORES * math.nan, 2, "finite"),
    ],
)
def test_what_is_no_policy_is_refused(probs, scores, n, message):
    with pytest.raises(ValueError, match=message):
        best_of_n_distribution(probs, scores, n)
    with pytest.raises(ValueError, match="n=0"):
        best_of_n_kl_bound(0)
