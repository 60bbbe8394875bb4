"""The run around the steps: batches in, then log, validate, sample, save, stop."""

import json
import math
import time
import tomllib
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import tomli_w
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import model.hub
from data.clm import IGNORE
from data.stream import Prefetcher
from train.checkpoint import (
    CheckpointError,
    latest_whole,
    point,
    prune,
    repoint,
    resolve,
    step_of,
    write_checkpoint,
    write_whole,
)
from train.config import TrainConfig, TrainError, from_plain, to_plain
from train.evaluate import evaluate
from train.interrupt import StopRequest
from train.log import Console, Metrics, clock, cut_back
from train.precision import autocast
from train.report import conclude, introduction
from train.schedule import SCHEDULES
from train.setup import (
    TASKS,
    compile_blocks,
    open_data,
    open_network,
    open_optimizers,
    resolve_machine,
    resolve_network,
)
from train.step import train_step

ADVANCES = ("step", "tokens", "best", "bad_evaluations")  # beside the network, the optimizers and torch's random states


def start(config: TrainConfig) -> Path:
    """A new run; returns its folder."""
    config.check()
    config = resolve_machine(config)
    out = config.run.out
    if any((out / name).exists() for name in ("config.toml", "metrics.jsonl", "checkpoints")):
        raise TrainError(f"{out} already holds a run: go on, `python -m train --resume {out}`, or choose another --out")
    if out.exists() and not out.is_dir():
        raise TrainError(f"--out {out} is a file")
    if config.run.init is not None:  # a run's best checkpoint may be another one by the time of a resume
        config = replace(config, run=replace(config.run, init=resolve(config.run.init)))
    return Run(config, resume=False).train()


