"""Further records of a record objective (--eval-corpus): scored by a second task, whose held-out records they are."""

import json
from collections.abc import Iterable
from dataclasses import replace

from data.config import DataError
from data.messages import format_count
from data.sources.records import RecordData, Rows, hash_rows
from data.tokenizer.base import Tokenizer
from train.eval_text import misfit
from train.task import EvalCorpus, Info, Task

MOST = 10_000  # records whose tokens are counted


def open_records(task: Task, data: RecordData, name: str, paths: tuple[str, ...], info: Info) -> EvalCorpus:
    """Open records of --eval-corpus, with the columns of the run's own. Errors (DataError): those of held-out records.

    The training records are read with them: labels must be known, and baselines are fitted on them.
    """
    config = replace(task.config, data=replace(task.config.data, validation=paths))
    try:
        rows = type(task).open_data(config, task.tokenizer, info).validation
    except DataError as error:
        raise DataError(reworded(str(error))) from error
    scored = type(task)(task.config, replace(data, validation=rows))
    return EvalCorpus(name, scored, describe(task, data.train, rows, len(scored.data.validation)), hash_rows(rows))


def reworded(message: str) -> str:
    """Return a message about held-out records, without advice on what is held out.

    >>> reworded("--validation a.jsonl: no such file"), reworded("it has documents: name files, --validation FILE.jsonl")
    ('the path a.jsonl: no such file', 'it has documents: name files, NAME=FILE.jsonl')
    """
    if message.startswith("--validation "):
        message = f"the path {message.removeprefix('--validation ')}"
    return message.partition(". Give more records of it")[0].replace("--validation ", "NAME=")


def describe(task: Task, train: Rows, rows: Rows, scored: int) -> str:
    """Describe records: how many, which are trained on too, and a tokenizer that does not fit their texts."""
    known = set(map(key, train.values))
    shared = sum(key(row) in known for row in rows.values)
    texts = [text for row in rows.values[:MOST] for text in task.texts(task.settings, row)]
    own = [text for row in train.values[:MOST] for text in task.texts(task.settings, row)]
    here, there = (count_tokens(each, task.tokenizer) for each in (texts, own))
    some = f"{scored:,} of {len(rows):,} records" if scored < len(rows) else format_count(scored, "record")
    of_first = f" in the first {MOST:,}" if len(rows) > MOST else ""
    line = f"{some}, {format_count(here[0], 'token')}{of_first}"
    if shared:
        line += f"; {shared:,} of these {'is' if shared == 1 else 'are'} trained on too"
    return line + misfit(here, there)


def key(row: dict) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def count_tokens(texts: Iterable[str], tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Return (tokens, bytes, unknown tokens) of texts."""
    tokens = size = unknown = 0
    for text in texts:
        ids = tokenizer.encode(text)
        tokens, size = tokens + len(ids), size + len(text.encode())
        unknown += ids.count(tokenizer.unknown_id)
    return tokens, size, unknown
