"""NF4 and FP4: four bits a weight, with one scale for each block of weights; double quantization stores the scales in 8 bits.

    block     the weight is flattened and cut into blocks of 64 numbers; each keeps its scale, absmax = max |x|
    code      each number x becomes a code 0 … 15: the index of the codebook value that is nearest to x / absmax
    codebook  16 values from -1 to 1 (bitsandbytes calls it `code`). NF4's rise with the code; FP4's follow the code's bits: 1
    sign, 2 exponent, 1 fraction decoding  x̂ = codebook[code] · absmax

The bytes are those of bitsandbytes:

    packing   two codes a byte, the first in the high nibble; with an odd number of codes the last low nibble is the code of 0
    ties      a number exactly between two codebook values gets the lower one
    zeros     a block of zeros is packed as bytes 0x77 (NF4) or 0x00 (FP4)
    rounding  full blocks compute x · (1 / absmax); a shorter last block computes x / absmax, which may differ in the last bit.
              Divisors are clamped to at least 1e-38; so is the stored absmax of a shorter last block
    double    double quantization subtracts the mean from all absmax, and quantizes the differences in blocks of 256 to the
              8-bit dynamic map (`quant.blockwise`)

Bits a weight: 4 + 32/64 = 4.5; with double quantization 4 + 8/64 + 32/(64 · 256) = 4.127.
Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from quant.blockwise import BLOCK as NESTED_BLOCK
from quant.blockwise import constant, dynamic_map, nearest_on_grid, quantize_8bit
from quant.config import BLOCK_SIZES, QuantError, accepts_old_names
from quant.dequantize import DEQUANTIZE, block_scales, dequantized_chunks
from quant.formats import OwnFormats

SMALLEST = 1e-38  # the least divisor
# Numbers per chunk, a multiple of all block sizes: small enough for the CPU cache, and for little temporary memory.
QUANTIZE_CHUNK = {"cpu": 1 << 16}


# ---- the codebooks


@constant
def nf4_codebook() -> Tensor:
    """NF4's 16 values: quantiles of the normal distribution, 8 above zero, 7 below, and zero itself, scaled to [-1, 1].

    On each side the probabilities go in equal steps from 1 - (1/32 + 1/30)/2 to 1/2. The quantile of 1/2 is 0, so zero is
    represented exactly. (The probabilities are float32: with float64 ones the last bits would differ from the published
    values.)

    >>> nf4_codebook()[[0, 1, 7, 8, 15]].tolist()
    [-1.0, -0.6961928009986877, 0.0, 0.07958029955625534, 1.0]
    """
    outermost = 0.9677083
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float32)[:-1].double())
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float32)[:-1].double())
    values = torch.cat((negative, torch.zeros(1), positive.flip(0))).float()
    return values / values.max()


@constant
def fp4_codebook() -> Tensor:
    """FP4's 16 values: (-1)^s · 2^(4 - e) · (1 + f/2) / 12 for sign s, exponent e and fraction f; 0 and 1/192 where e = 0.

    bitsandbytes numbers exponents downwards: e = 1 is the largest magnitude, e = 3 the smallest. There is no minus zero: code
    8 is 0 too.

    >>> [round(value, 4) for value in fp4_codebook()[:8].tolist()]
    [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]
    """
    positive = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float32)
    return torch.cat((positive, 0 - positive)) / 12


CODEBOOKS = {"nf4": nf4_codebook, "fp4": fp4_codebook}


@constant
def decision_boundaries(scheme: str) -> tuple[Tensor, Tensor]:
    """The 15 midpoints between neighbouring codebook values, rising; and the 16 codes in the order of their values.

    A number that is larger than k midpoints gets the code order[k].
    """
    values, order = CODEBOOKS[scheme]().sort(stable=True)
    return (values[:-1] + values[1:]) / 2, order.to(torch.uint8)


# ---- the quantized tensor


class QuantizedTensor(OwnFormats):
    """A tensor quantized to four bits a number; an nn.Module, so that its tensors are in state_dict and follow .to(device).

    packed           uint8, two codes a byte
    absmax           float32, a scale for each block; with double quantization uint8
    nested_absmax    float32, one for each 256 absmax; nested_codebook: float32, 256 values; offset: float32, the mean absmax.
                     None without double quantization
    codebook         float32, 16 values
    shape, dtype     those of the original tensor; block_size: numbers per scale; scheme: "nf4" or "fp4"
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
        nested_codebook: Tensor | None = None,
        offset: Tensor | None = None,
    ):
        super().__init__()
        self.shape, self.dtype, self.block_size, self.scheme = torch.Size(shape), dtype, block_size, scheme
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("nested_codebook", nested_codebook, persistent=False)
        self.register_buffer("offset", offset)
        self.register_buffer("codebook", CODEBOOKS[scheme]().to(packed.device), persistent=False)

    @property
    def double_quantized(self) -> bool:
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def numel(self) -> int:
        return math.prod(self.shape)

    def stored_tensors(self) -> list[Tensor]:
        """The tensors that count as this weight's memory: all but the codebooks, which are the same for every weight."""
        return [part for part in (self.packed, self.absmax, self.nested_absmax, self.offset) if part is not None]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.stored_tensors())

    @property
    def bits(self) -> float:
        """Bits stored per number, scales included."""
        return 8 * self.nbytes / max(1, self.numel())

    def scales(self) -> Tensor:
        """Return absmax of each block, float32."""
        return block_scales(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return codebook[code] · absmax, multiplied in float32 and rounded once to `dtype` (default: the original dtype)."""
        return DEQUANTIZE.get(self.device.type, dequantize)(self, dtype or self.dtype)

    def dequantized_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the chunk's first number, its numbers, flat and float32)."""
        return dequantized_chunks(self)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([list(CODEBOOKS).index(self.scheme), self.block_size])

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a `state_dict` whose codes are of another scheme or block size."""
        if state.tolist() != self.get_extra_state().tolist():
            scheme, block_size = list(CODEBOOKS)[int(state[0])], int(state[1])
            raise QuantError(f"codes of {scheme} in blocks of {block_size} do not go into {self.scheme} of {self.block_size}")

    def extra_repr(self) -> str:
        kind = "double quantization" if self.double_quantized else "float32 scales"
        return f"{tuple(self.shape)}, {self.scheme}, blocks of {self.block_size}, {kind}"


# ---- quantizing


@accepts_old_names
@torch.no_grad()
def quantize(
    weight: Tensor, *, block_size: int = 64, double_quantized: bool = True, scheme: str = "nf4"
) -> QuantizedTensor:
    """Quantize a tensor of any shape to four bits a number: code = argmin |codebook - x / absmax|, absmax = max |x| of a block.

    weight: float32, float16, bfloat16, or float64, which is rounded to float32 first · block_size: numbers that share a scale,
    one of `quant.config.BLOCK_SIZES` · double_quantized: store the scales in 8 bits · scheme: "nf4" or "fp4". Works in chunks:
    temporary memory is a few megabytes on a CPU, 64 MiB for each float32 temporary elsewhere. Errors (QuantError): inf or NaN,
    with the index of the first; an unknown block size or scheme. The format and its source are described at the top of this
    file.

    >>> weight = torch.linspace(-2, 2, 128).view(2, 64)
    >>> quantized = quantize(weight)
    >>> quantized.packed.shape, hex(quantized.packed[0]), float((quantized.dequantize() - weight).abs().max())
    (torch.Size([64, 1]), '0x0', 0.29...)
    """
    check_arguments(weight, block_size, scheme)
    flat = weight.reshape(-1)
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=weight.device)
    chunk_size = QUANTIZE_CHUNK.get(weight.device.type, 1 << 24)
    for start in range(0, flat.numel(), chunk_size):
        chunk = flat[start : start + chunk_size].float()
        if not bool(chunk.isfinite().all()):
            raise QuantError(describe_non_finite(weight))
        codes, scales = quantize_chunk(chunk, block_size, scheme)
        absmax[start // block_size :][: scales.numel()] = scales
        packed[start // 2 :][: (codes.numel() + 1) // 2, 0] = pack(codes, scheme)
    return assemble(weight, packed, absmax, block_size=block_size, double_quantized=double_quantized, scheme=scheme)


def quantize_reference(weight: Tensor, block_size: int = 64, scheme: str = "nf4") -> Tensor:
    """Return x̂, the values that `quantize` without double quantization stands for: the reference implementation, in ten lines.

    A number becomes the codebook value nearest to x / absmax of its block, the lower of two, times absmax: as many values lie
    below it as midpoints do. float32, any shape whose size block_size divides. Source: Dettmers et al. 2023, arXiv 2305.14314.

    >>> weight = torch.linspace(-2, 2, 128)
    >>> torch.equal(quantize_reference(weight), quantize(weight, double_quantized=False).dequantize())
    True
    """
    codebook = CODEBOOKS[scheme]().sort().values
    midpoints = (codebook[:-1] + codebook[1:]) / 2
    block_BN = weight.reshape(-1, block_size)
    absmax_B1 = block_BN.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST)
    z_BN = block_BN * (1 / absmax_B1)
    index_BN = (z_BN[..., None] > midpoints).sum(-1)
    return (codebook[index_BN] * absmax_B1).view(weight.shape)


def check_arguments(weight: Tensor, block_size: int, scheme: str) -> None:
    """Raise QuantError for an unknown block size or scheme, or a weight that is not floating-point."""
    if scheme not in CODEBOOKS:
        raise QuantError(f"unknown scheme {scheme!r}; schemes: {', '.join(CODEBOOKS)}")
    if block_size not in BLOCK_SIZES:
        raise QuantError(f"block_size={block_size}: sizes are {', '.join(map(str, BLOCK_SIZES))}")
    if not weight.is_floating_point():
        raise QuantError(f"a tensor of {str(weight.dtype).removeprefix('torch.')} is not quantized: floating-point ones are")


def quantize_chunk(x: Tensor, block_size: int, scheme: str) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax of each block) of flat float32 numbers."""
    full = x.numel() // block_size * block_size
    blocks, rest = x[:full].view(-1, block_size), x[full:]
    absmax = blocks.abs().amax(dim=1)
    z = (blocks * (1 / absmax.clamp(min=SMALLEST))[:, None]).flatten()
    if rest.numel():
        last = rest.abs().amax(dim=0, keepdim=True).clamp(min=SMALLEST)
        z, absmax = torch.cat((z, rest / last)), torch.cat((absmax, last))
    midpoints, order = (table.to(x.device) for table in decision_boundaries(scheme))
    return order[torch.bucketize(z.clamp_(-1, 1), midpoints, out_int32=True)], absmax


def pack(codes: Tensor, scheme: str = "nf4") -> Tensor:
    """Pack two codes a byte, the first in the high nibble.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist() == [0x12, 0x37]  # padded with the code of zero
    True
    """
    if codes.numel() % 2:
        zero = int(quantize_chunk(codes.new_zeros(1, dtype=torch.float32), 64, scheme)[0])
        codes = torch.nn.functional.pad(codes, (0, 1), value=zero)
    return codes[::2] << 4 | codes[1::2]


def assemble(
    weight: Tensor, packed: Tensor, absmax: Tensor, *, block_size: int, double_quantized: bool, scheme: str
) -> QuantizedTensor:
    """Build the QuantizedTensor of `weight` from its codes and scales; with `double_quantized` the scales are quantized
    here."""
    format = {"shape": tuple(weight.shape), "dtype": weight.dtype, "block_size": block_size, "scheme": scheme}
    if not double_quantized:
        return QuantizedTensor(packed, absmax, **format)
    offset, nested_codebook = absmax.mean(), dynamic_map().to(weight.device)
    if absmax.numel() and not bool(offset.isfinite()):
        raise QuantError("the mean absmax overflows float32: the scales cannot be quantized again (use double_quantized=False)")
    codes, nested_absmax = quantize_8bit(absmax - offset, nested_codebook, block_size=NESTED_BLOCK, decide=nearest_on_grid)
    nested = {"nested_absmax": nested_absmax, "nested_codebook": nested_codebook, "offset": offset}
    return QuantizedTensor(packed, codes, **nested, **format)


# ---- dequantizing


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return x̂ = codebook[code] · absmax of its block, in the original shape. The reference implementation, on any
    device; the faster versions equal it bit for bit.

    dtype: default the original tensor's; products are computed in float32 and rounded once.
    """
    codes, scales = unpack(quantized.packed, quantized.numel()), quantized.scales()
    values = quantized.codebook[codes.int()]
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % quantized.block_size)).view(-1, quantized.block_size)
    return (blocks * scales[:, None]).flatten()[: quantized.numel()].view(quantized.shape).to(dtype or quantized.dtype)


def unpack(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` codes of packed bytes, uint8, flat: high nibbles come first. The inverse of `pack`."""
    return torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).flatten()[:count]


def describe_non_finite(weight: Tensor) -> str:
    """Describe the first non-finite value of a tensor and its index, for an error message."""
    first = (~weight.float().isfinite()).flatten().int().argmax()
    index = tuple(int(place) for place in torch.unravel_index(first, weight.shape))
    return f"the value at {list(index)} is {float(weight[index])}: only numbers finite in float32 can be quantized"


quantize_4bit, dequantize_4bit = quantize, dequantize  # their names in `from quant import …`
