"""Inputs of BERTScore: token ids with special tokens, idf weights, and bert-score's baseline files."""

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor


def token_ids(text: str, tokenizer: object) -> list[int]:
    """Encode a text between its special tokens: bos (unless it equals eos), text, eos."""
    if not isinstance(text, str):
        raise TypeError(f"a text is a str, got {type(text).__name__}: {text!r:.80}")
    begin = [tokenizer.bos_id] if tokenizer.bos_id != tokenizer.eos_id else []
    return [*begin, *tokenizer.encode(text.strip()), tokenizer.eos_id]


def truncate(ids: list[int], max_length: int | None) -> list[int]:
    """Truncate to `max_length` ids, keeping the final special token.

    >>> truncate([1, 7, 8, 9, 2], 4)
    [1, 7, 8, 2]
    """
    return ids if max_length is None or len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]


def idf_weights(
    references: Sequence[Sequence[str | None]], tokenizer: object, *, max_length: int | None = None
) -> Mapping[int, float]:
    """Inverse document frequencies of token ids: id → log((M + 1) / (df + 1)), where df of all M references contain the id.

    `references` are streams, None where missing; an id in no reference has log(M + 1). Errors: a bare string in place of a
    list (TypeError).
    Source: Zhang et al. 2020, arXiv 1904.09675, section 3; the + 1 in both counts is bert-score's.
    """
    if isinstance(references, str) or any(isinstance(stream, str) for stream in references):
        raise TypeError("references are streams, [[first of example 0, first of example 1, …], …]: got a string among them")
    document_frequency, total = Counter(), 0
    for text in (text for stream in references for text in stream if text is not None):
        document_frequency.update(set(truncate(token_ids(text, tokenizer), max_length)))
        total += 1
    weights = {id: math.log((total + 1) / (count + 1)) for id, count in document_frequency.items()}
    return defaultdict(partial(float, math.log(total + 1)), weights)


def read_baseline(path: str | Path, layer: int) -> Tensor:
    """Read the baseline P, R and F of a layer, (3,) float64. Errors: no such layer or columns, a value from 1 (ValueError)."""
    lines = Path(path).read_text(encoding="utf-8").replace("\t", ",").splitlines()
    for row in csv.DictReader(lines):
        try:
            if int(row["LAYER"]) != layer:
                continue
            values = [float(row[part]) for part in "PRF"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: not a baseline, whose lines are LAYER,P,R,F and a row a layer; found {row}") from None
        if not all(value < 1 for value in values):
            raise ValueError(f"{path}: a baseline is below 1, that of layer {layer} is {values}")
        return torch.tensor(values, dtype=torch.float64)
    raise ValueError(f"{path} has no baseline of layer {layer}")
