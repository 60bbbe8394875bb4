"""Documents: the two corpora that every CPython carries, and the user's files."""

import ast
import difflib
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import regex

from data.config import BUILT_IN, DataConfig, DataError
from data.messages import format_count, shorten_list
from data.sources.files import Document, ReadReport, read_files
from data.sources.find import expand_home, find_files, raise_unreadable

# Tests and their data are no documentation; site-packages differ from machine to machine.
PRUNED = frozenset({"test", "tests", "idle_test", "lib2to3", "__phello__", "site-packages", "dist-packages"})
TOPICS = "pydoc_data/topics.py"
DEFINITION = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def find_corpus(
    config: DataConfig, left_out: list[str] | None = None, option: str = "--corpus"
) -> list[tuple[str, list[Path]]]:
    """List what `config.paths` name, without reading it: (built-in's name or "", its files), in their order.

    A file that two entries name is read once. `left_out` gets a line for each entry that holds what is not read.
    Raises DataError for what does not exist.
    """
    sources, taken = [], set()
    for entry in config.paths:
        if entry in BUILT_IN:
            found = stdlib_files()
            sources.append((entry, found if entry not in taken else []))
            taken.add(entry)
            continue
        found = find_files(entry, config.cache)
        if found is None:
            near = difflib.get_close_matches(entry, BUILT_IN, n=1)
            raise DataError(
                f"{option} {entry}: no such file or folder ({expand_home(entry).absolute()}), "
                f"no file matches it as a glob, and the built-in corpora are {', '.join(BUILT_IN)}"
                + (f". Did you mean {near[0]}?" if near else "")
                + (". A source of a mixture is NAME=PATH:WEIGHT, a number last" if "=" in entry and not config.weights else "")
            )
        if found.left_out and left_out is not None:
            left_out.append(found.left_out)
        sources.append(("", sorted(path for real, path in found.files.items() if real not in taken)))
        taken.update(found.files)
    return sources


def read_corpus(config: DataConfig, report: ReadReport | None = None) -> Iterator[Document]:
    """The documents of `config.corpus`, in a fixed order; those without any text are passed over.

    `report` is filled on the way. Raises DataError when nothing is left.
    """
    report = ReadReport() if report is None else report
    for (entry, source, _), (name, paths) in zip(config.entries, find_corpus(config), strict=True):
        if name:
            documents = BUILT_IN_READERS[name](paths)
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


def stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files() -> list[Path]:
    """The standard library's .py files, its tests left out, sorted by their path in it."""
    found = []
    for root, folders, names in os.walk(stdlib_root(), onerror=raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in PRUNED]
        found += [Path(root, name) for name in names if name.endswith(".py") and not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def stdlib_code(paths: list[Path]) -> Iterator[Document]:
    """One document a source file."""
    for path in paths:
        name = path.relative_to(stdlib_root()).as_posix()
        yield Document(f"stdlib-code:{name}", path.read_bytes().decode(errors="replace"))


def stdlib_docs(paths: list[Path]) -> Iterator[Document]:
    """One document a module that has docstrings, then one a topic of pydoc's help. Nothing is imported."""
    topics = []
    for path in paths:
        file = path.relative_to(stdlib_root())
        tree = parse_python(path)
        if file.as_posix() == TOPICS:
            topics = topic_documents(tree)
        elif tree is not None:
            module = ".".join(part for part in file.with_suffix("").parts if part != "__init__")
            text = "\n\n".join(docstrings(tree, module))
            if text:
                yield Document(f"stdlib-docs:{module}", text + "\n")
    yield from topics


def parse_python(path: Path) -> ast.Module | None:
    """The syntax tree of one file; None for a template or another Python's file that does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have invalid escapes
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return None


def docstrings(node: ast.AST, name: str = "") -> Iterator[str]:
    """Every docstring at and below `node`, each after a line with its name in the module and its signature.

    What a leading underscore marks as private is left out; __init__ and its like are not private.

    >>> tree = ast.parse("class A:\\n  def half(self, x, *, up=False):\\n    '''Half of x.\\n\\n    Rounded.'''")
    >>> list(docstrings(tree))
    ['A.half(x, *, up=False)\\n\\nHalf of x.\\n\\nRounded.']
    """
    if isinstance(node, ast.Module | DEFINITION):
        text = ast.get_docstring(node, clean=False)
        if text and (text := inspect.cleandoc(text).strip()):
            yield f"{signature(node, name)}\n\n{without_surrogates(text)}"
    for block in ("body", "orelse", "handlers", "finalbody"):  # statements alone: expressions hold no docstring
        for child in getattr(node, block, ()):
            if isinstance(child, DEFINITION):
                if not child.name.startswith("_") or child.name.endswith("__"):
                    yield from docstrings(child, f"{name}.{child.name}" if isinstance(node, DEFINITION) else child.name)
            elif isinstance(child, ast.stmt | ast.ExceptHandler):
                yield from docstrings(child, name)


def signature(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{name}({re.sub(r'^(self|cls)(, )?', '', ast.unparse(node.args))})"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {name}({bases})" if bases else f"class {name}"
    return name


def without_surrogates(text: str) -> str:
    """A docstring may name a lone surrogate by its escape; text cannot hold one."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def topic_documents(tree: ast.Module | None) -> list[Document]:
    """pydoc_data/topics.py is one assignment: topics = {name: text, ...}."""
    if tree is None:
        return []
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict))
    topics = ast.literal_eval(table)
    return [Document(f"stdlib-docs:topic {name}", without_surrogates(topics[name]).strip() + "\n") for name in sorted(topics)]


