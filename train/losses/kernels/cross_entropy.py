"""The rows' losses of a chunk of logits, and the gradient of the logits in place: one pass that reads, one that writes.

The kernel of Hsu et al. 2024, arXiv 2410.10989, section 3.2, written anew: the maximum and the sum of exponentials of a row
come from one pass (online softmax: Milakov & Gimelshein 2018, arXiv 1805.02867, algorithm 3), in float32 for any dtype of the
logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements of a row at a time: 16 a thread, in registers
WARPS = 8


@triton.jit
def row_loss_kernel(
    logits_ptr,
    labels_ptr,
    loss_ptr,
    row_stride,
    column_stride,
    vocab_size,
    smoothing,
    z_loss,
    scale,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Compute the loss of row n in program n: as `train.losses.chunked.row_loss_`."""
    row = tl.program_id(0).to(tl.int64)  # rows × V passes 2^31
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row)
    columns = tl.arange(0, BLOCK)

    # Online softmax: `top` is the largest logit so far and total = Σ exp(x - top); when top grows, total shrinks by
    # exp(old - new). It starts finite, since -inf - -inf is NaN where logits are -inf.
    top = -3.4028234663852886e38
    total = 0.0
    sum_x = 0.0
    label_x = 0.0
    for start in range(0, vocab_size, BLOCK):
        column = start + columns
        inside = column < vocab_size
        x = tl.load(logits_ptr + column.to(tl.int64) * column_stride, mask=inside, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), 0)
        top = new_top
        sum_x += tl.sum(tl.where(inside, x, 0.0), 0)
        label_x += tl.sum(tl.where(column == label, x, 0.0), 0)
    lse = top + tl.log(total)
    loss = lse - (1 - smoothing) * label_x + z_loss * lse * lse
    if smoothing > 0:  # not times 0: the mean of a row with a logit of -inf is -inf
        loss -= smoothing * sum_x / vocab_size
    loss = tl.where((label >= 0) & (label < vocab_size), loss, float("nan"))  # a label outside the vocabulary must show
    tl.store(loss_ptr + row, loss)

    if GRADIENT:
        factor = scale * (1 + 2 * z_loss * lse)
        uniform = scale * smoothing / vocab_size
        for start in range(0, vocab_size, BLOCK):
            column = start + columns
            inside = column < vocab_size
            x_ptr = logits_ptr + column.to(tl.int64) * column_stride
            x = tl.load(x_ptr, mask=inside, other=-float("inf")).to(tl.float32)
            gradient = factor * tl.exp(x - lse) - uniform
            gradient -= tl.where(column == label, scale * (1 - smoothing), 0.0)
            tl.store(x_ptr, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def row_loss_(logits_RV: Tensor, labels_R: Tensor, *, smoothing: float, z_loss: float, scale: float | None) -> Tensor:
    """Compute `chunked.row_loss_` in one kernel: each row's loss in float32, and scale × the gradient in the logits' memory.

    Takes float32, float16 and bfloat16 with any strides. A label outside the vocabulary gives NaN.
    """
    if logits_RV.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"the kernel sums in float32 and does not take {logits_RV.dtype}; the loss 'chunked' does")
    loss_R = torch.empty(len(labels_R), dtype=torch.float32, device=logits_RV.device)
    if len(labels_R):
        row_loss_kernel[(len(labels_R),)](
            logits_RV,
            labels_R.contiguous(),
            loss_R,
            logits_RV.stride(0),
            logits_RV.stride(1),
            logits_RV.size(1),
            float(smoothing),
            float(z_loss),
            1.0 if scale is None else scale,
            BLOCK=min(BLOCK, triton.next_power_of_2(logits_RV.size(1))),
            GRADIENT=scale is not None,
            num_warps=WARPS,
        )
    return loss_R
