"""Sampled replies against transformers: greedy tokens of mixed lengths by its `generate`, log-probabilities by its forward."""

import pytest
import torch

from model.rollouts import sample_replies
from tests.compare import absolute, count
from tests.oracle.model.test_generate import NEW, endings, pair, prompts, their_new_tokens, upto
from tests.oracle.model.test_network import LIBRARY

FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]
TEMPERATURE = 0.7


@pytest.mark.parametrize("family", FAMILIES)
def test_replies(family, tmp_path, parity):
    """Rows that end at different steps, and at most NEW tokens: greedy ids, and log-probabilities of sampled ones."""
    network, theirs = pair(family, tmp_path)
    ids, mask = prompts(network.config)
    given = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    uniforms_NT = torch.rand(len(given), NEW, dtype=torch.float64)
    free = their_new_tokens(theirs, ids, mask, None)
    stops = endings(free, 2)
    options = {"uniforms_NT": uniforms_NT, "stop_ids": stops, "context": network.config.context}
    greedy = sample_replies(network, given, temperature=0, **options)
    expected = upto(their_new_tokens(theirs, ids, mask, stops), stops)
    assert len({len(row) for row in expected}) > 1
    different = sum(reply.ids != row for reply, row in zip(greedy, expected, strict=True))
    different += sum(reply.has_ended != (row[-1] in stops) for reply, row in zip(greedy, expected, strict=True))
    parity(f"rollouts, greedy: {family}", LIBRARY, count(different), 0, "tokens are equal or not: count of different rows")

    errors = []
    for prompt, reply in zip(given, sample_replies(network, given, temperature=TEMPERATURE, **options), strict=True):
        with torch.no_grad():
            logits_TV = theirs(torch.tensor([prompt + reply.ids])).logits[0, len(prompt) - 1 : -1]
        log_p_TV = (logits_TV / TEMPERATURE).log_softmax(-1)
        own_T = log_p_TV.gather(-1, torch.tensor(reply.ids)[:, None])[:, 0]
        errors.append(absolute(torch.tensor(reply.log_probs, dtype=torch.float64), own_T))
    parity(f"rollouts, log-probabilities: {family}", LIBRARY, max(errors), 1e-10, "float64 rounding; cached and left-padded")
