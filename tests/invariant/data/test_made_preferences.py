"""Built-in preference pairs and conversations in both styles: the rule on every record, no leak, and no cue that decides."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from data.chat.conversation import Conversation
from data.chat.shapes import read_chat_record
from data.config import DataError
from data.corpus.dedup import fingerprint
from data.made.modules import package_of
from data.made.preferences import (
    BREAKS,
    CONTEXT,
    RULE_SHARE,
    make_preferences,
    make_styled_conversations,
    split_preferences,
    split_styles,
)
from data.made.rule import MOST_WORDS, broken_parts, has_hedge, is_well_formed, keeps_rule, names_module
from data.made.snippets import Question
from data.made.styles import CLAUSES, HEDGED, NAMED, PADDED, UNNAMED, write_reply
from tests.made import from_source, modules

SOURCE = '''
def open(self, key, force=False):
    """Open the lid with a key."""
def seek(what, where=None, {name}=3):
    """Seek it, and say where it is."""
'''


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict]]:
    return split_preferences(modules())


@pytest.fixture(scope="module")
def styles() -> dict[str, list[dict]]:
    return split_styles(modules())


def text(record: dict, part: str) -> str:
    (message,) = record[part]
    assert message["role"] == ("user" if part == "prompt" else "assistant")
    return message["content"]


def split_prompt(prompt: str) -> tuple[str, str, str]:
    """Its module's line, context and question."""
    head, _, rest = prompt.partition("\n")
    context, _, question = rest.rpartition("\n\n")
    return head, context, question


def accuracy(records: list[dict], score) -> float:
    """The share of pairs whose chosen reply has the higher score; a tie is a half."""
    found = [score(text(each, "chosen"), each) - score(text(each, "rejected"), each) for each in records]
    return sum(1.0 if value > 0 else 0.5 * (value == 0) for value in found) / len(found)


# ---- records


def test_every_pair_follows_the_rule(pairs):
    for record in (*pairs["train"], *pairs["validation"]):
        prompt, chosen, rejected = (text(record, part) for part in ("prompt", "chosen", "rejected"))
        module, answer = record["module"], record["answer"]
        assert keeps_rule(chosen, module) and is_well_formed(chosen), chosen
        assert record["breaks"] == sorted(broken_parts(rejected, module)) != [] and is_well_formed(rejected), rejected
        head, context, question = split_prompt(prompt)
        assert head in (f"# {module}", f"Module {module}:") and question.endswith("?")
        assert len(context) <= CONTEXT and answer in context and len(prompt) < 250
        assert answer in chosen and answer in rejected, "both answer the same"


def test_replies_of_both_styles(styles):
    for records in styles.values():
        for record in records:
            assert isinstance(read_chat_record(record), Conversation)
            (_, reply) = (message["content"] for message in record["messages"])
            assert record["breaks"] == sorted(broken_parts(reply, record["module"])) and is_well_formed(reply)
            assert record["answer"] in reply
        kept = sum(not record["breaks"] for record in records) / len(records)
        assert abs(kept - RULE_SHARE) < 4 * (RULE_SHARE * (1 - RULE_SHARE) / len(records)) ** 0.5


def test_what_is_broken(pairs, styles):
    """In the shares of BREAKS, four standard errors; a pair and the conversation of its prompt are drawn apart."""
    for records in (pairs["train"], [record for record in styles["train"] if record["breaks"]]):
        count = Counter(tuple(record["breaks"]) for record in records)
        for breaks, share in BREAKS.items():
            assert abs(count[breaks] / len(records) - share) < 4 * (share * (1 - share) / len(records)) ** 0.5, breaks
    same = {text(record, "prompt"): record["breaks"] for record in pairs["train"]}
    both = [same[each["messages"][0]["content"]] == each["breaks"] for each in styles["train"] if each["breaks"]]
    assert len(both) > 100 and sum(both) < 0.5 * len(both)


def test_the_surface_forms(pairs, styles):
    """Every form is used: places, hedges, padding, both clauses of each form of question, another module's name."""
    replies = [text(record, part) for record in pairs["train"] for part in ("chosen", "rejected")]
    replies += [record["messages"][1]["content"] for record in styles["train"]]
    written = " ".join(replies).casefold()
    for forms in (UNNAMED, HEDGED, PADDED):
        for part in (part for form in forms for part in form):
            assert part.strip().casefold() in written, part
    for kind, clauses in CLAUSES.items():
        chosen = [text(record, "chosen").casefold() for record in pairs["train"] if record["kind"] == kind]
        assert {any(clause.split("}")[1].split("{")[0] in reply for reply in chosen) for clause in clauses} == {True}, kind
    starts = Counter(text(record, "chosen").split(record["module"])[0] for record in pairs["train"])
    assert {front.partition("{")[0] for front, _ in NAMED} <= set(starts)
    broken = [record for record in pairs["train"] if record["breaks"] == ["module"]]
    names = {record["module"] for record in pairs["train"]}
    other = [any(names_module(text(each, "rejected"), name) for name in names) for each in broken]
    assert 0.02 < sum(other) / len(other) < 0.2


