"""Prefix language modelling: a bidirectional prefix of each row, and labels for the rest alone."""

import numpy as np
import torch
from torch import Tensor

from data.messages import format_count
from data.transforms.causal import IGNORE, clm_batch

STREAM = 0x707265666978  # "prefix", half of the key: separates these random numbers from other uses of the seed
VALIDATION_STEP = 2**64 - 1  # never reached in training: the fixed splits of validation


def prefix_batch(
    block_BT1: Tensor, *, seed: int, step: int, first_row: int, bos_id: int, eos_id: int | None = None
) -> dict[str, Tensor]:
    """Return inputs and labels of blocks of T + 1 tokens, in which every document begins with `bos_id`.

        visible_lengths[b]   the split, uniform in [1, T): the row's first tokens, its prefix
        labels[t]            as in data.transforms.causal from t = split - 1 on, whose target is the first token of the rest;
                             -100 before: these targets are visible
        input_ids, document_ids, position_ids   as in data.transforms.causal

    All are int64, of (B, T) or (B,). Packed documents stay apart: one that ends in the prefix is visible to itself alone and
    is not scored, and one that begins after the split has no prefix. The split of row r is a pure function of (seed, step,
    first_row + r), by Philox as in data.transforms.masked. Errors (ValueError): T < 2.
    Source: Liu et al. 2018, arXiv 1801.10198; Raffel et al. 2020, arXiv 1910.10683, section 3.2.1.

    >>> block = torch.tensor([[1, 5, 6, 7, 8, 9, 2]])
    >>> batch = prefix_batch(block, seed=0, step=0, first_row=0, bos_id=1, eos_id=2)
    >>> batch["visible_lengths"].tolist(), batch["labels"].tolist()
    ([3], [[-100, -100, 7, 8, 9, 2]])
    """
    rows, length = len(block_BT1), block_BT1.size(1) - 1
    if length < 2:
        raise ValueError(f"a row of {format_count(length, 'token')} cannot be split into a prefix and a rest")
    counter, key = np.array([first_row, 0, 0, step], dtype=np.uint64), np.array([seed, STREAM], dtype=np.uint64)
    word_B4 = np.random.Philox(counter=counter, key=key).random_raw(4 * rows).reshape(rows, 4)
    # The remainder of 64 bits is uniform up to T / 2^64.
    split_B = torch.from_numpy((1 + word_B4[:, 0] % np.uint64(length - 1)).astype(np.int64))
    batch = clm_batch(block_BT1, bos_id, eos_id)
    is_prefix_BT = torch.arange(length) < split_B[:, None] - 1
    return batch | {"labels": batch["labels"].masked_fill(is_prefix_BT, IGNORE), "visible_lengths": split_B}


def with_wrong_prefix(batch: dict[str, Tensor], bos_id: int) -> dict[str, Tensor]:
    """Return the batch with `shuffled_ids` (B, T): the ids, with each row's prefix replaced by that part of the next row.

    Every bos keeps its place, so that documents are the same. The last row gets those of the first; one row alone, its own.
    """
    input_BT = batch["input_ids"]
    other_BT = input_BT.roll(-1, 0)
    is_prefix_BT = torch.arange(input_BT.size(1)) < batch["visible_lengths"][:, None]
    is_replaced_BT = is_prefix_BT & (input_BT != bos_id) & (other_BT != bos_id)
    return batch | {"shuffled_ids": torch.where(is_replaced_BT, other_BT, input_BT)}
