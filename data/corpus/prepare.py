"""From a corpus to shards, built once and reused while corpus and settings stay the same."""

import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from data.config import DEFAULT_VOCAB_SIZE, MASK, DataConfig, DataError
from data.corpus.dedup import deduplicate, drop_held_out
from data.corpus.ingest import find_corpus, read_corpus
from data.corpus.split import check_sources, cut_few_documents, split_documents
from data.messages import Info, format_count
from data.notes import describe_reading, describe_spelling
from data.sources.files import Document, ReadReport
from data.sources.records import NO_FLAGS
from data.sources.shards import FORMAT, SPLITS, DamagedError, Shards, open_shards, publish, sync, write_split
from data.tokenizer.base import Tokenizer
from data.tokenizer.training import describe_smaller_vocabulary, train_to_fit, trainer_options


def prepare(
    config: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    controls: Sequence[str] = (),
    affix_flags: Mapping[str, bool] = NO_FLAGS,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    info: Info = lambda line: None,
    progress: bool = False,
) -> Shards:
    """Return the shards of `config`: from its cache, or read, deduplicated, split, tokenized and written now.

    tokenizer: used instead of training one. controls: control tokens that a trained one gets besides <s> and </s>;
    with [MASK], a given one must have a mask token. affix_flags: add_bos_token and add_eos_token of a trained one; default: <s>
    before a text. vocab_size: of a trained one, where `config` gives none.
    info: called with each line for the user. progress: show progress bars.
    Errors: DataError for bad input. Several processes may prepare the same corpus at once.
    """
    if MASK in controls and tokenizer is not None and tokenizer.mask_id is None:
        raise DataError(
            f"this objective needs a mask token, and this tokenizer ({', '.join(tokenizer.files)}, "
            f"{tokenizer.vocab_size} ids) has none. Start from a network that was trained with one, or from random "
            "weights: a tokenizer with [MASK] is then trained"
        )
    if tokenizer is not None:
        tokenizer = tokenizer.with_separator(config.separator)
    elif config.separator is not None and (affix_flags.get("add_bos_token", True) or config.separator != "</s>"):
        raise DataError(f"--separator {config.separator}: the tokenizer that is trained here begins each document with <s>")
    lines: list[str] = []
    files = identify_files(config, lines)
    for line in lines:
        info(line)
    cache, is_new = config.cache.expanduser(), False

    def folder_for(size: int) -> Path:
        return cache / cache_key(config, files, tokenizer, size, controls, affix_flags)

    # The vocabulary size that the text fills, where it is smaller than the default.
    size_file = folder_for(vocab_size).with_suffix(".json")
    smaller = read_size(size_file) if config.vocab_size is None else None
    size = config.vocab_size or smaller or vocab_size
    if smaller:
        info(describe_smaller_vocabulary(smaller, vocab_size))
    for _ in range(3):  # another process may replace a damaged folder at the same time
        folder = folder_for(size)
        if folder.exists():
            try:
                shards = open_shards(folder, is_new, tokenizer)
                for line in [] if is_new else describe_reading(shards.report):
                    info(line)
                for line in describe_spelling(shards.report, shards.tokenizer):
                    info(line)
                return shards
            except DamagedError as error:
                info(f"cached shards {folder} are damaged ({error}): building them again")
        info(f"preparing {' '.join([*config.corpus, *config.validation])}")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache) as temporary:
                made = (tokenizer, size, controls, affix_flags)
                built_size = build(Path(temporary, "shards"), config, folder_for, *made, info, progress)
                if built_size != size:
                    size = built_size
                    Path(temporary, size_file.name).write_text(json.dumps({"vocab_size": size}), encoding="utf-8")
                    Path(temporary, size_file.name).replace(size_file)
                publish(Path(temporary, "shards"), folder_for(size))
        except OSError as error:
            raise DataError(f"{cache}: {error.strerror}. Name another cache folder by --cache") from error
        is_new = True
    raise DataError(f"{folder}: damaged again after each of three builds")


def read_size(file: Path) -> int | None:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def identify_files(config: DataConfig, lines: list[str]) -> list[tuple[str, str, int, int]]:
    """Return (built-in corpus, path, size, time) of each file, to detect changes.

    Counts of files follow: for each named source, and for the held-out files. `lines` gets the lines of `find_corpus`.
    """
    files, found = [], find_corpus(config, lines)
    sources = [("source", e.name, len(paths), 0) for e, (_, paths) in zip(config.entries, found, strict=True) if e.name]
    if config.validation:
        held_out = find_corpus(config.validation_config(), lines, "--validation")
        sources.append(("validation", "", sum(len(paths) for _, paths in held_out), 0))
        found = found + held_out
    for name, paths in found:
        for path in paths:
            try:
                status = path.stat()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from error
            files.append((name, str(path.absolute()), status.st_size, status.st_mtime_ns))
    return files + sources


