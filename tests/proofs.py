"""`python -m tests.proofs`: write docs/proofs.md, which names the tests of each public name and the library beside it.

Nothing is declared: a test proves what it uses, by itself or through the helpers of its file; imports are resolved to objects,
so that an alias counts as what it is.
"""

import ast
import importlib
import inspect
import sys
import typing
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("model", "data", "quant", "eval", "lora", "train")
PLACES = ("oracle", "invariant", "fault", "gpu")
LIBRARIES = {  # module: its name in the table; a test of tests/oracle that imports none of them compares with torch, or by hand
    "transformers": "transformers",
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "compressed_tensors": "compressed-tensors",
    "sacrebleu": "sacrebleu",
    "rouge_score": "rouge-score",
    "nltk": "nltk",
    "bert_score": "bert-score",
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "seqeval": "seqeval",
    "jiwer": "jiwer",
    "sentencepiece": "sentencepiece",
    "tokenizers": "tokenizers",
}
SHOWN = 3  # tests of a name


def public_names() -> dict[str, object]:
    """"package.name" -> the object."""
    modules = [importlib.import_module(name) for name in PACKAGES]
    return {f"{module.__name__}.{name}": getattr(module, name) for module in modules for name in module.__all__}


def proofs() -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """public name -> (test, libraries that its file imports).

    First come tests with a row in the parity table, and among them those that stand where the name's source stands.
    """
    names = public_names()
    by_id = defaultdict(list)
    for name, value in names.items():
        by_id[id(value)].append(name)
    found: dict[str, list] = {name: [] for name in names}
    order = {}
    for path in sorted(path for place in PLACES for path in (ROOT / "tests" / place).rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        libraries = tuple(sorted({LIBRARIES[name] for name in imported_roots(tree) if name in LIBRARIES}))
        compared = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and "parity" in ast.unparse(node.args)}
        for test, used in uses(tree).items():
            proven = {public for value in used for each in reached(value) for public in by_id.get(id(each), ())}
            for public in proven:
                shown = f"{path.relative_to(ROOT / 'tests')}::{test}"
                source = getattr(names[public], "__module__", "").rpartition(".")[2]
                near = path.stem.removeprefix("test_") == source
                order[public, shown] = (test not in compared, not near, path.parts[-3] != "oracle")
                found[public].append((shown, libraries))
    for name, value in names.items():
        if ">>> " in (value.__doc__ or "") and (inspect.isfunction(value) or inspect.isclass(value)):
            found[name].append((f"its doctest, {value.__module__}", ()))
    for name, tests in found.items():
        tests.sort(key=lambda entry: (order.get((name, entry[0]), (True, True, True)), entry[0]))
    return found


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


def imported_roots(tree: ast.Module) -> set[str]:
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            roots.add(str(ast.literal_eval(node.args[0])).partition(".")[0])
    return roots


def uses(tree: ast.Module) -> dict[str, list[object]]:
    """test function -> the objects of our packages that it uses, also through other functions and constants of its file."""
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
        for node in ast.walk(parts[name]):
            if isinstance(node, ast.Attribute) and (value := attribute(node, bound)) is not None:
                used.append(value)
            if isinstance(node, ast.Name):
                used += [bound[node.id]] if node.id in bound else objects(node.id, seen)
            elif isinstance(node, ast.arg):  # a fixture
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


def page(found: dict[str, list]) -> str:
    lines = [
        "# Proofs",
        "",
        "Written by `python -m tests.proofs`; do not edit. For each public name the tests that use it, those beside another",
        "library first: three of them, and how many there are.",
    ]
    for package in PACKAGES:
        lines += ["", f"## {package}", "", "| name | tests | beside | of |", "|---|---|---|---|"]
        for name, tests in ((name, tests) for name, tests in found.items() if name.startswith(f"{package}.")):
            libraries = sorted({library for _, each in tests[:SHOWN] for library in each})
            shown = "<br>".join(f"`{test}`" for test, _ in tests[:SHOWN])
            lines.append(f"| `{name.partition('.')[2]}` | {shown} | {', '.join(libraries)} | {len(tests)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "proofs.md").write_text(page(proofs()), encoding="utf-8")
