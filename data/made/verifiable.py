"""Tasks whose answers are computed: sort digits, count a letter, add numbers, reverse a word, close brackets.

    task      prompt               answer    size
    sort      Sort: 73917          13779     digits
    count     Count a: kabbala     3         letters of the word
    sums      Add: 48 + 17 + 60    125       numbers of two digits
    reverse   Reverse: stream      maerts    letters of the word
    brackets  Close: ([<           >])       brackets

A record serves both ways of learning, `--objective sft` by its reply and reinforcement by its answer:

    {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], "answer", "task", "size"}

A level is the largest size: easy, medium, hard, or a number. Sizes are drawn evenly from the smallest to it; where the
instances of one are used up, the others go on. Words are random letters: no list of words is read. The answers to count are
drawn evenly from 0 to MOST_COUNT, or to the letters of a shorter word.

An instance is what a prompt asks, the same for each of its renderings: the digits, the numbers in any order, the word (of count
without the letter), the brackets. It has one record: no held-out instance is in training.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from string import ascii_lowercase, digits

from data.config import DataError
from data.made.modules import Record
from data.made.written import WrittenSet

TRAIN, VALIDATION = 4000, 500  # records, where there are as many instances; else in this proportion
PATIENCE = 1000  # draws in turn without a new instance: those of this size are used up
LEVELS = ("easy", "medium", "hard")
LARGEST = 64  # size that a level may be
MOST_COUNT = 4
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}

Parts = tuple[str, ...]  # what a prompt is made of


@dataclass(frozen=True)
class VerifiableTask:
    """A task.

    form      of its prompts, with a place for each part
    draw      (generator, size) -> the parts of a prompt
    answer    parts -> answer
    chance    (answer, size) -> probability that a random reply of the right form is right
    instance  parts -> what they ask
    unit      of a size
    smallest  size
    levels    the largest sizes of LEVELS
    """

    form: str
    draw: Callable[[random.Random, int], Parts]
    answer: Callable[[Parts], str]
    chance: Callable[[str, int], float]
    instance: Callable[[Parts], Parts]
    unit: str
    smallest: int
    levels: tuple[int, int, int]

    def largest(self, level: str) -> int:
        """Return the largest size of a level. Errors (DataError): neither one of LEVELS nor an integer in range."""
        if level in LEVELS:
            return self.levels[LEVELS.index(level)]
        if not (level.isascii() and level.isdecimal() and self.smallest <= int(level) <= LARGEST):
            sizes = f"{self.smallest} to {LARGEST}"
            raise DataError(f"--level {level}: one of {', '.join(LEVELS)}, or the largest number of {self.unit}, {sizes}")
        return int(level)


# ---- parts


def draw_digits(generator: random.Random, size: int) -> Parts:
    return ("".join(generator.choices(digits, k=size)),)


def draw_word(generator: random.Random, size: int) -> Parts:
    return ("".join(generator.choices(ascii_lowercase, k=size)),)


def draw_brackets(generator: random.Random, size: int) -> Parts:
    return ("".join(generator.choices(list(CLOSING), k=size)),)


def draw_numbers(generator: random.Random, size: int) -> Parts:
    return (" + ".join(str(generator.randint(10, 99)) for _ in range(size)),)


def draw_letter_and_word(generator: random.Random, size: int) -> Parts:
    """Return a letter and a word that has it from 0 to MOST_COUNT times, each count as often."""
    letter = generator.choice(ascii_lowercase)
    word = generator.choices(ascii_lowercase.replace(letter, ""), k=size)
    for place in generator.sample(range(size), generator.randint(0, min(MOST_COUNT, size))):
        word[place] = letter
    return letter, "".join(word)


# ---- answers


def numbers_of(parts: Parts) -> list[int]:
    """
    >>> numbers_of(("48 + 17",))
    [48, 17]
    """
    return [int(number) for number in parts[0].split(" + ")]


def close(parts: Parts) -> str:
    """
    >>> close(("([<",))
    '>])'
    """
    return "".join(CLOSING[bracket] for bracket in reversed(parts[0]))


def order_chance(answer: str, size: int) -> float:
    """Return the probability of one order of the characters: product of n_c! / n!, with n_c of the character c.

    >>> order_chance("aab", 3) == 1 / 3
    True
    """
    return math.prod(map(math.factorial, Counter(answer).values())) / math.factorial(size)


VERIFIABLE = {
    "sort": VerifiableTask(
        form="Sort: {}",
        draw=draw_digits,
        answer=lambda parts: "".join(sorted(parts[0])),
        chance=order_chance,
        instance=lambda parts: parts,
        unit="digits",
        smallest=2,
        levels=(4, 6, 8),
    ),
    "count": VerifiableTask(
        form="Count {}: {}",
        draw=draw_letter_and_word,
        answer=lambda parts: str(parts[1].count(parts[0])),
        chance=lambda answer, size: 1 / (1 + min(MOST_COUNT, size)),
        instance=lambda parts: parts[1:],
        unit="letters",
        smallest=3,
        levels=(6, 10, 16),
    ),
    "sums": VerifiableTask(
        form="Add: {}",
        draw=draw_numbers,
        answer=lambda parts: str(sum(numbers_of(parts))),
        chance=lambda answer, size: 1 / (1 + size * (99 - 10)),
        instance=lambda parts: tuple(map(str, sorted(numbers_of(parts)))),
        unit="numbers",
        smallest=2,
        levels=(2, 3, 4),
    ),
    "reverse": VerifiableTask(
        form="Reverse: {}",
        draw=draw_word,
        answer=lambda parts: parts[0][::-1],
        chance=order_chance,
        instance=lambda parts: parts,
        unit="letters",
        smallest=3,
        levels=(4, 6, 8),
    ),
    "brackets": VerifiableTask(
        form="Close: {}",
        draw=draw_brackets,
        answer=close,
        chance=lambda answer, size: len(CLOSING) ** -size,
        instance=lambda parts: parts,
        unit="brackets",
        smallest=2,
        levels=(4, 8, 12),
    ),
}


# ---- records


def make_verifiable(name: str, level: str = "medium", seed: int = 0) -> dict[str, list[Record]]:
    """Return {"train": records, "validation": records} of a task, a key of VERIFIABLE.

    level: one of LEVELS, or the largest size as a number.
    Errors (DataError): of another level.
    """
    task = VERIFIABLE[name]
    generator = random.Random(f"{name} {level} {seed}")
    records = [build(name, size, parts) for size, parts in draw_instances(task, task.largest(level), generator)]
    generator.shuffle(records)  # small sizes stand first, before their instances are used up
    held_out = len(records) * VALIDATION // (TRAIN + VALIDATION)
    return {"train": records[held_out:], "validation": records[:held_out]}


def write_verifiable(name: str, level: str = "medium", seed: int = 0) -> WrittenSet:
    """Return the records of a task with a table of what guessing gives. Errors: as of `make_verifiable`."""
    sets = make_verifiable(name, level, seed)
    task, splits = VERIFIABLE[name], list(sets.values())
    answers = [[record["answer"] for record in records] for records in splits]
    common = [Counter(found).most_common(1)[0] for found in answers]
    most = [count / len(found) for (_, count), found in zip(common, answers, strict=True)]
    chance = [fmean(task.chance(record["answer"], record["size"]) for record in records) for records in splits]
    table = [
        ("records", [f"{len(records):,}" for records in splits]),
        (f"{task.unit}, on average", [f"{fmean(record['size'] for record in records):.2f}" for records in splits]),
        ("characters of an answer, on average", [f"{fmean(map(len, found)):.2f}" for found in answers]),
        ("chance level: a random reply of the right form", [f"{value:.2%}" for value in chance]),
        ("the most common answer", [repr(answer) for answer, _ in common]),
        ("  its share: one reply to everything", [f"{value:.2%}" for value in most]),
        (f"checked      no two records ask the same; {task.unit}: {task.smallest} to {task.largest(level)}", []),
    ]
    notes = []
    if (found := sum(map(len, splits))) < TRAIN + VALIDATION:
        notes.append(f"the level has no more than about {found:,} prompts that differ: {TRAIN + VALIDATION:,} are usual")
    return WrittenSet(sets, {"level": level, "most_common": most, "chance": chance}, table, notes)


def draw_instances(task: VerifiableTask, largest: int, generator: random.Random) -> Iterator[tuple[int, Parts]]:
    """Yield (size, parts) of TRAIN + VALIDATION different instances, or of all that are found."""
    seen: set[Parts] = set()
    misses = dict.fromkeys(range(task.smallest, largest + 1), 0)  # size: draws in turn that found nothing new
    while misses and len(seen) < TRAIN + VALIDATION:
        size = generator.choice(list(misses))
        parts = task.draw(generator, size)
        if (instance := task.instance(parts)) not in seen:
            seen.add(instance)
            misses[size] = 0
            yield size, parts
        elif misses[size] == PATIENCE:
            del misses[size]
        else:
            misses[size] += 1


def build(name: str, size: int, parts: Parts) -> Record:
    task = VERIFIABLE[name]
    answer = task.answer(parts)
    messages = [{"role": "user", "content": task.form.format(*parts)}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "answer": answer, "task": name, "size": size}
