"""What holds for encoders and encoder-decoders whatever their weights; each with a mutant that is caught."""

import pytest
import torch

import model.hub
import model.mask
from data.example import Example
from data.packing.collate import pack_batch
from data.transforms.causal import clm_batch
from model.cache import Cache
from model.config import ConfigError
from model.fill import fill
from tests.conftest import randomized, tiny_config

ENCODERS = ["bert", "roberta"]
PAIRS = ["t5", "t5-gated", "bart", "vaswani"]
BOS = 1


@pytest.mark.parametrize("family", ENCODERS)
def test_every_position_sees_every_other(family):
    network = randomized(tiny_config(family))
    ids = torch.randint(3, 61, (1, 9))
    before = network(ids).logits
    for changed in range(9):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] - 3 + 1) % 58 + 3
        assert ((network(other).logits - before)[0].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("family", ENCODERS)
def test_pads_change_nothing(family, attention):
    """On the right, as usual, and on the left: positions are counted by the mask."""
    network = randomized(tiny_config(family), attention=attention)
    ids, pads = torch.randint(3, 61, (1, 9)), torch.randint(3, 61, (1, 5))
    alone, real, pad = network(ids).logits, torch.ones(1, 9, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long)
    right = network(torch.cat((ids, pads), 1), torch.cat((real, pad), 1)).logits[:, :9]
    left = network(torch.cat((pads, ids), 1), torch.cat((pad, real), 1)).logits[:, 5:]
    assert (right - alone).abs().max() < 1e-12 and (left - alone).abs().max() < 1e-12
    mutant = network(torch.cat((ids, pads), 1)).logits[:, :9]  # without the mask
    assert (mutant - alone).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("family", ENCODERS)
def test_packed_documents_are_as_if_separate(family, attention):
    network = randomized(tiny_config(family), attention=attention)
    first, second = [BOS, *torch.randint(3, 61, (8,)).tolist()], [BOS, *torch.randint(3, 61, (6,)).tolist()]
    batch = clm_batch(torch.tensor([[*first, *second, BOS]]), BOS)
    places = {name: batch[name] for name in ("document_ids", "position_ids")}
    packed = network(batch["input_ids"], **places).logits[0]
    alone = torch.cat([network(torch.tensor([document])).logits[0] for document in (first, second)])
    assert (packed - alone).abs().max() < 1e-12
    assert (network(batch["input_ids"]).logits[0] - alone).abs().max() > 1e-3  # the mutant without document_ids


def test_segments_count_and_other_families_refuse_them():
    network, ids = randomized(tiny_config("bert")), torch.randint(3, 61, (1, 9))
    kinds = torch.tensor([[0] * 5 + [1] * 4])
    assert (network(ids, token_type_ids=kinds).logits - network(ids).logits).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="gpt2 of this config has no token types"):
        randomized(tiny_config("gpt2"))(ids, token_type_ids=kinds)


def test_roberta_counts_from_row_two():
    network = randomized(tiny_config("roberta"))
    table = network.body.position.weight
    assert table.size(0) == 32 + 2
    assert torch.equal(network.body.position(torch.tensor([[0, 1]]))[0], table[2:4])


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("family", PAIRS)
def test_the_output_is_causal_and_sees_the_whole_input(family, attention):
    network = randomized(tiny_config(family), attention=attention)
    source, target = torch.randint(3, 61, (1, 9)), torch.randint(3, 61, (1, 7))
    before = network(source, decoder_input_ids=target).logits
    later = target.clone()
    later[0, 4:] = (target[0, 4:] - 2) % 58 + 3
    after = network(source, decoder_input_ids=later).logits
    assert torch.equal(after[0, :4], before[0, :4]) and (after[0, 4:] - before[0, 4:]).abs().max() > 1e-6
    for changed in range(9):
        other = source.clone()
        other[0, changed] = (source[0, changed] - 2) % 58 + 3
        assert ((network(other, decoder_input_ids=target).logits - before)[0].abs().amax(-1) > 1e-7).all()


@pytest.mark.parametrize("family", PAIRS)
def test_pads_of_the_input_change_nothing(family):
    network = randomized(tiny_config(family))
    source, target, pads = torch.randint(3, 61, (1, 9)), torch.randint(3, 61, (1, 7)), torch.randint(3, 61, (1, 4))
    mask = torch.tensor([[1] * 9 + [0] * 4])
    alone = network(source, decoder_input_ids=target).logits
    padded = network(torch.cat((source, pads), 1), mask, decoder_input_ids=target).logits
    assert (padded - alone).abs().max() < 1e-12
    encoded = network.body.encode(torch.cat((source, pads), 1), mask).hidden
    mutant = network(None, None, decoder_input_ids=target, encoder_hidden=encoded).logits  # cross-attention without the mask
    assert (mutant - alone).abs().max() > 1e-4


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 5], [12]], ids=["tokens", "pieces", "whole"])
@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("family", PAIRS)
def test_cached_logits_equal_uncached(family, attention, pieces):
    network = randomized(tiny_config(family), attention=attention)
    source, target = torch.randint(3, 61, (2, 9)), torch.randint(3, 61, (2, 12))
    whole = network(source, decoder_input_ids=target).logits
    encoded, cache = network.body.encode(source).hidden, Cache(network.config, 2, 12, torch.float64)
    parts = [
        network(None, decoder_input_ids=part, encoder_hidden=encoded, cache=cache).logits
        for part in target.split(pieces, dim=1)
    ]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10
    assert cache.cross[0].keys_and_values[0].shape == (2, 4, 9, network.config.head_width)  # computed once, kept


