"""Constraints on the next token: forced and forbidden ids, as in transformers' logits processors of the same names."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ConfigError
from model.decoding import Decoding


@dataclass(frozen=True)
class Constraints:
    """Ids that are forced or forbidden at some positions.

    min_length, min_new_tokens: the fewest tokens of a text, with and without its prompt. no_repeat_ngram: no n-gram occurs
    twice (0: off). forced_first: the id after a text's first token (BART's <s> after </s>). forced_last: the ids of which the
    last possible token is one. suppressed: forbidden everywhere; suppressed_first: forbidden as the first new token.
    """

    min_length: int = 0
    min_new_tokens: int = 0
    no_repeat_ngram: int = 0
    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("min_length", "min_new_tokens", "no_repeat_ngram"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")

    def apply(self, logits_BV: Tensor, text: Decoding, stop_ids: tuple[int, ...], *, last: bool) -> Tensor:
        """Set the logits B V of forbidden next tokens to -inf. last: no further token may follow."""
        new = text.end - text.prompt_length
        if self.no_repeat_ngram:
            logits_BV = logits_BV.masked_fill(repeated_ngrams(text, self.no_repeat_ngram, logits_BV.size(-1)), -torch.inf)
        if text.end < self.min_length or new < self.min_new_tokens:
            logits_BV = forbid(logits_BV, stop_ids)
        if self.forced_first is not None and text.end == 1:
            logits_BV = force(logits_BV, (self.forced_first,))
        if self.forced_last and last:
            logits_BV = force(logits_BV, self.forced_last)
        logits_BV = forbid(logits_BV, self.suppressed)
        return forbid(logits_BV, self.suppressed_first) if not new else logits_BV


def forbid(logits_BV: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Set the logits of the ids to -inf."""
    if not ids:
        return logits_BV
    place_I = torch.tensor([i for i in ids if i < logits_BV.size(-1)], dtype=torch.long, device=logits_BV.device)
    return logits_BV.index_fill(-1, place_I, -torch.inf)


def force(logits_BV: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Set the logits of the ids to 0 and all others to -inf."""
    place_I = torch.tensor(ids, dtype=torch.long, device=logits_BV.device)
    return torch.full_like(logits_BV, -torch.inf).index_fill(-1, place_I, 0.0)


def repeated_ngrams(text: Decoding, n: int, vocab_size: int) -> Tensor:
    """Return bool B V: the tokens that would complete an n-gram of the text. Pads count as tokens, as in transformers."""
    repeats = torch.zeros(text.ids_BT.size(0), vocab_size, dtype=torch.bool, device=text.ids_BT.device)
    for row, ids in enumerate(text.ids_BT[:, : text.end].tolist()):
        if len(ids) >= n:
            tail = ids[len(ids) - n + 1 :]
            ends = [ids[at + n - 1] for at in range(len(ids) - n + 1) if ids[at : at + n - 1] == tail]
            repeats[row, ends] = True
    return repeats
