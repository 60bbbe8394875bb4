"""A model folder as scores want it: its network, its tokenizer, and documents in its ids."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import model.hub
from data.config import DataConfig, DataError
from data.corpus import find_corpus, read_corpus
from data.files import ReadReport
from data.find import shortened
from data.tokenizer import Tokenizer, load_tokenizer
from model.network import Network
from train.checkpoint import resolve
from train.config import TrainError
from train.held_out import objective_of, open_text
from train.setup import checked_device


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
    return Opened(folder, model.hub.load(folder).to(where).eval(), tokenizer)


def language_model(opened: Opened) -> str:
    """What its perplexity is that of: "clm" or "mlm". Errors: none (TrainError)."""
    objective = objective_of(opened.network.config)
    if objective is None:
        config = opened.network.config
        raise TrainError(f"{opened.folder}: perplexity takes a head lm or mlm; this {config.architecture} has {config.head!r}")
    return objective


def documents(opened: Opened, corpus: tuple[str, ...], text_key: str = "text") -> Iterator[Document]:
    """Each text of the corpus, in ids; "-" is standard input, one document."""
    others = tuple(entry for entry in corpus if entry != "-")
    if len(others) < len(corpus):
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataError(f"standard input is not UTF-8 (byte 0x{byte:02x} at {error.start:,})") from None
        yield document(opened, text)
    if others:
        try:
            config, left_out = DataConfig(corpus=others, text_key=text_key), []
            find_corpus(config, left_out)
            for line in left_out:
                print(f"note: {line}", file=sys.stderr)
            report = ReadReport()
            for found in read_corpus(config, report):
                yield document(opened, found.text)
            if report.no_records:
                print(f"note: left out, as no list of records: {shortened(report.no_records)}", file=sys.stderr)
        except DataError as error:
            raise DataError(str(error).removeprefix("--corpus ")) from None


def document(opened: Opened, text: str) -> Document:
    return Document(opened.tokenizer.encode(text), len(text.encode()), len(text), len(text.split()))


def held_out(opened: Opened) -> tuple[str, Iterator[Document]]:
    """The text that a run was validated on, document by document; what it is, in words."""
    task = open_text(opened.folder, opened.network.config, eval_tokens=sys.maxsize, say=lambda line: None)
    if isinstance(task, str):
        raise DataError(f"no text is named, and there is no held-out one: {task}")
    split, tokenizer = task.shards.validation, task.shards.tokenizer

    def read() -> Iterator[Document]:
        ids = torch.from_numpy(split.ids[:].astype("int64"))
        starts = (ids == tokenizer.bos_id).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            kept = [token for token in ids[start + 1 : end].tolist() if token != tokenizer.eos_id]
            if kept:  # one id both begins and ends: nothing follows the last one
                yield Document(kept, int(tokenizer.piece_bytes[kept].sum()), 0, 0)

    return f"held-out text of {' '.join(task.config.data.corpus)}", read()
