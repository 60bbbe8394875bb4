"""The losses of a language head by name, and the choice for `--loss auto`. torch is imported with a loss's own file alone."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHUNKED_FROM = 2**27  # bytes of float32 logits from which on not to have them all is worth a few percent of time on a CPU
FUNCTIONS = {  # name: the file and its function
    "plain": ("cross_entropy", "linear_cross_entropy"),
    "chunked": ("chunked", "chunked_linear_cross_entropy"),
    "triton": ("chunked", "triton_linear_cross_entropy"),
}


class LossTable(Mapping):
    """The losses by name; a loss's file is imported when the loss is first asked for.

    >>> list(LOSSES), LOSSES["chunked"].__name__
    (['plain', 'chunked', 'triton'], 'chunked_linear_cross_entropy')
    """

    def __getitem__(self, name: str) -> Callable:
        file, function = FUNCTIONS[name]
        return getattr(importlib.import_module(f"train.losses.{file}"), function)

    def __iter__(self) -> Iterator[str]:
        return iter(FUNCTIONS)

    def __len__(self) -> int:
        return len(FUNCTIONS)


LOSSES = LossTable()


def choose_loss(rows: int, vocab_size: int, device: "torch.device") -> str:
    """Choose for `--loss auto`: on a CUDA device "triton"; elsewhere "chunked" where the logits of `rows` rows are not small.

    Measured on a CPU, forward and backward, chunked over plain: 0.7 to 0.8 × the time from 67 MB of logits on; with freed
    memory kept, as in training, 0.95 to 1.05 at 67 MB. Below it costs a call's own time (0.3 ms), and saves little. See
    `python -m tests.bench loss` and `engine`.

    >>> import torch
    >>> choose_loss(16, 50_000, torch.device("cpu")), choose_loss(2048, 50_000, torch.device("cpu"))
    ('plain', 'chunked')
    """
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        return "triton"
    return "chunked" if 4 * rows * vocab_size >= CHUNKED_FROM else "plain"
