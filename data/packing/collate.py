"""Collate the examples of some rows into one batch of tensors: any keys, padded or packed."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from data.config import DataError
from data.example import Example, Unit
from data.transforms.causal import IGNORE

PAD_MULTIPLE = 8  # padded lengths are multiples of it
PADDING_DOCUMENT = -2  # document id of padding; virtual tokens have -1 (model.virtual_tokens)
GROUP = "group"  # key of a batch: rows with one number stay together


def pad_batch(
    units: Sequence[Unit],
    pad_id: int,
    *,
    max_lengths: tuple[int, ...] | None = None,
    sequence_level: Collection[str] = (),
) -> dict[str, Tensor]:
    """Return a batch, one example a row, right-padded to the longest (rounded up to a multiple of 8, at most `max_lengths`).

        input_ids, attention_mask (B, T)       of ids; with a source (B, S) of it, and ids are decoder_input_ids (B, T)
        labels (B, T), (B,) or (B, C)          -100 in padding
        group (B,)                             if a unit has several rows: the unit's number in each
        and the keys of `extra`: (B, T), 0 in padding, or (B, …)

    `sequence_level`: keys with values for the whole text, though their shape may look like one value a token (5 classes, 5
    tokens). The decoder of an encoder-decoder needs no mask: it is causal, and its padding follows all scored positions.
    """
    examples = [example for unit in units for example in unit]
    keys, sequence_level = extra_keys(examples), {*sequence_level, *sequence_level_keys(examples)}
    lengths = np.array([example.lengths for example in examples]).max(0)
    room = [-(-int(length) // PAD_MULTIPLE) * PAD_MULTIPLE for length in lengths]
    room = room if max_lengths is None else [max(int(n), min(r, m)) for n, r, m in zip(lengths, room, max_lengths, strict=True)]
    batch = {"input_ids": pad_rows([e.ids for e in examples], room[0], pad_id)}
    batch["attention_mask"] = pad_rows([np.ones(len(e.ids), np.int64) for e in examples], room[0], 0)
    if examples[0].source_ids is not None:
        batch = {
            "input_ids": pad_rows([e.source_ids for e in examples], room[1], pad_id),
            "attention_mask": pad_rows([np.ones(len(e.source_ids), np.int64) for e in examples], room[1], 0),
            "decoder_input_ids": batch["input_ids"],
        }
    batch["labels"] = stack_or_pad([e.labels for e in examples], "labels" not in sequence_level, room[0], IGNORE)
    for key in keys:
        batch[key] = stack_or_pad([np.asarray(e.extra[key]) for e in examples], key not in sequence_level, room[0], 0)
    if len(examples) > len(units):
        batch[GROUP] = torch.tensor([number for number, unit in enumerate(units) for _ in unit])
    return batch


def pack_batch(packs: Sequence[Sequence[Unit]], pad_id: int, max_lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Return a batch, the units of each pack side by side in a row of max_lengths[0] tokens (max_lengths[1] of the source).

        input_ids, labels, document_ids, position_ids (B, T); with a source:
        input_ids, document_ids, position_ids (B, S) of the source,
        decoder_input_ids, decoder_document_ids, decoder_position_ids, labels (B, T) of the target
        and the keys of `extra`, (B, T)

    document_ids number the examples of a row from 0, the same for source and target, and are -2 in padding; position_ids begin
    at 0 in each. Errors: DataError for values of whole texts.
    """
    rows_of = [[example for unit in pack for example in unit] for pack in packs]
    keys = extra_keys([e for examples in rows_of for e in examples])
    for example in (e for examples in rows_of for e in examples):
        for key in sequence_level_keys([example]):
            shape = np.shape(example.labels if key == "labels" else example.extra[key])
            raise DataError(f"{key} of shape {shape} are of a whole text: such examples are padded, not packed")
    batch = packed_inputs([[e.ids for e in examples] for examples in rows_of], max_lengths[0], pad_id)
    if rows_of[0][0].source_ids is not None:
        source = packed_inputs([[e.source_ids for e in examples] for examples in rows_of], max_lengths[1], pad_id)
        batch = source | {f"decoder_{key}": value for key, value in batch.items()}
    batch["labels"] = pack_rows([[e.labels for e in examples] for examples in rows_of], max_lengths[0], IGNORE)
    for key in keys:
        batch[key] = pack_rows([[np.asarray(e.extra[key]) for e in examples] for examples in rows_of], max_lengths[0], 0)
    return batch


def extra_keys(examples: Sequence[Example]) -> list[str]:
    """Return the keys of `extra`. Errors (DataError): no example; examples with different keys."""
    if not examples:
        raise DataError("a batch has one example at least")
    keys, has_source = examples[0].extra.keys(), examples[0].source_ids is not None
    for example in examples:
        if example.extra.keys() != keys:
            raise DataError(f"examples of one task have the same keys: {sorted(keys)}, and {sorted(example.extra)}")
        if (example.source_ids is not None) != has_source:
            raise DataError("either all examples of one task have source_ids, or none")
    return list(keys)


def sequence_level_keys(examples: Sequence[Example]) -> set[str]:
    """Return the keys with one value for the whole text: their shape differs from that of the ids."""
    keys = {key for e in examples for key, value in e.extra.items() if np.shape(value) != e.ids.shape}
    return keys | {"labels" for e in examples if e.labels.shape != e.ids.shape}


def pad_rows(arrays: Sequence[np.ndarray], room: int, filler: int) -> Tensor:
    """Return (B, T): each array on the left, then `filler`."""
    dtype = np.result_type(*arrays) if any(np.issubdtype(a.dtype, np.floating) for a in arrays) else np.int64
    table_BT = np.full((len(arrays), room), filler, dtype=dtype)
    for row, array in zip(table_BT, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(table_BT)


def stack_or_pad(arrays: Sequence[np.ndarray], is_token_level: bool, room: int, filler: int) -> Tensor:
    """Return (B, T) of arrays with a value a position, else (B, …)."""
    if is_token_level:
        return pad_rows(arrays, room, filler)
    if len(shapes := sorted({array.shape for array in arrays})) > 1:
        raise DataError(f"a key of whole texts has one shape in all examples, and here {' and '.join(map(str, shapes))}")
    return torch.from_numpy(np.stack(arrays))


def pack_rows(arrays: Sequence[Sequence[np.ndarray]], room: int, filler: int) -> Tensor:
    """Return (B, T): the arrays of each row joined, then `filler`."""
    return pad_rows([np.concatenate(several) for several in arrays], room, filler)


def packed_inputs(ids: Sequence[Sequence[np.ndarray]], room: int, pad_id: int) -> dict[str, Tensor]:
    """Return input_ids, document_ids and position_ids, each (B, T)."""
    documents = [[np.full(len(array), number) for number, array in enumerate(several)] for several in ids]
    positions = [[np.arange(len(array)) for array in several] for several in ids]
    return {
        "input_ids": pack_rows(ids, room, pad_id),
        "document_ids": pack_rows(documents, room, PADDING_DOCUMENT),
        "position_ids": pack_rows(positions, room, 0),
    }
