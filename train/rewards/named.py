"""The named rewards: plain functions (prompt, reply, record) -> number, or None to leave the reply out.

`record` has the columns of the prompt's record; a keyword is the VALUE of `--reward NAME:VALUE`. A record that a function
cannot use is a TrainError, which the caller completes by the record's name.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import regex as patterns  # it has a timeout; the standard library's re has none

from data.messages import quote_names
from train.rewards.extract import is_solution, last_boxed, last_number, last_tagged
from train.rewards.names import parse_named
from train.rewards.sample import Sample
from train.runs.errors import TrainError

REGEX_SECONDS = 0.1  # for one reply; a pattern without nested repeats takes microseconds
REWARDS: dict[str, "NamedReward"] = {}
Columns = Mapping[str, object]


@dataclass(frozen=True)
class NamedReward:
    """A named reward. setting: the keyword that VALUE of NAME:VALUE sets, read by `read`, None without one."""

    function: Callable[..., float | None]
    setting: str | None = None
    read: Callable[[str], object] | None = None
    has_default: bool = False  # NAME alone will do

    @property
    def reads_tokens(self) -> bool:
        """True if it takes the reply's number of tokens, `token_count`."""
        return "token_count" in inspect.signature(self.function).parameters

    @property
    def runs_code(self) -> bool:
        """True if it takes which of the record's assertions the reply's code passes, `passed`."""
        return "passed" in inspect.signature(self.function).parameters

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.function).split("\n")[0]


def named(
    name: str, setting: str | None = None, read: Callable[[str], object] | None = None, *, has_default: bool = False
):
    """Register a reward; the decorator of every function below."""

    def register(function: Callable[..., float | None]) -> Callable[..., float | None]:
        REWARDS[name] = NamedReward(function, setting, read, has_default)
        return function

    return register


