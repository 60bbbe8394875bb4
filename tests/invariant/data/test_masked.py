"""Masks: the shares are right, special tokens are left alone, and any split of a batch gives the same rows."""

import math

import numpy as np
import pytest
import torch

import data.transforms.masked
from data.config import DataError
from data.transforms.causal import IGNORE, clm_batch
from data.transforms.masked import UnigramBaseline, mlm_batch, non_special_ids, unigram_baseline

V, BOS, EOS, MASK = 500, 1, 2, 3
SPECIALS = frozenset({0, BOS, EOS, MASK, 499})
SETTINGS = {"seed": 7, "step": 5, "first_row": 0, "mask_id": MASK, "special_ids": SPECIALS, "vocab_size": V, "bos_id": BOS}


def blocks(rows, length, seed=0):
    """Every tenth token special, the last eighth of the last row a filler."""
    draw = np.random.default_rng(seed)
    block = draw.integers(4, V - 1, (rows, length))
    block = np.where(draw.random((rows, length)) < 0.1, draw.choice(sorted(SPECIALS - {MASK}), (rows, length)), block)
    block[-1, -length // 8 :] = -1
    return torch.from_numpy(block)


def z_scores(block, batch, rate=0.15):
    """How many standard deviations each share is from what it should be."""
    ordinary = np.isin(block.numpy(), sorted(SPECIALS), invert=True) & (block.numpy() >= 0)
    chosen = (batch["labels"] != IGNORE).numpy()
    masked = chosen & (batch["input_ids"] == MASK).numpy()
    kept = chosen & (batch["input_ids"] == block).numpy()
    ids = V - len(SPECIALS)  # a random token is the old one once in so many
    shares = {
        "chosen": (chosen, ordinary, rate),
        "masked": (masked, chosen, 0.8),
        "kept": (kept, chosen, 0.1 + 0.1 / ids),
        "replaced": (chosen & ~masked & ~kept, chosen, 0.1 - 0.1 / ids),
    }
    return {
        name: (part.sum() - whole.sum() * p) / math.sqrt(whole.sum() * p * (1 - p)) for name, (part, whole, p) in shares.items()
    }


def wrong_places(block, batch):
    """What may never be: a special token or filler chosen, a special one put in, a change where nothing is chosen."""
    chosen = batch["labels"] != IGNORE
    special = torch.isin(block, torch.tensor(sorted(SPECIALS))) | (block < 0)
    put_in = chosen & (batch["input_ids"] != MASK)
    return {
        "special chosen": int((chosen & special).sum()),
        "special put in": int((put_in & torch.isin(batch["input_ids"], torch.tensor(sorted(SPECIALS)))).sum()),
        "changed unchosen": int((~chosen & (block >= 0) & (batch["input_ids"] != block)).sum()),
        "wrong label": int((chosen & (batch["labels"] != block)).sum()),
        "filler seen": int((batch["input_ids"] < 0).sum()),
    }


def test_shares_of_a_million_tokens():
    block = blocks(2000, 600)
    batch = mlm_batch(block, **SETTINGS)
    assert (block > 3).sum() > 1_000_000
    assert max(map(abs, z_scores(block, batch).values())) < 3, z_scores(block, batch)
    assert not any(wrong_places(block, batch).values())
    assert {name: value.dtype for name, value in batch.items()} == dict.fromkeys(batch, torch.int64)


def ten_percent_of_all(block, **settings):
    """Mutant: a random token in place of 10 % of all tokens, not of the chosen ones."""
    batch = mlm_batch(block, **settings)
    drawn = np.random.default_rng(1)
    swap = torch.from_numpy(drawn.random(block.shape) < 0.1) & (block > 3) & (batch["input_ids"] != MASK)
    return batch | {"input_ids": torch.where(swap, torch.from_numpy(drawn.integers(4, V - 1, block.shape)), batch["input_ids"])}


def half_of_the_chosen(block, **settings):
    """Mutant: 50 % of the chosen replaced, where it is 50 % of what the mask leaves."""
    return mlm_batch(block, **settings, mask_replace_prob=0.5, random_replace_prob=0.5)


def specials_too(block, **settings):
    """Mutant: special tokens are masked and drawn, as padding would be."""
    return mlm_batch(block, **settings | {"special_ids": frozenset()})


def fillers_too(block, **settings):
    """Mutant: a filler is taken for a token."""
    return mlm_batch(block.where(block >= 0, 9), **settings)


MUTANTS = {
    ten_percent_of_all: "changed unchosen",
    half_of_the_chosen: "replaced",
    specials_too: "special chosen",
    fillers_too: "special chosen",
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant):
    block = blocks(500, 400)
    batch = mutant(block, **SETTINGS)
    found = wrong_places(block, batch) | {name: abs(z) > 5 for name, z in z_scores(block, batch).items()}
    assert found[MUTANTS[mutant]]


def test_other_shares():
    block = torch.full((50, 400), 10)
    for masked, replaced in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        batch = mlm_batch(block, **SETTINGS, mask_replace_prob=masked, random_replace_prob=replaced)
        chosen = batch["labels"] != IGNORE
        input_ids = batch["input_ids"][chosen]
        assert bool((input_ids == MASK).all()) == (masked == 1) and bool((input_ids == 10).all()) == (masked + replaced == 0)
        assert bool(chosen.any()) and not (input_ids[input_ids != MASK] < 4).any()


def test_every_ordinary_token_is_drawn_alike():
    block = torch.full((2000, 600), 10)
    batch = mlm_batch(block, **SETTINGS)
    put_in = batch["input_ids"][(batch["labels"] != IGNORE) & (batch["input_ids"] != MASK) & (batch["input_ids"] != 10)]
    counts = np.delete(np.bincount(put_in.numpy(), minlength=V), [*SPECIALS, 10])
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    freedom = len(counts) - 1
    assert abs(statistic - freedom) < 3 * math.sqrt(2 * freedom)
    assert counts.min() > 0 and put_in.max() == 498


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 7), (3, 3, 6), (11, 1)])
def test_any_split_gives_the_same_rows(sizes):
    block = blocks(12, 31)
    whole = mlm_batch(block, **SETTINGS)

    def joined(first_row):
        parts, start = [], 0
        for size in sizes:
            parts.append(mlm_batch(block[start : start + size], **SETTINGS | {"first_row": first_row(start)}))
            start += size
        return {name: torch.cat([part[name] for part in parts]) for name in whole}

    assert equal(joined(lambda start: start), whole)
    assert not equal(joined(lambda start: 0), whole), "the mutant: rows counted within the micro-batch"


