"""The run around the steps: batches in, then log, validate, sample, save, stop."""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError

from data.messages import format_count
from data.prefetch import Prefetcher
from data.shell import command, quote
from model.folders import EXTRAS, copy_auxiliary_files
from quant.qat import converted
from train.allocator import keep_freed_memory
from train.config import TrainConfig
from train.config_toml import to_plain, with_absolute_paths
from train.evaluate import evaluate
from train.interrupt import StopRequest
from train.objective import ids_of
from train.parallel.mesh_sizes import mesh_sizes
from train.parallel.parallelize import unsharded, unwrapped
from train.parallel.ranks import Ranks, is_connection_error, own_rows
from train.registry import load
from train.reports.log import Console, Metrics, truncate_metrics
from train.reports.phases import Phases
from train.reports.step_profiler import StepProfiler
from train.reports.summary import Session, comparable, conclude, introduction, out_of_memory
from train.resolve import resolve_data, resolve_network, resolve_steps
from train.runs.checkpoint import (
    STATE_FORMAT,
    latest_verified,
    prune,
    read_state,
    restore_pointers,
    step_of,
    write_checkpoint,
    write_pointer,
    write_settings,
)
from train.runs.errors import CheckpointError, TrainError
from train.setup import open_data, open_engine, open_network, own_device
from train.step import StepResult

ADVANCES = ("tokens", "best", "bad_evaluations")  # beside what the engine holds
MOST_SKIPPED = 30  # in a row: what never succeeds is not a bad batch


