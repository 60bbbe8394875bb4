"""Objectives on plain text: blocks of a token stream of concatenated documents."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from data.config import MASK
from data.messages import format_count
from data.shell import command
from train.task import Batch, EvalCorpus, Info, Scores, Task, Totals

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from data.sources.shards import Shards
    from data.tokenizer.base import Tokenizer
    from train.config import TrainConfig

SAMPLE_TOKENS = 80


class BlockBatches:
    """The micro-batches of a task's blocks, and the documents in them."""

    is_on_policy = False

    def __init__(self, task: "TokenTask"):
        self.task = task

    def batches(self, step: int, policy: object = None) -> list[Batch]:
        optimizer = self.task.config.optimizer
        micro_batches = self.task.stream.batch(step).chunk(optimizer.accumulate)
        return [self.task.batch(block_BT1, step, i * optimizer.batch_size) for i, block_BT1 in enumerate(micro_batches)]

    def documents(self, step: int) -> list[int]:
        """Return the indices of a step's training documents, in the order of the shards."""
        import numpy as np

        starts = np.flatnonzero(self.task.shards.train.ids == self.task.tokenizer.bos_id)
        return np.unique(np.searchsorted(starts, self.task.stream.token_indices(step)[:, :-1], side="right") - 1).tolist()

    def origin(self, step: int) -> list[str]:
        return [f"document {number}" for number in self.documents(step)]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class TokenTask(Task):
    """A task whose examples are blocks of the token stream: `batch` makes inputs and labels."""

    can_mix = True
    needs_mask = False  # the tokenizer must have a mask token
    has_bits_per_byte: ClassVar[bool] = False  # the validation loss is that of each token of the text in turn
    affix_flags: ClassVar[Mapping[str, bool]] = MappingProxyType({})  # special tokens that a new tokenizer adds

    @classmethod
    def controls(cls, config: "TrainConfig") -> tuple[str, ...]:
        """Return the control tokens of a newly trained tokenizer besides <s> and </s>; a given one is checked by the task."""
        return (MASK,) if cls.needs_mask else ()

    @classmethod
    def open_data(cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False) -> "Shards":
        from data.corpus.prepare import prepare

        options = {"controls": cls.controls(config), "affix_flags": cls.affix_flags}
        if cls.defaults.vocab_size is not None:
            options["vocab_size"] = cls.defaults.vocab_size
        return prepare(config.data, tokenizer=tokenizer, **options, info=info, progress=progress)

    @property
    def block_length(self) -> int:
        """The tokens of the stream in one block."""
        return self.config.network.context

    def __init__(self, config: "TrainConfig", shards: "Shards"):
        from data.packing.blocks import BlockStream, MixedBlocks, check_length, sequential_blocks
        from train.mixing import Mixing

        self.config, self.data, self.shards, self.tokenizer = config, shards, shards, shards.tokenizer
        optimizer, length = config.optimizer, self.block_length
        ids, ranges, rows = shards.train.ids, shards.train.ranges, optimizer.batch_size * optimizer.accumulate
        for name, (start, end) in ranges.items():
            check_length(ids[start:end], length, f"what is trained on of the source {name}")
        blocks = {name: tokens / length for name, tokens in shards.train.tokens_by_source.items()}
        documents = shards.train.documents_by_source(self.tokenizer.bos_id)
        self.mixing = Mixing(config.data, blocks, documents, config.run.seed)
        if ranges:
            shares = list(self.mixing.shares.values())
            self.stream = MixedBlocks(ids, list(ranges.values()), shares, length, rows, config.run.seed)
        else:
            self.stream = BlockStream(ids, length, rows, config.run.seed)
        self.source = BlockBatches(self)
        self.held_out = validation_ids(config, shards)
        check_length(self.held_out, 1, "the validation split")
        ids_by_source = validation_ids_by_source(config, shards)
        size = optimizer.batch_size
        blocks = [(name, block) for name, ids in ids_by_source.items() for block in sequential_blocks(ids, length, size)]
        self.validation = [self.validation_batch(block, i * size) for i, (_, block) in enumerate(blocks)]
        self.validation_sources = [name for name, _ in blocks] if shards.validation.ranges else []

    @abstractmethod
    def batch(self, block_BT1: "Tensor", step: int, first_row: int) -> Batch:
        """Make inputs and labels of rows of a step's global batch, from row `first_row` on."""

    @abstractmethod
    def validation_batch(self, block_BT1: "Tensor", first_row: int) -> Batch:
        """Make inputs and labels of held-out text; always the same for a block."""

    def eval_batches(self, ids: "np.ndarray") -> list[Batch]:
        """Make the batches of a further text, which are scored as those of `validation` are."""
        from data.packing.blocks import sequential_blocks

        size = self.config.optimizer.batch_size
        blocks = sequential_blocks(ids, self.block_length, size)
        return [self.validation_batch(block, i * size) for i, block in enumerate(blocks)]

    def open_eval_corpus(self, data: "Shards", name: str, paths: tuple[str, ...], info: Info) -> EvalCorpus:
        from train.eval_text import open_text

        return open_text(self, data, name, paths, info)

    def identity(self) -> dict:
        splits = {"train_tokens": self.shards.train.tokens, "validation_tokens": self.shards.validation.tokens}
        return {"tokenizer_sha256": self.tokenizer.sha256, **splits}

    def epochs(self, steps: int) -> float:
        optimizer = self.config.optimizer
        return steps * optimizer.batch_size * optimizer.accumulate * self.block_length / self.shards.train.tokens

    def per_step(self) -> str:
        optimizer = self.config.optimizer
        return format_count(optimizer.batch_size * optimizer.accumulate * self.block_length, "token")

    def introduction(self) -> str:
        shards, home = self.shards, str(Path.home())
        cache = str(shards.folder).replace(home, "~", 1) if home != "/" else str(shards.folder)
        return (
            f"text     {' '.join(self.config.data.corpus)}: {format_count(shards.train.documents, 'document')}, "
            f"{shards.train.bytes:,} bytes to train on; {format_count(shards.validation.documents, 'document')}, "
            f"{shards.validation.bytes:,} held out\n"
            f"tokens   {self.tokenizer.vocab_size:,} pieces, {shards.train.bytes / shards.train.targets:.2f} bytes a token; "
            f"{shards.train.tokens:,} to train on; shards in {cache} ({'built' if shards.is_new else 'reused'})\n"
            f"{self.mixture()}{separator_line(self.tokenizer)}"
        )

    def mixture(self) -> str:
        """Describe the sources of a mixture: the share and the epochs of each."""
        optimizer, held_out = self.config.optimizer, self.shards.validation.tokens_by_source
        rows = self.config.run.steps * optimizer.batch_size * optimizer.accumulate
        return self.mixing.describe(rows, held_out, dict.fromkeys(self.validation_sources))

    def drawn(self, step: int) -> Scores:
        return self.mixing.drawn(step * self.config.optimizer.batch_size * self.config.optimizer.accumulate)

    def source_losses(self, totals: Totals) -> Scores:
        """Return `loss_NAME` of each source of a mixture that has held-out text."""
        losses = {name: totals.get(f"loss_{name}", (0.0, 0)) for name in dict.fromkeys(self.validation_sources)}
        return {f"loss_{name}": nats / count for name, (nats, count) in losses.items() if count}

    def source_line(self, scores: Scores) -> str:
        """Format the losses of the sources, after the total loss."""
        names = [name for name in dict.fromkeys(self.validation_sources) if f"loss_{name}" in scores]
        losses = ", ".join("{} {:.4f}".format(name, scores[f"loss_{name}"]) for name in names)
        return f" ({losses})" if names else ""

    def sample_prompt(self, tokens: int = 16) -> list[int]:
        """Return the first ids of the last held-out document, up to the end of a word."""
        import numpy as np

        ids = self.held_out
        starts = np.flatnonzero(ids == self.tokenizer.bos_id)
        if self.tokenizer.bos_id == self.tokenizer.eos_id and len(starts) > 1:
            starts = starts[:-1]  # the last one ends a document
        start = int(starts[-1])
        prompt = ids[start : start + 4 * tokens].astype("int64").tolist()
        if self.tokenizer.eos_id in prompt[1:]:
            prompt = prompt[: prompt.index(self.tokenizer.eos_id, 1)]
        begins_word = (i for i, id in enumerate(prompt) if i > tokens and self.tokenizer.token_bytes[id][:1].isspace())
        return prompt[: next(begins_word, tokens + 1)]


