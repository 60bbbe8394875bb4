"""The mutants of a seed."""

import ast
import io
import random
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.mutants.edits import Edit, find_edits

PACKAGES = ("model", "data", "train", "eval", "lora", "quant")
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
NO_CODE |= {tokenize.ENDMARKER}


class Mutant(NamedTuple):
    file: str
    edit: Edit

    def lines(self, data: bytes) -> tuple[str, str]:
        """The changed line before and after, each with all lines that the edit reaches joined into one."""
        start = data.rfind(b"\n", 0, self.edit.start) + 1
        end = data.find(b"\n", self.edit.end)
        end = len(data) if end < 0 else end
        after = self.edit.apply(data)[start : end + len(self.edit.new.encode()) - (self.edit.end - self.edit.start)]
        return " ".join(data[start:end].decode().split()), " ".join(after.decode().split())


def source_files(root: Path, only: Sequence[str] = ("",), packages: Sequence[str] = PACKAGES) -> list[str]:
    """The Python files of packages whose path begins with one of `only`."""
    paths = (path for package in packages for path in (root / package).rglob("*.py"))
    return sorted(file for path in paths if (file := path.relative_to(root).as_posix()).startswith(tuple(only)))


def draw(sources: dict[str, bytes], seed: int) -> Iterator[Mutant]:
    """All mutants in a random order: a file in proportion to its code lines, a kind of mutation, an edit of that kind.

    Equal sources and seeds give equal orders. The kinds are equally likely, else constants would be most of all mutants. An
    edit after which the file does not compile is left out.
    """
    random_draw = random.Random(seed)
    weights = {file: lines for file, data in sorted(sources.items()) if (lines := code_lines(data))}
    edits: dict[str, dict[str, list[Edit]]] = {}
    while weights:
        (file,) = random_draw.choices([*weights], [*weights.values()])
        if file not in edits:
            edits[file] = {}
            for edit in find_edits(sources[file]):
                edits[file].setdefault(edit.kind, []).append(edit)
        if not edits[file]:
            del weights[file]
            continue
        same_kind = edits[file][random_draw.choice([*edits[file]])]
        edit = same_kind.pop(random_draw.randrange(len(same_kind)))
        if not same_kind:
            del edits[file][edit.kind]
        if compiles(edit.apply(sources[file])):
            yield Mutant(file, edit)


def compiles(data: bytes) -> bool:
    try:
        compile(data, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def code_lines(data: bytes) -> int:
    """Count the lines that are not blank, not comments and not docstrings.

    >>> code_lines(b'"Say.\\\\\\n"\\n# why\\nx = 1\\n\\ny = (x,\\n2)\\n')
    3
    """
    tokens = tokenize.tokenize(io.BytesIO(data).readline)
    lines = {line for token in tokens if token.type not in NO_CODE for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(data)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= {*range(node.lineno, node.end_lineno + 1)}
    return len(lines)
