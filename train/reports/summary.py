"""The text before a run's first step and after its last: what is trained, what was reached, what to type next."""

import platform
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from data.config import DataConfig
from data.messages import format_count
from data.shell import command
from model.flops import flops_per_token
from model.weights import head_spec, other_pool
from quant.linear import count_parameters, quantized_layers
from quant.qat import qat_layers
from train import eval_corpora
from train.config import DEFAULT_WIDTH, INIT_LR_DIVISOR, RunConfig, TrainConfig
from train.early_stop import is_better
from train.freeze import frozen_names
from train.layer_groups import layer_groups
from train.optimizers.precision import PRECISIONS
from train.optimizers.schedule import ENDLESS
from train.registry import name_of, settings_of
from train.reports.curves import plot
from train.reports.log import METRICS, format_duration, read_metrics
from train.reports.page import write_page
from train.reports.rate import matmul_rate, peak_memory, speed_report
from train.reports.view import RunView
from train.resolve import is_probe
from train.runs.checkpoint import SHARDED_INDEX, read_pointer
from train.unfreeze import describe, listed

if TYPE_CHECKING:
    from model.config import ModelConfig

MAX_LAYERS = 8  # more layer groups are abbreviated
LITTLE = 0.1  # of the peak rate above its last value: an early stop has lost little
MAX_EPOCHS = 100  # more of them are a mistake in most cases, and are warned of


def introduction(run: RunView) -> str:
    """The lines before the first step: data, network, machine, run."""
    config, has = run.config, run.engine.network.config
    parameters = count_parameters(run.engine.network)
    trainable = sum(parameter.numel() for parameter in run.engine.network.parameters() if parameter.requires_grad)
    adapter = f", {trainable:,} of them trainable ({config.run.adapter})" if config.method is not None else ""
    if config.run.freeze is not None:
        frozen = format_count(len(frozen_names(run.engine.network, config.run)), "tensor")
        adapter = f", {trainable:,} of them trainable: {frozen} frozen (--freeze {config.run.freeze})"
    small = [layer.weight for layer in quantized_layers(run.engine.network).values()]
    bits = 8 * sum(weight.nbytes for weight in small) / max(1, sum(weight.numel() for weight in small))
    adapter += f", {format_count(len(small), 'matrix', 'matrices')} in {small[0].scheme} of {bits:.3f} bits" if small else ""
    rounded = len(qat_layers(run.engine.network))
    adapter += f", {format_count(rounded, 'matrix', 'matrices')} rounded to {config.run.qat} in every step" if rounded else ""
    before = run.engine.network.body.num_virtual_tokens
    before = f" after {before} of the {config.run.adapter}" if before else ""
    epochs, speed = run.task.epochs(config.run.steps), config.speed
    gpu = run.device.type == "cuda"
    machine = torch.cuda.get_device_name(run.device) if gpu else format_count(config.run.threads, "thread")
    machine += f", {run.ranks.world} ranks ({config.run.mesh})" * (run.ranks.world > 1)
    how = ("compiled" if speed.compile == "on" else "eager") + (", deterministic" * (speed.deterministic == "on"))
    # A dry run's folder is not made, and one without --out would have another time in its name.
    place = f"would be {run.out}" if config.report.dry_run else run.out
    often = f"\nwarning  the text is read {epochs:,.0f} times: fewer --steps, or more text" if epochs > MAX_EPOCHS else ""
    return (
        f"{run.task.introduction()}{eval_corpora.introduction(run.eval_corpora)}"
        f"network  {has.family}, {format_count(has.depth, 'layer')} of width {has.width}, {format_count(has.heads, 'head')}, "
        f"context {config.network.context}{before}: {parameters:,} parameters{adapter}\n"
        f"{pooling(has)}{layers(run)}{run.anchoring.describe() if run.anchoring is not None else ''}"
        f"machine  {run.device}, {machine}, {speed.precision}, {how}\n{rates(run)}"
        f"run      {place}: steps {run.step} to {config.run.steps} of {run.task.per_step()}, "
        f"{epochs:,.1f} epochs in all{often}"
    )


def layers(run: RunView) -> str:
    """Lines about layers that learn later or slower than others; else ""."""
    config, unfreezing = run.config, run.engine.unfreezing
    text = "" if unfreezing is None else f"unfreeze {describe(unfreezing.starts(), config.run.steps)}\n"
    if config.optimizer.layer_rate != 1:
        multiples = {n: group["lr_multiple"] for group in run.engine.optimizers.param_groups for n in group["names"]}
        groups = layer_groups(run.engine.network.config, multiples).items()
        shown = [f"{multiples[names[0]]:.2g} ({name})" for name, names in groups if names]
        shown = shown if len(shown) <= MAX_LAYERS else [*shown[:2], "…", shown[-1]]
        text += f"layers   learn at {', '.join(shown)} times the rate\n"
    return text


def pooling(has: "ModelConfig") -> str:
    """A line about a classifier's pooling that transformers does not have, else ""."""
    pool = other_pool(has)
    if pool is None:
        return ""
    own = head_spec(has).pool
    if pool == "concat":
        return f"pooling  {own} token, max and mean of the text side by side; transformers has no such head\n"
    return f"pooling  {pool}, where transformers would read the same weights by the {own} token\n"


