"""The task of the bench `transfer`: which package of the standard library a docstring comes from, and text to pretrain on.

The classes are the ten packages with the most documented definitions, of those with three module files and more. A module's
file is on one side: training, validation or test. A text is a docstring of four words and more; in it the names of all ten
packages are masked by one word. Duplicates are dropped (`data.made.modules`). The text to pretrain on is the documentation of
all modules but those of validation and test; a test text that stands in it whole is dropped, and the 8-grams of words that
stand in it are counted.
"""

import re
from collections import defaultdict
from typing import NamedTuple

from data.config import DataConfig
from data.corpus.dedup import deduplicate
from data.corpus.split import split_documents
from data.corpus.stdlib import list_files, read_docs
from data.made.modules import Module, draw, module_name, package_of, read_modules
from data.sources.files import Document

CLASSES, FEWEST_FILES, FEWEST_WORDS, GRAM = 10, 3, 4, 8
SHARES = {"test": 0.25, "validation": 0.15}  # at most, of a package's definitions; at least one file
MASK = "package"


class Labelled(NamedTuple):
    text: str
    label: str
    module: str
    is_masked: bool


class TransferData(NamedTuple):
    """texts: of "train", "validation" and "test". in_corpus: test texts that were dropped, as they stand in `corpus`."""

    texts: dict[str, list[Labelled]]
    corpus: list[str]
    in_corpus: int
    leaks: dict[str, tuple[float, float]]  # text to pretrain on: shares of the test's texts, and of their 8-grams, in it


def make_data() -> TransferData:
    """Return the texts and the corpus; a function of the running Python's sources."""
    modules = defaultdict(list)
    for module in read_modules():
        if module.definitions:
            modules[package_of(module.name)].append(module)
    sizes = {name: count(found) for name, found in modules.items() if len(found) >= FEWEST_FILES}
    packages = sorted(sorted(sizes, key=lambda name: (-sizes[name], name))[:CLASSES])
    sides = {name: side for package in packages for name, side in choose_sides(modules[package]).items()}
    names = re.compile(rf"\b({'|'.join(packages)})\b", re.IGNORECASE)
    texts: dict[str, list[Labelled]] = {"train": [], **{side: [] for side in SHARES}}
    for package in packages:
        for module in modules[package]:
            for found in module.definitions:
                if len(found.text.split()) >= FEWEST_WORDS:
                    masked, times = names.subn(MASK, found.text)
                    row = Labelled(masked, package, module.name, times > 0)
                    texts[sides.get(module.name, "train")].append(row)
    corpus = [document.text for document in read_docs([path for path in list_files() if module_name(path) not in sides])]
    whole = spaced(corpus)
    retained = [row for row in texts["test"] if f" {normalized(row.text)} " not in whole]
    dropped, texts["test"] = len(texts["test"]) - len(retained), retained
    leaks = {"this bench's": leak(retained, corpus), "stdlib-docs, as it splits itself": leak(retained, built_in())}
    return TransferData(texts, corpus, dropped, leaks)


def count(modules: list[Module]) -> int:
    return sum(len(module.definitions) for module in modules)


def choose_sides(modules: list[Module]) -> dict[str, str]:
    """Return the side of each held-out module of a package: files in the order of a hash, as long as they fit in the share. The
    largest file is trained on."""
    largest = max(modules, key=lambda module: (len(module.definitions), module.name))
    free = sorted((module for module in modules if module is not largest), key=lambda module: draw(0, "side", module.name))
    sides: dict[str, str] = {}
    for side, share in SHARES.items():
        left = share * count(modules)
        for module in [module for module in free if module.name not in sides]:
            if len(module.definitions) <= left:
                sides[module.name], left = side, left - len(module.definitions)
        if side not in sides.values():
            smallest = min((m for m in free if m.name not in sides), key=lambda module: len(module.definitions))
            sides[smallest.name] = side
    return sides


def draw_labels(rows: list[Labelled], number: int | None, seed: int) -> list[Labelled]:
    """Return so many of the training texts (None: all), drawn by a hash of the text; each class has one at least."""
    ordered = sorted(rows, key=lambda row: draw(seed, "label", row.module, row.text))
    seen: set[str] = set()
    first = [row for row in ordered if row.label not in seen and not seen.add(row.label)]
    return [*first, *(row for row in ordered if row not in first)][:number]


def built_in() -> list[str]:
    """Return the training documents of the built-in corpus."""
    documents = [Document(document.name, document.text) for document in read_docs(list_files())]
    retained = deduplicate(documents)[0]
    return [document.text for document in split_documents(retained, DataConfig().val_fraction)["train"]]


def normalized(text: str) -> str:
    return " ".join(text.lower().split())


def spaced(texts: list[str]) -> str:
    return " " + " \0 ".join(map(normalized, texts)) + " "


def grams(text: str) -> set[tuple[str, ...]]:
    words = normalized(text).split()
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


def leak(rows: list[Labelled], corpus: list[str]) -> tuple[float, float]:
    """Return the share of the texts that stand in the corpus whole, up to case and white space, and the share of their 8-grams
    of words that do."""
    whole, known = spaced(corpus), set().union(*map(grams, corpus))
    asked = [gram for row in rows for gram in grams(row.text)]
    return (
        sum(f" {normalized(row.text)} " in whole for row in rows) / len(rows),
        sum(gram in known for gram in asked) / len(asked),
    )
