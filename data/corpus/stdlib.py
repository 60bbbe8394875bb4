"""The built-in corpora: docstrings and source code of Python's standard library. `data.config.BUILT_IN` lists them."""

import ast
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from data.sources.files import Document
from data.sources.find import raise_unreadable

# Tests are no documentation; site-packages differ from machine to machine.
PRUNED = frozenset({"test", "tests", "idle_test", "lib2to3", "__phello__", "site-packages", "dist-packages"})
TOPICS = "pydoc_data/topics.py"
DEFINITION = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def library_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def list_files() -> list[Path]:
    """Return the standard library's .py files without its tests, sorted by path."""
    found = []
    for root, folders, names in os.walk(library_root(), onerror=raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in PRUNED]
        found += [Path(root, name) for name in names if name.endswith(".py") and not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def read_code(paths: list[Path]) -> Iterator[Document]:
    """Yield one document for each source file."""
    for path in paths:
        name = path.relative_to(library_root()).as_posix()
        yield Document(f"stdlib-code:{name}", path.read_bytes().decode(errors="replace"))


def read_docs(paths: list[Path]) -> Iterator[Document]:
    """Yield a document for each module with docstrings, then for each topic of pydoc's help. No module is imported."""
    topics = []
    for path in paths:
        file = path.relative_to(library_root())
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
    """Return the syntax tree of a file; None where it does not parse (a template, another Python's file)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have invalid escapes
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return None


def docstrings(node: ast.AST, name: str = "") -> Iterator[str]:
    """Yield every docstring at and below `node`, each after a line with its qualified name and signature.

    Names with a leading underscore are private and skipped, except __init__ and the like.

    >>> tree = ast.parse("class A:\\n  def half(self, x, *, up=False):\\n    '''Half of x.\\n\\n    Rounded.'''")
    >>> list(docstrings(tree))
    ['A.half(x, *, up=False)\\n\\nHalf of x.\\n\\nRounded.']
    """
    if isinstance(node, ast.Module | DEFINITION):
        text = ast.get_docstring(node, clean=False)
        if text and (text := inspect.cleandoc(text).strip()):
            yield f"{signature(node, name)}\n\n{without_surrogates(text)}"
    for block in ("body", "orelse", "handlers", "finalbody"):  # statements only: expressions have no docstring
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
    """Replace lone surrogates, which an escape in a docstring may give and UTF-8 cannot encode."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def topic_documents(tree: ast.Module | None) -> list[Document]:
    """Return the documents of pydoc_data/topics.py, which is one assignment: topics = {name: text, ...}."""
    if tree is None:
        return []
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict))
    topics = ast.literal_eval(table)
    return [Document(f"stdlib-docs:topic {name}", without_surrogates(topics[name]).strip() + "\n") for name in sorted(topics)]
