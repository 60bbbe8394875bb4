"""Labelled data sets from the standard library: the same bytes again, modules apart, exact spans, IOB2, no cue by length."""

import ast
import hashlib
import json
import os
import random
import subprocess
import sys

import pytest

from data.__main__ import main
from data.config import DataError
from data.corpus.dedup import fingerprint
from data.made.cues import allowed_accuracy, correlation, threshold_accuracy
from data.made.modules import Definition, Module, choose_held_out, list_definitions, package_of, read_modules
from data.made.names import UNKNOWN, Names
from data.made.pairs import Cut, cut_in_halves, exchange, make_pairs, shared, words_of
from data.made.qa import make_qa
from data.made.scores import identifiers, make_scores, source_of
from data.made.sets import check_records, make_set, measure, texts_of
from data.made.tag import label_words, make_tag, problem_of_tags

NAMES = ("tag", "qa", "pairs", "scores")
PACKAGES = {"json", "email", "http", "logging", "argparse", "os", "posixpath", "collections"}


def is_wanted(name: str) -> bool:
    return package_of(name) in PACKAGES


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return read_modules(is_wanted)


@pytest.fixture(scope="module")
def sets(modules) -> dict[str, dict]:
    return {name: make_set(name, modules) for name in NAMES}


def from_source(source: str, name: str = "m") -> Module:
    tree = ast.parse(source)
    return Module(name, tree, False, tuple(list_definitions(tree, name)))


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_records(name, modules, sets):
    again = make_set(name, modules)
    assert again == sets[name] and json.dumps(again) == json.dumps(sets[name])
    other = make_set(name, modules, seed=1)
    assert other["train"] != sets[name]["train"]
    if name in ("tag", "qa"):  # the held-out modules are those of every seed
        assert {record["module"] for record in other["train"]} <= {module.name for module in modules if not module.is_held_out}


