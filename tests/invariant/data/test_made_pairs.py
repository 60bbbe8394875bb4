"""Halves of docstrings and functions, of `data task pairs` and `data task scores`: exact labels and numbers."""

import ast

from data.made.pairs import Cut, cut_in_halves, exchange, shared, words_of
from data.made.scores import identifiers, source_of
from tests.made import from_source, made, modules


def test_each_half_is_as_often_yes_as_no():
    for records in made("pairs").values():
        for side in ("first", "second"):
            counts: dict[str, list[int]] = {}
            for record in records:
                counts.setdefault(record[side], [0, 0])[record["label"] == "yes"] += 1
            assert len(counts) > 8 and all(pair == [1, 1] for pair in counts.values())
        assert len({(record["first"], record["second"]) for record in records}) == len(records)


def test_yes_is_one_docstring_and_no_is_another_of_the_module():
    for records in made("pairs").values():
        owner: dict[str, tuple[str, str]] = {}
        for module in modules():
            for found in module.definitions:
                for name, *halves in cut_in_halves(found):
                    owner.update(dict.fromkeys(halves, (module.name, name)))
        for record in records:
            first, second = owner[record["first"]], owner[record["second"]]
            assert first[0] == second[0] == record["module"] and (first == second) == (record["label"] == "yes")


PAIR_SOURCE = '''
def a(): """Take apples from every basket. More of it follows here now. Then the apples are all put into boxes."""
def b(): """Take pears from every basket too. More of this follows here also. Then the pears are all put into crates."""
'''


def test_cuts_of_docstrings():
    first, second = (cut_in_halves(found) for found in from_source(PAIR_SOURCE).definitions)
    assert [cut[1:] for cut in first] == [
        ("Take apples from every basket. More of it follows here now.", "Then the apples are all put into boxes.")
    ], "the other place leaves five words"
    one, other = (Cut(*cut, (words_of(cut[1]), words_of(cut[2]))) for cut in (first[0], second[0]))
    assert (shared(one, one), shared(other, other)) == (1, 1) and words_of("the a_1 of x1 apples") == {"the", "apples"}
    assert exchange([one, other], 0) in ([(one, other)], [(other, one)])
    assert exchange([one, one._replace(first=other.first)], 0) == [], "of one docstring"
    longer = other._replace(second=other.second * 2)
    assert exchange([one, longer], 0) == [], "lengths would tell"
    alike = other._replace(rare=(one.rare[0], other.rare[1] | one.rare[1]))
    assert exchange([one, alike], 0) == [], "the wrong half shares as many words"


def test_scores_are_jaccard_of_identifiers():
    functions = [node for module in modules() for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef)]
    sources = {source_of(node): identifiers(node) for node in functions}
    for record in made("scores")["train"][::20]:
        first, second = (sources[record[side]] for side in ("first", "second"))
        assert record["score"] == round(len(first & second) / len(first | second), 4)
    scores = [record["score"] for record in made("scores")["train"]]
    assert min(scores) < 0.1 and 0.6 < max(scores) < 0.7 and 0.2 < sum(scores) / len(scores) < 0.6