def test_determined_by_the_seed_alone(pairs):
    few = [module for module in modules() if package_of(module.name) in ("json", "logging", "argparse")]
    random.seed(5)
    found = [split(few, seed) for split in (split_preferences, split_styles) for seed in (0, 1)]
    random.seed(6)
    again = [split(few[::-1], seed) for split in (split_preferences, split_styles) for seed in (0, 1)]
    assert found == again and found[0] != found[1] and found[2] != found[3]
    assert [record["module"] for record in pairs["train"]] != sorted(record["module"] for record in pairs["train"])


def test_modules_are_held_out(pairs, styles):
    side = {module.name: module.is_held_out for module in modules()}
    for sets in (pairs, styles):
        for split, records in sets.items():
            assert {side[record["module"]] for record in records} == {split == "validation"}
    assert {each["module"] for each in pairs["train"]} == {each["module"] for each in styles["train"]}
    contexts = [{fingerprint(split_prompt(text(record, "prompt"))[1]) for record in records} for records in pairs.values()]
    assert not contexts[0] & contexts[1] and [len(each) for each in contexts] == [len(records) for records in pairs.values()]


def test_equal_definitions_of_two_modules():
    """A held-out definition is in no prompt of training, under another module's name either."""
    sources = {"held": SOURCE.format(name="a"), "same": SOURCE.format(name="a"), "other": SOURCE.format(name="b")}
    held, same, other = (from_source(source, name) for name, source in sources.items())
    sets = split_preferences([replace(held, is_held_out=True), other, same])
    assert [record["module"] for record in sets["train"]] == ["other"] and len(sets["validation"]) == 2


@pytest.mark.parametrize(("name", "source", "asked"), [
    ("mine", "def open(key, force=3): 'Open it now.'", True),
    ("text", "def open(key, force=3): 'Open it now.'", False),  # a word of the forms
    ("a" * 17, "def open(key, force=3): 'Open it now.'", False),
    ("force", "def open(key, force=3): 'Open it now.'", False),  # it would be named by itself
    ("mine", "def open(key, force=may): 'Open it now.'", False),  # a hedge
    ("mine", "def open(key, force='.. . .'): 'Open it now.'", False),  # several sentences
    ("mine", "def open(key, force={}): 'Open it now.'", True),  # braces are no fields
    ("mine", "def open(key, force='xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'): 'Open it now.'", False),
    ("mine", f"def open(key, force=3, word={'x' * 150!r}): 'Open it now.'", False),  # no short context has it
])  # fmt: skip
def test_which_definitions_are_asked_about(name, source, asked, monkeypatch):
    monkeypatch.setattr("data.made.preferences.CLAUSES", {"default": CLAUSES["default"]})
    source = "def here(me): 'Say where it is.'\n" + source
    for split in (split_preferences, split_styles):
        assert len(split([from_source(source, name)])["train"]) == asked


def test_an_answer_that_no_form_can_give():
    question = Question("default", "f", "x", "one of a very long list of words that are too many to say here")
    with pytest.raises(DataError, match=r"no form of the answer 'one of a .*' about os breaks \[\] alone"):
        write_reply(question, "os", (), (), 0)
    assert names_module(write_reply(question._replace(reply="3"), "os", (), (), 0), "os")


# ---- cues


def test_no_single_cue_decides(pairs):
    """What a pair could be told by, on held-out records: a length, a part of the rule, the presence of one word."""
    records = pairs["validation"]
    cues = {
        "characters": lambda reply, record: -len(reply),
        "words": lambda reply, record: -len(reply.split()),
        "module": lambda reply, record: names_module(reply, record["module"]),
        "hedge": lambda reply, record: not has_hedge(reply),
        "length": lambda reply, record: len(reply.split()) <= MOST_WORDS,
    }
    found = {name: accuracy(records, cue) for name, cue in cues.items()}
    assert all(0.55 < value < 0.82 for value in found.values()), found
    words = Counter(word for record in records for word in set(text(record, "rejected").lower().split()))
    for word, _ in words.most_common(40):
        value = accuracy(records, lambda reply, record, word=word: word not in reply.lower().split())
        assert 0.25 < value < 0.75, word
    alone = [record for record in records if record["breaks"] == ["module"]]
    hedged = [record for record in records if record["breaks"] == ["hedge"]]
    assert accuracy(alone, cues["characters"]) < 0.5 < accuracy(hedged, cues["characters"])
    assert accuracy(records, lambda reply, record: keeps_rule(reply, record["module"])) == 1


@pytest.mark.slow
def test_the_corpora_of_the_whole_library():
    pairs, styles = make_preferences(), make_styled_conversations(progress=list)
    for sets in (pairs, styles):
        assert len(sets["train"]) >= 3000 and len(sets["validation"]) >= 400
        assert len({record["module"] for record in sets["validation"]}) > 40
    test_every_pair_follows_the_rule(pairs)
    test_replies_of_both_styles(styles)
    test_modules_of_both(pairs, styles)


def test_modules_of_both(pairs, styles):
    """Of the same prompts are pairs and conversations: those that are held out are so in both."""
    for split in pairs:
        asked = {each["messages"][0]["content"] for each in styles[split]}
        assert asked == {text(record, "prompt") for record in pairs[split]}
