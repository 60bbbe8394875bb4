"""Next-sentence prediction: pairs of segments as rows with special tokens, masked, and a label a pair."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.config import DataError
from data.packing.blocks import FILLER
from data.packing.segments import SegmentPair
from data.tokenizer.base import Tokenizer
from data.transforms.causal import IGNORE
from data.transforms.framing import FIRST, SECOND, Piece, pair_template
from data.transforms.masked import mask_tokens


def segment_template(tokenizer: Tokenizer) -> tuple[Piece, ...]:
    """Return the tokenizer's template of two texts, as [CLS] A [SEP] B [SEP].

    Errors (DataError): no special token at the beginning, which the head of next-sentence prediction reads, or between the two.
    """
    template = pair_template(tokenizer)
    pieces = [piece for piece, _ in template]
    first, second = pieces.index(FIRST), pieces.index(SECOND)
    for is_missing, where in ((first == 0, "before the first"), (second == first + 1, "between the two")):
        if is_missing:
            raise DataError(
                f"--mlm.nsp: this tokenizer has no special token {where} of two texts: its post-processor adds none. Train a "
                "tokenizer on the corpus (no --init), take one with [CLS] and [SEP], or leave --mlm.nsp out"
            )
    return template


def special_count(template: Sequence[Piece]) -> int:
    """Count the special tokens of a template."""
    return sum(piece not in (FIRST, SECOND) for piece, _ in template)


def next_sentence_batch(
    pairs: Sequence[SegmentPair],
    template: Sequence[Piece],
    *,
    length: int,
    pad_id: int,
    scored: int | None = None,
    **masking: Any,
) -> dict[str, Tensor]:
    """Return inputs and labels of pairs of segments, one a row of `length` tokens, padded on the right.

        input_ids, labels   (B, T) of `data.transforms.masked.mask_tokens` with `masking`; pad_id and -100 in padding
        attention_mask      (B, T) 0 in padding
        token_type_ids      (B, T) by the template: 0 for the first segment, 1 for the second in BERT's; 0 in padding
        pair_labels         (B,)   0: the second is the next segment, 1: it is not, as of transformers' BertForPreTraining

    scored: rows from it on only fill a batch, and have labels of -100. All are int64. An id that begins documents may stand in
    a row twice (<s> A </s> <s> B </s>): its position is that in the row, and both segments see each other.
    """
    ids_BT = torch.full((len(pairs), length), FILLER)
    type_BT = torch.zeros_like(ids_BT)
    for row, pair in enumerate(pairs):
        end = 0
        for piece, kind in template:
            part = torch.from_numpy({FIRST: pair.first, SECOND: pair.second}[piece]) if isinstance(piece, str) else [piece]
            ids_BT[row, end : end + len(part)] = torch.as_tensor(part)
            type_BT[row, end : end + len(part)] = kind
            end += len(part)
    input_ids, labels = mask_tokens(ids_BT, **masking)
    pair_labels = torch.tensor([pair.label for pair in pairs])
    if scored is not None:
        labels[scored:] = IGNORE
        pair_labels[scored:] = IGNORE
    return {
        "input_ids": input_ids.masked_fill(ids_BT < 0, pad_id),
        "labels": labels,
        "attention_mask": (ids_BT >= 0).long(),
        "token_type_ids": type_BT,
        "pair_labels": pair_labels,
    }
