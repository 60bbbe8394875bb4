"""What can go wrong with `python -m eval`: one line that begins with "error: ", and code 2."""

import gzip
import json
import signal
import subprocess
import sys
import time

import pytest

from eval.__main__ import main
from tests.fault.test_command import assert_one_clear_line
from tests.runs import ROOT, command


@pytest.fixture
def place(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("one\n")
    (tmp_path / "bad.txt").write_bytes(b"one\n\xc3\x28\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text('"one"\n{"answers": []}\n')
    (tmp_path / "digits.jsonl").write_text("1" * 5000 + '\n"two"\n')
    torn = bytearray(gzip.compress(b"".join(b"%d\n" % n for n in range(9999))))
    torn[2000:2100] = bytes(100)
    (tmp_path / "torn.gz").write_bytes(torn)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "one.json").write_text('{"texts": ["one", "two"]}')
    return tmp_path


BAD = {
    "bleu a.txt b.txt": ("a.txt has 2", "b.txt has 1"),
    "bleu a.txt": ("HYP REF…",),
    "chrf a.txt none.txt": ("none.txt: no such file",),
    "rouge bad.txt a.txt": ("bad.txt, line 2: not UTF-8 (byte 0xc3",),
    "rouge a.txt bad.txt": ("bad.txt, line 2",),
    "rouge a.txt a.txt --kinds rouge0": ("--kinds rouge0: kinds are rouge1",),
    "rouge --kinds rouge1 rougeL a.txt a.txt": ("--kinds a.txt a.txt", "files come before --kinds"),
    "f1 empty.txt empty.txt": ("empty.txt is empty",),
    "bleu - -": ("standard input",),
    "bleu --system x a.txt": ("--system x: expected NAME=FILE",),
    "bleu --system =a.txt b.txt": ("--system =a.txt",),
    "bleu --system x=a.txt --system x=b.txt a.txt": ("a system 'x' already",),
    "bleu --system x=a.txt --system y=a.txt": ("a file of references",),
    "bleu a.txt a.txt --smooth exp --smooth-value 1": ("--smooth-value would have no effect",),
    "bleu a.txt a.txt --test bootstrap": ("--test would have no effect: it is of several systems",),
    "bleu a.txt a.txt --differ 1": ("--differ would have no effect",),
    "bleu a.txt a.txt --hypothesis-field text": ("--hypothesis-field would have no effect: a text is a line of its file",),
    "bleu a.txt empty.jsonl --hypothesis-field text": ("--hypothesis-field would have no effect",),
    "bleu --system x=a.txt --system y=a.txt a.txt --reference-field text": ("--reference-field would have no effect",),
    "bleu a.txt a.txt --tokenize none --force": ("--force would have no effect: --tokenize none says it already",),
    "meteor a.txt a.txt --gamma 0 --beta 3": ("--beta would have no effect: --gamma 0 leaves no penalty",),
    "bleu a.txt a.txt --samples -1": ("--samples -1",),
    "bleu a.txt a.txt --samples 39": ("--samples 39: from 40",),
    "bleu a.txt b.txt --per-example a.txt": ("--per-example a.txt: that file is read",),
    "bleu a.txt b.txt --per-example ./b.txt": ("--per-example b.txt: that file is read",),
    "f1 a.txt empty.jsonl --version 1.1": ("empty.jsonl, line 2, field 'answers': 0 texts",),
    "bleu a.txt empty.jsonl": ("empty.jsonl, line 2",),
    "bleu a.txt digits.jsonl": ("digits.jsonl, line 1",),
    "bleu torn.gz a.txt": ("torn.gz: it cannot be read",),
    "bleu a.txt a.txt --seed -1": ("--seed -1",),
    "bleu a.txt a.txt --differ -1": ("--differ -1",),
    "bleu a.txt a.txt --per-example none/x": ("--per-example none/x: No such file",),
    "chrf a.txt a.txt --char-order 0": ("char_order=0",),
    "meteor a.txt a.txt --alpha 2": ("alpha=2",),
    "meteor a.txt a.txt --wordnet .": ("index.noun",),
    "bertscore a.txt a.txt --model none": ("none",),
    "bertscore a.txt a.txt --model .": ("config.json",),
    "perplexity none a.txt": ("none",),
    "bleu x.parquet a.txt": ("x.parquet: not a Parquet file that can be read",),
    "bleu a.txt one.json": ("one.json: one object, with the keys 'texts', and no list of records",),
}


@pytest.mark.parametrize("given", BAD)
def test_a_bad_line(given, place, monkeypatch):
    monkeypatch.chdir(place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    assert_one_clear_line(command(*given.split(), main=main), *BAD[given])
    assert before == {path.name: path.read_bytes() for path in place.iterdir()}, "nothing is lost, and nothing half-made stays"


def test_empty_texts_have_defined_scores(tmp_path):
    (tmp_path / "a.txt").write_text("\n\nword\n")
    (tmp_path / "b.txt").write_text("\nword\n\n")
    for score in ("bleu", "chrf", "rouge", "meteor", "f1"):
        said = command(score, tmp_path / "a.txt", tmp_path / "b.txt", main=main)
        assert said.code == 0 and "nan" not in said.out, said


def test_a_result_that_is_there_stays_when_another_fails(place):
    (place / "each").write_text("kept")
    said = command("bleu", place / "a.txt", place / "b.txt", "--per-example", place / "each", main=main)
    assert said.code == 2 and (place / "each").read_text() == "kept"


def test_questions_without_an_answer(tmp_path):
    (tmp_path / "h").write_text("\nParis\nin Rome\n")
    answers = {"text": ["Paris", "paris, France"], "answer_start": [1, 5]}, {"text": [], "answer_start": []}
    lines = [json.dumps({"answers": found}) for found in ([], *answers)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    said = command("f1", tmp_path / "h", tmp_path / "r.jsonl", main=main)
    assert said.code == 0 and "exact match = 66.67" in said.out and "F1 = 66.67" in said.out


def test_a_reader_that_leaves_and_an_interrupt(place):
    """In processes of their own: a closed pipe is no error to tell, and Ctrl-C no traceback."""
    (place / "c.txt").write_text("one\nthree\n")
    pair = [sys.executable, "-m", "eval", "bleu", str(place / "a.txt"), str(place / "c.txt")]
    process = subprocess.Popen(pair, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
    each = place / "each"
    reading = [*pair[:4], "-", pair[4], "--per-example", str(each)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # A shell's background job, which these tests may be, ignores SIGINT, and so would its children.
    waiting = subprocess.Popen(reading, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **pipes)
    until(lambda: [path for path in place.iterdir() if "each.partial" in path.name])
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(timeout=60) == 130 and waiting.stderr.read() == b"interrupted\n"
    assert not [path for path in place.iterdir() if "each" in path.name]


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
