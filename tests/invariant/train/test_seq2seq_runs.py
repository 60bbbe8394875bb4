"""Sequence to sequence through the real command: from nothing and from a folder, killed, on two ranks, with adapters."""

import json
import math
import re
import shlex

import peft
import pytest
import torch
import transformers

import model.__main__
from tests.fault.test_ranks import torchrun
from tests.runs import arguments, assert_same_end, command, last_checkpoint, metrics, stopped_at
from tests.seq2seq import write_folder, write_pairs
from train.reports.log import read_metrics

STEPS = 24
SETTINGS = {
    "objective": "seq2seq",
    "preset": "tiny-seq2seq",
    "width": 32,
    "depth": 2,
    "heads": 2,
    "context": 48,
    "dropout": 0.1,
    "batch-size": 6,
    "val-fraction": 0.2,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
    "steps": STEPS,
    "save-every": 8,
    "eval-every": 8,
    "log-every": 2,
    "seq2seq.generated": 6,
}
FOLDER = {name: value for name, value in SETTINGS.items() if name not in ("preset", "width", "depth", "heads", "dropout")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("seq2seq")
    write_pairs(place / "pairs.jsonl", 60)
    write_folder(place / "t5", "t5")
    return place


def options(place, settings=SETTINGS, **changes) -> list[str]:
    return arguments(settings | {"corpus": place / "pairs.jsonl", "cache": place / "cache"} | changes)


@pytest.fixture(scope="module")
def run(place):
    said = command(*options(place), "--seq2seq.bleu", "--out", place / "run")
    assert said.code == 0, said.err
    return place / "run", said.out


def test_what_it_says(run):
    folder, shown = run
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "validation"]
    keys = {"baseline_loss", "perplexity", "token_accuracy", "exact_match", "bleu"}
    assert all(set(row) == {"step", "split", "loss", "tokens", "time"} | keys for row in rows)
    assert all(row["perplexity"] == pytest.approx(math.exp(row["loss"])) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] and 0 < rows[-1]["token_accuracy"] < 1
    assert f"steps 0 to {STEPS} of 6 records, " in shown and "documents are separated" not in shown
    for part in ("| source     ", "| reference  ", "| output     ", "target tokens/s", f"model generate {folder} --source "):
        assert part in shown, part
    config = json.loads((last_checkpoint(folder) / "config.json").read_text())
    assert config["decoder_start_token_id"] == 1 and config["eos_token_id"] == 2  # <s> and </s>
    assert config["pad_token_id"] == 0  # <unk>: without one transformers shifts no labels
    assert config["num_layers"] == config["num_decoder_layers"] == SETTINGS["depth"]


def test_the_command_that_shows_it(run, tmp_path):
    """As printed: after training, and where another command has written a folder."""
    (line,) = re.findall(r"^  python -m (model generate .*)$", run[1], re.MULTILINE)
    exported = command("export", run[0], "--out", tmp_path / "model", main=model.__main__.main)
    (other,) = re.findall(r"^try it:  python -m (.*)$", exported.out, re.MULTILINE)
    for each in (line, other):
        said = command(*shlex.split(each)[1:], main=model.__main__.main)
        assert "--source" in each and said.code == 0 and said.out, said.err


def test_positions_that_were_read(place, tmp_path, monkeypatch):
    """By which the end tells operations a second: of padded rows, the mean of both texts."""
    sessions = []
    monkeypatch.setattr("train.loop.conclude", lambda run, stopped, session: sessions.append((run, session)))
    assert command(*options(place, steps=5, accumulate=2), "--out", tmp_path / "run").code == 0
    ((run, session),) = sessions
    batches = [batch for step in range(5) for batch in run.source.batches(step)]
    assert session.rows == 5 * 2 * 6 and session.steps == 5
    assert session.positions == sum((b["input_ids"].numel() + b["labels"].numel()) / 2 for b in batches)
    assert session.tokens == sum(int((batch["labels"] >= 0).sum()) for batch in batches)


@pytest.mark.parametrize("packing", ["pad", "first_fit"])
def test_a_resume_ends_in_the_same_bytes(place, tmp_path, packing):
    line = options(place, accumulate=2, ema=0.9, **{"seq2seq.packing": packing})
    assert command(*line, "--out", tmp_path / "whole").code == 0
    assert stopped_at(14, *line, "--out", tmp_path / "run").code == 130
    assert command("--resume", tmp_path / "run").code == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole", STEPS)


def test_other_records_are_no_resume(place, tmp_path):
    line = options(place, corpus=tmp_path / "pairs.jsonl")
    write_pairs(tmp_path / "pairs.jsonl", 60)
    assert stopped_at(14, *line, "--out", tmp_path / "run").code == 130
    write_pairs(tmp_path / "pairs.jsonl", 60, seed=1)
    said = command("--resume", tmp_path / "run")
    assert said.code == 2 and "is no longer the text" in said.err