class Run:
    """One process's share of a run: text, screen and files around the engine. What advances is `ADVANCES` and what the
    engine holds: exactly these are in a checkpoint. Batches, rates and noise are functions of the step."""

    def __init__(self, config: TrainConfig, ranks: Ranks, *, resume: bool, defaulted: tuple[str, ...] = ()):
        self.out, self.ranks, self.defaulted = config.run.out, ranks, defaulted
        self.console = Console(config.report.verbose and ranks.is_main)
        info = self.console.info
        checkpoint = self._latest() if resume else None
        self.device = own_device(config, ranks)
        data = ranks.local_first(lambda: open_data(config, checkpoint, info))
        self.tokenizer = data.tokenizer
        in_parts = mesh_sizes(config.run.mesh, ranks.world)["shard"] > 1
        place = torch.device("cpu") if in_parts else self.device  # whole only there: a GPU gets its part alone
        network = open_network(config, data, checkpoint, place, info)
        if self.device.type == "cpu":
            keep_freed_memory()
        config = self.config = resolve_network(resolve_data(config, self.tokenizer), ranks, network)
        self.task = load(config.run.objective)(config, data)
        self.source = self.task.source
        config = self.config = self.task.config = resolve_steps(config, self.task)
        self.console.unit = self.task.unit
        self.engine, self.config = open_engine(config, ranks, self.device, self.task, network, info)
        self.tokens, self.bad_evaluations, self.in_a_row, self.signal = 0, 0, 0, 0
        self.positions, self.rows = 0.0, 0  # that were read since the start or the resume
        self.scored: float | None = None  # the share of positions with a label, in the first micro-batch that was seen
        self.phases = Phases(self.device)
        self.beside = config.run.init if checkpoint is None else checkpoint  # where files lie that travel with the weights
        self.best: dict | None = None
        if checkpoint is not None:
            self._load(checkpoint)

        if ranks.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            if not resume:
                write_settings(self.out, to_plain(with_absolute_paths(self.config)), f"begun on {comparable(self)}")
            if checkpoint is not None:
                restore_pointers(self.out, checkpoint, self.best)
            truncate_metrics(self.out / "metrics.jsonl", self.step)
        self.metrics = Metrics(self.out / "metrics.jsonl" if ranks.is_main else None)
        info(introduction(self))

    @property
    def step(self) -> int:
        return self.engine.step

    def _latest(self) -> Path | None:
        """The checkpoint to go on from, the same on every rank."""

        def name() -> str | None:
            found = latest_verified(self.out, print)
            return found.name if found is not None else None

        found = self.ranks.from_main(name)
        return self.out / "checkpoints" / found if found is not None else None

    def train(self) -> int:
        """Steps until the last one, an early stop, or a signal, of which it returns the number (else 0)."""
        began, first_step, first_tokens = time.monotonic(), self.step, self.tokens
        if self.config.method is not None and not self.step:
            self.console.info(f"before the first step: {self.task.line(self._scores())}")
        self.console.begin(self.step, self.config.run.steps)
        try:
            stopped = self._steps()
        except BrokenPipeError:
            raise  # whoever read the output has gone
        except torch.OutOfMemoryError as error:
            raise TrainError(out_of_memory(self, error)) from error
        except RuntimeError as error:
            if not (self.ranks.world > 1 and is_connection_error(error)):
                raise
            raise TrainError(
                f"rank {self.ranks.rank}: at step {self.step + 1} another rank was gone ({str(error).splitlines()[0]}). The "
                f"checkpoints in {self.out} are untouched: torchrun … -m train --resume {quote(self.out)}"
            ) from error
        except (OSError, SafetensorError) as error:
            raise TrainError(
                f"could not write at step {self.step}: {error}. The checkpoints in {self.out} are untouched; "
                f"when there is room: {command('train', '--resume', self.out)}"
            ) from error
        finally:
            self.console.end()
            self.metrics.close()
        steps, tokens = self.step - first_step, self.tokens - first_tokens
        session = Session(time.monotonic() - began, steps, tokens, round(self.positions), self.rows)
        if self.ranks.is_main:
            conclude(self, stopped, session)
        return self.signal

    def _steps(self) -> str:
        """Returns why it stopped before the last step, or ""."""
        config, report, console, phase = self.config, self.config.report, self.console, self.phases
        objective = unwrapped(self.engine.objective)
        tokens, seconds, stopped = 0, 0.0, self._early()
        watched = StepProfiler(self)
        with StopRequest() as request, self._source() as source:
            while self.step < config.run.steps and not stopped:
                clock_start, rate = time.monotonic(), self.engine.rate
                with phase("data"):
                    micro_batches = next(source)
                    counts = [next(iter(objective.counts(batch).values())) for batch in micro_batches]
                    count = int(sum(counts))
                    if self.scored is None:
                        self.scored = int(counts[0]) / ids_of(micro_batches[0])[0].numel()
                        if not self.step:
                            self.engine.begin(self._to_device(micro_batches[0]))
                        self.engine.objective.train()
                    mine = [self._to_device(own_rows(batch, self.ranks)) for batch in micro_batches]
                result = watched.step(mine, phase)
                self.tokens, tokens = self.tokens + count, tokens + count
                for batch in micro_batches:  # of an encoder-decoder the mean of both its texts
                    read = ids_of(batch)
                    self.positions += sum(ids.numel() for ids in read) / len(read)
                    self.rows += len(read[0])
                if result.updated:
                    self.in_a_row = 0
                else:
                    self._not_a_number(result)
                last = self.step == config.run.steps
                if result.updated and (self.step % report.log_every == 0 or self.step == 1 or last):
                    loss = float(result.loss)
                    seconds += time.monotonic() - clock_start
                    scale = {"loss_scale": self.engine.scaler.get_scale()} if self.engine.scaler.is_enabled() else {}
                    self.metrics.write(
                        step=self.step,
                        split="train",
                        loss=loss,
                        tokens=self.tokens,
                        lr=config.optimizer.lr * rate,
                        **({"matrix_lr": config.optimizer.matrix_lr * rate} if config.optimizer.optimizer == "muon" else {}),
                        grad_norm=float(result.grad_norm),
                        **result.metrics,
                        tokens_per_s=round(tokens / seconds, 1),
                        **scale,
                    )
                    console.progress(self.step, loss, tokens / seconds)
                    tokens, seconds = 0, 0.0
                else:
                    seconds += time.monotonic() - clock_start

                improved = False
                if self.step % report.eval_every == 0 or last:
                    with phase("validation"):
                        improved = self._validate()
                if report.sample_every and (self.step % report.sample_every == 0 or last):
                    with phase("samples"):
                        self._sample()
                stopped = self._early()
                if number := self.ranks.max(request.number):  # a signal need not reach all ranks before the same step
                    self.signal, stopped = number, f"on {signal.Signals(number).name}"
                if improved or stopped or last or self.step % report.save_every == 0:
                    with phase("saving"):
                        self._save(improved)
                console.advance(self.step)
        watched.close()
        return stopped

    def _not_a_number(self, result: StepResult) -> None:
        """A step whose loss or gradients were inf or NaN; nothing has moved. fp16 lowers its scale and goes on."""
        loss, step = float(result.loss), self.step - 1
        self.in_a_row += 1
        if self.engine.scaler.is_enabled() and math.isfinite(loss) and self.in_a_row <= MOST_SKIPPED:
            return
        origin = self.source.origin(step)
        named = ", ".join(origin[:12]) + (f" and {len(origin) - 12} more" if len(origin) > 12 else "")
        what = f"step {self.step}: the loss is {loss}, the gradients' norm {float(result.grad_norm)}"
        where = f"its batch held {named}"
        if self.config.run.on_nonfinite == "skip" and self.in_a_row <= MOST_SKIPPED:
            self.console.info(f"skipped {what}; {where}")
            self.metrics.write(step=self.step, split="skipped", loss=str(loss), origin=origin)
            return
        times = f" ({self.in_a_row} steps in a row)" if self.in_a_row > 1 else ""
        raise TrainError(
            f"{what}{times}; {where}. Nothing was saved since the last checkpoint in {self.out}. To leave such batches out: "
            f"`{command('train', '--resume', self.out, '--on-nonfinite', 'skip')}`; or begin anew with a lower --lr and "
            "--matrix-lr, or --precision fp32"
        )

    def _early(self) -> str:
        """Why there is nothing more to hope for, by --early-stop; else ""."""
        enough = self.config.report.early_stop
        bad = format_count(self.bad_evaluations, "validation")
        return f"early: {bad} without a new best" * (0 < enough <= self.bad_evaluations)

    def _source(self):
        """Micro-batches from the current step on; made ahead, in pinned memory, where a GPU would otherwise wait."""
        steps = self.config.run.steps
        if self.source.is_on_policy:
            return nullcontext(map(self._rollout, range(self.step, steps)))
        if self.device.type == "cuda":
            return Prefetcher(self.source.batches, self.step, steps, pin_memory=True)
        return nullcontext(map(self.source.batches, range(self.step, steps)))

    def _rollout(self, step: int) -> list[dict]:
        with self._as_used():
            return self.source.batches(step, self.engine.network)

    def _to_device(self, batch: dict) -> dict:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _scores(self) -> dict[str, float]:
        """Of the validation batches."""
        batches = (self._to_device(own_rows(batch, self.ranks)) for batch in self.task.validation)
        with self.engine.averaged():
            how = {"autocast": self.engine.autocast, "ranks": self.ranks, "sources": self.task.validation_sources}
            totals = evaluate(unwrapped(self.engine.objective), batches, **how)
            with self._as_used():
                totals |= self.task.more_totals(self.engine.network, self.device, self.ranks)
        return self.task.scores(totals)

    def _validate(self) -> bool:
        """Score the validation batches; returns whether this is the best so far."""
        scores = self._scores()
        if not math.isfinite(scores["loss"]):
            raise TrainError(
                f"the validation loss is {scores['loss']} at step {self.step}; nothing was saved since the last checkpoint in "
                f"{self.out}. Try a lower --lr and --matrix-lr, or --precision fp32"
            )
        self.metrics.write(step=self.step, split="validation", tokens=self.tokens, **scores)
        key, sign = self.task.best, -1 if self.task.higher_is_better else 1
        improved = self.best is None or sign * scores[key] < sign * self.best[key]
        if improved:
            self.best = {"step": self.step, **scores}
        self.bad_evaluations = 0 if improved else self.bad_evaluations + 1
        line = self.task.line(scores) + " · best so far" * improved
        self.console.info(f"validation at step {self.step}: {line}")
        return improved

    @contextmanager
    def _as_used(self) -> Iterator[None]:
        """The network as one generates with it."""
        compiled = self.config.speed.compile == "on"
        # Lengths vary: compiling for each would take longer. (Where nothing is compiled, its machinery stays unloaded.)
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with eager, unsharded(self.engine.objective), converted(self.engine.network):
            yield

    def _sample(self) -> None:
        with self.engine.averaged(), self._as_used():
            shown = self.task.sample(self.engine.network, self.device)
        if shown is not None:
            what, text = shown
            self.console.info(f"sample: {what}")
            self.console.info("\n".join(f"    | {line}" for line in text.split("\n")))

    def _save(self, improved: bool) -> None:
        """A checkpoint at this step boundary; a failure leaves the earlier ones."""

        def write(folder: Path) -> None:
            self.engine.save(folder)
            if self.ranks.is_main:
                self.tokenizer.save(folder)
                if self.beside is not None:
                    copy_auxiliary_files(self.beside, folder, only=EXTRAS if self.config.method is not None else None)
                state = {key: getattr(self, key) for key in ADVANCES} | {"format": STATE_FORMAT, "text": self.task.identity()}
                state |= {"engine": self.engine.state(), "source": self.source.state_dict()}
                (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

        if not self.engine.is_finite():  # a finite loss may have ruined the weights in the update after it
            raise TrainError(
                f"the weights are inf or NaN after step {self.step}; nothing was saved since the last checkpoint in "
                f"{self.out}. Try a lower --lr and --matrix-lr, or --precision fp32"
            )
        self.metrics.sync()
        folder = write_checkpoint(self.out, self.step, write, together=self.ranks.together, is_main=self.ranks.is_main)
        self.beside = folder if self.beside is not None else None  # what was copied from --init, which may go
        if self.ranks.is_main:
            if improved:
                write_pointer(self.out, "best", folder, **{k: v for k, v in self.best.items() if k != "step"})
            write_pointer(self.out, "last", folder)
            prune(self.out, self.config.report.keep)

    def _load(self, folder: Path) -> None:
        """All that advances, from a checkpoint that was verified."""
        try:
            state = read_state(folder)
            if state["text"] != self.task.identity():
                raise TrainError(
                    f"the corpus {' '.join(self.config.data.corpus)} is no longer the text that {self.out} began with; "
                    f"to train its weights on other text: --init {quote(self.out)}"
                )
            for key in ADVANCES:
                setattr(self, key, state[key])
            engine = state["engine"]
            self.source.load_state_dict(state["source"])
        except TrainError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} does not fit this run: {error}") from error
        self.engine.load(folder, engine)
        if self.step != step_of(folder):
            raise CheckpointError(f"{folder} says that it is step {self.step}")
