"""Faults of `python -m data self-instruct` and `replies`: one clear line, code 2, and no file that looks like success."""

from pathlib import Path

import pytest

import data.__main__
import model.hub
from tests.conftest import randomized, tiny_config
from tests.fault.test_command import assert_one_clear_line
from tests.policy_runs import write_place
from tests.records import write_rows
from tests.runs import Said, command

SEEDS = [{"instruction": f"Say something about number {n} of these"} for n in range(8)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = write_place(tmp_path_factory.mktemp("bad"))
    write_rows(place / "seeds.jsonl", SEEDS)
    write_rows(place / "few.jsonl", [*SEEDS[:5], SEEDS[0], {"text": "no"}])
    write_rows(place / "none.jsonl", [{"text": "no"}, {"question": "?"}])
    model.hub.save(model.hub.load(place / "base", head="sequence", labels=1), place / "scores")
    model.hub.save(randomized(tiny_config("bert")), place / "encoder")
    write_rows(place / "no_answer.jsonl", [{"prompt": "a"}])
    write_rows(place / "turns.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    (place / "mine.py").write_text("def wrong(completions):\n    return completions\n")
    return place


def refused(place: Path, line: str) -> Said:
    words = [str(place / word) if (place / word).exists() or word.startswith("OUT") else word for word in line.split()]
    return command(*words, main=data.__main__.main)


INSTRUCT = {
    "--seeds none.jsonl --out OUT": ["none.jsonl: no instruction in 2 records; the first: ", "none.jsonl:1: no prompt"],
    "--seeds few.jsonl --out OUT": ["few.jsonl: 5 different instructions, and a request needs 8"],
    "--seeds absent.jsonl --out OUT": ["absent.jsonl"],
    "--seeds seeds.jsonl --out base": ["base is there already, and not of this command"],
    "--seeds seeds.jsonl --out OUT --count 0": ["--count 0: must be at least 1"],
    "--seeds seeds.jsonl --out OUT --temperature 0 --top-p 0.9": ["--top-p would have no effect"],
    "--seeds seeds.jsonl --out OUT --template llama-3": ["--template llama-3 needs control tokens that the tokenizer"],
    "--seeds seeds.jsonl --out OUT --device tpu": ["--device tpu"],
}


@pytest.mark.parametrize("options", INSTRUCT)
def test_self_instruct(place, options):
    said = refused(place, f"self-instruct base {options}")
    assert said.code == 2
    for part in INSTRUCT[options]:
        assert part in said.err, said.err
    assert not (place / "OUT").exists() and "wrote" not in said.out


@pytest.mark.parametrize("name, kind", [("scores", "head 'sequence'"), ("encoder", "encoder")])
@pytest.mark.parametrize(
    "line",
    [
        "self-instruct MODEL --seeds seeds.jsonl --out OUT",
        "replies MODEL train.jsonl --best-of 2 --score exact --out OUT.jsonl",
    ],
)
def test_a_network_that_writes_no_text(place, name, kind, line):
    said = refused(place, line.replace("MODEL", name))
    assert_one_clear_line(said, f"{place / name} writes no text ({kind}): name a decoder with a language-model head")
    assert not (place / "OUT").exists() and not (place / "OUT.jsonl").exists()


REPLIES = {
    "train.jsonl --best-of 0 --score exact": ["--best-of 0: must be at least 1"],
    "train.jsonl --best-of 2 --score exakt": ["--score exakt: 'exakt' is not known; one of exact"],
    "train.jsonl --best-of 2 --score mine.py:wrong": ["--score ", "mine.py:wrong returned "],
    "train.jsonl --best-of 2 --score exact --score-workers 2": ["--score-workers would have no effect"],
    "train.jsonl --best-of 2 --score exact --temperature 0": ["--temperature 0.0: must be finite and above 0"],
    "train.jsonl --best-of 2 --score exact --score-weights 0": ["--score-weights: all are 0"],
    "train.jsonl --best-of 2 --score exact --at-least 9": ["no reply to keep of 12 prompts (12 below --at-least; mean"],
    "no_answer.jsonl --best-of 2 --score exact": ["--score exact: the record has no column 'answer'", "no_answer.jsonl:1"],
    "none.jsonl --best-of 2 --score exact": ["none.jsonl:1: no prompt"],
    "seeds.jsonl --best-of 2 --score length:4 --template NONE": ["NONE"],
}


@pytest.mark.parametrize("options", REPLIES)
def test_replies(place, options):
    more = "" if "--template" in options else " --template chatml"
    options_of = options.replace("mine.py:wrong", f"{place / 'mine.py'}:wrong")
    said = refused(place, f"replies base {options_of}{more} --max-reply 4 --truncated keep --out OUT.jsonl")
    assert said.code == 2 and "--reward" not in said.err, said.err
    for part in REPLIES[options]:
        assert part in said.err, said.err
    assert not list(place.glob("*OUT*"))


def test_turns_without_a_template(place):
    said = refused(place, "replies base turns.jsonl --best-of 2 --score length:4 --out OUT.jsonl")
    assert_one_clear_line(said, f"{place / 'turns.jsonl'}:1: its prompt has turns, and the network has no chat template")
    said = refused(place, "replies base turns.jsonl --best-of 2 --score length:4 --out train.jsonl")
    assert_one_clear_line(said, "train.jsonl is there already: nothing is overwritten")
