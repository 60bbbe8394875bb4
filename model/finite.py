"""Detection of inf and NaN in weights: one such value makes every output of a network meaningless.

`non_finite` computes a tensor's sum first, which is finite only if each value is: one pass over memory, and no second tensor.
Only where the sum is not finite (values may be large) it looks at each value.
"""

from pathlib import Path

import torch
from torch import Tensor

from model.folders import HubError, weight_files
from model.safetensors_file import WeightFile


def non_finite(value: Tensor) -> str | None:
    """Describe the first non-finite value and its index; None where all are finite.

    >>> non_finite(torch.tensor([[1.0, 2.0], [float("inf"), 3.0]])), non_finite(torch.full((2,), 3e38))
    ('the value at [1, 0] is inf', None)
    """
    if not value.is_floating_point() or value.device.type == "meta":
        return None
    value = value.detach()
    value = value.float() if value.element_size() == 1 else value  # 8-bit floats have no arithmetic
    if bool(value.sum(dtype=torch.promote_types(value.dtype, torch.float32)).isfinite()):
        return None
    is_bad = ~value.isfinite()
    if not bool(is_bad.any()):
        return None
    index = [int(place) for place in torch.unravel_index(is_bad.flatten().int().argmax(), value.shape)]
    return f"the value at {index} is {float(value[tuple(index)])}"


def refuse_non_finite(folder: Path) -> None:
    """Raise HubError for the first tensor of a model folder with inf or NaN; one tensor is in memory at a time."""
    for path in weight_files(folder):
        with WeightFile(path) as file:
            for name in file.names:
                refuse_tensor(file, name)


def refuse_tensor(file: WeightFile, name: str) -> None:
    """Raise HubError where a tensor in a file has inf or NaN, before any cast."""
    value = torch.empty(file.shape(name), dtype=file.dtype(name))
    file.read(name, value)
    if found := non_finite(value):
        raise HubError(non_finite_message(file.path, name, found))


def non_finite_message(path: Path, name: str, found: str) -> str:
    """Return the error message for a non-finite value."""
    return f"{path}: in {name!r} {found}: a network computes nothing with it. Take a checkpoint from before it broke"
