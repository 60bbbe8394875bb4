"""The mutations of a source file: edits of one place each, found in its syntax tree, that leave all other text as it is."""

import ast
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

ARITHMETIC = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
ARITHMETIC |= {ast.FloorDiv: ("//", "%"), ast.Mod: ("%", "//")}
COMPARISON = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")}
COMPARISON |= {ast.Eq: ("==", "!="), ast.NotEq: ("!=", "==")}
SEQUENCES = (ast.JoinedStr, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.ListComp)
CAST_METHODS = {"float", "double", "half", "bfloat16", "int", "long", "bool"}
CLAMP_METHODS = {"clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_"}
EXTREMES = {"max", "min", "torch.maximum", "torch.minimum", "np.maximum", "np.minimum"}
NO_ORDER = {"isinstance", "issubclass", "getattr", "hasattr", "setattr", "zip", "gcd", "promote_types", "equal", "allclose"}
NO_GRADIENT = ("torch.no_grad", "torch.inference_mode")
MESSAGES = {"print", "info", "warn", "progress", "error", "exit"}  # calls that only say something
NOT_BEHAVIOUR = {"annotation", "returns", "decorator_list", "msg"}  # fields of syntax nodes


class Edit(NamedTuple):
    """Replace the bytes start … end of a file."""

    kind: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def apply(self, data: bytes) -> bytes:
        return data[: self.start] + self.new.encode() + data[self.end :]


class Source:
    """A file's bytes and syntax tree. (The tree counts columns in bytes of UTF-8.)"""

    def __init__(self, data: bytes):
        self.data, self.tree = data, ast.parse(data)
        self.line_starts = [0, *(match.end() for match in re.finditer(rb"\n", data))]

    def start(self, node: ast.AST) -> int:
        return self.line_starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self.line_starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        """The text of a node, in parentheses where it could not stand as an operand without."""
        text = self.data[self.start(node) : self.end(node)].decode()
        atomic = isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant | ast.List)
        return text if atomic else f"({text})"

    def operator(self, left: ast.AST, right: ast.AST, text: str) -> tuple[int, int]:
        """The place of an operator between two operands; parentheses and comments may stand between them too."""
        gap = self.data[self.end(left) : self.start(right)].decode()
        (place,) = [m.start() for m in re.finditer(rf"#[^\n]*|{re.escape(text)}", gap) if not m[0].startswith("#")][:1]
        start = self.end(left) + len(gap[:place].encode())
        return start, start + len(text)

    def method(self, call: ast.Call) -> tuple[int, int]:
        """The place of `.name(…)` in `receiver.name(…)`."""
        name = self.end(call.func) - len(call.func.attr)
        return self.data.rindex(b".", 0, name), self.end(call)


Found = Iterator[tuple[int, int, str]]  # start, end, new text


def arithmetic(node: ast.AST, source: Source) -> Found:
    """+ ↔ -, * ↔ /, // ↔ %; `a @ b` becomes `b @ a`."""
    if isinstance(node, ast.BinOp) and not is_sequence(node.left) and not is_sequence(node.right):
        if isinstance(node.op, ast.MatMult):
            yield source.start(node), source.end(node), f"{source.text(node.right)} @ {source.text(node.left)}"
        elif type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)]
            yield *source.operator(node.left, node.right, old), new
    elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC and not is_sequence(node.value):
        old, new = ARITHMETIC[type(node.op)]
        yield *source.operator(node.target, node.value, f"{old}="), f"{new}="


def is_sequence(node: ast.AST) -> bool:
    """True for a literal text or collection, with which + and / do not compute."""
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    return is_text or isinstance(node, SEQUENCES) or (isinstance(node, ast.BinOp) and is_sequence(node.left))


def comparison(node: ast.AST, source: Source) -> Found:
    """< ↔ <=, > ↔ >=, == ↔ !=."""
    if isinstance(node, ast.Compare):
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            if type(operator) in COMPARISON:
                old, new = COMPARISON[type(operator)]
                yield *source.operator(left, right, old), new


def boolean(node: ast.AST, source: Source) -> Found:
    """and ↔ or, & → |; `not a` and `~a` become `a`."""
    if isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield *source.operator(left, right, old), new
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield *source.operator(node.left, node.right, "&"), "|"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        start = source.start(node)
        yield start, start + len(re.match(rb"~|not\s*", source.data[start:])[0]), ""


def constant(node: ast.AST, source: Source) -> Found:
    """n → n + 1; x → 2x, 0.0 → 1.0, and 100x below 0.01; True ↔ False."""
    if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        value = node.value
        if isinstance(value, bool):
            new = not value
        elif isinstance(value, int):
            new = value + 1
        else:
            new = float(f"{(100 if value < 0.01 else 2) * value:.12g}") if value else 1.0
        yield source.start(node), source.end(node), repr(new)


