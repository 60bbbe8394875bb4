"""The ways to compute the loss of the head by name, and which of them to take where."""

import importlib.util

import torch
from torch import Tensor

from train.loss.chunked import chunked_linear_cross_entropy
from train.loss.cross_entropy import linear_cross_entropy

LARGE = 2**22  # bytes of float32 logits from which on the chunked loss is faster on a CPU too, for it touches less memory


def triton_linear_cross_entropy(
    hidden: Tensor, weight_VD: Tensor, labels: Tensor, bias_V: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """`chunked_linear_cross_entropy` with Triton's kernel for the rows of a chunk; needs a GPU."""
    from train.loss.kernels.cross_entropy import score_rows  # here: triton is imported when a kernel is first wanted

    return chunked_linear_cross_entropy(hidden, weight_VD, labels, bias_V, score=score_rows, **options)


LOSSES = {"plain": linear_cross_entropy, "chunked": chunked_linear_cross_entropy, "triton": triton_linear_cross_entropy}


def choose_loss(rows: int, vocab_size: int, device: torch.device) -> str:
    """For "auto": on a CUDA device Triton's; elsewhere the chunked one where the logits of `rows` rows are not small.

    Measured on a CPU, forward and backward, chunked over plain: 2.2 × the time at 0.5 MB of logits (0.3 ms more, a call's
    own cost), 0.8 × at 2 MB, 0.6 to 0.8 × from 17 MB on. See `python -m tests.bench loss`.

    >>> choose_loss(16, 50_000, torch.device("cpu")), choose_loss(2048, 50_000, torch.device("cpu"))
    ('plain', 'chunked')
    """
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        return "triton"
    return "chunked" if 4 * rows * vocab_size >= LARGE else "plain"
