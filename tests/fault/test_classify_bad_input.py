"""Records that cannot be classified, and folders that do not classify: each message names the record or the folder."""

import json

import pytest

import model.__main__
import model.hub
import train.tasks.classify
from data.config import DataError
from data.sources.records import Rows
from data.transforms.framing import Framer, choose_pad_id, read_pair_template
from data.transforms.labels import label_name, training_labels
from tests.conftest import randomized, tiny_config
from tests.folders import byte_level, write_tokenizer
from tests.oracle.train.test_classify import SPECIALS, template, write_labelled
from tests.runs import command
from train.config import OptimizerConfig, TrainConfig
from train.runs.errors import TrainError

GOOD = [{"text": f"text {n} of {label}", "label": label} for n in range(12) for label in ("a", "b")]
BASE = ["--objective", "classify", "--device", "cpu", "--threads", 1, "--steps", 2]


def start(tmp_path, rows, *options, validation=None):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [*BASE, "--corpus", tmp_path / "corpus.jsonl", "--cache", tmp_path / "cache", "--out", tmp_path / "run", *options]
    if validation is not None:
        (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in validation))
        line += ["--validation", tmp_path / "held.jsonl"]
    said = command(*line)
    assert said.code == 2, said.out
    return said.err


BAD = {  # records, options: what the message holds
    "no label": ([*GOOD, {"text": "x", "label": None}], [], ["corpus.jsonl:25", "'label' is missing (null)"]),
    "empty label": ([*GOOD, {"text": "x", "label": "  "}], [], ["corpus.jsonl:25", "'label' is empty"]),
    "no column": ([*GOOD, {"text": "x"}], [], ["corpus.jsonl:25: no column 'label'", "--classify.label"]),
    "wrong column": (GOOD, ["--classify.text", "body"], ["no column 'body'; its columns: 'text', 'label'", "--classify.text"]),
    "wrong pair": (GOOD, ["--classify.pair", "body"], ["no column 'body'", "--classify.pair"]),
    "a number": ([*GOOD, {"text": "x", "label": 0.5}], [], ["corpus.jsonl:25", "0.5, a float", "an integer or a boolean"]),
    "a list": ([*GOOD, {"text": "x", "label": ["a"]}], [], ["corpus.jsonl:25", "a list", "--classify.multi"]),
    "no text": ([*GOOD, {"text": None, "label": "a"}], [], ["corpus.jsonl:25", "'text' is null, not a string"]),
    "one class": ([{"text": f"text {n}", "label": "a"} for n in range(9)], [], ["one label, 'a', in", "nothing to tell apart"]),
    "no labels": (
        [{"text": f"text {n}", "label": []} for n in range(9)], ["--classify.multi"], ["no label in", "nothing to tell apart"]
    ),
    "separator": (GOOD, ["--classify.separator", ";"], ["--classify.separator would have no effect", "--classify.multi"]),
    "smoothing": (GOOD, ["--classify.multi", "--label-smoothing", 0.1], ["--label-smoothing", "--classify.multi"]),
    "no room": (GOOD, ["--classify.max-length", 2], ["2 tokens have no room for a text: 2 are special tokens"]),
    "too long": (
        [*GOOD, {"text": "a " * 99, "label": "a"}],
        ["--classify.overlong", "error", "--context", 64],
        ["corpus.jsonl:25 has ", "there is room for 64", "--classify.overlong cut or drop"],
    ),
    "long": (GOOD, ["--classify.max-length", 4096], ["--classify.max-length 4096: the rows of this run have at most "]),
    "max length": (GOOD, ["--classify.max-length", 0], ["--classify.max-length 0: must be at least 1"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_run_is_refused(name, tmp_path):
    rows, options, parts = BAD[name]
    message = start(tmp_path, rows, *options)
    assert all(part in message for part in parts), message


def test_a_label_that_validation_alone_has(tmp_path):
    message = start(tmp_path, GOOD, validation=[{"text": "y", "label": "a"}, {"text": "x", "label": "c"}])
    assert "held.jsonl:2: the label 'c' comes in no training record" in message and "--validation FILE" in message


def test_the_same_words_in_several_types(tmp_path):
    assert [label_name(value, "", "") for value in (True, False, 3, " x ")] == ["true", "false", "3", "x"]
    rows = Rows([{"label": value} for value in (10, "9", True, "b2", "B10")], [""] * 5, [""] * 5)
    assert training_labels(rows, Rows([], [], []), "label", None) == ("9", "10", "b2", "B10", "true")
    assert training_labels(rows, Rows([], [], []), "label", None, ("true", "9", "B10", "b2", "10"))[0] == "true"
    assert training_labels(rows, Rows([], [], []), "label", None, ("true", "9", "B10", "b2"))[0] == "9"


def test_an_empty_text_without_a_frame(tmp_path):
    write_tokenizer(tmp_path, byte_level(SPECIALS), SPECIALS)
    from data.tokenizer.open import load_tokenizer

    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="the text is empty"):
        Framer(tokenizer, max_length=8)("")
    assert choose_pad_id(tokenizer, 331) == 0 and choose_pad_id(tokenizer, None) == 331
    assert choose_pad_id(tokenizer, 331, [5]) == 5
    with pytest.raises(DataError, match="Unheard"):
        read_pair_template({"type": "Unheard"})


def test_an_encoder_decoder_whose_tokenizer_has_no_end(tmp_path):
    """BART's and T5's classes look for it."""
    folder = tmp_path / "base"
    write_tokenizer(folder, byte_level(SPECIALS, template("<s> $A", ("<s>", 330))), SPECIALS)
    model.hub.save(randomized(tiny_config("bart", vocab_size=340, eos_id=331, pad_id=0)), folder)
    message = start(tmp_path, GOOD, "--init", folder)
    assert "BartForSequenceClassification reads a text off its last eos, id 331" in message
    assert "this tokenizer puts nothing behind" in message


def test_settings_of_another_kind():
    settings = train.tasks.classify.ClassifySettings(multi=True)
    with pytest.raises(TrainError, match="--z-loss"):
        train.tasks.classify.check_classify_settings(settings, TrainConfig(optimizer=OptimizerConfig(z_loss=1e-4)))


# ---- predict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier of three labels without names."""
    folder = tmp_path_factory.mktemp("folder") / "model"
    write_tokenizer(folder, byte_level(SPECIALS, template("<s> $A </s>", ("<s>", 330), ("</s>", 331))), SPECIALS)
    config = tiny_config("bert", head="sequence", labels=3, vocab_size=340, context=64)
    model.hub.save(randomized(config), folder)
    return folder


def predict(*options):
    said = command("predict", *options, main=model.__main__.main)
    assert said.code == 2 and not said.out, said
    return said.err


def test_a_folder_without_names_has_transformers_names(folder, tmp_path):
    (tmp_path / "in.txt").write_text("one\n\ntwo\n")
    said = command("predict", folder, tmp_path / "in.txt", main=model.__main__.main)
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert len(rows) == 3 and [*rows[0]["probabilities"]] == ["LABEL_0", "LABEL_1", "LABEL_2"] and rows[1]["text"] == ""


HEADS = {"lm": "gpt2", "mlm": "bert", "none": "bert", "nsp": "bert"}


@pytest.mark.parametrize("head", HEADS)
def test_a_folder_that_does_not_classify(head, folder, tmp_path):
    corpus = write_labelled(tmp_path / "corpus.jsonl", records=3)
    model.hub.save(randomized(tiny_config(HEADS[head], head=head, labels=2)), tmp_path / "model")
    message = predict(tmp_path / "model", corpus)
    assert f"{tmp_path / 'model'} has the head '{head}', which classifies no texts" in message


def test_regression_is_a_number(tmp_path):
    corpus = write_labelled(tmp_path / "corpus.jsonl", records=3)
    write_tokenizer(tmp_path / "model", byte_level(SPECIALS), SPECIALS)
    model.hub.save(randomized(tiny_config("bert", head="sequence", labels=1, vocab_size=340)), tmp_path / "model")
    said = command("predict", tmp_path / "model", corpus, main=model.__main__.main)
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert len({row["predicted"] for row in rows}) == 3 and all(isinstance(row["predicted"], float) for row in rows)
    assert not any("probabilities" in row for row in rows)
    assert "this network gives each text a number" in predict(tmp_path / "model", corpus, "--threshold", "0.7")
    message = predict(tmp_path / "model", corpus, "--score")
    assert "corpus.jsonl:1: the number in column 'label' is '10'" not in message and "no finite number" in message


def test_regression_of_several_numbers(tmp_path):
    corpus = write_labelled(tmp_path / "corpus.jsonl", records=3)
    write_tokenizer(tmp_path / "model", byte_level(SPECIALS), SPECIALS)
    named = {"problem_type": "regression", "id2label": {"0": "a", "1": "b", "2": "c"}}
    config = tiny_config("bert", head="sequence", labels=3, vocab_size=340, extra=named)
    model.hub.save(randomized(config), tmp_path / "model")
    assert "gives 3 numbers a text (problem_type regression)" in predict(tmp_path / "model", corpus)


REFUSED = {
    ("--text", "body"): "corpus.jsonl:1: no column 'body'; its columns: 'text', 'second', 'label', 'tags'. Name it by --text",
    ("--pair", "label_2"): "no column 'label_2'",
    ("--text", "tags"): "the value of 'tags' is [], not a string",
    ("--threshold", "0.7"): "--threshold would have no effect",
    ("--threshold", "1.7"): "--threshold 1.7: a probability",
    ("--batch-size", "0"): "--batch-size 0",
    ("--max-length", "2"): "2 tokens have no room",
    ("--label", "x"): "--label would have no effect: it names what --score compares with",
    ("--score", "--label", "label"): "corpus.jsonl:1: the label '10' is none of the network's: LABEL_0, LABEL_1, LABEL_2",
    ("--score", "--label", "x"): "corpus.jsonl:1: no column 'x'",
    ("--out", "out.xlsx"): "--out out.xlsx: written are .jsonl, .csv, .tsv",
}


@pytest.mark.parametrize("options", REFUSED)
def test_predict_refuses(options, folder, tmp_path):
    corpus = write_labelled(tmp_path / "corpus.jsonl", records=3)
    message = predict(folder, corpus, *options)
    assert REFUSED[options] in message, message


def test_predict_refuses_files(folder, tmp_path):
    corpus = write_labelled(tmp_path / "corpus.jsonl", records=3)
    assert "is the file that is read" in predict(folder, corpus, "--out", corpus)
    assert "does not exist" in predict(folder, tmp_path / "no.jsonl")
    (tmp_path / "in.md").write_text("x")
    assert "read are .jsonl" in predict(folder, tmp_path / "in.md")
    (tmp_path / "empty.txt").write_text("")
    assert "no text in it" in predict(folder, tmp_path / "empty.txt")
    (tmp_path / "in.txt").write_text("x\n")
    assert "one text a line and no columns" in predict(folder, tmp_path / "in.txt", "--score")
    (tmp_path / "again.jsonl").write_text('{"text": "x", "predicted": "y"}\n')
    assert "again.jsonl:1: the column 'predicted' is one that is written" in predict(folder, tmp_path / "again.jsonl")
