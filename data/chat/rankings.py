"""Make pairs of replies from scores, rankings and votes.

    scores    {"prompt", "responses": [reply, …], "scores": [number, …]}, the higher the better
              {"prompt", "response" | "completion", "score"}: one reply a record; those of equal prompts belong together
    ranking   {"prompt", "responses", "ranking": [1, …]}: the rank of each reply, 1 the best; equal ranks are a tie
    votes     {"prompt", "a": reply, "b": reply, "choice": "a" | "b" | "tie"}: one rater's choice a record

    best-worst  the first best reply against the last worst
    all         each reply against each that is worse
    adjacent    in order of their scores, each reply against the next one

A tie is no pair. The margin of a pair: the difference of scores, or of ranks; of votes (for chosen - for rejected) / all.
Prompts and replies are strings, or turns; they are passed on as they are.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, Literal

from data.chat.preferences import read_number
from data.chat.shapes import Row, describe_columns, is_empty, is_turns, parse_turns
from data.chat.turns import kind_of
from data.config import DataError

Take = Literal["best-worst", "all", "adjacent"]
Kind = Literal["scores", "ranking"]
REPLIES, REPLY_COLUMNS = "responses", ("response", "completion")
SHAPES = "prompt, responses, scores; prompt, responses, ranking; prompt, response, score (one reply a record)"
VOTES = "prompt, a, b, choice"
CHOICES = ("a", "b", "tie")


@dataclass
class Ranked:
    """The replies to one prompt and a value for each, the higher the better; the name of its first record, for messages."""

    name: str
    prompt: Any
    replies: list[Any] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class PairCounts:
    """Counts of prompts, pairs, and what was left out; `lost`: prompts without a pair, by the reason."""

    prompts: int = 0
    pairs: int = 0
    empty: int = 0  # replies without text, left out
    equal: int = 0  # replies that equal another one of their prompt, left out
    close: int = 0  # pairs with less than the least margin, left out
    lost: Counter = field(default_factory=Counter)


def read_rankings(records: Iterable[tuple[str, Row]], prompt: str = "prompt", kind: Kind | None = None) -> Iterator[Ranked]:
    """Yield the ranked replies of records, given as (name, record): those of lists at once, single replies at the end.

    prompt: the column of the prompt. kind: read this of a record that has both; None: what is there.
    Errors (DataError): name the record; columns of no shape, or of two kinds; lists of two lengths; what is no number.
    """
    single: dict[str, Ranked] = {}
    for name, row in records:
        try:
            if is_empty(row.get(prompt)):
                raise DataError(f"no {prompt!r}; {describe_columns(row)}. Name the column with the prompt by --prompt")
            reply = next((row[column] for column in REPLY_COLUMNS if row.get(column) is not None), None)
            if not is_empty(row.get(REPLIES)):
                yield read_list(name, row, row[prompt], kind)
            elif reply is not None and not is_empty(row.get("score")) and kind != "ranking":
                (asked,) = parse_turns(row[prompt])
                ranked = single.setdefault(identity(asked), Ranked(name, asked))
                ranked.replies.append(reply)
                ranked.values.append(read_number(row["score"], "score"))
            else:
                raise DataError(f"{describe_columns(row)}. Accepted: {SHAPES}")
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    yield from single.values()


def read_list(name: str, row: Row, prompt: Any, kind: Kind | None) -> Ranked:
    """Return the ranked replies of one record."""
    found = [each for each in ("scores", "ranking") if not is_empty(row.get(each))]
    if kind is None and len(found) == 2:
        raise DataError("it has scores and a ranking: --from scores or --from ranking says which to read")
    column = kind or (found[0] if found else "scores")
    if column not in found:
        raise DataError(f"no {column!r}; {describe_columns(row)}. Accepted: {SHAPES}")
    replies, values = (read_json_list(row[each], each) for each in (REPLIES, column))
    if len(replies) != len(values):
        raise DataError(f"{len(replies)} responses and {len(values)} in {column!r}: one for each")
    if column == "ranking" and any(read_number(value, column) < 0 for value in values):
        raise DataError(f"'ranking' has ranks below 0, {values}: 1 is the best reply")
    sign = 1 if column == "scores" else -1
    (asked,) = parse_turns(prompt)
    return Ranked(name, asked, replies, [sign * read_number(value, column) for value in values])


def read_json_list(value: Any, column: str) -> list:
    """Return the list of a column; of text, as a table has it, that of its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{column!r}: not JSON ({error}): {value!r:.60}") from error
    if not isinstance(value, list):
        raise DataError(f"{column!r} is {kind_of(value)}, not a list")
    return value


