"""Interface of a 4-bit weight: the tensors that products, kernels and dequantization read."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class PackedWeight(Protocol):
    """A 4-bit weight: `quant.nf4.QuantizedTensor`, or its tensors alone (`quant.product.PackedTensors`).

    packed: uint8, two codes a byte · codebook: float32, the 16 values · absmax: each block's scale, float32; or with double
    quantization uint8 codes, and then nested_absmax, nested_codebook and offset are float32 tensors, else None.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    nested_absmax: Tensor | None
    nested_codebook: Tensor | None
    offset: Tensor | None
    shape: Sequence[int]
    block_size: int
    dtype: torch.dtype

    @property
    def double_quantized(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    def numel(self) -> int: ...

    def scales(self) -> Tensor: ...
