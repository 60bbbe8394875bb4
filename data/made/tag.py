"""Names in documentation sentences, as IOB2 tags: modules, functions, classes and constants.

A sentence is cut into words, and punctuation marks are words, so that `os.path` is three: B-MODULE I-MODULE I-MODULE.
A name is tagged when both hold:

    it refers   the syntax trees say what it is (`data.made.names`), and it is no parameter of the documented function
    it shows    that it is a name: it is dotted; has an underscore, or a capital after a small letter; stands before "(" or in
                quotes; is a constant in capitals; is a capitalized class after the sentence's first word, not beside another
                capitalized word, a hyphen or a slash; or the word beside it says so ("the time module", "function open")

so that "time" and "open" as plain English words, and HTTP as a protocol's name, are O. A sentence with a name of a kind that no
syntax tree tells (of a module written in C) is left out.
"""

import ast
import re

from data.corpus.dedup import fingerprint
from data.made.modules import Definition, Module, Record, draw
from data.made.names import CONSTANT_NAME, UNKNOWN, Names
from data.made.text import paragraphs, sentences

KINDS = ("MODULE", "FUNCTION", "CLASS", "CONSTANT")
WORD = re.compile(r"[^\W\d]\w*|\d+(?:\.\d+)?\w*|[^\w\s]")
IDENTIFIER = re.compile(r"[^\W\d]\w*")
SAID = {
    "MODULE": {"module", "modules", "package", "import"},
    "FUNCTION": {"function", "functions", "method", "methods"},
    "CLASS": {"class", "classes", "exception", "instance", "instances", "object", "objects", "subclass"},
    "CONSTANT": {"constant", "flag"},
}
ENGLISH = {"this", "object", "type", "callable"}  # names of Python, but "this module" and "type object" mean no name
QUOTES = {"`", "'", '"'}
LENGTHS = range(5, 61)  # words of a sentence


def make_tag(
    modules: list[Module], seed: int = 0, avoid: frozenset[bytes] = frozenset(), names: Names | None = None
) -> list[Record]:
    """Return records {"words", "labels", "module"}, drawn in order: all sentences with a name, and half as many without.

    avoid: fingerprints of sentences that are left out.  names: of all modules, when `modules` are some of them.
    """
    names = names or Names(modules)
    with_names, without, seen = [], [], set(avoid)
    for module in modules:
        for found in module.definitions:
            for sentence in (s for paragraph in paragraphs(found.text) for s in sentences(paragraph)):
                words = WORD.findall(sentence)
                if len(words) not in LENGTHS or (key := fingerprint(" ".join(words))) in seen:
                    continue
                seen.add(key)
                if (labels := label_words(words, found, names)) is not None:
                    record = {"words": words, "labels": labels, "module": module.name}
                    (with_names if any(label != "O" for label in labels) else without).append(record)

    def place(record: Record) -> float:
        return draw(seed, "tag", *record["words"])

    return sorted(with_names + sorted(without, key=place)[: len(with_names) // 2], key=place)


def label_words(words: list[str], found: Definition, names: Names) -> list[str] | None:
    """Return the tags; None if the kind of a name is unknown."""
    labels, i = ["O"] * len(words), 0
    owner = found.name if isinstance(found.node, ast.ClassDef) else found.owner
    hidden = parameters(found.node)
    while i < len(words):
        end = path_end(words, i)
        if IDENTIFIER.fullmatch(words[i]) and words[i] not in hidden:
            while end > i:  # the longest prefix of a dotted path that refers to something
                path = "".join(words[i:end])
                kind = names.resolve(path, found.module, owner)
                if kind and shows_name(words, i, end, kind):
                    if kind == UNKNOWN:
                        return None
                    labels[i:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - i - 1)
                    break
                end -= 2
            end = max(end, i + 1)
        i = end if labels[i] != "O" else path_end(words, i)
    return labels


def path_end(words: list[str], start: int) -> int:
    """Return the end of the dotted path that begins at `start`.

    >>> path_end(["os", ".", "path", ".", "join", "(", ")", "."], 0)
    5
    """
    end = start + 1
    if not IDENTIFIER.fullmatch(words[start]):
        return end
    while end + 1 < len(words) and words[end] == "." and IDENTIFIER.fullmatch(words[end + 1]):
        end += 2
    return end


def shows_name(words: list[str], start: int, end: int, kind: str) -> bool:
    """Tell whether the text shows that words[start:end] is a name, and not an English word."""
    name, before, after = words[start], words[start - 1] if start else "", words[end] if end < len(words) else ""
    if len(name.strip("_")) < 2 or (name in ENGLISH and end == start + 1 and before not in QUOTES):
        return False
    if end - start > 1 or "_" in name.strip("_") or re.search(r"[a-z0-9][A-Z]", name):
        return True
    if (after == "(" and kind in ("FUNCTION", "CLASS")) or (before in QUOTES and after in QUOTES):
        return True
    if name not in ENGLISH and kind in SAID and not SAID[kind].isdisjoint({before.lower(), after.lower()}):
        return True
    if CONSTANT_NAME.fullmatch(name):
        return kind == "CONSTANT" and not {before, after} & {"-", "/"}
    is_class = kind == "CLASS" and name[0].isupper() and before not in {"", ".", "!", "?", ":", *QUOTES}
    return is_class and not any(each[:1].isupper() or each in ("-", "/") for each in (before, after))


def parameters(node: ast.AST) -> set[str]:
    """Return the names of a function's parameters; of a class, those of its __init__ ."""
    if isinstance(node, ast.ClassDef):
        return set().union(*(parameters(each) for each in node.body if getattr(each, "name", "") == "__init__"))
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    return {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)} - {"self", "cls"}


def problem_of_tags(labels: list[str]) -> str | None:
    """Return what is wrong with IOB2 tags, or None: I-X follows B-X or I-X alone.

    >>> problem_of_tags(["B-CLASS", "I-CLASS", "O"]), problem_of_tags(["O", "I-CLASS"])
    (None, 'word 2: I-CLASS after O')
    """
    for i, label in enumerate(labels):
        before = labels[i - 1] if i else "O"
        if label.startswith("I-") and before[2:] != label[2:]:
            return f"word {i + 1}: {label} after {before}"
    return None
