"""Base class of modules whose tensors keep their dtype."""

from torch import Tensor, nn


class OwnFormats(nn.Module):
    """Module whose tensors keep their dtype: `.to(device)` moves them, `.to(dtype)` and `.half()` do not convert them. Codes
    are integers and scales float32 by definition."""

    def _apply(self, fn, recurse: bool = True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
