"""The training loop: feed batches to the engine, log, validate, sample, save, and stop."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from data.prefetch import Prefetcher
from quant.qat import converted
from train.allocator import keep_freed_memory
from train.anchored_run import Anchoring
from train.config import TrainConfig
from train.config_toml import to_plain, with_absolute_paths
from train.early_stop import EarlyStopping, is_better
from train.eval_corpora import named, open_eval_corpora
from train.evaluate import evaluate
from train.interrupt import StopRequest
from train.objective import ids_of
from train.parallel.mesh_sizes import mesh_sizes
from train.parallel.parallelize import unsharded, unwrapped
from train.parallel.ranks import Ranks, own_rows
from train.registry import load
from train.reports.failures import batch_description, explained_errors, nonfinite_state, nonfinite_step
from train.reports.log import Console, Metrics, once
from train.reports.phases import Phases
from train.reports.step_profiler import StepProfiler
from train.reports.summary import Session, comparable, conclude, introduction
from train.reports.tensorboard import TensorBoard
from train.resolve import resolve_data, resolve_network, resolve_steps
from train.runs.checkpoint import latest_verified, restore_pointers, write_settings
from train.runs.errors import TrainError
from train.saving import load_checkpoint, restore_best, save_checkpoint
from train.setup import open_data, open_engine, open_network, own_device
from train.step import StepResult
from train.task import Scored

MAX_SKIPPED = 30  # skipped steps in a row; more mean that the run is broken, not one batch


class Run:
    """A training run on one rank: its data, console output and files. The engine takes the steps.

    A checkpoint (`train.saving`) stores the engine's state and little else: learning rates, noise and most batches are
    functions of the step. A label that is not -100 is called scored.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, *, resume: bool, defaulted: tuple[str, ...] = ()):
        """`defaulted`: names of the learning rates that the user did not set."""
        self.out, self.ranks, self.defaulted = config.run.out, ranks, defaulted
        self.console = Console(config.report.verbose and ranks.is_main)
        info = once(self.console.info)
        checkpoint = self._latest_checkpoint() if resume else None
        self.device = own_device(config, ranks)
        data = ranks.local_first(lambda: open_data(config, checkpoint, info))
        self.tokenizer = data.tokenizer
        is_sharded = mesh_sizes(config.run.mesh, ranks.world)["shard"] > 1
        # A network that will be sharded is built on the CPU, so that a GPU only ever holds its shard.
        network = open_network(config, data, checkpoint, torch.device("cpu") if is_sharded else self.device, info)
        if self.device.type == "cpu":
            keep_freed_memory()
        config = self.config = resolve_network(resolve_data(config, self.tokenizer), ranks, network)
        self.task = load(config.run.objective)(config, data)
        self.source = self.task.source
        config = self.config = self.task.config = resolve_steps(config, self.task)
        self.console.unit = self.task.unit
        self.eval_corpora = ranks.local_first(lambda: open_eval_corpora(config, self.task, data, info))
        self.engine, self.config = open_engine(config, ranks, self.device, self.task, network, info)

        anchored, resumes = self.config.anchor.anchor != "none", checkpoint is not None
        parts = (self.config, self.task, self.engine, ranks, self.console)
        self.anchoring = Anchoring(*parts, resumes=resumes) if anchored else None

        self.tokens = 0  # scored labels since step 0, of skipped steps too
        self.best: dict | None = None  # the scores of the best validation, and its step
        report = config.report
        corpora = (*report.eval_corpora, *config.data.weights)
        self.early_stopping = EarlyStopping(report.early_stop, report.early_stop_on, report.min_delta, self.task, corpora)
        self.skipped_in_a_row = 0
        self.signal = 0  # the signal that stopped the run
        self.positions, self.rows = 0.0, 0  # read in this session (since the start or the resume), padding included
        self.label_fraction: float | None = None  # scored labels per position, in the first micro-batch of this session
        self.phases = Phases(self.device)
        # Chat template, label files … are copied from this folder into each checkpoint.
        self.extra_files_from = config.run.init if checkpoint is None else checkpoint
        self._resumes, self._checkpoint = resume, checkpoint
        if checkpoint is not None:
            load_checkpoint(self, checkpoint)
        self.introduction = introduction(self)

    @property
    def step(self) -> int:
        return self.engine.step

    def _latest_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, the same on every rank."""

        def find() -> str | None:
            found = latest_verified(self.out, print)
            return found.name if found is not None else None

        name = self.ranks.from_main(find)
        return self.out / "checkpoints" / name if name is not None else None

    def _open_files(self) -> None:
        """Write config.toml of a new run; bring a resumed run's files back to its checkpoint; open metrics.jsonl."""
        is_main, asked = self.ranks.is_main, self.config.report.log
        if is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            if not self._resumes:
                write_settings(self.out, to_plain(with_absolute_paths(self.config)), f"begun on {comparable(self)}")
            if self._checkpoint is not None:
                restore_pointers(self.out, self._checkpoint, self.best)
        board = TensorBoard(self.out / "tensorboard", self.step) if is_main and asked == "tensorboard" else None
        self.metrics = Metrics(self.out if is_main else None, self.step, board)

    # ---- steps

    def train(self) -> int:
        """Train until the last step, an early stop or a signal; return the signal's number, else 0."""
        began, first_step, first_tokens = time.monotonic(), self.step, self.tokens
        scored, watched = None, self.config.report.early_stop_on
        self.task.begin(self)
        if not self.step and watched:
            scored = self._scores()
            self.early_stopping.check(scored[0])  # before a file is written
        self._open_files()
        self.console.info(self.introduction)
        if self.anchoring is not None and self.engine.anchor is None:
            self.anchoring.begin(self.out)
        if not self.step and (self.config.run.init is not None or watched):
            scores, lines = scored or self._scores()
            self.console.info("\n".join([f"before the first step: {lines[0]}", *lines[1:]]))
            self.metrics.write(step=0, split="before", **scores)
        self.console.begin(self.step, self.config.run.steps)
        try:
            with explained_errors(self):
                stopped = self._train_steps()
                if self.config.report.keep_best and not self.signal and restore_best(self):
                    best = self.best["step"]
                    self.console.info(f"the weights of the best validation, at step {best}, are restored")
                    if self.config.report.sample_every:
                        self._show_sample(best)
        finally:
            self.task.close()
            self.console.end()
            self.metrics.close()
        steps, tokens = self.step - first_step, self.tokens - first_tokens
        session = Session(time.monotonic() - began, steps, tokens, round(self.positions), self.rows)
        if self.ranks.is_main:
            conclude(self, stopped, session)
        return self.signal

    def _train_steps(self) -> str:
        """Take the remaining steps. Return why the run stopped early, or "" after the last step."""
        steps, report = self.config.run.steps, self.config.report
        stopped = self.early_stopping.reason() if self.step < steps else ""
        tokens, seconds = 0, 0.0  # since the last line of metrics.jsonl; seconds exclude validation and saving
        profiler = StepProfiler(self)
        with StopRequest() as request, self.batches() as batches:
            while self.step < steps and not stopped:
                started, lr_factor = time.monotonic(), self.engine.lr_factor  # of this step
                with self.phases("data"):
                    own, count = self.prepare(next(batches))
                result = profiler.step(own, self.phases)
                self.task.train_others(self, own)
                self.tokens, tokens = self.tokens + count, tokens + count
                if result.is_updated:
                    self.skipped_in_a_row = 0
                else:
                    self._skip(result)
                is_last = self.step == steps
                is_logged = result.is_updated and (self.step % report.log_every == 0 or self.step == 1 or is_last)
                loss = float(result.loss) if is_logged else None  # waits for a GPU: before the timer stops
                seconds += time.monotonic() - started
                if is_logged:
                    self._log(result, loss, lr_factor, tokens / seconds)
                    tokens, seconds = 0, 0.0

                improved = False
                if self.step % report.eval_every == 0 or is_last:
                    improved = self._validate()
                if report.sample_every and (self.step % report.sample_every == 0 or is_last):
                    self._show_sample()
                stopped = "" if is_last else self.early_stopping.reason()
                if number := self.ranks.max(request.number):  # a signal may reach the ranks at different steps
                    self.signal, stopped = number, f"on {signal.Signals(number).name}"
                if improved or stopped or is_last or self.step % report.save_every == 0:
                    with self.phases("saving"):
                        save_checkpoint(self, improved)
                self.console.advance(self.step)
        profiler.close()
        return stopped

    def batches(self) -> AbstractContextManager[Iterator[list[dict]]]:
        """The micro-batches of each remaining step. For a GPU a thread prepares them in advance, in pinned memory."""
        steps = range(self.step, self.config.run.steps)
        if self.source.is_on_policy:
            return nullcontext(map(self._rollout, steps))
        if self.device.type == "cuda":
            return Prefetcher(self.source.batches, steps.start, steps.stop, pin_memory=True)
        return nullcontext(map(self.source.batches, steps))

    def _rollout(self, step: int) -> list[dict]:
        with self._inference():
            batches = self.source.batches(step, self.engine.network)
        return self.task.complete(self, step, batches)

    def prepare(self, micro_batches: list[dict]) -> tuple[list[dict], int]:
        """This rank's rows of the micro-batches, on its device; and the count of scored labels over all ranks."""
        objective = unwrapped(self.engine.objective)
        counts = [int(next(iter(objective.counts(batch).values()))) for batch in micro_batches]
        if self.label_fraction is None:  # the first batch of this session
            self.label_fraction = counts[0] / ids_of(micro_batches[0])[0].numel()
            if not self.step:
                self.engine.begin(self._to_device(micro_batches[0]))  # observers of --qat; leaves eval mode on
            self.engine.objective.train()
        for batch in micro_batches:
            ids = ids_of(batch)  # an encoder-decoder reads source and target: count their mean
            self.positions += sum(each.numel() for each in ids) / len(ids)
            self.rows += len(ids[0])
        return [self.own_part(batch) for batch in micro_batches], sum(counts)

    def own_part(self, batch: dict) -> dict:
        """This rank's rows of a batch, on its device."""
        return self._to_device(own_rows(batch, self.ranks))

    def _to_device(self, batch: dict) -> dict:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _log(self, result: StepResult, loss: float, lr_factor: float, tokens_per_s: float) -> None:
        """Write a line of metrics.jsonl and update the bar. `lr_factor`: the schedule's, for this step."""
        asked, scaler = self.config.optimizer, self.engine.scaler
        matrix_lr = {"matrix_lr": asked.matrix_lr * lr_factor} if asked.optimizer == "muon" else {}
        scale = {"loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}
        self.metrics.write(
            step=self.step,
            split="train",
            loss=loss,
            tokens=self.tokens,
            lr=asked.lr * lr_factor,
            **matrix_lr,
            grad_norm=float(result.grad_norm),
            **result.metrics,
            **({} if result.penalty is None else {"penalty": float(result.penalty)}),
            **self.task.drawn(self.step),
            **self.task.logged(self, self.step),
            tokens_per_s=round(tokens_per_s, 1),
            **scale,
        )
        self.console.progress(self.step, loss, tokens_per_s)

    def _skip(self, result: StepResult) -> None:
        """Handle a step with a non-finite loss or gradient, which changed no weight: stop, or continue with --on-nonfinite
        skip.

        In fp16 an overflowing gradient is normal: the scaler lowers its scale, and training continues.
        """
        self.skipped_in_a_row += 1
        may_go_on = self.skipped_in_a_row <= MAX_SKIPPED
        if self.engine.scaler.is_enabled() and math.isfinite(result.loss) and may_go_on:
            return
        origin = self.source.origin(self.step - 1)
        description = batch_description(result, self.step, origin)
        if self.config.run.on_nonfinite != "skip" or not may_go_on:
            raise TrainError(nonfinite_step(self, description, self.skipped_in_a_row))
        self.console.info(f"skipped {description}")
        self.metrics.write(step=self.step, split="skipped", loss=str(float(result.loss)), origin=origin)

    # ---- validation and samples

    def _validate(self) -> bool:
        """Score the validation batches; return True if the scores are the best so far."""
        with self.phases("validation"):
            scores, lines = self._scores()
        if not math.isfinite(scores["loss"]):
            raise TrainError(nonfinite_state(self, f"the validation loss is {scores['loss']} at step {self.step}"))
        self.metrics.write(step=self.step, split="validation", tokens=self.tokens, **scores)
        key, higher = self.task.best, self.task.higher_is_better
        improved = self.best is None or is_better(scores[key], self.best[key], higher=higher)
        if improved:
            self.best = {"step": self.step, **scores}
        self.early_stopping.update(scores)
        lines[0] += " · best so far" * improved
        self.console.info("\n".join([f"validation at step {self.step}: {lines[0]}", *lines[1:]]))
        return improved

    def _scores(self) -> tuple[dict[str, float], list[str]]:
        """The scores of the held-out data and of each corpus of --eval-corpus; and a line of each, with the averaged weights
        if the run uses --ema."""
        scores = self._scores_of(self.task)
        lines = [self.task.score_line(scores)]
        for corpus in self.eval_corpora:
            others = self._scores_of(corpus.scored)
            lines.append(f"  {corpus.name}: {corpus.scored.score_line(others)}")
            scores |= named(corpus, others, scores)
        return scores, lines

    def _scores_of(self, scored: Scored) -> dict[str, float]:
        objective = scored.scoring(unwrapped(self.engine.objective))
        batches = (self._to_device(own_rows(batch, self.ranks)) for batch in scored.validation)
        options = {"autocast": self.engine.autocast, "ranks": self.ranks, "sources": scored.validation_sources}
        with self.engine.averaged():
            totals = evaluate(objective, batches, **options)
            with self._inference():
                totals |= scored.generation_totals(self.engine.network, self.device, self.ranks)
        return scored.scores(totals)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Context manager in which the network can generate text: sharded weights are gathered, torch.compile is off, and
        layers of --qat are replaced by integer layers."""
        is_compiled = self.config.speed.compile == "on"
        # Lengths vary, and compiling for each would take longer. (An eager run never loads the compiler.)
        eager = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
        with eager, unsharded(self.engine.objective), converted(self.engine.network):
            yield

    def _show_sample(self, step: int | None = None) -> None:
        """Show and write a sample; `step`: of which the weights are, where that is not the present one."""
        with self.phases("samples"), self.engine.averaged(), self._inference():
            sample = self.task.sample(self.engine.network, self.device)
        if sample is not None:
            self.console.sample(*sample)
            self.metrics.write_sample(self.step if step is None else step, *sample)
