"""Report the effects of quantizing a network: sizes, errors and scores as rows of text. Opens no files.

    error    ‖W - Ŵ‖ / ‖W‖          cosine    ⟨W, Ŵ⟩ / (‖W‖ ‖Ŵ‖)          both over all numbers of a matrix, summed in float64

W is the weight as it was in the folder; Ŵ is the dequantized weight in float32.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quant.config import FourBit, Int8
from quant.linear import build_layer

MOST_ROWS = 32  # most rows of a table with one for each matrix
IN_CACHE = 1 << 15  # numbers compared at a time: takes half as long as with a million
SAMPLE = 512  # rows and columns of normally distributed numbers

Row = tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """A matrix before and after quantization, or several together. name: the family's, without ".weight"; sizes in bytes."""

    name: str
    shape: tuple[int, ...]
    numbers: int
    before: int
    after: int
    square: float  # ‖W‖²
    square_after: float  # ‖Ŵ‖²
    product: float  # ⟨W, Ŵ⟩
    square_error: float  # ‖W - Ŵ‖²

    @property
    def bits(self) -> float:
        """Bits per number, scales included."""
        return 8 * self.after / self.numbers

    @property
    def error(self) -> float:
        return math.sqrt(self.square_error / self.square) if self.square else 0.0

    @property
    def cosine(self) -> float:
        sizes = math.sqrt(self.square) * math.sqrt(self.square_after)
        return self.product / sizes if sizes else float(self.square == self.square_after)

    @property
    def kind(self) -> str:
        """The name without the layer's number.

        >>> quantized = Layer("decoder.block.3.layer.1.wo", (), 1, 4, 1, 1.0, 1.0, 1.0, 0.0)
        >>> quantized.kind, quantized.depth
        ('decoder.block.N.layer.1.wo', 3)
        """
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", self.name, count=1)

    @property
    def depth(self) -> int:
        """The layer's number; 0 where the name has none."""
        number = re.search(r"(?<=\.)\d+(?=\.|$)", self.name)
        return int(number[0]) if number else 0


def measure(name: str, weight: Tensor, quantized: nn.Module) -> Layer:
    """Compare a CPU weight with its quantized form (`QuantizedTensor` …), chunk by chunk, without a second copy."""
    flat, sums = weight.reshape(-1), [0.0, 0.0, 0.0, 0.0]
    for first, values in quantized.dequantized_chunks():
        there = flat[first:][: values.numel()]
        for w, v in zip(there.split(IN_CACHE), values.split(IN_CACHE), strict=True):
            w, v = w.double(), v.double()
            difference = w - v
            for place, (one, other) in enumerate(((w, w), (v, v), (w, v), (difference, difference))):
                sums[place] += float(one @ other)
    before = weight.numel() * weight.element_size()
    return Layer(name.removesuffix(".weight"), tuple(weight.shape), weight.numel(), before, quantized.nbytes, *sums)


def together(name: str, layers: Sequence[Layer]) -> Layer:
    """Combine the sizes and error sums of several matrices into one `Layer`."""
    fields = ("numbers", "before", "after", "square", "square_after", "product", "square_error")
    return Layer(name, (), **{field: sum(getattr(layer, field) for layer in layers) for field in fields})


