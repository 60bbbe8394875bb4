"""Names in documentation sentences, of `data task tag`: labels from the syntax tree, IOB2."""


import pytest

from data.config import DataError
from data.made.modules import Definition
from data.made.names import UNKNOWN, Names
from data.made.sets import check_records
from data.made.tag import label_words, problem_of_tags
from tests.made import from_source, made, modules

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
def test_labels_of_words(sentence, tagged):
    module = from_source(SOURCE)
    names = Names([module, *modules()])
    words = sentence.split()
    labels = label_words(words, Definition("m", "m", "m", "", module.tree), names)
    assert {i: label for i, label in enumerate(labels) if label != "O"} == tagged


def test_scope_of_names():
    module = from_source(SOURCE)
    names = Names([module, *modules()])
    assert names.resolve("next_item", "m", "Writer") == "FUNCTION", "inherited"
    assert names.resolve("self.DONE", "m", "Writer") == "CONSTANT"
    assert names.resolve("next_item", "m") is None
    assert names.resolve("LockType", "m") == UNKNOWN, "a module written in C"
    assert names.resolve("json.JSONEncoder.encode", "m") == "FUNCTION" and names.resolve("json", "m") == "MODULE"
    assert names.resolve("JSONDecodeError", "m") == "CLASS", "one meaning in all modules"
    method = next(found for found in module.definitions if found.name == "Reader.next_item")
    assert label_words("set some_name by next_item ( )".split(), method, names) == ["O", "O", "O", "B-FUNCTION", "O", "O"]
    assert label_words("a LockType by os . path".split(), method, names) is None, "a name of unknown kind"


def test_tags_are_iob2():
    for records in made("tag").values():
        check_records(records)
        labels = {label for record in records for label in record["labels"]}
        assert {"B-CLASS", "B-FUNCTION", "I-FUNCTION", "O"} <= labels
        assert not [record for record in records if problem_of_tags(record["labels"])]
    broken = [{"words": ["a", "b"], "labels": ["O", "I-CLASS"]}]
    with pytest.raises(DataError, match="record 1: word 2: I-CLASS after O"):
        check_records(broken)
    with pytest.raises(DataError, match="record 1: 2 words and 1 labels"):
        check_records([{"words": ["a", "b"], "labels": ["O"]}])


def test_most_frequent_tag_leaves_room():
    """Words that validation alone has, which no count of words can tag, are many of its names."""
    seen = {word for record in made("tag")["train"] for word in record["words"]}
    named = [w for r in made("tag")["validation"] for w, label in zip(r["words"], r["labels"], strict=True) if label[:1] == "B"]
    assert sum(word not in seen for word in named) > 0.4 * len(named)
