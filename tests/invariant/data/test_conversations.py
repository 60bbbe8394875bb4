"""Conversations of `data task conversations`: replies stand in their contexts, or the text does not tell; none leaks."""

from collections import Counter

import pytest

from data.config import DataError
from data.corpus.dedup import fingerprint
from data.made.conversations import ABSENT, LENGTH, answers_of, contents, context_of, module_facts
from data.made.modules import package_of
from data.made.sets import check_records, measure, measure_leak
from data.made.snippets import ask, list_snippets
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
def hide(what):
    """Hide it again, with care."""
    print(what, "is gone")
    print("it is not to be seen")
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
    assert ("returns", "") not in asked["hide"], "the body tells that it returns nothing"


def test_replies_stand_in_their_contexts():
    for records in made("conversations").values():
        check_records(records)
        for record in records:
            roles = [message["role"] for message in record["messages"]]
            kinds = record["kind"].split()
            assert roles == ["system", *["user", "assistant"] * len(kinds)] and 1 <= len(kinds) <= 7
            assert context_of(record) and len({kind.partition(":")[0] for kind in kinds}) == len(kinds)
            assert sum(map(len, contents(record))) < LENGTH
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
        for kind, question, context in absent:
            if kind in ("line:absent", "sentence:absent"):
                assert question.rpartition("\n")[2] not in context


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


def test_modules_are_facts_of_the_pretraining_text():
    facts = module_facts(modules())
    assert all(found.reply == module for (module, _), found in facts.items())
    names = [name for _, name in facts]
    assert len(names) == len(set(names)) > 10
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
