"""Conversations of `data task conversations`: replies stand in their contexts, or the text does not tell; none leaks."""

from collections import Counter
from dataclasses import replace

import pytest

from data.config import DataError
from data.corpus.dedup import fingerprint
from data.made.conversations import (
    ABSENT,
    CONTEXT,
    LENGTH,
    RECALL_PLACE,
    answers_of,
    contents,
    context_of,
    module_facts,
    split_conversations,
)
from data.made.modules import package_of
from data.made.sets import check_records, measure, measure_leak
from data.made.snippets import SNIPPET, ask, list_snippets
from tests.made import from_source, made, modules

SOURCE = '''
class Box(Thing):
    """A thing with a lid. It has a size and some colour of its own."""
    size = 3
    def open(self, key, force=False):
        """Open the lid with a key."""
        if not force and key != self.key:
            raise KeyError(key)
        self.is_open = True
        return self.size * 2
def show(what, /, *, where="here"): """Return the place of it, as a string."""
class Pair(Box, Thing): "Two things in one box."
class Last(Box, final=True): "One thing alone in its box."
def outer(first):
    """Define a function and call it twice."""
    def inner(): raise OSError
    return inner
def hide(what):
    """Hide it again, with care."""
    print(what, "is gone")
    print("it is not to be seen")
    print("there it is again")
    print("it is not to be seen")
def seek(what):
    """Return the place of it, or None if there is none."""
    return places.get(what)
'''


def test_questions_of_a_snippet():
    found = {snippet.name: snippet for snippet in list_snippets(from_source(SOURCE))}
    asked = {name: {(q.form, q.word): q.reply for q in ask(snippet)} for name, snippet in found.items()}
    assert found["Box"].text.splitlines()[::2] == ["class Box(Thing):", "    def open(self, key, force=False):"]
    assert asked["Box"] == {
        ("base", ""): "Thing",
        ("summary", ""): "A thing with a lid.",
        ("sentence", "It has a size and"): "some colour of its own.",
    }
    assert asked["open"] == {
        ("returns", ""): "self.size * 2",
        ("raises", ""): "KeyError",
        ("arguments", ""): "self, key, force=False",
        ("next", "key"): "force",
        ("default", "force"): "False",
        ("summary", ""): "Open the lid with a key.",
        ("sentence", "Open the lid"): "with a key.",
        ("line", "if not force and key != self.key:"): "raise KeyError(key)",
        ("line", "raise KeyError(key)"): "self.is_open = True",
        ("line", "self.is_open = True"): "return self.size * 2",
    }
    assert asked["show"]["returns", ""] == "the place of it" and asked["show"]["default", "where"] == "'here'"
    assert asked["show"]["raises", ""] == "" and ("raises", "") in asked["hide"], "nothing is said of exceptions"
    assert [word for form, word in asked["hide"] if form == "line"] == ["print(what, 'is gone')", "print('there it is again')"]
    assert ("returns", "") not in asked["seek"], "words and code answer differently"
    assert asked["outer"]["returns", ""] == "inner" and ("raises", "") not in asked["outer"], "an inner function is another"
    assert not {("base", "")} & {*asked["Pair"], *asked["Last"]}, "two bases, a keyword"
    assert ("returns", "") not in asked["hide"], "the body tells that it returns nothing"


def test_snippets_are_short():
    body = "\n".join(f"    print({i}, what)" for i in range(12))
    long = f'def show(what):\n    """Show {"it " * 30}again. {"Then " * 60}stop."""\n{body}\n    print({"9" * 200})'
    (found,) = list_snippets(from_source(long))
    assert found.lines == () and found.text.endswith('again."""'), "first goes the body, then what follows the first sentence"
    (found,) = list_snippets(from_source(f"def show(what):\n{body}"))
    assert len(found.lines) == 12 and not found.docstring
    assert list_snippets(from_source(f'def show(what): return "{"9" * 500}"')) == []
    assert max(len(snippet.text) for module in modules() for snippet in list_snippets(module)) <= SNIPPET


def test_replies_stand_in_their_contexts():
    for records in made("conversations").values():
        check_records(records)
        for record in records:
            roles = [message["role"] for message in record["messages"]]
            kinds = record["kind"].split()
            assert roles == ["system", *["user", "assistant"] * len(kinds)] and 1 <= len(kinds) <= 7
            assert context_of(record) and len({kind.partition(":")[0] for kind in kinds}) == len(kinds)
            assert sum(map(len, contents(record))) < LENGTH and len(context_of(record)) <= CONTEXT + 2
    record = next(r for r in made("conversations")["train"] if r["kind"] == "summary")
    for reply in ("This is said nowhere.", ABSENT, ""):
        wrong = {**record, "messages": [*record["messages"][:-1], {"role": "assistant", "content": reply}]}
        with pytest.raises(DataError, match=r"record 2: the reply .* of kind summary is not in its context"):
            check_records([record, wrong])


