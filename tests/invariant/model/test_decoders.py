"""What holds for every decoder whatever its weights: causality, packing, caching, padding; each with a mutant."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import model.mask
from data.transforms.causal import clm_batch
from model.cache import Cache
from model.config import ConfigError, ModelConfig
from model.init import build_network
from tests.conftest import randomized, tiny_config

FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]
VARIANTS = [(family, attention) for family in FAMILIES for attention in ("sdpa", "reference")]


def future_leaks(network: nn.Module) -> bool:
    """Does any logit change when a later token does, or any gradient reach a later embedding?"""
    ids = torch.randint(0, 61, (1, 12))
    before = network(ids).logits
    for t in range(11):
        changed = ids.clone()
        changed[0, t + 1 :] = torch.randint(0, 61, (11 - t,))
        if not torch.equal(network(changed).logits[0, : t + 1], before[0, : t + 1]):
            return True
    return False


@pytest.mark.parametrize(("family", "attention"), VARIANTS)
def test_no_logit_sees_the_future(family, attention):
    assert not future_leaks(randomized(tiny_config(family), attention=attention))


@pytest.mark.parametrize(("family", "attention"), VARIANTS)
def test_mutant_without_the_mask_is_caught(family, attention, monkeypatch):
    monkeypatch.setattr(model.mask.Mask, "attention_inputs", lambda *_: model.mask.AttentionInputs())
    assert future_leaks(randomized(tiny_config(family), attention=attention))


def test_mutant_that_sees_one_token_ahead_is_caught(monkeypatch):
    def one_ahead(self, queries, keys, device="cpu"):
        return model.mask.AttentionInputs(torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(1))

    monkeypatch.setattr(model.mask.Mask, "attention_inputs", one_ahead)
    assert future_leaks(randomized(tiny_config("llama")))


BOS, EOS = 1, 2


def packed_block(documents: list[list[int]]) -> dict[str, torch.Tensor]:
    stream = [token for document in documents for token in (BOS, *document, EOS)]
    return clm_batch(torch.tensor([[*stream, BOS]]), BOS)


def documents_leak(network: nn.Module, *, use_documents: bool = True) -> bool:
    """Does document 2's hidden state change with document 1, or with its place in the row?"""
    first, other = torch.randint(3, 61, (9,)).tolist(), torch.randint(3, 61, (9,)).tolist()
    second = torch.randint(3, 61, (7,)).tolist()

    def hidden(documents):
        batch = packed_block(documents)
        extra = {"document_ids": batch["document_ids"], "position_ids": batch["position_ids"]} if use_documents else {}
        return network.body(batch["input_ids"], **extra).hidden[0]

    with_first, with_other, alone = hidden([first, second]), hidden([other, second]), hidden([second])
    length = len(second) + 2
    unchanged = torch.equal(with_first[-length:], with_other[-length:])
    separate = torch.allclose(with_first[-length:], alone, rtol=0, atol=1e-12)
    return not (unchanged and separate)


@pytest.mark.parametrize(("family", "attention"), VARIANTS)
def test_packed_documents_are_as_if_separate(family, attention):
    assert not documents_leak(randomized(tiny_config(family), attention=attention))


@pytest.mark.parametrize("family", FAMILIES)
def test_mutant_without_document_ids_is_caught(family):
    assert documents_leak(randomized(tiny_config(family)), use_documents=False)


def cached_error(network: nn.Module, pieces: list[int], offset: int = 0) -> float:
    """Largest difference of logits, reading a text in pieces through a cache and at once."""
    ids = torch.randint(0, 61, (2, sum(pieces)))
    whole = network(ids).logits
    cache = Cache(network.config, 2, 32, torch.float64)
    read = []
    for part in ids.split(pieces, dim=1):
        positions = torch.arange(cache.length, cache.length + part.size(1))[None] + offset
        read.append(network(part, cache=cache, position_ids=positions if offset else None).logits)
    return (torch.cat(read, 1) - whole).abs().max().item()


@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 1, 5, 6], [20]], ids=["tokens", "pieces", "whole"])
@pytest.mark.parametrize(("family", "attention"), VARIANTS)
def test_cached_logits_equal_uncached(family, attention, pieces):
    assert cached_error(randomized(tiny_config(family), attention=attention), pieces) < 1e-10


def test_mutant_with_wrong_cached_positions_is_caught():
    assert cached_error(randomized(tiny_config("gpt2")), [7, 13], offset=1) > 1e-3


def test_a_full_cache_is_an_error():
    network = randomized(tiny_config("llama"))
    cache = Cache(network.config, 1, 4, torch.float64)
    with pytest.raises(ConfigError, match="holds 4 positions, 5 were asked"):
        network(torch.zeros(1, 5, dtype=torch.long), cache=cache)


