"""Rotary positions and the ways to stretch them, against transformers' tables and against the equations by hand."""

import math

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import model.hub
from model.config import Rope
from model.rope import ROPE_SCALINGS, halves_to_interleaved, interleaved_to_halves, rope_tables, rotate
from tests.compare import absolute, mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import LIBRARY, ROUNDING, published
from tests.oracle.wide import widen

# K = 48 and a base of 10000: over 64 positions the 24 pairs make between 0.001 and 10 turns, so that every branch is met.
ROPES = {
    "plain": Rope(),
    "linear": Rope(kind="linear", factor=4.0, trained_context=64),
    "dynamic": Rope(kind="dynamic", factor=3.3, trained_context=64),
    "llama3": Rope(kind="llama3", factor=8.0, trained_context=64, slow=1.0, fast=4.0),
    "yarn": Rope(kind="yarn", factor=4.0, trained_context=64, slow=1.0, fast=8.0),
    "yarn-free": Rope(kind="yarn", factor=4.0, trained_context=64, slow=0.5, fast=3.0, truncate=False, attention_factor=1.3),
}


def test_all_kinds_are_met():
    assert {rope.kind for rope in ROPES.values()} == set(ROPE_SCALINGS)


def hf_config(rope: Rope) -> transformers.LlamaConfig:
    from model.families._shared import write_rope

    written = write_rope(rope, 64)["rope_parameters"]
    return transformers.LlamaConfig(hidden_size=96, num_attention_heads=2, max_position_embeddings=64, rope_parameters=written)


@pytest.mark.parametrize("length", [40, 64, 150])
@pytest.mark.parametrize("name", ROPES)
def test_tables_against_transformers(name, length, parity):
    rope = ROPES[name]
    rotary = LlamaRotaryEmbedding(hf_config(rope))  # a new one a length: it remembers the longest text it has seen
    x, positions = torch.randn(2, 2, length, 48), torch.arange(length).expand(2, length)
    cos, sin = rotary(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    ours = rotate(x, *rope_tables(positions, 48, rope, torch.float32))
    error = absolute(ours, expected)
    parity(f"rotary positions, float32: {name}, length {length}", LIBRARY, error, 5e-5, "float32 phases up to 150 rad")
    if rope.kind != "plain" and not (rope.kind == "dynamic" and length <= 64):
        plain = rotate(x, *rope_tables(positions, 48, Rope(), torch.float32))
        assert (plain - expected).abs().max() > 0.1  # the mutant that ignores the stretch


def test_complex_numbers(parity):
    """The paper's own form: multiply x_i + j x_{i + K/2} by e^{j p f_i}."""
    x, positions = torch.randn(2, 4, 9, 6, dtype=torch.float64), torch.randint(0, 5000, (2, 9))
    frequency = 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turn = torch.polar(torch.ones(2, 1, 9, 3, dtype=torch.float64), positions[:, None, :, None] * frequency)
    turned = torch.complex(x[..., :3], x[..., 3:]) * turn
    expected = torch.cat((turned.real, turned.imag), -1)
    error = absolute(rotate(x, *rope_tables(positions, 6, Rope(), torch.float64)), expected)
    parity("rotary positions, float64", "complex numbers", error, 1e-11, "float64 phases up to 5000 rad")


def test_phases_are_not_bfloat16():
    positions = torch.arange(32768)[None]
    wide = rope_tables(positions, 64, Rope(), torch.float32)
    narrow = rope_tables(positions, 64, Rope(), torch.bfloat16)
    assert all(torch.equal(w.bfloat16(), n) for w, n in zip(wide, narrow, strict=True))
    frequency = 10000.0 ** (-torch.arange(32) / 32)
    mutant = (positions.bfloat16()[..., None] * frequency.bfloat16()).cos()[:, None]
    assert (mutant - narrow[0]).abs().max() > 0.5


def test_a_network_in_bfloat16_has_tables_of_float32(tmp_path):
    """Cast as a whole, as `.bfloat16()` does: nothing that decides a phase may have become narrow."""
    network = randomized(tiny_config("llama"), dtype=torch.float32).bfloat16()
    assert all("rope" not in name and "frequency" not in name for name, _ in network.named_buffers())
    assert network(torch.randint(3, 61, (1, 30))).logits.dtype == torch.bfloat16


def test_llama3_by_hand():
    """Llama 3.1's own numbers: pairs that turn more than 4 times over 8,192 positions stay, fewer than 1: an eighth."""
    rope, one = Rope(500000.0, "llama3", 8.0, trained_context=8192), torch.tensor([[1]])
    frequency = 500000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
    turns = 8192 * frequency / (2 * math.pi)
    cos, sin = rope_tables(one, 128, rope, torch.float64)
    ours = torch.atan2(sin, cos).flatten()
    assert torch.allclose(ours[turns > 4], frequency[turns > 4], rtol=1e-12)
    assert torch.allclose(ours[turns < 1], frequency[turns < 1] / 8, rtol=1e-9)
    between = (turns >= 1) & (turns <= 4)
    assert between.any() and ((ours <= frequency) & (ours >= frequency / 8))[between].all()


@pytest.mark.parametrize("name", [name for name in ROPES if name != "plain"])
def test_whole_network(name, tmp_path, parity):
    """A LLaMA with scaled positions over a text longer than its trained context, through a folder, and back."""
    rope = ROPES[name]
    context = 64 if name == "llama3" else int(rope.factor * rope.trained_context)  # its files name the extended length
    network = randomized(tiny_config("llama", context=context, width=96, heads=2, kv_heads=1, rope=rope))
    theirs = widen(published(network, tmp_path))
    ids = torch.randint(3, 61, (2, 100))
    error = mixed(network(ids).logits, theirs(ids).logits)
    parity(f"llama with stretched rotary positions: {name}", LIBRARY, error, *ROUNDING)
    assert model.hub.load(tmp_path).config == network.config
    theirs.save_pretrained(tmp_path / "theirs")
    assert model.hub.load(tmp_path / "theirs").config.rope == network.config.rope


def test_interleaved_weights_give_the_same_scores():
    """Meta's own files pair neighbours: after the permutation, q kᵀ by halves equals q kᵀ by neighbours, grouped keys too."""
    width, tokens = 8, 5
    x, positions = torch.randn(1, tokens, 24, dtype=torch.float64), torch.arange(tokens)[None]
    q_weight, k_weight = torch.randn(4 * width, 24, dtype=torch.float64), torch.randn(2 * width, 24, dtype=torch.float64)
    cos, sin = rope_tables(positions, width, Rope(), torch.float64)

    def heads(weight):
        return (x @ weight.T).unflatten(-1, (-1, width)).transpose(1, 2)

    def by_neighbours(x_BHTK):
        first, second = x_BHTK[..., 0::2], x_BHTK[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)

    def scores(q, k):
        return q @ k.repeat_interleave(2, dim=1).mT

    expected = scores(by_neighbours(heads(q_weight)), by_neighbours(heads(k_weight)))
    q_halves, k_halves = (interleaved_to_halves(weight, width) for weight in (q_weight, k_weight))
    ours = scores(rotate(heads(q_halves), cos, sin), rotate(heads(k_halves), cos, sin))
    assert (ours - expected).abs().max() < 1e-12
    mutant = scores(rotate(heads(q_weight), cos, sin), rotate(heads(k_weight), cos, sin))
    assert (mutant - expected).abs().max() > 1e-2
    assert torch.equal(halves_to_interleaved(q_halves, width), q_weight)
    assert torch.equal(halves_to_interleaved(k_halves[:, 0], width), k_weight[:, 0])  # a bias
