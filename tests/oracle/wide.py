"""A library's network in float64 throughout: what it casts to float32 stays float64.

transformers casts norms, softmax and tables of positions to float32 whatever the weights' format. As shipped that leaves 1e-7
to 4e-6 between two float64 networks of 2 to 6 layers; with the casts gone, 1e-14. So 1e-12 is the bound to ask.

    widen(theirs)     its calls, and those of a PEFT model around it, are wide from here on; ours must run outside of `Wide`,
                      which would undo our own casts too
"""

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Wide(TorchFunctionMode):
    """Answers `Tensor.float` with `.double()`; an argument torch.float32 of any function, and the default, is torch.float64.

    >>> with Wide():
    ...     [x.dtype for x in (torch.ones(2).softmax(0, dtype=torch.float32), torch.ones(2, dtype=torch.float64).float())]
    [torch.float64, torch.float64]
    """

    def __enter__(self):
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_default_dtype(self.default)
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


@torch.no_grad()
def widen(network: nn.Module) -> nn.Module:
    """Make tables of positions anew in float64, and each call of `network` run in `Wide`; returns the network."""
    for module in network.modules():
        if hasattr(module, "original_inv_freq"):
            with Wide():
                module.__init__(module.config)
        elif type(module).__name__ == "RoFormerSinusoidalPositionalEmbedding":
            positions, width = module.weight.shape
            angle = np.arange(positions)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
            module.weight.copy_(torch.from_numpy(np.concatenate((np.sin(angle), np.cos(angle)), 1)))
    as_shipped = network.forward

    @functools.wraps(as_shipped)
    def forward(*args, **kwargs):
        with Wide():
            return as_shipped(*args, **kwargs)

    network.forward = forward
    return network
