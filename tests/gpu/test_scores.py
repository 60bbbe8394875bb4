"""Counting and common subsequences on a card are those of the CPU; so is perplexity."""

import pytest
import torch

from eval.lcs import lcs_lengths, lcs_members, weighted_lcs
from eval.ngram import Ragged, clipped_matches, clipped_matches_each, number_tokens
from eval.perplexity import perplexity_score
from tests.conftest import randomized, tiny_config
from tests.pairs import word_pairs

pytestmark = pytest.mark.gpu


def on_card(side: Ragged) -> Ragged:
    return Ragged(*(tensor.cuda() for tensor in side))


def test_counts_and_subsequences():
    sides = [[text.split() for text in texts] for texts in word_pairs(300, longest=150)]
    hypotheses, references = number_tokens(*sides)
    there = on_card(hypotheses), on_card(references)
    assert torch.equal(clipped_matches(there[0], [there[1]], 4).cpu(), clipped_matches(hypotheses, [references], 4))
    assert torch.equal(clipped_matches_each(there[0], [there[1]], 2).cpu(), clipped_matches_each(hypotheses, [references], 2))
    assert torch.equal(lcs_lengths(*there).cpu(), lcs_lengths(hypotheses, references))
    assert torch.equal(lcs_members(*there).cpu(), lcs_members(hypotheses, references))
    assert torch.allclose(weighted_lcs(*there, 1.2).cpu(), weighted_lcs(hypotheses, references, 1.2), rtol=1e-12, atol=0)


def test_perplexity():
    network = randomized(tiny_config("llama"))
    documents = [[*range(3, 60)], [7, 8, 9]]
    here = perplexity_score(network, documents, context=16, stride=8)
    assert perplexity_score(network.cuda(), documents, context=16, stride=8).value == pytest.approx(here.value, rel=1e-9)
