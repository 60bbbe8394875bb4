"""Stopping criteria of generated texts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.config import ConfigError


class Stop:
    """A stopping criterion: a text ends with one of the ids, or as soon as it contains one of the strings.

    >>> stop = Stop(None, [7], ["b!"], lambda ids: "".join({1: "a", 2: "ab", 3: "!?", 7: ""}[i] for i in ids))
    >>> [stop.has_ended(torch.tensor([ids])).item() for ids in ([1, 2], [2, 3], [1, 7])]
    [False, True, True]
    """

    def __init__(
        self,
        eos_id: int | None = None,
        stop_ids: Sequence[int] = (),
        strings: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
    ):
        self.ids = tuple(dict.fromkeys((*([] if eos_id is None else [eos_id]), *stop_ids)))
        self.strings, self.decode = tuple(strings), decode
        self.is_active = bool(self.ids or self.strings)
        if self.strings and decode is None:
            raise ConfigError("stop_strings need decode: a function that turns a list of ids into text")
        if "" in self.strings:
            raise ConfigError("a stop string is empty: every text holds it")

    def is_stop(self, token: Tensor) -> Tensor:
        """Return True for each token that is a stop id; bool of token's shape."""
        stops = torch.zeros_like(token, dtype=torch.bool)
        for stop_id in self.ids:
            stops |= token == stop_id
        return stops

    def has_ended(self, new_BT: Tensor) -> Tensor:
        """Return bool B: rows that end with their last token. (Each whole text is decoded: a tail may depend on its start.)"""
        reached_B = self.is_stop(new_BT[:, -1])
        if self.strings:
            texts = [self.decode(ids) for ids in new_BT.tolist()]
            found = [any(string in text for string in self.strings) for text in texts]
            reached_B |= torch.tensor(found, device=new_BT.device)
        return reached_B

    def fill(self, pad_id: int | None) -> int:
        """Return the id that fills a row after its end: pad_id, else the first stop id, else 0."""
        return next((i for i in (pad_id, *self.ids) if i is not None), 0)
