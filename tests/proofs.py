"""Write docs/proofs.md: for each public name the tests that use it, and what they compare it with.

Nothing is declared: a test proves what it uses, by itself or through the helpers of its file; imports are resolved to objects,
so that an alias counts as what it is. What a test compares with is read from its rows of docs/parity.md.
"""

import argparse
import ast
import importlib
import inspect
import logging
import os
import re
import sys
import typing
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PARITY, PAGE = ROOT / "docs" / "parity.md", ROOT / "docs" / "proofs.md"
PACKAGES = ("model", "data", "quant", "eval", "lora", "train")
PLACES = ("oracle", "invariant", "fault", "gpu")
SHOWN = 3  # tests of a name
SHOWN_ORACLES = 4
COMPARISONS = "| part | against | largest error | measure | tolerance | test |"  # the title of docs/parity.md's second table
REWRITE = "python -m pytest -n 2 --dist loadfile --parity=docs/parity.md"
BAD_INPUT = r"_(errors?|refuse[sd]?|bad|mistakes?|wrong|raises|rejected|named)(_|$)|not_take|what_is_no|_are_checked"
INTRODUCTION = """# Proofs

Written by `python -m tests.proofs`; do not edit. One row for each public name.

- **name**: as its package offers it; behind "=" the function itself, where that has another name.
- **tests**: the first three that use it, to be pasted behind `python -m pytest`. First come those with a row in
  [the parity table](parity.md), then others of `tests/oracle`, `tests/invariant`, `tests/fault` and `tests/gpu`, then its
  doctest, at last tests of bad input (for an exception these come first).
- **against**: what its tests compare with, by their rows of the parity table: a library, or a plain twin of ours. The tests in
  the file named after its source count, else all; set-up in a fixture does not count. Empty where there is no row: its tests
  check properties, and numbers worked out by hand.
- **of**: how many tests use it.
""".splitlines()


class Proof(NamedTuple):
    test: str  # as pytest takes it
    oracles: tuple[str, ...]  # what its rows of the parity table compare the name with
    is_near: bool  # the test's file is that of the name's source


def public_names() -> dict[str, object]:
    """"package.name" -> the object."""
    modules = [importlib.import_module(name) for name in PACKAGES]
    return {f"{module.__name__}.{name}": getattr(module, name) for module in modules for name in module.__all__}


def recorded(table: str) -> dict[str, list[str]]:
    """test -> what it compares with, from the second table of docs/parity.md.

    >>> row = "| BLEU: 13a | sacrebleu 2.6.0 | 0.0e+00 | count | 0e+00 | `tests/a.py::test` |"
    >>> recorded("\\n".join(["", COMPARISONS, "|---|---|---|---|---|---|", row, row]))
    {'tests/a.py::test': ['sacrebleu']}
    """
    _, title, rows = table.partition(f"\n{COMPARISONS}\n")
    if not title:
        raise SystemExit(f"docs/parity.md has no table with the columns {COMPARISONS}; write it anew: {REWRITE}")
    found: dict[str, list[str]] = {}
    for row in rows.splitlines()[1:]:
        _, against, *_, test = row.strip("| ").split(" | ")
        found.setdefault(test.strip("`"), []).append(without_version(against))
    return {test: [*dict.fromkeys(oracles)] for test, oracles in found.items()}


def without_version(against: str) -> str:
    """What a row compares with, without numbers of versions and what depends on the processor.

    >>> without_version("transformers 5.23.0, bitsandbytes 0.50.2"), without_version("torch 2.13.0+cpu SDPA")
    ('transformers, bitsandbytes', 'torch SDPA')
    >>> without_version("SQuAD 1.1 script's values")
    "SQuAD 1.1 script's values"
    """
    against = re.sub(r" \d+\.\d+\.\d[\w.+]*", "", against)
    against = re.sub(r",? and direct computation where .*", "", against)
    return re.sub(r"\bPEFT\b", "peft", against)