def column(record: Columns, *names: str) -> object:
    """Return the value of the first of these columns that a record has. Errors (TrainError): it has none."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise TrainError(f"the record has no column {names[0]!r}; it has {quote_names(record)}")


def answer_of(record: Columns) -> str:
    """Return the column `answer`, without outer white space. Errors (TrainError): it is missing, or no text or number."""
    value = column(record, "answer")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TrainError(f"the record's column 'answer' holds a {type(value).__name__}; a text or a number is expected")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as tables store a column of integers with a gap
    return str(value).strip()


def read_pattern(text: str) -> patterns.Pattern:
    try:
        return patterns.compile(text)
    except patterns.error as error:
        raise TrainError(f"the pattern {text!r} is not a regular expression: {error}") from None


def read_count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text[:9])):
        raise TrainError(f"{text!r} is no number of tokens, an integer of at least 1")
    return int(text)


def read_score(text: str) -> str:
    if text not in ("all", "share"):
        raise TrainError(f"{text!r} is not known: all (1 if all pass, the default) or share")
    return text


JOINED = patterns.compile(r"\d\s*[/^*]\s*\d")  # 3/4, 10^3


@named("exact")
def exact(prompt: str, reply: str, record: Columns) -> float:
    """Return 1 if the reply equals the record's `answer`, both without outer white space; else 0.

    >>> exact("2 + 2 =", " 4\\n", {"answer": "4"}), exact("2 + 2 =", "It is 4", {"answer": "4"})
    (1.0, 0.0)
    """
    return float(reply.strip() == answer_of(record))


@named("answer")
def tagged_answer(prompt: str, reply: str, record: Columns) -> float:
    """Return 1 if the last <answer>…</answer>, else the last \\\\boxed{…}, of the reply equals the record's `answer`; else 0.

    >>> tagged_answer("", "<think>…</think> <answer> 4 </answer>", {"answer": 4}), tagged_answer("", "4", {"answer": "4"})
    (1.0, 0.0)
    """
    found = last_tagged(reply)
    found = last_boxed(reply) if found is None else found
    return float(found == answer_of(record))


@named("number")
def number(prompt: str, reply: str, record: Columns) -> float:
    """Return 1 if the last number of the reply equals the last number of the record's `answer`, exactly; else 0.

    "1,234.50" and "1234.5" are equal: thousands are separated by commas. An answer may be GSM8K's, "… #### 18".

    >>> number("", "6 × 3 = 18.0", {"answer": "3 times 6 #### 18"}), number("", "18 or 19", {"answer": 18})
    (1.0, 0.0)
    """
    text = answer_of(record)
    if "####" not in text and JOINED.search(text):
        raise TrainError(f"the record's column 'answer', {text!r:.60}, is an expression: write its value")
    wanted = last_number(text)
    if wanted is None:
        raise TrainError(f"the record's column 'answer', {record['answer']!r:.60}, has no number")
    return float(last_number(reply) == wanted)


@named("format")
def thought_format(prompt: str, reply: str, record: Columns) -> float:
    """Return 1 if the reply is <think>…</think><answer>…</answer> and nothing else, with each tag once; else 0.

    White space may stand around and between. A prompt that ends with <think> has opened the thought.
    Source: DeepSeek-R1, arXiv 2501.12948, section 2.2.2.

    >>> thought_format("", "<think>2 and 2</think>\\n<answer>4</answer>", {}), thought_format("", "<answer>4</answer>", {})
    (1.0, 0.0)
    """
    text = reply.strip()
    if prompt.rstrip().endswith("<think>") and not text.startswith("<think>"):
        text = f"<think>{text}"
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return 0.0
    between = text.partition("</think>")[2].partition("<answer>")
    return float(text.startswith("<think>") and text.endswith("</answer>") and not between[0].strip() and bool(between[1]))


@named("length", "most", read_count)
def length(prompt: str, reply: str, record: Columns, *, most: int, token_count: int) -> float:
    """Return 1 for up to N tokens (`length:N`), then 2 − n / N, and 0 from 2 N on.

    >>> [length("", "", {}, most=40, token_count=n) for n in (1, 40, 50, 80, 200)]
    [1.0, 1.0, 0.75, 0.0, 0.0]
    """
    return min(1.0, max(0.0, 2 - token_count / most))


@named("length_target", "target", read_count)
def length_target(prompt: str, reply: str, record: Columns, *, target: int, token_count: int) -> float:
    """Return −|n − N| / N for n tokens (`length_target:N`): 0 at N, −1 for none and for 2 N.

    Source: Aggarwal and Welleck 2025 (LCPO-exact), arXiv 2503.04697, equation 1, with α = 1 / N.

    >>> [length_target("", "", {}, target=40, token_count=n) for n in (40, 30, 80)]
    [0.0, -0.25, -1.0]
    """
    return -abs(token_count - target) / target


@named("regex", "pattern", read_pattern)
def full_match(prompt: str, reply: str, record: Columns, *, pattern: patterns.Pattern) -> float:
    """Return 1 if the pattern (`regex:PATTERN`) matches the full reply, white space included; else 0.

    Errors (TrainError): no result after 0.1 s, as of a pattern that backtracks without end.

    >>> pattern = read_pattern("[0-9]( [0-9])*")
    >>> full_match("", "1 3 5", {}, pattern=pattern), full_match("", "1 3 5\\n", {}, pattern=pattern)
    (1.0, 0.0)
    """
    try:
        return float(pattern.fullmatch(reply, timeout=REGEX_SECONDS) is not None)
    except TimeoutError:
        raise TrainError(
            f"the pattern {pattern.pattern!r} has no result after {REGEX_SECONDS} s: it backtracks; parts that "
            "match one text in many ways, as in (a|aa)+, are the usual cause"
        ) from None


@named("arithmetic")
def arithmetic(prompt: str, reply: str, record: Columns) -> float:
    """Return 1 if the reply is an expression of the record's `numbers`, each once, that equals `target`; else 0 (Countdown).

    The expression is the text of the last <answer>…</answer>, else the reply. It may hold + - * / and parentheses, and is
    parsed, never run. The column of numbers may be `nums`.

    >>> arithmetic("", "<answer>(6 - 4) * 3</answer>", {"numbers": [3, 4, 6], "target": 6})
    1.0
    """
    numbers, target = column(record, "numbers", "nums"), column(record, "target")
    integers = [*numbers, target] if isinstance(numbers, list | tuple) else [None]
    if not all(type(each) is int for each in integers):
        raise TrainError(f"numbers = {numbers!r:.60}, target = {target!r:.60}: a list of integers and an integer are expected")
    found = last_tagged(reply)
    return float(is_solution(reply if found is None else found, numbers, target))


@named("tests", "score", read_score, has_default=True)
def passed_tests(prompt: str, reply: str, record: Columns, *, passed: list[bool], score: str = "all") -> float:
    """Return 1 if the code of the reply passes all `tests` of the record, run in a sandbox; `tests:share`: their share.

    passed: a result for each assertion, of `train.rewards.code`.

    >>> [passed_tests("", "", {}, passed=[True, False], score=score) for score in ("all", "share")]
    [0.0, 0.5]
    """
    return float(all(passed)) if score == "all" else sum(passed) / len(passed)


def open_named(text: str) -> Callable[..., float]:
    """Return the function of a sample for NAME or NAME:VALUE; one that runs code takes `passed` too.

    Errors (TrainError): no such name; a value that is missing, too many, or wrong.
    """
    name, value = parse_named(text)
    if name not in REWARDS:
        known = ", ".join(_form(each) for each in REWARDS)
        raise TrainError(f"--reward {text}: {name!r} is not known; one of {known}, or PATH.py:FUNCTION, a function of your own")
    kind = REWARDS[name]
    if kind.setting is None and value is not None:
        raise TrainError(f"--reward {text}: {name} takes no value")
    if kind.setting is not None and not value and not (kind.has_default and value is None):
        raise TrainError(f"--reward {text}: {name} needs a value, {name}:{kind.setting.upper()}")
    try:
        settings = {} if value is None else {kind.setting: kind.read(value)}
    except TrainError as error:
        raise TrainError(f"--reward {text}: {error}") from None
    return partial(_call, kind, settings)


def _form(name: str) -> str:
    kind = REWARDS[name]
    value = f":{kind.setting.upper()}" if kind.setting else ""
    return f"{name}[{value}]" if kind.has_default else f"{name}{value}"


def _call(kind: NamedReward, settings: dict, sample: Sample, **more: object) -> float:
    more |= {"token_count": sample.token_count} if kind.reads_tokens else {}
    value = kind.function(sample.prompt, sample.reply, sample.record, **settings, **more)
    return math.nan if value is None else value
