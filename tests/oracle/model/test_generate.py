"""Generated tokens against transformers' `generate`: float64 networks, twenty prompts each, padded."""

import pytest
import torch
import transformers
from torch import nn

from model.beam import beam_search
from model.config import ModelConfig
from model.generate import generate
from tests.compare import absolute, count
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import LIBRARY, published
from tests.oracle.wide import Wide, widen

FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "t5", "t5-gated", "bart"]
PROMPTS, LONGEST, NEW = 20, 20, 24


def pair(family: str, folder) -> tuple[nn.Module, nn.Module]:
    """Our network and theirs with the same weights; whatever else a family's own generate would do is switched off."""
    # transformers' cache for T5 has as many layers as the encoder
    changes = {"decoder_depth": 2} if family == "t5" else {}
    network = lively(randomized(tiny_config(family, context=64, **changes)))
    theirs = widen(published(network, folder))
    start = network.config.decoder_start_id
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0, decoder_start_token_id=start)
    return network, theirs


def lively(network: nn.Module) -> nn.Module:
    """Attention and positions made to matter more: small random networks else say one word again and again."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 2 and any(part in name for part in (".attention.", ".cross.", "position", "relative")):
                parameter.mul_(3)
    return network


def prompts(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask; a decoder's are padded on the left, an encoder's on the right."""
    ids, mask = torch.zeros(PROMPTS, LONGEST, dtype=torch.long), torch.zeros(PROMPTS, LONGEST, dtype=torch.long)
    for row, length in enumerate(torch.randint(1, LONGEST, (PROMPTS,)).tolist()):
        where = slice(LONGEST - length, None) if config.architecture == "decoder" else slice(length)
        ids[row, where], mask[row, where] = torch.randint(3, 61, (length,)), 1
    return ids, mask


def their_new_tokens(theirs: nn.Module, ids: torch.Tensor, mask: torch.Tensor, eos, **options) -> torch.Tensor:
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": eos} | options
    tokens = theirs.generate(ids, attention_mask=mask, **options)
    return tokens[:, 1 if theirs.config.is_encoder_decoder else ids.size(1) :]


def upto(tokens: torch.Tensor, stops: list[int]) -> list[list[int]]:
    """Each row up to its end: what stands behind it is filling."""
    rows = []
    for row in tokens.tolist():
        ends = [place for place, token in enumerate(row) if token in stops]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


def endings(tokens: torch.Tensor, count: int = 1) -> list[int]:
    """The ids that, as ends, make rows end at the most different steps."""

    def lengths(token: int) -> int:
        return len({len(row) for row in upto(tokens, [token])})

    return sorted(range(61), key=lengths, reverse=True)[:count]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family, tmp_path, parity):
    network, theirs = pair(family, tmp_path)
    ids, mask = prompts(network.config)
    free = generate(network, ids, attention_mask=mask, max_new_tokens=NEW, temperature=0)
    different = (free != their_new_tokens(theirs, ids, mask, None)).sum()
    for stops in (endings(free), endings(free, 3)):
        ours = generate(network, ids, attention_mask=mask, max_new_tokens=NEW, temperature=0, stop_ids=stops)
        expected = upto(their_new_tokens(theirs, ids, mask, stops), stops)
        assert len({len(row) for row in expected}) > 1
        different += sum(a != b for a, b in zip(upto(ours, stops), expected, strict=True))
    options = {"attention_mask": mask, "max_new_tokens": NEW, "temperature": 0}
    penalized = generate(network, ids, repetition_penalty=1.7, **options)
    different += (penalized != their_new_tokens(theirs, ids, mask, None, repetition_penalty=1.7)).sum()
    assert not torch.equal(penalized, free)
    parity(f"greedy tokens: {family}", LIBRARY, count(different), 0, "tokens are equal or not: count of different ones")
    for row in range(0, PROMPTS, 4):  # and padding changes nothing
        alone = generate(network, ids[row, mask[row].bool()][None], max_new_tokens=NEW, temperature=0)
        assert torch.equal(alone[0], free[row])


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_tokens_and_scores(family, tmp_path, parity):
    """2 and 4 beams, penalties that favour short and long texts, both ends of the search, with and without an eos."""
    network, theirs = pair(family, tmp_path)
    ids, mask = prompts(network.config)
    free = generate(network, ids, attention_mask=mask, max_new_tokens=NEW, temperature=0)
    different, errors, lengths = 0, [], set()
    cases = [(4, *case) for case in CASES] + [(2, *case) for case in CASES[1::2]]
    for beams, penalty, early, ends in cases:
        stops = endings(free, ends)
        settings = {"length_penalty": penalty, "early_stopping": early}
        ours = beam_search(
            network, ids, attention_mask=mask, beams=beams, max_new_tokens=NEW, stop_ids=stops, num_return=2, **settings
        )
        options = {"num_beams": beams, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
        options |= {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": stops or None}
        with Wide():  # it adds up log probabilities in float32
            expected = theirs.generate(ids, attention_mask=mask, **options, **settings)
        first = 1 if theirs.config.is_encoder_decoder else ids.size(1)
        rows = upto(expected.sequences[:, first:], stops)
        different += sum(a != b for a, b in zip(upto(ours.tokens.flatten(0, 1), stops), rows, strict=True))
        errors.append(absolute(ours.scores.flatten(), expected.sequences_scores))
        lengths |= {len(row) for row in rows}
    assert len(lengths) > 3
    parity(f"beam tokens: {family}", LIBRARY, count(different), 0, "tokens are equal or not: count of different rows")
    parity(f"beam scores: {family}", LIBRARY, max(errors), 1e-6, "ours are given in float32")


CASES = [
    (0.6, False, 1),
    (1.0, False, 1),
    (2.0, False, 1),
    (1.0, True, 1),
    (2.0, True, 3),
    (1.0, False, 3),
    (1.0, False, 0),
]  # length penalty, early stopping, how many ids stop
