"""Options of `python -m quant`: a dataclass for each scheme; without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from data.config import BUILT_IN
from data.sources.find import may_hold_records
from quant.config import FourBit, Int8
from train.command_line import Needs

KINDS: dict[str, type["Options"]] = {}  # scheme: its options, as each class below registers
UNSCORED = "--no-perplexity scores no text"


def named_text(asked: "Options") -> tuple[str, ...]:
    return (*asked.corpus, *getattr(asked, "calibrate", ()))


OF_TEXT = (
    Needs(("text_key",), lambda asked: may_hold_records(named_text(asked)), "no records are named, by --corpus"),
    Needs(
        ("on_bad_text",),
        lambda asked: any(entry not in BUILT_IN for entry in named_text(asked)),
        "no files of yours are named, by --corpus",
    ),
)


def options_of(scheme: str) -> Callable[[type["Options"]], type["Options"]]:
    """Register a class of options as those of a scheme of `quant.config.SCHEMES`."""

    def register(kind: type["Options"]) -> type["Options"]:
        KINDS[scheme] = kind
        return kind

    return register


@dataclass(frozen=True)
class Options:
    """Options that all schemes share."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A model folder, or a run (its best checkpoint, else its last)."""
    out: Path
    """The folder to write; it must be empty or not exist yet."""
    skip: tuple[str, ...] = ()
    """Regular expressions: a matrix is not quantized if one matches in its name. Heads and embeddings never are."""
    per_layer: bool = False
    """Print a row for each matrix, however many there are."""
    perplexity: bool = True
    """Measure perplexity on held-out text before and after."""
    corpus: tuple[str, ...] = ()
    """Text whose validation split is scored: files, folders, globs or a built-in name, as for training. Default: the text that
    the run was trained on; for another folder, Python's documentation."""
    text_key: str | None = None
    """The key or table column that holds a record's text. Default: the run's, else text."""
    on_bad_text: Literal["error", "replace", "skip"] | None = None
    """Text that is not valid UTF-8: stop, replace by U+FFFD, or skip the document. Default: the run's, else error."""
    eval_tokens: int = 50_000
    """Largest number of tokens to score."""
    cache: Path | None = None
    """Folder for the tokenized text. Default: as for training."""
    device: str = "cpu"
    """Device that measures perplexity: cpu, cuda, …"""
    threads: int = 0
    """CPU threads; 0: torch's default."""
    NEEDS: ClassVar = (
        Needs(("corpus", "eval_tokens"), lambda asked: asked.perplexity, UNSCORED),
        Needs(("cache",), lambda asked: asked.perplexity, UNSCORED),
        *OF_TEXT,
    )


@dataclass(frozen=True)
class FourBitOptions(Options):
    double_quantized: Annotated[bool, tyro.conf.arg(name="double")] = True
    """Double quantization: store the blocks' scales in 8 bits too."""
    block_size: int = 64
    """Weights that share a scale: 32, 64 … 4096."""

    def settings(self, scheme: str) -> FourBit:
        return FourBit(scheme, self.double_quantized, self.block_size, self.skip)


@options_of("nf4")
@dataclass(frozen=True)
class Nf4(FourBitOptions):
    """NF4: sixteen values at the quantiles of a normal distribution. The usual choice, of QLoRA too."""


@options_of("fp4")
@dataclass(frozen=True)
class Fp4(FourBitOptions):
    """FP4: a sign, two bits of exponent, one of fraction. Its error on trained weights is larger than NF4's."""


@dataclass(frozen=True)
class IntegerOptions(Options):
    bits: int = 8
    """Bits of a weight, from 2 to 8; in the files each weight takes a byte. Inputs have 8."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """Weights that share a scale: all of a matrix, a row of it, or --group-size of a row."""
    group_size: int = 128
    """Weights in a group."""
    affine_weights: bool = False
    """Add a zero point to each scale of a weight."""
    NEEDS: ClassVar = (
        *Options.NEEDS,
        Needs(("group_size",), lambda asked: asked.granularity == "group", "it is of --granularity group"),
    )

    def settings(self, scheme: str) -> Int8:
        return Int8(
            scheme,
            self.bits,
            self.granularity,
            self.group_size,
            affine_weights=self.affine_weights,
            affine_inputs=self.affine_inputs,
            skip=self.skip,
        )


@options_of("int8-dynamic")
@dataclass(frozen=True)
class Int8Dynamic(IntegerOptions):
    """INT8 weights and inputs; inputs are scaled row by row as they come. Needs no calibration text."""

    affine_inputs: bool = False
    """Add a zero point to each scale of an input."""


@options_of("int8-static")
@dataclass(frozen=True)
class Int8Static(IntegerOptions):
    """INT8 weights and inputs; each layer's input has one scale, observed beforehand on calibration text."""

    affine_inputs: bool = True
    """Add a zero point to each scale of an input."""
    calibrate: tuple[str, ...] = ()
    """Text whose training split calibrates the inputs: as --corpus. Default: the text that is scored."""
    calibrate_tokens: int = 65_536
    """Number of calibration tokens, in full batches, or fewer if the text is shorter."""
    observer: Literal["minmax", "moving", "histogram", "percentile", "mse"] = "histogram"
    """An input's range: minimum and maximum; their moving average over batches; least squared error, from a histogram; without
    the outermost 0.01 %; or least squared error of 100 candidates on the last batch (slow)."""
    NEEDS: ClassVar = (
        Needs(
            ("corpus",),
            lambda asked: asked.perplexity or not asked.calibrate,
            "--no-perplexity scores no text, and --calibrate names the text to observe",
        ),
        Needs(("eval_tokens",), lambda asked: asked.perplexity, UNSCORED),
        *OF_TEXT,
        IntegerOptions.NEEDS[-1],
    )


@options_of("llm-int8")
@dataclass(frozen=True)
class LlmInt8(Options):
    """LLM.int8(): INT8 weights and inputs, scaled row by row; input columns with an outlier keep their dtype."""

    threshold: float = 6.0
    """An input column is an outlier, and not quantized, if a magnitude in it reaches this."""

    def settings(self, scheme: str) -> Int8:
        return Int8(scheme, threshold=self.threshold, skip=self.skip)