class ContinuationTask(TokenTask):
    """A task whose network continues a text: its sample and the command after a run do so."""

    sample_prompt_title = "the beginning of a held-out document"

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str]:
        """Return the beginning of a held-out document, […], and what a decoder writes behind it, sampled by the run's seed."""
        import torch

        from model.generate import generate

        prompt, tokenizer = self.sample_prompt(), self.tokenizer
        new = generate(
            network,
            torch.tensor([prompt], device=device),
            max_new_tokens=SAMPLE_TOKENS,
            temperature=0.7,
            top_k=50,
            eos_id=tokenizer.eos_id,
            generator=torch.Generator(device).manual_seed(self.config.run.seed),
        )
        title = f"{self.sample_prompt_title}, and from […] on what the network generates"
        return title, f"{tokenizer.decode(prompt)}[…]{tokenizer.decode(new[0].tolist())}".strip("\n")

    def example_command(self, folder: Path) -> str:
        """Return the command by which the network continues a text: of another corpus, its first held-out words."""
        prompt = "Return the"
        if not is_built_in_corpus(self.config):
            prompt = " ".join(self.tokenizer.decode(self.sample_prompt()).split()[:3])
        return command("model", "generate", folder, "--prompt", prompt)


def separator_line(tokenizer: "Tokenizer") -> str:
    """Describe the id between documents, and its reason, where the tokenizer has no bos before a text."""
    if tokenizer.affixes.prefix:
        return ""
    why = "as --separator asks" if tokenizer.separator else "its eos: it puts no token before a text"
    return f"         documents are separated by {tokenizer.token_name(tokenizer.bos_id)} (id {tokenizer.bos_id}), {why}\n"


def validation_ids(config: "TrainConfig", shards: "Shards") -> "np.ndarray":
    """Return the scored ids: all held-out ids, or --eval-tokens of them; of a mixture in proportion to each source's size."""
    import numpy as np

    split, limit = shards.validation, config.report.eval_tokens
    if not split.ranges or split.tokens <= limit:
        return split.ids[:limit]
    return np.concatenate(list(validation_ids_by_source(config, shards).values()))


def validation_ids_by_source(config: "TrainConfig", shards: "Shards") -> "dict[str, np.ndarray]":
    """Return the scored ids by source ("" without a mixture); sources without a target are left out."""
    split = shards.validation
    if not split.ranges:
        return {"": validation_ids(config, shards)}
    fraction = min(1.0, config.report.eval_tokens / split.tokens)
    limits = {name: max(2, int((end - start) * fraction)) for name, (start, end) in split.ranges.items()}
    ids_by_source = {name: split.ids[start:end][: limits[name]] for name, (start, end) in split.ranges.items()}
    return {name: ids for name, ids in ids_by_source.items() if len(ids) > 1}


def is_built_in_corpus(config: "TrainConfig") -> bool:
    """Tell if the corpus is Python's own documentation, for which the example prompts are written."""
    return config.data.corpus == type(config.data)().corpus
