"""The linear layer, and how it reads its matrix when there are few rows to multiply."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_FEW_ROWS = 8  # rows; measured: up to here the other way is faster, at 2 to 4 rows three times
MIN_MATRIX_SIZE = 1 << 16  # numbers in a matrix; below, the steps around the product take longer than it


def linear_few_rows(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, parts: int) -> Tensor:
    """x Wᵀ + b, taken as (W xᵀ)ᵀ, with the rows of W in as many parts as there are threads: one each.

    A text that is generated a token at a time multiplies one row by every matrix, and the time is that of reading the
    matrices once. torch's product of few rows on a CPU reads them at a third to a half of the memory's speed; measured on two
    threads, 58 MB of matrices: 1 row 5.1 ms against 3.0, 4 rows 10.2 against 3.4, 8 rows 8.5 against 5.4, the memory's own
    limit 1.9.
    """
    rows, width = weight_OI.shape
    even = rows // parts * parts
    part_POI = weight_OI[:even].view(parts, even // parts, width)
    y_NO = torch.bmm(part_POI, x_NI.T.expand(parts, width, -1)).flatten(0, 1).T  # bmm: `@` would join the parts again
    if even < rows:
        y_NO = torch.cat((y_NO, F.linear(x_NI, weight_OI[even:])), dim=-1)
    return y_NO if bias_O is None else y_NO + bias_O


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b over the last axis; by `linear_few_rows` in inference mode, in float32 on a CPU; never in training."""
    # A compiled block cannot ask for the mode: the question alone would cut its graph in two at every matrix.
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    if inference and weight_OI.numel() > MIN_MATRIX_SIZE and x.numel() <= MAX_FEW_ROWS * x.size(-1):
        if x.dtype == weight_OI.dtype == torch.float32 and x.device.type == "cpu":
            y_NO = linear_few_rows(x.flatten(0, -2), weight_OI, bias_O, torch.get_num_threads())
            return y_NO.unflatten(0, x.shape[:-1])
    return F.linear(x, weight_OI, bias_O)


class Linear(nn.Linear):
    """torch's layer with `linear` for its product."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
