"""Kinds of names by the syntax trees of the standard library: module, function, class or constant.

    FUNCTION  a function, method or property       (def)
    CLASS     a class, exception or type           (class, or namedtuple(...))
    CONSTANT  a name in capitals that is assigned in a module or class
    MODULE    a module or package of the standard library

Imports and aliases are followed. Built-in names (`len`, `ValueError`) have no source: their kind is what the interpreter says.
"""

import ast
import builtins
import re
import sys
from dataclasses import dataclass, field

from data.corpus.stdlib import DEFINITION
from data.made.modules import Module

CONSTANT_NAME = re.compile(r"_*[A-Z][A-Z0-9_]+")
UNMISTAKABLE = re.compile(r"[A-Z]\w*[a-z][A-Z]|^[A-Z][A-Z0-9]*_[A-Z]")
TYPE_MAKERS = {"namedtuple", "NewType", "TypeVar", "new_class", "Enum", "IntEnum"}
UNKNOWN = "UNKNOWN"  # it is defined, but not in Python source
MOST_STEPS = 8  # of imports that are followed


@dataclass
class Scope:
    """Names of a module or class: {name: kind}, {name: (module, name or None)} of imports, {name: Scope} of classes."""

    kinds: dict[str, str] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    classes: dict[str, "Scope"] = field(default_factory=dict)
    bases: list[str] = field(default_factory=list)
    stars: list[str] = field(default_factory=list)


def read_scope(body: list[ast.stmt], module: Module) -> Scope:
    """Return the names that statements define, those in `if` and `try` blocks too."""
    scope = Scope()
    for node in flatten(body):
        if isinstance(node, ast.ClassDef):
            scope.kinds[node.name] = "CLASS"
            scope.classes[node.name] = read_scope(node.body, module)
            scope.classes[node.name].bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        elif isinstance(node, DEFINITION):
            scope.kinds.setdefault(node.name, "FUNCTION")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        if kind := assigned_kind(name.id, node.value, scope):
                            scope.kinds.setdefault(name.id, kind)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                scope.imports.setdefault(bound, (alias.name if alias.asname else bound, None))
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(node, module)
            for alias in node.names:
                if alias.name == "*":
                    scope.stars.append(origin)
                else:
                    scope.imports.setdefault(alias.asname or alias.name, (origin, alias.name))
    return scope


def flatten(body: list[ast.stmt]) -> list[ast.stmt]:
    found = []
    for node in body:
        found.append(node)
        if isinstance(node, ast.If | ast.Try | ast.With):
            inner = [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
            found += flatten(inner + [each for handler in getattr(node, "handlers", []) for each in handler.body])
    return found


def assigned_kind(name: str, value: ast.expr | None, scope: Scope) -> str | None:
    if isinstance(value, ast.Name) and value.id in scope.kinds:  # an alias
        return scope.kinds[value.id]
    if isinstance(value, ast.Call):
        called = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        if called in TYPE_MAKERS:
            return "CLASS"
    return "CONSTANT" if CONSTANT_NAME.fullmatch(name) else None


def absolute(node: ast.ImportFrom, module: Module) -> str:
    """Return the name of the module that `from ... import` reads.

    >>> tree = ast.parse("from ..b import c")
    >>> absolute(tree.body[0], Module("p.a.x", tree, False, ()))
    'p.b'
    """
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def builtin_kind(name: str) -> str | None:
    value = getattr(builtins, name, None)
    if name.startswith("_") or value is None or isinstance(value, bool) or not callable(value):
        return None
    return "CLASS" if isinstance(value, type) else "FUNCTION"


class Names:
    """Names of all modules. `resolve` tells the kind of a dotted name as a docstring of a module, class or function uses it."""

    def __init__(self, modules: list[Module]):
        self.scopes = {module.name: read_scope(module.tree.body, module) for module in modules}
        self.modules = {*self.scopes, *sys.stdlib_module_names}
        seen: dict[str, set[str]] = {}
        for scope in self.scopes.values():
            for name, kind in scope.kinds.items():
                seen.setdefault(name, set()).add(kind)
        self.everywhere = {name: next(iter(kinds)) for name, kinds in seen.items() if len(kinds) == 1}

    def resolve(self, path: str, module: str, owner: str = "") -> str | None:
        """Return the kind of a dotted name; None if it is none that is defined; UNKNOWN if it is defined outside Python source.

        The first part is looked for in the class `owner` (dotted, of the module) and its bases, the module, the built-in names,
        the modules of the library, and, if it looks like OrderedDict or O_RDONLY, in all modules, which must agree.
        """
        first, *rest = path.split(".")
        scope = self.scopes[module]
        if owner and (inner := self.class_scope(scope, owner)) is not None:
            if first in ("self", "cls") and rest:
                return self.member(inner, rest, scope)
            if (kind := self.member(inner, [first, *rest], scope)) is not None:
                return kind
        if (kind := self.in_scope(scope, [first, *rest])) is not None:
            return kind
        if not rest and (kind := builtin_kind(first)) is not None:
            return kind
        if first in self.modules:
            return self.in_module([first, *rest])
        return self.everywhere.get(first) if not rest and UNMISTAKABLE.search(first) else None

    def class_scope(self, scope: Scope, owner: str) -> Scope | None:
        for part in owner.split("."):
            if scope is None or part not in scope.classes:
                return None
            scope = scope.classes[part]
        return scope

    def member(self, inner: Scope, parts: list[str], outer: Scope, steps: int = 0) -> str | None:
        """The kind of a member of a class: its own, or of a base in the same module."""
        if parts[0] in inner.kinds:
            if len(parts) == 1:
                return inner.kinds[parts[0]]
            return self.member(inner.classes[parts[0]], parts[1:], outer) if parts[0] in inner.classes else None
        for base in inner.bases:
            if steps < MOST_STEPS and base in outer.classes and outer.classes[base] is not inner:
                if (kind := self.member(outer.classes[base], parts, outer, steps + 1)) is not None:
                    return kind
        return None

    def in_scope(self, scope: Scope, parts: list[str], steps: int = 0) -> str | None:
        first, *rest = parts
        if first in scope.kinds:
            if not rest:
                return scope.kinds[first]
            return self.member(scope.classes[first], rest, scope) if first in scope.classes else None
        if first in scope.imports and steps < MOST_STEPS:
            origin, name = scope.imports[first]
            return self.in_module([*origin.split("."), *([name] if name else []), *rest], steps + 1)
        for origin in scope.stars:
            if origin in self.scopes and steps < MOST_STEPS:
                if (kind := self.in_scope(self.scopes[origin], parts, steps + 1)) is not None:
                    return kind
        return None

    def in_module(self, parts: list[str], steps: int = 0) -> str | None:
        """The kind of a name that begins with a module's: the longest module name counts."""
        for length in range(len(parts), 0, -1):
            name = ".".join(parts[:length])
            if name in self.modules:
                if length == len(parts):
                    return "MODULE"
                return self.in_scope(self.scopes[name], parts[length:], steps) if name in self.scopes else UNKNOWN
        return None
