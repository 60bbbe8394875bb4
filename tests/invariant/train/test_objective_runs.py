"""Each objective in a short run of the real command: it learns, it reports, it resumes bit for bit, and its command works."""

import json
import math
import random
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

import model.__main__
from tests.runs import SETTINGS, WORDS, Said, arguments, assert_same_end, command, steps_of, write_corpus
from train.registry import names
from train.reports.log import read_metrics

HALF, STEPS = 12, 24
SHAPES = ("preset", "dropout", "optimizer")  # those of the objective
SMALL = {k: v for k, v in SETTINGS.items() if k not in SHAPES}
SMALL |= {"depth": 1, "batch-size": 8, "steps": STEPS, "eval-every": HALF, "save-every": HALF, "log-every": 4}
SMALL |= {"eval-tokens": 2000, "sample-every": STEPS}
FAST = "--lr 1e-2 --matrix-lr 0.1"  # to see a label learned in so few steps


class Case(NamedTuple):
    """Options of a run, the data that it reads, and what a validation line has beside loss and baseline_loss."""

    options: str
    data: str
    scores: tuple[str, ...]


CASES = {
    "clm": Case("", "text", ("perplexity", "bits_per_byte")),
    "mlm": Case("", "text", ("masked_accuracy",)),
    "mlm, whole words": Case("--mlm.whole-words", "text", ("masked_accuracy",)),
    "mlm, next sentence": Case("--mlm.nsp", "text", ("masked_accuracy", "nsp_loss", "nsp_baseline_loss", "nsp_accuracy")),
    "span": Case("", "text", ("shuffled_loss", "word_loss", "word_baseline_loss", "sentinel_loss")),
    "denoise": Case("", "text", ("shuffled_loss", "token_accuracy")),
    "fim": Case("", "text", ("bits_per_byte", "infill_loss", "shuffled_loss")),
    "prefix": Case("", "text", ("shuffled_loss", "perplexity")),
    "seq2seq": Case("--seq2seq.overlong cut", "pairs", ("token_accuracy", "exact_match")),
    "classify": Case(f"--classify.text source {FAST}", "pairs", ("accuracy", "baseline_accuracy", "f1", "mcc")),
    "pairs": Case(FAST, "pairs", ("accuracy", "f1", "shuffled_loss", "words_loss", "shared_loss")),
    "pairs, a number": Case("--pairs.kind number --pairs.label score", "pairs", ("pearson", "spearman", "shuffled_loss")),
    "tag": Case("", "tags", ("accuracy", "word_accuracy", "f1", "word_f1")),
    "qa": Case("", "answers", ("shuffled_loss", "exact_match", "f1", "sentence_f1")),
}


def record(draw: random.Random, kind: str) -> dict:
    """A record of a few words, whose label or target can be read off them."""
    label, words = draw.choice(["yes", "no"]), draw.choices(WORDS, k=8)
    if kind == "pairs":
        words = draw.choices(WORDS[:4] if label == "yes" else WORDS[-4:], k=6)
        texts = {"first": " ".join(words[:3]), "second": " ".join(words[3:])}
        texts["score"] = 0.5 * words.count("file") + 2 * (label == "yes")
        return texts | {"source": " ".join(words), "target": " ".join(words[:3]), "label": label}
    if kind == "tags":
        return {"words": words, "labels": [f"B-{word.upper()}" if len(word) > 6 else "O" for word in words]}
    at = draw.randrange(8)
    answers = {"text": [words[at]], "answer_start": [len(" ".join([*words[:at], ""]))]}
    answers = answers if draw.random() < 0.7 else {"text": [], "answer_start": []}
    return {"id": str(draw.random()), "context": " ".join(words), "question": f"where is {words[at]}?", "answers": answers}


class Run(NamedTuple):
    folder: Path
    said: Said


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    made = {"text": write_corpus(folder / "text", documents=24)}
    for kind in ("pairs", "tags", "answers"):
        made[kind] = folder / f"{kind}.jsonl"
        made[kind].write_text("".join(json.dumps(record(draw, kind)) + "\n" for _ in range(160)))
    return made


@pytest.fixture(scope="module", params=CASES)
def run(request, data, tmp_path_factory) -> Run:
    """One run of a case, which all tests of it share."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("run") / "run"
    settings = SMALL | {"objective": request.param.partition(",")[0], "corpus": data[case.data]}
    settings |= {"cache": data["text"].parent / "cache", "out": folder}
    return Run(folder, command(*arguments(settings), *case.options.split()))


def test_every_objective_has_a_case():
    """Some begin with --init: test_sft_run.py and test_preference_runs.py ask the same of them."""
    assert {name.partition(",")[0] for name in CASES} | {"sft", "dpo", "kto", "reward", "grpo", "rloo", "ppo"} == set(names())


def test_a_run_learns_and_reports(run, request):
    case = CASES[request.node.callspec.params["run"]]
    assert run.said.code == 0, run.said.err
    rows = read_metrics(run.folder / "metrics.jsonl")
    train, validation = ([row for row in rows if row["split"] == split] for split in ("train", "validation"))
    assert [row["step"] for row in train] == [1, *range(4, STEPS + 1, 4)]
    assert [row["step"] for row in validation] == [HALF, STEPS]
    for row in train:
        assert {"step", "split", "time", "loss", "tokens", "lr", "grad_norm", "tokens_per_s"} <= set(row)
    for row in validation:
        assert {"loss", "baseline_loss", "tokens", *case.scores} <= set(row)
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    first, last = validation
    assert 0 < last["loss"] < first["loss"] and last["tokens"] == train[-1]["tokens"] > 0
    assert all({f"{row['loss']:.4f}", f"{row['loss']:.5g}"} & set(run.said.out.split()) for row in validation)


def test_a_resume_ends_in_the_same_bytes(run, tmp_path):
    """From the checkpoint in the middle, to which the run is cut back."""
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS}")
    assert steps_of(tmp_path / "run") == [HALF]
    said = command("--resume", tmp_path / "run")
    assert said.code == 0, said.err
    assert_same_end(tmp_path / "run", run.folder, steps=STEPS)


def test_the_command_that_it_prints_works(run):
    line = next(re.finditer(r"^  python -m model (.+)$", run.said.out, re.MULTILINE))[1]
    said = command(*shlex.split(line), main=model.__main__.main)
    assert said.code == 0, (line, said.err)
    assert said.out.strip()
