"""Fill in the middle through the real commands: training at both levels, resume, scores, filling a gap, refusals."""

import json
import math

import pytest
import torch

import model.__main__
import model.hub
from data.config import DataConfig
from data.tokenizer.open import load_tokenizer
from data.tokenizer.training import train_tokenizer
from data.transforms.fim import MID, PRE, SUF
from model.commands.infill import Gap
from model.config import ConfigError
from tests.compare import absolute
from tests.conftest import randomized, tiny_config
from tests.runs import SETTINGS, arguments, assert_same_end, command, further, last_checkpoint, stopped_at, write_corpus
from tests.texts import prose
from train.config import NetworkConfig, OptimizerConfig, RunConfig
from train.registry import config_type, load
from train.reports.log import read_metrics
from train.tasks.fim import FimTask, Settings

STEPS = 30
FIM = SETTINGS | {"objective": "fim", "optimizer": "muon", "steps": STEPS, "save-every": 10, "eval-every": 10}
FIM["sample-every"] = STEPS
SHAPE = ("width", "depth", "heads")  # --init decides them


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return {"corpus": write_corpus(folder / "corpus"), "cache": folder / "cache"}


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fim") / "run"
    said = command(*arguments(FIM | corpus), "--out", folder)
    assert said.code == 0, said.err
    return folder, said.out


def validations(run) -> list[dict]:
    return [row for row in read_metrics(run / "metrics.jsonl") if row["split"] == "validation"]


def test_a_run_learns(run):
    folder, out = run
    first, *_, last = validations(folder)
    assert last["loss"] < first["loss"] and last["infill_loss"] < first["infill_loss"] and last["shuffled_loss"] > 0
    assert "'Return the'" not in out  # the printed command has words of this corpus
    assert "with another gap's suffix" in out and "tokens of starcoder" in out
    assert "--infill-order spm" in out and "in brackets" in out


@pytest.mark.slow
def test_documents_are_transformed_whole_and_resume(corpus, tmp_path):
    """More steps than an epoch has; the middle ends with a token of its own."""
    changes = {"fim.level": "document", "fim.format": "codellama", "batch-size": 8, "width": 16, "sample-every": 0}
    options = arguments(FIM | corpus | changes | {"steps": 50, "eval-every": 50, "save-every": 20})
    assert command(*options, "--out", tmp_path / "one").code == 0
    assert stopped_at(44, *options, "--out", tmp_path / "two").code == 130
    assert command("--resume", tmp_path / "two").code == 0
    assert_same_end(tmp_path / "two", tmp_path / "one", 50)
    assert load_tokenizer(last_checkpoint(tmp_path / "one")).control_tokens["\u2581<EOT>"] == 6


def task_of(corpus, tokenizer=None, **settings):
    config = config_type("fim")(
        run=RunConfig(objective="fim"),
        data=DataConfig(corpus=(str(corpus["corpus"]),), cache=corpus["cache"], vocab_size=320, val_fraction=0.2),
        network=NetworkConfig(context=32),
        optimizer=OptimizerConfig(batch_size=4, accumulate=2),
        fim=Settings(**settings),
    )
    return load("fim")(config, FimTask.open_data(config, tokenizer, lambda line: None))


