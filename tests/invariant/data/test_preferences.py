"""Preferences: each shape of records, the ids of replies behind one prompt, what does not fit a row, and pairs of rankings."""

import csv
import json
import random
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import data.__main__
from data.chat.encode import ChatEncoder, encode_rendered
from data.chat.encode_preference import (
    FILLED,
    MERGED,
    REWRITTEN,
    SAME,
    SAME_AFTER_CUT,
    TOO_LONG,
    encode_behind,
    encode_replies,
    pair_examples,
)
from data.chat.preferences import Preference, Rated, read_preference, read_rated, read_rated_all
from data.chat.rankings import PairCounts, Ranked, make_pairs, read_rankings, read_votes
from data.chat.template import ChatTemplate, name_special_tokens, open_template
from data.config import DataConfig, DataError
from data.sources.records import read_corpus_rows
from data.tokenizer.open import load_tokenizer
from data.transforms.causal import IGNORE
from tests.chat_tokenizers import WRITERS
from tests.chats import TOOLS, call, reply, result, system, user
from tests.folders import TEXT
from tests.records import write_rows
from tests.runs import command

HI, HELLO, AWAY = user("Hi"), reply("Hello"), reply("Go away")
HUMAN, GPT, OTHER = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, {"from": "gpt", "value": "Go away"}
SIMPLE = Preference((HI,), (HELLO,), (AWAY,))
LONGER = Preference((system("S"), HI, HELLO, user("Bye")), (HELLO,), (AWAY,))
PAIRS = {  # name: record, preference
    "strings": ({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}, Preference("1 + 1 =", " 2", " 3")),
    "turns": ({"prompt": [HI], "chosen": [HELLO], "rejected": [AWAY], "id": 3}, SIMPLE),
    "one turn each": ({"prompt": [HI], "chosen": HELLO, "rejected": AWAY}, SIMPLE),
    "implicit": ({"chosen": [HI, HELLO], "rejected": [HI, AWAY]}, SIMPLE),
    "implicit, null": ({"prompt": None, "chosen": [HI, HELLO], "rejected": [HI, AWAY]}, SIMPLE),
    "implicit, later": (
        {"chosen": [system("S"), HI, HELLO, user("Bye"), HELLO], "rejected": [system("S"), HI, HELLO, user("Bye"), AWAY]},
        LONGER,
    ),
    "a reply that is repeated": (
        {"chosen": [HI, HELLO, HI, HELLO], "rejected": [HI, HELLO, HI, AWAY]},
        Preference((HI, HELLO, HI), (HELLO,), (AWAY,)),
    ),
    "repeated prompt": ({"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, AWAY]}, SIMPLE),
    "prompt beside replies": ({"prompt": "Hi", "chosen": [HELLO], "rejected": [AWAY]}, SIMPLE),
    "prompt in both": ({"prompt": [HI], "chosen": [HI, HELLO], "rejected": [HI, AWAY]}, SIMPLE),
    "sharegpt": ({"conversations": [HUMAN], "chosen": GPT, "rejected": OTHER}, SIMPLE),
    "sharegpt, system": (
        {"conversations": [HUMAN, GPT, {"from": "human", "value": "Bye"}], "chosen": GPT, "rejected": OTHER, "system": "S"},
        LONGER,
    ),
    "messages": ({"messages": [HI], "chosen": HELLO, "rejected": AWAY}, SIMPLE),
    "messages and strings": ({"messages": [HI], "chosen": "Hello", "rejected": "Go away"}, SIMPLE),
    "alpaca": ({"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "Go away"}, SIMPLE),
    "alpaca, input": (
        {"instruction": "Add.", "input": "1 1", "chosen": "Hello", "rejected": "Go away"},
        Preference((user("Add.\n\n1 1", instruction="Add.", input="1 1"),), (HELLO,), (AWAY,)),
    ),
    "alpaca, history": (
        {"instruction": "Bye", "history": [["Hi", "Hello"]], "system": "S", "chosen": "Hello", "rejected": "Go away"},
        LONGER,
    ),
    "a table": (
        {name: json.dumps([message]) for name, message in (("prompt", HI), ("chosen", HELLO), ("rejected", AWAY))},
        SIMPLE,
    ),
    "a table of turns": (
        {name: json.dumps(value) for name, value in (("conversations", [HUMAN]), ("chosen", GPT), ("rejected", OTHER))},
        SIMPLE,
    ),
    "margin": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1.5", "score_chosen": 9, "score_rejected": 1},
        Preference("a", "b", "c", margin=1.5),
    ),
    "scores": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 4, "score_rejected": 5.5},
        Preference("a", "b", "c", margin=-1.5),
    ),
    "tools": (
        {"prompt": [HI], "chosen": [call("Köln")], "rejected": [HELLO], "tools": json.dumps(TOOLS)},
        Preference((HI,), (call("Köln"),), (HELLO,), TOOLS),
    ),
    "flags and nulls": (
        {"prompt": [HI | {"name": None}], "chosen": [HELLO | {"train": False, "tool_calls": None}], "rejected": [AWAY]},
        SIMPLE,
    ),
    "strings that look like JSON": (
        {"prompt": "[1]", "chosen": "[2]", "rejected": '{"a": 3}'},
        Preference("[1]", "[2]", '{"a": 3}'),
    ),
}
RATED = {
    "strings": ({"prompt": "a", "completion": "b", "label": True}, Rated("a", "b", None, True)),
    "text label": ({"prompt": "a", "completion": "b", "label": "False"}, Rated("a", "b", None, False)),
    "number": ({"prompt": "a", "completion": "b", "label": 0}, Rated("a", "b", None, False)),
    "turns": (
        {"prompt": [HI], "completion": [HELLO], "label": 1, "system": "S"},
        Rated((system("S"), HI), (HELLO,), None, True),
    ),
    "messages": ({"messages": [HI, HELLO], "kto_tag": "true", "tools": TOOLS}, Rated((HI,), (HELLO,), TOOLS, True)),
    "sharegpt": ({"conversations": [HUMAN, GPT], "kto_tag": False}, Rated((HI,), (HELLO,), None, False)),
    "alpaca": ({"instruction": "Hi", "output": "Hello", "kto_tag": True}, Rated((HI,), (HELLO,), None, True)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_shapes_of_pairs(name):
    row, expected = PAIRS[name]
    assert read_preference(row) == expected


@pytest.mark.parametrize("name", RATED)
def test_shapes_of_rated_replies(name):
    row, expected = RATED[name]
    assert read_rated(row) == expected and read_rated_all(row) == [expected]


def test_a_pair_is_two_rated_replies():
    row = {"prompt": [HI], "chosen": [HELLO], "rejected": [AWAY]}
    assert read_rated_all(row) == [Rated((HI,), (HELLO,), None, True), Rated((HI,), (AWAY,), None, False)]


def test_every_format_of_files(tmp_path):
    row = {"prompt": [HI], "chosen": [HELLO], "rejected": [AWAY], "score_chosen": 2.0, "score_rejected": 1.0}
    write_rows(tmp_path / "a.jsonl", [row])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "b.parquet")
    with (tmp_path / "c.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, row)
        table.writeheader()
        table.writerow({name: json.dumps(value) for name, value in row.items()})
    rows = read_corpus_rows(DataConfig(corpus=(str(tmp_path),)), [], print)
    assert [read_preference(each) for each in rows.values] == [Preference((HI,), (HELLO,), (AWAY,), margin=1.0)] * 3


# ---- ids


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {}

    def open_kind(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp("tokenizers") / kind
            WRITERS[kind](folder)
            made[kind] = load_tokenizer(folder)
        return made[kind]

    return open_kind


@pytest.fixture
def ours(tokenizers):
    return ChatEncoder(tokenizers("ours"), open_template(tokenizers("ours"), "chatml"))


def encode(encoder, prompt, *replies, most=10_000, policy="error", tools=None, **options):
    return encode_replies(encoder, prompt, replies, tools, most=most, policy=policy, **options)


def test_a_pair_has_one_prompt_and_terminators(ours):
    tokenizer = ours.tokenizer
    end = tokenizer.control_tokens["<|im_end|>"]
    found = encode(ours, (HI,), (HELLO,), (AWAY,))
    assert found.prompt.tolist() == encode_rendered(tokenizer, ours.template, [HI])
    assert [ids.tolist() for ids in found.replies] == [[*tokenizer.encode(text), end] for text in ("Hello", "Go away")]
    assert found[2:] == (0, 0, None)
    one = encode(ours, (HI,), (HELLO,))
    several = encode(ours, (HI,), (HELLO,), (AWAY,), (reply("Hello you"),))
    for other, count in ((one, 1), (several, 3)):
        assert np.array_equal(other.prompt, found.prompt) and len(other.replies) == count
        assert np.array_equal(other.replies[0], found.replies[0])
    for ids in (found.prompt, *found.replies):
        assert ids.dtype == np.int64


@pytest.mark.parametrize("prompt", ["to be", (user("to be"),)], ids=["strings", "messages"])
def test_labels_are_the_next_tokens_of_the_reply(prompt, ours):
    sides = ("the fox", "no") if isinstance(prompt, str) else ((reply("the fox"),), (reply("no"),))
    found = encode(ours, prompt, *sides)
    for ids in found.replies:
        row = pair_examples(found.prompt, ids, group=7)
        whole = [*found.prompt.tolist(), *ids.tolist()]
        assert row.group == 7 and row.ids.tolist() == whole[:-1] and len(row.labels) == len(row.ids)
        for t, label in enumerate(row.labels.tolist()):
            assert label == (whole[t + 1] if t + 1 >= len(found.prompt) else IGNORE)
        assert (row.labels != IGNORE).sum() == len(ids), "each token of the reply is learned, its first and its terminator too"


def test_contents_that_look_like_control_tokens_stay_text(ours):
    found = encode(ours, (user("<|im_end|>"),), (reply("<|im_start|>x"),), (AWAY,))
    ends = [ours.tokenizer.control_tokens[name] for name in ("<|im_start|>", "<|im_end|>")]
    assert np.isin(found.prompt, ends).sum() == 3 and np.isin(found.replies[0], ends).sum() == 1
    plain = encode(ours, "<|im_end|>", "<|im_end|>x", "y")
    assert ours.has_rendered_text and not np.isin(np.concatenate([plain.prompt, *plain.replies]), ends).any()


def test_tool_calls_and_results(ours):
    talk = (user("Weather?"), call("Köln"), result("3"))
    found = encode(ours, (user("Weather?"),), (call("Köln"),), (AWAY,), tools=TOOLS)
    assert '"Köln"' in ours.tokenizer.decode(found.replies[0].tolist())
    after = encode(ours, talk, (reply("3 °C"),), (AWAY,), tools=TOOLS)
    assert after.prompt.tolist() == encode_rendered(ours.tokenizer, ours.template, talk, tools=TOOLS)
    with pytest.raises(DataError, match="has tools"):
        encode(ChatEncoder(ours.tokenizer, open_template(ours.tokenizer, "zephyr")), (HI,), (HELLO,), (AWAY,), tools=TOOLS)


@pytest.mark.parametrize("kind", WRITERS)
def test_strings_are_read_as_generation_continues_them(kind, tokenizers):
    """The prompt's ids are those of the prompt alone, and both together spell the text, at whatever boundary."""
    tokenizer = tokenizers(kind)
    encoder = ChatEncoder(tokenizer, open_template(tokenizer, "zephyr"))
    for prompt in ("to be", "to be ", "th", "A:\n", "😀", "a\u2581"):
        for text in ("the", " the", "e", "\n\nthe", "  x", "😀 fox"):
            found = encode(encoder, prompt, text, "!!")
            assert found.prompt.tolist() == [*tokenizer.affixes.prefix, *tokenizer.encode(prompt)]
            spelled = tokenizer.decode([*found.prompt.tolist(), *found.replies[0].tolist()])
            assert spelled == (prompt + text if tokenizer.is_lossless else (prompt + text).replace("\u2581", " "))
            assert all(ids[-1] == tokenizer.eos_id for ids in found.replies)
            assert tokenizer.decode(encode_behind(tokenizer, text)).strip(" ") == text.strip(" ")


def test_a_space_that_the_tokenizer_adds_is_none_of_the_reply(tokenizers):
    """encode(reply) alone would begin with one, and a network that continues "th" by "e" writes none."""
    tokenizer = tokenizers("llama-2")
    apart = encode_behind(tokenizer, "e")
    assert tokenizer.encode("e") != apart and tokenizer.decode([*tokenizer.encode("th"), *apart]) == "the"
    assert tokenizer.decode([*tokenizer.encode("th"), *tokenizer.encode("e")]) == "th e"


def test_what_cannot_be_spelled_behind_another_text_is_left_out(tokenizers, monkeypatch):
    tokenizer = tokenizers("llama-2")
    encoder = ChatEncoder(tokenizer, open_template(tokenizer, "zephyr"))
    monkeypatch.setattr("data.chat.encode_preference.MARKS", ("th",))
    found = encode(encoder, "th", "e", "!")
    assert found.reason == MERGED and found.replies == ()


def with_source(encoder, source, **options):
    return ChatEncoder(encoder.tokenizer, ChatTemplate("made", source, name_special_tokens(encoder.tokenizer)), **options)


def test_tokens_across_the_boundary(tokenizers):
    """A header that ends with a space: " the" is one token. For one reply alone the record is left out; for both, these tokens
    are learned, as instruction tuning does."""
    tokenizer = tokenizers("byte-level")
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    encoder = with_source(ChatEncoder(tokenizer, open_template(tokenizer, "zephyr")), source)
    assert encode(encoder, (HI,), (reply("the"),), (reply("!"),)).reason == MERGED
    assert encode(encoder, (HI,), (reply("!"),), (reply("the"),)).reason == MERGED
    clean = encode(encoder, (HI,), (reply("!"),), (reply("?"),))
    assert clean.reason is None and tokenizer.decode(clean.prompt.tolist()).endswith("assistant: ")
    both = encode(encoder, (HI,), (reply("the"),), (reply("the fox"),))
    assert both.reason is None and tokenizer.decode(both.prompt.tolist()).endswith("assistant:")
    assert [tokenizer.decode(ids.tolist()) for ids in both.replies] == [" the", " the fox"]


def test_a_template_that_writes_another_prompt_before_another_reply(tokenizers):
    """Qwen3 puts an empty thought before a reply without one: it is the prompt's there, and not where a reply thinks."""
    tokenizer = tokenizers("byte-level")
    encoder = ChatEncoder(tokenizer, open_template(tokenizer, "qwen3"))
    thinking = reply("4", reasoning_content="Two and two.")
    assert encode(encoder, (HI,), (thinking,), (reply("5"),)).reason == REWRITTEN
    assert encode(encoder, (HI,), (thinking,), (reply("5", reasoning_content="Odd."),)).reason is None
    assert encode(encoder, (HI,), (reply("4"),), (reply("5"),)).reason is None


def test_a_control_token_takes_in_the_white_space_of_a_reply(tokenizers):
    """As Phi-3's do: the token is the prompt's for both replies, and neither learns it."""
    tokenizer = tokenizers("phi-3")
    encoder = ChatEncoder(tokenizer, open_template(tokenizer, "phi-3"))
    found = encode(encoder, (HI,), (reply("\n the"),), (reply("no"),))
    assert found.reason is None and found.prompt.tolist() == encode_rendered(tokenizer, encoder.template, [HI])
    assert [tokenizer.decode(ids.tolist()).strip() for ids in found.replies] == ["the", "no"]


def test_replies_with_the_same_tokens(tokenizers):
    """Llama 3's template trims contents."""
    tokenizer = tokenizers("byte-level")
    encoder = ChatEncoder(tokenizer, open_template(tokenizer, "llama-3"))
    found = encode(encoder, (HI,), (HELLO,), (reply("Hello \n"),))
    assert found.reason == SAME and found.replies == ()
    assert encode(encoder, (HI,), (HELLO,), (AWAY,), (reply(" Hello"),)).reason == SAME


def test_learning_every_token_is_refused(tokenizers):
    tokenizer = tokenizers("ours")
    encoder = ChatEncoder(tokenizer, open_template(tokenizer, "chatml"), learn="all")
    with pytest.raises(DataError, match="the replies alone are learned"):
        encode(encoder, (HI,), (HELLO,), (AWAY,))


# ---- what does not fit

TALK = (system("S"), user("the quick brown fox"), reply("jumps over"), user("hello world"), reply("the lazy dog"), user("Bye"))
ANSWERS = ((reply("Return the list"),), (reply("Return the names, please, of all dogs"),))


def sizes(found):
    return len(found.prompt), [len(ids) for ids in found.replies]


@pytest.mark.parametrize("room", [0, 1])
def test_the_longest_row_that_fits(room, ours):
    """A row holds prompt + reply - room."""
    whole = encode(ours, TALK, *ANSWERS)
    most = len(whole.prompt) + max(map(len, whole.replies)) - room
    for policy in ("error", "drop", "cut"):
        same = encode(ours, TALK, *ANSWERS, most=most, policy=policy, room=room)
        assert sizes(same) == sizes(whole) and same[2:] == (0, 0, None)
    with pytest.raises(DataError, match=f"it has {most} tokens, and a row holds {most - 1}: a larger context, or the policy"):
        encode(ours, TALK, *ANSWERS, most=most - 1, room=room)
    dropped = encode(ours, TALK, *ANSWERS, most=most - 1, policy="drop", room=room)
    assert dropped.reason == TOO_LONG and dropped.replies == ()
    cut = encode(ours, TALK, *ANSWERS, most=most - 1, policy="cut", room=room)
    assert cut.turns == 1 and cut.tokens == 0 and cut.reason is None
    expected = encode(ours, (TALK[0], *TALK[3:]), *ANSWERS)
    assert np.array_equal(cut.prompt, expected.prompt) and sizes(cut) == sizes(expected)


@pytest.mark.parametrize("room", [0, 1])
def test_every_length(room, ours):
    """The fewest turns are dropped; then ends are cut; then the prompt fills the row. Both replies lose the same turns."""
    whole = [encode(ours, prompt, *ANSWERS) for prompt in (TALK, (TALK[0], *TALK[3:]), (TALK[0], *TALK[5:]))]
    needed = [len(each.prompt) + max(map(len, each.replies)) - room for each in whole]
    last, seen = whole[-1], set()
    common = next(i for i, (a, b) in enumerate(zip(*last.replies, strict=False)) if a != b)
    for most in range(1, needed[0] + 2):
        found = encode(ours, TALK, *ANSWERS, most=most, policy="cut", room=room)
        space = most + room - len(last.prompt)
        turns = next((count for count, size in enumerate(needed) if size <= most), 2)
        if space < 1:
            assert found.reason == FILLED and found.replies == ()
        elif needed[-1] > most and space <= common:
            assert found.reason == SAME_AFTER_CUT and found.replies == ()
        else:
            kept = [ids[: max(most + room - len(whole[turns].prompt), 0)] for ids in whole[turns].replies]
            assert found.turns == turns and np.array_equal(found.prompt, whole[turns].prompt)
            assert all(np.array_equal(a, b) for a, b in zip(found.replies, kept, strict=True))
            assert found.tokens == sum(map(len, whole[turns].replies)) - sum(map(len, kept))
            assert all(len(found.prompt) + len(ids) - room <= most and len(ids) for ids in found.replies)
            if found.tokens:
                assert found.replies[1][-1] != ours.tokenizer.control_tokens["<|im_end|>"], "a cut reply does not end"
        seen.add((found.reason, found.turns, found.tokens > 0))
    whole_rows = {(None, turns, False) for turns in (0, 1, 2)}
    assert seen == {(FILLED, 0, False), (SAME_AFTER_CUT, 0, False), (None, 2, True)} | whole_rows


def test_strings_that_are_too_long(ours):
    whole = encode(ours, "to be", "the quick fox", "the quick dog")
    size = len(whole.prompt) + max(map(len, whole.replies)) - 1
    cut = encode(ours, "to be", "the quick fox", "the quick dog", most=size - 1, policy="cut")
    assert cut.reason is None and cut.tokens == 2 and cut.turns == 0 and np.array_equal(cut.replies[0], whole.replies[0][:-1])
    assert encode(ours, "to be", "the quick fox", "the quick dog", most=size - 4, policy="cut").reason == SAME_AFTER_CUT
    assert encode(ours, "to be", "the quick fox", "no", most=len(whole.prompt) - 1, policy="cut").reason == FILLED
    at_least = encode(ours, "to be", "the quick fox", "no", most=len(whole.prompt), policy="cut")
    assert at_least.reason is None and [len(ids) for ids in at_least.replies] == [1, 1]


def test_one_reply_is_cut_and_never_the_same(ours):
    whole = encode(ours, "to be", "the quick fox")
    cut = encode(ours, "to be", "the quick fox", most=len(whole.prompt), policy="cut")
    assert cut.reason is None and [len(ids) for ids in cut.replies] == [1]


def test_many_turns_are_cut_by_bisection(ours):
    talk = tuple(message for number in range(300) for message in (user(f"{number} the fox"), reply("no")))[:-1]
    begin = time.perf_counter()
    found = encode(ours, talk, *ANSWERS, most=200, policy="cut")
    assert found.turns > 250 and found.reason is None and time.perf_counter() - begin < 5


def test_pairs_are_encoded_fast(ours):
    """10,000 pairs must not take minutes: at least 100 a second, on a busy machine (measured: 330 to 1,000)."""
    draw, words = random.Random(0), " ".join(TEXT).split()

    def text() -> str:
        return " ".join(draw.choices(words, k=40))

    pairs = [((user(text()),), (reply(text()),), (reply(text()),)) for _ in range(100)]
    encode(ours, *pairs[0])
    begin = time.process_time()
    for pair in pairs:
        encode(ours, *pair)
    assert time.process_time() - begin < 1


def test_a_prompt_is_rendered_twice_for_all_replies(ours, monkeypatch):
    rendered = []
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda self, m, **o: rendered.append(len(m)) or render(self, m, **o))
    encode(ours, TALK, *ANSWERS, (reply("a third"),))
    assert len(rendered) == 2 + 3


# ---- rankings

RANKED = [("1", "a"), ("3", "b"), ("3", "c"), ("2", "d")]  # score, reply


def pairs_of(*ranked, **options):
    counts = PairCounts()
    made = list(make_pairs(ranked, counts, **options))
    return [(each["chosen"], each["rejected"], each["margin"]) for each in made], counts


def test_ways_to_take_pairs():
    ranked = Ranked("r", "p", [text for _, text in RANKED], [float(score) for score, _ in RANKED])
    every = [("b", "d", 1.0), ("b", "a", 2.0), ("c", "d", 1.0), ("c", "a", 2.0), ("d", "a", 1.0)]
    assert pairs_of(ranked, take="best-worst")[0] == [("b", "a", 2.0)]
    assert pairs_of(ranked, take="all")[0] == every
    assert pairs_of(ranked, take="adjacent")[0] == [("c", "d", 1.0), ("d", "a", 1.0)]
    wide, counts = pairs_of(ranked, take="all", least=2.0)
    assert wide == [pair for pair in every if pair[2] >= 2] and counts.close == 3 and counts.pairs == 2


def test_counts_of_what_makes_no_pair():
    ranked = [
        Ranked("1", "p", ["a", "b"], [1, 1]),
        Ranked("2", "p", ["a"], [1]),
        Ranked("3", "p", ["a", "a", " "], [1, 3, 2]),
        Ranked("4", "p", ["a", "b", "b"], [1, 0, 4]),
        Ranked("5", "p", ["a", "b"], [1, 1.5]),
        Ranked("6", "p", [[HELLO], [AWAY], [reply("")]], [1, 3, 2]),
    ]
    made, counts = pairs_of(*ranked, least=1.0)
    assert made == [("b", "a", 1.0), ([AWAY], [HELLO], 2.0)], "equal replies have the mean of their scores"
    assert (counts.prompts, counts.pairs, counts.empty, counts.equal, counts.close) == (6, 2, 2, 2, 1)
    assert counts.lost == {"a tie": 1, "a single reply": 2, "margins below the least": 1}


def test_shapes_of_rankings():
    rows = [
        {"prompt": "p", "response": "x", "score": 1},
        {"prompt": "q", "responses": ["a", "b"], "ranking": [2, 1]},
        {"prompt": "p", "completion": "y", "score": "2.5"},
        {"prompt": [HI], "responses": '["a", "b"]', "scores": "[0, 1]"},
    ]
    found = list(read_rankings((str(number), row) for number, row in enumerate(rows)))
    expected = [
        Ranked("1", "q", ["a", "b"], [-2.0, -1.0]),
        Ranked("3", [HI], ["a", "b"], [0.0, 1.0]),
        Ranked("0", "p", ["x", "y"], [1.0, 2.5]),
    ]
    assert found == expected
    both = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "ranking": [1, 2], "asked": "r"}
    assert [next(read_rankings([("", both)], kind=kind)).values for kind in ("scores", "ranking")] == [[1, 2], [-1, -2]]
    assert next(read_rankings([("", both)], "asked", "scores")).prompt == "r"


def votes(*choices, a="x", b="y", prompt="p"):
    return [{"prompt": prompt, "a": a, "b": b, "choice": choice} for choice in choices]


def test_votes_are_counted_by_pair_in_either_order():
    rows = [*votes("a", "b", " A "), *votes("b", a="y", b="x")]
    rows += [*votes("tie", "tie", "b", prompt="q"), *votes("b", "tie", "b", prompt="r")]
    counts = PairCounts()
    made = list(make_pairs(read_votes((str(number), row) for number, row in enumerate(rows)), counts))
    assert made == [
        {"prompt": "p", "chosen": "x", "rejected": "y", "margin": 0.5},
        {"prompt": "r", "chosen": "y", "rejected": "x", "margin": pytest.approx(2 / 3)},
    ]
    assert counts.prompts == 3 and counts.lost == {"a tie": 1}


@pytest.mark.parametrize("options, first", [((), PAIRS["strings"][1]), (("--turns",), None)], ids=["strings", "turns"])
def test_the_command_writes_what_is_read(options, first, tmp_path):
    rows = [
        {"prompt": "1 + 1 =", "responses": [" 3", " 2", ""], "scores": [0, 1, 0.5]},
        {"prompt": [HI], "responses": ["Go away", "Hello"], "scores": [1, 4]},
        {"prompt": "p", "response": "a", "score": 1},
    ]
    out = tmp_path / "pairs.jsonl"
    said = command("pairs", write_rows(tmp_path / "in.jsonl", rows), "--out", out, *options, main=data.__main__.main)
    assert said.code == 0, said.err
    made = [read_preference(json.loads(line)) for line in out.read_text(encoding="utf-8").splitlines()]
    asked = Preference((user("1 + 1 ="),), (reply(" 2"),), (reply(" 3"),))
    assert made == [
        Preference(*((first or asked).__dict__[name] for name in ("prompt", "chosen", "rejected")), margin=1.0),
        Preference((HI,), (HELLO,), (AWAY,), margin=3.0),
    ]
    assert said.out.splitlines() == [
        "read         3 records, 3 prompts",
        "pairs        2; margins 1 to 3, 2 on average",
        "without pair 1 prompt: a single reply",
        "left out     1 reply: empty",
        f"wrote        {out}",
    ]


def test_the_command_writes_rated_replies_and_counts_votes(tmp_path):
    rows = [{"prompt": "p", "responses": ["a", "b", "b"], "scores": [1, 3, 5]}]
    out = tmp_path / "rated.jsonl"
    said = command("pairs", write_rows(tmp_path / "in.jsonl", rows), "--out", out, "--labels", 4, main=data.__main__.main)
    assert said.code == 0, said.err
    found = [read_rated(json.loads(line)) for line in out.read_text().splitlines()]
    assert found == [Rated("p", "b", None, True), Rated("p", "a", None, False)]
    assert "replies      2, of which 1 are good and 1 bad" in said.out and "1 reply: equal to another one" in said.out
    given = write_rows(tmp_path / "votes.jsonl", [*votes("a", "a"), *votes("tie", prompt="q")])
    said = command("pairs", "--ratings", given, "--out", tmp_path / "voted.jsonl", main=data.__main__.main)
    assert said.code == 0 and "pairs        1; margins 1 to 1" in said.out and "1 prompt: a tie" in said.out


def test_ultrafeedback_as_it_is_published():
    """Its `messages` are the chosen conversation once more, not the turns before the replies."""
    asked = {"role": "user", "content": "2 + 2"}
    chosen, rejected = ([asked, {"role": "assistant", "content": text}] for text in ("4", "5"))
    row = {"prompt": "2 + 2", "prompt_id": "0a", "chosen": chosen, "rejected": rejected, "messages": chosen}
    found = read_preference(row | {"score_chosen": 8.0, "score_rejected": 2.0})
    assert (found.prompt, found.chosen, found.rejected, found.margin) == ((asked,), (chosen[1],), (rejected[1],), 6.0)
