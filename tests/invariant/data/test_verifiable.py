"""Tasks with computed answers, of `data task sort` and the like: right answers, none asked twice, levels, chance, command."""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import pairwise, permutations, product
from statistics import fmean
from typing import get_args

import pytest

from data.__main__ import main
from data.chat.prompts import read_prompt
from data.chat.shapes import read_chat_record
from data.commands.task import WithAnswers
from data.config import DataError
from data.made.verifiable import LEVELS, MOST_COUNT, TRAIN, VALIDATION, VERIFIABLE, make_verifiable

SMALL = [("sums", "easy"), ("brackets", "easy")]  # fewer instances than records are wanted
OTHERS = [(name, level) for name in VERIFIABLE for level in LEVELS if (name, level) not in SMALL]


@cache
def made(name: str, level: str = "medium", seed: int = 0) -> dict[str, list[dict]]:
    return make_verifiable(name, level, seed)


def asked(record: dict) -> str:
    """The text behind the prompt's colon."""
    return record["messages"][0]["content"].split(": ")[1]


def both(name: str, level: str) -> list[dict]:
    sets = made(name, level)
    return sets["train"] + sets["validation"]


def is_closed(text: str) -> bool:
    """Pairs are taken out until nothing changes."""
    before = None
    while before != text:
        before = text
        for pair in ("()", "[]", "{}", "<>"):
            text = text.replace(pair, "")
    return not text


def is_right(name: str, record: dict) -> bool:
    """Checked from the text of the prompt, by other means than those that make the answer."""
    given, answer = asked(record), record["answer"]
    if name == "sort":
        return Counter(given) == Counter(answer) and all(a <= b for a, b in pairwise(answer))
    if name == "count":
        letter = record["messages"][0]["content"].split()[1][0]
        return int(answer) == len(given.split(letter)) - 1
    if name == "sums":
        numbers = given.split()
        assert set(numbers[1::2]) == {"+"} and all(len(number) == 2 for number in numbers[::2])
        left = int(answer)
        for number in numbers[::2]:
            left -= int(number)
        return left == 0
    if name == "reverse":
        return len(given) == len(answer) and all(answer[-1 - i] == letter for i, letter in enumerate(given))
    return len(given) == len(answer) and is_closed(given + answer) and set(answer) <= set(")]}>")


def instance(name: str, record: dict) -> object:
    return tuple(sorted(asked(record).split())) if name == "sums" else asked(record)


@pytest.mark.parametrize("name", VERIFIABLE)
def test_answers_are_right(name):
    for level in LEVELS:
        records = both(name, level)
        assert all(is_right(name, record) for record in records)
        assert all(record["messages"][1] == {"role": "assistant", "content": record["answer"]} for record in records)
        assert all(record["task"] == name for record in records)


@pytest.mark.parametrize("name", VERIFIABLE)
def test_nothing_is_asked_twice(name):
    for level in LEVELS:
        found = Counter(instance(name, record) for record in both(name, level))
        assert found.most_common(1)[0][1] == 1, level


@pytest.mark.parametrize(("name", "level"), OTHERS)
def test_as_many_records_as_are_wanted(name, level):
    assert {split: len(records) for split, records in made(name, level).items()} == {"train": TRAIN, "validation": VALIDATION}


@pytest.mark.parametrize("name", VERIFIABLE)
def test_held_out_records_are_of_the_same_sizes(name):
    """Small sizes are used up first: a validation set of the first draws would have too many."""
    for level in LEVELS:
        sizes = {split: [record["size"] for record in records] for split, records in made(name, level).items()}
        spread = len(set(sizes["train"])) - 1
        assert abs(fmean(sizes["train"]) - fmean(sizes["validation"])) <= spread / len(sizes["validation"]) ** 0.5


def test_where_instances_are_used_up():
    sums, brackets = both("sums", "easy"), both("brackets", "easy")
    assert 4050 <= len(sums) <= 90 * 91 // 2, "two of 90 numbers, in either order"
    assert len(brackets) == 4**2 + 4**3 + 4**4
    for name, level in SMALL:
        sets = made(name, level)
        assert len(sets["validation"]) == len(both(name, level)) // 9
    assert Counter(record["size"] for record in both("sort", "easy"))[2] == 100


@pytest.mark.parametrize("name", VERIFIABLE)
def test_levels(name):
    task = VERIFIABLE[name]
    for level, largest in zip(LEVELS, task.levels, strict=True):
        sizes = {record["size"] for record in both(name, level)}
        assert sizes == set(range(task.smallest, largest + 1)), level
    means = [fmean(record["size"] for record in both(name, level)) for level in LEVELS]
    assert means == sorted(set(means))
    assert {record["size"] for record in both(name, str(task.smallest + 1))} == {task.smallest, task.smallest + 1}
    for record in both(name, "medium"):
        parts = asked(record).split(" + ") if name == "sums" else asked(record)
        assert len(parts) == record["size"]