def test_validation_is_clm_s_text_and_fixed_gaps(corpus):
    """Left to right the batches are those of clm; every piece of a gap's batch has its middle at the end."""
    task = task_of(corpus, rate=1.0)
    plain = load("clm")(task.config, task.data)
    half = len(plain.validation)
    for ours, theirs in zip(task.validation[:half], plain.validation, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    gaps = task.validation[half:]
    assert len(gaps) == half and all("shuffled_ids" in batch for batch in gaps)
    scored = torch.cat([batch["labels"][batch["labels"] >= 0] for batch in gaps])
    assert (scored == task.tokenizer.eos_id).sum() > len(gaps) and not set(task.fim.ids.values()) & set(scored.tolist())
    sums = {"loss_ text": (50.0, 10), "loss_ infill": (12.0, 4), "loss": (62.0, 14), "shuffled_loss": (20.0, 4)}
    scores = task.scores(sums)
    assert scores["loss"] == 5.0 and scores["infill_loss"] == 3.0 and scores["shuffled_loss"] == 5.0
    assert math.isclose(scores["bits_per_byte"], 50 / math.log(2) / plain.validation_bytes)
    few = task.scores(sums | {"loss_ infill": (0.0, 0), "shuffled_loss": (0.0, 0)})
    assert "infill_loss" not in few and "shuffled_loss" not in few and "no held-out gap" in task.score_line(few)
    assert "middles 3.0000, with another gap's suffix 5.0000" in task.score_line(scores)
    assert "loss_ text" not in scores and "loss_ infill" not in scores


def test_all_tokens_are_learned_but_padding(corpus):
    """Sentinels and ends have labels; a micro-batch is the same in any split of the step."""
    task = task_of(corpus, rate=1.0)
    two = task.source.batches(3)
    labels = torch.cat([batch["labels"] for step in range(40) for batch in task.source.batches(step)])  # an epoch
    assert all((labels == id).any() for role, id in task.fim.ids.items() if role != "PAD")
    assert (labels == task.fim.end_id).sum() >= 200 and not (labels == task.fim.pad_id).any()
    whole = task.batch(task.stream.batch(3), 3, 0)
    assert all(torch.equal(torch.cat([batch[name] for batch in two]), whole[name]) for name in whole)
    network = randomized(tiny_config("gpt2"))
    objective = task.objective(network, sum, held_out=max)
    assert objective.losses == {True: sum, False: max}
    document = task_of(corpus, rate=1.0, level="document")
    assert document.source.documents(0) == document.stream.document_indices(0)
    assert document.source.origin(2) == [f"document {number}" for number in document.stream.document_indices(2)]


@pytest.mark.parametrize(("spm_rate", "order"), [(0.0, "psm"), (0.5, "spm"), (1.0, "spm")])
def test_a_sample_s_gap_is_whole(spm_rate, order, corpus, monkeypatch):
    """With room for the middle in a context of 32, in an order that is trained; fixed gaps are in spm where psm is not."""
    task, calls = task_of(corpus, spm_rate=spm_rate), []
    monkeypatch.setattr("model.generate.generate", lambda network, ids, **options: calls.append((ids, options)) or ids[:, :0])
    _, text = task.sample(None, torch.device("cpu"))
    (((ids,), options),) = calls
    pre, suf, mid = (ids.tolist().index(task.fim.ids[role]) for role in (PRE, SUF, MID))
    assert pre == 1 < suf < mid and len(ids) + options["max_new_tokens"] <= 32 and options["max_new_tokens"] == 16
    assert (suf == 2 and mid + 1 < len(ids)) == (order == "spm") and all(text.split("[]"))
    assert f"--infill-order {order}" in task.example_command(corpus["cache"])
    gaps = torch.cat([batch["input_ids"] for batch in task.validation if "shuffled_ids" in batch])
    follows = gaps[gaps.roll(1, -1) == task.fim.ids[PRE]] == task.fim.ids[SUF]  # what stands behind PRE
    assert follows.all() if spm_rate == 1 else not follows.all()
    monkeypatch.setattr(task, "sample_prompt", lambda tokens: task.tokenizer.encode("the file reads\n"))
    assert task.gap() == ("the file ", "r", "eads\n")  # not the last character alone


def generated(run, *options):
    return command("generate", run, *options, main=model.__main__.main)


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_a_gap_is_filled(order, run):
    """Psm, the first published order, by default."""
    gap = ("--prefix", "the file", "--suffix", " of objects.", "--temperature", 0)
    gap += ("--infill-order", order) if order == "spm" else ()
    said = generated(run[0], *gap)
    assert said.code == 0 and said.out.startswith("the file") and said.out.endswith(" of objects.\n")
    assert "the middle has" in said.err  # the context is 32
    assert said.out == generated(run[0], *gap, "--no-stream").out
    folder = last_checkpoint(run[0])
    tokenizer, network = load_tokenizer(folder), model.hub.load(folder).eval()
    prefix, suffix = tokenizer.encode("the file"), tokenizer.encode(" of objects.")
    ids = [1, 3, *prefix, 4, *suffix, 5] if order == "psm" else [1, 3, 4, *suffix, 5, *prefix]
    names = ("<s>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    assert [tokenizer.control_tokens[name] for name in names] == [1, 3, 4, 5]
    text = "the file"
    while len(ids) <= 32:
        best = int(network(torch.tensor([ids])).logits[0, -1].argmax())
        if best in (2, 3, 4, 5, 6):
            break
        ids.append(best)
        text += tokenizer.token_bytes[best].decode()
    assert said.out == f"{text} of objects.\n"


def test_a_suffix_alone(run):
    only = generated(run[0], "--suffix", " of objects.", "--max-new-tokens", 2, "--beams", 2)
    assert only.code == 0 and only.out.endswith(" of objects.\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prefix", "a", "--prompt", "b"), "they do not go with --prompt"),
        (("--suffix", "a", "--source", "b"), "they do not go with --source"),
        (("--prefix", "a b " * 40,), "and the context 32: shorten them"),
    ],
)
def test_refused_gaps(options, message, run):
    said = generated(run[0], *options)
    assert said.code == 2 and message in said.err


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """A network whose tokenizer has no tokens for gaps."""
    folder = tmp_path_factory.mktemp("plain")
    model.hub.save(randomized(tiny_config("gpt2", vocab_size=300), dtype=torch.float32), folder)
    train_tokenizer([prose(0)], 300).save(folder)
    return folder


