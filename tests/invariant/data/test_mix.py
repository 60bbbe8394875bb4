"""--mix: which share of the rows each source of a mixture gets, how often it is read, and what was drawn until a step."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

import data.__main__
from data.config import DataConfig, DataError
from data.corpus.prepare import prepare
from data.example import Example
from data.sources.mixture import PERIOD, Mixture, row_shares
from eval.commands.held_out import open_text
from model.hub import read_config
from tests.runs import arguments, assert_same_end, command, last_checkpoint, metrics, stopped_at
from tests.texts import prose
from train.config import OptimizerConfig, TrainConfig
from train.config_toml import from_plain, to_plain, with_absolute_paths
from train.mixing import Mixing
from train.overrides import differing
from train.record_task import RecordTask
from train.reports.comparability import plain
from train.reports.summary import text_options
from train.tasks.clm import CausalTask

SMALL = {"preset": "tiny", "width": 16, "depth": 1, "heads": 2, "context": 16, "batch-size": 8, "vocab-size": 300, "steps": 40}
SMALL |= {"threads": 1, "device": "cpu", "precision": "fp32", "eval-every": 20, "sample-every": 0, "log-every": 5}
SMALL |= {"val-fraction": 0.2, "save-every": 20}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """a.jsonl has 60 short documents; b.jsonl 20 that are eight times as long."""
    place = tmp_path_factory.mktemp("mix")
    for name, seeds, words in (("a.jsonl", range(60), 20), ("b.jsonl", range(100, 120), 160)):
        (place / name).write_text("".join(json.dumps({"text": prose(n, words)}) + "\n" for n in seeds))
    return place


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def config(*corpus, **changes):
    return DataConfig(**{"corpus": corpus, "vocab_size": 300, "val_fraction": 0.2} | changes)


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1, 1.7, 2, 1 / 0.3, math.inf])
def test_temperature_is_the_closed_form(temperature):
    """p_k^(1/T) / Σ p^(1/T) of the proportions p; T = 1 is proportional, T = ∞ equal."""
    sizes = {"a": 7.0, "b": 900.0, "c": 31.0}
    mixed = DataConfig(("a=x", "b=y", "c=z"), mix="temperature", mix_temperature=temperature)
    p = np.array(list(sizes.values())) / sum(sizes.values())
    wanted = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    shares = row_shares(mixed, sizes, dict.fromkeys(sizes, 1))
    assert list(shares) == ["a", "b", "c"] and np.allclose(list(shares.values()), wanted, rtol=1e-14, atol=0)
    if temperature in (1, math.inf):
        assert np.allclose(wanted, p if temperature == 1 else 1 / 3, rtol=1e-14)


def test_shares_by_weight():
    weighted = DataConfig(("a=x:3", "b=y:1"))
    sizes, documents = {"a": 100.0, "b": 50.0}, {"a": 50, "b": 5}
    assert row_shares(weighted, sizes, documents) == {"a": 0.75, "b": 0.25}
    assert row_shares(replace(weighted, mix="documents"), sizes, documents) == {"a": 0.375, "b": 0.625}  # 3 · 2 to 1 · 10
    assert row_shares(DataConfig(), {}, {}) == {}


def test_drawn_shares():
    """Counted row by row; exact at each PERIOD rows, and between them within three sigma of a draw without replacement."""
    weights_K, scores = np.array([0.5, 0.3, 0.2]), []
    for seed in range(20):
        mixture = Mixture(weights_K, seed)
        for rows in (1, 500, 1023, 1024, 1025, 2500):
            assert np.array_equal(mixture.counts(rows), np.bincount(mixture.rows(0, rows)[0], minlength=3)), rows
        share_K = mixture.counts(PERIOD) / PERIOD
        assert np.abs(share_K - weights_K).max() <= 1 / PERIOD
        assert np.array_equal(mixture.counts(7 * PERIOD), 7 * mixture.counts(PERIOD))
        for rows in range(64, PERIOD, 64):
            sigma_K = np.sqrt(rows * share_K * (1 - share_K) * (PERIOD - rows) / (PERIOD - 1))
            scores.append((mixture.counts(PERIOD + rows) - (PERIOD + rows) * share_K) / sigma_K)
    z_NK = np.array(scores)
    assert (np.abs(z_NK) <= 3).mean() > 0.99 and 0.8 < (z_NK**2).mean() < 1.2


@pytest.mark.parametrize(("mix", "share"), [("documents", 0.75), ("tokens", 0.96)])
def test_documents_are_counted(inside, mix, share):
    """Three documents of a to one of b, by --mix documents; with the same weights of tokens far more are of a."""
    shards = prepare(config("a=a.jsonl:3", "b=b.jsonl:1", cache=inside / "cache"))
    made = TrainConfig(data=config("a=a.jsonl:3", "b=b.jsonl:1", mix=mix), optimizer=OptimizerConfig(batch_size=64))
    task = CausalTask(replace(made, network=replace(made.network, context=16)), shards)
    middle, is_first_N = shards.train.ranges["b"][0], shards.train.ids == shards.tokenizer.bos_id
    assert task.mixing.documents == {"a": is_first_N[:middle].sum(), "b": is_first_N[middle:].sum()}
    seen = np.concatenate([task.stream.token_indices(step)[:, :-1].ravel() for step in range(256)])
    first = seen[is_first_N[seen]]
    assert (first < middle).mean() == pytest.approx(share, abs=0.01)
    rows = (task.stream.token_indices(0)[:, 0] < middle).mean()
    assert task.drawn(1) == {"drawn_a": rows, "drawn_b": 1 - rows}
    held = shards.validation.ranges["a"][1] / shards.validation.tokens
    line = f"held out are a {held:.1%}, b {1 - held:.1%}: so the validation loss weighs them, and the best checkpoint; "
    assert (f"         {line}--early-stop-on loss_a watches one\n" in task.mixture()) == (mix == "tokens")


class Letters(RecordTask):
    """Each letter of a text is an example."""

    columns = classmethod(lambda cls, settings: [("text", "--text-key")])
    texts = classmethod(lambda cls, settings, row: [row["text"]])

    def transform(self, row, random):
        ids = np.frombuffer(row["text"].encode(), np.uint8).astype(np.int64)
        return [Example(ids[i : i + 1], ids[i : i + 1], extra={"of": np.array(len(ids))}) for i in range(len(ids))]

    scores = score_line = verdict = sample = example_command = objective = None


Letters.__abstractmethods__ = frozenset()


@pytest.mark.parametrize(("changes", "share"), [({}, 1 / 2), ({"mix": "documents"}, 1 / 5), ({"mix": "temperature"}, 1 / 3)])
def test_records(tmp_path, changes, share):
    """a has 2 rows a record, b 8 of as many records: by records b gets four times the rows, by temperature 2 twice."""
    for name, text in (("a", "xy"), ("b", "abcdefgh")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text[::-1]}) + "\n")
    end = "" if changes.get("mix") == "temperature" else ":1"
    corpus = tuple(f"{name}={tmp_path}/{name}.jsonl{end}" for name in "ab")
    changes = changes | {"validation": (f"{tmp_path}/a.jsonl",), "vocab_size": None, "cache": tmp_path / "cache"}
    made = TrainConfig(data=config(*corpus, **changes))
    made = replace(made, network=replace(made.network, context=16), optimizer=OptimizerConfig(batch_size=64))
    task = Letters(made, Letters.open_data(made, None, lambda line: None))
    of = np.concatenate([batch["of"].numpy() for step in range(16) for batch in task.source.batches(step)])
    assert (of == 2).mean() == pytest.approx(share, abs=1 / PERIOD)
    assert task.drawn(16)["drawn_a"] == (of == 2).mean() and task.drawn(3)["drawn_b"] == (of[:192] == 8).mean()
    if changes.get("mix") == "documents":
        assert "(--mix documents: weight times rows a record, 2.00 of a, 8.00 of b)\n" in task.introduction()


def test_sources_that_are_read_often():
    """More than four epochs of a source are said, with its name and their number."""
    mixing = Mixing(DataConfig(("a=x:1", "b=y:1")), {"a": 10.0, "b": 100.0}, {"a": 1, "b": 1}, seed=0)
    assert mixing.describe(80, {}).splitlines() == ["mixture  a 50.0%, 4.0 epochs; b 50.0%, 0.4 epochs"]
    often = "         a is read 4.1 times: up to 4 epochs are about as good as new text, more add less and less"
    assert mixing.describe(82, {}).splitlines()[1:] == [often]


def test_held_out_text_that_weighs_sources_otherwise():
    """Said where it differs more than twice from the shares; the lightest source that has a loss is named."""
    mixing = Mixing(DataConfig(("a=x:1", "b=y:1")), {"a": 100.0, "b": 100.0}, {"a": 1, "b": 1}, seed=0)
    for held_out in ({}, {"a": 1, "b": 3}, {"a": 3, "b": 1}):
        assert mixing.describe(8, held_out, ["a", "b"]).count("\n") == 1
    line = "         held out are a {}, b {}: so the validation loss weighs them, and the best checkpoint"
    uneven = line.format("9.1%", "90.9%")
    assert mixing.describe(8, {"a": 1, "b": 10}, ["a", "b"]).splitlines()[1] == f"{uneven}; --early-stop-on loss_a watches one"
    assert mixing.describe(8, {"a": 1, "b": 10}).splitlines()[1] == uneven, "records have no loss of a source"
    assert mixing.describe(8, {"b": 10}, ["b"]).splitlines()[1] == line.format("0.0%", "100.0%"), "loss_b is the loss"
    three = Mixing(DataConfig(("a=x:1", "b=y:1", "c=z:6")), dict.fromkeys("abc", 9.0), dict.fromkeys("abc", 1), seed=0)
    assert "b 10.0%, c 20.0%: " in (said := three.describe(8, {"a": 7, "b": 1, "c": 2}, ["a", "b", "c"])) and "loss_c " in said


# --- runs -------------------------------------------------------------------------------------------------------------


PAIRS = pytest.param("mlm --mlm.nsp --mix documents", marks=pytest.mark.slow)


@pytest.mark.parametrize("objective", ["clm --mix temperature --mix-temperature inf", PAIRS])
def test_a_run_is_stopped_and_resumed(inside, tmp_path, objective, monkeypatch):
    """The resumed run ends in the same bytes, with the same drawn shares, which are those of its rows."""
    objective, *more = objective.split()
    end = "" if "temperature" in more else ":1"
    changes = {"preset": "tiny" if objective == "clm" else "tiny-encoder-pairs", "objective": objective}
    changes |= {"cache": inside / "cache"}
    options = [*arguments(SMALL | changes), *more, "--corpus", f"a=a.jsonl{end}", f"b=b.jsonl{end}"]
    said = command(*options, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    shares = [float(share) / 100 for share in re.search(r"mixture  a ([\d.]+)%, .*; b ([\d.]+)%", said.out).groups()]
    assert ("(--mix temperature: size^(1/inf))" if end == "" else "(--mix documents: weight times rows a document,") in said.out
    rows = [row for row in metrics(tmp_path / "run") if row["split"] == "train"]
    assert len(rows) == 9 and all(row["drawn_a"] + row["drawn_b"] == 1 for row in rows)
    sigma = math.sqrt(shares[0] * shares[1] / 320)
    assert abs(rows[-1]["drawn_a"] - shares[0]) < 3 * sigma and rows[0]["drawn_a"] * 8 % 1 == 0
    assert stopped_at(15, *options, "--out", tmp_path / "half").code == 130
    assert command("--resume", tmp_path / "half").code == 0
    assert_same_end(tmp_path / "run", tmp_path / "half", 40)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun gives the same relative paths and weights again
    assert "nothing is left to do" in command(*options, "--out", tmp_path / "run").out
    folder = last_checkpoint(tmp_path / "run")
    own, other = (open_text(folder, read_config(folder), corpus=each, eval_tokens=999) for each in ((), ("b.jsonl",)))
    assert own.mixing.shares.keys() == {"a", "b"} and other.mixing.shares == {}, "python -m eval perplexity RUN"


# --- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"corpus": ("a=a.jsonl:3", "b=b.jsonl")}, "--corpus a=a.jsonl:3: a weight, and --mix temperature computes it"),
        ({"corpus": ("a=a.jsonl", "b.jsonl")}, "--corpus b.jsonl: with --mix temperature each source is NAME=PATH"),
        ({"mix_temperature": 0.5}, "--mix-temperature 0.5: at least 1"),
        ({"mix_temperature": math.nan}, "--mix-temperature nan: at least 1"),
        ({"mix": "rows"}, "--mix 'rows': one of tokens, documents, temperature"),
    ],
)
def test_bad_settings(inside, changes, told):
    with pytest.raises(DataError, match=re.escape(told)):
        config(**{"corpus": ("a=a.jsonl", "b=b.jsonl"), "mix": "temperature"} | changes)


def test_temperature_without_a_mixture(inside):
    """Refused in one line, as by --mix documents; in a recipe too."""
    (inside / "hot.toml").write_text('[data]\ncorpus = ["a.jsonl"]\nmix = "temperature"\n')
    for options in (["--corpus", "a.jsonl", "--mix", "temperature"], ["--recipe", "hot.toml"]):
        said = command(*options, "--out", "refused")
        told = "error: --mix temperature with --corpus a.jsonl: each source is NAME=PATH\n"
        assert (said.code, said.out, said.err) == (2, "", told)


def test_settings_travel(inside):
    """Weights are 1 where sizes decide; a file of a source's name is a path; validation and other corpora are no mixture."""
    mixed = config("a=a.jsonl", "b=stdlib-docs", mix="temperature", mix_temperature=3.0, validation=("b.jsonl",))
    assert mixed.weights == {"a": 1.0, "b": 1.0} and mixed.paths == ("a.jsonl", "stdlib-docs")
    absolute = with_absolute_paths(TrainConfig(data=mixed))
    assert absolute.data.corpus == (f"a={inside}/a.jsonl", "b=stdlib-docs")
    assert from_plain(TrainConfig, to_plain(absolute), "x").data == absolute.data
    assert differing(from_plain(TrainConfig, to_plain(absolute), "x"), absolute) == []
    assert mixed.validation_config().corpus == ("b.jsonl",) and mixed.of(("x=y",)).weights == {}
    words = text_options(mixed)
    assert words[:7] == ["--corpus", "a=a.jsonl", "b=stdlib-docs", "--mix", "temperature", "--mix-temperature", "3.0"]
    assert plain(["a=/x/y", "b=stdlib-docs"]) == plain(["b=stdlib-docs:2.0", "a=/x/y:1.0"]) == ["/x/y", "stdlib-docs"]


def test_prepare_prints_the_shares(inside):
    options = arguments({"vocab-size": 300, "val-fraction": 0.2, "cache": inside / "cache", "mix": "documents"})
    said = command("prepare", "--corpus", "a=a.jsonl:1", "b=b.jsonl:1", *options, main=data.__main__.main)
    assert said.code == 0, said.err
    assert re.search(r"source       a: weight 1 of documents \(1\d\.\d%\), [\d,]+ tokens to train on", said.out)
    said = command("prepare", "--corpus", "a.jsonl", "--mix", "documents", main=data.__main__.main)
    assert said.code == 2 and "--mix would have no effect: it is of a mixture" in said.err