def cast(node: ast.AST, source: Source) -> Found:
    """`a.float()`, `a.to(dtype)`, `float(a)` become `a`."""
    if not isinstance(node, ast.Call):
        return
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node.func, ast.Name) and node.func.id in ("float", "int") and len(given) == 1:
        yield source.start(node), source.end(node), source.text(given[0])
    elif isinstance(node.func, ast.Attribute):
        is_dtype = any(not ast.unparse(value).endswith(("device", "True", "False")) for value in given)
        if (node.func.attr in CAST_METHODS and not given) or (node.func.attr == "to" and is_dtype):
            yield *source.method(node), ""


def clamp(node: ast.AST, source: Source) -> Found:
    """`a.clamp_min(b)` becomes `a`; `max(a, b)` becomes `a`, or `b`."""
    if not isinstance(node, ast.Call):
        return
    name = ast.unparse(node.func)
    if name in EXTREMES and len(node.args) == 2 and not node.keywords:
        for argument in node.args:
            yield source.start(node), source.end(node), source.text(argument)
    elif name == "torch.clamp":
        yield source.start(node), source.end(node), source.text(node.args[0])
    elif isinstance(node.func, ast.Attribute) and node.func.attr in CLAMP_METHODS:
        yield *source.method(node), ""


def arguments(node: ast.AST, source: Source) -> Found:
    """`f(a, b)` becomes `f(b, a)`: two neighbours among the positional arguments."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] not in NO_ORDER | EXTREMES:
        for left, right in zip(node.args, node.args[1:], strict=False):
            start, end = source.start(left), source.end(right)
            first, between, second = (
                source.data[a:b].decode()
                for a, b in ((start, source.end(left)), (source.end(left), source.start(right)), (source.start(right), end))
            )
            is_starred = isinstance(left, ast.Starred) or isinstance(right, ast.Starred)
            if first != second and not is_starred and re.fullmatch(r"\s*,\s*", between):
                yield start, end, second + between + first


def gradient(node: ast.AST, source: Source) -> Found:
    """`a.detach()` becomes `a`; a function loses its `@torch.no_grad()`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
        yield *source.method(node), ""
    elif isinstance(node, ast.FunctionDef):
        for decorator in node.decorator_list:
            if ast.unparse(decorator).startswith(NO_GRADIENT):
                start, end = source.data.rindex(b"@", 0, source.start(decorator)), source.end(decorator)
                yield start, end + len(re.match(rb"[^\n]*\n\s*", source.data[end:])[0]), ""


def statement(node: ast.AST, source: Source) -> Found:
    """`a += b`, and a call whose result nobody takes, become `pass`."""
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if isinstance(node, ast.AugAssign) or (is_call and "super().__init__" not in ast.unparse(node.value.func)):
        yield source.start(node), source.end(node), "pass"


KINDS = (arithmetic, comparison, boolean, constant, cast, clamp, arguments, gradient, statement)


def find_edits(data: bytes) -> list[Edit]:
    """All mutations of a file, in the order of their places.

    >>> [edit] = find_edits("ε = a < b  # a < b".encode())
    >>> edit.kind, edit.line, edit.old, edit.new, edit.apply("ε = a < b  # a < b".encode()).decode()
    ('comparison', 1, '<', '<=', 'ε = a <= b  # a < b')
    """
    source = Source(data)
    found = set()
    for node in behaviour(source.tree, message_names(source.tree)):
        for kind in KINDS:
            for start, end, new in kind(node, source):
                old, line = data[start:end].decode(), data.count(b"\n", 0, start) + 1
                found.add(Edit(kind.__name__, line, start, end, old, new))
    return sorted(found, key=lambda edit: (edit.start, edit.end, edit.kind, edit.new))


def behaviour(node: ast.AST, unread: frozenset[str] = frozenset()) -> Iterator[ast.AST]:
    """The nodes that decide what a program computes: no imports, messages, annotations, Triton kernels.

    unread: variables that only messages read; what they are set to is left out too.
    """
    if is_message(node) or is_left_out(node) or assigned_name(node) in unread:
        return
    yield node
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if field not in NOT_BEHAVIOUR and isinstance(child, ast.AST):
                yield from behaviour(child, unread)


def is_message(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return is_message(node.value)
    is_said = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in MESSAGES
    return is_said or isinstance(node, ast.Raise | ast.JoinedStr)


def is_left_out(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test) or "__name__" in ast.unparse(node.test)
    if isinstance(node, ast.FunctionDef):
        return any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
    return isinstance(node, ast.Import | ast.ImportFrom) or assigned_name(node) == "__all__"


def assigned_name(node: ast.AST) -> str | None:
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
    return target.id if isinstance(target, ast.Name) else None


def message_names(tree: ast.AST) -> frozenset[str]:
    """The variables of a file that messages read, or assignments to such variables, and nothing else in it."""
    said = [part for node in ast.walk(tree) if is_message(node) for part in ast.walk(node)]
    found: set[str] = set()
    while more := read_names(said) - read_names(behaviour(tree, frozenset(found))) - found:
        found |= more
        said += [part for node in ast.walk(tree) if assigned_name(node) in more for part in ast.walk(node)]
    return frozenset(found)


def read_names(nodes: Iterable[ast.AST]) -> set[str]:
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
