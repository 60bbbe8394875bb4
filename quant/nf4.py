"""Four bits a weight: NF4 and FP4, block-wise, with the blocks' scales in eight bits (double quantization).

A weight is flattened and cut into blocks of 64. Each block keeps its largest magnitude, absmax, and for each number x the code,
0 … 15, of the one of sixteen values that x / absmax is nearest to. Byte by byte, as bitsandbytes has it:

    codes   two to a byte, the first in the high nibble; an odd last one has the code of 0 beside it
    values  NF4's rise with the code; FP4's are in the order of their bits: sign, two of exponent, one of fraction
    ties    half-way between two values, the lower one
    zeros   a block of zeros is packed as 0x77 by NF4, as 0x00 by FP4
    scales  z = x · (1 / absmax), but x / absmax in a last block that is shorter than the others: the two can differ in the last
            bit, and then so can the code. A divisor is at least 1e-38; so is absmax itself of a shorter block
    double  absmax - mean(absmax), in blocks of 256, by the 8-bit dynamic map (`quant.blockwise`)

Bits a weight: 4 + 32/64 = 4.5, with double quantization 4 + 8/64 + 32/(64 · 256) = 4.127.
Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quant.blockwise import BLOCK as NESTED_BLOCK
from quant.blockwise import constant, dequantize_8bit, dynamic_map, nearest_on_grid, quantize_8bit
from quant.config import BLOCK_SIZES, QuantError, accepts_old_names
from quant.formats import OwnFormats
from quant.pages import advise_huge_pages

SMALLEST = 1e-38  # that is divided by
# Numbers that are quantized at a time (in the cache, and little beside the result), and unpacked; multiples of all block sizes.
CHUNK, PIECE = {"cpu": 1 << 16}, 1 << 20


@constant
def nf4_code() -> Tensor:
    """NF4's sixteen values: quantiles of the normal distribution, eight above zero, seven below, and zero, scaled to [-1, 1].

    They are at equal steps of probability from the outermost, 1 - (1/32 + 1/30)/2, to one half; the end, one half itself,
    is zero, which so has a code of its own. (In float64 the last bits would differ from the published values.)

    >>> nf4_code()[[0, 1, 7, 8, 15]].tolist()
    [-1.0, -0.6961928009986877, 0.0, 0.07958029955625534, 1.0]
    """
    outermost = 0.9677083
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float32)[:-1].double())
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float32)[:-1].double())
    values = torch.cat((negative, torch.zeros(1), positive.flip(0))).float()
    return values / values.max()


@constant
def fp4_code() -> Tensor:
    """FP4's: sign s, exponent e, fraction f; (-1)^s · 2^(4 - e) · (1 + f/2) / 12, but 0 and 1/192 where e = 0.

    So the exponent's order is that of bitsandbytes: 1 the largest, then 2 and 3. No minus zero: code 8 is 0 too.

    >>> [round(value, 4) for value in fp4_code()[:8].tolist()]
    [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]
    """
    positive = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float32)
    return torch.cat((positive, 0 - positive)) / 12


CODES = {"nf4": nf4_code, "fp4": fp4_code}


@constant
def bounds(scheme: str) -> tuple[Tensor, Tensor]:
    """Where one value ends and the next begins, half-way between them; and the values' codes, in rising order."""
    values, order = CODES[scheme]().sort(stable=True)
    return (values[:-1] + values[1:]) / 2, order.to(torch.uint8)


