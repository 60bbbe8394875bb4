"""Modules of the standard library and the data sets that are made of them, for tests: each is made once in a process."""

import ast
from functools import cache

from data.made.modules import Module, list_definitions, package_of, read_modules
from data.made.sets import make_set

NAMES = ("tag", "qa", "pairs", "scores", "conversations")
PACKAGES = {"json", "email", "http", "logging", "argparse", "os", "posixpath", "collections"}


@cache
def modules() -> list[Module]:
    return read_modules(lambda name: package_of(name) in PACKAGES)


@cache
def made(name: str) -> dict[str, list[dict]]:
    return make_set(name, modules())


def from_source(source: str, name: str = "m") -> Module:
    tree = ast.parse(source)
    return Module(name, tree, False, tuple(list_definitions(tree, name)))