@pytest.mark.parametrize(("family", "attention"), VARIANTS)
def test_left_padding_changes_nothing(family, attention):
    network = randomized(tiny_config(family), attention=attention)
    ids = torch.randint(3, 61, (1, 9))
    padded = torch.cat((torch.zeros(1, 6, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)), 1)
    alone, beside = network(ids).logits, network(padded, mask).logits[:, 6:]
    assert (alone - beside).abs().max() < 1e-12
    mutant = network(padded, mask, position_ids=torch.arange(15)[None]).logits[:, 6:]  # positions not from the mask
    if family == "gpt2":  # rotary positions are relative: for the others the shift is harmless
        assert (alone - mutant).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_a_row_of_pads_is_finite(attention):
    network = randomized(tiny_config("llama"), attention=attention)
    mask = torch.tensor([[0] * 8, [0] * 3 + [1] * 5])
    logits = network(torch.randint(0, 61, (2, 8)), mask).logits
    logits.sum().backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_and_plain_attention_agree_in_gradients(family):
    config = tiny_config(family)
    batch = packed_block([[5, 6, 7, 8], [9, 10, 11], [12]])
    gradients = []
    for attention in ("sdpa", "reference"):
        network = randomized(config, attention=attention)
        options = {"document_ids": batch["document_ids"], "position_ids": batch["position_ids"]}
        logits = network(batch["input_ids"], **options).logits
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_loss_at_start_is_ln_v():
    config = ModelConfig.preset("tiny")
    network = build_network(config, seed=0)
    ids = torch.randint(0, config.vocab_size, (8, 257))
    with torch.no_grad():
        loss = F.cross_entropy(network(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(config.vocab_size), rel=0.01)


def test_loss_of_gpt2_at_start():
    """With random weights the logits are N(0, std² D), and E log Σ exp = ln V + std² D / 2: 1.4 % above ln V at D = 768."""
    config = ModelConfig.preset("gpt2", depth=2, dropout=0.0, attention_dropout=0.0)
    network = build_network(config, seed=0)
    ids = torch.randint(0, config.vocab_size, (2, 129))
    with torch.no_grad():
        loss = F.cross_entropy(network(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(config.vocab_size) + config.init_std**2 * config.width / 2, rel=0.01)


def test_first_weights_are_a_function_of_seed_and_name():
    config = tiny_config("gpt2")
    one, same, other = (build_network(config, seed=seed).state_dict() for seed in (1, 1, 2))
    deeper = build_network(config.replace(depth=2, vocab_size=61), seed=1).state_dict()
    torch.manual_seed(99)  # the global state plays no part
    assert all(torch.equal(one[name], same[name]) and torch.equal(one[name], deeper[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert not torch.equal(one["body.blocks.0.mlp.up.weight"], one["body.blocks.1.mlp.up.weight"])
    ratio = one["body.blocks.0.mlp.down.weight"].std() / one["body.blocks.0.mlp.up.weight"].std()
    assert ratio == pytest.approx(0.5, rel=0.05)  # 1 / √(2 · 2 layers): it is added to the residual stream


def test_configs_that_cannot_be_built_name_the_numbers():
    preset = ModelConfig.preset("tiny")
    for changes, message in (
        ({"heads": 3, "kv_heads": 3}, "width=128 is not divisible by heads=3"),
        ({"kv_heads": 3}, "heads=4 is not divisible by kv_heads=3"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"width": 12}, "head_width=3 must be even"),
        ({"widht": 12}, "no such field: widht; fields: family"),
    ):
        with pytest.raises(ConfigError, match=message):
            preset.replace(**changes)


def test_learned_positions_end():
    network = randomized(tiny_config("gpt2"))
    with pytest.raises(ConfigError, match="33 positions were asked of a network with context=32"):
        network(torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize(("field", "silent"), [("attention_dropout", "mlp"), ("dropout", "mlp"), ("dropout", "attention")])
def test_each_dropout_acts_in_training_alone(field, silent, attention):
    """In a block with one sublayer silenced, so that the other's dropout is seen by itself."""
    network = randomized(tiny_config("gpt2", **{field: 0.3}), attention=attention)
    block, inputs = network.body.blocks[0], model.mask.Mask().attention_inputs(9, 9)
    last = {"mlp": block.mlp.down, "attention": block.attention.out}[silent]
    with torch.no_grad():
        last.weight.zero_(), last.bias.zero_()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    assert torch.equal(block(x, inputs, None), block(x, inputs, None))
    network.train()
    assert not torch.equal(block(x, inputs, None), block(x, inputs, None))


@pytest.mark.filterwarnings("ignore")  # torch's own, about what its compiler imports
def test_a_compiled_block_is_one_graph():
    """No question on the way that cuts it in pieces; and the same logits and gradients."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (randomized(tiny_config("gpt2")) for _ in range(2))
    for block in compiled.body.blocks:
        block.compile(dynamic=False, fullgraph=True)
    ids = torch.randint(0, 61, (2, 12))
    logits = [network(ids).logits for network in (plain, compiled)]
    direction = torch.randn_like(logits[0])
    pairs = [[output, *torch.autograd.grad((output * direction).sum(), list(network.parameters()))]
             for output, network in zip(logits, (plain, compiled), strict=True)]  # fmt: skip
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert 0 < max((a - b).abs().max().item() for a, b in zip(*pairs, strict=True)) < 1e-11  # 0: it was not compiled