def resume(folder: Path) -> Path:
    """Go on with the run in `folder` from its latest whole checkpoint, or from step 0 if it has none."""
    path = folder / "config.toml"
    if not path.is_file():
        raise TrainError(f"--resume {folder}: not a run, there is no {path.absolute()}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainError(f"{path} is not TOML: {error}") from None
    config = from_plain(TrainConfig, table, str(path))
    config.check()
    return Run(resolve_machine(replace(config, run=replace(config.run, out=folder))), resume=True).train()


class Run:
    """One process's share of a run. What advances is `ADVANCES`, the network, the optimizers and torch's random states:
    exactly these are in a checkpoint. Batches and rates are functions of the step."""

    def __init__(self, config: TrainConfig, *, resume: bool):
        self.out = config.run.out
        self.console = Console(config.report.verbose)
        say = self.console.say
        checkpoint = latest_whole(self.out, print) if resume else None
        self.shards = open_data(config, checkpoint, say)
        self.tokenizer = self.shards.tokenizer
        network = open_network(config, self.tokenizer, checkpoint, say)
        config = self.config = resolve_network(config, network)
        self.device = torch.device(config.run.device)
        self.task = TASKS[config.run.objective](config, self.shards)
        self.console.unit = self.task.unit
        self.optimizers = open_optimizers(config, network)
        self.autocast = autocast(self.device, config.speed.precision)
        self.objective = self.task.objective(network)
        self.step, self.tokens, self.bad_evaluations = 0, 0, 0
        self.best: dict | None = None
        if config.speed.compile == "on" and not compile_blocks(network, say):
            config = self.config = replace(config, speed=replace(config.speed, compile="off"))
        # Last, for what stands above may draw random numbers (choosing a precision does), a resume others than a start.
        torch.manual_seed(config.run.seed)
        if checkpoint is not None:
            self._load(checkpoint)

        self.out.mkdir(parents=True, exist_ok=True)
        if not resume:
            write_whole(self.out / "config.toml", tomli_w.dumps(to_plain(config)))
        if checkpoint is not None:
            repoint(self.out, checkpoint, self.best)
        cut_back(self.out / "metrics.jsonl", self.step)
        self.metrics = Metrics(self.out / "metrics.jsonl")
        say(introduction(self))

    def train(self) -> Path:
        """Steps until the last one, an early stop, or a signal; returns the run's folder."""
        began, tokens_before = time.monotonic(), self.tokens
        self.console.begin(self.step, self.config.run.steps)
        try:
            stopped = self._steps()
        except BrokenPipeError:
            raise  # whoever read the output has gone
        except (OSError, SafetensorError) as error:
            raise TrainError(
                f"could not write at step {self.step}: {error}. The checkpoints in {self.out} are untouched; "
                f"when there is room: python -m train --resume {self.out}"
            ) from error
        finally:
            self.console.end()
            self.metrics.close()
        took = time.monotonic() - began
        per_second = (self.tokens - tokens_before) / max(took, 1e-9)
        unit = self.task.unit
        conclude(self, stopped, f"{self.tokens:,} {unit}; this session {clock(took)}, {per_second:,.0f} {unit}/s")
        return self.out

    def _steps(self) -> str:
        """Returns why it stopped before the last step, or ""."""
        config, report, console = self.config, self.config.report, self.console
        factor = partial(
            SCHEDULES[config.optimizer.schedule],
            warmup=round(config.optimizer.warmup * config.run.steps),
            total=config.run.steps,
            final=config.optimizer.final_lr,
        )
        self.objective.train()
        tokens, seconds, stopped = 0, 0.0, self._early()
        with StopRequest() as request, self._source() as source:
            for micro_batches in source if not stopped else ():
                clock_start = time.monotonic()
                count = sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches)
                micro_batches = [self._to_device(batch) for batch in micro_batches]
                self.optimizers.set_lr(rate := factor(self.step))
                result = train_step(
                    self.objective,
                    micro_batches,
                    self.optimizers,
                    max_norm=config.optimizer.clip or None,
                    autocast=self.autocast,
                )
                self.step, self.tokens, tokens = self.step + 1, self.tokens + count, tokens + count
                last = self.step == config.run.steps
                if self.step % report.log_every == 0 or self.step == 1 or last:
                    loss = self._finite(result.loss)  # on a GPU this waits for the step
                    seconds += time.monotonic() - clock_start
                    self.metrics.write(
                        step=self.step,
                        split="train",
                        loss=loss,
                        tokens=self.tokens,
                        lr=config.optimizer.lr * rate,
                        grad_norm=float(result.grad_norm),
                        tokens_per_s=round(tokens / seconds, 1),
                    )
                    console.progress(self.step, loss, tokens / seconds)
                    tokens, seconds = 0, 0.0
                else:
                    seconds += time.monotonic() - clock_start

                improved = False
                if self.step % report.eval_every == 0 or last:
                    improved = self._validate()
                if report.sample_every and (self.step % report.sample_every == 0 or last):
                    self._sample()
                stopped = self._early()
                if request.name:
                    stopped = f"on {request.name}"
                if improved or stopped or last or self.step % report.save_every == 0:
                    self._save(improved)
                console.advance(self.step)
                if stopped:
                    break
        return stopped

    def _early(self) -> str:
        """Why there is nothing more to hope for, by --early-stop; else ""."""
        enough = self.config.report.early_stop
        return f"early: {self.bad_evaluations} validations without a new best" * (0 < enough <= self.bad_evaluations)

    def _source(self):
        """Micro-batches from the current step on; made ahead, in pinned memory, where a GPU would otherwise wait."""
        steps = self.config.run.steps
        if self.device.type == "cuda":
            return Prefetcher(self.task.step, self.step, steps, pin_memory=True)
        return nullcontext(self.task.step(step) for step in range(self.step, steps))

    def _to_device(self, batch: dict) -> dict:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _finite(self, value: torch.Tensor, what: str = "loss") -> float:
        value = float(value)
        if not math.isfinite(value):
            raise TrainError(
                f"the {what} is {value} at step {self.step}; nothing was saved since the last checkpoint in {self.out}. "
                "Try a lower --lr and --matrix-lr, or --precision fp32"
            )
        return value

    def _validate(self) -> bool:
        """Score the validation batches; returns whether this is the best so far."""
        batches = map(self._to_device, self.task.validation)
        scores = self.task.scores(evaluate(self.objective, batches, autocast=self.autocast))
        self.metrics.write(step=self.step, split="validation", tokens=self.tokens, **scores)
        improved = self.best is None or scores["loss"] < self.best["loss"]
        if improved:
            self.best = {"step": self.step, **scores}
        self.bad_evaluations = 0 if improved else self.bad_evaluations + 1
        line = self.task.line(scores) + " · best so far" * improved
        self.console.say(f"validation at step {self.step}: {line}")
        return improved

    def _sample(self) -> None:
        compiled = self.config.speed.compile == "on"
        # Lengths vary: compiling for each would take longer. (Where nothing is compiled, its machinery stays unloaded.)
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            what, text = self.task.sample(self.objective.network, self.device)
        self.console.say(f"sample: {what}")
        self.console.say("\n".join(f"    | {line}" for line in text.split("\n")))

    def _save(self, improved: bool) -> None:
        """A checkpoint at this step boundary; a failure leaves the earlier ones."""

        def write(folder: Path) -> None:
            model.hub.save(self.objective.network, folder)
            self.tokenizer.save(folder)
            state = {key: value.contiguous() for key, value in self.optimizers.named_state().items()}
            save_file(state, folder / "optimizer.safetensors")
            random = {"cpu": torch.get_rng_state()}
            if self.device.type == "cuda":
                random["cuda"] = torch.cuda.get_rng_state(self.device)
            save_file(random, folder / "random.safetensors")
            state = {key: getattr(self, key) for key in ADVANCES} | {"text": self._text()}
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

        weights = self.objective.network.parameters()  # a finite loss may have ruined them in the update after it
        self._finite(sum(weight.detach().sum(dtype=torch.float64) for weight in weights), "sum of all weights")
        self.metrics.sync()
        folder = write_checkpoint(self.out, self.step, write)
        if improved:
            point(self.out, "best", folder, **{k: v for k, v in self.best.items() if k != "step"})
        point(self.out, "last", folder)
        prune(self.out, self.config.report.keep)

    def _text(self) -> dict:
        """What a resume must find again, or batches would be others."""
        splits = {"train_tokens": self.shards.train.tokens, "validation_tokens": self.shards.validation.tokens}
        return {"tokenizer_sha256": self.tokenizer.sha256, **splits}

    def _load(self, folder: Path) -> None:
        """All that advances, from a checkpoint that was verified; the network's weights are in place already."""
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if state["text"] != self._text():
                raise TrainError(
                    f"the corpus {' '.join(self.config.data.corpus)} is no longer the text that {self.out} began with; "
                    f"to train its weights on other text: --init {self.out}"
                )
            self.optimizers.load_named_state(load_file(folder / "optimizer.safetensors"))
            random = load_file(folder / "random.safetensors")
            for key in ADVANCES:
                setattr(self, key, state[key])
        except TrainError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} does not fit this run: {error}") from error
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)
        if self.step != step_of(folder):
            raise CheckpointError(f"{folder} says that it is step {self.step}")
