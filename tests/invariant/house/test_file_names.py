"""File names that are bytes and no UTF-8, which Linux has and Python holds as lone surrogates: they work to the end."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import patch

import pytest
import tomli_w

import eval.__main__
import model.__main__
from data.config import DataConfig
from data.shell import quote
from tests.runs import ROOT, SETTINGS, arguments, assert_same_end, command, further, process, stopped_at, write_corpus
from train.config import RunConfig, TrainConfig
from train.config_toml import from_plain, to_plain
from train.reports.curves import plot
from train.reports.log import read_metrics

STEPS = 12
BAD = "caf\udce9"  # as Latin-1 writes it
ODD = [BAD, f"{BAD} $HOME 'a' \"b\" \\x", "two\nlines", "\x1b[31m", "café", "-", "", "~", "*", "file:x", "100%", "!x"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a corpus, all of whose names are no UTF-8."""
    place = tmp_path_factory.mktemp("names") / BAD
    try:
        place.mkdir()
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    corpus = write_corpus(place / f"corpus-{BAD}")
    for path in corpus.iterdir():
        path.rename(path.with_name(f"{BAD}{path.name}"))
    return place


def corpora(place: Path) -> tuple[str, str]:
    """A folder, and a file in it."""
    return str(place / f"corpus-{BAD}"), str(place / f"corpus-{BAD}" / f"{BAD}1.txt")


@pytest.fixture(scope="module")
def options(place) -> list[str]:
    changes = {"steps": STEPS, "save-every": 6, "eval-every": 4, "optimizer": "adamw", "cache": place / f"cache-{BAD}"}
    return [*arguments(SETTINGS | changes), "--corpus", *corpora(place)]


@pytest.fixture(scope="module")
def shown(place, options) -> str:
    """The real command: on its own streams, with curves drawn and a profile taken."""
    environment = {"PYTHONIOENCODING": "utf-8", "MPLCONFIGDIR": str(place.parent / "fonts")}
    with patch.dict(os.environ):
        os.environ.pop("KINETO_LOG_LEVEL", None)  # which this process has, if it has trained
        with process(*options, "--profile", "--out", place / f"run-{BAD}", **environment) as running:
            running.stdout.reconfigure(errors="strict")
            out, err = running.communicate(timeout=120)
    assert running.returncode == 0 and "profiler" not in err.lower(), err
    return out


def test_a_run_leaves_all_that_it_should(place, shown):
    run = place / f"run-{BAD}"
    assert "caf\\udce9" in shown, "a name is shown by its escape"
    for name in ("curves.png", "profile/trace.json", "profile/operators.txt"):
        assert (run / name).stat().st_size > 1000
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG" and len(read_metrics(run / "metrics.jsonl")) == 10
    table = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    assert table["run"]["out"].startswith("file:/") and table["run"]["out"].endswith("/caf%E9/run-caf%E9")
    config = from_plain(TrainConfig, table, "config.toml")
    assert config.run.out == run and config.data.cache == place / f"cache-{BAD}" and config.data.corpus == corpora(place)


def test_commands_that_are_printed_work_in_bash(place, shown):
    lines = [line.strip() for line in shown.partition("\nnext\n")[2].splitlines()]
    generate, again = next(line for line in lines if " generate " in line), next(line for line in lines if "--init" in line)
    assert read_by_bash(generate)[4] == str(place / f"run-{BAD}")
    words = read_by_bash(again)
    assert words[words.index("--init") + 1] == str(place / f"run-{BAD}")
    assert tuple(words[words.index("--corpus") + 1 :][:2]) == corpora(place)


def read_by_bash(line: str) -> list[str]:
    shell = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, cwd="/")
    return [os.fsdecode(word) for word in shell.stdout.split(b"\0")[:-1]]


@pytest.mark.parametrize("name", ODD)
def test_quoted_names_are_read_back_by_bash(name):
    assert quote(name).isprintable() and read_by_bash(quote(name)) == [name]
    assert quote("a b") == "'a b'" and quote(Path("runs/x")) == "runs/x"


