"""Sampled replies: each is a function of its prompt and its noise, and its log-probabilities are those of a plain forward."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import model.hub
import model.rollouts
from lora.config import LoraConfig, PrefixConfig, PromptConfig
from lora.inject import add_adapters
from model.cache import LayerCache
from model.config import ConfigError, Rope
from model.decoding import Decoding
from model.generate import generate
from model.rollouts import SampledReply, choose_tokens, sample_replies
from quant.config import FourBit
from quant.layer import QuantizedLinear
from tests.compare import absolute
from tests.conftest import randomized, tiny_config

CONTEXT = 32  # of tiny networks; the windows of mistral and qwen2 are 5 and 7
LENGTHS = (20, 3, 3, 11, 28, 1, 3, 20, 30, 31)  # of prompts; the last leaves room for one token
MOST, STOPS = 26, tuple(range(40, 46))  # 26: a row with a short prompt ends in a column beyond the context


def with_adapter(family: str, config) -> nn.Module:
    network = add_adapters(randomized(tiny_config(family)), config)
    with torch.no_grad():
        for value in (value for value in network.parameters() if value.requires_grad):
            value.add_(0.3 * torch.randn_like(value))
    return network.eval()


FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
NETWORKS = {
    **{family: lambda family=family: randomized(tiny_config(family)) for family in FAMILIES},
    "a prompt adapter": lambda: with_adapter("gpt2", PromptConfig(tokens=4)),
    "a prefix adapter": lambda: with_adapter("mistral", PrefixConfig(tokens=4)),
    "a bidirectional prompt": lambda: randomized(tiny_config("llama", bidirectional_prompt=True)),
    "LoRA": lambda: with_adapter("llama", LoraConfig(r=3, targets="all-linear")),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def prompts_and_noise(context: int = CONTEXT) -> tuple[list[list[int]], Tensor]:
    """Prompts of mixed lengths, some of them equal, and noise; a shorter context shortens the long ones."""
    prompts = [torch.randint(3, 40, (min(length, context - 1),)).tolist() for length in LENGTHS]
    prompts[2] = prompts[6] = prompts[1]
    return prompts, torch.rand(len(prompts), MOST, dtype=torch.float64)


def room(network: nn.Module) -> int:
    return CONTEXT - network.body.num_virtual_tokens


def sample(network: nn.Module, prompts: list[list[int]], uniforms_NT: Tensor, **changes) -> list[SampledReply]:
    options = {"stop_ids": STOPS, "temperature": 1.3, "context": room(network)} | changes
    return sample_replies(network, prompts, uniforms_NT=uniforms_NT, **options)


def forward_log_probs(network: nn.Module, prompt: Sequence[int], ids: Sequence[int], temperature: float) -> Tensor:
    """log softmax(logits / temperature) of the token after prompt + ids[:t] for each t, by one forward: T + 1 V."""
    visible = {"visible_lengths": torch.tensor([len(prompt)])} if network.config.bidirectional_prompt else {}
    with torch.no_grad():
        logits_TV = network(torch.tensor([[*prompt, *ids]]), **visible).logits[0, len(prompt) - 1 :]
    return (logits_TV / temperature).log_softmax(-1)


def sample_alone(network: nn.Module, prompt: list[int], uniforms_T: Tensor, temperature: float, stops=STOPS) -> SampledReply:
    """One row by itself, without a cache: the whole text is read for each token."""
    ids, log_probs = [], []
    for uniform in uniforms_T[: room(network) - len(prompt)].tolist():
        log_p_V = forward_log_probs(network, prompt, ids, temperature)[-1]
        total, token = 0.0, -1
        while total <= uniform:
            token += 1
            total += log_p_V[token].exp().item()
        ids.append(token)
        log_probs.append(log_p_V[token].item())
        if token in stops:
            return SampledReply(ids, log_probs, True)
    return SampledReply(ids, log_probs, False)


def error(ours: list[SampledReply], expected: list[SampledReply]) -> float:
    """The largest difference of log-probabilities; infinite where ids or ends differ."""
    if [(x.ids, x.has_ended) for x in ours] != [(x.ids, x.has_ended) for x in expected]:
        return float("inf")
    return max(absolute(torch.tensor(x.log_probs), torch.tensor(y.log_probs)) for x, y in zip(ours, expected, strict=True))


def error_beside_rows_alone(name: str) -> float:
    network = NETWORKS[name]()
    prompts, uniforms_NT = prompts_and_noise(room(network))
    alone = [sample_alone(network, prompt, noise, 1.3) for prompt, noise in zip(prompts, uniforms_NT, strict=True)]
    assert len({len(reply.ids) for reply in alone}) > 4  # they end at different times
    assert {reply.has_ended for reply in alone} == {True, False}
    return error(sample(network, prompts, uniforms_NT), alone)


@each_network
def test_replies_are_those_of_rows_alone_without_a_cache(name):
    assert error_beside_rows_alone(name) < 1e-10


@each_network
def test_dropped_rows_change_nothing(name):
    """Without stops no row leaves before it has no room; up to their stops the replies are the same."""
    network = NETWORKS[name]()
    prompts, uniforms_NT = prompts_and_noise(room(network))
    dropped = sample(network, prompts, uniforms_NT)
    expected = []
    for reply, full in zip(dropped, sample(network, prompts, uniforms_NT, stop_ids=()), strict=True):
        end = len(reply.ids)
        expected.append(SampledReply(full.ids[:end], full.log_probs[:end], full.ids[end - 1] in STOPS))
        assert not full.has_ended
    assert error(dropped, expected) < 1e-12
    apart = [sample(network, [prompt], noise[None])[0] for prompt, noise in zip(prompts, uniforms_NT, strict=True)]
    assert error(dropped, apart) < 1e-12


def test_the_order_and_size_of_batches_change_nothing():
    network = NETWORKS["qwen2"]()
    prompts, uniforms_NT = prompts_and_noise()
    replies, counts = sample(network, prompts, uniforms_NT), []
    for size in (1, 3, 4):
        assert error(sample(network, prompts, uniforms_NT, batch_size=size, on_progress=counts.append), replies) < 1e-12
    assert counts == [*range(1, len(prompts) + 1)] * 3
    order = torch.randperm(len(prompts))
    shuffled = sample(network, [prompts[n] for n in order], uniforms_NT[order])
    assert error(shuffled, [replies[n] for n in order]) < 1e-12


def test_a_default_batch_fits_the_memory(monkeypatch):
    network, read = NETWORKS["llama"](), []
    prompts, uniforms_NT = prompts_and_noise()
    whole = model.rollouts._sample_batch

    def watched(network, batch, *rest):
        read.append(len(batch))
        return whole(network, batch, *rest)

    monkeypatch.setattr(model.rollouts, "_sample_batch", watched)
    replies = sample(network, prompts, uniforms_NT)
    assert read == [len(prompts)]
    monkeypatch.setattr(model.rollouts, "BATCH_BYTES", 100_000)
    assert error(sample(network, prompts, uniforms_NT), replies) < 1e-12
    assert 1 < max(read[1:]) < len(prompts) and sum(read[1:]) == len(prompts)


SELECT, CHOOSE, SELECTED = Decoding.select, model.rollouts.choose_tokens, LayerCache._selected


def keep_the_mask(self, row_B):
    mask_BT = self.mask_BT
    SELECT(self, row_B)
    self.mask_BT = mask_BT[: len(row_B)] if len(row_B) <= len(mask_BT) else self.mask_BT


def forget_the_temperature(logits_BV, uniform_B, temperature):
    token_B, _ = CHOOSE(logits_BV, uniform_B, temperature)
    return token_B, logits_BV.log_softmax(-1).gather(-1, token_B[:, None])[:, 0]


def previous_token(logits_BV, uniform_B, temperature):
    token_B, log_prob_B = CHOOSE(logits_BV, uniform_B, temperature)
    return (token_B - 1).clamp_min(0), log_prob_B


def move_no_keys(self, x_BGSK, row_B, moved_M, first, skip):
    return SELECTED(self, x_BGSK, row_B, moved_M[:0], first, skip)


def overwrite_the_prefix(self, x_BGSK, row_B, moved_M, first, skip):
    return SELECTED(self, x_BGSK, row_B, moved_M, 0, skip)


MUTANTS = {  # the network that shows it, and the edit
    "rows keep the mask of their place": ("llama", Decoding, "select", keep_the_mask),
    "temperature is not in the log-probability": ("llama", model.rollouts, "choose_tokens", forget_the_temperature),
    "noise of the row above": ("llama", model.rollouts, "choose_tokens", lambda x, u, t: CHOOSE(x, u.roll(1, 0), t)),
    "the token before": ("llama", model.rollouts, "choose_tokens", previous_token),
    "rows move without their keys": ("llama", LayerCache, "_selected", move_no_keys),
    "skipped positions are those of the prefix": ("a prefix adapter", LayerCache, "_selected", overwrite_the_prefix),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant, monkeypatch):
    network, owner, name, broken = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, broken)
    assert error_beside_rows_alone(network) > 1e-3


def test_greedy_is_that_of_generate():
    network = NETWORKS["mistral"]()
    prompts, uniforms_NT = prompts_and_noise()
    for reply, prompt in zip(sample(network, prompts, uniforms_NT, temperature=0), prompts, strict=True):
        most = min(MOST, CONTEXT - len(prompt))
        options = {"max_new_tokens": most, "temperature": 0, "stop_ids": STOPS}
        assert generate(network, torch.tensor([prompt]), **options)[0].tolist() == reply.ids
        log_p_TV = forward_log_probs(network, prompt, reply.ids[:-1], temperature=1.0)
        own_T = log_p_TV.gather(-1, torch.tensor(reply.ids)[:, None])[:, 0]
        assert absolute(torch.tensor(reply.log_probs, dtype=torch.float64), own_T) < 1e-10
        assert reply.has_ended == (reply.ids[-1] in STOPS)


def test_a_reply_can_end_at_its_first_token_and_in_a_room_of_one():
    network = NETWORKS["gpt2"]()
    prompts, uniforms_NT = prompts_and_noise()
    for replies in (sample(network, prompts, uniforms_NT, stop_ids=range(61)), sample(network, prompts, uniforms_NT[:, :1])):
        assert [len(reply.ids) for reply in replies] == [1] * len(prompts)
        assert len({*replies[0].ids, *replies[1].ids, *replies[2].ids}) > 1
    assert [reply.has_ended for reply in replies] == [reply.ids[0] in STOPS for reply in replies]
    assert all(reply.has_ended for reply in sample(network, prompts, uniforms_NT, stop_ids=range(61)))
    free = sample(network, prompts, uniforms_NT, stop_ids=())
    assert [len(reply.ids) for reply in free] == [min(MOST, CONTEXT - length) for length in LENGTHS]
    assert sample(network, [], uniforms_NT[:0]) == []


def test_tokens_have_the_probabilities_of_the_softmax():
    """Chi-square of 10,000 first tokens against softmax(logits / temperature)."""
    network, draws = randomized(tiny_config("llama", vocab_size=11)), 10_000
    prompt = [3, 4, 5]
    uniforms_NT = torch.rand(draws, 1, dtype=torch.float64)
    replies = sample(network, [prompt] * draws, uniforms_NT, stop_ids=(), temperature=2.0)
    expected_V = forward_log_probs(network, prompt, [], 2.0)[-1].exp() * draws
    found_V = torch.bincount(torch.tensor([reply.ids[0] for reply in replies]), minlength=11)
    assert expected_V.min() > 20
    assert ((found_V - expected_V).square() / expected_V).sum() < 29.6  # 10 degrees of freedom: one in a thousand exceeds it


def test_the_borders_of_the_noise():
    """Probability 0 is never chosen, 0 and the largest number below 1 are fine, and logits too large for exp as well."""
    off = -torch.inf
    logits_BV = torch.tensor([[off, 1.0, off, 2.0, off]] * 3 + [[1e30, off, 1e30, 0, off]] * 2, dtype=torch.float32)
    largest = 1 - 2**-53
    uniform_B = torch.tensor([0.0, largest, 0.5, 0.5, largest], dtype=torch.float64)
    for temperature, first in ((1.0, 1), (1e-3, 3)):  # e^-1000 is 0
        token_B, log_p_B = choose_tokens(logits_BV, uniform_B, temperature)
        assert token_B.tolist() == [first, 3, 3, 2, 2]
        assert log_p_B[3:].exp().tolist() == pytest.approx([0.5, 0.5])
    assert choose_tokens(logits_BV.bfloat16(), uniform_B, 1.0)[1].isfinite().all()


def test_four_bit_bases_with_lora(tmp_path):
    model.hub.save(randomized(tiny_config("llama", width=64, mlp_width=128)), tmp_path)
    network = model.hub.load(tmp_path, dtype=torch.float64, quantization=FourBit())
    add_adapters(network, LoraConfig(r=3, targets="all-linear"))
    with torch.no_grad():
        for value in (value for value in network.parameters() if value.requires_grad):
            value.add_(0.3 * torch.randn_like(value))
    assert sum(isinstance(module, QuantizedLinear) for module in network.modules()) == 14
    prompts, uniforms_NT = prompts_and_noise()
    network.eval()
    alone = [sample_alone(network, prompt, noise, 1.3) for prompt, noise in zip(prompts, uniforms_NT, strict=True)]
    assert error(sample(network, prompts, uniforms_NT), alone) < 1e-10


def test_the_mode_and_the_gradients_of_the_network_stay():
    network = NETWORKS["LoRA"]().train()
    before = copy.deepcopy(network.state_dict())
    prompts, uniforms_NT = prompts_and_noise()
    assert error(sample(network, prompts, uniforms_NT), sample(network.eval(), prompts, uniforms_NT)) == 0
    network.train()
    sample(network, prompts, uniforms_NT)
    assert network.training and all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network(torch.tensor([prompts[0]])).logits.sum().backward()  # nothing of inference mode is left behind


LONG = [3] * 32
ERRORS = {
    "no room": ({}, [[3], LONG], r"prompt 1 of 32 tokens leaves no room for a reply: context=32, at most 4 new tokens"),
    "no new tokens": ({"uniforms_NT": torch.rand(1, 0)}, [[3]], r"prompt 0 of 1 tokens leaves no room .* at most 0 new"),
    "empty": ({}, [[3], []], "prompt 1 is empty"),
    "rows of noise": ({"uniforms_NT": torch.rand(3, 4)}, [[3]], r"uniforms_NT of shape \(3, 4\): expected \(1, most new"),
    "a noise of one": ({"uniforms_NT": torch.ones(1, 4)}, [[3]], r"uniforms_NT has numbers outside \[0, 1\)"),
    "a noise that is NaN": ({"uniforms_NT": torch.full((1, 4), torch.nan)}, [[3]], "outside"),
    "a context": ({"context": 33}, [[3]], "context=33 exceeds the 32 tokens"),
    "a temperature": ({"temperature": -1.0}, [[3]], "temperature=-1.0 must be 0"),
    "an infinite temperature": ({"temperature": torch.inf}, [[3]], "and finite"),
    "a batch": ({"batch_size": 0}, [[3]], "batch_size=0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_named(case):
    changes, prompts, message = ERRORS[case]
    options = {"uniforms_NT": torch.rand(len(prompts), 4), "stop_ids": (), "context": CONTEXT} | changes
    with pytest.raises(ConfigError, match=message):
        sample_replies(NETWORKS["gpt2"](), prompts, **options)


def test_networks_that_cannot_are_named():
    noise = torch.rand(1, 4)
    for family, message in (("t5", "t5 .* is an encoder-decoder"), ("bert", "is an encoder")):
        with pytest.raises(ConfigError, match=message):
            sample_replies(randomized(tiny_config(family)), [[3]], uniforms_NT=noise, stop_ids=(), context=CONTEXT)
    dynamic = randomized(tiny_config("llama", rope=Rope(kind="dynamic", factor=2.0, trained_context=16)))
    with pytest.raises(ConfigError, match="beyond 16 tokens: context=32"):
        sample_replies(dynamic, [[3]], uniforms_NT=noise, stop_ids=(), context=CONTEXT)
    assert sample_replies(dynamic, [[3]], uniforms_NT=noise, stop_ids=(), context=16)
