"""Class probabilities of many texts, in batches of similar length; results in the order of the texts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import ConfigError
from model.decoding import eval_mode

MULTI_LABEL, REGRESSION = "multi_label_classification", "regression"  # problem_type of config.json


class Text(NamedTuple):
    """One tokenized text: ids with its special tokens, and token types."""

    ids: Sequence[int]
    types: Sequence[int] | None = None


def is_multi_label(network: nn.Module) -> bool:
    """Return True where the classes of a text are independent labels."""
    return network.config.extra.get("problem_type") == MULTI_LABEL


def is_regression(network: nn.Module) -> bool:
    """Return True where a text has a number instead of classes: problem_type regression, or one label, as in transformers."""
    kind = network.config.extra.get("problem_type")
    return kind == REGRESSION or (network.config.labels == 1 and kind != MULTI_LABEL)


def check_classifier(network: nn.Module, name: str) -> None:
    """Raise ConfigError where a network has neither classes nor one number of a whole text."""
    config = network.config
    if config.head != "sequence":
        raise ConfigError(f"{name} has the head {config.head!r}, which classifies no texts: train one, --objective classify")
    if is_regression(network) and config.labels != 1:
        raise ConfigError(f"{name} gives {config.labels} numbers a text (problem_type regression): one is supported")


def numbers(
    network: nn.Module,
    texts: Sequence[Text],
    *,
    batch_size: int = 32,
    pad_id: int = 0,
    progress: Callable[[list], Iterable] = iter,
) -> Tensor:
    """Return the number of each text, N, on the CPU: the only logit of a network for regression."""
    found_N = torch.zeros(len(texts))
    for places, logits_B1 in batches_of_logits(network, texts, batch_size=batch_size, pad_id=pad_id, progress=progress):
        found_N = found_N.to(logits_B1.dtype)
        found_N[places] = logits_B1[:, 0].cpu()
    return found_N


def probabilities(
    network: nn.Module,
    texts: Sequence[Text],
    *,
    batch_size: int = 32,
    pad_id: int = 0,
    progress: Callable[[list], Iterable] = iter,
) -> Tensor:
    """Return the probabilities N C, on the CPU: softmax over classes, or the sigmoid of each label if multi-label."""
    several, found = is_multi_label(network), {}
    for places, logits_BC in batches_of_logits(network, texts, batch_size=batch_size, pad_id=pad_id, progress=progress):
        probability_BC = logits_BC.sigmoid() if several else logits_BC.softmax(-1)
        found |= dict(zip(places, probability_BC.cpu(), strict=True))
    return torch.stack([found[place] for place in range(len(texts))])


def batches_of_logits(
    network: nn.Module,
    texts: Sequence[Text],
    *,
    batch_size: int = 32,
    pad_id: int = 0,
    progress: Callable[[list], Iterable] = iter,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the places of some texts and their logits, B C or B T C, in float32 at least; the longest texts first.

    Texts of similar length share a batch, right-padded to the longest: out of memory fails early.
    """
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place].ids))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    device = next(network.parameters()).device
    with eval_mode(network):
        for places in progress(batches):
            inputs = pad_batch([texts[place] for place in places], pad_id, types=network.config.token_types > 1)
            logits = network(**{name: value.to(device) for name, value in inputs.items()}).logits
            yield places, logits.to(torch.promote_types(logits.dtype, torch.float32))


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
