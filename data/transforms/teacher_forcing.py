"""Batches of an encoder-decoder from pairs of token arrays: special tokens around both, decoder inputs, labels, padding."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.packing.collate import pad_batch
from data.tokenizer.base import Tokenizer
from data.transforms.causal import IGNORE
from data.transforms.seq2seq import seq2seq_example

Pair = tuple[np.ndarray, np.ndarray]
SHUFFLED = "shuffled_"  # prefix of the keys of another row's source


class Frame(NamedTuple):
    """The special ids of an encoder-decoder's batch: before and behind each text, the decoder's first id, padding."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    start_id: int
    pad_id: int


def frame_of(tokenizer: Tokenizer, start_id: int, *, prefix: bool = True) -> Frame:
    """Return a tokenizer's frame: its affixes, with eos at the end in any case. prefix=False: nothing before a text, as T5."""
    before, behind = tokenizer.affixes
    pads = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unknown_id, 0)
    pad_id = next(id for id in pads if id is not None)
    return Frame(before if prefix else (), behind or (tokenizer.eos_id,), start_id, pad_id)


def seq2seq_batch(pairs: Sequence[Pair | None], frame: Frame, max_source: int | None = None) -> dict[str, Tensor]:
    """Return the batch for teacher forcing of pairs (source, target) without special tokens; a row for None is not scored.

        source              prefix + source + suffix, cut to max_source before its suffix
        labels              prefix + target + suffix
        decoder_input_ids   start_id, then labels[t - 1]
        attention_mask      (B, S), only where sources differ in length

    int64 of (B, S) and (B, T), padded on the right: labels by -100, and ids by pad_id after the shift, as transformers'
    `shift_tokens_right`; the decoder's padding follows all scored positions.
    """
    before, behind = np.array(frame.prefix, dtype=np.int64), np.array(frame.suffix, dtype=np.int64)
    empty = np.empty(0, dtype=np.int64)
    units = []
    for pair in pairs:
        source, target = pair or (empty, empty)
        if max_source is not None:
            source = source[: max_source - len(before) - len(behind)]
        source, target = (np.concatenate((before, ids, behind)).astype(np.int64) for ids in (source, target))
        example = seq2seq_example(source, target, frame.start_id)
        units.append([example if pair else example._replace(labels=np.full_like(example.labels, IGNORE))])
    exact = (max(len(unit[0].ids) for unit in units), max(len(unit[0].source_ids) for unit in units))
    batch = pad_batch(units, frame.pad_id, max_lengths=exact)
    if batch["attention_mask"].all():
        del batch["attention_mask"]
    return batch


def with_shuffled_sources(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the source of another row: each scored row has that of the scored row before it, the first that of the last.

    Unchanged where fewer than two rows are scored. It is done here, for the whole batch, so that it does not depend on ranks.

    >>> batch = {"input_ids": torch.tensor([[5], [6], [7], [8]]), "labels": torch.tensor([[1], [IGNORE], [2], [3]])}
    >>> with_shuffled_sources(batch)["shuffled_input_ids"].tolist()
    [[8], [6], [5], [7]]
    """
    scored = (batch["labels"] != IGNORE).any(1).nonzero()[:, 0]
    if len(scored) < 2:
        return batch
    order_B = torch.arange(len(batch["labels"]))
    order_B[scored] = scored.roll(1)
    return batch | {SHUFFLED + key: batch[key][order_B] for key in ("input_ids", "attention_mask") if key in batch}
