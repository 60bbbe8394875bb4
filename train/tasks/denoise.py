"""Denoising (BART): the encoder reads a noised text, and the decoder writes the text as it was."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data.config import DataError
from train.command_line import Needs
from train.registry import settings_of
from train.runs.errors import TrainError
from train.source_task import SourceTask
from train.task import Batch, Defaults

if TYPE_CHECKING:
    from torch import Tensor

    from data.sources.shards import Shards
    from model.config import ModelConfig
    from train.config import TrainConfig


@dataclass(frozen=True)
class Settings:
    """Denoising (--objective denoise). The defaults are those that BART was published with."""

    mask: float = 0.3
    """Share of the words that spans replace by a mask each."""
    poisson: float = 3.5
    """Mean length of a span, in words; a span of 0 words inserts a mask."""
    permute: float = 1.0
    """Share of the sentences that trade places."""
    mask_random: float = 0.1
    """Share of the masks that are a random token instead."""
    insert: float = 0.0
    """Share of the tokens that is inserted: masks, and random tokens by --denoise.mask-random."""
    rotate: float = 0.0
    """Probability that a text begins at a random token, and its beginning follows its end."""
    words: bool = True
    """Mask whole words; --denoise.no-words masks tokens."""

    def __post_init__(self) -> None:
        for name in ("mask", "permute", "mask_random", "insert", "rotate"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainError(f"--denoise.{name.replace('_', '-')} {getattr(self, name)}: a fraction, from 0 to 1")
        if not 0.1 <= self.poisson <= 16:  # far below, nearly all spans have 0 words
            raise TrainError(f"--denoise.poisson {self.poisson}: must be from 0.1 to 16")
        if not (self.mask or self.permute or self.insert or self.rotate):
            raise TrainError("--denoise.mask, permute, insert and rotate are all 0: there is no noise to remove")


class DenoiseTask(SourceTask):
    """Denoising as BART's: --context is the length of a text with its special tokens.

    Documents are concatenated and split, with no mask between them.
    """

    Settings: ClassVar[type] = Settings
    defaults = Defaults("tiny-bart", 2e-3, vocab_size=512)
    needs_mask = True
    needs = (
        Needs(
            ("denoise.poisson", "denoise.words"),
            lambda config: config.denoise.mask > 0,
            "--denoise.mask 0 masks no words",
        ),
        Needs(
            ("denoise.mask_random",),
            lambda config: config.denoise.mask > 0 or config.denoise.insert > 0,
            "without --denoise.mask and --denoise.insert there are no masks",
        ),
    )

    @classmethod
    def start_id(cls, config: "ModelConfig") -> int:
        return config.eos_id  # as BART: the target with its eos moved to the front

    def __init__(self, config: "TrainConfig", shards: "Shards"):
        from data.transforms.denoise import Noise, vocabulary_of

        settings = asdict(settings_of(config))
        self.vocabulary = vocabulary_of(shards.tokenizer, whole_words=settings.pop("words"))
        self.noise = Noise(**settings)
        super().__init__(config, shards)

    @property
    def block_length(self) -> int:
        context, special_count = self.config.network.context, len(self.frame.prefix) + len(self.frame.suffix)
        if context <= special_count:
            taken = f"a text has {special_count} special tokens around it"
            raise DataError(f"--context {context}: {taken}, and nothing is left for it")
        return context - special_count

    def corrupt(self, block_BT: "Tensor", step: int, first_row: int) -> Batch:
        from data.transforms.denoise import denoise_batch

        place = {"seed": self.config.run.seed, "step": step, "first_row": first_row}
        options = {"max_source": self.config.network.context} | place
        return denoise_batch(block_BT, self.noise, self.frame, self.vocabulary, **options)

    def example_command(self, folder: Path) -> str:
        return self.example(folder, self.tokenizer.token_name(self.tokenizer.mask_id))


TASK = DenoiseTask
