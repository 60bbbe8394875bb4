"""Sources by weight, and text that is named to validate on, through the commands."""

import json
import re
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

import data.__main__
from data.config import CorpusEntry, DataConfig, DataError, parse_entry
from data.corpus.dedup import drop_held_out
from data.corpus.prepare import prepare
from data.example import Example
from data.packing.blocks import MixedBlocks
from data.packing.examples import ExampleSource
from data.sources.files import Document
from tests.runs import arguments, assert_same_end, command, last_checkpoint, metrics, stopped_at
from tests.texts import prose
from train.config import OptimizerConfig, ReportConfig, TrainConfig
from train.config_toml import from_plain, to_plain, with_absolute_paths
from train.record_task import RecordTask
from train.reports.summary import text_options
from train.runs.errors import TrainError
from train.tasks.clm import CausalTask
from train.token_task import validation_ids_by_source

SMALL = {"preset": "tiny", "width": 16, "depth": 1, "heads": 2, "context": 16, "batch-size": 8, "vocab-size": 300, "steps": 40}
SMALL |= {"threads": 1, "device": "cpu", "precision": "fp32", "eval-every": 20, "sample-every": 0, "log-every": 10}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """a.jsonl has 60 documents, b.jsonl and b2.txt 21 shorter ones."""
    place = tmp_path_factory.mktemp("sources")
    for name, seeds, words in (("a.jsonl", range(60), 120), ("b.jsonl", range(100, 120), 60)):
        (place / name).write_text("".join(json.dumps({"text": prose(n, words)}) + "\n" for n in seeds))
    (place / "b2.txt").write_text(prose(200, 60))
    return place


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


MIXED = ("a=a.jsonl:3", "b=b.jsonl:1")


def config(*corpus, **changes):
    return DataConfig(**{"corpus": corpus or MIXED, "vocab_size": 300, "val_fraction": 0.2} | changes)


# --- what --corpus says -----------------------------------------------------------------------------------------------


def test_entries(inside):
    assert parse_entry("a=x/y:z.txt:1e-1") == CorpusEntry("x/y:z.txt", "a", 0.1)
    for text in ("a.txt", "a=b.txt", "a=b.txt:x", "/c/a=b:1", "./a=b:1", "=b:1", "1a=b:1", "http://a=b:1"):
        assert parse_entry(text) == CorpusEntry(text)
    (inside / "n=x:2").write_text(prose(0))
    assert parse_entry("n=x:2") == CorpusEntry("n=x:2") and config("n=x:2").weights == {}
    (inside / "n=x:2").unlink()
    grouped = config("a=a.jsonl:3", "b=b.jsonl:1", "a=b2.txt:3.0")
    assert grouped.weights == {"a": 3.0, "b": 1.0} and grouped.paths == ("a.jsonl", "b2.txt", "b.jsonl")


@pytest.mark.parametrize(
    ("corpus", "told"),
    [
        (("a=a.jsonl:1", "b.jsonl"), "--corpus b.jsonl: it is not NAME=PATH:WEIGHT, and a=a.jsonl:1.0 is: either all have"),
        (("a=a.jsonl:1", "b=b.jsonl:much"), "--corpus b=b.jsonl:much: it is not NAME=PATH:WEIGHT"),
        (("a=a.jsonl:0",), "--corpus a=a.jsonl:0.0: a weight is above 0, and finite"),
        (("a=a.jsonl:-1",), "a weight is above 0"),
        (("a=a.jsonl:nan",), "a weight is above 0"),
        (("a=a.jsonl:inf",), "a weight is above 0"),
        (("a=a.jsonl:1", "a=b.jsonl:2"), "--corpus a=b.jsonl:2.0: a has the weight 1.0 too; give one"),
    ],
)
def test_entries_that_cannot_be(inside, corpus, told):
    with pytest.raises(DataError, match=re.escape(told)):
        config(*corpus)
    said = command("--corpus", *corpus)
    assert said.code == 2 and told in " ".join(said.err.replace("│", " ").split())


def test_files_that_are_not_there(inside):
    with pytest.raises(DataError, match=r"--corpus c\.txt: no such file or folder \(.*c\.txt\)"):
        prepare(config("a=a.jsonl:1", "b=c.txt:1", cache=inside / "cache"))
    with pytest.raises(DataError, match=r"no such file .* A source of a mixture is NAME=PATH:WEIGHT, a number last"):
        prepare(config("a=a.jsonl:one", cache=inside / "cache"))
    with pytest.raises(DataError, match=r"--validation c\.txt: no such file"):
        prepare(config("a.jsonl", validation=("c.txt",), cache=inside / "cache"))


