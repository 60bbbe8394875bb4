"""A chat's cache over turns changes nothing but speed: each reply is that of `generate`, which reads the whole text."""

from dataclasses import asdict
from itertools import repeat

import pytest
import torch
from torch import nn

from lora.config import PrefixConfig, PromptConfig
from lora.inject import add_adapters
from model.cache import Cache, LayerCache
from model.chat_session import ChatSession, Reply, common_prefix
from model.config import ConfigError, Rope
from model.constraints import Constraints
from model.generate import generate
from model.sampling import Sampling
from tests.conftest import randomized, tiny_config

CONTEXT = 32  # of tiny networks; the windows of mistral and qwen2 are 5 and 7
SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "sampled": Sampling(temperature=0.9, top_k=30, top_p=0.95, repetition_penalty=1.2),
}
VIRTUAL = {"prompt": PromptConfig(tokens=4), "prefix": PrefixConfig(tokens=4)}


def ids(*of: int) -> list[int]:
    return torch.randint(3, 61, of).tolist()


def with_virtual_tokens(kind: str, family: str) -> nn.Module:
    network = add_adapters(randomized(tiny_config(family)), VIRTUAL[kind])
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


NETWORKS = {
    "learned positions": lambda: randomized(tiny_config("gpt2")),
    "RoPE, grouped keys": lambda: randomized(tiny_config("llama")),
    "windows": lambda: randomized(tiny_config("mistral")),
    "some windows": lambda: randomized(tiny_config("qwen2")),
    "norms of heads": lambda: randomized(tiny_config("qwen3")),
    "sinusoidal positions": lambda: randomized(tiny_config("gpt2", position="sinusoidal")),
    "dynamic RoPE": lambda: randomized(tiny_config("llama", rope=Rope(1e4, kind="dynamic", factor=8.0, trained_context=8))),
    "bidirectional prompt": lambda: randomized(tiny_config("llama", bidirectional_prompt=True)),
    "prompt, RoPE": lambda: with_virtual_tokens("prompt", "llama"),
    "prompt, learned positions": lambda: with_virtual_tokens("prompt", "gpt2"),
    "prefix, windows": lambda: with_virtual_tokens("prefix", "mistral"),
    "prefix, RoPE": lambda: with_virtual_tokens("prefix", "llama"),
}
READS_ALL = ("dynamic RoPE", "bidirectional prompt")  # beyond the trained context; always


def talk(network: nn.Module, sampling: Sampling, *, seed: int = 3) -> tuple[bool, list[Reply]]:
    """Are all replies of a conversation those from scratch? Turns go on, lose a thought, are undone, repeat."""
    session, generator = ChatSession(network, stop_ids=(7,)), torch.Generator().manual_seed(seed)
    text, replies, equal = ids(5), [], True
    logits: list[torch.Tensor] = []
    hook = network.head.register_forward_hook(lambda head, inputs, output: logits.append(output))
    for turn in range(6):
        state = generator.get_state()
        reply = session.reply(text, max_new_tokens=4, sampling=sampling, generator=generator)
        again = torch.Generator()
        again.set_state(state)
        options = asdict(sampling) | {"max_new_tokens": 4, "stop_ids": (7,), "generator": again}
        scratch = generate(network, torch.tensor([text]), **options)[0].tolist()
        equal &= reply.ids == scratch and torch.equal(again.get_state(), generator.get_state())
        ours, theirs = logits[: len(reply.ids)], logits[len(reply.ids) :]
        equal &= all(map(torch.allclose, ours, theirs, repeat(1e-10), repeat(1e-10)))
        logits.clear()
        replies.append(reply)
        if turn == 1:
            text = [*text[:3], *text[6:], *reply.ids[2:], *ids(3)]  # the template rewrites history
        elif turn == 2:
            text = [*text[:4], *ids(2)]  # undone
        elif turn != 3:  # after turn 3 the same prompt again
            text = [*text, *reply.ids, *ids(2)]
    hook.remove()
    return equal, replies


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_replies_are_those_from_scratch(name, sampling):
    network = NETWORKS[name]()
    equal, replies = talk(network, SAMPLINGS[sampling])
    assert equal and len({tuple(reply.ids) for reply in replies}) > 3
    if name not in READS_ALL:  # 5; the last token of the reply and 2; from the change on; from the change on; 1; as turn 2
        read = [reply.read for reply in replies]
        assert read[0] == 5 and read[1] == 3 and read[3] <= 3 and read[4] == 1 and read[5] == 3, read


