"""The 2017 Transformer against torch.nn.Transformer, whose weights are copied: float64, whole tensors, gradients."""

import math

import pytest
import torch
from torch import nn

import model.hub
from model.init import build_network
from model.position import sinusoid
from tests.compare import mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import ROUNDING

TORCH = f"torch {torch.__version__} nn.Transformer"


def library(network) -> nn.Transformer:
    """torch's stacks with our weights. Its own default ends each stack with one more norm, which the paper has not."""
    c = network.config
    settings = {"dropout": 0.0, "activation": "relu", "batch_first": True, "layer_norm_eps": c.norm_eps, "dtype": torch.float64}
    encoder_layer = nn.TransformerEncoderLayer(c.width, c.heads, c.mlp_width, **settings)
    decoder_layer = nn.TransformerDecoderLayer(c.width, c.heads, c.mlp_width, **settings)
    theirs = nn.Transformer(
        c.width,
        c.heads,
        custom_encoder=nn.TransformerEncoder(encoder_layer, c.depth, enable_nested_tensor=False),
        custom_decoder=nn.TransformerDecoder(decoder_layer, c.decoder_depth),
        batch_first=True,
    )
    for stack, other in ((network.body.encoder, theirs.encoder), (network.body.decoder, theirs.decoder)):
        for block, layer in zip(stack.blocks, other.layers, strict=True):
            copy_attention(block.attention, layer.self_attn)
            norms = [block.attention_norm, block.mlp_norm]
            if hasattr(block, "cross"):
                copy_attention(block.cross, layer.multihead_attn)
                norms.insert(1, block.cross_norm)
            for index, norm in enumerate(norms):
                getattr(layer, f"norm{index + 1}").load_state_dict(norm.state_dict())
            layer.linear1.load_state_dict(block.mlp.up.state_dict())
            layer.linear2.load_state_dict(block.mlp.down.state_dict())
    return theirs


def parts(attention) -> tuple[nn.Linear, ...]:
    return attention.project.query, attention.project.key, attention.project.value


@torch.no_grad()
def copy_attention(ours, theirs: nn.MultiheadAttention) -> None:
    theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts(ours)]))
    theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts(ours)]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())


def positions_by_the_paper(length: int, width: int) -> torch.Tensor:
    table = torch.zeros(length, width, dtype=torch.float64)
    for p in range(length):
        for i in range(width // 2):
            table[p, 2 * i] = math.sin(p / 10000 ** (2 * i / width))
            table[p, 2 * i + 1] = math.cos(p / 10000 ** (2 * i / width))
    return table


def test_sinusoids_by_the_paper():
    assert torch.allclose(sinusoid(torch.arange(30), 24), positions_by_the_paper(30, 24), rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_logits_states_and_gradients(padded, parity):
    network = randomized(tiny_config("vaswani"))
    theirs, table = library(network), network.body.embedding.weight.detach().clone().requires_grad_()
    source, target = torch.randint(3, 61, (3, 13)), torch.randint(3, 61, (3, 9))
    source_mask, target_mask = torch.ones(3, 13, dtype=torch.long), torch.ones(3, 9, dtype=torch.long)
    if padded:
        source_mask[0, 8:], source_mask[2, 4:], target_mask[1, 5:] = 0, 0, 0
    masks = (source_mask, target_mask) if padded else (None, None)
    ours = network(source, masks[0], decoder_input_ids=target, decoder_attention_mask=masks[1], hidden_states=True)

    def embedded(ids):
        return math.sqrt(24) * table[ids] + positions_by_the_paper(ids.size(1), 24)

    memory = theirs.encoder(embedded(source), src_key_padding_mask=source_mask == 0)
    hidden = theirs.decoder(
        embedded(target),
        memory,
        tgt_mask=torch.ones(9, 9, dtype=torch.bool).triu(1),
        tgt_key_padding_mask=target_mask == 0,
        memory_key_padding_mask=source_mask == 0,
    )
    logits, real, real_source = hidden @ table.T, target_mask.bool(), source_mask.bool()
    pairs = [(ours.logits, logits, real), (ours.hidden, hidden, real), (ours.encoder_hidden, memory, real_source)]
    errors = [mixed(a[which], b[which]) for a, b, which in pairs]
    parity(f"vaswani: logits, states{', padded' * padded}", TORCH, max(errors), *ROUNDING)

    direction = torch.randn_like(logits) * real[..., None]
    (ours.logits * direction).sum().backward()
    (logits * direction).sum().backward()
    compared = [(network.body.embedding.weight.grad, table.grad)]
    for stack, other in ((network.body.encoder, theirs.encoder), (network.body.decoder, theirs.decoder)):
        for block, layer in zip(stack.blocks, other.layers, strict=True):
            compared += gradients(block.attention, layer.self_attn)
            norms = ["attention_norm", "mlp_norm"]
            if hasattr(block, "cross"):
                compared += gradients(block.cross, layer.multihead_attn)
                norms.insert(1, "cross_norm")
            mine = [getattr(block, name) for name in norms] + [block.mlp.up, block.mlp.down]
            yours = [getattr(layer, f"norm{i + 1}") for i in range(len(norms))] + [layer.linear1, layer.linear2]
            for one, two in zip(mine, yours, strict=True):
                compared += [(one.weight.grad, two.weight.grad), (one.bias.grad, two.bias.grad)]
    assert len(compared) == len(list(theirs.parameters())) + 1
    error = max(mixed(a, b) for a, b in compared)
    parity(f"vaswani: gradients{', padded' * padded}", TORCH, error, *ROUNDING)


def gradients(ours, theirs: nn.MultiheadAttention) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.cat([part.weight.grad for part in parts(ours)]), theirs.in_proj_weight.grad),
        (torch.cat([part.bias.grad for part in parts(ours)]), theirs.in_proj_bias.grad),
        (ours.out.weight.grad, theirs.out_proj.weight.grad),
        (ours.out.bias.grad, theirs.out_proj.bias.grad),
    ]


def test_folder_round_trip_and_first_weights(tmp_path):
    network = build_network(tiny_config("vaswani", width=64, mlp_width=256), seed=3)
    model.hub.save(network, tmp_path)
    loaded = model.hub.load(tmp_path)
    assert loaded.config == network.config and loaded.head.weight is loaded.body.embedding.weight
    named = dict(loaded.named_parameters())
    assert all(torch.equal(parameter, named[name]) for name, parameter in network.named_parameters())
    assert network.body.embedding.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)  # times √D: of size one
    up = network.body.encoder.blocks[0].mlp.up.weight
    assert up.std().item() == pytest.approx(math.sqrt(2 / (64 + 256)), rel=0.05)
