"""Texts longer than the network's context: each row's window slides as it would if the row were alone."""

import pytest
import torch
from torch import nn

from model.beam import beam_search
from model.generate import generate
from tests.conftest import randomized, tiny_config

CONTEXT = 32  # of tiny networks
LENGTHS = (3, 40, 9, 30)  # one prompt is longer than the context
NEW = 40


def padded(rows: list[torch.Tensor], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 50), torch.zeros(len(rows), longest, dtype=torch.long)
    for n, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(len(row))
        ids[n, where], mask[n, where] = row, 1
    return ids, mask


def apart(network: nn.Module, rows: list[torch.Tensor], continued) -> int:
    """Count the rows that go on otherwise in a batch than alone."""
    ids, mask = padded(rows, left=network.config.architecture == "decoder")
    together = continued(ids, mask)
    return sum(not torch.equal(continued(row[None], None)[0], one) for row, one in zip(rows, together, strict=True))


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "read afresh"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "bart", "t5"])  # learned, rotary, in windows; relative
def test_padded_rows_are_those_alone(family, use_cache):
    network = randomized(tiny_config(family))
    rows = [torch.randint(3, 61, (min(length, CONTEXT) if family == "bart" else length,)) for length in LENGTHS]

    def greedy(ids, mask):
        return generate(network, ids, attention_mask=mask, max_new_tokens=NEW, temperature=0, use_cache=use_cache)

    def penalized(ids, mask):
        options = {"max_new_tokens": NEW, "temperature": 0, "repetition_penalty": 1.5, "use_cache": use_cache}
        return generate(network, ids, attention_mask=mask, **options)

    def beams(ids, mask):
        options = {"beams": 3, "max_new_tokens": NEW, "use_cache": use_cache}
        return beam_search(network, ids, attention_mask=mask, **options).tokens[:, 0]

    for continued in (greedy, penalized, beams):
        assert not apart(network, rows, continued), continued.__name__


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_generation_slides_past_the_context(family):
    """More tokens than the context holds: each window's tokens are those of reading that window afresh."""
    network = randomized(tiny_config(family))
    prompt = torch.randint(3, 61, (2, 5))
    encoded = family == "bart"
    begin = torch.full((2, 1), network.config.decoder_start_id) if encoded else prompt

    def read(window: torch.Tensor) -> torch.Tensor:
        return (network(prompt, decoder_input_ids=window) if encoded else network(window)).logits[:, -1].argmax(-1, True)

    for use_cache in (True, False):
        new = generate(network, prompt, max_new_tokens=70, temperature=0, use_cache=use_cache)
        window = expected = begin
        for _ in range(70):
            if window.size(1) > CONTEXT:
                window = window[:, -CONTEXT // 2 :]
            token = read(window)
            window, expected = torch.cat((window, token), 1), torch.cat((expected, token), 1)
        assert torch.equal(new, expected[:, begin.size(1) :])


def test_a_prompt_longer_than_the_context_counts_by_its_end():
    network, long = randomized(tiny_config("gpt2")), torch.randint(3, 61, (2, 40))
    again = generate(network, long, max_new_tokens=1, temperature=0)
    assert torch.equal(again, generate(network, long[:, -CONTEXT:], max_new_tokens=1, temperature=0))