def test_a_fifth_is_not_told():
    """In each form, and not where the context has the name, word or line that is asked for."""
    for records in made("conversations").values():
        turns = [
            (kind, question, context_of(record))
            for record in records
            for kind, question in zip(record["kind"].split(), contents(record, "user"), strict=True)
            if kind != "module"
        ]
        absent = [turn for turn in turns if turn[0].endswith(":absent")]
        assert 0.14 < len(absent) / len(turns) < 0.26
        forms = Counter(kind.partition(":")[0] for kind, *_ in turns)
        assert {form for form, count in forms.items() if count > 20} <= {kind.partition(":")[0] for kind, *_ in absent}
        for kind, question, context in turns:
            assert kind not in ("line", "sentence") or context.count(question.rpartition("\n")[2]) == 1
        for kind, question, context in absent:
            if kind in ("line:absent", "sentence:absent"):
                assert question.rpartition("\n")[2] not in context
    context_has = {words[-1].rstrip("?") in context for kind, question, context in absent if (words := question.split())}
    assert context_has == {True, False}, "another definition is asked for, or the one there is silent"


def test_no_held_out_reply_is_one_of_training():
    sets = made("conversations")
    leaked, count = measure_leak(sets)
    assert leaked == 0 and count > 100
    seen = {fingerprint(part) for record in sets["train"] for part in [context_of(record), *context_of(record).split("\n\n")]}
    assert not seen & {fingerprint(context_of(record)) for record in sets["validation"]}
    copied = {"train": [*sets["train"], sets["validation"][0]], "validation": sets["validation"]}
    assert measure_leak(copied)[0] >= 1, "the measure sees a leak"
    halves = {package_of(module.name) for module in modules() if not module.is_held_out}
    assert halves == {package_of(record["module"]) for record in sets["train"]}


def test_equal_definitions_of_two_modules(monkeypatch):
    again = replace(from_source(SOURCE, "again"), is_held_out=True)
    more = replace(from_source("def more(it): 'Take half of it.'\n" + SOURCE, "held.out"), is_held_out=True)
    other = from_source("def other(it):\n    'Take all of it.'\n    return it.whole(of=it)", "seen")
    sets = split_conversations([again, more, from_source(SOURCE), other])
    found = {split: [(each["module"], context_of(each)) for each in records] for split, records in sets.items()}
    assert {module for module, _ in found["train"]} == {"seen"} and len(found["train"]) == 1
    contexts = [context for _, context in found["validation"]]
    assert any("def more" in context for context in contexts) and len(set(contexts)) == len(contexts) > 3
    assert {name for _, name in module_facts([again, more, other])} == set(), "their modules say nothing of themselves"
    both = [from_source("'''A few things.'''" + SOURCE, name) for name in ("one", "two")]
    assert module_facts(both) == {} != module_facts(both[:1]), "a name of two modules"
    monkeypatch.setattr("data.made.conversations.OF_A_PACKAGE", 2)
    packages = [package_of(each["module"]) for each in split_conversations([again, more, other])["validation"]]
    assert sorted(packages) == ["again", "again", "held"], "what the first has is not asked again"


def test_modules_are_facts_of_the_pretraining_text():
    facts = module_facts(modules())
    assert all(found.reply == module for (module, _), found in facts.items())
    names = [name for _, name in facts]
    assert len(names) == len(set(names)) > 10
    wide = "wide " * (RECALL_PLACE // 5)
    far = f"'''Two things.'''\ndef near(): 'It is near.'\ndef wide(): '{wide}'\ndef far(): 'It is far.'"
    assert [name for _, name in module_facts([from_source(far)])] == ["near", "wide"]
    asked = {reply for record in made("conversations")["train"] for form, reply in answers_of([record]) if form == "module"}
    assert asked <= {module.name.casefold() for module in modules()} and len(asked) > 3


def test_a_planted_cue_is_found():
    longer = []
    for record in made("conversations")["train"]:
        messages = [dict(message) for message in record["messages"]]
        for i, kind in enumerate(record["kind"].split()):
            messages[2 * i + 1]["content"] += " please" * 20 * kind.endswith(":absent")
        longer.append({**record, "messages": messages})
    assert measure(longer).found_cues == ["answered or not, by length of the question"]
