"""Open a model folder or run with its tokenizer, and read documents as token ids."""

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
from eval.commands.held_out import explain_no_objective, objective_of, open_text
from model.network import Network
from train.runs.errors import TrainError
from train.runs.open import checked_device, resolve


class Opened(NamedTuple):
    """A network in eval mode on its device, with its folder and tokenizer."""

    folder: Path
    network: Network
    tokenizer: Tokenizer


class Document(NamedTuple):
    """Token ids of a document without bos and eos, and the sizes of its text; 0 if unknown."""

    ids: list[int]
    bytes: int
    characters: int
    words: int


def open_folder(path: Path, *, device: str = "cpu", threads: int = 0) -> Opened:
    """Open a run (its best checkpoint, else its last) or a model folder."""
    if threads:
        torch.set_num_threads(threads)
    where, folder = checked_device(device), resolve(path)
    config = model.hub.read_config(folder)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    return Opened(folder, model.hub.load(folder, check_finite=True).to(where).eval(), tokenizer)


def perplexity_objective(opened: Opened) -> str:
    """Return the objective that defines the network's perplexity, "clm" or "mlm". Errors: it has none (TrainError)."""
    objective = objective_of(opened.network.config)
    if objective is None:
        config = opened.network.config
        if config.bidirectional_prompt:
            raise TrainError(f"{opened.folder}: no perplexity of plain text: {explain_no_objective(config)}")
        raise TrainError(f"{opened.folder}: perplexity takes a head lm or mlm; this {config.architecture} has {config.head!r}")
    return objective


def read_documents(
    opened: Opened,
    corpus: tuple[str, ...],
    text_key: str = "text",
    on_bad_text: BadText = "error",
    *,
    notes: "ReadingNotes | None" = None,
) -> Iterator[Document]:
    """Yield each text of the corpus as token ids; "-" is standard input, one document. Counts are added to `notes`."""
    notes = notes or ReadingNotes()
    others = tuple(entry for entry in corpus if entry != "-")
    if len(others) < len(corpus):
        text = decode(sys.stdin.buffer.read(), "standard input", 0, on_bad_text, notes.read)
        if text is not None:
            yield encode_document(opened, text, notes)
    if others:
        try:
            config = DataConfig(corpus=others, text_key=text_key, on_bad_text=on_bad_text)
            find_corpus(config, notes.left_out)
            for found in read_corpus(config, notes.read):
                yield encode_document(opened, found.text, notes)
        except DataError as error:
            raise DataError(str(error).removeprefix("--corpus ")) from None


def encode_document(opened: Opened, text: str, notes: "ReadingNotes") -> Document:
    ids = opened.tokenizer.encode(text)
    notes.unknown += ids.count(opened.tokenizer.unknown_id)
    notes.tokens += len(ids)
    return Document(ids, len(text.encode()), len(text), len(text.split()))


@dataclass
class ReadingNotes:
    """Files left out, texts repaired or skipped, and unknown tokens, counted while reading."""

    left_out: list[str] = field(default_factory=list)  # lines of `data.sources.find`
    read: ReadReport = field(default_factory=ReadReport)
    unknown: int = 0
    tokens: int = 0

    def lines(self, tokenizer: Tokenizer) -> list[str]:
        return [*self.left_out, *describe_reading(vars(self.read)), *describe_unknown(self.unknown, self.tokens, tokenizer)]


def held_out_documents(opened: Opened) -> tuple[str, Iterator[Document]]:
    """Return a description of a run's validation text, and its documents."""
    task = open_text(opened.folder, opened.network.config, eval_tokens=sys.maxsize, info=lambda line: None)
    if isinstance(task, str):
        raise DataError(f"no text is given, and there is no held-out text: {task}")
    split, tokenizer, report = task.shards.validation, task.shards.tokenizer, task.shards.report
    for line in [*describe_reading(report), *describe_spelling(report, tokenizer)]:
        print(f"note: {line}", file=sys.stderr)

    def read() -> Iterator[Document]:
        ids = torch.from_numpy(split.ids[:].astype("int64"))
        found = []
        starts = (ids == tokenizer.bos_id).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            tokens = [token for token in ids[start + 1 : end].tolist() if token != tokenizer.eos_id]
            if tokens:  # if one id is both bos and eos, nothing follows the last one
                found.append(tokens)
        sizes = [int(tokenizer.byte_lengths[tokens].sum()) for tokens in found]
        for tokens, size in zip(found, split_in_proportion(split.bytes, sizes), strict=True):
            yield Document(tokens, size, 0, 0)

    return f"held-out text of {' '.join(task.config.data.corpus)}", read()
