"""Starts for reinforcement: small networks whose greedy replies to a task of `python -m data task` are right in 20 to 40 %.

Through the real commands: the records of a task and level; a network with random weights; `--objective sft` on the records,
with SAVES checkpoints. The start is the last one whose greedy exact match on CHOOSING held-out prompts is at most MOST_EXACT;
it is scored on the others. (The curve is steep and not monotonic; a later checkpoint samples better at the same greedy match.)

Before that comes a base. That of `sort` reads the records as plain text for BASE_STEPS steps: reinforcement then takes it from
.2 to .7 greedy where it takes a start from random weights to .4 alone (docs/LOG.md). That of `reverse` reads a text of
characters that no task has, for one step: it learns nothing. Both tokenizers have a token for each digit, letter and bracket.
"""

import json
import random
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

import data.__main__
import model.hub
from data.chat.encode import encode_rendered
from data.config import MIN_VOCAB_SIZE
from data.tokenizer.open import load_tokenizer
from tests.records import write_rows
from tests.runs import command
from train.chat_data import open_chat_tokenizer
from train.chat_replies import write_replies
from train.runs.checkpoint import checkpoints, step_of

LEVELS = {"sort": "medium", "reverse": "medium"}
STEPS, RATE = {"sort": 110, "reverse": 440}, 1e-3
BASE_STEPS = {"sort": 40}  # of pretraining on the records' text
MOST_EXACT, CHOOSING, SAVES = 0.33, 200, 22
MOST = 12  # tokens of a reply
SAMPLES = 4  # replies to a prompt, at temperature 1
COMMON = "--device cpu --threads 1 --context 64 --sample-every 0"
SHAPE = "--width 128 --depth 2 --heads 4"
BASE = f"--vocab-size {MIN_VOCAB_SIZE} --batch-size 4 --lr 1e-3 --steps 1 --optimizer adamw"
PRETRAINED = "--vocab-size 275 --batch-size 32 --optimizer muon"
TEMPLATES = {"sort": "chatml", "reverse": "mistral-v3"}
SFT = (
    "--objective sft --sft.packing pad --sft.replies 0 --batch-size 32 --betas 0.9 0.99 "
    "--schedule constant --weight-decay 0 --log-every 50 --optimizer adamw"
)


class Scores(NamedTuple):
    """Shares of replies to held-out prompts that are exactly the answer and end by themselves; of greedy ones that end."""

    greedy: float
    sampled: float
    ended: float


class Start(NamedTuple):
    """A start and its files.

    init      a model folder, for --init
    train     records to train on; `held_out` those that the start was not chosen by
    step      of instruction tuning
    """

    init: Path
    train: Path
    held_out: Path
    step: int
    scores: Scores


def make_start(task: str, folder: Path, seed: int = 0) -> Start:
    """Return the start of a task, a key of LEVELS; made in the folder once, read from it afterwards."""
    index = folder / "start.json"
    if not index.exists():
        found = learn_start(task, folder, seed)
        index.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = json.loads(index.read_text(encoding="utf-8"))
    init = folder / "sft" / "checkpoints" / f"step-{found['step']}"
    return Start(init, folder / "data" / "train.jsonl", folder / "held_out.jsonl", found["step"], Scores(*found["scores"]))


def learn_start(task: str, folder: Path, seed: int) -> dict[str, object]:
    """Make the files of a start; return its task, seed, level, step, scores and the curve {step: greedy exact match}."""
    folder.mkdir(parents=True, exist_ok=True)
    made = ["task", task, "--level", LEVELS[task], "--seed", str(seed), "--out", str(folder / "data")]
    assert data.__main__.main(made) == 0
    held_out = read_rows(folder / "data" / "validation.jsonl")
    write_rows(folder / "choosing.jsonl", held_out[:CHOOSING])
    write_rows(folder / "held_out.jsonl", held_out[CHOOSING:])
    base = make_base(task, folder, seed)
    files = f"--corpus {folder}/data/train.jsonl --validation {folder}/choosing.jsonl"
    steps = f"--steps {STEPS[task]} --eval-every {STEPS[task]} --save-every {STEPS[task] // SAVES} --keep {SAVES + 1}"
    more = f"--sft.template {TEMPLATES[task]} --lr {RATE} --seed {seed}"
    train(f"{COMMON} {SFT} {more} {files} {steps} --init {base} --out {folder}/sft")
    curve = {}
    for checkpoint in sorted(checkpoints(folder / "sft"), key=step_of):
        curve[step_of(checkpoint)] = score(checkpoint, held_out[:CHOOSING], samples=0).greedy
    step = max(step for step, exact in curve.items() if exact <= MOST_EXACT)
    scores = score(folder / "sft" / "checkpoints" / f"step-{step}", held_out[CHOOSING:])
    return {"task": task, "level": LEVELS[task], "seed": seed, "step": step, "scores": scores, "curve": curve}


def make_base(task: str, folder: Path, seed: int) -> Path:
    """Return the run of the base: its weights depend on the seed."""
    steps = BASE_STEPS.get(task)
    if steps is not None:
        rows = read_rows(folder / "data" / "train.jsonl")
        text = [f"{row['messages'][0]['content']} = {row['answer']}" for row in rows]
        (folder / "text.txt").write_text("\n\n".join(text), encoding="utf-8")
        options = f"{PRETRAINED} --steps {steps} --corpus {folder}/text.txt"
    else:
        generator = random.Random(seed)
        texts = folder / "texts"
        texts.mkdir()
        for number in range(20):
            (texts / f"{number}.txt").write_text("".join(generator.choices("~^ \n", k=2000)), encoding="utf-8")
        options = f"{BASE} --corpus {texts}"
    train(f"{COMMON} {SHAPE} {options} --cache {folder}/cache --seed {seed} --out {folder}/base")
    return folder / "base"


def train(options: str) -> None:
    said = command(*options.split())
    assert said.code == 0, said.err


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def score(folder: Path, rows: list[dict], samples: int = SAMPLES, seed: int = 0) -> Scores:
    """Return the scores of a model folder. samples: sampled replies to a prompt; with 0 `sampled` is NaN."""
    network = model.hub.load(folder).eval()
    tokenizer, template, _ = open_chat_tokenizer(None, load_tokenizer(folder, network.config.vocab_size), lambda line: None)
    prompts = [encode_rendered(tokenizer, template, row["messages"][:-1]) for row in rows]
    sizes = {"context": network.config.context, "max_new_tokens": MOST, "batch_size": 100}

    def share(temperature: float, times: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)
        replies = write_replies(
            network, tokenizer, prompts * times, temperature=temperature, generator=generator, **sizes
        )
        right = [reply.has_ended and reply.text == row["answer"] for reply, row in zip(replies, rows * times, strict=True)]
        return fmean(right), fmean(reply.has_ended for reply in replies)

    greedy, ended = share(0.0, 1)
    return Scores(greedy, share(1.0, samples)[0] if samples else float("nan"), ended)