@pytest.mark.parametrize("level", ["harder", "", "1", "65", "-3", "4.0", "²"])
def test_other_levels_are_refused(level):
    with pytest.raises(DataError, match=r"--level .*easy, medium, hard, or the largest number of digits, 2 to 64"):
        make_verifiable("sort", level)


def test_counts_are_drawn_evenly():
    counts = Counter(record["answer"] for record in both("count", "hard") if record["size"] >= MOST_COUNT)
    assert set(counts) == set("01234")
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_chance():
    """Beside the share of all replies of the right form, one by one."""
    chance = {name: task.chance for name, task in VERIFIABLE.items()}
    for answer in ("012", "aab", "1122", "777"):
        orders = ["".join(order) for order in permutations(answer)]
        share = orders.count(answer) / len(orders)
        assert chance["sort"](answer, len(answer)) == pytest.approx(share)
        assert chance["reverse"](answer, len(answer)) == pytest.approx(share)
    assert chance["brackets"](")]>", 3) == 1 / len(list(product(")]}>", repeat=3)))
    assert chance["sums"]("100", 2) == 1 / len({a + b for a in range(10, 100) for b in range(10, 100)})
    assert [chance["count"]("1", size) for size in (3, 4, 16)] == [1 / 4, 1 / 5, 1 / 5]


def test_the_seed_decides():
    """The same bytes in another process, where the hashes of strings are others."""
    code = "import json; from data.made.verifiable import make_verifiable, VERIFIABLE;"
    code += "print(json.dumps([make_verifiable(name, 'medium', 1) for name in VERIFIABLE]))"
    env = {**os.environ, "PYTHONHASHSEED": "12"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [made(name, "medium", 1) for name in VERIFIABLE]
    for name in VERIFIABLE:
        shared = {asked(r) for r in made(name)["train"]} & {asked(r) for r in made(name, "medium", 1)["train"]}
        assert made(name) != made(name, "medium", 1) and len(shared) < 0.4 * TRAIN


@pytest.mark.parametrize("name", VERIFIABLE)
def test_both_readers_take_a_record(name):
    record = made(name)["train"][0]
    user, reply = record["messages"]
    assert list(read_chat_record(record).messages) == [user, reply]
    prompt = read_prompt(record)
    assert prompt.prompt == (user,)
    assert prompt.columns == {"answer": record["answer"], "task": name, "size": record["size"]}


def test_command(tmp_path, capsys):
    out = tmp_path / "count"
    assert main(["task", "count", "--out", str(out), "--level", "5", "--seed", "2"]) == 0
    said = capsys.readouterr()
    lines = {split: (out / f"{split}.jsonl").read_text().splitlines() for split in ("train", "validation")}
    assert {split: [json.loads(line) for line in found] for split, found in lines.items()} == make_verifiable("count", "5", 2)
    answers = Counter(json.loads(line)["answer"] for line in lines["train"])
    most, times = answers.most_common(1)[0]
    shown = {line[:46].strip(): line[46:].split() for line in said.out.splitlines()}
    assert shown["records"] == ["4,000", "500"] and shown["the most common answer"][0] == repr(most)
    assert shown["its share: one reply to everything"][0] == f"{times / 4000:.2%}"
    assert float(shown["chance level: a random reply of the right form"][0][:-1]) == pytest.approx(21.7, abs=0.5)
    assert "no two records ask the same; letters: 3 to 5" in said.out and not said.err
    index = json.loads((out / "data.json").read_text())
    assert index["name"] == "count" and index["level"] == "5" and index["most_common"][0] == times / 4000


def test_command_says_what_is_small_or_idle(tmp_path, capsys):
    assert main(["task", "brackets", "--level", "easy", "--out", str(tmp_path / "brackets")]) == 0
    assert "no more than about 336 prompts that differ" in capsys.readouterr().err
    assert main(["task", "qa", "--level", "easy", "--out", str(tmp_path / "qa")]) == 2
    assert "--level would have no effect: it is of sort, count" in capsys.readouterr().err
    assert main(["task", "sums", "--level", "many", "--out", str(tmp_path / "sums")]) == 2
    assert "the largest number of numbers, 2 to 64" in capsys.readouterr().err and not (tmp_path / "sums").exists()
    assert set(get_args(WithAnswers)) == set(VERIFIABLE)