def rates(run: RunView) -> str:
    """A line about learning rates that a user may not expect, with the reason; else "": lower ones with --init, and Muon's own
    where --lr alone was given."""
    config, width = run.config, run.engine.network.config.width
    if run.defaulted == ("matrix_lr",) and config.optimizer.optimizer == "muon":
        lr, matrix_lr = config.optimizer.lr, config.optimizer.matrix_lr
        return f"rates    lr {lr:g} for AdamW; hidden matrices are trained by Muon, at its default matrix-lr {matrix_lr:g}\n"
    taken = [name for name in run.defaulted if name == "lr" or config.optimizer.optimizer == "muon"]
    if config.run.init is None or config.method is not None or is_probe(config) or not taken:
        return ""
    shown = ", ".join(f"{name.replace('_', '-')} {getattr(config.optimizer, name):g}" for name in taken)
    wide = f" (lr times {DEFAULT_WIDTH}/{width}, for its width)" if width > DEFAULT_WIDTH and "lr" in taken else ""
    return f"rates    {shown}: 1/{INIT_LR_DIVISOR} of pretraining's, as --init has weights that are trained further{wide}\n"


def comparable(run: RunView) -> str:
    """The versions and hardware on which a rerun of the same settings gives the same numbers, bit for bit."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else processor()
    threads, ranks = format_count(run.config.run.threads, "thread"), f", {run.ranks.world} ranks" * (run.ranks.world > 1)
    python = f"Python {platform.python_version()}"  # the built-in corpora are its own documentation and code
    return f"{python}, torch {torch.__version__}, {device}, {threads}{ranks}, {run.config.speed.precision}"


def processor() -> str:
    """
    >>> processor()  # doctest: +SKIP
    'AMD EPYC with AVX512'
    """
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return f"{name} with {torch.backends.cpu.get_cpu_capability()}"


def training_curve(config: TrainConfig, network: "ModelConfig") -> str:
    """The legend label of the training curve: it names dropout, label smoothing and z-loss, which the validation loss
    excludes."""
    asked = config.optimizer
    dropout = max(network.dropout, network.attention_dropout)
    parts = {"dropout": dropout, "label smoothing": asked.label_smoothing, "z-loss": asked.z_loss}
    held = ", ".join(f"{name} {value:g}" for name, value in parts.items() if value)
    return f"training (with {held})" if held else "training"


class Session(NamedTuple):
    """The work since the start or the resume."""

    seconds: float
    steps: int
    tokens: int  # scored labels
    positions: int  # read, padding included
    rows: int


def speed(run: RunView, session: Session) -> str:
    """Rates, memory, and time by phase. The machine's own rate is compared with the positions per second of the steps alone;
    every rank's machine is assumed equal to this one."""
    config, unit = run.config, run.task.unit
    phases, length = run.phases.seconds(), max(1, round(session.positions / max(1, session.rows)))
    training = sum(phases.get(name, 0.0) for name in ("data", "forward", "backward", "optimizer"))
    # A CPU without 16-bit instructions multiplies faster in float32: the machine's rate is the better of both.
    formats = {PRECISIONS[config.speed.precision].autocast or torch.float32}
    formats |= {torch.float32} if run.device.type == "cpu" else set()
    adapted = {} if config.method is None else {"rank": getattr(config.method, "r", 1)}  # no gradients of the frozen weights
    return (
        f"work     {run.tokens:,} {unit}; this session {format_duration(session.seconds)}, "
        f"{session.tokens / max(session.seconds, 1e-9):,.0f} {unit}/s\n"
    ) + speed_report(
        phases,
        session.seconds,
        tokens_per_s=session.positions / max(training, 1e-9),
        flops=flops_per_token(run.engine.network.config, length, scored=run.label_fraction or 1.0, **adapted),
        rate=max(matmul_rate(run.device, dtype) for dtype in formats) * run.ranks.world,
        memory=peak_memory(run.device),
    )