def test_settings_travel(inside):
    said = replace(TrainConfig(), data=config(*MIXED, "b=stdlib-docs:1", validation=("b2.txt", "stdlib-code")))
    absolute = with_absolute_paths(said).data
    a, b = inside / "a.jsonl", inside / "b.jsonl"
    assert absolute.corpus == (f"a={a}:3.0", f"b={b}:1.0", "b=stdlib-docs:1.0")
    assert absolute.validation == (str(inside / "b2.txt"), "stdlib-code")
    assert from_plain(TrainConfig, to_plain(with_absolute_paths(said)), "x").data == absolute
    words = text_options(config(validation=("b2.txt",)))
    assert words[:3] == ["--corpus", *MIXED] and words[3:5] == ["--validation", "b2.txt"]


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(place):
    corpus = (f"a={place}/a.jsonl:3", f"b={place}/b.jsonl:1", f"b={place}/b2.txt:1")
    return config(*corpus, cache=place / "cache")


def test_documents_are_grouped_by_source(mixed):
    shards = prepare(mixed)
    for part in (shards.train, shards.validation):
        (a, middle), (same, end) = part.ranges["a"], part.ranges["b"]
        assert a == 0 and middle == same and end == part.tokens
        text = shards.tokenizer.decode(part.ids[:middle])
        assert prose(0, 120)[:20] in text or part is shards.validation
        assert part.ids[0] == part.ids[middle] == shards.tokenizer.bos_id and part.ids[middle - 1] == shards.tokenizer.eos_id
    plain = prepare(replace(mixed, corpus=tuple(path for path in mixed.paths)))
    assert plain.folder != shards.folder and plain.train.ranges == {}
    for part in ("train", "validation"):
        assert np.array_equal(getattr(plain, part).ids, getattr(shards, part).ids), "one split, one tokenizer, one order"
    assert plain.tokenizer.sha256 == shards.tokenizer.sha256 and "ranges" not in (plain.folder / "index.json").read_text()


def test_weights_build_nothing_and_names_do(mixed):
    first = prepare(mixed)
    heavier = tuple(entry.replace(":1", ":5") for entry in mixed.corpus)
    assert prepare(replace(mixed, corpus=heavier)).folder == first.folder and not prepare(replace(mixed, corpus=heavier)).is_new
    renamed = tuple(entry.replace("b=", "c=") for entry in mixed.corpus)
    assert prepare(replace(mixed, corpus=renamed)).folder != first.folder


def test_a_source_of_one_book_is_cut_though_others_are_not(place):
    (place / "book.txt").write_text("".join(prose(n, 80) for n in range(300, 340)))
    said = []
    corpus = (f"a={place}/a.jsonl:1", f"book={place}/book.txt:1")
    shards = prepare(config(*corpus, cache=place / "cache"), info=said.append)
    assert any(line.startswith("1 document of book cannot have 20% held out: cut after blank lines") for line in said)
    assert all(end > start for part in (shards.train, shards.validation) for start, end in part.ranges.values())
    assert shards.report["documents"] == 61


def test_a_source_with_nothing_to_train_on(place):
    (place / "copy.jsonl").write_text((place / "a.jsonl").read_text())
    with pytest.raises(DataError, match="the source copy has nothing to train on: 60 documents read, all of it was dropped"):
        prepare(config(f"a={place}/a.jsonl:1", f"copy={place}/copy.jsonl:1", cache=place / "cache"))


def task_of(shards, data, **changes):
    made = {"data": data, "optimizer": OptimizerConfig(batch_size=8)} | changes
    base = TrainConfig(**made)
    return CausalTask(replace(base, network=replace(base.network, context=16)), shards)


def test_a_task_mixes_and_scores_each_source_once(mixed):
    shards = prepare(mixed)
    task = task_of(shards, mixed)
    assert isinstance(task.stream, MixedBlocks)
    start = shards.train.ranges["b"][0]
    from_b = sum((task.stream.token_indices(step)[:, 0] >= start).sum() for step in range(128))
    assert from_b == 256
    labels = [batch["labels"] for batch in task.validation]
    scored = {
        name: sum(int((each != -100).sum()) for each, of in zip(labels, task.validation_sources, strict=True) if of == name)
        for name in "ab"
    }
    ids = shards.validation.ids
    held_out = {name: ids[start:end] for name, (start, end) in shards.validation.ranges.items()}
    assert scored == {name: len(part) - int((part == 1).sum()) for name, part in held_out.items()}
    assert sum(scored.values()) == shards.validation.targets
    limited = task_of(shards, mixed, report=ReportConfig(eval_tokens=200))
    sizes = {name: len(part) for name, part in validation_ids_by_source(limited.config, shards).items()}
    whole = {name: end - start for name, (start, end) in shards.validation.ranges.items()}
    assert sum(sizes.values()) in (199, 200) and abs(sizes["b"] / 200 - whole["b"] / sum(whole.values())) < 0.01
    assert len(limited.held_out) == sum(sizes.values())
    with pytest.raises(DataError, match=r"what is trained on of the source b has .* fewer than one block of context=5000"):
        CausalTask(replace(task.config, network=replace(task.config.network, context=5000)), shards)
    assert len(task.source.origin(0)) > 1