def test_a_middle_has_the_rest_of_the_context(capsys):
    gap = Gap("", "", [1] * 10, [])
    assert gap.room(5, None) == gap.room(5, 14) == 5 and not capsys.readouterr().err
    assert gap.room(6, 14) == 5 and "the middle has 5 tokens at most" in capsys.readouterr().err
    assert gap.room(6, 10) == 1
    with pytest.raises(ConfigError, match="have 10 tokens, and the context 9"):
        gap.room(6, 9)


def test_a_network_without_the_tokens(run, plain_folder, tmp_path):
    said = generated(plain_folder, "--prefix", "a", "--suffix", "b")
    assert said.code == 2 and "has the tokens of none of the formats starcoder, santacoder, codellama" in said.err
    encoder = randomized(tiny_config("bert", vocab_size=320), dtype=torch.float32)
    model.hub.save(encoder, tmp_path)
    load_tokenizer(last_checkpoint(run[0])).save(tmp_path)
    said = generated(tmp_path, "--prefix", "a")
    assert said.code == 2 and "are for a decoder; this is an encoder" in said.err


def test_refused_training(plain_folder, run, corpus, tmp_path):
    plain = further(arguments({name: value for name, value in (FIM | corpus | {"steps": 2}).items() if name not in SHAPE}))
    said = command(*plain, "--init", plain_folder, "--out", tmp_path / "a")
    assert said.code == 2 and "no <fim_prefix>, <fim_suffix>, <fim_middle>" in said.err and "model resize" in said.err
    said = command(*plain, "--fim.format", "qwen", "--init", run[0], "--out", tmp_path / "b")
    assert said.code == 2 and "it has those of another format: --fim.format starcoder" in said.err
    assert command(*plain, "--fim.rate", 1.5, "--out", tmp_path / "c").code == 2
    place = corpus["corpus"]
    mixed = [*arguments(FIM | {"cache": corpus["cache"]}), "--corpus", f"a={place}:0.5", f"b={place}:0.5"]
    said = command(*mixed, "--fim.level", "document", "--out", tmp_path / "d")
    assert said.code == 2 and "--fim.level document reads one source" in said.err
    said = command(*plain, "--init", run[0], "--out", tmp_path / "e")
    assert said.code == 0 and "before the first step: loss" in said.out, said.err
    row = json.loads((tmp_path / "e" / "metrics.jsonl").read_text().splitlines()[0])
    assert absolute(torch.tensor(row["infill_loss"]), torch.tensor(validations(run[0])[-1]["infill_loss"])) < 0.2
