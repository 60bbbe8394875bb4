"""Longest common subsequences of many pairs against the whole table and rouge-score's way back through it."""

import random
from functools import cache
from importlib.metadata import version

import pytest
import torch
from rouge_score.rouge_scorer import lcs_ind

from eval import lcs
from eval.lcs import lcs_lengths, lcs_members, lcs_reference, lcs_union, weighted_lcs, weighted_lcs_reference
from eval.ngram import Ragged, number_tokens
from tests.compare import count

# Budget of a batch, and the size from which a pair goes alone: all in few batches, in many, some alone, all alone.
PATHS = {"batches": (1 << 22, 1 << 30), "small batches": (2000, 1 << 30), "both": (4000, 300), "alone": (1 << 22, 0)}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    budget, alone = PATHS[request.param]
    monkeypatch.setattr(lcs, "BUDGET", budget)
    monkeypatch.setattr(lcs, "LARGEST", alone)
    return request.param


def made_up(count: int = 24, seed: int = 0) -> tuple[list, list]:
    """From no token to three words of bits, and around the length of a word; of few and of many kinds, the same, moved, cut."""
    draw, hypotheses, references = random.Random(seed), [], []
    for longest, vocabulary in ((8, 2), (40, 8), (70, 3), (150, 60)):
        for _ in range(count // 4):
            reference = [draw.randrange(vocabulary) for _ in range(draw.randint(0, longest))]
            hypothesis = [token if draw.random() < 0.7 else draw.randrange(vocabulary) for token in reference]
            half = draw.randint(0, len(hypothesis))
            hypotheses.append(draw.choice([hypothesis[half:] + hypothesis[:half], hypothesis[half:], hypothesis]))
            references.append(reference)
    for length in (61, 62, 63, 124, 125):  # the last bit of a word, and the first of the next
        tokens = list(range(length))
        hypotheses += [tokens, tokens[1:], tokens[::-1], [0] * length, [*tokens[length // 2 :], -1, *tokens]]
        references += [tokens, tokens[:-1], tokens, [0] * (length - 1), tokens]
    return hypotheses, references


@cache  # for all ways of running
def tables(seed: int, weight: float | None = None) -> list:
    pairs = zip(*made_up(seed=seed), strict=True)
    return [lcs_reference(*pair) if weight is None else weighted_lcs_reference(*pair, weight) for pair in pairs]


def by_reference(members_N: torch.Tensor, references: list[list]) -> list[list[int]]:
    return [part.nonzero().flatten().tolist() for part in members_N.split([len(tokens) for tokens in references])]


def test_lengths_and_members_equal_the_table(path):
    hypotheses, references = made_up()
    sides, expected = number_tokens(hypotheses, references), tables(0)
    assert lcs_lengths(*sides).tolist() == [len(members) for members in expected]
    assert by_reference(lcs_members(*sides), references) == expected


def test_members_are_those_that_rouge_score_reads(parity):
    hypotheses, references = made_up(60, seed=1)
    found = by_reference(lcs_members(*number_tokens(hypotheses, references)), references)
    expected = [lcs_ind(reference, hypothesis) for hypothesis, reference in zip(hypotheses, references, strict=True)]
    unlike = sum(ours != theirs for ours, theirs in zip(found, expected, strict=True))
    parity("ROUGE: members of subsequences", f"rouge-score {version('rouge_score')}", count(unlike), 0, "integers")


@pytest.mark.parametrize("weight", [1.2, 2.0])
def test_weighted_equals_the_table(path, weight):
    # The same sums in the same order.
    assert weighted_lcs(*number_tokens(*made_up(seed=2)), weight).tolist() == tables(2, weight)


def test_union_of_several_pairs(path):
    hypotheses, references = made_up(12, seed=3)
    draw = random.Random(0)
    pairs = [(draw.randrange(len(hypotheses)), draw.randrange(len(references))) for _ in range(60)]
    found = lcs_union(*number_tokens(hypotheses, references), *torch.tensor(pairs).T)
    expected = [set() for _ in references]
    for hypothesis, reference in pairs:
        expected[reference].update(lcs_reference(hypotheses[hypothesis], references[reference]))
    assert by_reference(found, references) == [sorted(members) for members in expected]


def test_a_side_that_is_empty_or_not_there(path):
    sides = number_tokens([[], [1], None, [1, 2], []], [[1], [], [2], None, []])
    assert lcs_lengths(*sides).tolist() == [0] * 5
    assert lcs_members(*sides).tolist() == [False] * 2
    assert weighted_lcs(*sides, 1.2).tolist() == [0.0] * 5
    nothing = Ragged(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert [len(found) for found in (lcs_lengths(nothing, nothing), lcs_members(nothing, nothing))] == [0, 0]
    assert len(weighted_lcs(nothing, nothing, 2.0)) == 0


@pytest.mark.parametrize("size", [lcs._vector_size, lcs._history_size, lcs._diagonal_size])
def test_batches_hold_every_pair_once_within_the_budget(size):
    generator = torch.Generator().manual_seed(0)
    length_P, other_P = (torch.rand(2, 10000, generator=generator, dtype=torch.float64) ** 8 * 8000).long()
    batches, alone = lcs._make_batches(length_P, other_P, size)
    assert sorted(torch.cat(batches).tolist() + alone) == torch.nonzero((length_P > 0) & (other_P > 0)).flatten().tolist()
    assert alone and all(size(int(length_P[place]), int(other_P[place])) > lcs.LARGEST for place in alone)
    padded = [len(batch) * size(int(length_P[batch].amax()), int(other_P[batch].amax())) for batch in batches]
    own = sum(int(size(length_P[batch], other_P[batch]).sum()) for batch in batches)
    assert max(padded) <= lcs.BUDGET and sum(padded) < 2 * own  # no long text pads the short ones