TRUNCATE, SETTLE = Cache.truncate, ChatSession._settle


def one_too_long(self, ids):
    SETTLE(self, ids)
    self.ids = ids[: len(self.ids) + 1]


MUTANTS = {
    "nothing is truncated": ("RoPE, grouped keys", Cache, "truncate", lambda self, length: None),
    "one position too many": (
        "learned positions",
        Cache,
        "truncate",
        lambda self, length: TRUNCATE(self, min(length + 1, self.text_length)),
    ),
    "virtual tokens are lost": (
        "prefix, windows",
        LayerCache,
        "truncate",
        lambda self, length: setattr(self, "length", max(length - 4, 1)),
    ),
    "the last token counts as read": ("RoPE, grouped keys", ChatSession, "_settle", one_too_long),
    "dynamic RoPE keeps its keys": ("dynamic RoPE", ChatSession, "_is_reusable", lambda self, ids: True),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_session_are_caught(mutant, monkeypatch):
    name, owner, attribute, broken = MUTANTS[mutant]
    network = NETWORKS[name]()
    monkeypatch.setattr(owner, attribute, broken)
    try:
        equal, replies = talk(network, SAMPLINGS["greedy"])
    except (ConfigError, RuntimeError):
        return
    assert not equal or [reply.read for reply in replies[:2]] != [5, 3]


def test_bidirectional_prompts_and_rescaled_keys_are_read_again():
    _, replies = talk(NETWORKS["bidirectional prompt"](), SAMPLINGS["greedy"])
    assert all(reply.read >= 5 for reply in replies)
    network = NETWORKS["dynamic RoPE"]()
    session, text = ChatSession(network), ids(4)
    read = []
    for _ in range(4):  # 4, 8, 12, 16 tokens; 8 are the trained context
        reply = session.reply(text, max_new_tokens=2, sampling=Sampling(temperature=0))
        read.append(reply.read)
        text = [*text, *reply.ids, *ids(2)]
    assert read == [4, 3, 12, 16]


def test_a_cache_grows_with_the_conversation():
    """Llama 3.1's context is 131,072: its whole cache would be 17 GB."""
    session = ChatSession(randomized(tiny_config("llama", context=131072)))
    reply = session.reply(ids(5), max_new_tokens=300, sampling=Sampling(temperature=0, top_k=None))
    assert reply.ending == "length" and 304 <= session.cache.capacity <= 608
    assert len(session.ids) == 304 == session.cache.text_length  # the last token has not been read


def test_a_reply_ends_by_a_stop_id_or_its_length():
    network = randomized(tiny_config("llama"))
    text = ids(5)
    free = generate(network, torch.tensor([text]), max_new_tokens=9, temperature=0)[0].tolist()
    stop = free[4]
    told: list[int] = []
    session = ChatSession(network, stop_ids=(60, stop))
    reply = session.reply(text, max_new_tokens=9, sampling=Sampling(temperature=0), on_token=told.append)
    assert reply == (free[: free.index(stop) + 1], "stop", 5, 0) and told == reply.ids
    assert ChatSession(network).reply(text, max_new_tokens=9, sampling=Sampling(temperature=0)) == (free, "length", 5, 0)
    fills = session.reply(text, max_new_tokens=CONTEXT - 5, sampling=Sampling(temperature=0))
    assert fills.ids == reply.ids  # the context may be filled to its last token
    forbidden = ChatSession(network, constraints=Constraints(suppressed=(free[0],)))
    assert free[0] not in forbidden.reply(text, max_new_tokens=9, sampling=Sampling(temperature=0)).ids


@pytest.mark.parametrize("name", ["RoPE, grouped keys", "prefix, RoPE", "prompt, learned positions"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("calls", [1, 2, 5])
def test_an_interrupted_reply_leaves_a_whole_cache(name, layer, calls, monkeypatch):
    """Ctrl-C between the layers of a forward pass, in the prompt or in the reply, in the first turn or the second."""
    network, greedy = NETWORKS[name](), Sampling(temperature=0)
    for before in (0, 1):
        session, text = ChatSession(network), ids(5)
        for _ in range(before):
            text = [*text, *session.reply(text, max_new_tokens=3, sampling=greedy).ids, *ids(2)]
        count = 0

        def strike(*_, end=calls):
            nonlocal count
            count += 1
            if count == end:
                raise KeyboardInterrupt

        hook = network.body.blocks[layer].attention.register_forward_hook(strike)
        reply = session.reply(text, max_new_tokens=8, sampling=greedy)
        hook.remove()
        scratch = generate(network, torch.tensor([text]), max_new_tokens=8, temperature=0)[0].tolist()
        assert reply.ending == "interrupted" and reply.ids == scratch[: calls - 1]
        text = [*text, *reply.ids, *ids(2)]
        following = session.reply(text, max_new_tokens=4, sampling=greedy)
        assert following.ids == generate(network, torch.tensor([text]), max_new_tokens=4, temperature=0)[0].tolist()
        if calls > 1:
            assert following.read <= 4  # at most the last two tokens, and the new ones


def test_any_error_leaves_a_whole_cache():
    network, greedy = randomized(tiny_config("gpt2")), Sampling(temperature=0)
    session, text = ChatSession(network), ids(5)

    def fail(token: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        session.reply(text, max_new_tokens=4, sampling=greedy, on_token=fail)
    assert session.ids == text and session.reply(text, max_new_tokens=4, sampling=greedy).read == 1


def test_what_does_not_fit_is_refused():
    session = ChatSession(randomized(tiny_config("llama")))
    assert session.limit == CONTEXT and ChatSession(NETWORKS["prefix, RoPE"]()).limit == CONTEXT - 4
    with pytest.raises(ConfigError, match="25 tokens and 8 new ones do not fit a context of 32"):
        session.reply(ids(25), max_new_tokens=8, sampling=Sampling())
    with pytest.raises(ConfigError, match="a chat needs a decoder; this network is an encoder-decoder"):
        ChatSession(randomized(tiny_config("t5")))
    with pytest.raises(ConfigError, match="at least one token"):
        session.reply([], max_new_tokens=3, sampling=Sampling())
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2 and common_prefix([], [1]) == 0


def test_a_cache_of_the_caller_is_checked():
    network, text = randomized(tiny_config("llama")), torch.randint(3, 61, (1, 6))
    cache = Cache(network.config, 1, 4, torch.float64)
    whole = generate(network, text, max_new_tokens=5, temperature=0)
    assert torch.equal(generate(network, text, max_new_tokens=5, temperature=0, cache=cache), whole)
    assert cache.text_length == 10 and cache.capacity >= 10
    with pytest.raises(ConfigError, match="holds 10 positions of a text of 6: one at least must be read"):
        generate(network, text, max_new_tokens=5, cache=cache)
    for wrong in (-1, 11):
        with pytest.raises(ConfigError, match=rf"truncate\({wrong}\): the cache holds 10"):
            cache.truncate(wrong)
    cache.truncate(3)
    assert torch.equal(generate(network, text, max_new_tokens=5, temperature=0, cache=cache), whole)
    cache.truncate(0)
    with pytest.raises(ConfigError, match="for one text of a decoder, not for 2 of"):
        generate(network, text.expand(2, -1), max_new_tokens=5, cache=cache)
    with pytest.raises(ConfigError, match="33 tokens do not fit the 32 of the context"):
        generate(network, torch.randint(3, 61, (1, 33)), max_new_tokens=1, cache=cache)
    two_ways = NETWORKS["bidirectional prompt"]()
    held = Cache(two_ways.config, 1, 8, torch.float64)
    generate(two_ways, text[:, :3], max_new_tokens=1, cache=held)
    with pytest.raises(ConfigError, match="a bidirectional prompt is read at once"):
        generate(two_ways, text, max_new_tokens=1, cache=held)
