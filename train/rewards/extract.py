"""Answers in a reply: tags, boxes, numbers, arithmetic expressions."""

import ast
import operator
import re
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction

NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?"  # a sign; behind a digit or a parenthesis it is an operator
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
BOX = "\\boxed{"
MAX_EXPRESSION = 200  # characters; more is no answer, and could nest more deeply than Python's parser allows
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def last_tagged(text: str, tag: str = "answer") -> str | None:
    """Return the text in the last <tag>…</tag>, without outer white space; None without one.

    >>> last_tagged("<answer>1</answer> no: <answer> 2 </answer>"), last_tagged("<answer>1")
    ('2', None)
    """
    before, close, _ = text.rpartition(f"</{tag}>")
    _, start, inside = before.rpartition(f"<{tag}>")
    return inside.strip() if close and start else None


def last_boxed(text: str) -> str | None:
    r"""Return the text in the last \boxed{…} that is closed, braces inside balanced; None without one.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}."), last_boxed(r"\boxed{1} and \boxed{2"), last_boxed("1/2")
    ('\\frac{1}{2}', '1', None)
    """
    end = len(text)
    while (start := text.rfind(BOX, 0, end)) >= 0:
        depth = 1
        for place in range(start + len(BOX), end):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[start + len(BOX) : place].strip()
        end = start  # not closed; a box before it may be
    return None


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, exactly; None without one.

    Commas before groups of three digits separate thousands. A minus sign may be U+2212.

    >>> last_number("1,234.50 in all"), last_number("5-3"), last_number("x = −7."), last_number("1,2345"), last_number("no")
    (Decimal('1234.50'), Decimal('3'), Decimal('-7'), Decimal('2345'), None)
    """
    found = NUMBER.findall(text.replace("\u2212", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def evaluate(expression: str) -> tuple[Fraction, Counter[int]] | None:
    """Return (value, integers used) of an expression of integers, + - * / and parentheses; None for anything else.

    Nothing is run: the parsed tree may hold these nodes alone. A division by zero gives None.

    >>> evaluate("(6 - 4/2) * 3")
    (Fraction(12, 1), Counter({6: 1, 4: 1, 2: 1, 3: 1}))
    >>> evaluate("2**9"), evaluate("1/0"), evaluate("-1"), evaluate("f(1)")
    (None, None, None, None)
    """
    text = expression.strip()
    if len(text) > MAX_EXPRESSION or not set(text) <= set("0123456789+-*/() "):
        return None
    used: Counter[int] = Counter()
    try:
        return _value(ast.parse(text, mode="eval").body, used), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, used: Counter[int]) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, used), _value(node.right, used))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    raise ValueError("an operation that is not allowed")


def is_solution(expression: str, numbers: Iterable[int], target: int) -> bool:
    """Return True if the expression equals the target and has each of the numbers exactly once.

    >>> is_solution("(6 - 4) * 3", [3, 4, 6], 6), is_solution("6", [3, 4, 6], 6)
    (True, False)
    """
    found = evaluate(expression)
    return found is not None and found[0] == target and found[1] == Counter(numbers)
