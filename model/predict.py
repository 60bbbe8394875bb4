"""Class probabilities of many texts, in batches of similar length; results in the order of the texts."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import ConfigError
from model.decoding import eval_mode

MULTI_LABEL = "multi_label_classification"  # problem_type of config.json


class Text(NamedTuple):
    """One tokenized text: ids with its special tokens, and token types."""

    ids: Sequence[int]
    types: Sequence[int] | None = None


def is_multi_label(network: nn.Module) -> bool:
    """Return True where the classes of a text are independent labels."""
    return network.config.extra.get("problem_type") == MULTI_LABEL


def check_classifier(network: nn.Module, name: str) -> None:
    """Raise ConfigError where a network does not classify whole texts."""
    config = network.config
    if config.head != "sequence":
        raise ConfigError(f"{name} has the head {config.head!r}, which classifies no texts: train one, --objective classify")
    if config.extra.get("problem_type") == "regression" or (config.labels == 1 and not is_multi_label(network)):
        raise ConfigError(f"{name} gives a number (problem_type regression), not probabilities of classes")


def probabilities(
    network: nn.Module,
    texts: Sequence[Text],
    *,
    batch_size: int = 32,
    pad_id: int = 0,
    progress: Callable[[list], Iterable] = iter,
) -> Tensor:
    """Return the probabilities N C, on the CPU: softmax over classes, or the sigmoid of each label if multi-label."""
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place].ids))  # the longest first: out of memory fails early
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    device, several, found = next(network.parameters()).device, is_multi_label(network), {}
    with eval_mode(network):
        for batch in progress(batches):
            inputs = pad_batch([texts[place] for place in batch], pad_id, types=network.config.token_types > 1)
            logits_BC = network(**{name: value.to(device) for name, value in inputs.items()}).logits
            logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
            probability_BC = logits_BC.sigmoid() if several else logits_BC.softmax(-1)
            found |= dict(zip(batch, probability_BC.cpu(), strict=True))
    return torch.stack([found[place] for place in range(len(texts))])


def pad_batch(texts: Sequence[Text], pad_id: int, *, types: bool) -> dict[str, Tensor]:
    """Return a batch of input_ids, attention_mask and, with `types`, token_type_ids, B T, right-padded."""
    length = max(len(text.ids) for text in texts)
    ids_BT = torch.full((len(texts), length), pad_id)
    mask_BT, type_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text.ids)] = torch.tensor(text.ids)
        mask_BT[row, : len(text.ids)] = 1
        if text.types is not None:
            type_BT[row, : len(text.ids)] = torch.tensor(text.types)
    return {"input_ids": ids_BT, "attention_mask": mask_BT} | ({"token_type_ids": type_BT} if types else {})


def predicted_labels(
    labels: Sequence[str], probability_C: Tensor, *, multi: bool, threshold: float = 0.5
) -> tuple[str, ...]:
    """Return the most probable class, or with `multi` all labels more probable than the threshold."""
    if multi:
        return tuple(name for name, chance in zip(labels, probability_C.tolist(), strict=True) if chance > threshold)
    return (labels[int(probability_C.argmax())],)