def by_kind(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """Group matrices by kind, in the order of the network."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return kinds


def normal_error(settings: FourBit | Int8) -> float:
    """Return the error of normally distributed numbers: the reference for a matrix without outliers."""
    columns = SAMPLE
    if isinstance(settings, Int8):
        columns = settings.group_size * -(-SAMPLE // settings.group_size) if settings.granularity == "group" else SAMPLE
        settings = replace(settings, scheme="int8-dynamic") if settings.scheme == "int8-static" else settings
    weight = torch.randn(SAMPLE, columns, generator=torch.Generator().manual_seed(0))
    return measure("", weight, build_layer(weight, None, settings).weight).error


def described(settings: FourBit | Int8) -> str:
    """Describe settings in a line.

    >>> described(FourBit()), described(Int8(granularity="group"))
    ('nf4, blocks of 64', 'int8-dynamic, weights of 8 bits, a scale for each group of 128')
    """
    if isinstance(settings, FourBit):
        return f"{settings.scheme}, blocks of {settings.block_size}"
    kind = {"tensor": "matrix", "channel": "channel", "group": f"group of {settings.group_size}"}[settings.granularity]
    outliers = f", outliers from {settings.threshold:g} separate" if settings.scheme == "llm-int8" else ""
    affine = " and zero point" * settings.affine_weights
    return f"{settings.scheme}, weights of {settings.bits} bits, a scale{affine} for each {kind}{outliers}"


# ---- rows, the first a heading


def table(layers: Sequence[Layer], *, per_layer: bool = False) -> list[Row]:
    """Return a row for each matrix if they are few or `per_layer`, else for each kind; then one for all."""
    each = per_layer or len(layers) <= MOST_ROWS
    columns = ("before", "after", "bits", "error", "cosine")
    if each:
        rows = [("matrix", "shape", *columns), *((one.name, by(one.shape), *cells(one)) for one in layers)]
    else:
        rows = [("kind of matrix", "matrices", *columns, "largest error", "in layer")]
        rows += [(kind, f"{len(some)}", *cells(together(kind, some)), *largest(some)) for kind, some in by_kind(layers).items()]
    return [*rows, ("all", f"{len(layers):,}", *cells(together("all", layers)), *(() if each else largest(layers)))]


def cells(layer: Layer) -> Row:
    return amount(layer.before), amount(layer.after), f"{layer.bits:.3f}", f"{layer.error:.4f}", f"{layer.cosine:.5f}"


def largest(layers: Sequence[Layer]) -> Row:
    worst = max(layers, key=lambda layer: layer.error)
    return f"{worst.error:.4f}", str(worst.depth)


def by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def account(
    what: str, layers: Sequence[Layer], unquantized: Mapping[str, tuple[int, int]], files: tuple[int, int]
) -> list[Row]:
    """Return where the bytes are. unquantized: part → (numbers, bytes); files: bytes of all weights before and after."""
    total = together(what, layers)
    rows = [("", "numbers", "before", "after"), (total.name, f"{total.numbers:,}", amount(total.before), amount(total.after))]
    rows += [(name, f"{numbers:,}", amount(size), amount(size)) for name, (numbers, size) in unquantized.items()]
    numbers = total.numbers + sum(numbers for numbers, _ in unquantized.values())
    return [*rows, ("files of weights", f"{numbers:,}", *map(amount, files))]


SCORES = {  # key of a validation: (heading, format, format of the change)
    "loss": ("loss", "{:.4f}", "{:+.4f}"),
    "perplexity": ("perplexity", "{:,.2f}", "× {:.4f}"),
    "bits_per_byte": ("bits per byte", "{:.4f}", "{:+.4f}"),
    "masked_accuracy": ("masked accuracy", "{:.2%}", "{:+.2%}"),
}


def score_table(before: Mapping[str, float], after: Mapping[str, float], scheme: str) -> list[Row]:
    """Return validation scores before and after. Perplexity changes by a factor, the others by a difference."""
    keys = [key for key in SCORES if key in before]
    changes = {key: after[key] / before[key] if key == "perplexity" else after[key] - before[key] for key in keys}
    return [
        ("", *(perplexity_of(before) if key == "perplexity" else SCORES[key][0] for key in keys)),
        ("before", *(SCORES[key][1].format(before[key]) for key in keys)),
        (scheme, *(SCORES[key][1].format(after[key]) for key in keys)),
        ("change", *(SCORES[key][2].format(changes[key]) for key in keys)),
    ]


def score_line(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    old, new = before["perplexity"], after["perplexity"]
    return f"{perplexity_of(before)} {old:,.2f} before, {new:,.2f} after (× {new / old:.4f})"


def perplexity_of(scores: Mapping[str, float]) -> str:
    """Return the name of the perplexity: that of masked tokens is a pseudo-perplexity."""
    return "pseudo-perplexity" if "masked_accuracy" in scores else "perplexity"


def amount(size: float) -> str:
    """Format a number of bytes in decimal units.

    >>> amount(532), amount(8_456), amount(12_345_678), amount(2.5e9)
    ('532 B', '8.5 KB', '12.3 MB', '2.50 GB')
    """
    for unit, digits, each in (("GB", 2, 1e9), ("MB", 1, 1e6), ("KB", 1, 1e3)):
        if size >= each:
            return f"{size / each:,.{digits}f} {unit}"
    return f"{size:.0f} B"
