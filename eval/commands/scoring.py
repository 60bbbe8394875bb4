"""A model folder as scores want it: its network, its tokenizer, and documents in its ids."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import model.hub
from data.config import DataConfig, DataError
from data.corpus.ingest import find_corpus, read_corpus
from data.notes import describe_reading, describe_spelling, describe_unknown
from data.sizes import split_in_proportion
from data.sources.files import BadText, ReadReport, decode
from data.tokenizer.base import Tokenizer
from data.tokenizer.open import load_tokenizer
from eval.commands.held_out import objective_of, open_text
from model.network import Network
from train.runs.errors import TrainError
from train.runs.open import checked_device, resolve


class Opened(NamedTuple):
    """A network in eval mode, on its device, and the tokenizer beside it."""

    folder: Path
    network: Network
    tokenizer: Tokenizer


class Document(NamedTuple):
    """Ids without those that begin and end a document; the sizes of the text that they stand for, 0 where not known."""

    ids: list[int]
    bytes: int
    characters: int
    words: int


def open_folder(path: Path, *, device: str = "cpu", threads: int = 0) -> Opened:
    """A run (its best checkpoint, else its last) or a model folder."""
    if threads:
        torch.set_num_threads(threads)
    where, folder = checked_device(device), resolve(path)
    config = model.hub.read_config(folder)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    return Opened(folder, model.hub.load(folder, check_finite=True).to(where).eval(), tokenizer)


def language_model(opened: Opened) -> str:
    """What its perplexity is that of: "clm" or "mlm". Errors: none (TrainError)."""
    objective = objective_of(opened.network.config)
    if objective is None:
        config = opened.network.config
        raise TrainError(f"{opened.folder}: perplexity takes a head lm or mlm; this {config.architecture} has {config.head!r}")
    return objective


def documents(
    opened: Opened, corpus: tuple[str, ...], text_key: str = "text", on_bad_text: BadText = "error", *, met: "Met | None" = None
) -> Iterator[Document]:
    """Each text of the corpus, in ids; "-" is standard input, one document. `met`: filled on the way."""
    met = met or Met()
    others = tuple(entry for entry in corpus if entry != "-")
    if len(others) < len(corpus):
        text = decode(sys.stdin.buffer.read(), "standard input", 0, on_bad_text, met.read)
        if text is not None:
            yield document(opened, text, met)
    if others:
        try:
            config = DataConfig(corpus=others, text_key=text_key, on_bad_text=on_bad_text)
            find_corpus(config, met.left_out)
            for found in read_corpus(config, met.read):
                yield document(opened, found.text, met)
        except DataError as error:
            raise DataError(str(error).removeprefix("--corpus ")) from None


def document(opened: Opened, text: str, met: "Met") -> Document:
    ids = opened.tokenizer.encode(text)
    met.unknown += ids.count(opened.tokenizer.unknown_id)
    met.tokens += len(ids)
    return Document(ids, len(text.encode()), len(text), len(text.split()))


@dataclass
class Met:
    """What reading texts met that a score does not show."""

    left_out: list[str] = field(default_factory=list)  # lines of `data.sources.find`
    read: ReadReport = field(default_factory=ReadReport)
    unknown: int = 0
    tokens: int = 0

    def notes(self, tokenizer: Tokenizer) -> list[str]:
        return [*self.left_out, *describe_reading(vars(self.read)), *describe_unknown(self.unknown, self.tokens, tokenizer)]


def held_out(opened: Opened) -> tuple[str, Iterator[Document]]:
    """The text that a run was validated on, document by document; what it is, in words."""
    task = open_text(opened.folder, opened.network.config, eval_tokens=sys.maxsize, say=lambda line: None)
    if isinstance(task, str):
        raise DataError(f"no text is named, and there is no held-out one: {task}")
    split, tokenizer, report = task.shards.validation, task.shards.tokenizer, task.shards.report
    for line in [*describe_reading(report), *describe_spelling(report, tokenizer)]:
        print(f"note: {line}", file=sys.stderr)

    def read() -> Iterator[Document]:
        ids = torch.from_numpy(split.ids[:].astype("int64"))
        found = []
        starts = (ids == tokenizer.bos_id).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            kept = [token for token in ids[start + 1 : end].tolist() if token != tokenizer.eos_id]
            if kept:  # one id both begins and ends: nothing follows the last one
                found.append(kept)
        sizes = [int(tokenizer.byte_lengths[kept].sum()) for kept in found]
        for kept, size in zip(found, split_in_proportion(split.bytes, sizes), strict=True):
            yield Document(kept, size, 0, 0)

    return f"held-out text of {' '.join(task.config.data.corpus)}", read()