def test_the_checkpoint_opens_in_transformers(run):
    """Its tokenizer makes the same ids, and its greedy texts are those that `generate` prints."""
    folder = last_checkpoint(run[0])
    theirs, loading = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer, sources = transformers.AutoTokenizer.from_pretrained(folder), ["Return the list", "jumps over the lazy dog."]
    assert tokenizer("a dog")["input_ids"][-1] == 2 and tokenizer("a dog")["input_ids"][0] not in (1, 2)
    said = command("generate", folder, "--source", *sources, "--max-new-tokens", 20, main=model.__main__.main)
    texts = [tokenizer.decode(generated(theirs.eval(), tokenizer, source), skip_special_tokens=True) for source in sources]
    assert said.code == 0 and said.out == "".join(f"{text}\n" for text in texts)


def generated(network, tokenizer, source: str) -> list[int]:
    inputs = tokenizer(source, return_tensors="pt")
    told = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    return network.generate(**told, max_new_tokens=20, num_beams=1, do_sample=False)[0].tolist()


@pytest.mark.parametrize(
    "way", ["lora", "ia3", "prefix", "lora --quantize nf4 --precision bf16"], ids=["lora", "ia3", "prefix", "qlora"]
)
def test_adapters(place, way, tmp_path):
    """Trained, generated with, and where PEFT has the same opened by it, with the same text."""
    adapter, *more = way.split()
    line = options(place, FOLDER, init=place / "t5", adapter=adapter, lr=0.1 if adapter != "lora" else 0.02)
    said = command(*line, *more, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    rows = [row["loss"] for row in metrics(tmp_path / "run") if row["split"] == "validation"]
    assert rows[-1] < rows[0]
    folder = last_checkpoint(tmp_path / "run")
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    source = "Return the list of names"
    said = command("generate", folder, "--source", source, "--max-new-tokens", 20, main=model.__main__.main)
    assert said.code == 0, said.err
    if not more and way != "prefix":  # before both stacks: PEFT has none such
        base = transformers.AutoModelForSeq2SeqLM.from_pretrained(place / "t5")
        tokenizer = transformers.AutoTokenizer.from_pretrained(place / "t5")
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()
        assert said.out == tokenizer.decode(generated(theirs, tokenizer, source), skip_special_tokens=True) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["replicate", "shard"])
def test_two_ranks_are_one(place, mesh, tmp_path):
    line = options(place, dropout=0.0, optimizer="adamw", lr=1e-3)
    assert command(*line, "--out", tmp_path / "one").code == 0
    with torchrun(*line, "--mesh", mesh, "--out", tmp_path / "two") as running:
        _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    for mine, other in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=2e-5) and mine["tokens"] == other["tokens"]
        assert mine.get("exact_match") == other.get("exact_match")


WAYS = ["--recompute blocks", "--recompute selective", "--loss chunked", "--attention reference", "--precision bf16"]


@pytest.fixture(scope="module")
def plain(place):
    assert command(*options(place, FOLDER, init=place / "t5", steps=8), "--out", place / "plain").code == 0
    return place / "plain"


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_compute_the_same(place, plain, way, tmp_path):
    said = command(*options(place, FOLDER, init=place / "t5", steps=8), *way.split(), "--out", tmp_path / "run")
    assert said.code == 0, said.err
    most = 0.02 if "bf16" in way else 1e-5
    pairs = zip(metrics(plain), metrics(tmp_path / "run"), strict=True)
    assert all(mine["loss"] == pytest.approx(other["loss"], rel=most) for mine, other in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("adapter", ["lora", "dora", "adalora", "ia3", "adapter", "prompt", "ptuning", "prefix"])
def test_every_adapter_reads_packed_rows_as_padded(family, adapter, tmp_path):
    """The loss before the first step, of all held-out records, and one update of either packing run through."""
    write_pairs(tmp_path / "pairs.jsonl", 40)
    write_folder(tmp_path / family, family)
    line = options(tmp_path, FOLDER, init=tmp_path / family, adapter=adapter, steps=2, context=40)  # 64 hold 20 more
    alone = family == "t5" and adapter in ("prompt", "ptuning", "prefix")
    for packing in ("pad", "first_fit"):
        if alone and packing == "first_fit":
            said = command(*line, "--seq2seq.packing", packing, "--out", tmp_path / packing)
            assert said.code == 2 and "relative positions would count the other pairs" in said.err
            return
        said = command(*line, "--seq2seq.packing", packing, "--out", tmp_path / packing)
        assert said.code == 0, said.err
    before = [line for line in said.out.splitlines() if line.startswith("before the first step: ")]
    assert before and torch.isfinite(torch.tensor([row["loss"] for row in metrics(tmp_path / "first_fit")])).all()


@pytest.mark.parametrize("preset", ["transformer-base", "bart-base", "flan-t5-small"])
def test_other_families_from_nothing(place, preset, tmp_path):
    said = command(*options(place, preset=preset, steps=4), "--out", tmp_path / "run")
    assert said.code == 0, said.err
    said = command("generate", tmp_path / "run", "--source", "the dog", "--max-new-tokens", 5, main=model.__main__.main)
    assert said.code == 0, said.err
