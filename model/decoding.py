"""Autoregressive decoding: the state of a batch of texts that grow a token at a time, for `generate` and `beam`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.cache import Cache
from model.config import ConfigError


class Decoding:
    """The texts so far, with their key-value cache: `next_logits`, `append`, `reorder`, `select`.

    input_ids B S, attention_mask B S: 1 real, 0 pad (a decoder's prompt is left-padded). A decoder continues them; an
    encoder-decoder encodes them once, and its text begins with config.decoder_start_id. Each row is repeated `copies` times,
    adjacent, for beams.

    The cache is no larger than the text can become. Beyond the network's context a row's window slides: its last half is read
    again, and the text continues from there. A row's window slides when it would if the row were alone, but all rows are then
    read again. Relative positions (T5) have no such limit.

    cache: of a decoder's only row, with the first tokens of input_ids or none; it grows with the text, and stays the caller's.

    With config.bidirectional_prompt the positions of input_ids, as far as they are in the window, see each other in both
    directions; new tokens are causal.
    """

    def __init__(
        self,
        network: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        use_cache: bool = True,
        cache: Cache | None = None,
        copies: int = 1,
    ):
        _check(network, input_ids, attention_mask, max_new_tokens)
        config = network.config
        self.network, self.config, self.use_cache = network, config, use_cache
        mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.encoder_hidden = self.encoder_mask = None
        if config.architecture == "encoder-decoder":
            self.encoder_mask = mask_BS.repeat_interleave(copies, 0) if (mask_BS == 0).any() else None
            encoder_hidden_BSD = network.body.encode(input_ids, attention_mask).hidden
            self.encoder_hidden = encoder_hidden_BSD.repeat_interleave(copies, 0)
            input_ids = torch.full_like(input_ids[:, :1], config.decoder_start_id)
            mask_BS = torch.ones_like(input_ids)
        self.padded = bool((mask_BS == 0).any())
        rest = input_ids.new_zeros(input_ids.size(0), max_new_tokens)
        self.ids_BT = torch.cat((input_ids, rest), dim=1).repeat_interleave(copies, 0)
        self.mask_BT = torch.cat((mask_BS, torch.ones_like(rest)), dim=1).repeat_interleave(copies, 0)
        self.prompt_length = self.end = input_ids.size(1)  # given tokens, and all tokens so far
        self.limit = config.context - network.body.num_virtual_tokens if config.position != "relative" else self.ids_BT.size(1)
        first_B1 = (mask_BS != 0).int().argmax(dim=1, keepdim=True).repeat_interleave(copies, 0)  # the first real token
        self.first_B1 = first_B1.clamp(min=self.end - self.limit)  # first column of a row's window; equal for beams of an input
        self.start = int(self.first_B1.min())  # first column of the batch's window
        self.cached_end = self.start  # the cache holds the window up to here
        self.cache = cache
        if cache is not None:
            _check_cache(cache, self)
            self.cached_end = cache.text_length

    def next_logits(self) -> Tensor:
        """Return the logits B V of the next token. Errors: non-finite logits (ConfigError)."""
        if self.end - self.start > self.limit:  # slide by half a window, once in limit / 2 tokens
            full_B1 = self.end - self.first_B1 > self.limit
            self.first_B1 = self.first_B1.masked_fill(full_B1, self.end - (self.limit // 2 or 1))
            self.start = self.cached_end = int(self.first_B1.min())
            self.cache = None
        if self.cache is None and self.use_cache:
            self.cache = empty_cache(self.network, self.ids_BT, min(self.limit, self.ids_BT.size(1)))
        elif self.cache is not None and self.end - self.start > self.cache.capacity:  # a caller's: doubled
            self.cache.grow(max(self.end - self.start, min(2 * self.cache.capacity, self.limit)))
        unread_BT = self.ids_BT[:, self.cached_end : self.end]
        mask_BT = None
        if self.padded:
            column_T = torch.arange(self.start, self.end, device=self.first_B1.device)
            mask_BT = self.mask_BT[:, self.start : self.end] * (column_T >= self.first_B1)
        if self.encoder_hidden is None:
            hidden_BTD = self.network.body(unread_BT, mask_BT, cache=self.cache, **self._visible()).hidden
        else:
            options = {"decoder_input_ids": unread_BT, "encoder_hidden": self.encoder_hidden, "cache": self.cache}
            hidden_BTD = self.network.body(None, self.encoder_mask, **options).hidden
        if self.use_cache:
            self.cached_end = self.end
        logits_BV = self.network.head(hidden_BTD[:, -1])
        if not bool(logits_BV.amax(-1).isfinite().all()):  # the maximum: -inf is a token of probability 0
            raise ConfigError(f"the network's logits are not finite (in {str(logits_BV.dtype).removeprefix('torch.')})")
        return logits_BV

    def _visible(self) -> dict[str, Tensor]:
        """Return the body's `visible_lengths` where a bidirectional prompt is read: its tokens that are in the window."""
        length = self.prompt_length - self.start
        if not self.config.bidirectional_prompt or self.cached_end >= self.prompt_length:
            return {}
        return {"visible_lengths": torch.full_like(self.first_B1[:, 0], length)}

    def append(self, token_B: Tensor) -> None:
        """Append a token to each row."""
        self.ids_BT[:, self.end] = token_B
        self.end += 1

    def reorder(self, row_B: Tensor) -> None:
        """Replace row b by row row_B[b] of the same input."""
        self.ids_BT = self.ids_BT[row_B]
        if self.cache is not None:
            self.cache.reorder(row_B)

    def select(self, row_B: Tensor) -> None:
        """Make row row_B[b] row b of as many rows as row_B has: rows can be dropped, moved and repeated.

        For a decoder. Columns before the first token of all rows leave the window: it is as long as its longest row. Rows that
        stay in place are not copied: to drop a row, move the last one into its place.
        """
        self.ids_BT, self.mask_BT, self.first_B1 = self.ids_BT[row_B], self.mask_BT[row_B], self.first_B1[row_B]
        start = min(int(self.first_B1.min()), self.cached_end)
        if self.cache is not None:
            self.cache.select(row_B, skip=start - self.start)
        self.start = start
        self.padded = bool((self.mask_BT[:, start : self.end] == 0).any())

    @property
    def new_BT(self) -> Tensor:
        """The appended tokens so far, B N."""
        return self.ids_BT[:, self.prompt_length : self.end]


def seen_tokens(text: Decoding, vocab_size: int) -> Tensor:
    """Return bool B V: the ids that the texts hold so far, without pads."""
    ids_BT, real_BT = text.ids_BT[:, : text.end], text.mask_BT[:, : text.end].long()
    return ids_BT.new_zeros(ids_BT.size(0), vocab_size).scatter_add_(1, ids_BT, real_BT) > 0


def empty_cache(network: nn.Module, ids_BT: Tensor, capacity: int) -> Cache:
    """Return an empty key-value cache for rows like ids_BT, in the dtype and on the device of the network's embeddings."""
    stack = getattr(network.body, "decoder", network.body)
    embedded = stack.embed_tokens(ids_BT[:1, :1])
    return Cache(network.config, ids_BT.size(0), capacity, embedded.dtype, embedded.device)


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Turn off dropout and gradients; the network's mode is restored afterwards."""
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        network.train(was_training)


def _check(network: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> None:
    config = network.config
    if config.architecture == "encoder":
        raise ConfigError(f"{config.family} of this config is an encoder: it fills gaps, and cannot continue a text")
    if config.head != "lm":
        raise ConfigError(f"a network with the head {config.head!r} generates no text; it needs the head 'lm'")
    if config.architecture == "encoder-decoder" and config.decoder_start_id is None:
        raise ConfigError("this encoder-decoder has no decoder_start_id: the first id of its output is unknown")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must not be negative")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ConfigError(f"attention_mask of shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}")
    if input_ids.ndim != 2 or input_ids.size(1) == 0:
        raise ConfigError(f"input_ids of shape {tuple(input_ids.shape)}: expected (batch, at least one token)")


def _check_cache(cache: Cache, text: Decoding) -> None:
    rows, given = text.ids_BT.size(0), text.prompt_length
    if text.config.architecture != "decoder" or rows != 1 or text.padded:
        given = f"{rows} {'padded ' * text.padded}of an {text.config.architecture}"
        raise ConfigError(f"a caller's cache is for one text of a decoder, not for {given}")
    if given > text.limit:
        raise ConfigError(f"{given} tokens do not fit the {text.limit} of the context, as a caller's cache needs")
    if cache.text_length >= given:
        raise ConfigError(f"the cache holds {cache.text_length} positions of a text of {given}: one at least must be read")
    if cache.text_length and text.config.bidirectional_prompt:
        raise ConfigError("a bidirectional prompt is read at once: its cache must be empty")
