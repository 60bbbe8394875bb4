"""The tag of each word of tokenized texts, in batches of similar length."""

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from model.predict import Text, batches_of_logits


def predicted_tags(
    network: nn.Module,
    texts: Sequence[Text],
    positions: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    pad_id: int = 0,
    progress: Callable[[list], Iterable] = iter,
) -> list[list[int]]:
    """Return the most probable label id at some positions of each text, in the order of the texts.

    positions: of each text, those of the first token of each word.
    """
    found: list[list[int]] = [[] for _ in texts]
    for places, logits_BTC in batches_of_logits(network, texts, batch_size=batch_size, pad_id=pad_id, progress=progress):
        for place, best_T in zip(places, logits_BTC.argmax(-1).tolist(), strict=True):
            found[place] = [best_T[position] for position in positions[place]]
    return found
