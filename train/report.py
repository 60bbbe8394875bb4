"""What a run says before its first step and after its last: what it is, what it reached, what to type next."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.config import DataConfig
from train.curves import plot
from train.log import read_metrics
from train.setup import validation_ids

if TYPE_CHECKING:
    from train.loop import Run


def introduction(run: "Run") -> str:
    """Five lines before the first step: text, tokens, network, machine, run."""
    config, shards, has = run.config, run.shards, run.objective.network.config
    per_step = config.optimizer.batch_size * config.optimizer.accumulate * config.network.context
    parameters = sum(parameter.numel() for parameter in run.objective.network.parameters())
    epochs = config.run.steps * per_step / shards.train.tokens
    bytes_per_token = shards.train.bytes / shards.train.targets
    speed, home = config.speed, str(Path.home())
    cache = str(shards.folder).replace(home, "~", 1) if home != "/" else str(shards.folder)
    gpu = run.device.type == "cuda"
    machine = torch.cuda.get_device_name(run.device) if gpu else f"{config.run.threads} threads"
    how = ("compiled" if speed.compile == "on" else "eager") + (", deterministic" * (speed.deterministic == "on"))
    return (
        f"text     {' '.join(config.data.corpus)}: {shards.train.documents:,} documents, {shards.train.bytes:,} "
        f"bytes to train on; {shards.validation.documents:,} documents, {shards.validation.bytes:,} held out\n"
        f"tokens   {run.tokenizer.vocab_size:,} pieces, {bytes_per_token:.2f} bytes a token; "
        f"{shards.train.tokens:,} to train on; shards in {cache} "
        f"({'built' if shards.built else 'reused'})\n"
        f"network  {has.family}, {has.depth} layers of width {has.width}, {has.heads} heads, "
        f"context {config.network.context}: {parameters:,} parameters\n"
        f"machine  {run.device}, {machine}, {speed.precision}, {how}\n"
        f"run      {run.out}: steps {run.step} to {config.run.steps} of {per_step:,} tokens, "
        f"{epochs:.1f} epochs in all"
    )


def conclude(run: "Run", stopped: str, work: str) -> None:
    """What was reached, the curves, and what to type next."""
    say, out, has = print, run.out, run.objective.network.config
    say(f"\nstopped {stopped}, saved at step {run.step}" if stopped else f"\ndone at step {run.step}")
    say(f"work     {work}")
    if run.best:
        gap = 100 * (1 - run.best["bits_per_byte"] / run.baselines.bigram)
        side = "below" if gap >= 0 else "above"
        say(
            f"best     step {run.best['step']}: validation loss {run.best['loss']:.4f}, "
            f"{run.best['bits_per_byte']:.3f} bits per byte, {abs(gap):.1f} % {side} counting bigrams "
            f"({run.baselines.bigram:.3f})"
        )
    try:
        name = f"{out.name}: {has.family}, {has.depth} × {has.width}"
        diagnosis = plot(read_metrics(out / "metrics.jsonl"), out / "curves.png", name)
        say(f"curves   {out / 'curves.png'} ({diagnosis.verdict}: {diagnosis.why})")
    except ImportError:
        say("curves   not drawn: matplotlib is not installed (pip install -c constraints.txt -e '.[plots]')")
    except OSError as error:
        say(f"curves   not drawn: {error}")
    folder = shlex.quote(str(out))
    say("next")
    if stopped.startswith("on"):
        say(f"  python -m train --resume {folder}")
    built_in = run.config.data.corpus == DataConfig().corpus
    prompt = "Return the" if built_in else " ".join(run.tokenizer.decode(opening_ids(run)).split()[:3])
    say(f"  python -m model generate {folder} --prompt {shlex.quote(prompt)}")
    say("  python -m train --corpus PATH            # your own .txt, .md, .py or .jsonl files")
    if not stopped.startswith("on"):
        corpus = "" if built_in else f" --corpus {shlex.join(run.config.data.corpus)}"
        say(f"  python -m train --init {folder}{corpus} --steps 300   # go on from these weights")


def opening_ids(run: "Run", tokens: int = 16) -> list[int]:
    """The first ids of the last document that validation scores, to the end of a word."""
    ids = validation_ids(run.config, run.shards)
    start = int(np.flatnonzero(ids == run.tokenizer.bos_id)[-1])
    opening = ids[start : start + 4 * tokens].astype("int64").tolist()
    if run.tokenizer.eos_id in opening:
        opening = opening[: opening.index(run.tokenizer.eos_id)]
    begins_word = (i for i, id in enumerate(opening) if i > tokens and run.tokenizer.bytes_of[id][:1].isspace())
    return opening[: next(begins_word, tokens + 1)]
