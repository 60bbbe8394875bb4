"""Span corruption (T5): spans of the text become sentinels, and the decoder writes what each of them stands for."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from data.config import DataError
from data.messages import format_count
from data.transforms.denoisers import UL2, Denoiser, corrupted_lengths, noise_counts, parse_denoiser, raw_length
from model.config import ModelConfig
from train.command_line import Needs
from train.registry import settings_of
from train.runs.errors import TrainError
from train.source_task import SourceTask
from train.task import Batch, Defaults, Scores, Totals

if TYPE_CHECKING:
    from torch import Tensor

    from data.sources.shards import Shards
    from train.config import TrainConfig
    from train.objective import Objective

ADVICE = (
    "A shorter --context, a lower --span.density or a larger --span.mean-length needs fewer. To add them: as special tokens of "
    "the tokenizer (transformers: add_special_tokens, save_pretrained); python -m model resize gives the network their rows. "
    "From random weights a tokenizer is trained that has --span.sentinels"
)


@dataclass(frozen=True)
class Settings:
    """Span corruption (--objective span)."""

    density: float = 0.15
    """Share of the tokens that are noise."""
    mean_length: float = 3.0
    """Mean number of tokens of a noise span."""
    convention: Literal["code", "docstring"] = "code"
    """code: targets as T5 was trained with; docstring: with one more sentinel at their end, as in transformers' example."""
    roll: bool = False
    """Rotate the mask at random. Without, a text always begins with a kept token and ends with a noise span, as in T5."""
    mixture: tuple[str, ...] = ()
    """Several denoisers, one drawn for each text: ul2, or MEAN_LENGTH:DENSITY[:WEIGHT] …, with prefix[:DENSITY[:WEIGHT]] for a
    text that is cut in two."""
    sentinels: int | None = None
    """Sentinels <extra_id_0> … of a newly trained tokenizer (T5 has 100). Default: as many as these settings need."""

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise TrainError(f"--span.density {self.density}: must be above 0 and below 1")
        if not 1 <= self.mean_length < float("inf"):
            raise TrainError(f"--span.mean-length {self.mean_length}: must be at least 1, and finite")
        if self.sentinels is not None and self.sentinels < 1:
            raise TrainError(f"--span.sentinels {self.sentinels}: must be at least 1")
        try:
            self.denoisers  # noqa: B018
        except DataError as error:
            raise TrainError(f"--span.mixture {error}") from None

    @property
    def denoisers(self) -> tuple[Denoiser, ...]:
        names = [each for name in self.mixture for each in (UL2 if name == "ul2" else (name,))]
        return tuple(map(parse_denoiser, names)) or (Denoiser(self.mean_length, self.density),)

    @property
    def options(self) -> dict[str, bool]:
        """Options of `corrupted_lengths`."""
        return {"closing": self.convention == "docstring", "roll": self.roll}

    def block_length(self, context: int) -> int:
        """Return the most tokens of text of which neither source nor target has more than `context`, by any denoiser."""
        return min(raw_length(context, each, max_target=context, **self.options) for each in self.denoisers)

    def needed_sentinels(self, length: int) -> int:
        """Return the number of sentinels that a text of `length` tokens may need."""
        counts = [noise_counts(length, each.density, each.mean_length)[1] for each in self.denoisers if not each.is_prefix]
        return max(counts) + sum(self.options.values()) if counts else 0


class SpanTask(SourceTask):
    """Span corruption as T5's: --context is the length of the source, and of the target at most; a block of text is longer.

    Documents are concatenated and split, with no mask between them. Sentinels (with eos, a
    special token too) and words are scored apart.
    """

    Settings: ClassVar[type] = Settings
    defaults = Defaults("tiny-t5", 2e-3, matrix_lr=5e-3, vocab_size=1024, optimizer=(("batch_size", 48),))
    affix_flags: ClassVar = {"add_bos_token": False, "add_eos_token": True}  # as T5's
    has_prefix = False
    needs = (
        Needs(("span.density", "span.mean_length"), lambda config: not config.span.mixture, "--span.mixture has its own"),
        Needs(("span.sentinels",), lambda config: config.run.init is None, "--init brings its own tokenizer"),
    )

    @classmethod
    def controls(cls, config: "TrainConfig") -> tuple[str, ...]:
        from data.transforms.span import SENTINEL

        settings = settings_of(config)
        context = config.network.context or ModelConfig.preset(config.network.preset or cls.defaults.preset).context
        count = settings.sentinels or settings.needed_sentinels(settings.block_length(context))
        return tuple(map(SENTINEL.format, range(count)))

    @classmethod
    def start_id(cls, config: "ModelConfig") -> int:
        return config.pad_id  # as T5

    def __init__(self, config: "TrainConfig", shards: "Shards"):
        from data.transforms.span import SENTINEL, SpanNoise, find_sentinels

        self.config, self.settings = config, settings_of(config)
        settings, tokenizer = self.settings, shards.tokenizer
        self.noise = SpanNoise(settings.denoisers, settings.convention, settings.roll)
        self.sentinels, needed = find_sentinels(tokenizer), settings.needed_sentinels(self.block_length)
        if needed > len(self.sentinels):
            names = f"{SENTINEL.format(len(self.sentinels))} to {SENTINEL.format(needed - 1)}"
            raise DataError(
                f"a text of {self.block_length} tokens needs {needed} sentinels, and this tokenizer "
                f"({', '.join(tokenizer.files)}) has {len(self.sentinels)}: {names} are missing. {ADVICE}"
            )
        super().__init__(config, shards)

    @cached_property
    def block_length(self) -> int:
        return self.settings.block_length(self.config.network.context)

    def corrupt(self, block_BT: "Tensor", step: int, first_row: int) -> Batch:
        from data.transforms.span import span_batch

        place = {"seed": self.config.run.seed, "step": step, "first_row": first_row}
        return span_batch(block_BT, self.noise, self.frame, sentinels=self.sentinels, **place)

    def introduction(self) -> str:
        lines = []
        for each in self.settings.denoisers:
            source, target = corrupted_lengths(self.block_length, each, **self.settings.options)
            if each.is_prefix:
                what = "a random prefix" if each.density is None else f"a prefix, {each.density:.0%} as target"
            else:
                noise, spans = noise_counts(self.block_length, each.density, each.mean_length)
                what = f"{noise} of noise in {format_count(spans, 'span')}"
            lines.append(f"{what}: source {source}, target {target}")
        return f"{super().introduction()}blocks   {self.block_length} tokens of text; {'; '.join(lines)}\n"

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.source_objective import SourceObjective

        return SourceObjective(networks, loss, held_out, sentinels=self.tokenizer.special_ids)

    def scores(self, totals: Totals) -> Scores:
        parts = {name: totals[name] for name in ("word_loss", "sentinel_loss")}
        means = {name: nats / count for name, (nats, count) in parts.items() if count}
        return super().scores(totals) | {"word_baseline_loss": self.word_baseline_loss} | means

    def score_line(self, scores: Scores) -> str:
        parts = (
            f" · words {scores['word_loss']:.4f} (unigrams: {scores['word_baseline_loss']:.4f})",
            f" · sentinels {scores['sentinel_loss']:.4f}" if "sentinel_loss" in scores else "",
        )
        return super().score_line(scores) + "".join(parts)

    def verdict(self, scores: Scores) -> str:
        return f"{super().verdict(scores)}; words {scores['word_loss']:.3f}, {scores['word_baseline_loss']:.3f} by unigrams"

    def example_command(self, folder: Path) -> str:
        from data.transforms.span import SENTINEL

        return self.example(folder, SENTINEL.format(0))


TASK = SpanTask
