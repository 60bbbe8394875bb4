"""An oracle is believed where it agrees with the direct computation on this machine; elsewhere that takes its place.

bitsandbytes 0.50.2 chooses its CPU code by the processor, and with AVX-512 some of it is wrong or refuses. Its C code asks the
processor, its Python torch, so ATEN_CPU_CAPABILITY=avx2 changes half of it. Measured on an AMD EPYC with AVX-512 and bfloat16:

    dequantize_4bit     rows of a multiple of 16 numbers that end inside a block: row r begins with scale r · (length // block),
                        and values are off by as much as the largest of them
                        a tensor without numbers, in blocks of 2,048 or more: RuntimeError, from a reshape
                        bfloat16 below 1.2e-38: zeros, which the processor's conversion makes of them
    Linear4bit          packs W anew for a product in bfloat16, once x needs no gradient: AssertionError where the number of
                        W's rows is no multiple of 32, RuntimeError where they are no whole blocks; elsewhere it rounds to 2^-8
"""

from collections.abc import Callable
from functools import partial

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn


class Oracle:
    """A library's values where they are right, the direct computation's elsewhere; and `name`, the words for the table.

    >>> oracle, right = Oracle("lib 1.0"), torch.tensor([1.0])
    >>> oracle.believe(lambda: right + 0, right).tolist(), oracle.name
    ([1.0], 'lib 1.0')
    >>> oracle.believe(lambda: right + 1.5, right).tolist(), oracle.name
    ([1.0], 'lib 1.0, and direct computation where it is off by 150 % on this processor')
    """

    def __init__(self, library: str):
        self.library, self.agreed, self.off, self.raised = library, 0, 0.0, set[str]()

    def believe(self, call: Callable[[], Tensor], direct: Tensor, tolerance: float = 0.0) -> Tensor:
        """call(), or `direct` where that differs by more than `tolerance` of its largest number, or raises."""
        try:
            said = call()
        except (AssertionError, RuntimeError) as error:
            self.raised.add(type(error).__name__)
            return direct
        assert (said.shape, said.dtype) == (direct.shape, direct.dtype)
        if not torch.equal(said, direct):
            error = (said - direct).detach().abs().where(said != direct, 0).max() / direct.detach().abs().max()
            if not error <= tolerance:  # NaN too
                self.off = max(self.off, float(error.nan_to_num(torch.inf)))
                return direct
        self.agreed += 1
        return said

    @property
    def name(self) -> str:
        faults = [f"is off by {100 * self.off:.0f} %"] if self.off else []
        faults += [f"raises {name}" for name in sorted(self.raised)]
        if not faults:
            return self.library
        if not self.agreed:
            return f"direct computation ({self.library} {' or '.join(faults)} on this processor)"
        return f"{self.library}, and direct computation where it {' or '.join(faults)} on this processor"


def unpack_directly(packed: Tensor, scales: Tensor, block: int, scheme: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' own value of each code, the high nibble's first, times its block's scale, rounded once."""
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).flatten()[: shape.numel()]
    values = functional.get_4bit_type(scheme, device="cpu")[codes.int()]
    return (values * scales.repeat_interleave(block)[: shape.numel()]).view(shape).to(dtype)


def without_packing(network: nn.Module) -> nn.Module:
    """Keep bitsandbytes' layers from packing W anew for this processor; returns the network."""
    for module in network.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return network


def believed_layers(network: nn.Module, library: str) -> str:
    """Put dense layers, with the weight directly unpacked, in place of the 4-bit ones that are wrong here.

    Each is asked for the product of random rows, in float32. Returns the words for the table.
    """
    oracle = Oracle(library)
    for path, layer in list(without_packing(network).named_modules()):
        if not isinstance(layer, Linear4bit):
            continue
        state, x = layer.weight.quant_state, torch.randn(5, layer.in_features)
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        weight = unpack_directly(layer.weight.data, scales, state.blocksize, state.quant_type, state.shape, torch.float32)
        direct = nn.functional.linear(x, weight, layer.bias)
        if oracle.believe(partial(layer, x), direct, 1e-5) is direct:
            dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            network.set_submodule(path, dense)
    return oracle.name
