"""`python -m model predict`: predict the label, number, tags or answer of each record of a file, by the network's head."""

import re
from dataclasses import fields
from importlib import import_module
from typing import NamedTuple

from data.config import DataError
from model.commands.opening import open_network
from model.commands.predict_options import Predict
from model.commands.predict_records import WRITERS, Opened, read_rows_of
from model.config import ConfigError
from train.runs.errors import TrainError


class Served(NamedTuple):
    """A head that the command serves: what it gives, the file with `serve(options, opened)`, and the options that it alone
    reads. (Options that no head has here are read by all.)"""

    gives: str
    module: str
    options: tuple[str, ...]


HEADS = {
    "sequence": Served("labels or numbers of texts", "predict_texts", ("text", "pair", "label", "threshold")),
    "token": Served("tags of words", "predict_tags", ("words", "label")),
    "qa": Served(
        "answers of questions",
        "predict_answers",
        ("context", "question", "label", "stride", "max_answer", "null_threshold", "always_answer", "top"),
    ),
}


def predict(options: Predict) -> None:
    from data.tokenizer.open import load_tokenizer
    from train.runs.open import checked_device, resolve

    check_options(options)
    device, folder = checked_device(options.device), resolve(options.run)
    network = open_network(folder, device, options.base)
    head = network.config.head
    if head not in HEADS:
        raise ConfigError(
            f"{options.run} has the head {head!r}, which classifies no texts and tags no "
            "words and answers no questions: train one, --objective classify, pairs, tag or qa"
        )
    refuse_foreign(options, head)
    tokenizer = load_tokenizer(folder, network.config.vocab_size)
    places, rows = read_rows_of(options.file)
    serve = import_module(f"model.commands.{HEADS[head].module}").serve
    try:
        serve(options, Opened(folder, network, tokenizer, rows, places))
    except (DataError, TrainError) as error:  # training's options are named there
        raise type(error)(re.sub(r"--(?:qa|tag|classify|pairs)\.", "--", str(error))) from None


def refuse_foreign(options: Predict, head: str) -> None:
    """Refuse options that another head reads, and this one does not."""
    foreign = {name for served in HEADS.values() for name in served.options} - set(HEADS[head].options)
    for each in fields(options):
        if each.name in foreign and getattr(options, each.name) != each.default:
            raise ConfigError(
                f"--{each.name.replace('_', '-')} would have no effect: {options.run} has the head {head!r}, which gives "
                f"{HEADS[head].gives}"
            )


def check_options(options: Predict) -> None:
    """Refuse impossible options before anything is opened."""
    if options.out is not None and options.out.suffix.lower() not in WRITERS:
        raise ConfigError(f"--out {options.out}: written are {', '.join(WRITERS)}")
    if options.out is not None and options.out.exists() and options.file.exists() and options.out.samefile(options.file):
        raise ConfigError(f"--out {options.out} is the file that is read")
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: must be at least 1")
    if not 0 <= options.threshold <= 1:
        raise ConfigError(f"--threshold {options.threshold}: a probability, from 0 to 1")
    if options.top < 0:
        raise ConfigError(f"--top {options.top}: must be at least 0")
    if options.max_length is not None and options.max_length < 1:
        raise ConfigError(f"--max-length {options.max_length}: must be at least 1")
