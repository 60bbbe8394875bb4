"""What a run says before its first step and after its last: what it is, what it reached, what to type next."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from train.curves import plot
from train.log import read_metrics
from train.tasks.task import built_in

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
        say(f"best     step {run.best['step']}: validation loss {run.best['loss']:.4f}, {run.task.verdict(run.best)}")
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
    say(f"  {run.task.try_it(folder)}")
    objective = "" if run.config.run.objective == "clm" else f" --objective {run.config.run.objective}"
    say(f"  python -m train{objective} --corpus PATH            # your own .txt, .md, .py or .jsonl files")
    if not stopped.startswith("on"):
        corpus = "" if built_in(run.config) else f" --corpus {shlex.join(run.config.data.corpus)}"
        say(f"  python -m train{objective} --init {folder}{corpus} --steps 300   # go on from these weights")

