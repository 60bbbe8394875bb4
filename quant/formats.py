"""Base class of modules whose tensors keep their dtype."""

from torch import Tensor, nn


class OwnFormats(nn.Module):
    """A module that `.to(device)` moves and `.to(dtype)`, `.half()` … leave alone: codes are integers and scales float32 by
    definition."""

    def _apply(self, fn, recurse: bool = True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
