"""Causal language modelling: inputs and labels of blocks of packed documents."""

import torch
from torch import Tensor

IGNORE = -100  # a label that is not scored


def clm_batch(block_BT1: Tensor, bos_id: int, eos_id: int | None = None) -> dict[str, Tensor]:
    """Return inputs and labels of blocks of T + 1 tokens, in which every document begins with `bos_id`.

        input_ids[t]     block[t]; bos where block[t] is a filler (< 0)
        labels[t]        block[t + 1], the target of position t; -100 where it is bos (the next document is random) or a filler
        document_ids[t]  0 for the first document of the row, one more at each bos
        position_ids[t]  t - (position of the last bos at or before t, or 0)

    All are int64 of (B, T). No other label is masked: an eos is a target like any other. If `eos_id` equals `bos_id`, the bos
    that ends a document is a target too; only the second of two in a row, at the joint of the ring, is not.

    >>> batch = clm_batch(torch.tensor([[7, 8, 2, 1, 5, 6]]), bos_id=1)
    >>> batch["labels"].tolist(), batch["document_ids"].tolist(), batch["position_ids"].tolist()
    ([[8, 2, -100, 5, 6]], [[0, 0, 0, 1, 1]], [[0, 1, 2, 0, 1]])
    >>> clm_batch(torch.tensor([[7, 8, 0, 0, 5, -1]]), bos_id=0, eos_id=0)["labels"].tolist()
    [[8, 0, -100, 5, -100]]
    """
    block_BT1, filler_BT1 = block_BT1.clamp(min=0), block_BT1 < 0
    input_BT, target_BT = block_BT1[:, :-1].masked_fill(filler_BT1[:, :-1], bos_id), block_BT1[:, 1:]
    ignored_BT = filler_BT1[:, 1:] | (target_BT == bos_id if bos_id != eos_id else (target_BT == bos_id) & (input_BT == bos_id))
    return {
        "input_ids": input_BT,
        "labels": target_BT.masked_fill(ignored_BT, IGNORE),
        **document_positions(input_BT, bos_id),
    }


def document_positions(input_BT: Tensor, bos_id: int) -> dict[str, Tensor]:
    """Return document_ids and position_ids of rows of packed documents, each beginning with `bos_id`."""
    starts_BT = input_BT == bos_id
    document_BT = starts_BT.cumsum(-1)
    position_T = torch.arange(input_BT.size(-1), device=input_BT.device)
    start_BT = torch.where(starts_BT, position_T, 0).cummax(-1).values
    return {"document_ids": document_BT - document_BT[:, :1], "position_ids": position_T - start_BT}
