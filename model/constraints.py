"""What may not, or must, come next, whatever the network says: as transformers' logits processors of the same names decide."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ConfigError
from model.decoding import Decoding


@dataclass(frozen=True)
class Constraints:
    """Ids that are forced or forbidden at a place in the text.

    min_length, min_new_tokens: no text ends before it has so many tokens, its prompt counted or not. no_repeat_ngram: no n
    tokens come twice in a text (0: they may). forced_first: what a text of one token goes on with (BART's <s> after </s>).
    forced_last: what the last token that may come is one of. suppressed: never; suppressed_first: not as the first new token.
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
        """logits B V of the token that comes next; what it may not be becomes -inf. last: no other may follow it."""
        new = text.end - text.prompt
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
    if not ids:
        return logits_BV
    place_I = torch.tensor([i for i in ids if i < logits_BV.size(-1)], dtype=torch.long, device=logits_BV.device)
    return logits_BV.index_fill(-1, place_I, -torch.inf)


def force(logits_BV: Tensor, ids: tuple[int, ...]) -> Tensor:
    """All others -inf, these 0, so that whatever is drawn from it is one of them."""
    place_I = torch.tensor(ids, dtype=torch.long, device=logits_BV.device)
    return torch.full_like(logits_BV, -torch.inf).index_fill(-1, place_I, 0.0)


def repeated_ngrams(text: Decoding, n: int, vocab_size: int) -> Tensor:
    """bool B V: would this token end n tokens that the text holds already? Pads count as they stand, as in transformers."""
    repeats = torch.zeros(text.ids_BT.size(0), vocab_size, dtype=torch.bool, device=text.ids_BT.device)
    for row, ids in enumerate(text.ids_BT[:, : text.end].tolist()):
        if len(ids) >= n:
            tail = ids[len(ids) - n + 1 :]
            ends = [ids[at + n - 1] for at in range(len(ids) - n + 1) if ids[at : at + n - 1] == tail]
            repeats[row, ends] = True
    return repeats
