"""The ways to compute the loss of the head by name, and which of them to take where."""

import importlib.util

import torch
from torch import Tensor

from train.losses.chunked import chunked_linear_cross_entropy
from train.losses.cross_entropy import linear_cross_entropy

LARGE = 2**27  # bytes of float32 logits from which on not to have them all is worth a few percent of time on a CPU


def triton_linear_cross_entropy(
    hidden: Tensor, weight_VD: Tensor, labels: Tensor, bias_V: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """`chunked_linear_cross_entropy` with Triton's kernel for the rows of a chunk; needs a GPU."""
    from train.losses.kernels.cross_entropy import score_rows  # here: triton is imported when a kernel is first wanted

    return chunked_linear_cross_entropy(hidden, weight_VD, labels, bias_V, score=score_rows, **options)


LOSSES = {"plain": linear_cross_entropy, "chunked": chunked_linear_cross_entropy, "triton": triton_linear_cross_entropy}


def choose_loss(rows: int, vocab_size: int, device: torch.device) -> str:
    """For "auto": on a CUDA device Triton's; elsewhere the chunked one where the logits of `rows` rows are not small.

    Measured on a CPU, forward and backward, chunked over plain: 0.7 to 0.8 × the time from 67 MB of logits on; with freed
    memory kept, as in training, 0.95 to 1.05 at 67 MB. Below it costs a call's own time (0.3 ms), and saves little. See
    `python -m tests.bench loss` and `engine`.

    >>> choose_loss(16, 50_000, torch.device("cpu")), choose_loss(2048, 50_000, torch.device("cpu"))
    ('plain', 'chunked')
    """
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        return "triton"
    return "chunked" if 4 * rows * vocab_size >= LARGE else "plain"