def conclude(run: RunView, stopped: str, session: Session) -> None:
    """Print the result, the speed, the curves' verdict, and commands to go on with; draw curves.png, write report.html."""
    info, out, has, config = print, run.out, run.engine.network.config, run.config
    if not session.steps:
        why = f"stopped {stopped}" if stopped else f"reached the last of its {config.run.steps:,} steps"
        info(f"\nnothing is left to do: this run has {why}, and is as it was\nnext")
        for line in following(run, stopped):
            info(f"  {line}")
        return
    result = f"stopped {stopped}, saved at step {run.step}" if stopped else f"done at step {run.step}"
    result += f"\n{speed(run, session)}\n"
    if run.best:
        result += f"best     step {run.best['step']}: validation loss {run.best['loss']:.4f}, {run.task.verdict(run.best)}\n"
        result += worse_than_before(run) + undecayed(run, stopped)
    if run.engine.unfreezing is not None:
        never = [name for name, start in run.engine.unfreezing.starts().items() if start >= run.step]
        result += f"frozen   {listed(never)} never learned: the run ended at step {run.step}\n" if never else ""
    result += f"compare  a rerun gives these numbers on {comparable(run)}; elsewhere they are close\n"
    try:
        name = f"{out.name}: {has.family}, {has.depth} × {has.width}"
        diagnosis = plot(read_metrics(out / METRICS), out / "curves.png", name, training=training_curve(config, has))
        result += f"curves   {out / 'curves.png'} ({diagnosis.verdict}: {diagnosis.why})"
    except ImportError:
        result += "curves   not drawn: matplotlib is not installed (pip install matplotlib)"
    except OSError as error:
        result += f"curves   not drawn: {error}"
    result = "\n".join([result, *run.task.conclusion(run)])
    info(f"\n{result}")
    try:
        summary = f"{run.introduction}\n\n{result}"
        info(f"page     {write_page(out, config, summary, run.phases.seconds(), session.seconds, session.steps)}")
    except OSError as error:
        info(f"page     not written: {error}")
    info("next")
    for line in following(run, stopped):
        info(f"  {line}")


def worse_than_before(run: RunView) -> str:
    """A line where the best validation is no better than the weights that the run began with; else ""."""
    before = next((row for row in read_metrics(run.out / METRICS) if row["split"] == "before"), None)
    key, higher = run.task.best, run.task.higher_is_better
    if before is None or is_better(run.best[key], before[key], higher=higher):
        return ""
    return f"         no better than before the first step ({key} {before[key]:.4f}): a lower --lr, or other text\n"


def undecayed(run: RunView, stopped: str) -> str:
    """A line where an early stop came while a schedule had much of its rate to lower; else "". Losses are lowest at its end."""
    asked = run.config.optimizer
    if not stopped.startswith("early") or asked.schedule in ENDLESS or run.engine.lr_factor <= asked.final_lr + LITTLE:
        return ""
    at = f"--schedule {asked.schedule} still had {run.engine.lr_factor:.0%} of its rate"
    return f"         {at}: a new run of --steps {run.step} lets it fall to the end, which may be better\n"


def following(run: RunView, stopped: str) -> Iterator[str]:
    """Commands to go on with, one a line."""
    out, config = run.out, run.config
    folder, model = out, out.with_name(f"{out.name}-model")
    if stopped.startswith("on"):
        yield command("train", "--resume", out, *(["--allow-code-rewards"] if config.rewards.allow_code_rewards else []))
    opened = read_pointer(out, "best") or read_pointer(out, "last")
    if opened is not None and (opened / SHARDED_INDEX).is_file():  # other commands open one folder, not shards
        yield command("model", "export", out, "--out", model)
        folder = model
    yield run.task.example_command(folder)
    objective = (*task_options(config), *reward_options(config))
    init = ("--init", config.run.init) if run.task.needs_init else ()
    yield command("train", *objective, *init, "--corpus", "PATH") + f"   # your own files: {' '.join(run.task.suffixes)}"
    if config.method is not None and config.method.mergeable and opened is not None:
        yield command("lora", "merge", config.run.init, opened, "--out", model) + "   # one ordinary model folder"
    elif config.method is None and config.run.qat == "none" and not stopped.startswith("on"):
        words = (*objective, "--init", folder, *text_options(config.data), "--steps", "300")
        yield command("train", *words) + "   # go on from these weights"


def task_options(config: TrainConfig) -> tuple[str, ...]:
    """The options of the command line that select the same objective and its settings."""
    if config.run.objective == RunConfig.objective:
        return ()
    words, name = ["--objective", config.run.objective], name_of(config.run.objective)
    settings = settings_of(config)
    for each in fields(settings) if settings is not None else ():
        value, option = getattr(settings, each.name), each.name.replace("_", "-")
        if value == getattr(type(settings)(), each.name):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}.{'' if value else 'no-'}{option}")
        else:
            words += [f"--{name}.{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    return tuple(words)


def reward_options(config: TrainConfig) -> tuple[str, ...]:
    """The options of the command line that select the same rewards, and as many replies in a step, which groups fill."""
    if not config.rewards.reward:
        return ()
    words: list[str] = []
    rewards, sizes, usual = config.rewards, config.optimizer, type(config)()
    for name in ("reward", "reward_weights", "reward_workers", "reward_timeout"):
        value = getattr(rewards, name)
        if value != getattr(usual.rewards, name):
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    words += ["--allow-code-rewards"] if rewards.allow_code_rewards else []
    for name in ("batch_size", "accumulate"):
        if getattr(sizes, name) != getattr(usual.optimizer, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(sizes, name))]
    return tuple(words)


def text_options(data: DataConfig) -> list[str | Path]:
    """The options of the command line that select the same text."""
    words, usual = [], DataConfig()
    for name in ("corpus", "mix", "mix_temperature", "validation", "text_key", "on_bad_text", "val_fraction", "dedup", "cache"):
        value, option = getattr(data, name), name.replace("_", "-")
        if value == getattr(usual, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option}", *(Path(each) if str(each).startswith("-") else str(each) for each in values)]
    return words