class QuantizedTensor(OwnFormats):
    """A tensor in four bits a number. A module, so that its parts have names and move with a network.

    packed: uint8, two codes a byte · absmax: float32, one a block; or uint8 with double quantization, then also
    nested_absmax: float32, one for 256 of them; nested_code: the 256 values; offset: float32, their mean ·
    code: the sixteen values · shape, dtype: of the tensor that was quantized · block_size · scheme: "nf4" or "fp4".
    """

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        block_size: int,
        scheme: str,
        nested_absmax: Tensor | None = None,
        nested_code: Tensor | None = None,
        offset: Tensor | None = None,
    ):
        super().__init__()
        self.shape, self.dtype, self.block_size, self.scheme = torch.Size(shape), dtype, block_size, scheme
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("nested_code", nested_code, persistent=False)
        self.register_buffer("offset", offset)
        self.register_buffer("code", CODES[scheme]().to(packed.device), persistent=False)

    @property
    def double_quantized(self) -> bool:
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def numel(self) -> int:
        return math.prod(self.shape)

    def stored_tensors(self) -> list[Tensor]:
        """What it keeps for itself: all but the two maps, which all tensors have alike."""
        return [part for part in (self.packed, self.absmax, self.nested_absmax, self.offset) if part is not None]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.stored_tensors())

    @property
    def bits(self) -> float:
        """A number of the tensor."""
        return 8 * self.nbytes / max(1, self.numel())

    def scales(self) -> Tensor:
        """absmax of each block, float32."""
        return block_scales(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """code · absmax, multiplied in float32 and rounded once, to `dtype` or that of the tensor that was quantized."""
        return DEQUANTIZE.get(self.device.type, dequantize)(self, dtype or self.dtype)

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(place of its first number, flat numbers in float32), a piece at a time."""
        return pieces(self)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([list(CODES).index(self.scheme), self.block_size])

    def set_extra_state(self, state: Tensor) -> None:
        """In a `state_dict`, so that codes of another scheme are not taken for this one's."""
        if state.tolist() != self.get_extra_state().tolist():
            scheme, block_size = list(CODES)[int(state[0])], int(state[1])
            raise QuantError(f"codes of {scheme} in blocks of {block_size} do not go into {self.scheme} of {self.block_size}")

    def extra_repr(self) -> str:
        kind = "double quantization" if self.double_quantized else "float32 scales"
        return f"{tuple(self.shape)}, {self.scheme}, blocks of {self.block_size}, {kind}"


@accepts_old_names
@torch.no_grad()
def quantize(weight: Tensor, *, block_size: int = 64, double_quantized: bool = True, scheme: str = "nf4") -> QuantizedTensor:
    """Round a tensor of any shape to four bits a number; see the file's head for the format.

    weight: float32, float16, bfloat16, or float64, which is rounded to float32 first. A piece at a time, so that beside the
    result few megabytes are in use. Errors (QuantError): inf and NaN, with the place of the first; an unknown size or scheme.

    >>> weight = torch.linspace(-2, 2, 128).view(2, 64)
    >>> small = quantize(weight)
    >>> small.packed.shape, hex(small.packed[0]), float((small.dequantize() - weight).abs().max())
    (torch.Size([64, 1]), '0x0', 0.29...)
    """
    check(weight, block_size, scheme)
    flat = weight.reshape(-1)
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=weight.device)
    at_once = CHUNK.get(weight.device.type, 1 << 24)
    for start in range(0, flat.numel(), at_once):
        piece = flat[start : start + at_once].float()
        if not bool(piece.isfinite().all()):
            raise QuantError(describe_non_finite(weight))
        codes, scales = quantize_piece(piece, block_size, scheme)
        absmax[start // block_size :][: scales.numel()] = scales
        packed[start // 2 :][: (codes.numel() + 1) // 2, 0] = pack(codes, scheme)
    return assemble(weight, packed, absmax, block_size=block_size, double_quantized=double_quantized, scheme=scheme)


def check(weight: Tensor, block_size: int, scheme: str) -> None:
    """Errors (QuantError): an unknown size or scheme, or whole numbers."""
    if scheme not in CODES:
        raise QuantError(f"unknown scheme {scheme!r}; schemes: {', '.join(CODES)}")
    if block_size not in BLOCK_SIZES:
        raise QuantError(f"block_size={block_size}: sizes are {', '.join(map(str, BLOCK_SIZES))}")
    if not weight.is_floating_point():
        raise QuantError(f"a tensor of {str(weight.dtype).removeprefix('torch.')} is not quantized: floating-point ones are")


def assemble(
    weight: Tensor, packed: Tensor, absmax: Tensor, *, block_size: int, double_quantized: bool, scheme: str
) -> QuantizedTensor:
    """The tensor of these codes and scales of `weight`; with `double_quantized`, the scales in eight bits."""
    whole = {"shape": tuple(weight.shape), "dtype": weight.dtype, "block_size": block_size, "scheme": scheme}
    if not double_quantized:
        return QuantizedTensor(packed, absmax, **whole)
    offset, nested_code = absmax.mean(), dynamic_map().to(weight.device)
    if absmax.numel() and not bool(offset.isfinite()):
        raise QuantError("the mean absmax overflows float32: the scales cannot be quantized again (use double_quantized=False)")
    places, nested_absmax = quantize_8bit(absmax - offset, nested_code, block_size=NESTED_BLOCK, decide=nearest_on_grid)
    return QuantizedTensor(packed, places, nested_absmax=nested_absmax, nested_code=nested_code, offset=offset, **whole)


def quantize_piece(x: Tensor, block_size: int, scheme: str) -> tuple[Tensor, Tensor]:
    """(codes, absmax of each block) of flat float32 numbers."""
    whole = x.numel() // block_size * block_size
    blocks, rest = x[:whole].view(-1, block_size), x[whole:]
    absmax = blocks.abs().amax(dim=1)
    z = (blocks * (1 / absmax.clamp(min=SMALLEST))[:, None]).flatten()
    if rest.numel():
        last = rest.abs().amax(dim=0, keepdim=True).clamp(min=SMALLEST)
        z, absmax = torch.cat((z, rest / last)), torch.cat((absmax, last))
    middles, order = (table.to(x.device) for table in bounds(scheme))
    return order[torch.bucketize(z.clamp_(-1, 1), middles, out_int32=True)], absmax


def pack(codes: Tensor, scheme: str = "nf4") -> Tensor:
    """Two codes a byte, the first in the high nibble.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist() == [0x12, 0x37]  # padded with the code of zero
    True
    """
    if codes.numel() % 2:
        zero = int(quantize_piece(codes.new_zeros(1, dtype=torch.float32), 64, scheme)[0])
        codes = torch.nn.functional.pad(codes, (0, 1), value=zero)
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes."""
    return torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).flatten()[:count]


def block_scales(small: QuantizedTensor) -> Tensor:
    if not small.double_quantized:
        return small.absmax
    return dequantize_8bit(small.absmax, small.nested_absmax, small.nested_code, block_size=NESTED_BLOCK) + small.offset


def dequantize(small: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """x = code's value · absmax of its block: the plain twin, on any device."""
    codes, scales = unpack(small.packed, small.numel()), small.scales()
    values = small.code[codes.int()]
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % small.block_size)).view(-1, small.block_size)
    return (blocks * scales[:, None]).flatten()[: small.numel()].view(small.shape).to(dtype or small.dtype)