def proofs() -> dict[str, list[Proof]]:
    """public name -> its tests, in the order in which the page shows them."""
    names = public_names()
    by_id = defaultdict(list)
    for name, value in names.items():
        by_id[id(value)].append(name)
    oracles = recorded(PARITY.read_text(encoding="utf-8"))
    found: dict[str, list] = {name: [] for name in names}
    for path in sorted(path for place in PLACES for path in (ROOT / "tests" / place).rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        compared = {test: {id(each) for value in used for each in reached(value)} for test, used in uses(tree, False).items()}
        for test, used in uses(tree).items():
            shown = f"{path.relative_to(ROOT).as_posix()}::{test}"
            place = PLACES.index(path.relative_to(ROOT).parts[1])
            bad = is_of_bad_input(functions[test])
            slow = " -m slow" * any(ast.unparse(mark) == "pytest.mark.slow" for mark in functions[test].decorator_list)
            for public in {public for value in used for each in reached(value) for public in by_id.get(id(each), ())}:
                direct = id(names[public]) in compared[test]  # else by a fixture, which only prepares
                rows = oracles.get(shown, ()) if direct else ()
                near = path.stem.removeprefix("test_") == getattr(names[public], "__module__", "").rpartition(".")[2]
                first = bad if is_exception(names[public]) else bool(rows)
                group = (not near, place) if first else (place, not near)
                place_of = (str(path.relative_to(ROOT)), functions[test].lineno)  # as the file has them
                found[public].append(((not direct, not first, bad, *group, *place_of), Proof(shown + slow, tuple(rows), near)))
    for name, value in names.items():
        if ">>> " in (value.__doc__ or "") and (inspect.isfunction(value) or inspect.isclass(value)):
            example = f"{value.__module__.replace('.', '/')}.py::{value.__module__}.{value.__qualname__}"
            found[name].append(((False, True, False, len(PLACES), False, example, 0), Proof(example, (), False)))
    return {name: [proof for _, proof in sorted(tests)] for name, tests in found.items()}


def is_exception(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def is_of_bad_input(test: ast.FunctionDef) -> bool:
    """By its name, or because errors are all that it expects."""
    body = ast.unparse(test)
    only_raises = "pytest.raises" in body and "assert " not in body and "parity(" not in body
    return only_raises or re.search(BAD_INPUT, test.name) is not None


def reached(value: object) -> list[object]:
    """An object, with what it stands for: the values of a table, the class that a function returns, the bases of a class."""
    found = [value]
    if isinstance(value, dict):
        found += value.values()
    elif inspect.isfunction(value):
        try:
            hints = typing.get_type_hints(value)
        except (NameError, TypeError):  # names that are imported for types alone
            hints = {}
        returned = hints.get("return")
        found += [returned, *typing.get_args(returned)]
    elif inspect.isclass(value):
        found += value.__mro__[1:-1]
        found += [method for method in vars(value).values() if inspect.isfunction(method)]
    return found


def uses(tree: ast.Module, fixtures: bool = True) -> dict[str, list[object]]:
    """test function -> the objects of our packages that it uses, also through other functions and constants of its file.

    fixtures: also through fixtures.
    """
    bound: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in (*PACKAGES, "tests"):
            for alias in node.names:
                bound[alias.asname or alias.name] = resolved(node.module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in PACKAGES:
                    importlib.import_module(alias.name)
                    root = alias.name if alias.asname else alias.name.partition(".")[0]
                    bound[alias.asname or root] = sys.modules[root]
    parts: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts |= {target.id: node for target in targets if isinstance(target, ast.Name)}

    def objects(name: str, seen: set[str]) -> list[object]:
        if name in seen or name not in parts:
            return []
        seen.add(name)
        used = []
        arguments = {node.arg for node in ast.walk(parts[name]) if isinstance(node, ast.arg)}  # fixtures, in a test
        for node in ast.walk(parts[name]):
            if isinstance(node, ast.Attribute) and (value := attribute(node, bound)) is not None:
                used.append(value)
            if isinstance(node, ast.Name) and node.id in bound:
                used.append(bound[node.id])
            elif isinstance(node, ast.Name) and node.id not in arguments:
                used += objects(node.id, seen)
            elif fixtures and isinstance(node, ast.arg):
                used += objects(node.arg, seen)
        return used

    return {name: objects(name, set()) for name in parts if name.startswith("test_")}


def resolved(module: str, name: str) -> object:
    try:
        value = getattr(importlib.import_module(module), name)
    except AttributeError:
        value = importlib.import_module(f"{module}.{name}")
    return value


def attribute(node: ast.Attribute, bound: dict[str, object]) -> object | None:
    """The object of a chain such as nf4.quantize or model.hub.load; None for any other."""
    chain = ast.unparse(node).split(".")
    if chain[0] not in bound or not all(part.isidentifier() for part in chain):
        return None
    value = bound[chain[0]]
    for part in chain[1:]:
        value = getattr(value, part, None)
    return value


def page(found: dict[str, list[Proof]]) -> str:
    lines, names = [*INTRODUCTION], public_names()
    for package in PACKAGES:
        lines += ["", f"## {package}", "", "| name | tests | against | of |", "|---|---|---|---|"]
        for name, tests in ((name, tests) for name, tests in found.items() if name.startswith(f"{package}.")):
            shown = "<br>".join(f"`{proof.test}`" for proof in tests[:SHOWN])
            lines.append(f"| {shown_name(name, names[name])} | {shown} | {compared_with(names[name], tests)} | {len(tests)} |")
    return "\n".join(lines) + "\n"


def shown_name(name: str, value: object) -> str:
    """`name`, and the function behind it where that has another name."""
    own, public = getattr(value, "__name__", None), name.rpartition(".")[2]
    return f"`{public}`" if own in (None, public) else f"`{public}` = `{value.__module__}.{own}`"


def compared_with(value: object, tests: list[Proof]) -> str:
    """What the tests of a name compare it with, in their order: those near its source, or else all. An exception: nothing."""
    tests = [proof for proof in tests if proof.is_near and proof.oracles] or tests
    oracles = [] if is_exception(value) else [*dict.fromkeys(each for proof in tests for each in proof.oracles)]
    more = [f"{len(oracles) - SHOWN_ORACLES} more"] * (len(oracles) > SHOWN_ORACLES)
    return "; ".join([*oracles[:SHOWN_ORACLES], *more])


@contextmanager
def silence() -> Iterator[None]:
    """Keep back what libraries say while they are imported, also from C++; an error is shown all the same."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    logging.disable(logging.WARNING)
    try:
        os.dup2(nowhere, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        logging.disable(logging.NOTSET)
        os.close(kept)
        os.close(nowhere)


def main(words: Sequence[str] | None = None, path: Path = PAGE) -> None:
    argparse.ArgumentParser(prog="python -m tests.proofs", description=__doc__.split("\n\n")[0]).parse_args(words)
    with silence():
        found = proofs()
    new, old = page(found), path.read_text(encoding="utf-8") if path.exists() else ""
    rows = f"{len(found)} public names, {sum(any(proof.oracles for proof in tests) for tests in found.values())} of them"
    rows += " with a row in docs/parity.md"
    if new == old:
        print(f"{path} is up to date: {rows}")
        return
    path.write_text(new, encoding="utf-8")
    print(f"{path} is written: {rows}")


if __name__ == "__main__":
    main()