def test_hashes_of_strings_change_nothing(sets):
    code = (
        "import hashlib, json; from data.made.modules import read_modules; from data.made.sets import make_set;"
        f"modules = read_modules(lambda name: name.partition('.')[0] in {sorted(PACKAGES)});"
        f"sets = [make_set(name, modules) for name in {NAMES}];"
        "print(hashlib.sha256(json.dumps(sets).encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(json.dumps([sets[name] for name in NAMES]).encode()).hexdigest()


@pytest.mark.slow
def test_the_whole_library():
    """A few thousand records of each, without cues; 18 % of the documentation is held out, with fewer similar functions."""
    modules = read_modules()
    for name in NAMES:
        records = make_set(name, modules)
        train, validation = len(records["train"]), len(records["validation"])
        assert 2500 < train < 10000 and (0.09 if name == "scores" else 0.12) < validation / (train + validation) < 0.25, name
        for found in records.values():
            check_records(found)
            assert measure(found).found_cues == []
        assert not {r["module"] for r in records["train"]} & {r["module"] for r in records["validation"]}


@pytest.mark.parametrize("name", NAMES)
def test_modules_and_texts_are_apart(name, modules, sets):
    packages = {split: {package_of(record["module"]) for record in records} for split, records in sets[name].items()}
    assert packages["train"] and packages["validation"] and not packages["train"] & packages["validation"]
    texts = {
        split: {fingerprint(text) for record in records for text in texts_of(record)} for split, records in sets[name].items()
    }
    assert not texts["train"] & texts["validation"]


def test_texts_to_be_avoided(modules, sets):
    for name, make in {"tag": make_tag, "qa": make_qa, "pairs": make_pairs, "scores": make_scores}.items():
        texts = {fingerprint(text) for record in sets[name]["validation"] for text in texts_of(record)}
        again = make([module for module in modules if module.is_held_out], 0, frozenset(texts))
        left = {fingerprint(text) for record in again for text in texts_of(record)}
        assert len(texts) > 10 and not texts & left, name


def test_whole_packages_are_held_out():
    text = "words " * 10
    modules = [
        Module(name, ast.Module([], []), False, (Definition(name, name, name, text * size, ast.Module([], [])),))
        for name, size in (("a.x", 2), ("a.y", 2), ("b", 60), ("c", 3), ("d", 9), ("e", 1))
    ]
    held_out = choose_held_out(modules, fraction=0.2)
    sizes = {module.name: len(module.definitions[0].text) for module in modules}
    held = sum(size for name, size in sizes.items() if package_of(name) in held_out)
    assert 0 < held <= 0.2 * sum(sizes.values()) and "b" not in held_out
    assert choose_held_out(modules[:1], fraction=0.2) == {"a"}, "one package is held out whatever its size"
    assert choose_held_out(modules[::-1], fraction=0.2) == held_out


def test_duplicate_docstrings_are_dropped(modules):
    found = [fingerprint(definition.text) for module in modules for definition in module.definitions]
    assert len(found) > 500 and len(set(found)) == len(found)


# --- tags -------------------------------------------------------------------------------------------------------------

SOURCE = '''
import os.path as osp, json
from collections import OrderedDict as Ordered
from _thread import LockType
MAX_SIZE = 3
limit_now = 4
def open(max_size): "Open it."
def read_all(): "Read."
class Reader:
    DONE = 1
    def next_item(self, some_name): "Next."
class Writer(Reader): "Write."
'''
CASES = [
    ("Call read_all ( ) or open ( ) now", {1: "B-FUNCTION", 5: "B-FUNCTION"}),
    ("Then open the file at a time", {}),
    ("the function open of this module", {2: "B-FUNCTION"}),
    ("the json module , os . path . join ( )", {1: "B-MODULE", 4: "B-FUNCTION"} | dict.fromkeys(range(5, 9), "I-FUNCTION")),
    ("like os . path here", {1: "B-MODULE", 2: "I-MODULE", 3: "I-MODULE"}),
    ("a Reader stops at MAX_SIZE", {1: "B-CLASS", 4: "B-CONSTANT"}),
    ("Reader stops at limit_now", {}),
    ("uses Reader . next_item and Ordered", {1: "B-FUNCTION", 2: "I-FUNCTION", 3: "I-FUNCTION", 5: "B-CLASS"}),
    ("raises ValueError over HTTP", {1: "B-CLASS"}),
    ("some X - Reader header by a Big Reader", {}),
]


@pytest.mark.parametrize(("sentence", "tagged"), CASES)
def test_labels_of_words(sentence, tagged, modules):
    module = from_source(SOURCE)
    names = Names([module, *modules])
    words = sentence.split()
    labels = label_words(words, Definition("m", "m", "m", "", module.tree), names)
    assert {i: label for i, label in enumerate(labels) if label != "O"} == tagged


def test_scope_of_names(modules):
    module = from_source(SOURCE)
    names = Names([module, *modules])
    assert names.resolve("next_item", "m", "Writer") == "FUNCTION", "inherited"
    assert names.resolve("self.DONE", "m", "Writer") == "CONSTANT"
    assert names.resolve("next_item", "m") is None
    assert names.resolve("LockType", "m") == UNKNOWN, "a module written in C"
    assert names.resolve("json.JSONEncoder.encode", "m") == "FUNCTION" and names.resolve("json", "m") == "MODULE"
    assert names.resolve("JSONDecodeError", "m") == "CLASS", "one meaning in all modules"
    method = next(found for found in module.definitions if found.name == "Reader.next_item")
    assert label_words("set some_name by next_item ( )".split(), method, names) == ["O", "O", "O", "B-FUNCTION", "O", "O"]
    assert label_words("a LockType by os . path".split(), method, names) is None, "a name of unknown kind"


def test_tags_are_iob2(sets):
    for records in sets["tag"].values():
        check_records(records)
        labels = {label for record in records for label in record["labels"]}
        assert {"B-CLASS", "B-FUNCTION", "I-FUNCTION", "O"} <= labels
        assert not [record for record in records if problem_of_tags(record["labels"])]
    broken = [{"words": ["a", "b"], "labels": ["O", "I-CLASS"]}]
    with pytest.raises(DataError, match="record 1: word 2: I-CLASS after O"):
        check_records(broken)
    with pytest.raises(DataError, match="record 1: 2 words and 1 labels"):
        check_records([{"words": ["a", "b"], "labels": ["O"]}])


def test_most_frequent_tag_leaves_room(sets):
    """Words that validation alone has, which no count of words can tag, are many of its names."""
    seen = {word for record in sets["tag"]["train"] for word in record["words"]}
    named = [w for r in sets["tag"]["validation"] for w, label in zip(r["words"], r["labels"], strict=True) if label[:1] == "B"]
    assert sum(word not in seen for word in named) > 0.4 * len(named)


# --- questions --------------------------------------------------------------------------------------------------------


def test_answers_stand_at_their_offsets(sets):
    for records in sets["qa"].values():
        check_records(records)
        for record in records:
            for text, start in zip(*record["answers"].values(), strict=True):
                assert record["context"][start : start + len(text)] == text and text.strip() == text != ""
        assert len({record["id"] for record in records}) == len(records)
    record = json.loads(json.dumps(next(r for r in sets["qa"]["train"] if r["answers"]["text"])))
    record["answers"]["answer_start"][0] += 1
    with pytest.raises(DataError, match=r"record 1: the answer .* is not in its context at"):
        check_records([record])


def test_a_third_has_no_answer_in_every_form(sets):
    for records in sets["qa"].values():
        forms = {record["id"].split(":")[1] for record in records}
        for form in forms:
            mine = [not record["answers"]["text"] for record in records if record["id"].split(":")[1] == form]
            assert abs(sum(mine) - len(mine) / 3) <= 1, form
    assert {"return", "do", "if", "exception", "what"} <= {record["id"].split(":")[1] for record in sets["qa"]["train"]}


QA_SOURCE = '''
def half(x, digits):
    """Halve a number.

    Return x over two, rounded. Raise ValueError if x is odd. The argument digits defaults to 7.
    If x is None, nothing is done at all.
    """
class Box: "A thing with a lid. It has a size."
def show(x): "Show the thing on a screen."
def hide(x): "Hide the thing again, slowly."
'''


def test_questions_of_a_docstring():
    records = {record["id"]: record for record in make_qa([from_source(QA_SOURCE)])}
    answers = {record["question"]: record["answers"]["text"] for record in records.values()}
    assert [a for q, a in answers.items() if "returned by half" in q or "half return" in q] == [["x over two"]]
    assert [a for q, a in answers.items() if "half raise" in q and "When" not in q] == [["ValueError"]]
    for key, record in records.items():
        if key.endswith("none"):
            assert record["answers"] == {"text": [], "answer_start": []}
            assert "return" not in record["id"] or "half" not in record["question"]
    elsewhere = [record for key, record in records.items() if key.endswith(("do:none", "what:none"))]
    for record in elsewhere:
        name = record["question"].rstrip("?").split(" is ")[-1].split()[-1 if record["question"].startswith("What is") else 2]
        assert f"{name}(" not in record["context"]


# --- pairs and scores -------------------------------------------------------------------------------------------------


def test_each_half_is_as_often_yes_as_no(sets):
    for records in sets["pairs"].values():
        for side in ("first", "second"):
            counts: dict[str, list[int]] = {}
            for record in records:
                counts.setdefault(record[side], [0, 0])[record["label"] == "yes"] += 1
            assert len(counts) > 8 and all(pair == [1, 1] for pair in counts.values())
        assert len({(record["first"], record["second"]) for record in records}) == len(records)


def test_yes_is_one_docstring_and_no_is_another_of_the_module(modules, sets):
    for records in sets["pairs"].values():
        owner: dict[str, tuple[str, str]] = {}
        for module in modules:
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


def test_scores_are_jaccard_of_identifiers(modules, sets):
    functions = [node for module in modules for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef)]
    sources = {source_of(node): identifiers(node) for node in functions}
    for record in sets["scores"]["train"][::20]:
        first, second = (sources[record[side]] for side in ("first", "second"))
        assert record["score"] == round(len(first & second) / len(first | second), 4)
    scores = [record["score"] for record in sets["scores"]["train"]]
    assert min(scores) < 0.1 and 0.6 < max(scores) < 0.7 and 0.2 < sum(scores) / len(scores) < 0.6


