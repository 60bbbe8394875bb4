"""A module whose tensors keep the formats that they are made in."""

from torch import Tensor, nn


class OwnFormats(nn.Module):
    """`.to(device)` moves it; `.to(dtype)`, `.half()` … leave it alone: codes are whole numbers, and scales float32, by
    definition."""

    def _apply(self, fn, recurse: bool = True):
        def in_its_format(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(in_its_format, recurse)
