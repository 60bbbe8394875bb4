"""Modules of the standard library by their syntax trees: documented definitions, and which modules are held out.

No module is imported. All is a function of the sources of the running Python; random choices are hashes (`draw`).
"""

import ast
import hashlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from data.corpus.dedup import deduplicate
from data.corpus.stdlib import DEFINITION, library_root, list_files, parse_python, signature, without_surrogates
from data.sources.files import Document

HELD_OUT = 0.18  # at most this share of the documentation
Record = dict[str, object]


class Definition(NamedTuple):
    """A module, class or function with a docstring. `owner`: the qualified name of the class around it, or ""."""

    module: str
    name: str  # qualified within the module; of a module, its own name
    header: str  # name and parameters
    text: str  # the docstring, without its indentation
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    owner: str = ""

    @property
    def key(self) -> str:
        return self.name if isinstance(self.node, ast.Module) else f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Module:
    """A module's name, syntax tree, and definitions with docstrings in the order of the source."""

    name: str
    tree: ast.Module
    is_package: bool
    definitions: tuple[Definition, ...]
    is_held_out: bool = False


def read_modules(
    wanted: Callable[[str], bool] = lambda name: True, progress: Callable[[list[Path]], Iterable[Path]] = iter
) -> list[Module]:
    """Return the modules, sorted by name, with duplicate docstrings dropped and about HELD_OUT of them held out.

    wanted: tells by its name whether a module is read.  progress: wraps the list of files.
    Docstrings that are equal to another up to case and white space, or mostly contained in others, are dropped
    (`data.corpus.dedup`): nothing that is held out occurs in training.
    """
    modules = []
    for path in progress([path for path in list_files() if wanted(module_name(path))]):
        if (tree := parse_python(path)) is not None:
            name = module_name(path)
            modules.append(Module(name, tree, path.name == "__init__.py", tuple(list_definitions(tree, name))))
    modules = drop_duplicates(sorted(modules, key=lambda module: module.name))
    held_out = choose_held_out(modules)
    return [replace(module, is_held_out=package_of(module.name) in held_out) for module in modules]


def module_name(path: Path) -> str:
    parts = path.relative_to(library_root()).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or parts[-1]


def package_of(name: str) -> str:
    """
    >>> package_of("email.mime.text")
    'email'
    """
    return name.partition(".")[0]


def list_definitions(node: ast.AST, module: str, owner: str = "", name: str = "") -> Iterator[Definition]:
    """Yield what has a docstring at and below `node`; private names are skipped, except __init__ and the like.

    >>> tree = ast.parse("class A:\\n  def half(self, x):\\n    '''Half of x.'''")
    >>> [(found.name, found.header, found.owner, found.text) for found in list_definitions(tree, "m")]
    [('A.half', 'A.half(x)', 'A', 'Half of x.')]
    """
    if isinstance(node, ast.Module | DEFINITION):
        text = without_surrogates(inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip())
        if text:
            yield Definition(module, name or module, signature(node, name or module), text, node, owner)
    for block in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, block, ()):
            if isinstance(child, DEFINITION):
                if not child.name.startswith("_") or child.name.endswith("__"):
                    inner = name if isinstance(node, ast.ClassDef) else owner
                    yield from list_definitions(child, module, inner, f"{name}.{child.name}" if name else child.name)
            elif isinstance(child, ast.stmt | ast.ExceptHandler):
                yield from list_definitions(child, module, owner, name)


def drop_duplicates(modules: list[Module]) -> list[Module]:
    """Drop definitions whose docstring another one has, or which are mostly contained in others."""
    documents = [Document(found.key, found.text) for module in modules for found in module.definitions]
    unique = {id(document) for document in deduplicate(documents)[0]}
    retained: dict[str, list[Definition]] = defaultdict(list)
    definitions = (found for module in modules for found in module.definitions)
    for document, found in zip(documents, definitions, strict=True):
        if id(document) in unique:
            retained[found.module].append(found)
    return [replace(module, definitions=tuple(retained[module.name])) for module in modules]


def choose_held_out(modules: list[Module], fraction: float = HELD_OUT) -> set[str]:
    """Return the top-level packages that are held out, whole: those first in the order of a hash of the name that still fit in
    `fraction` of the documentation's characters; at least one."""
    sizes: dict[str, int] = defaultdict(int)
    for module in modules:
        sizes[package_of(module.name)] += sum(len(found.text) for found in module.definitions)
    left = fraction * sum(sizes.values())
    ordered = sorted(sizes, key=lambda package: draw(0, "held out", package))
    held_out = set()
    for package in ordered:
        if sizes[package] <= left:
            held_out.add(package)
            left -= sizes[package]
    return held_out or {min(ordered, key=sizes.__getitem__)}


def draw(seed: int, *key: object) -> float:
    """Return a number in [0, 1), a pure function of the seed and the key."""
    text = "\0".join(map(str, (seed, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