def read_votes(records: Iterable[tuple[str, Row]], prompt: str = "prompt") -> Iterator[Ranked]:
    """Yield the two replies of each pair that raters compared, with the share of the votes for each.

    Votes of one pair are added up, in whichever order its replies were shown. It is a tie where no reply has more votes than
    the other one and than "tie".
    Errors (DataError): name the record; missing columns; another choice.
    """
    counts: dict[tuple, tuple[Ranked, Counter]] = {}
    for name, row in records:
        if missing := [column for column in (prompt, "a", "b", "choice") if is_empty(row.get(column))]:
            what = f"{name}: no {' and no '.join(map(repr, missing))}; {describe_columns(row)}. Accepted: {VOTES}"
            raise DataError(what)
        choice = row["choice"].strip().lower() if isinstance(row["choice"], str) else row["choice"]
        if choice not in CHOICES:
            raise DataError(f"{name}: 'choice' is {row['choice']!r:.60}: one of {', '.join(CHOICES)}")
        sides = sorted((row["a"], row["b"]), key=identity)
        (asked,) = parse_turns(row[prompt])
        key = tuple(map(identity, (asked, *sides)))
        _, votes = counts.setdefault(key, (Ranked(name, asked, sides), Counter()))
        votes[identity(row[choice]) if choice != "tie" else choice] += 1
    for ranked, votes in counts.values():
        shares = [votes[identity(reply)] / votes.total() for reply in ranked.replies]
        ranked.values = [0.0, 0.0] if votes["tie"] / votes.total() >= max(shares) else shares
        yield ranked


def identity(value: Any) -> str:
    """Return a string that equal JSON values share."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


# ---- pairs


def make_pairs(ranked: Iterable[Ranked], counts: PairCounts, *, take: Take = "best-worst", least: float = 0.0) -> Iterator[Row]:
    """Yield {"prompt", "chosen", "rejected", "margin"}, and count. least: pairs of a smaller margin are left out.

    Empty replies are left out. Equal replies of a prompt become one, with the mean of their values.

    >>> counts = PairCounts()
    >>> list(make_pairs([Ranked("", "2 + 2", ["5", "4", "four"], [0, 3, 3])], counts, take="all"))[1]
    {'prompt': '2 + 2', 'chosen': 'four', 'rejected': '5', 'margin': 3.0}
    """
    for each in ranked:
        counts.prompts += 1
        replies = merge_equal(each, counts)
        if len(replies) < 2:
            counts.lost["a single reply"] += 1
            continue
        better = [(one, other) for one, other in TAKES[take](replies) if one[1] > other[1]]
        if not better:
            counts.lost["a tie"] += 1
            continue
        wide = [(chosen, rejected) for chosen, rejected in better if chosen[1] - rejected[1] >= least]
        counts.close += len(better) - len(wide)
        counts.pairs += len(wide)
        if not wide:
            counts.lost["margins below the least"] += 1
        for (chosen, high), (rejected, low) in wide:
            yield {"prompt": each.prompt, "chosen": chosen, "rejected": rejected, "margin": float(high - low)}


def merge_equal(ranked: Ranked, counts: PairCounts) -> list[tuple[Any, float]]:
    """Return the distinct replies that have a text, with the mean of their values, the best first; ties as in the record."""
    values: dict[str, list[float]] = {}
    first: dict[str, Any] = {}
    for reply, value in zip(ranked.replies, ranked.values, strict=True):
        if not text_of(reply, ranked.name).strip():
            counts.empty += 1
            continue
        key = identity(reply)
        counts.equal += key in first
        first.setdefault(key, reply)
        values.setdefault(key, []).append(value)
    means = [(first[key], sum(found) / len(found)) for key, found in values.items()]
    return sorted(means, key=lambda pair: -pair[1])


def text_of(reply: Any, name: str) -> str:
    """Return what makes a reply not empty: a string, or the contents and tool calls of turns. Errors (DataError): neither."""
    if isinstance(reply, str):
        return reply
    turns = [reply] if isinstance(reply, dict) else reply
    if is_turns(turns):
        return "".join(str(turn.get("content") or turn.get("value") or turn.get("tool_calls") or "") for turn in turns)
    if reply is None or turns == []:
        return ""
    raise DataError(f"{name}: a reply is a string, a turn or a list of turns, and this is {reply!r:.60}")


TAKES: dict[str, Callable[[list], Iterable[tuple]]] = {  # replies from the best to the worst -> pairs, ties among them
    "best-worst": lambda replies: [(replies[0], replies[-1])],
    "all": lambda replies: combinations(replies, 2),
    "adjacent": pairwise,
}


def label_replies(ranked: Iterable[Ranked], counts: PairCounts, threshold: float) -> Iterator[Row]:
    """Yield {"prompt", "completion", "label"}, rated replies: good from the threshold on. Replies are left out as for pairs."""
    for each in ranked:
        counts.prompts += 1
        for reply, value in merge_equal(each, counts):
            yield {"prompt": each.prompt, "completion": reply, "label": value >= threshold}


def as_turns(record: Row) -> Row:
    """Return a record with strings as turns, for a chat template; also where the prompt alone is a list of turns.

    >>> as_turns({"prompt": "Hi", "chosen": "Hello", "margin": 1.0})["chosen"]
    [{'role': 'assistant', 'content': 'Hello'}]
    """
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}
    turns = {}
    for column, role in roles.items():
        if column in record:
            value = record[column]
            text = [{"role": role, "content": value}] if isinstance(value, str) else value
            turns[column] = [text] if isinstance(text, dict) else text
    return record | turns
