"""`--objective qa` through the real command: its scores by hand, several windows, repaired and lost answers."""

import json
import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import model.hub
from data.config import DataConfig, DataError
from data.sources.records import Rows, open_records
from data.tokenizer.open import load_tokenizer
from data.transforms.answers import answer_windows, other_questions, window_labels
from model.answer_spans import find_answers
from tests.compare import absolute
from tests.questions import questions, write_questions
from tests.records import write_rows
from tests.runs import arguments, command, last_checkpoint, metrics
from train.answer_scores import answer_totals
from train.tasks.qa import QaSettings, QaTask, chosen_answer, framer_of, right_answers

SETTINGS = {
    "objective": "qa",
    "width": 32,
    "depth": 1,
    "heads": 2,
    "context": 28,
    "vocab-size": 420,
    "batch-size": 8,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
    "dropout": 0.1,
    "steps": 24,
    "eval-every": 12,
    "save-every": 12,
    "log-every": 4,
    "sample-every": 12,
    "qa.stride": 9,
    "qa.max-answer": 9,
    "qa.scored": 20,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    write_questions(folder / "train.jsonl", 120)
    rows = questions(28, seed=1)
    rows[4]["answers"] = {"text": [rows[4]["context"].strip()], "answer_start": [0]}  # longer than a window: not scored
    long = {"context": "The end.", "question": "why? " * 4, "answers": None}  # a question that leaves others no room
    write_rows(folder / "validation.jsonl", [*rows, long, rows[0] | {"question": "Who?"}])
    return folder


@pytest.fixture(scope="module")
def options(place) -> list[str]:
    files = {"corpus": place / "train.jsonl", "validation": place / "validation.jsonl", "cache": place / "cache"}
    return arguments(SETTINGS | files)


@pytest.fixture(scope="module")
def run(place, options) -> tuple[Path, str]:
    said = command(*options, "--out", place / "run")
    assert said.code == 0, said.err
    return place / "run", said.out


def test_scores_are_those_by_hand(run, place):
    """The loss of each window by itself, with the right question and with another one's; exact match and F1 of the answers."""
    line = next(row for row in reversed(metrics(run[0])) if row["split"] == "validation")
    folder = last_checkpoint(run[0])
    network, settings = model.hub.load(folder).double().eval().requires_grad_(False), QaSettings(stride=9, max_answer=9)
    framer = framer_of(settings, load_tokenizer(folder, network.config.vocab_size), 28)
    rows = [json.loads(text) for text in (place / "validation.jsonl").read_text().splitlines()]
    others = other_questions([row["question"] for row in rows])
    losses, windows_of = {"loss": [], "shuffled_loss": []}, []
    for row, other in zip(rows, others, strict=True):
        for name, question in (("loss", row["question"]), ("shuffled_loss", other)):
            try:
                windows = answer_windows(framer, question, row["context"], 9)
            except DataError:
                assert name == "shuffled_loss" and question.startswith("why? why?")
                continue
            assert len(windows) > 1 or row["context"] == "The end.", "the others are longer than a window"
            if name == "loss":
                windows_of.append(windows)
            labels = window_labels(windows, (right_answers(settings, row) or [None])[0])
            for window, label in zip(windows, labels or [], strict=False):
                logits_T2 = network(torch.tensor(window.ids)[None]).logits[0]
                losses[name].append(-float(logits_T2.log_softmax(0)[torch.tensor(label), torch.tensor([0, 1])].mean()))
    assert 0 < len(losses["shuffled_loss"]) < len(losses["loss"])
    for name, each in losses.items():
        assert math.isclose(line[name], sum(each) / len(each), rel_tol=1e-4), name
    found = find_answers(network, windows_of[:20], max_answer=9)
    predicted = [chosen_answer(settings, spans, row).text for spans, row in zip(found, rows, strict=False)]
    golds = [row["answers"]["text"] for row in rows[:20]]
    totals = answer_totals(predicted, golds)
    assert absolute([line[name] for name in totals], [total / count for total, count in totals.values()]) < 1e-9
    assert line["no_answer"] == sum(not texts for texts in golds) / 20
    assert line["baseline_loss"] > 0.5 and 0 < line["sentence_f1"] < 1


def test_what_is_said(run):
    assert "answers  " in run[1] and "tokens, sharing 9" in run[1]
    for text in (" · without reading ", " · with another question ", "the sentence with most question words: F1 "):
        assert text in run[1]
    assert "What does " in run[1] and "(true: " in run[1]
    assert "model predict" in run[1]


def test_answers_are_repaired_and_lost_ones_named(tmp_path, options):
    """An answer off its offset; one that no window holds, whose record is left out."""
    rows = questions(30, unanswered=0)
    rows[3]["answers"]["answer_start"][0] += 2
    long = rows[7]["context"].strip()
    rows[7]["answers"] = {"text": [long], "answer_start": [0]}
    corpus = write_rows(tmp_path / "bad.jsonl", rows)
    more = ["--corpus", corpus, "--steps", 1, "--qa.repair", "--qa.scored", 0, "--out", tmp_path / "run"]
    more += ["--qa.max-length", SETTINGS["context"], "--eval-tokens", 2]  # one record at least is held out
    said = command(*options, *more)
    assert said.code == 0, said.err
    assert f"repaired 1 record with an answer off its offset: {corpus}:4" in said.out
    assert "lost     1 record left out" in said.out and f"{corpus}:8" in said.out
    assert "every question has an answer: --qa.always-answer" in said.out
    assert "exact match" not in said.out and "without reading" in said.out
    assert "with another question" not in said.out, "there is no other one"


def test_questions_about_one_context_are_held_out_together():
    """Otherwise the held-out contexts would have been read in training."""
    data = DataConfig(corpus=("unread",), val_fraction=0.4)
    rows = [row | {"context": f"{number // 4} {row['context']}"} for number, row in enumerate(questions(1) * 40)]
    everything = Rows(rows, [str(number) for number in range(40)], [""] * 40)
    options = {"columns": [], "text_of": lambda row: QaTask.split_key(QaSettings(), row)}
    with patch("data.sources.records.read_corpus_rows", lambda *_: everything):
        train, held_out = open_records(data, **options)
    sides = [{row["context"] for row in side.values} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(train) + len(held_out) == 40 and len(held_out) > 4
