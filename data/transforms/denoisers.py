"""The numbers of span corruption: tokens of noise, spans, lengths without padding; the denoisers of a mixture.

Imports the standard library only: the options of `--objective span` are checked by it.
Source: Raffel et al. 2020, arXiv 1910.10683, and its published code (`random_spans_helper`); Tay et al. 2022, arXiv 2205.05131.
"""

from typing import NamedTuple

from data.config import DataError


class Denoiser(NamedTuple):
    """One way of corrupting a block, with its share in a mixture.

    is_prefix: no sentinel; the source is the first tokens and the target the rest, a `density` of the block, or where it is
    None a random number of tokens, uniform over 1 to n - 1.
    """

    mean_length: float = 3.0
    density: float | None = 0.15
    weight: float = 1.0
    is_prefix: bool = False


# Table 1 of UL2: regular (R), extreme (X) and sequential (S) denoisers, here with equal weights.
UL2 = ("3:.15", "8:.15", "3:.5", "8:.5", "64:.15", "64:.5", "prefix:.25")


def parse_denoiser(text: str) -> Denoiser:
    """Parse MEAN_LENGTH:DENSITY, prefix or prefix:DENSITY, each with :WEIGHT behind it or not.

    >>> parse_denoiser("8:.5:2"), parse_denoiser("prefix").density
    (Denoiser(mean_length=8.0, density=0.5, weight=2.0, is_prefix=False), None)
    """
    kind, *numbers = text.split(":")
    is_prefix = kind == "prefix"
    try:
        values = [float(number) for number in numbers]
        mean_length = 3.0 if is_prefix else float(kind)
    except ValueError:
        values = []
        mean_length = 0.0
    if len(values) > 2 or not (values or text == "prefix"):
        raise DataError(f"{text!r} is no denoiser: MEAN_LENGTH:DENSITY, as 3:.15, or prefix or prefix:DENSITY")
    denoiser = Denoiser(mean_length, values[0] if values else None, values[1] if len(values) == 2 else 1.0, is_prefix)
    if not 1 <= mean_length < float("inf"):
        raise DataError(f"{text!r}: a mean length of {mean_length:g}; spans have at least 1 token on average")
    if denoiser.density is not None and not 0 < denoiser.density < 1:
        raise DataError(f"{text!r}: a density of {denoiser.density:g} is not between 0 and 1")
    if not 0 < denoiser.weight < float("inf"):
        raise DataError(f"{text!r}: a weight of {denoiser.weight:g} is not above 0 and finite")
    return denoiser


def noise_counts(length: int, density: float, mean_length: float) -> tuple[int, int]:
    """Return (tokens of noise, spans) of a text of `length` tokens.

        n = max(length, 2)    noise = clip(round(n density), 1, n - 1)    spans = max(round(noise / mean_length), 1)

    round is half to even. At most n - noise spans, as each follows a token that is kept (T5's code fails there).

    >>> noise_counts(568, 0.15, 3), noise_counts(1, 0.15, 3), noise_counts(10, 0.9, 1)
    ((85, 28), (1, 1), (9, 1))
    """
    length = max(length, 2)
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_length), 1), length - noise)


def corrupted_lengths(length: int, denoiser: Denoiser, *, closing: bool = False, roll: bool = False) -> tuple[int, int]:
    """Return the most tokens of (source, target) that a text of `length` tokens gives, with the eos of each.

    closing: the target ends with one more sentinel. roll: a span that is cut in two has two sentinels.
    """
    if denoiser.is_prefix:
        if denoiser.density is None:
            return length, length
        noise, _ = noise_counts(length, denoiser.density, 1)
        return length - noise + 1, noise + 1
    noise, spans = noise_counts(length, denoiser.density, denoiser.mean_length)
    return length - noise + spans + 1 + roll, noise + spans + 1 + closing + roll


def raw_length(context: int, denoiser: Denoiser, *, max_target: int | None = None, **options: bool) -> int:
    """Return the most tokens of text whose source has at most `context` tokens, so that no padding is needed.

    max_target: likewise for its target; options: those of `corrupted_lengths`. Errors (DataError): none has.

    >>> [raw_length(context, Denoiser()) for context in (64, 114, 128, 256, 512, 1024)]
    [70, 126, 141, 284, 568, 1137]
    """

    def fits(length: int) -> bool:
        source, target = corrupted_lengths(length, denoiser, **options)
        return source <= context and (max_target is None or target <= max_target)

    length = 2
    if not fits(length):
        raise DataError(f"a context of {context} tokens is too short for {denoiser}: use a longer one")
    while fits(length + 1):
        length += 1
    return length