def test_no_cue_by_length(sets):
    for name in NAMES:
        for split, records in sets[name].items():
            if len(records) > 100:
                assert not measure(records).found_cues, (name, split)


def test_a_planted_cue_is_found(sets):
    pairs = [dict(record) for record in sets["pairs"]["train"]]
    for record in pairs:
        record["second"] += " indeed" * 3 * (record["label"] == "no" and len(record["second"]) < 250)
    assert "accuracy by length of the second" in measure(pairs).found_cues
    longer = [r if r["answers"]["text"] else r | {"context": r["context"] * 3} for r in sets["qa"]["train"]]
    assert "answered or not, by length of the context" in measure(longer).found_cues
    early = [r for r in sets["qa"]["train"] if all(start < 0.3 * len(r["context"]) for start in r["answers"]["answer_start"])]
    assert "answers in the fullest tenth of the contexts" in measure(early).found_cues
    longer = [r | {"first": r["first"] + " pass" * int(20 * r["score"])} for r in sets["scores"]["train"]]
    assert "correlation with difference" in measure(longer).found_cues


def test_threshold_is_the_best_of_all():
    draw = random.Random(0)
    values = [draw.randrange(8) for _ in range(60)]
    labels = [draw.random() < value / 10 for value in values]
    rules = [[value >= t for value in values] for t in range(10)]
    best = max(sum(a == b for a, b in zip(rule, labels, strict=True)) for rule in rules)
    worst = min(sum(a == b for a, b in zip(rule, labels, strict=True)) for rule in rules)
    assert threshold_accuracy(values, labels) == max(best, 60 - worst) / 60
    assert allowed_accuracy([True, False] * 50) == pytest.approx(0.52 + 0.15)
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1) and correlation([1, 1], [0, 2]) == 0


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(tmp_path, monkeypatch, capsys, modules):
    monkeypatch.setattr("data.made.modules.read_modules", lambda **_: modules)
    out = tmp_path / "new" / "pairs"
    assert main(["task", "pairs", "--out", str(out), "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    index = json.loads((out / "data.json").read_text())
    lines = {split: (out / f"{split}.jsonl").read_text().splitlines() for split in ("train", "validation")}
    assert index["seed"] == 3 and index["files"]["train.jsonl"]["records"] == len(lines["train"]) > 50
    assert [json.loads(line) for line in lines["train"]] == make_set("pairs", modules, 3)["train"]
    assert "0 modules on both sides" in shown and "accuracy by ratio" in shown and f"{len(lines['train']):,}" in shown
    before = (out / "train.jsonl").read_bytes()
    assert main(["task", "tag", "--out", str(out)]) == 2
    assert "is there already, and is not an empty folder" in capsys.readouterr().err
    assert (out / "train.jsonl").read_bytes() == before and [path.name for path in out.parent.iterdir()] == ["pairs"]


def test_too_few_modules_are_named():
    with pytest.raises(DataError, match=r"pairs: no .* records can be made of 1 modules"):
        make_set("pairs", read_modules(lambda name: name == "this"))
