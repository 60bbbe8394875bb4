"""What a decoder sees of an encoder: the real positions of its own document, and virtual tokens always."""

import pytest
import torch

from model.config import ConfigError
from model.stack import EncoderOutput
from tests.compare import absolute
from tests.conftest import randomized, tiny_config


def allowed(output: EncoderOutput, queries: int, documents: torch.Tensor | None = None) -> torch.Tensor:
    """Bool B T S."""
    rows, keys = output.hidden_BSD.shape[:2]
    inputs = output.attention_inputs(queries, documents)
    assert inputs.bias_1HTS is None and not inputs.is_causal
    found = torch.ones(1, 1, 1, 1, dtype=torch.bool) if inputs.allowed_B1TS is None else inputs.allowed_B1TS
    return found.expand(rows, 1, queries, keys)[:, 0]


def test_the_mask_by_hand():
    hidden = torch.zeros(2, 5, 4)
    assert allowed(EncoderOutput(hidden), 3).all()
    padding = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    seen = allowed(EncoderOutput(hidden, padding), 3)
    assert torch.equal(seen, padding.bool()[:, None].expand(2, 3, 5))
    source, target = torch.tensor([[0, 0, 1, 1, 1]] * 2), torch.tensor([[0, 1, 1]] * 2)
    seen = allowed(EncoderOutput(hidden, None, source), 3, target)
    assert torch.equal(seen, target[:, :, None] == source[:, None])
    later = allowed(EncoderOutput(hidden, None, source), 1, target)
    assert torch.equal(later, seen[:, -1:]), "the queries are the last positions"
    before = allowed(EncoderOutput(hidden, None, source, prompt_length=2), 3, target)
    assert before[..., :2].all()
    with pytest.raises(ConfigError, match="need both document_ids and decoder_document_ids"):
        EncoderOutput(hidden, None, source).attention_inputs(3, None)


def test_a_network_hands_it_to_its_decoder():
    network = randomized(tiny_config("bart"))
    ids, target = torch.randint(3, 60, (2, 7)), torch.randint(3, 60, (2, 4))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    hidden = network.body.encode(ids, mask).hidden
    decoded = network.body.decoder(target, encoder_output=EncoderOutput(hidden, mask)).hidden
    whole = network.body(ids, mask, decoder_input_ids=target).hidden
    assert torch.equal(decoded, whole)
    assert absolute(network.body.decoder(target, encoder_output=EncoderOutput(hidden)).hidden[1], whole[1]) > 1e-6, "the mutant"
