"""What cannot be learned as sequence to sequence: told in a line that names the record and the option."""

import json

import pytest

import model.__main__
import model.hub
from tests.conftest import randomized, tiny_config
from tests.folders import byte_level, llama, write_tokenizer
from tests.invariant.train.test_seq2seq_runs import FOLDER, SETTINGS, options
from tests.runs import command
from tests.seq2seq import write_folder, write_pairs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("seq2seq")
    write_pairs(place / "pairs.jsonl", 30)
    write_folder(place / "bart", "bart")
    return place


GOOD = {"source": "one two", "target": "two one"}
BAD = {  # the last record: what is said of it
    '{"target": "a"}': "bad.jsonl:3: no column 'source'; its columns: 'target'. Name it by --seq2seq.source COLUMN",
    '{"source": "a", "targt": "b"}': "no column 'target'; its columns: 'source', 'targt'. Name it by --seq2seq.target COLUMN",
    '{"source": 5, "target": "a"}': "bad.jsonl:3: 'source' is 5, not a string (int)",
    '{"source": "a", "target": null}': "bad.jsonl:3: 'target' is None, not a string (NoneType)",
    '{"source": "a", "target": ["b"]}': "bad.jsonl:3: 'target' is ['b'], not a string (list)",
    '{"source": "", "target": "a"}': "bad.jsonl:3: 'source' is empty",
    '{"source": "a", "target": " \\n"}': "bad.jsonl:3: 'target' is empty",
    '["a", "b"]': "bad.jsonl:3: a record has named keys, and this is list",
}


@pytest.mark.parametrize("record", BAD)
@pytest.mark.parametrize("held_out", [False, True], ids=["corpus", "validation"])
def test_records(place, record, held_out, tmp_path):
    lines = [json.dumps(GOOD | {"source": f"one two {number}"}) for number in range(2)]
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines, record]))
    files = {"validation": tmp_path / "bad.jsonl"} if held_out else {"corpus": tmp_path / "bad.jsonl"}
    settings = {name: value for name, value in SETTINGS.items() if name != "val-fraction" or not held_out}
    said = command(*options(place, settings, **files), "--out", tmp_path / "run")
    assert said.code == 2 and BAD[record] in said.err and "bad.jsonl" in said.err, said.err
    assert "training a tokenizer" not in said.out


def test_overlong_texts(place, tmp_path):
    long = GOOD | {"target": "word " * 60}
    (tmp_path / "pairs.jsonl").write_text((place / "pairs.jsonl").read_text() + json.dumps(long) + "\n")
    line = options(place, corpus=tmp_path / "pairs.jsonl", steps=2)
    said = command(*line, "--out", tmp_path / "error")
    assert said.code == 2 and "pairs.jsonl:31: its target has " in said.err, said.err
    assert "more than 48: --seq2seq.max-target says" in said.err and "--seq2seq.overlong cut (or drop)" in said.err
    for way, what in (("cut", "cut at their ends"), ("drop", "left out")):
        said = command(*line, "--seq2seq.overlong", way, "--out", tmp_path / way)
        assert said.code == 0, said.err
        assert f"1 record of more than 48 tokens of source or 48 of target {what}: " in said.out and ":31" in said.out
    said = command(*line, "--seq2seq.overlong", "drop", "--seq2seq.max-source", 2, "--out", tmp_path / "none")
    assert said.code == 2 and "--seq2seq.overlong drop leaves none of " in said.err
    said = command(*line, "--seq2seq.max-target", 200, "--out", tmp_path / "room")
    assert said.code == 0, said.err  # T5's relative positions end nowhere


REFUSED = {
    "--seq2seq.max-target 1": "--seq2seq.max-target 1: must be at least 2",
    "--seq2seq.generated -1": "--seq2seq.generated -1: must be at least 0",
    "--seq2seq.target source": "--seq2seq.source source: the target is the same column",
    "--preset gpt2": "trains networks of the architecture 'encoder-decoder'; --preset gpt2 is one of 'decoder'",
    "--preset bart-base --seq2seq.max-source 49": "--seq2seq.max-source 49: this network reads at most 48 tokens",
    "--seq2seq.bleu --seq2seq.generated 0": "--seq2seq.bleu would have no effect",
    "--text-key text": "--text-key would have no effect",
    "--dedup": "--dedup would have no effect",
    "--separator </s>": "--separator would have no effect",
}


@pytest.mark.parametrize("words", REFUSED)
def test_options(place, words, tmp_path):
    said = command(*options(place), *words.split(), "--out", tmp_path / "run")
    assert said.code == 2 and REFUSED[words] in said.err, said.err


def test_built_in_text_has_no_pairs(place, tmp_path):
    said = command(*options(place, corpus="stdlib-docs"), "--out", tmp_path / "run")
    assert said.code == 2 and "stdlib-docs has documents, and no records with columns" in said.err


def test_folders_that_write_no_answers(place, tmp_path):
    llama(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama", byte_level(["</s>"]), ["</s>"])
    said = command(*options(place, FOLDER, init=tmp_path / "llama"), "--out", tmp_path / "run")
    assert said.code == 2 and "is one of 'decoder'" in said.err
    model.hub.save(randomized(tiny_config("vaswani", decoder_start_id=None, vocab_size=331)), tmp_path / "startless")
    write_tokenizer(tmp_path / "startless", byte_level(["</s>"]), ["</s>"], eos_token="</s>")
    said = command(*options(place, FOLDER, init=tmp_path / "startless", context=32), "--out", tmp_path / "run")
    assert said.code == 2 and "no decoder_start_token_id" in said.err, said.err


def test_generate_names_the_other_option(place, tmp_path):
    llama(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama", byte_level(["</s>"]), ["</s>"], eos_token="</s>")
    cases = {
        (place / "bart", "--prompt", "a"): "--prompt is for a decoder, which continues a text; this is an encoder-decoder",
        (place / "bart",): "there is no text to answer; this is an encoder-decoder",
        (tmp_path / "llama", "--source", "a"): "--source is for an encoder-decoder; this decoder continues a text: --prompt",
    }
    for words, expected in cases.items():
        said = command("generate", *words, main=model.__main__.main)
        assert said.code == 2 and expected in said.err and not said.out, said.err
    assert "--source TEXT" in command("generate", place / "bart", main=model.__main__.main).err
    assert SETTINGS["objective"] == "seq2seq"