def pieces(small: QuantizedTensor, multiple: int = 1, out: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """(place of its first number, flat numbers in float32), about a million at a time, in multiples of `multiple`; on a CPU.

    Each byte is two numbers, and the table of all 256 such pairs, eight bytes each, makes unpacking one gather. The memory of
    one piece is the next one's too, and so stays in the cache; or they are made in `out`, flat and float32. Measured at
    4,096 × 4,096 on two threads: 10 ms into memory that is in use already, 24 into new (`quant.pages`).
    """
    block, packed, scales = small.block_size, small.packed.flatten(), small.scales()
    unit = math.lcm(multiple, 2 * block)  # a piece begins with a byte and with a block
    most = min(max(PIECE // unit, 1) * unit, small.numel())
    pairs = torch.stack((small.code.repeat_interleave(16), small.code.repeat(16)), dim=1).view(torch.int64).flatten()
    index, pair = torch.empty((most + 1) // 2, dtype=torch.int32), torch.empty((most + 1) // 2, dtype=torch.int64)
    for first in range(0, small.numel(), most or 1):
        count = min(most, small.numel() - first)
        many, whole = (count + 1) // 2, count // block * block
        index[:many].copy_(packed[first // 2 :][:many])
        torch.index_select(pairs, 0, index[:many], out=pair[:many])
        values = pair.view(torch.float32)[:count]
        made, scale = values if out is None else out[first:][:count], scales[first // block :]
        torch.mul(values[:whole].view(-1, block), scale[: whole // block, None], out=made[:whole].view(-1, block))
        torch.mul(values[whole:], scale[whole // block :][:1], out=made[whole:])
        yield first, made


def dequantize_cpu(small: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """`dequantize`, bit for bit."""
    whole = advise_huge_pages(torch.empty(small.numel(), dtype=dtype))
    for first, values in pieces(small, out=whole if dtype == torch.float32 else None):
        if dtype != torch.float32:
            whole[first:][: values.numel()].copy_(values)
    return whole.view(small.shape)


def dequantize_cuda(small: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    from quant.kernels.dequantize_4bit import dequantize_4bit  # here: triton comes when a kernel is wanted

    return dequantize_4bit(small, dtype)


DEQUANTIZE: dict[str, Callable[[QuantizedTensor, torch.dtype], Tensor]] = {
    "cpu": dequantize_cpu,
    "cuda": dequantize_cuda,
    "meta": lambda small, dtype: torch.empty(small.shape, dtype=dtype, device="meta"),
}


def describe_non_finite(weight: Tensor) -> str:
    """Where the first number is that is none."""
    first = (~weight.float().isfinite()).flatten().int().argmax()
    index = tuple(int(place) for place in torch.unravel_index(first, weight.shape))
    return f"the value at {list(index)} is {float(weight[index])}, which has no place among quantized values"
