"""Pairs of functions with a number: how similar are they?

    score = |A & B| / |A | B|        (the Jaccard index; Jaccard 1901)

of the sets A, B of identifiers in their sources: names, attributes, parameters, keywords of calls. Texts are the whole sources
without docstrings, comments and line breaks, so that the score is a function of both texts. Pairs are of one module, and some
of any two. Both sources are about equally long, and for each length there are as many pairs in each tenth from 0 to 0.7 (above,
there are too few), so that lengths tell next to nothing of the score.
"""

import ast
from collections import Counter, defaultdict
from typing import NamedTuple

from data.corpus.dedup import fingerprint
from data.corpus.stdlib import without_surrogates
from data.made.modules import Module, Record, draw

LENGTHS = range(60, 180)  # characters of a source
LENGTH_STEP = 60  # characters, mean of both: pairs of one class
LINES = 60  # of a function that is considered at all, its docstring among them
INTERVALS = 7  # of a tenth
RATIO = 1.2  # of the lengths in characters, at most: else the score is small by that alone
MODULE_FUNCTIONS = 120  # of a module that are compared with one another
MOST_USES = 12  # records that one function stands in
SIZE = 10000  # records, at most


class Function(NamedTuple):
    module: str
    text: str
    identifiers: int  # a bit for each
    count: int


class Pair(NamedTuple):
    first: int
    second: int
    score: float
    place: float  # drawn


def make_scores(modules: list[Module], seed: int = 0, avoid: frozenset[bytes] = frozenset(), size: int = SIZE) -> list[Record]:
    """Return records {"first", "second", "score", "module"} in an order drawn by the seed.

    avoid: fingerprints of sources that are left out.
    """
    functions = list_functions(modules, avoid)
    strata: dict[int, list[list[Pair]]] = defaultdict(lambda: [[] for _ in range(INTERVALS)])
    for i, j in candidate_pairs(functions, seed):
        a, b = functions[i], functions[j]
        shorter, longer = sorted((len(a.text), len(b.text)))
        both = (a.identifiers & b.identifiers).bit_count()
        score = both / (a.count + b.count - both)
        if longer <= RATIO * shorter and score * 10 < INTERVALS:
            pair = Pair(i, j, score, draw(seed, a.text, b.text))
            strata[(shorter + longer) // 2 // LENGTH_STEP][int(score * 10)].append(pair)
    uses: Counter[int] = Counter()
    chosen = [pair for length in sorted(strata) for pair in choose_evenly(strata[length], size // INTERVALS, uses)]
    records = []
    for i, j, score, place in chosen:
        a, b = (functions[i], functions[j]) if place * 1000 % 1 < 0.5 else (functions[j], functions[i])
        records.append({"first": a.text, "second": b.text, "score": round(score, 4), "module": functions[i].module})
    records.sort(key=lambda record: draw(seed, "scores", record["first"], record["second"]))
    return records[:size]


def choose_evenly(intervals: list[list[Pair]], most: int, uses: Counter[int]) -> list[Pair]:
    """Return as many pairs of each interval, at most `most`, in the order drawn; no function in more than MOST_USES pairs."""
    chosen: list[list[Pair]] = [[] for _ in intervals]
    for k in sorted(range(len(intervals)), key=lambda k: (len(intervals[k]), k)):  # the scarce ones first
        for pair in sorted(intervals[k], key=lambda pair: pair.place):
            if len(chosen[k]) < most and max(uses[pair.first], uses[pair.second]) < MOST_USES:
                chosen[k].append(pair)
                uses.update((pair.first, pair.second))
        most = len(chosen[k])
    return [pair for pairs in chosen for pair in pairs[:most]]


def list_functions(modules: list[Module], avoid: frozenset[bytes]) -> list[Function]:
    """Return the functions of suitable length, without those whose source occurs before or is to be avoided."""
    bits: dict[str, int] = {}
    seen = set(avoid)
    found = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno < LINES:
                text = source_of(node)
                if len(text) in LENGTHS and (key := fingerprint(text)) not in seen:
                    seen.add(key)
                    names = identifiers(node)
                    mask = sum(1 << bits.setdefault(name, len(bits)) for name in names)
                    found.append(Function(module.name, text, mask, len(names)))
    return found


def source_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the source in one line, without docstring and comments.

    >>> source_of(ast.parse("def half(x):\\n  '''Half.'''\\n  y = x / 2  # rounded?\\n  return y").body[0])
    'def half(x): y = x / 2 return y'
    """
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    bare = type(node)(**{**dict(ast.iter_fields(node)), "body": body or [ast.Pass()]})
    return without_surrogates(" ".join(ast.unparse(ast.copy_location(bare, node)).split()))


def identifiers(node: ast.AST) -> set[str]:
    """Return the identifiers of a function.

    >>> sorted(identifiers(ast.parse("def half(x, *, up=False): return self.round(x / 2, mode=up)").body[0]))
    ['half', 'mode', 'round', 'self', 'up', 'x']
    """
    body = [node] if ast.get_docstring(node, clean=False) is None else [node.args, *node.body[1:]]
    found = {node.name}
    for each in (inner for part in body for inner in ast.walk(part)):
        for field in ("id", "attr", "arg"):
            if isinstance(name := getattr(each, field, None), str):
                found.add(name)
    return found


def candidate_pairs(functions: list[Function], seed: int) -> list[tuple[int, int]]:
    """Return pairs of indices: those of MODULE_FUNCTIONS functions of each module, drawn, and each function with two others."""
    of_module: dict[str, list[int]] = defaultdict(list)
    for i, function in enumerate(functions):
        of_module[function.module].append(i)
    for module, members in of_module.items():
        of_module[module] = sorted(members, key=lambda i: draw(seed, "member", functions[i].text))[:MODULE_FUNCTIONS]
    pairs = [(i, j) for members in of_module.values() for place, i in enumerate(members) for j in members[place + 1 :]]
    for i, function in enumerate(functions):
        for k in range(2):
            j = int(draw(seed, "any", k, function.text) * len(functions))
            if functions[j].module != function.module:
                pairs.append((i, j))
    return pairs
