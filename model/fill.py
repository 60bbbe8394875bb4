"""Mask filling by a masked-language model."""

from typing import NamedTuple

from torch import Tensor, nn

from model.config import ConfigError
from model.decoding import eval_mode
from model.heads import MaskedHead


class Guess(NamedTuple):
    """A token for a gap, with its probability."""

    id: int
    probability: float


def fill(network: nn.Module, input_ids: Tensor, mask_id: int, *, top: int = 5) -> list[list[Guess]]:
    """Return the `top` most probable tokens of each gap (mask_id) of one text, input_ids 1 T with special tokens.

    Each gap is filled while the others stay masked. Errors: no gap, or another head (ConfigError).
    """
    if not isinstance(network.head, MaskedHead):
        raise ConfigError(f"a network with the head {network.config.head!r} fills no gaps: a masked-language model does")
    if not 1 <= top <= network.config.vocab_size:
        raise ConfigError(f"top={top} is not from 1 to {network.config.vocab_size}")
    place_N = (input_ids[0] == mask_id).nonzero()[:, 0]
    if not len(place_N):
        raise ConfigError("the text has no gap: write [MASK] (or the tokenizer's own mask token) where one is")
    with eval_mode(network):
        logits_NV = network(input_ids).logits[0, place_N].float()
        if not bool(logits_NV.isfinite().all()):
            raise ConfigError("the network's logits are not finite: there is no best guess")
        best = logits_NV.softmax(-1).topk(top)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[Guess(*guess) for guess in zip(ids, values, strict=True)] for ids, values in pairs]
