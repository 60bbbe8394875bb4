"""What can go wrong with `python -m eval`: one line that begins with "error: ", and code 2."""

import pytest

from eval.__main__ import main
from tests.fault.test_command import assert_one_clear_line
from tests.runs import command


@pytest.fixture
def place(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("one\n")
    (tmp_path / "bad.txt").write_bytes(b"one\n\xc3\x28\n")
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


BAD = {
    "bleu a.txt b.txt": ("a.txt has 2", "b.txt has 1"),
    "bleu a.txt": ("HYP REF…",),
    "chrf a.txt none.txt": ("none.txt: no such file",),
    "rouge bad.txt a.txt": ("bad.txt, line 2: not UTF-8 (byte 0xc3",),
    "rouge a.txt bad.txt": ("bad.txt, line 2",),
    "rouge a.txt a.txt --kinds rouge0": ("rouge0", "rouge1"),
    "f1 empty.txt empty.txt": ("empty.txt is empty",),
    "bleu - -": ("standard input",),
    "bleu --system x a.txt": ("--system x: NAME=FILE",),
    "bleu --system =a.txt b.txt": ("--system =a.txt",),
    "bleu --system x=a.txt --system x=b.txt a.txt": ("a system 'x' already",),
    "bleu --system x=a.txt --system y=a.txt": ("a file of references",),
    "bleu a.txt a.txt --smooth exp --smooth-value 1": ("smooth='exp' with smooth_value=1.0",),
    "bleu a.txt a.txt --samples -1": ("--samples -1",),
    "bleu a.txt a.txt --seed -1": ("--seed -1",),
    "bleu a.txt a.txt --differ -1": ("--differ -1",),
    "bleu a.txt a.txt --per-example none/x": ("none/x",),
    "chrf a.txt a.txt --char-order 0": ("char_order=0",),
    "meteor a.txt a.txt --alpha 2": ("alpha=2",),
    "meteor a.txt a.txt --wordnet .": ("index.noun",),
    "bertscore a.txt a.txt --model none": ("none",),
    "bertscore a.txt a.txt --model .": ("config.json",),
    "perplexity none a.txt": ("none",),
}


@pytest.mark.parametrize("given", BAD)
def test_a_bad_line(given, place, monkeypatch):
    monkeypatch.chdir(place)
    assert_one_clear_line(command(*given.split(), main=main), *BAD[given])


def test_empty_texts_have_defined_scores(tmp_path):
    (tmp_path / "a.txt").write_text("\n\nword\n")
    (tmp_path / "b.txt").write_text("\nword\n\n")
    for score in ("bleu", "chrf", "rouge", "meteor", "f1"):
        said = command(score, tmp_path / "a.txt", tmp_path / "b.txt", main=main)
        assert said.code == 0 and "nan" not in said.out, said