def test_masks_are_a_function_of_seed_and_step():
    block = torch.full((8, 64), 10)
    again = [mlm_batch(block, **SETTINGS), mlm_batch(block.clone(), **SETTINGS)]
    assert equal(*again)
    others = [{"seed": 8}, {"step": 6}, {"first_row": 8}, {"step": data.transforms.masked.VALIDATION_STEP}]
    masks = [mlm_batch(block, **SETTINGS | other)["labels"] != IGNORE for other in [{}, *others]]
    rows = torch.cat(masks).tolist()
    assert len({tuple(row) for row in rows}) == len(rows), "two rows have one mask"


def test_neighbours_are_independent():
    chosen = (mlm_batch(torch.full((2000, 600), 10), **SETTINGS)["labels"] != IGNORE).double()
    for other in (chosen[:, 1:] * chosen[:, :-1], chosen[1:] * chosen[:-1]):
        assert abs(float(other.mean()) - 0.15**2) < 4 * 0.15 / math.sqrt(other.numel())


def test_places_are_those_of_the_text():
    block = blocks(6, 50)
    block[-1] = block[0]
    ahead = clm_batch(torch.cat([block, block[:, :1]], 1), BOS, EOS)
    batch = mlm_batch(block, **SETTINGS | {"mlm_probability": 1.0})
    for name in ("document_ids", "position_ids"):
        assert torch.equal(batch[name], ahead[name])
    assert not equal({"a": batch["input_ids"]}, {"a": ahead["input_ids"]})


def test_one_id_begins_and_ends_documents():
    batch = mlm_batch(torch.tensor([[2, 5, 6, 2, 7, 2]]), **SETTINGS | {"bos_id": 2, "mlm_probability": 1.0})
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 6, -100, 7, -100]]


def test_what_cannot_be_masked():
    block = torch.full((1, 4), 10)
    for rate in (0.0, 1.5):
        with pytest.raises(DataError, match="mlm_probability="):
            mlm_batch(block, **SETTINGS | {"mlm_probability": rate})
    for shares in ({"mask_replace_prob": -0.1}, {"random_replace_prob": -0.1}, {"mask_replace_prob": 0.95}):
        with pytest.raises(DataError, match="shares of the chosen"):
            mlm_batch(block, **SETTINGS, **shares)
    with pytest.raises(DataError, match="all 5 ids are special"):
        non_special_ids(frozenset(range(5)), 5)


def test_unigram_baseline():
    train = np.array([BOS, 7, 7, 7, 8, 8, EOS, BOS, 9, EOS], dtype=np.uint16)
    labels = [torch.tensor([[7, IGNORE], [8, IGNORE]]), torch.tensor([[7, 400]])]
    total = 6 + V - len(SPECIALS)
    nats = -sum(math.log(count / total) for count in (4, 3, 4, 1)) / 4
    found = unigram_baseline(train, labels, SPECIALS, V)
    assert found == UnigramBaseline(0.5, pytest.approx(math.exp(nats), rel=1e-12))
    with pytest.raises(DataError, match="no token is masked"):
        unigram_baseline(train, [torch.full((2, 2), IGNORE)], SPECIALS, V)