def test_without_an_output_the_input_is_read_again():
    network = randomized(tiny_config("bart"))
    source = torch.randint(3, 61, (2, 9))
    shifted = torch.cat((torch.full((2, 1), network.config.decoder_start_id), source[:, :-1]), 1)
    assert torch.equal(network(source).logits, network(source, decoder_input_ids=shifted).logits)
    with pytest.raises(ConfigError, match="no decoder_start_id: give decoder_input_ids"):
        randomized(tiny_config("bart", decoder_start_id=None))(source)


@pytest.mark.parametrize("family", ["t5", "bart", "vaswani"])
def test_packed_rows_of_an_encoder_decoder(family):
    """Two pairs in a row, and what fills it up: each output is what it is alone. The mutant: one document."""
    network, lengths = randomized(tiny_config(family)), ((5, 4), (7, 9))
    sources, targets = ([torch.randint(3, 61, (n,)) for n in each] for each in zip(*lengths, strict=True))
    packs = [[[Example(t.numpy(), t.numpy(), s.numpy())] for s, t in zip(sources, targets, strict=True)]]
    batch = pack_batch(packs, pad_id=0, max_lengths=(16, 14))
    del batch["labels"]
    alone = [network.body(s[None], decoder_input_ids=t[None]).hidden[0] for s, t in zip(sources, targets, strict=True)]
    packed = network.body(**batch).hidden[0]
    assert (packed[:13] - torch.cat(alone)).abs().max() < 1e-12
    batch["document_ids"][:, :12] = batch["decoder_document_ids"][:, :13] = 0
    assert (network.body(**batch).hidden[0][:13] - torch.cat(alone)).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="both document_ids and decoder_document_ids"):
        network.body(**{key: value for key, value in batch.items() if key != "decoder_document_ids"})
    with pytest.raises(ConfigError, match="need decoder_input_ids"):
        network.body(batch["input_ids"], document_ids=batch["document_ids"])


@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_t5_in_float16_stays_finite(family, tmp_path):
    """Its feed-forward leaves values above 65,504, the largest of float16: that matrix and the sum it joins are float32."""
    network = randomized(tiny_config(family), dtype=torch.float32)
    with torch.no_grad():
        for stack in (network.body.encoder, network.body.decoder):
            stack.blocks[0].mlp.down.weight.mul_(1e5)
    model.hub.save(network, tmp_path)
    half, ids = model.hub.load(tmp_path, dtype=torch.float16), torch.randint(3, 61, (2, 9))
    assert half.body.encoder.blocks[0].mlp.down.weight.dtype == torch.float32
    assert half.body.encoder.blocks[0].mlp.up.weight.dtype == torch.float16
    ours, wide = half(ids, decoder_input_ids=ids).logits.float(), network(ids, decoder_input_ids=ids).logits
    assert ours.isfinite().all() and (ours - wide).abs().max() < 0.02 * wide.abs().max()
    mutant = network.half()
    assert not mutant(ids, decoder_input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("family", [*ENCODERS, *PAIRS])
def test_rows_of_pads_are_finite(family):
    network = randomized(tiny_config(family))
    mask = torch.tensor([[0] * 8, [1] * 5 + [0] * 3])
    logits = network(torch.randint(3, 61, (2, 8)), mask).logits
    logits.sum().backward()
    gradients = [p.grad for p in network.parameters() if p.requires_grad]
    assert logits.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_mutant_that_masks_the_encoder_causally_is_caught(monkeypatch):
    monkeypatch.setattr(model.mask.Mask, "attention_inputs", lambda *_: model.mask.AttentionInputs(is_causal=True))
    with pytest.raises(AssertionError):
        test_every_position_sees_every_other("bert")


def test_the_first_real_token_speaks_whichever_side_is_padded():
    network = randomized(tiny_config("bert", head="sequence"))
    ids, pads = torch.randint(3, 61, (1, 9)), torch.randint(3, 61, (1, 5))
    real, pad = torch.ones(1, 9, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long)
    left = network(torch.cat((pads, ids), 1), torch.cat((pad, real), 1)).logits
    assert (left - network(ids).logits).abs().max() < 1e-12


@pytest.mark.parametrize(("family", "changes"), [("bart", {"attention_dropout": 0.5}), ("bert", {"dropout": 0.5})])
def test_dropout_of_cross_attention_and_of_the_pooled_head(family, changes):
    network, x = randomized(tiny_config(family, head="sequence", **changes)), torch.randn(2, 5, 24, dtype=torch.float64)
    if family == "bart":
        part, inputs = network.body.decoder.blocks[0].cross, (x, x, model.mask.AttentionInputs())
    else:
        part, inputs = network.head, (x,)
    assert torch.equal(part(*inputs), part(*inputs))
    part.train()
    assert not torch.equal(part(*inputs), part(*inputs))


def test_fill_gives_the_mode_back():
    network = randomized(tiny_config("bert")).train()
    fill(network, torch.tensor([[1, 5, 7, 2]]), 5)
    assert network.training
