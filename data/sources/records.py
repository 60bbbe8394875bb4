"""Records of files as rows of named columns, and which of them are held out."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import sentencepiece

from data.config import BUILT_IN, DEFAULT_VOCAB_SIZE, DataConfig, DataError
from data.corpus.ingest import find_corpus
from data.corpus.split import split_fraction
from data.messages import Info, format_count, quote_names, shorten_list
from data.sources.files import ReadReport, read_rows
from data.sources.find import expand_home, readable_suffix
from data.sources.record_files import FORMATS
from data.tokenizer.base import TOKENIZER_CONFIG, Tokenizer
from data.tokenizer.sentencepiece import SentencePieceTokenizer
from data.tokenizer.training import describe_smaller_vocabulary, train_to_fit, trainer_options

Row = dict[str, object]
NO_FLAGS: Mapping[str, bool] = MappingProxyType({})


@dataclass(frozen=True)
class Rows:
    """Records: values, names for messages, and in a mixture the source of each (else "")."""

    values: list[Row]
    names: list[str]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.values)

    def from_source(self, source: str) -> "Rows":
        """Return the rows of one source."""
        return select_rows(self, [each == source for each in self.sources])


@dataclass(frozen=True)
class RecordData:
    """Tokenizer and records of a task. `sha256`: hash of all records in order and of the split."""

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
    info: Info = lambda line: None,
) -> tuple[Rows, Rows]:
    """Return (train, validation) rows.

        columns   (column, the option that names it): every record must have these
        text_of   the text of a record; its hash decides the split, so equal texts are on one side
        check     returns a record's problem, or None

    With `config.validation`, its files are the validation rows and the whole corpus is the training rows.
    Errors (DataError): fewer than two records, or all with one text; a missing column; a problem.
    """
    rows = read_corpus_rows(config, columns, info, check)
    if config.validation:
        held_out = read_corpus_rows(config.validation_config(), columns, info, check, "--validation")
        return rows, held_out
    if len(rows) < 2:
        has = format_count(len(rows), "record")
        raise DataError(f"{' '.join(config.corpus)}: {has}, and training and validation need one each")
    fractions = [split_fraction(text_of(row)) for row in rows.values]
    if len(set(fractions)) < 2:
        raise DataError(f"all {len(rows):,} records have the same text: none can be held out. Give --validation FILE")
    # A side that chance leaves empty gets the record with the nearest hash.
    threshold = min(max(config.val_fraction, sorted(set(fractions))[1]), max(fractions))
    is_held_out = [fraction < threshold for fraction in fractions]
    return select_rows(rows, [not out for out in is_held_out]), select_rows(rows, is_held_out)


def select_rows(rows: Rows, flags: list[bool]) -> Rows:
    """Return the rows whose flag is set."""
    indices = [index for index, flag in enumerate(flags) if flag]
    return Rows(*([each[index] for index in indices] for each in (rows.values, rows.names, rows.sources)))


def read_corpus_rows(
    config: DataConfig,
    columns: Sequence[tuple[str, str]],
    info: Info,
    check: Callable[[Row], str | None] = lambda row: None,
    option: str = "--corpus",
) -> Rows:
    """Return all records of the corpus, in a fixed order. Errors (DataError) name the record, its columns and the option."""
    lines: list[str] = []
    rows, report, texts = Rows([], [], []), ReadReport(), []
    for (entry, source, _), (built_in, paths) in zip(config.entries, find_corpus(config, lines, option), strict=True):
        if built_in or entry in BUILT_IN:
            raise DataError(f"{entry} has documents, and no records with columns: name files, {option} FILE.jsonl")
        texts += [str(path) for path in paths if readable_suffix(path) not in FORMATS]
        tables = [path for path in paths if readable_suffix(path) in FORMATS]
        is_named = not expand_home(entry).is_dir()
        for name, row in read_rows(tables, config.on_bad_text, report, is_named=is_named):
            for column, named_by in columns:
                if column not in row:
                    raise DataError(f"{name}: no column {column!r}; its columns: {quote_names(row)}. Name it by {named_by}")
            if (problem := check(row)) is not None:
                raise DataError(f"{name}: {problem}")
            rows.values.append(row)
            rows.names.append(name)
            rows.sources.append(source)
    for line in lines:
        info(line)
    if texts:
        info(f"left out, as they hold no records: {shorten_list(texts)}")
    for names, what in ((report.skipped, "left out"), (report.replaced, "mended with U+FFFD")):
        if names:
            info(f"{format_count(len(names), 'record')} of bad text {what}: {shorten_list(names)}")
    if report.without_records:
        info(f"no record in {shorten_list(report.without_records)}")
    if report.no_records:
        info(f"left out, as no list of records: {shorten_list(report.no_records)}")
    if not rows.values:
        raise DataError(f"{' '.join(config.corpus)}: no record in it. Files of records: {', '.join(FORMATS)}")
    return rows


def hash_rows(*parts: Rows) -> str:
    """Return the SHA-256 of all values, in order."""
    digest = hashlib.sha256()
    for rows in parts:
        for row in rows.values:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        digest.update(b"\0")
    return digest.hexdigest()


def train_or_load_tokenizer(
    config: DataConfig,
    texts: Iterable[str],
    info: Info,
    *,
    controls: Sequence[str] = (),
    affix_flags: Mapping[str, bool] = NO_FLAGS,
) -> Tokenizer:
    """Return a SentencePiece tokenizer of the texts, from the cache if one was trained on them before.

    controls: further control tokens.
    affix_flags: add_bos_token, add_eos_token of tokenizer_config.json. Default: <s> before the text.
    """
    texts, size = list(texts), config.vocab_size or DEFAULT_VOCAB_SIZE
    trainer = json.dumps([sentencepiece.__version__, trainer_options(size, controls)])
    key = hashlib.sha256("\0".join([trainer, str(config.vocab_size), *texts]).encode()).hexdigest()[:16]
    file = config.cache.expanduser() / f"{key}.model"
    beside = {TOKENIZER_CONFIG: json.dumps(dict(affix_flags)).encode()} if affix_flags else None
    try:
        return SentencePieceTokenizer(file.read_bytes(), side_files=beside)
    except (OSError, DataError):
        pass
    info(f"training a tokenizer of {size:,} pieces on {format_count(len(texts), 'text')}")
    tokenizer = train_to_fit(texts, size, controls, may_shrink=config.vocab_size is None)
    if tokenizer.vocab_size < size:
        info(describe_smaller_vocabulary(tokenizer.vocab_size))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(f"{file}.{key}.partial")
        partial.write_bytes(tokenizer.model_bytes)
        partial.replace(file)
    except OSError as error:
        raise DataError(f"{config.cache}: {error.strerror}. Name another cache folder by --cache") from error
    return SentencePieceTokenizer(tokenizer.model_bytes, side_files=beside) if affix_flags else tokenizer
