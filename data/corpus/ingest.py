"""Documents of a corpus: built-in corpora and the user's files."""

import difflib
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from data.config import BUILT_IN, BUILT_IN_RECORDS, DataConfig, DataError
from data.messages import format_count, shorten_list
from data.sources.files import Document, ReadReport, read_files
from data.sources.find import expand_home, find_files


def find_corpus(config: DataConfig, lines: list[str] | None = None, option: str = "--corpus") -> list[tuple[str, list[Path]]]:
    """Return (built-in corpus or "", its files) for each entry of `config.paths`, without reading them.

    A file that two entries name is listed once. `lines` gets a line for each entry that holds files which are not read.
    Errors: DataError for a path that does not exist.
    """
    sources, seen = [], set()
    for entry in config.paths:
        if entry in BUILT_IN:
            from data.corpus.stdlib import list_files

            sources.append((entry, list_files() if entry not in seen else []))
            seen.add(entry)
            continue
        if entry in BUILT_IN_RECORDS and not expand_home(entry).exists():
            whom = BUILT_IN_RECORDS[entry]
            raise DataError(f"{option} {entry}: built-in records, for {whom} without --validation and mixtures")
        found = find_files(entry, config.cache)
        if found is None:
            might_name = "=" in entry and not config.weights
            near = difflib.get_close_matches(entry, BUILT_IN, n=1)
            raise DataError(
                f"{option} {entry}: no such file or folder ({expand_home(entry).absolute()}), "
                f"no file matches it as a glob, and the built-in corpora are {', '.join(BUILT_IN)}"
                + (f". Did you mean {near[0]}?" if near else "")
                + (". A source of a mixture is NAME=PATH:WEIGHT, a number last (NAME=PATH with --mix temperature)" * might_name)
            )
        if found.left_out and lines is not None:
            lines.append(found.left_out)
        sources.append(("", sorted(path for real, path in found.files.items() if real not in seen)))
        seen.update(found.files)
    return sources


def read_corpus(config: DataConfig, report: ReadReport | None = None) -> Iterator[Document]:
    """Yield the documents of `config.corpus`, in a fixed order, without empty ones.

    `report` is filled during the iteration. Errors: DataError if there is no document.
    """
    report = ReadReport() if report is None else report
    for (entry, source, _), (name, paths) in zip(config.entries, find_corpus(config), strict=True):
        if name:
            documents = getattr(import_module("data.corpus.stdlib"), BUILT_IN[name])(paths)
        else:
            is_named = not expand_home(entry).is_dir()
            documents = read_files(paths, config.text_key, config.on_bad_text, report, is_named=is_named)
        for document in documents:
            if not document.text.strip():
                report.empty += 1
                continue
            report.documents += 1
            report.bytes += len(document.text.encode())
            yield replace(document, source=source) if source else document
    if not report.documents:
        raise DataError(
            f"the corpus {' '.join(config.corpus)} is empty: no text in it ({format_count(report.empty, 'empty document')}"
            + (f", {len(report.skipped)} left out by --on-bad-text skip" if report.skipped else "")
            + (f", no list of records: {shorten_list(report.no_records)})" if report.no_records else ")")
        )
