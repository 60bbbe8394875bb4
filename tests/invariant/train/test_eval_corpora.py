"""Further corpora that each validation scores: --eval-corpus NAME=PATH, of texts and of records."""

import json
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data.corpus.stdlib
from data.config import DataConfig
from data.corpus.eval_text import count_shared, count_shared_passages, read_eval_text
from data.corpus.prepare import prepare
from tests.records import write_rows
from tests.runs import WORDS, arguments, command, further, last_checkpoint, metrics, stopped_at, write_corpus
from tests.texts import prose
from train.config import NetworkConfig, OptimizerConfig, ReportConfig, RunConfig, TrainConfig
from train.config_toml import from_plain, to_plain, with_absolute_paths
from train.eval_corpora import named
from train.registry import config_type, load
from train.reports.compare import comparison, shown
from train.reports.curves import panels
from train.reports.log import read_metrics
from train.runs.errors import TrainError
from train.task import EvalCorpus

SHORT = {"steps": 8, "eval-every": 4, "save-every": 4}


def corpus_of(options: list[str]) -> Path:
    return Path(options[options.index("--corpus") + 1])


def scores_of(run: Path, split: str = "validation") -> dict:
    return [row for row in metrics(run) if row["split"] == split][-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Other text, and text in another script."""
    place = tmp_path_factory.mktemp("scored")
    write_corpus(place / "other", documents=5, seed=7)
    (place / "greek.txt").write_text("Πάντα ῥεῖ καὶ οὐδὲν μένει. " * 4, encoding="utf-8")
    return place


# --- texts ------------------------------------------------------------------------------------------------------------


def test_held_out_text_scored_twice(options, place, tmp_path):
    """A file with the held-out documents of the run has the run's own validation loss and bits per byte, to the last bit."""
    cache = Path(options[options.index("--cache") + 1])
    shards = prepare(DataConfig(corpus=(str(corpus_of(options)),), vocab_size=320, val_fraction=0.2, cache=cache))
    ids, bos = shards.validation.ids.astype(int), shards.tokenizer.bos_id
    starts = [i for i, id in enumerate(ids) if id == bos]
    texts = [shards.tokenizer.decode(ids[a + 1 : b - 1].tolist()) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    write_rows(tmp_path / "same.jsonl", [{"text": text} for text in texts])
    train = next(path for path in corpus_of(options).glob("*.txt") if path.read_text() not in texts)
    corpora = (f"same={tmp_path}/same.jsonl", f"other={place}/other", f"greek={place}/greek.txt", f"known={train}")
    run = tmp_path / "run"
    said = command(*options, *arguments(SHORT), "--eval-corpus", *corpora, "--out", run)
    assert said.code == 0, said.err
    for row in (row for row in metrics(run) if row["split"] == "validation"):
        assert row["loss_same"] == row["loss"] and row["bits_per_byte_same"] == row["bits_per_byte"]
        assert row["loss_other"] != row["loss"] and row["bits_per_byte_other"] > 0
    assert f"scored   same: {len(texts)} documents, {len(ids):,} tokens, {shards.validation.bytes:,} bytes\n" in said.out
    whole = r"1 of these is trained on too; 100.0 % of its passages of 32 tokens are in the training text\n"
    assert re.search(r"scored   known: 1 document, \d+ tokens, \d+ bytes; " + whole, said.out)
    assert re.search(r"scored   greek: .* bytes\n         1\.\d+ tokens a byte, and 0\.\d+ of the training text", said.out)
    last, size = scores_of(run), (place / "greek.txt").stat().st_size
    tokens = int(re.search(r"scored   greek: 1 document, (\d+) tokens", said.out)[1])
    assert last["bits_per_byte_greek"] == pytest.approx(last["loss_greek"] * (tokens - 1) / math.log(2) / size, rel=1e-12)
    assert f"\n  other: loss {last['loss_other']:.4f}, {last['bits_per_byte_other']:.3f} bits per byte\n" in said.out
    assert "loss_other" in json.loads((run / "best.json").read_text())
    page, rows = (run / "report.html").read_text(), read_metrics(run / "metrics.jsonl")
    assert "<th>loss greek</th>" in page and f"<td>{shown(last['bits_per_byte_other'])}</td>" in page
    drawn = panels(rows).axes[0].get_legend_handles_labels()[1]
    assert drawn == ["training", "validation", *(f"validation: {name}" for name in ("same", "other", "greek", "known"))]
    shutil.copytree(run, tmp_path / "again")
    assert re.search(r"\n  loss other +(\d\.\d+) +\1\n", comparison([run, tmp_path / "again"]))


def test_a_run_is_stopped_and_resumed(options, place, tmp_path, monkeypatch):
    """Paths travel; the resumed run ends in the same bytes; text that has changed is refused; the best is chosen without it."""
    monkeypatch.chdir(place)
    mine = place / "mine.txt"
    mine.write_text(prose(3, 60))
    words = [*options, *arguments(SHORT), "--eval-corpus", "mine=mine.txt", "out-side=other"]
    assert command(*words, "--out", tmp_path / "whole").code == 0
    stopped_at(5, *words, "--log-every", 1, "--out", tmp_path / "stopped")
    monkeypatch.chdir(tmp_path)
    kept = mine.read_text()
    mine.write_text(kept + "more")
    said = command("--resume", tmp_path / "stopped")
    assert said.code == 2 and "--eval-corpus mine is no longer the text that" in said.err
    mine.write_text(kept)
    assert command("--resume", tmp_path / "stopped").code == 0
    assert scores_of(tmp_path / "stopped") == scores_of(tmp_path / "whole")
    plain = command(*options, *arguments(SHORT), "--out", tmp_path / "plain")
    assert plain.code == 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert len({(last_checkpoint(tmp_path / run) / file).read_bytes() for run in ("plain", "whole", "stopped")}) == 1
    best = [json.loads((tmp_path / run / "best.json").read_text()) for run in ("plain", "whole")]
    assert best[0]["checkpoint"] == best[1]["checkpoint"] and "loss_mine" in best[1].keys() - best[0].keys()


def test_before_the_first_step(options, place, tmp_path):
    begun = [*options, *arguments(SHORT), "--eval-corpus", f"other={place}/other"]
    assert command(*begun, "--out", tmp_path / "first").code == 0
    said = command(*further(begun), "--init", tmp_path / "first", "--out", tmp_path / "second")
    assert said.code == 0, said.err
    before, last = scores_of(tmp_path / "second", "before"), scores_of(tmp_path / "first")
    assert before["loss_other"] == last["loss_other"] and "before the first step: " in said.out
    assert f"\n  other: loss {before['loss_other']:.4f}" in said.out.partition("validation at")[0]


@pytest.mark.parametrize("objective", ["mlm", "mlm --mlm.nsp", "prefix", "fim", "span", "denoise"])
def test_batches_are_those_of_the_validation(objective, options, tmp_path):
    """Held-out text gives the same batches by --eval-corpus: masks, gaps and noise too."""
    name, *flags = objective.split()
    kind = load(name)
    data = DataConfig(corpus=(str(corpus_of(options)),), vocab_size=400, val_fraction=0.2, cache=tmp_path)
    settings = {name: kind.Settings(nsp=bool(flags))} if name == "mlm" else {}
    network, optimizer = NetworkConfig(context=64), OptimizerConfig(batch_size=4)
    config = config_type(name)(run=RunConfig(objective=name), data=data, network=network, optimizer=optimizer, **settings)
    config = replace(config, recorded=replace(config.recorded, decoder_start_id=1))
    task = kind(config, kind.open_data(config, None, lambda line: None))
    batches = task.eval_batches(task.held_out)
    validation = task.validation[: len(batches)] if name == "fim" else task.validation  # gaps follow
    assert len(batches) == len(validation) > 1
    for ours, theirs in zip(batches, validation, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert task.has_bits_per_byte == (name == "fim")

    ids, tokenizer = task.held_out, task.tokenizer  # span's has one id that ends a document and begins the next
    starts = np.flatnonzero(ids == tokenizer.bos_id).tolist()
    ends = starts[1:] if tokenizer.bos_id == tokenizer.eos_id else [end - 1 for end in [*starts[1:], len(ids)]]
    texts = [tokenizer.decode(ids[start + 1 : end].tolist()) for start, end in zip(starts, ends, strict=False)]
    write_rows(tmp_path / "same.jsonl", [{"text": text} for text in texts])
    write_rows(tmp_path / "first.jsonl", [{"text": texts[0]}])
    whole = read_eval_text(data, (f"{tmp_path}/same.jsonl",), tokenizer, 10**6)
    assert np.array_equal(whole.ids, ids) and whole.documents == whole.all_documents == len(texts)
    assert whole.bytes == sum(len(text.encode()) for text in texts) and whole.unknown == 0
    both = read_eval_text(data, (f"{tmp_path}/same.jsonl", f"{tmp_path}/first.jsonl"), tokenizer, len(ids) + 9)
    assert both.tokens == len(ids) + 9 and both.all_documents == len(texts) + 1


def test_settings_travel(place, monkeypatch):
    monkeypatch.chdir(place)
    report = ReportConfig(eval_corpus=("code=stdlib-code", "mine=greek.txt", "mine=other", "caf=caf\udce9.txt"))
    absolute = with_absolute_paths(replace(TrainConfig(), report=report))
    mine = (f"mine={place / 'greek.txt'}", f"mine={place / 'other'}")
    assert absolute.report.eval_corpus == ("code=stdlib-code", *mine, f"caf={place}/caf\udce9.txt")
    assert from_plain(TrainConfig, to_plain(absolute), "x").report == absolute.report


def test_built_in_corpora_are_held_out(tmp_path, monkeypatch):
    """The held-out documents of the corpus' own split; those of another one are counted as trained on."""
    files = [path for path in data.corpus.stdlib.list_files() if 2000 < path.stat().st_size < 9000][:30]
    monkeypatch.setattr(data.corpus.stdlib, "list_files", lambda: files)
    config = DataConfig(cache=tmp_path, corpus=("stdlib-code",), val_fraction=0.3, vocab_size=300)
    shards = prepare(config)
    text = read_eval_text(replace(config, corpus=("x.txt",)), ("stdlib-code",), shards.tokenizer, 10**9)
    assert np.array_equal(text.ids, shards.validation.ids) and text.bytes == shards.validation.bytes
    assert text.documents == text.all_documents == shards.validation.documents > 1
    bos_id = shards.tokenizer.bos_id
    assert count_shared(text, shards.train.ids, bos_id) == 0
    assert count_shared(text, shards.validation.ids, bos_id) == text.documents
    (tmp_path / "one.txt").write_text("One more document.")
    for tokenizer in (shards.tokenizer, shards.tokenizer.with_affix_flags({"add_bos_token": False, "add_eos_token": True})):
        both = read_eval_text(config, ("stdlib-code", f"{tmp_path}/one.txt"), tokenizer, 10**9)
        one = read_eval_text(config, (f"{tmp_path}/one.txt",), tokenizer, 10**9)
        assert one.documents == 1 and both.documents == both.all_documents == text.documents + 1
        assert both.bytes == text.bytes + 18 and np.array_equal(both.ids[-one.tokens :], one.ids)
        assert both.tokens - text.tokens == one.tokens - (0 if tokenizer is shards.tokenizer else text.documents)
    cut = read_eval_text(config, ("stdlib-code",), shards.tokenizer, 1000)
    assert cut.tokens == 1000 and cut.documents < cut.all_documents and cut.sha256 != text.sha256


def test_passages_are_counted(monkeypatch):
    """Beside all windows of the training ids, in chunks of any size."""
    draw = np.random.default_rng(0)
    train, ids = draw.integers(0, 4, 3000).astype("<u2"), draw.integers(0, 4, 601)
    for length in (3, 5, 6, 8):
        known = {tuple(train[i : i + length]) for i in range(len(train) - length + 1)}
        shared = sum(tuple(ids[i : i + length]) in known for i in range(0, len(ids) - length + 1, length))
        for chunk in (10**6, 700, len(train) - length):
            monkeypatch.setattr(data.corpus.eval_text, "CHUNK", chunk)
            assert count_shared_passages(ids, train, length) == (shared, len(ids) // length)
    assert 0 < shared < len(ids) // length
    assert count_shared_passages(ids[:2], train, 3) == (0, 0) and count_shared_passages(ids, train[:2], 3) == (0, 200)


BAD = {
    "greek.txt": "--eval-corpus greek.txt: the form is NAME=PATH",
    "x=": "--eval-corpus x=: the form is NAME=PATH",
    "1x=greek.txt": "the form is NAME=PATH, a name of letters, digits, _ and -",
    "loss=greek.txt": "--eval-corpus loss: this is the name of a score",
    "x=none.txt": "--eval-corpus x: the path none.txt: no such file or folder",
    "x=greek.txt:2": "--eval-corpus x: the path greek.txt:2: no such file or folder",
    "x=empty.txt": "--eval-corpus x: the corpus empty.txt is empty: no text in it (1 empty document)",
}


@pytest.mark.parametrize("entry", BAD)
def test_bad_input(entry, options, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    Path("empty.txt").write_text("")
    said = command(*options, "--eval-corpus", entry, "--out", tmp_path / "run")
    assert said.code == 2 and BAD[entry] in said.err and not (tmp_path / "run").exists()


def test_names_of_sources_and_of_other_scores(options, place, tmp_path):
    """A source of the mixture has a loss_NAME; a name that makes another score's name is refused when it is seen."""
    mixed = ["--corpus", f"a={corpus_of(options)}:1", f"b={place}/other:1", "--out", tmp_path / "run"]
    at = options.index("--corpus")
    said = command(*options[:at], *options[at + 2 :], *mixed, "--eval-corpus", "b=x")
    assert said.code == 2 and "--eval-corpus b: a source of the mixture has this name, and a loss_b" in said.err
    with pytest.raises(TrainError, match="--eval-corpus x: this run has a score loss_x of its own"):
        named(EvalCorpus("x", None, "", ""), {"loss": 1.0}, {"loss_x": 2.0})


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["classify", "pairs", pytest.param("seq2seq", marks=pytest.mark.slow)])
def test_records(objective, tmp_path):
    """The held-out file as a further corpus has the same scores; a subset of it, of another size, has its own."""
    draw = random.Random(0)

    def row() -> dict:
        words = draw.choices(WORDS, k=8)
        number = {"label": float(words.count(words[0]))} if objective == "pairs" else {"label": draw.choice("ab")}
        first, second = " ".join(words[:4]), " ".join(words[4:])
        return {"text": first, "first": first, "second": second, "source": first, "target": second} | number

    rows = [row() for _ in range(80)]
    train, held_out = write_rows(tmp_path / "train.jsonl", rows[:60]), write_rows(tmp_path / "held_out.jsonl", rows[60:])
    known = write_rows(tmp_path / "known.jsonl", [*rows[:7], rows[61]])
    changes = {"objective": objective, "corpus": train, "validation": held_out, "cache": tmp_path / "cache", "width": 16}
    changes |= {"depth": 1, "heads": 2, "context": 64, "batch-size": 8, "device": "cpu", "threads": 1, "sample-every": 0}
    kind = ["--pairs.kind", "number"] if objective == "pairs" else []
    corpora = ["--eval-corpus", f"known={known}", f"same={held_out}"]
    said = command(*arguments(changes | SHORT), *kind, *corpora, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    for row in (row for row in metrics(tmp_path / "run") if row["split"] == "validation"):
        own = {name: value for name, value in row.items() if not name.endswith(("_same", "_known"))}
        own = {name: value for name, value in own.items() if name not in ("step", "split", "tokens")}
        assert {name: row[f"{name}_same"] for name in own} == own and row["loss_known"] != row["loss"]
    assert re.search(r"scored   known: 8 records, \d+ tokens; 7 of these are trained on too\n", said.out)
    assert re.search(r"scored   same: 20 records, \d+ tokens\n", said.out)
    assert re.search(r"\n  same: (loss|squared error) ", said.out)
    if objective == "classify":
        write_rows(tmp_path / "new.jsonl", [{"text": "a", "label": "new"}])
        write_rows(tmp_path / "bare.jsonl", [{"label": "a"}])
        told = {"new": "new.jsonl:1: the label 'new' comes in no training record, so that it cannot be learned\n"}
        told |= {"bare": "bare.jsonl:1: no column 'text'", "none": "the path ", "stdlib-code": "NAME=FILE.jsonl"}
        for name, words in told.items():
            path = name if name == "stdlib-code" else tmp_path / f"{name}.jsonl"
            said = command(*arguments(changes | SHORT), "--eval-corpus", f"x={path}", "--out", tmp_path / "refused")
            assert said.code == 2 and said.err.startswith("error: --eval-corpus x: ") and words in said.err, said.err
