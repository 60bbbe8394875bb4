"""What `python -m quant` asks, a dataclass for each scheme; without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from data.config import BUILT_IN
from data.sources.find import may_hold_records
from quant.config import FourBit, Int8
from train.command_line import Needs

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


@dataclass(frozen=True)
class Options:
    """What all commands here ask."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A model folder, or a run (its best checkpoint, else its last)."""
    out: Path
    """The folder to write; it must be empty, or not there yet."""
    skip: tuple[str, ...] = ()
    """Regular expressions: matrices in whose name one is found stay as they are. Heads and embeddings do anyway."""
    per_layer: bool = False
    """A row of the table for each matrix, however many they are."""
    perplexity: bool = True
    """Score held-out text before and after."""
    corpus: tuple[str, ...] = ()
    """Its validation split is scored: files, folders, globs or a built-in name, as for training. Default: the text that the run
    was trained on; of another folder, Python's documentation."""
    text_key: str | None = None
    """The key, or the column of a table, that holds a record's text. Default: the run's, else text."""
    on_bad_text: Literal["error", "replace", "skip"] | None = None
    """Text that is not valid UTF-8: stop, put U+FFFD there, or leave the document out. Default: the run's, else error."""
    eval_tokens: int = 50_000
    """Score at most so many tokens."""
    cache: Path | None = None
    """Folder for the prepared text. Default: as for training."""
    device: str = "cpu"
    """Where perplexity is measured: cpu, cuda, …"""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    NEEDS: ClassVar = (
        Needs(("corpus", "eval_tokens"), lambda asked: asked.perplexity, UNSCORED),
        Needs(("cache",), lambda asked: asked.perplexity, UNSCORED),
        *OF_TEXT,
    )


@dataclass(frozen=True)
class FourBitOptions(Options):
    double_quantized: Annotated[bool, tyro.conf.arg(name="double")] = True
    """The blocks' scales in eight bits too (double quantization)."""
    block_size: int = 64
    """Weights that share a scale: 32, 64 … 4096."""

    def settings(self, scheme: str) -> FourBit:
        return FourBit(scheme, self.double_quantized, self.block_size, self.skip)


@dataclass(frozen=True)
class Nf4(FourBitOptions):
    """NF4: sixteen values at the quantiles of a normal distribution. The usual choice, of QLoRA too."""


@dataclass(frozen=True)
class Fp4(FourBitOptions):
    """FP4: a sign, two bits of exponent, one of fraction. Coarser than NF4 for weights as training leaves them."""


@dataclass(frozen=True)
class WholeNumberOptions(Options):
    bits: int = 8
    """Of a weight, from 2 to 8; in the files each has a byte. Inputs have 8."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """Weights that share a scale: all of a matrix, a row of it, or --group-size of a row."""
    group_size: int = 128
    """Weights in a group."""
    affine_weights: bool = False
    """A zero point beside each scale of a weight."""
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


@dataclass(frozen=True)
class Int8Dynamic(WholeNumberOptions):
    """INT8, weights and inputs; a layer's inputs are scaled row by row as they come. Needs no text."""

    affine_inputs: bool = False
    """A zero point beside each scale of an input."""


@dataclass(frozen=True)
class Int8Static(WholeNumberOptions):
    """INT8, weights and inputs; a layer's inputs have one scale, observed before on text like that which will be read."""

    affine_inputs: bool = True
    """A zero point beside each scale of an input."""
    calibrate: tuple[str, ...] = ()
    """Inputs are observed on its training split: as --corpus. Default: the training split of the text that is scored."""
    calibrate_tokens: int = 65_536
    """Observe so many tokens, in whole batches, or as many as there are."""
    observer: Literal["minmax", "moving", "histogram", "percentile", "mse"] = "histogram"
    """An input's range: of all numbers, a moving average of the batches', with the least squared error by a histogram, without
    the outermost 0.01 %, or with the least squared error of 100 that are tried on the last batch (slow)."""
    NEEDS: ClassVar = (
        Needs(
            ("corpus",),
            lambda asked: asked.perplexity or not asked.calibrate,
            "--no-perplexity scores no text, and --calibrate names the text to observe",
        ),
        Needs(("eval_tokens",), lambda asked: asked.perplexity, UNSCORED),
        *OF_TEXT,
        WholeNumberOptions.NEEDS[-1],
    )


@dataclass(frozen=True)
class LlmInt8(Options):
    """LLM.int8(): INT8, weights and inputs, row by row; columns of an input with an outlier stay in its own format."""

    threshold: float = 6.0
    """A column of an input where a number reaches this stays as it is."""

    def settings(self, scheme: str) -> Int8:
        return Int8(scheme, threshold=self.threshold, skip=self.skip)


KINDS: dict[str, type[Options]] = {
    "nf4": Nf4,
    "fp4": Fp4,
    "int8-dynamic": Int8Dynamic,
    "int8-static": Int8Static,
    "llm-int8": LlmInt8,
}
