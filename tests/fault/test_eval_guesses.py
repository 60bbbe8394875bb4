"""Files of records whose fields are not named: what is guessed is said, and what could be either is refused."""

import json

import pytest

from eval.__main__ import main
from tests.fault.test_command import assert_one_clear_line
from tests.runs import command

RECORDS = [{"prediction": "the cat sat there", "reference": "the cat sat there"}] * 3


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_guess_is_said_of_json_lines_too(tmp_path):
    path = write(tmp_path / "a.jsonl", RECORDS)
    said = command("bleu", path, path, main=main)
    assert said.code == 0 and said.err.splitlines()[:2] == [
        f"note: {path}: the hypotheses are the field 'prediction' of its records",
        f"note: {path}: the references are the field 'reference' of its records",
    ]
    named = command("bleu", path, path, "--hypothesis-field", "prediction", "--reference-field", "reference", main=main)
    assert named.out == said.out and "field" not in named.err


def test_several_fields_that_may_be_the_reference_are_refused(tmp_path):
    """SQuAD's records have a text beside their answers."""
    hypotheses = write(tmp_path / "hypotheses.jsonl", RECORDS)
    references = write(tmp_path / "references.jsonl", [{"text": "a question", "answer": "the cat sat there"}] * 3)
    said = command("f1", hypotheses, references, main=main)
    assert_one_clear_line(said, "line 1: the fields answer, text may each be the references: name one by --reference-field")
    named = command("f1", hypotheses, references, "--reference-field", "answer", main=main)
    assert named.code == 0 and "f1 = 100.00" in named.out.lower()


def test_a_field_that_changes_within_a_file_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [*RECORDS, {"output": "x", "reference": "y"}])
    said = command("bleu", path, path, main=main)
    assert_one_clear_line(said, "line 4: the hypotheses are the field 'output' here, and 'prediction' before")


@pytest.mark.parametrize("score, is_noted", [("bleu", True), ("rouge", True), ("chrf", True), ("f1", False)])
def test_empty_hypotheses_are_counted(tmp_path, score, is_noted):
    (tmp_path / "hypotheses").write_text("the cat sat there\n \n\n")
    (tmp_path / "references").write_text("the cat sat there\n" * 3)
    said = command(score, tmp_path / "hypotheses", tmp_path / "references", main=main)
    assert said.code == 0 and ("note: 2 of 3 hypotheses are empty\n" in said.err) == is_noted, "of F1 an empty answer is one"
    swapped = command(score, tmp_path / "references", tmp_path / "hypotheses", main=main)
    assert swapped.code == 0 and ("note: 2 of 3 examples have an empty reference\n" in swapped.err) == is_noted


def test_a_text_beside_itself_is_said(tmp_path):
    (tmp_path / "a").write_text("the cat sat there\n")
    (tmp_path / "b").write_text("the cat sat there\n")
    other, same = (command("wer", tmp_path / "a", tmp_path / name, main=main) for name in "ba")
    note = f"note: {tmp_path / 'a'} holds hypotheses and references: each text is compared with itself\n"
    assert (other.err, same.err) == ("", note) and other.out == same.out
    records = write(tmp_path / "a.jsonl", RECORDS)
    assert "with itself" not in command("wer", records, records, main=main).err, "a field each"
