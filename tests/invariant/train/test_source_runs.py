"""Span corruption and denoising through the real command: what it says and writes, and that transformers reads it."""

import math
import re
import shlex

import pytest
import torch
import transformers

import model.__main__
import model.hub
from data.transforms.causal import IGNORE
from data.transforms.span import find_sentinels
from tests.compare import absolute
from tests.oracle.wide import widen
from tests.runs import SETTINGS, arguments, command, last_checkpoint, write_corpus
from train.config_toml import read_settings
from train.registry import load
from train.reports.log import read_metrics
from train.setup import open_data

STEPS = 12
SMALL = SETTINGS | {"steps": STEPS, "save-every": 6, "eval-every": 6, "log-every": 2, "batch-size": 4, "dropout": 0.1}
OBJECTIVES = {
    "span": SMALL | {"objective": "span", "preset": "tiny-t5", "context": 48},
    "denoise": SMALL | {"objective": "denoise", "preset": "tiny-bart"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("source")
    write_corpus(place / "corpus", 20)
    return place


def options(place, objective, **changes):
    return arguments(OBJECTIVES[objective] | {"corpus": place / "corpus", "cache": place / "cache"} | changes)


@pytest.fixture(scope="module", params=list(OBJECTIVES))
def run(request, place):
    folder = place / request.param
    said = command(*options(place, request.param, **{"sample-every": STEPS}), "--out", folder)
    assert said.code == 0, said.err
    return request.param, folder, said.out


def test_what_it_says(run):
    objective, folder, shown = run
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "validation"]
    keys = {"baseline_loss", "perplexity", "token_accuracy", "shuffled_loss"}
    keys |= {"word_loss", "sentinel_loss", "word_baseline_loss"} if objective == "span" else set()
    assert all(set(row) == {"step", "split", "loss", "tokens", "time"} | keys for row in rows)
    assert all(row["perplexity"] == pytest.approx(math.exp(row["loss"])) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] and all(math.isfinite(row["shuffled_loss"]) for row in rows)
    for part in ("| source  ", "| target  ", "| output  ", "target tokens/s", f"model generate {folder} --source ", "unigrams"):
        assert part in shown, part
    sample = shown[shown.index("| source") :]
    if objective == "span":
        assert "<extra_id_0>" in sample and "48" in shown and "blocks   52 tokens of text; 8 of noise in 3 spans" in shown
        assert f"steps 0 to {STEPS} of {52 * 4} tokens" in shown
    else:
        assert "[MASK]" in sample and f"steps 0 to {STEPS} of {30 * 4} tokens" in shown
    config = model.hub.read_config(last_checkpoint(folder))
    assert config.decoder_start_id == (config.pad_id if objective == "span" else config.eos_id)


def test_the_command_that_shows_it(run):
    objective, _, shown = run
    (line,) = re.findall(r"^  python -m (model generate .*)$", shown, re.MULTILINE)
    said = command(*shlex.split(line)[1:], "--max-new-tokens", 12, main=model.__main__.main)
    assert said.code == 0 and ("<extra_id_0>" if objective == "span" else "[MASK]") in line, said.err
    assert ("filled: " in said.out) == (objective == "span") and "is read as that control token" in said.err


def task_of(folder):
    """The task of a run, as its resume makes it."""
    config, checkpoint = read_settings(folder, to_train=True), last_checkpoint(folder)
    data = open_data(config, checkpoint, lambda line: None)
    return load(config.run.objective)(config, data)


def test_transformers_opens_it(run, parity):
    """The same loss on the same batches, of the folder that training wrote; its tokenizer has the same sentinels and mask."""
    objective, folder, _ = run
    task, checkpoint = task_of(folder), last_checkpoint(folder)
    ours = model.hub.load(checkpoint, dtype=torch.float64)
    theirs = widen(transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=torch.float64).eval())
    assert type(theirs).__name__ == {"span": "T5", "denoise": "Bart"}[objective] + "ForConditionalGeneration"
    evaluated, losses = task.objective(ours, task_loss()).eval(), []
    for batch in task.validation[-2:]:  # the last one has a shortened block, and rows that are not scored
        labels = batch["labels"]
        their_output = theirs(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), labels=labels)
        shifted = theirs._shift_right(labels) if objective == "span" else None
        if shifted is None:
            shift = transformers.models.bart.modeling_bart.shift_tokens_right
            shifted = shift(labels, theirs.config.pad_token_id, theirs.config.decoder_start_token_id)
        scored = labels != IGNORE
        assert torch.equal(shifted[scored], batch["decoder_input_ids"][scored])
        term = evaluated(batch).terms["loss"]
        losses.append((term.sum / term.count, their_output.loss))
    mine, other = (torch.stack(values).detach() for values in zip(*losses, strict=True))
    name = f"transformers {transformers.__version__}"
    parity(f"validation loss of a run: {objective}", name, absolute(mine, other), 1e-12, "float64 rounding")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    names = ["<extra_id_0>", "<extra_id_2>"] if objective == "span" else ["[MASK]"]
    for text in (f"the {names[0]} of a file{names[-1]}", "a value."):
        ids = task.tokenizer.encode(text, parse_special=True)
        assert tokenizer(text).input_ids == [*task.frame.prefix, *ids, *task.frame.suffix]


def task_loss():
    from train.losses.cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def test_metrics_of_the_objective(run):
    """Each by hand, from the logits."""
    objective, folder, _ = run
    task, ours = task_of(folder), model.hub.load(last_checkpoint(folder), dtype=torch.float64)
    batch, last = task.validation[0], task.validation[-1]
    metrics = task.objective(ours, task_loss()).eval()(batch).metrics

    def nats(source):
        inputs = {name: batch[f"{source}{name}"] for name in ("input_ids", "attention_mask") if f"{source}{name}" in batch}
        logits = ours(**inputs, decoder_input_ids=batch["decoder_input_ids"]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")

    scored = batch["labels"].flatten() != IGNORE
    assert metrics["shuffled_loss"].sum.item() == pytest.approx(nats("shuffled_")[scored].sum().item())
    assert torch.equal(batch["shuffled_input_ids"], batch["input_ids"].roll(1, 0))
    if objective == "span":
        ids = torch.tensor([*find_sentinels(task.tokenizer), task.tokenizer.eos_id])
        special = torch.isin(batch["labels"].flatten(), ids)
        for name, part in (("sentinel_loss", special), ("word_loss", ~special)):
            assert metrics[name].count == (part & scored).sum()
            assert metrics[name].sum.item() == pytest.approx(nats("")[part & scored].sum().item())
    assert ((last["labels"] != IGNORE).any(1)).sum() < 4  # its other rows are fillers