BUILT_IN_READERS: dict[str, Callable[[list[Path]], Iterator[Document]]] = {
    "stdlib-docs": stdlib_docs,
    "stdlib-code": stdlib_code,
}


def cut_at_blank_lines(document: Document, size: int) -> list[Document]:
    """A long document cut into pieces of `size` bytes or a little more, after blank lines (or any, if those are rare).

    The pieces joined are the text.

    >>> [piece.text for piece in cut_at_blank_lines(Document("a", "one\\n\\ntwo\\n\\n\\nthree"), 4)]
    ['one\\n\\n', 'two\\n\\n\\n', 'three']
    """
    pieces, held, length = [], [], 0
    for line in document.text.splitlines(keepends=True):
        if length >= size and line.strip() and (not held[-1].strip() or length >= 4 * size):
            pieces.append("".join(held))
            held, length = [], 0
        held.append(line)
        length += len(line.encode())
    pieces.append("".join(held))
    if len(pieces) == 1:
        return [document]
    return [replace(document, name=f"{document.name}#{number}", text=text) for number, text in enumerate(pieces)]


def cut_long_lines(pieces: list[Document], size: int, max_bytes: int) -> list[Document]:
    """The pieces that lines make of a document, and what they leave too long cut at white space.

    That is a document in one piece, of more than 8 * size bytes; and beside other pieces one of more than `max_bytes` bytes.
    """
    longest = 8 * size if len(pieces) == 1 else max_bytes
    cut_again = ([piece] if len(piece.text.encode()) <= longest else cut_at_spaces(piece, size) for piece in pieces)
    return [part for parts in cut_again for part in parts]


SPACE = regex.compile(r"\s(?=[^\s\p{M}\u200d])")  # the last of a run, with nothing behind it that combines with it
CHARACTER = regex.compile(r"\X")  # as a reader counts: with its accents; \r\n is one


def cut_at_spaces(document: Document, size: int) -> list[Document]:
    """A document in pieces that begin with the first word after `size` bytes; where none begins soon, with a character.

    The pieces joined are the text. None has more than `size` characters beyond its `size` bytes.

    >>> [piece.text for piece in cut_at_spaces(Document("a", "one two  one two  0123456789"), 5)]
    ['one two  ', 'one two  ', '01234', '56789']
    """
    text, pieces, start = document.text, [], 0
    while start < len(text):
        least = start + max(1, len(text[start : start + size].encode()[:size].decode(errors="ignore")))
        most = least + size
        if space := SPACE.search(text, least - 1, most):
            end = space.end()
        else:  # from a little before: a character that begins there may end behind `least`
            ends = (found.end() for found in CHARACTER.finditer(text, max(start, least - 64), most))
            end = next(end for end in ends if end >= least or end == len(text))
        pieces.append(text[start:end])
        start = end
    return [replace(document, name=f"{document.name}#{number}", text=piece) for number, piece in enumerate(pieces)]
