"""A chat's key-value cache, kept from turn to turn: only what it does not hold yet is read."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Literal, NamedTuple

import torch
from torch import nn

from model.cache import Cache
from model.config import ConfigError
from model.constraints import Constraints
from model.decoding import empty_cache
from model.generate import generate
from model.sampling import Sampling


class Reply(NamedTuple):
    """A reply.

    ids: its tokens, with the stop id that ended it. ending: "stop", "length" (max_new_tokens) or "interrupted" (by
    KeyboardInterrupt). read, cached: the tokens of the prompt that were read, and those before them that the cache held.
    """

    ids: list[int]
    ending: Literal["stop", "length", "interrupted"]
    read: int
    cached: int


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix.

    >>> common_prefix([5, 6, 7], [5, 6, 8, 9]), common_prefix([5], [5, 6])
    (2, 1)
    """
    unequal = (place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(unequal, min(len(first), len(second)))


class ChatSession:
    """The ids of a conversation so far, and their key-value cache.

    Each turn gives the ids of the whole conversation. The longest common prefix with the ids in the cache is kept, and the rest
    is read. A template that rewrites earlier turns (Qwen3 removes their thoughts) has a shorter common prefix. A reply is equal
    to that of `generate` without a cache, token by token.

    Nothing is kept where keys depend on later tokens: of a bidirectional prompt, and of dynamic RoPE scaling beyond the trained
    context. Errors (ConfigError): a network that is not a decoder with a language-model head.
    """

    def __init__(self, network: nn.Module, *, stop_ids: Sequence[int] = (), constraints: Constraints | None = None):
        if network.config.architecture != "decoder":
            raise ConfigError(f"a chat needs a decoder; this network is an {network.config.architecture}")
        self.network, self.stop_ids, self.constraints = network, tuple(stop_ids), constraints
        self.ids: list[int] = []  # those whose keys and values are in the cache
        self.cache: Cache | None = None

    @property
    def limit(self) -> int:
        """The most tokens of prompt and reply together: the context without virtual tokens."""
        return self.network.config.context - self.network.body.num_virtual_tokens

    def reply(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None = None,
        on_token: Callable[[int], object] | None = None,
    ) -> Reply:
        """Continue the conversation `prompt_ids` until a stop id, for at most max_new_tokens.

        on_token is called with each new token. KeyboardInterrupt ends the reply with the tokens so far. Errors (ConfigError):
        prompt and new tokens exceed `limit`; those of `generate`.
        """
        prompt_ids = list(prompt_ids)
        if len(prompt_ids) + max_new_tokens > self.limit:
            total = f"{len(prompt_ids):,} tokens and {max_new_tokens:,} new ones"
            raise ConfigError(f"{total} do not fit a context of {self.limit:,}")
        ids_1T = torch.tensor([prompt_ids], dtype=torch.long, device=next(self.network.parameters()).device)
        cached = self._keep(prompt_ids, ids_1T)
        new: list[int] = []
        ending: Literal["stop", "length", "interrupted"]

        def take(token_B: torch.Tensor) -> None:
            new.append(token_B.item())
            if on_token is not None:
                on_token(new[-1])

        options = asdict(sampling) | {"generator": generator, "constraints": self.constraints, "stop_ids": self.stop_ids}
        try:
            generate(self.network, ids_1T, max_new_tokens=max_new_tokens, cache=self.cache, on_token=take, **options)
            ending = "stop" if new and new[-1] in self.stop_ids else "length"
        except KeyboardInterrupt:
            ending = "interrupted"
        finally:
            self._settle([*prompt_ids, *new])
        return Reply(new, ending, len(prompt_ids) - cached, cached)

    def _keep(self, prompt_ids: list[int], ids_1T: torch.Tensor) -> int:
        """Truncate the cache to what the prompt begins with, and return that length. One token at least is left to read."""
        cached = min(common_prefix(self.ids, prompt_ids), len(prompt_ids) - 1) if self._is_reusable(prompt_ids) else 0
        if self.cache is None or not cached:
            self.cache = empty_cache(self.network, ids_1T, len(prompt_ids))
            cached = 0
        self.cache.truncate(cached)
        self.ids = self.ids[:cached]
        return cached

    def _is_reusable(self, prompt_ids: list[int]) -> bool:
        """Return True where a key depends on its token and earlier ones alone."""
        ropes = [spec.rope for spec in self.network.config.decoder_layers if spec.rope is not None]
        longest = max(len(self.ids), len(prompt_ids)) + self.network.body.num_virtual_tokens
        is_rescaled = any(rope.kind == "dynamic" and longest > rope.trained_context for rope in ropes)
        return not self.network.config.bidirectional_prompt and not is_rescaled

    def _settle(self, ids: list[int]) -> None:
        """Set `self.ids` to the part of `ids` that the cache holds in every layer; an interruption may have hit any of them."""
        layers, virtual = self.cache.layers, self.cache.num_virtual_tokens
        length = min(layer.length for layer in layers) - virtual
        sizes = {buffer.size(2) for layer in layers for buffer in (layer.key_BGSK, layer.value_BGSK)}
        if length <= 0 or len(sizes) > 1:
            self.cache, self.ids = None, []
            return
        self.cache.truncate(length)
        self.ids = ids[:length]
