"""Self-Instruct: new instructions and replies by a network, from a few seed instructions.

    request   8 examples, 6 seeds and 2 of the network's own; a completion with a list of new instructions
    filter    each is rejected for a named reason, or accepted: its text (`filters`), then its likeness to others (`novelty`)
    reply     the network's own to each accepted instruction; an empty or cut one rejects it
    round     `batch_size` requests and the replies to what they gave: the unit of a resume

An accepted instruction joins the pool of ROUGE-L at once, the examples with the next round. A round is a function of (settings,
seeds, network, earlier rounds).
Source: Wang et al. 2023, arXiv 2212.10560. Unlike the paper's, an instruction has no separate input: replies are written to the
instruction alone, for classification tasks too (there the paper writes the label first).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from train.synthetic.examples import draw_examples, parse_list
from train.synthetic.filters import CUT_LIST, CUT_REPLY, EMPTY_REPLY, EQUAL, NO_LIST, NO_TEXT, SIMILAR, rejection
from train.synthetic.novelty import NoveltyFilter
from train.synthetic.rounds import RoundLog
from train.synthetic.settings import SelfInstructSettings


class Written(NamedTuple):
    """A completion: its text, if it ended by itself, and the examples that its request had room for."""

    text: str
    has_ended: bool
    examples: int = 0


class ListWriter(Protocol):
    """The interface of a writer: a network (`writer`), or a script in tests."""

    def write_lists(self, requests: Sequence[Sequence[str]], round: int) -> list[Written]:
        """Return a completion to each request, which begins with the number of its first item."""

    def write_replies(self, instructions: Sequence[str], round: int) -> list[Written]:
        """Return a reply to each instruction."""


@dataclass
class Made:
    """Results of rounds. barren: requests at the end, in a row, without a record."""

    records: list[dict] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    requests: int = 0
    shortened: int = 0  # requests whose examples did not all fit the context
    barren: int = 0
    compared: int = 0
    skipped: int = 0

    def add(self, row: dict) -> None:
        """Add a finished round."""
        self.records += row["records"]
        self.rejected += row["rejected"]
        self.requests += row["requests"]
        self.shortened += row["shortened"]
        self.compared += row["compared"]
        self.skipped += row["skipped"]
        last = max((record["request"] for record in self.records), default=-1)
        self.barren = self.requests - 1 - last

    @property
    def reasons(self) -> Counter[str]:
        """Rejections by reason."""
        return Counter(each["reason"] for each in self.rejected)


def self_instruct(
    seeds: Sequence[str],
    writer: ListWriter,
    settings: SelfInstructSettings,
    log: RoundLog,
    *,
    count: int,
    patience: int,
    on_round: Callable[[Made], object] | None = None,
) -> Made:
    """Write instructions with replies until there are `count`, or `patience` requests in a row gave none.

    Rounds of the log are taken from it, new ones are appended. on_round(made) is called after each.
    """
    pool, made = NoveltyFilter(settings.overlap, seeds), Made()
    number = 0
    while len(made.records) < count and made.barren < patience:
        if number < len(log.rounds):
            row = log.rounds[number]
            for text in row["accepted"]:
                pool.add(text)
        else:
            row = run_round(seeds, [record["instruction"] for record in made.records], pool, writer, settings, number)
            log.append(row)
        made.add(row)
        number += 1
        if on_round is not None:
            on_round(made)
    return made


def run_round(
    seeds: Sequence[str],
    own: Sequence[str],
    pool: NoveltyFilter,
    writer: ListWriter,
    settings: SelfInstructSettings,
    number: int,
) -> dict:
    """Return a round, as JSON types: its requests written, their instructions filtered, replies written. The pool grows."""
    first, compared, skipped = number * settings.batch_size, pool.compared, pool.skipped
    places = range(first, first + settings.batch_size)
    sizes = {"total": settings.examples, "most": settings.made_examples}
    requests = [draw_examples(seeds, own, seed=settings.seed, request=place, **sizes) for place in places]
    completions = writer.write_lists(requests, number)
    accepted, rejected = [], []
    for place, completion in zip(places, completions, strict=True):
        for text, reason, more in judge(completion, pool):
            if reason is None:
                accepted.append((place, text))
            else:
                rejected.append({"request": place, "instruction": text, "reason": reason} | more)
    records = []
    replies = writer.write_replies([text for _, text in accepted], number) if accepted else []
    for (place, text), reply in zip(accepted, replies, strict=True):
        record = {"request": place, "instruction": text}
        if reply.text.strip() and reply.has_ended:
            records.append(record | {"output": reply.text})
        else:
            reason = CUT_REPLY if reply.text.strip() else EMPTY_REPLY
            rejected.append(record | {"reason": reason, "reply": reply.text})
    return {
        "round": number,
        "requests": len(requests),
        "shortened": sum(each.examples < settings.examples for each in completions),
        "accepted": [text for _, text in accepted],
        "records": records,
        "rejected": rejected,
        "compared": pool.compared - compared,
        "skipped": pool.skipped - skipped,
    }


def judge(completion: Written, pool: NoveltyFilter) -> list[tuple[str, str | None, dict]]:
    """Return (instruction, reason of its rejection or None, what it is similar to) for each item of a completion; the accepted
    ones join the pool. A completion without an item is one rejection. The last item of a completion that did not end is cut.

    >>> pool = NoveltyFilter(0.7, ["Name three rivers of France."])
    >>> for item in judge(Written("9. Name three rivers of France.\\n10. Sort the words by length.\\n11. Say", False), pool):
    ...     print(item)
    ('Name three rivers of France.', 'equal to another one', {})
    ('Sort the words by length.', None, {})
    ('Say', 'cut by --list-tokens', {})
    """
    items = parse_list(completion.text)
    if not items:
        return [(completion.text, NO_LIST if completion.text.strip() else NO_TEXT, {})]
    found: list[tuple[str, str | None, dict]] = []
    for place, text in enumerate(items, 1):
        reason, more = rejection(text), {}
        if place == len(items) and not completion.has_ended:
            reason = CUT_LIST
        elif reason is None and text in pool:
            reason = EQUAL
        elif reason is None and (similar := pool.most_similar(text)) is not None:
            reason, more = SIMILAR, {"similar_to": similar.text, "rouge_l": round(similar.f, 6)}
        if reason is None:
            pool.add(text)
        found.append((text, reason, more))
    return found
