"""Muon and its Newton-Schulz iteration against torch.optim, the SVD, and the plain twins."""

import pytest
import torch
from torch import Tensor, nn

from tests.compare import absolute
from tests.oracle.train.test_adamw import MATRICES, TORCH, groups_of, train, weights
from train.optimizers.muon import COEFFICIENTS, Muon, orthogonalize, orthogonalize_batch


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_equals_torch(parity, batched, adjust_lr, nesterov):
    ours, theirs = weights(MATRICES, torch.float32), weights(MATRICES, torch.float32)
    settings = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov}
    optimizer = Muon(groups_of(ours), **settings, adjust_lr=adjust_lr, ns_dtype=torch.bfloat16, batched=batched)
    oracle = torch.optim.Muon(groups_of(theirs), **settings, adjust_lr_fn=adjust_lr)
    train(optimizer, ours, range(30))
    train(oracle, theirs, range(30))
    # torch iterates in bfloat16. The stack does the same operations in the same order: equal, but for the product of a
    # stack, which seldom sums in another order (measured: one entry in 30 steps). The twin, written as in the paper,
    # rounds everywhere else. The rates add up to 0.08, and a unit of bfloat16 is 2^-8.
    tolerance, reason = (3e-4, "a unit of bfloat16, seldom") if batched else (1e-2, "bfloat16 rounds elsewhere")
    part = f"Muon: {'batched' if batched else 'plain twin'}, bfloat16, {adjust_lr}{', Nesterov' if nesterov else ''}"
    parity(part, f"{TORCH} Muon", absolute(ours, theirs), tolerance, reason)


def test_muon_in_float64_equals_torch_but_for_bfloat16(parity, monkeypatch):
    """With torch's iteration kept in float64 everything else must agree to rounding, in both of our paths."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.clone())
    for batched in (False, True):
        ours, theirs = weights(MATRICES), weights(MATRICES)
        train(Muon(groups_of(ours), lr=0.02, batched=batched), ours, range(30))
        train(torch.optim.Muon(groups_of(theirs), lr=0.02), theirs, range(30))
        part = f"Muon: {'batched' if batched else 'plain twin'}, float64"
        reason = "float64; the iteration enlarges tiny singular values, and their rounding, by 3.4^5 = 485"
        parity(part, f"{TORCH} Muon, its bfloat16 cast removed", absolute(ours, theirs), 1e-11, reason)


def singular_value_map(s: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("shape", [(12, 12), (8, 30), (30, 8), (1, 5)])
def test_orthogonalize_acts_on_singular_values_alone(parity, shape):
    update_OI = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(update_OI, full_matrices=False)
    expected = u @ torch.diag(singular_value_map(s / s.norm(), 5)) @ v
    results = {"plain twin": orthogonalize(update_OI), "batched": orthogonalize_batch(update_OI[None])[0]}
    for kind, result in results.items():
        parity(f"orthogonalize: {kind} {shape}", f"{TORCH} linalg.svd", absolute(result, expected), 1e-10, "float64: U p(S) V'")
    mutant = u @ torch.diag(singular_value_map(s / s.norm(), 4)) @ v  # one step less
    assert absolute(mutant, expected) > 1e-3


def test_singular_values_come_near_one():
    spectrum = torch.linspace(0.05, 1, 24, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0] for _ in range(2))
    after = torch.linalg.svdvals(orthogonalize(u @ torch.diag(spectrum) @ v))
    assert 0.65 < after.min() and after.max() < 1.22
    before = torch.linalg.svdvals(orthogonalize(u @ torch.diag(spectrum) @ v, steps=1))
    assert before.min() < 0.1  # the mutant: one step is not enough
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
def test_orthogonalize_batch_equals_its_plain_twin(dtype, tolerance):
    """The iteration enlarges small singular values, and rounding with them, by up to 3.4^5 = 485."""
    for shape in [(6, 9, 20), (6, 20, 9), (3, 16, 16)]:
        update_BOI = torch.randn(shape, dtype=torch.float64)
        one_by_one = torch.stack([orthogonalize(update_OI, dtype=dtype) for update_OI in update_BOI])
        torch.testing.assert_close(orthogonalize_batch(update_BOI, dtype=dtype), one_by_one, rtol=0, atol=tolerance)


def test_muon_stacks_are_cut_without_changing_the_result(monkeypatch):
    whole, cut = weights(MATRICES), weights(MATRICES)
    train(Muon(groups_of(whole)), whole, range(5))
    monkeypatch.setattr("train.optimizers.muon.BATCH_ELEMENTS", 1)
    train(Muon(groups_of(cut)), cut, range(5))
    assert absolute(whole, cut) <= 1e-12


def test_muon_refuses_what_is_not_a_matrix():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="match_rms_adamw"):
        Muon([nn.Parameter(torch.zeros(3, 3))], adjust_lr="rms")