def cache_key(
    config: DataConfig,
    files: list,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    controls: Sequence[str],
    affix_flags: Mapping[str, bool] = NO_FLAGS,
) -> str:
    """Return 16 hex digits of a hash of everything that decides the shards: files, settings, tokenizer, Python's version."""
    tokenizer_key = tokenizer.sha256 if tokenizer else [sentencepiece.__version__, trainer_options(vocab_size, controls)]
    settings = [config.text_key, config.on_bad_text, config.val_fraction, config.dedup, tokenizer_key]
    settings += [tokenizer.separator] if tokenizer and tokenizer.separator else []
    settings += [dict(affix_flags)] if affix_flags and not tokenizer else []
    return hashlib.sha256(json.dumps([FORMAT, sys.version, settings, files]).encode()).hexdigest()[:16]


def build(
    folder: Path,
    config: DataConfig,
    folder_for: Callable[[int], Path],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    controls: Sequence[str],
    affix_flags: Mapping[str, bool],
    info: Info,
    progress: bool,
) -> int:
    """Read the corpus and write a folder of shards. Return the vocabulary size: smaller where the text fills fewer pieces."""
    folder.mkdir()
    read = ReadReport()
    documents = list(tqdm(read_corpus(config, read), "reading", unit=" documents", disable=not progress, leave=False))
    report_reading(read, info)
    uncut = len(documents)
    if not config.validation:
        documents = cut_few_documents(documents, config.val_fraction, info)
    retained, dropped = deduplicate(documents, near=config.dedup)
    if len(retained) < len(documents):
        counts = {"exact": len(dropped.exact), "near": len(dropped.near)}
        parts = " and ".join(format_count(count, f"{kind} duplicate") for kind, count in counts.items())
        info(f"{format_count(len(documents), 'document')}: dropped {parts}{dropped_by_source(documents, retained)}")
    if config.validation:
        documents_of, leaked = split_by_files(config, retained, info)
    else:
        documents_of, leaked = split_documents(retained, config.val_fraction, dropped=len(documents) - len(retained)), {}
    check_sources(config, documents, documents_of["train"])
    if tokenizer is None:
        info(f"training a tokenizer of {vocab_size:,} pieces on {format_count(len(documents_of['train']), 'document')}")
        texts = [document.text for document in documents_of["train"]]
        tokenizer = train_to_fit(texts, vocab_size, controls, may_shrink=config.vocab_size is None)
        if tokenizer.vocab_size < vocab_size:
            info(describe_smaller_vocabulary(tokenizer.vocab_size, vocab_size))
            vocab_size = tokenizer.vocab_size
        tokenizer = tokenizer.with_affix_flags(affix_flags) if affix_flags else tokenizer
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    counts = {"unspelled": 0, "unknown": 0, "tokens": 0}
    splits = {}
    for name in SPLITS:
        splits[name] = write_split(folder / f"{name}.bin", documents_of[name], tokenizer, dtype, counts, progress)
    report = {
        **vars(read),
        **counts,
        "corpus": list(config.corpus),
        "cut_into": len(documents) if len(documents) > uncut else None,
        "exact_duplicates": dropped.exact,
        "near_duplicates": dropped.near,
        **leaked,
    }
    index = {
        "format": FORMAT,
        "key": folder_for(vocab_size).name,
        "dtype": dtype,
        "tokenizer_sha256": tokenizer.sha256,
        "separator": tokenizer.separator,
        "splits": splits,
        "report": report,
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        sync(path)
    sync(folder)
    return vocab_size


def dropped_by_source(documents: list[Document], retained: list[Document]) -> str:
    """Describe how many documents of each source of a mixture are dropped: text that two sources have stays in one of them.

    >>> dropped_by_source([Document("", "x", "a"), Document("", "x", "b"), Document("", "y", "b")], [Document("", "x", "a")])
    ' (2 of 2 of b)'
    """
    read, left = (Counter(document.source for document in each) for each in (documents, retained))
    lost = [f"{count - left[name]:,} of {count:,} of {name}" for name, count in read.items() if name and count > left[name]]
    return f" ({', '.join(lost)})" if lost else ""


def report_reading(read: ReadReport, info: Info) -> None:
    for line in describe_reading(vars(read)):
        info(line)


def split_by_files(
    config: DataConfig, documents: list[Document], info: Info
) -> tuple[dict[str, list[Document]], dict[str, list]]:
    """Return both splits, with the files of `config.validation` held out, and the report of what training lost to them.

    Documents that validation has too, or has most of, are dropped from training.
    """
    read = ReadReport()
    held_out = list(read_corpus(config.validation_config(), read))
    report_reading(read, info)
    retained, exact, near = drop_held_out(documents, held_out, config.dedup)
    if exact or near:
        what = f"{len(exact):,} that validation has too, and {len(near):,} that it has most of"
        info(f"{format_count(len(documents), 'document')} to train on: dropped {what}")
    if not retained:
        raise DataError(f"nothing is left to train on: all of the corpus stands in --validation {' '.join(config.validation)}")
    return {"train": retained, "validation": held_out}, {"held_out_exact": exact, "held_out_near": near}
