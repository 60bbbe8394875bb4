"""Records of files, as rows of named columns; and which of them are held out."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import sentencepiece

from data.config import BUILT_IN, VOCAB_SIZE, DataConfig, DataError
from data.corpus.ingest import find_corpus
from data.corpus.split import split_fraction
from data.sources.files import Document, ReadReport, read_rows
from data.sources.find import expand_home, kind, shortened
from data.sources.record_files import FORMATS, shown
from data.sources.shards import fewer, train
from data.tokenizer.base import SIDE_FILES, Tokenizer
from data.tokenizer.sentencepiece import SentencePieceTokenizer
from data.tokenizer.training import trainer_options
from data.words import counted

Row = dict[str, object]
Say = Callable[[str], None]
NO_FLAGS: Mapping[str, bool] = MappingProxyType({})


@dataclass(frozen=True)
class Rows:
    """Some records: their values, and their names for messages."""

    values: list[Row]
    names: list[str]
    sources: list[str]  # of a mixture which one each is of; else ""

    def __len__(self) -> int:
        return len(self.values)

    def of(self, source: str) -> "Rows":
        """Those of one source."""
        return chosen(self, [each == source for each in self.sources])


@dataclass(frozen=True)
class RecordData:
    """What a task on records is made of. `sha256`: of all records in order and of the split."""

    tokenizer: Tokenizer
    train: Rows
    validation: Rows
    sha256: str


def open_records(
    config: DataConfig,
    *,
    columns: Sequence[tuple[str, str]],
    text_of: Callable[[Row], str],
    check: Callable[[Row], str | None] = lambda row: None,
    say: Say = lambda line: None,
) -> tuple[Rows, Rows]:
    """(train, validation). `columns`: the ones that every record must have, each with the option that names it. `text_of`: the
    text by which a record is held out or not, so that what stands twice is on one side. `check`: what is wrong with a record.

    Where `config.validation` names files, these are held out and all of the corpus is learned from.
    """
    rows = read_all(config, columns, say, check)
    if config.validation:
        held_out = read_all(config.of_validation(), columns, say, check, "--validation")
        return rows, held_out
    if len(rows) < 2:
        raise DataError(f"{' '.join(config.corpus)}: {counted(len(rows), 'record')}, and training and validation need one each")
    fractions = [split_fraction(text_of(row)) for row in rows.values]
    if len(set(fractions)) < 2:
        raise DataError(f"all {len(rows):,} records have the same text: none can be held out. Give --validation FILE")
    # Where chance leaves one side empty, the nearest goes there.
    threshold = min(max(config.val_fraction, sorted(set(fractions))[1]), max(fractions))
    is_held_out = [fraction < threshold for fraction in fractions]
    return chosen(rows, [not out for out in is_held_out]), chosen(rows, is_held_out)


def chosen(rows: Rows, flags: list[bool]) -> Rows:
    places = [place for place, flag in enumerate(flags) if flag]
    return Rows(*([each[place] for place in places] for each in (rows.values, rows.names, rows.sources)))


def read_all(
    config: DataConfig,
    columns: Sequence[tuple[str, str]],
    say: Say,
    check: Callable[[Row], str | None] = lambda row: None,
    option: str = "--corpus",
) -> Rows:
    """All records of the corpus, in a fixed order. Errors name the record, the columns it has and the option (DataError)."""
    left_out: list[str] = []
    rows, report, texts = Rows([], [], []), ReadReport(), []
    for (entry, source, _), (built_in, paths) in zip(config.entries, find_corpus(config, left_out, option), strict=True):
        if built_in or entry in BUILT_IN:
            raise DataError(f"{entry} has documents, and no records with columns: name files, {option} FILE.jsonl")
        texts += [str(path) for path in paths if kind(path) not in FORMATS]
        tables = [path for path in paths if kind(path) in FORMATS]
        is_named = not expand_home(entry).is_dir()
        for name, row in read_rows(tables, config.on_bad_text, report, is_named=is_named):
            for column, names_it in columns:
                if column not in row:
                    raise DataError(f"{name}: no column {column!r}; its columns: {shown(row)}. Name it by {names_it}")
            if (problem := check(row)) is not None:
                raise DataError(f"{name}: {problem}")
            rows.values.append(row)
            rows.names.append(name)
            rows.sources.append(source)
    for line in left_out:
        say(line)
    if texts:
        say(f"left out, as they hold no records: {shortened(texts)}")
    for names, what in ((report.skipped, "left out"), (report.replaced, "mended with U+FFFD")):
        if names:
            say(f"{counted(len(names), 'record')} of bad text {what}: {shortened(names)}")
    if report.without_records:
        say(f"no record in {shortened(report.without_records)}")
    if report.no_records:
        say(f"left out, as no list of records: {shortened(report.no_records)}")
    if not rows.values:
        raise DataError(f"{' '.join(config.corpus)}: no record in it")
    return rows


def hash_of(*parts: Rows) -> str:
    """Of all values, in order."""
    digest = hashlib.sha256()
    for rows in parts:
        for row in rows.values:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        digest.update(b"\0")
    return digest.hexdigest()


def trained_tokenizer(
    config: DataConfig, texts: Iterable[str], say: Say, *, mask: bool = False, around: Mapping[str, bool] = NO_FLAGS
) -> Tokenizer:
    """A SentencePiece tokenizer of the texts, from the cache if they had one before. around: what it puts around a text, in the
    words of tokenizer_config.json (add_bos_token, add_eos_token); by default <s> before it."""
    texts, size = list(texts), config.vocab_size or VOCAB_SIZE
    made_by = json.dumps([sentencepiece.__version__, trainer_options(size, mask)])
    key = hashlib.sha256("\0".join([made_by, str(config.vocab_size), *texts]).encode()).hexdigest()[:16]
    file = config.cache.expanduser() / f"{key}.model"
    beside = {SIDE_FILES[0]: json.dumps(dict(around)).encode()} if around else None
    try:
        return SentencePieceTokenizer(file.read_bytes(), beside=beside)
    except (OSError, DataError):
        pass
    say(f"training a tokenizer of {size:,} pieces on {counted(len(texts), 'text')}")
    tokenizer = train([Document("", text) for text in texts], size, mask, config.vocab_size is None)
    if tokenizer.vocab_size < size:
        say(fewer(tokenizer.vocab_size))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        making = Path(f"{file}.{key}.partial")
        making.write_bytes(tokenizer.model_bytes)
        making.replace(file)
    except OSError as error:
        raise DataError(f"{config.cache}: {error.strerror}. Name another cache folder by --cache") from error
    return SentencePieceTokenizer(tokenizer.model_bytes, beside=beside) if around else tokenizer
