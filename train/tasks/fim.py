"""Fill in the middle: causal language modelling in which a share of the texts has its middle at the end."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from data.shell import command
from train.registry import settings_of
from train.runs.errors import TrainError
from train.task import Batch, Info, Scores, Totals
from train.tasks.clm import CausalTask
from train.token_task import BlockBatches, is_built_in_corpus

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from data.sources.shards import Shards
    from data.tokenizer.base import Tokenizer
    from train.config import TrainConfig
    from train.objective import Objective

TEXT, INFILL = " text", " infill"  # sources of validation batches; the space keeps them apart from a mixture's names
SAMPLE_TOKENS, SAMPLE_CHARACTERS = 60, 160


@dataclass(frozen=True)
class Settings:
    """Fill in the middle (--objective fim)."""

    rate: float = 0.5
    """The share of texts whose middle is moved to the end; the others stay left to right."""
    spm_rate: float = 0.5
    """Of these, the share in the order suffix, prefix, middle; the others are prefix, suffix, middle."""
    format: Literal["starcoder", "santacoder", "codellama", "qwen", "deepseek"] = "starcoder"
    """The published format: the names of its tokens, and how spm is tokenized."""
    level: Literal["context", "document"] = "context"
    """context: pack, then transform each piece of a document in a row, in its length. document: transform whole documents, then
    pack; a row may then begin or end inside a part, and an epoch's text is in memory."""

    def __post_init__(self) -> None:
        for name in ("rate", "spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainError(f"--fim.{name.replace('_', '-')} {getattr(self, name)}: a share, from 0 to 1")


class DocumentBatches(BlockBatches):
    """Micro-batches of documents that were transformed whole."""

    def documents(self, step: int) -> list[int]:
        return self.task.stream.document_indices(step)


class FimTask(CausalTask):
    """Fill in the middle. The loss is that of plain held-out text, left to right, as of --objective clm; beside it the loss of
    middles of fixed held-out gaps (infill_loss), and of the same middles with another gap's suffix (shuffled_loss).

    These gaps are in the order psm, or in spm where no other is trained (--fim.spm-rate 1; a format that tokenizes prefix and
    middle together then scores both). Samples are in spm, if it is trained: there a small network uses the suffix.
    """

    Settings: ClassVar[type] = Settings
    perplexity_of = ()  # clm's is the same

    @classmethod
    def controls(cls, config: "TrainConfig") -> tuple[str, ...]:
        from data.transforms.fim import FORMATS

        return tuple(FORMATS[settings_of(config).format].names.values())

    @classmethod
    def open_data(cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False) -> "Shards":
        if settings_of(config).level == "document" and config.data.weights:
            raise TrainError("--fim.level document reads one source: give --corpus without weights, or --fim.level context")
        if tokenizer is not None:
            cls.transform_of(config, tokenizer)  # before the text is prepared
        return super().open_data(config, tokenizer, info, progress=progress)

    @staticmethod
    def transform_of(config: "TrainConfig", tokenizer: "Tokenizer", **changes: float):
        """Build the transform of a run."""
        from data.transforms.fim import FillInMiddle

        settings = settings_of(config)
        rates = {"rate": settings.rate, "spm_rate": settings.spm_rate} | changes
        return FillInMiddle(tokenizer, settings.format, seed=config.run.seed, **rates)

    def __init__(self, config: "TrainConfig", shards: "Shards"):
        from data.packing.blocks import sequential_blocks
        from data.packing.document_blocks import DocumentBlocks

        tokenizer, optimizer, context = shards.tokenizer, config.optimizer, config.network.context
        self.settings, self.fim = settings_of(config), self.transform_of(config, tokenizer)
        super().__init__(config, shards)
        if self.settings.level == "document":
            rows = optimizer.batch_size * optimizer.accumulate
            ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
            options = {"context": context, "batch_size": rows, "seed": config.run.seed}
            self.stream = DocumentBlocks(shards.train.ids, self.fim.transform_document, **options, **ids)
            self.source = DocumentBatches(self)
        size = optimizer.batch_size
        every = self.transform_of(config, tokenizer, rate=1.0, spm_rate=float(self.settings.spm_rate == 1))
        infill = [
            self.infill_batch(every, block, i * size) for i, block in enumerate(sequential_blocks(self.held_out, context, size))
        ]
        self.text_sources = list(self.validation_sources) or [TEXT] * len(self.validation)
        self.validation = [*self.validation, *infill]
        self.validation_sources = [*self.text_sources, *[INFILL] * len(infill)]

    # ---- batches

    def batch(self, block_BT1: "Tensor", step: int, first_row: int) -> Batch:
        if self.settings.level == "context":
            block_BT1, _ = self.fim.transform_blocks(block_BT1, step, first_row)
        return self.labelled(block_BT1)

    def labelled(self, block_BT1: "Tensor") -> Batch:
        """Make inputs and labels: the next token, sentinels and ends too; padding of a suffix is not scored."""
        from data.transforms.causal import IGNORE, clm_batch

        batch = clm_batch(block_BT1, self.tokenizer.bos_id, self.tokenizer.eos_id)
        if self.fim.pad_id is not None:
            batch["labels"] = batch["labels"].masked_fill(batch["labels"] == self.fim.pad_id, IGNORE)
        return batch

    def validation_batch(self, block_BT1: "Tensor", first_row: int) -> Batch:
        return CausalTask.batch(self, block_BT1, 0, first_row)

    def infill_batch(self, every, block_BT1: "Tensor", first_row: int) -> Batch:
        """Make a batch of gaps, of which middles and their ends alone are scored."""
        from data.transforms.causal import IGNORE
        from data.transforms.fim import VALIDATION_STEP, keep_middle_labels, with_wrong_suffix

        ids_BT1, kinds_BT1 = every.transform_blocks(block_BT1, VALIDATION_STEP, first_row)
        batch = self.labelled(ids_BT1)
        labels = keep_middle_labels(batch["labels"], kinds_BT1, IGNORE)
        return with_wrong_suffix(batch | {"labels": labels}, kinds_BT1, self.fim.pad_id)

    def introduction(self) -> str:
        settings = self.settings
        what = "documents" if settings.level == "document" else "pieces of documents in a row"
        return (
            f"{super().introduction()}fim      {settings.rate:.0%} of the {what} have the middle at the end, "
            f"{settings.spm_rate:.0%} of these the suffix first; tokens of {settings.format}\n"
        )

    # ---- scores

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.context_objective import ContextObjective

        return ContextObjective(networks, loss, held_out)

    def source_losses(self, totals: Totals) -> Scores:
        mixed = {f"loss_{name}" for name in self.text_sources} - {f"loss_{TEXT}"}
        return {name: loss for name, loss in super().source_losses(totals).items() if name in mixed}

    def scores(self, totals: Totals) -> Scores:
        of_text = [totals[f"loss_{name}"] for name in dict.fromkeys(self.text_sources)]
        (nats, count), (wrong, _) = totals[f"loss_{INFILL}"], totals["shuffled_loss"]
        text = {"loss": (sum(nats for nats, _ in of_text), sum(count for _, count in of_text))}
        infill = {"infill_loss": nats / count, "shuffled_loss": wrong / count} if count else {}  # a short text may have no gap
        return {**super().scores({**totals, **text}), **infill}

    def score_line(self, scores: Scores) -> str:
        if "infill_loss" not in scores:
            return f"{super().score_line(scores)} · no held-out gap"
        middles = f"middles {scores['infill_loss']:.4f}, with another gap's suffix {scores['shuffled_loss']:.4f}"
        return f"{super().score_line(scores)} · {middles}"

    # ---- samples

    @property
    def sample_order(self) -> str:
        return "spm" if self.settings.spm_rate > 0 else "psm"

    def gap(self) -> tuple[str, str, str]:
        """Return prefix, middle and suffix of a gap in held-out text: the end of a line."""
        text = self.tokenizer.decode(self.sample_prompt(4 * SAMPLE_CHARACTERS))[: 2 * SAMPLE_CHARACTERS]
        middle = text.find(" ", len(text) // 3) + 1 or len(text) // 3
        end = text.find("\n", middle + 1)
        end = end if 0 < end < len(text) - 1 else len(text) * 2 // 3
        return text[:middle], text[middle:end], text[end:]

    def gap_ids(self, prefix: str, suffix: str) -> list[int]:
        return [*self.tokenizer.affixes.prefix, *self.fim.build_prompt(prefix, suffix, self.sample_order)]

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str]:
        import torch

        from model.generate import generate

        prefix, middle, suffix = self.gap()
        tokenizer, context = self.tokenizer, self.config.network.context
        new_tokens = min(SAMPLE_TOKENS, context // 2)
        while len(ids := self.gap_ids(prefix, suffix)) > context - new_tokens and (prefix or suffix):
            prefix, suffix = prefix[len(prefix) // 4 + 1 :], suffix[: len(suffix) * 3 // 4]
        options = {"max_new_tokens": new_tokens, "temperature": 0.0, "stop_ids": [self.fim.end_id, *self.fim.ids.values()]}
        new = generate(network, torch.tensor([ids], device=device), **options)
        text = f"{prefix}[{tokenizer.decode(new[0].tolist())}]{suffix}".strip("\n")
        return f"held-out text, and in brackets the middle that the network writes in place of {middle!r}", text

    def example_command(self, folder: Path) -> str:
        prefix, suffix = "Return the", " of the list."
        if not is_built_in_corpus(self.config):
            words = " ".join(self.tokenizer.decode(self.sample_prompt()).split()[:6]).split(" ")
            prefix, suffix = " ".join(words[:2]), " " + " ".join(words[4:])
        gap = ("--prefix", prefix, "--suffix", suffix, "--infill-order", self.sample_order)
        return command("model", "generate", folder, *gap)


TASK = FimTask
