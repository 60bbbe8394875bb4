"""The tests of a source file, derived from imports: nearest first, because the first failure ends the run."""

import ast
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tests.mutants.draw import PACKAGES, source_files

PLACES = ("oracle", "invariant", "fault")
DISTANT = 99
COMMAND = re.compile(rf"['\"]-m['\"], ['\"]({'|'.join(PACKAGES)})['\"]")


class Cover:
    """The import graph of a work tree, without importing anything."""

    def __init__(self, root: Path, files: Sequence[str] | None = None):
        self.files = [*source_files(root), *source_files(root, packages=("tests",))] if files is None else [*files]
        texts = {file: (root / file).read_text(encoding="utf-8") for file in self.files}
        trees = {file: ast.parse(text) for file, text in texts.items()}
        self.modules = {module_name(file): file for file in self.files}
        self.public = {package: public_names(package, trees.get(f"{package}/__init__.py")) for package in PACKAGES}
        self.used = {file: self.used_names(tree) for file, tree in trees.items()}
        self.commands = {file: set(COMMAND.findall(text)) for file, text in texts.items()}
        self.has_doctest = {file for file, text in texts.items() if ">>> " in text}
        self.importers = defaultdict(set)
        for file, used in self.used.items():
            for other in used:
                self.importers[other].add(file)

    def tests(self, file: str) -> list[str]:
        """The file itself where it has doctests; tests named after it, or after its folder; other importers, by the number of
        names that they use; for a file of a command, tests that start it; the other tests of its package, and those of
        faults and of the whole house that reach it, by the imports that lie between."""
        path = PurePosixPath(file)
        package, name = path.parts[0], path.stem
        everywhere = [f for f in self.files if PurePosixPath(f).name.startswith("test_") and f.split("/")[1] in PLACES]
        of_package = [f for f in everywhere if PurePosixPath(f).parts[2:-1] == (package,)]
        stems = [f"test_{part}" for part in (name, *path.parts[-2:0:-1])]
        twins = [f for stem in stems for f in sorted(of_package, key=len) if PurePosixPath(f).stem.startswith(stem)]
        count = {f: len(self.used[f].get(file, ())) for f in everywhere}
        importers = sorted((f for f in everywhere if count[f]), key=lambda f: (-count[f], f))
        is_command = name == "__main__" or "commands" in path.parts
        runners = [f for f in everywhere if is_command and self.runs_command(f, package)]
        runners.sort(key=lambda f: (f not in of_package, f))
        distance = self.distances(file)
        whole = [f for f in everywhere if f.startswith(("tests/fault/", "tests/invariant/house/")) and f in distance]
        others = sorted([*of_package, *whole], key=lambda f: (distance.get(f, DISTANT), f in whole, f))
        own = [file] if file in self.has_doctest and name != "__main__" else []
        return list(dict.fromkeys([*own, *twins, *importers, *runners, *others]))

    def runs_command(self, test: str, package: str) -> bool:
        return f"{package}/__main__.py" in self.used[test] or package in self.commands[test]

    def distances(self, file: str) -> dict[str, int]:
        """Each file that reaches `file` by imports -> how many imports lie between."""
        found, nearest = {file: 0}, {file}
        while nearest:
            nearest = {other for known in nearest for other in self.importers[known]} - found.keys()
            found |= dict.fromkeys(nearest, max(found.values()) + 1)
        return found

    def used_names(self, tree: ast.Module) -> dict[str, set[str]]:
        """A file of ours that a tree imports -> the names that it takes from there."""
        used = defaultdict(set)
        bound = {}  # the text of a module in the code -> its file
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom | ast.Attribute)]
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in self.modules:
                        bound[alias.asname or alias.name] = self.modules[alias.name]
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (module := f"{node.module}.{alias.name}") in self.modules:
                        bound[alias.asname or alias.name] = self.modules[module]
                    elif node.module in self.modules:
                        used[self.modules[node.module]].add(alias.name)
                        if module := self.public.get(node.module, {}).get(alias.name):
                            used[self.modules[module]].add(alias.name)
        for node in nodes:
            if bound and isinstance(node, ast.Attribute) and (file := bound.get(dotted(node.value))):
                used[file].add(node.attr)
        return dict(used) | {file: used[file] or {""} for file in bound.values()}  # a module that is handed on as a whole


def dotted(node: ast.AST) -> str:
    """The text of a chain of names, `model.hub`; of anything else the text of its last names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def module_name(file: str) -> str:
    """
    >>> module_name("model/attention.py"), module_name("train/losses/__init__.py")
    ('model.attention', 'train.losses')
    """
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def public_names(package: str, tree: ast.Module | None) -> dict[str, str]:
    """A public name of a package -> the module that defines it, from the table PUBLIC of its `__init__.py`."""
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PUBLIC":
            return {name: f"{package}.{module}" for module, names in ast.literal_eval(node.value).items() for name in names}
    return {}