@pytest.mark.parametrize("objective", ["clm", "mlm", "mlm --mlm.nsp"])
def test_a_run_of_a_mixture(mixed, tmp_path, objective):
    objective, *more = objective.split()
    preset = "tiny" if objective == "clm" else "tiny-bert" if more else "tiny-encoder"
    changes = {"objective": objective, "preset": preset, "val-fraction": 0.2, "cache": mixed.cache, "save-every": 20}
    options = [*arguments(SMALL | changes), *more, "--corpus", *mixed.corpus]
    said = command(*options, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    assert re.search(r"mixture  a 75\.0%, \d\.\d epochs; b 25\.0%, \d+\.\d epochs\n", said.out)
    (row, *_) = [row for row in metrics(tmp_path / "run") if row["split"] == "validation"]
    low, high = sorted((row["loss_a"], row["loss_b"]))
    assert low < row["loss"] < high
    assert f"loss {row['loss']:.4f} (a {row['loss_a']:.4f}, b {row['loss_b']:.4f}) · " in said.out
    assert f"--corpus {' '.join(mixed.corpus)}" in said.out
    if objective == "mlm":
        return
    assert stopped_at(20, *options, "--out", tmp_path / "half").code == 130
    assert command("--resume", tmp_path / "half").code == 0
    assert_same_end(tmp_path / "run", tmp_path / "half", 40)


def test_without_names_nothing_is_said_of_sources(mixed, tmp_path):
    options = arguments(SMALL | {"val-fraction": 0.2, "cache": mixed.cache, "steps": 2})
    said = command(*options, "--corpus", *mixed.paths, "--out", tmp_path / "run")
    assert said.code == 0 and "mixture" not in said.out
    assert not any(name.startswith("loss_") for row in metrics(tmp_path / "run") for name in row)


# --- records ----------------------------------------------------------------------------------------------------------


class Lines(RecordTask):
    """Each text is its letters."""

    @classmethod
    def columns(cls, settings):
        return [("text", "--text-key")]

    @classmethod
    def texts(cls, settings, row):
        return [row["text"]]

    def transform(self, row, random):
        ids = np.frombuffer(row["text"][:14].encode(), np.uint8).astype(np.int64)
        return [Example(ids, ids, extra={"of": np.array(len(row["text"]) > 500)})]

    scores = score_line = verdict = sample = example_command = objective = None


Lines.__abstractmethods__ = frozenset()


@pytest.mark.parametrize("validation", [(), ("b2.jsonl",)])
def test_records_are_mixed(inside, validation):
    (inside / "b2.jsonl").write_text("".join(json.dumps({"text": prose(n, 60)}) + "\n" for n in range(400, 404)))
    made = replace(TrainConfig(), data=config(cache=inside / "cache", validation=validation))
    made = replace(made, network=replace(made.network, context=16), optimizer=OptimizerConfig(batch_size=8, accumulate=2))
    said = []
    task = Lines(made, Lines.open_data(made, None, said.append))
    assert sum(len(rows) for rows in (task.data.train, task.data.validation)) == 80 + 4 * len(validation)
    of_a = torch.cat([batch["of"] for step in range(64) for batch in task.source.batches(step)])
    assert int(of_a.sum()) == 768 and len(of_a) == 1024
    assert re.search(r"mixture  a 75\.0%, [\d.]+ epochs; b 25\.0%, [\d.]+ epochs\n", task.introduction())
    assert task.epochs(700) == 700 * 16 / len(task.data.train)
    plain = replace(made, data=config("a.jsonl", "b.jsonl", cache=inside / "cache", validation=validation))
    alone = Lines(plain, Lines.open_data(plain, None, said.append))
    assert alone.identity() == task.identity() and "mixture" not in alone.introduction()
    values, pad_id = alone.data.train.values, alone.pad_id
    same = ExampleSource(values, alone.transform, batch_size=8, accumulate=2, max_lengths=(16,), pad_id=pad_id)
    for mine, theirs in zip(alone.source.batches(5), same.batches(5), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_records_that_cannot_be_mixed(inside):
    made = replace(TrainConfig(), data=config("a=a.jsonl:1", "b=b2.txt:1", cache=inside / "cache"))
    made = replace(made, network=replace(made.network, context=16))
    with pytest.raises(TrainError, match="the source b has no record to train on"):
        Lines(made, Lines.open_data(made, None, print))
    with patch.object(CausalTask, "can_mix", False):
        said = command("--corpus", *MIXED, "--out", inside / "run")
    assert said.code == 2 and "--objective clm does not mix sources by weight: give --corpus without names" in said.err


# --- text to validate on ---------------------------------------------------------------------------------------------


def test_named_text_is_the_validation_split(place):
    (place / "held.jsonl").write_text("".join(json.dumps({"text": prose(n, 120)}) + "\n" for n in (3, 7, 900, 901)))
    near = prose(900, 120).replace("ta", "TA", 2) + " and more words at the end of it"
    (place / "near.txt").write_text(near)
    said, cache = [], place / "cache"
    data = config(f"{place}/a.jsonl", f"{place}/near.txt", validation=(f"{place}/held.jsonl",), cache=cache)
    shards = prepare(data, info=said.append)
    assert shards.validation.documents == 4 and shards.train.documents == 58
    assert "61 documents to train on: dropped 2 that validation has too, and 1 that it has most of" in said
    assert len(shards.report["held_out_exact"]) == 2 and shards.report["held_out_near"][0][0].endswith("near.txt")
    assert prose(3, 120) not in shards.tokenizer.decode(shards.train.ids[:].tolist())
    assert prose(3, 120) in shards.tokenizer.decode(shards.validation.ids[:].tolist())
    assert prepare(replace(data, dedup=False)).train.documents == 59
    again = prepare(data)
    assert not again.is_new and prepare(replace(data, validation=())).folder != again.folder
    (place / "held.jsonl").write_text(json.dumps({"text": prose(3, 120)}) + "\n")
    assert prepare(data).validation.documents == 1
    with pytest.raises(DataError, match=r"nothing is left to train on: all of the corpus stands in --validation .*a\.jsonl"):
        prepare(config(f"{place}/a.jsonl", validation=(f"{place}/a.jsonl",), cache=cache))


def test_one_document_can_be_learned_from_where_others_are_held_out(place):
    data = config(f"{place}/b2.txt", f"{place}/a.jsonl", validation=(f"{place}/b2.txt",), cache=place / "cache")
    said = []
    assert prepare(data, info=said.append).validation.documents == 1 and not any("cut" in line for line in said)


def test_near_is_of_what_is_trained_on():
    long, short = Document("long", prose(1, 300) + prose(2, 300)), Document("short", prose(1, 300))
    kept, exact, near = drop_held_out([short, Document("same", long.text.upper())], [long])
    assert not kept and exact == ["same"] and near[0][0] == "short" and near[0][1] > 0.95
    longer = Document("longer", prose(1, 300) + prose(2, 600))
    kept, exact, near = drop_held_out([longer, Document("no words", "!")], [short, Document("none either", "?")])
    assert [document.name for document in kept] == ["longer", "no words"], "validation's text in a longer one is no near copy"
    assert drop_held_out([short], [Document("", prose(5))], near=False) == ([short], [], [])


def test_commands_take_and_say_it(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    common = ["--vocab-size", 300, "--cache", place / "cache"]
    said = command("prepare", "--corpus", *MIXED, "--validation", "b2.txt", *common, main=data.__main__.main)
    assert said.code == 0, said.err
    assert "held out     b2.txt: 0 equal and 0 near documents dropped from training" in said.out
    assert re.search(r"source       a: weight 3 \(75\.0%\), [\d,]+ tokens to train on, 0 held out", said.out)
    idle = command("prepare", "--val-fraction", 0.1, "--validation", "b2.txt", main=data.__main__.main)
    assert idle.code == 2 and "--val-fraction would have no effect: --validation says what is held out" in idle.err
    run = tmp_path / "run"
    said = command(*arguments(SMALL), "--corpus", *MIXED, "--validation", "b2.txt", "--cache", place / "cache", "--out", run)
    assert said.code == 0, said.err
    assert "--validation b2.txt" in said.out and "1 document, " in said.out
    rows = [row for row in metrics(run) if row["split"] == "validation"]
    assert rows and not any(name.startswith("loss_") for name in rows[0])
    assert last_checkpoint(run).name == "step-40"
