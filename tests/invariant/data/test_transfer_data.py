"""The data of the bench `transfer`: modules on one side only, names masked, what stands in the text to pretrain on counted."""

import ast
from unittest.mock import patch

from data.corpus.stdlib import library_root
from data.made.modules import Module, list_definitions
from data.sources.files import Document
from tests.bench import transfer_data
from tests.bench.transfer_data import Labelled, choose_sides, draw_labels, leak, make_data


def module(name: str, functions: int) -> Module:
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    text = "\n".join(
        f"def f{i}():\n    '''{name.replace('.', ' and ')} is the {numbers[i]} of the words.'''" for i in range(functions)
    )
    tree = ast.parse(text)
    return Module(name, tree, False, tuple(list_definitions(tree, name)))


SIZES = {"s": 10, "t": 4, "u": 3, "v": 3, "w": 2, "x": 1}
PACKAGES = [module(f"{package}.{part}", size) for package in "ab" for part, size in SIZES.items()]
PATHS = [library_root() / f"{found.name.replace('.', '/')}.py" for found in PACKAGES]


def test_a_module_is_on_one_side_and_the_largest_is_trained_on():
    sides = choose_sides(PACKAGES[:6])
    assert set(sides.values()) == {"test", "validation"} and "a.s" not in sides
    size = {side: sum(len(m.definitions) for m in PACKAGES[:6] if sides.get(m.name) == side) for side in transfer_data.SHARES}
    assert 1 <= size["test"] <= 0.25 * 23 and 1 <= size["validation"] <= 0.15 * 23
    few = choose_sides([module("c.s", 9), module("c.t", 7), module("c.u", 8)])  # none fits: the smallest that is left
    assert few == {"c.t": "test", "c.u": "validation"}


def test_texts_names_and_what_stands_in_the_corpus():
    with (
        patch.object(transfer_data, "read_modules", lambda: PACKAGES),
        patch.object(transfer_data, "list_files", lambda: PATHS),
        patch.object(transfer_data, "read_docs", lambda paths: [Document(path.name, f"{path.stem} says") for path in paths]),
    ):
        data = make_data()
    modules = {side: {row.module for row in rows} for side, rows in data.texts.items()}
    assert not modules["train"] & (modules["test"] | modules["validation"]) and not modules["test"] & modules["validation"]
    held_out = {name.rpartition(".")[2] for side in transfer_data.SHARES for name in modules[side] if name.startswith("a")}
    assert len(data.corpus) == 12 - len(modules["test"] | modules["validation"]) and held_out
    rows = [row for side in data.texts.values() for row in side]
    assert all(row.is_masked and "package and" in row.text and row.label == row.module[0] for row in rows)
    assert len(rows) == 46 and data.in_corpus == 0


def test_the_leak_is_counted():
    words = "one two three four five six seven eight nine"
    rows = [Labelled(text, "a", "a.b", False) for text in ("Two  three FOUR", words, "four two", "ten nine")]
    assert leak(rows, [f"{words} ten", "and four", "two or three"]) == (0.5, 1.0), "not over the end of a document"
    assert leak(rows, ["one two three", "ninety"]) == (0.0, 0.0)


def test_labels_are_drawn_by_the_seed_with_every_class():
    rows = [Labelled(f"text {number}", "rare" if number == 7 else "usual", "m", False) for number in range(40)]
    drawn = [draw_labels(rows, 5, seed) for seed in range(3)]
    assert all(len(set(each)) == 5 and {row.label for row in each} == {"rare", "usual"} for each in drawn)
    assert drawn[0] == draw_labels(rows[::-1], 5, 0) != drawn[1] and sorted(draw_labels(rows, None, 0)) == sorted(rows)
    assert draw_labels(rows, 9, 0)[:5] == drawn[0], "more labels hold the fewer"