def test_stop_and_resume(place, options, shown):
    run = place / f"stopped-{BAD}"
    said = stopped_at(7, *options, "--log-every", 1, "--out", run)
    assert said.code == 130 and f"python -m train --resume {quote(run)}\n" in said.out
    assert command("--resume", run).code == 0
    straight = place / f"straight-{BAD}"
    assert command(*options, "--log-every", 1, "--out", straight).code == 0
    assert_same_end(run, straight, STEPS)
    said = command(*options, "--out", run)
    assert said.code == 2 and f"`python -m train --resume {quote(run)}`" in said.err


def test_commands_that_are_given_such_a_run(place, options, shown):
    run, exported = place / f"run-{BAD}", place / f"model-{BAD}"
    said = command("generate", run, "--prompt", "the file", "--max-new-tokens", 5, main=model.__main__.main)
    assert said.code == 0 and said.out.startswith("the file"), said.err
    said = command("export", run, "--out", exported, main=model.__main__.main)
    assert said.code == 0 and (exported / "model.safetensors").is_file(), said.err
    held_out = command("perplexity", run, main=eval.__main__.main)
    assert held_out.code == 0 and re.search(r"perplexity = \d", held_out.out), held_out.err
    said = command("perplexity", exported, place / f"corpus-{BAD}", "--tokens", 200, main=eval.__main__.main)
    assert said.code == 0 and f"{exported} on {place / f'corpus-{BAD}'}" in said.out, said.err
    tuned = place / f"tuned-{BAD}"
    said = command(*further(options), "--init", exported, "--steps", 2, "--out", tuned)
    assert said.code == 0 and f"--init {quote(tuned)}" in said.out, said.err
    scored = place / f"{BAD}.csv"
    scored.write_text("text\nthe file\n", encoding="utf-8")
    said = command("bleu", scored, scored, "--samples", 40, main=eval.__main__.main)
    assert said.code == 0 and said.err.startswith(f"note: {scored}: "), said.err


def test_the_other_commands_on_their_own_streams(place, tmp_path):
    """Strict ones would end in UnicodeEncodeError; a terminal's are."""
    corpus, cache = place / f"corpus-{BAD}", tmp_path / "cache"
    scored = place / f"{BAD}.jsonl"
    scored.write_text('"the file"\n', encoding="utf-8")
    lines = {
        "data": ("prepare", "--corpus", corpus, "--cache", cache, "--val-fraction", "0.2"),
        "eval": ("bleu", "--system", f"{BAD}={scored}", "--system", f"b={scored}", scored, "--samples", "40"),
    }
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    for name, line in lines.items():
        line = [sys.executable, "-m", name, *map(str, line)]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == 0 and rb"caf\udce9" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ODD)
def test_settings_are_read_back_as_they_were(name):
    data = DataConfig(corpus=(name or "a", "b"), text_key=name)
    config = TrainConfig(RunConfig(out=Path(f"{name}/run"), recipe=name), data=data)
    table = to_plain(config)
    assert from_plain(TrainConfig, tomllib.loads(tomli_w.dumps(table).encode().decode()), "config.toml") == config
    needs_none = BAD not in name and not name.startswith("file:")
    assert (table["data"]["text_key"] == name) == needs_none, "what TOML can hold stays as it is"


def test_any_name_is_a_title(tmp_path):
    """The default title ends training in an error of matplotlib's: for lone surrogates, and for `$x_$`, no formula."""
    rows = [{"step": step, "split": "train", "loss": 2.0, "lr": 1.0, "grad_norm": 1.0} for step in (1, 2)]
    plot(rows, tmp_path / f"{BAD}.png", f"{BAD} $x_$")
    assert (tmp_path / f"{BAD}.png").read_bytes()[:4] == b"\x89PNG"
