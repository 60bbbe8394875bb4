"""From options to objects: the machine, the data, the network, the optimizers. Every "auto" is decided here, once."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import model.hub
from data.shards import Shards, prepare
from data.tokenizer import Tokenizer, load_tokenizer
from model.config import ModelConfig, family, presets
from model.init import build
from model.weights import role_of
from train.checkpoint import resolve
from train.config import DEFAULT_LR, DEFAULT_PRESETS, TrainConfig, TrainError
from train.optim import Optimizers, build_optimizer
from train.precision import choose_precision
from train.tasks.causal import CausalTask
from train.tasks.masked import MaskedTask

Say = Callable[[str], None]
TASKS = {"clm": CausalTask, "mlm": MaskedTask}


def resolve_machine(config: TrainConfig) -> TrainConfig:
    """Device, threads, run folder; and the process-wide switches that follow from them."""
    run, speed = config.run, config.speed
    device = run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = checked_device(device).type
    if run.threads:
        torch.set_num_threads(run.threads)
    deterministic = speed.deterministic
    if deterministic == "auto":
        deterministic = "on" if kind == "cpu" else "off"
    if deterministic == "on":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with this
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")
    network = replace(config.network, preset=config.network.preset or DEFAULT_PRESETS[run.objective])
    out = run.out or Path("runs") / f"{network.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = replace(run, device=device, threads=torch.get_num_threads(), out=out)
    lr = DEFAULT_LR[run.objective] if config.optimizer.lr is None else config.optimizer.lr
    report = config.report
    eval_every = report.eval_every or max(1, min(100, run.steps // 6))
    report = replace(report, eval_every=eval_every, save_every=report.save_every or eval_every)
    optimizer, speed = replace(config.optimizer, lr=lr), replace(speed, deterministic=deterministic)
    return replace(config, run=run, network=network, optimizer=optimizer, speed=speed, report=report)


def checked_device(name: str) -> torch.device:
    """The device of that name, if this machine has it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainError(f"--device {name}: not a device; cpu, cuda, cuda:1 … are") from None
    if device.type not in ("cpu", "cuda"):
        raise TrainError(f"--device {name}: cpu and cuda are supported")
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= found:
        raise TrainError(f"--device {name}: torch {torch.__version__} sees {found} {device.type} devices here")
    return device


def network_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The preset, changed by the options and by the tokenizer's vocabulary."""
    asked, task = config.network, TASKS[config.run.objective]
    base = ModelConfig.preset(asked.preset)
    if base.architecture != task.architecture:
        fitting = [name for name, values in presets().items() if values.get("architecture", "decoder") == task.architecture]
        raise TrainError(
            f"--objective {config.run.objective} trains networks of the architecture {task.architecture!r}; "
            f"--preset {asked.preset} is one of {base.architecture!r}. Those that fit: {', '.join(fitting)}"
        )
    changes = {name: getattr(asked, name) for name in ("context", "width", "depth", "heads", "mlp_width")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if asked.width is not None and asked.mlp_width is None:  # keep the preset's proportion, in multiples of 16
        changes["mlp_width"] = max(16, round(base.mlp_width / base.width * asked.width / 16) * 16)
    if asked.heads is not None:
        changes["kv_heads"] = asked.heads
    changes |= dict.fromkeys(family(base.family).DROPOUTS, asked.dropout)
    pad_id = tokenizer.pad_id
    if base.architecture == "encoder":
        pad_id = tokenizer.unknown_id if pad_id is None else pad_id  # such a family's config.json has one always
        if base.position_offset:  # RoBERTa's first position has the row after the pad's
            changes["position_offset"] = pad_id + 1
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "stop_ids": (), "pad_id": pad_id}
    return base.replace(**changes, **ids, vocab_size=tokenizer.vocab_size, head=task.head)


def open_data(config: TrainConfig, checkpoint: Path | None, say: Say) -> Shards:
    """Prepared shards; with --init, in the tokens of the folder that the weights come from."""
    tokenizer, mask = None, config.run.objective == "mlm"
    if config.run.init is not None:  # a resume has them in its own checkpoint, and needs that folder no more
        folder = checkpoint or resolve(config.run.init)
        found, wanted = model.hub.read_config(folder), TASKS[config.run.objective].architecture
        if found.architecture != wanted:
            raise TrainError(
                f"--objective {config.run.objective} trains networks of the architecture {wanted!r}; "
                f"--init {config.run.init} is one of {found.architecture!r}"
            )
        tokenizer = load_tokenizer(folder, found.vocab_size)
    progress = config.report.verbose and sys.stderr.isatty()
    return prepare(config.data, tokenizer=tokenizer, mask=mask, say=say, progress=progress)


def open_network(config: TrainConfig, tokenizer: Tokenizer, checkpoint: Path | None, say: Say = print) -> nn.Module:
    """From a checkpoint, else from --init, else new; in float32 always: bf16 is a matter of autocast."""
    task = TASKS[config.run.objective]
    run, asked = config.run, config.network
    device, attention = torch.device(run.device), config.speed.attention
    if checkpoint is not None:
        return model.hub.load(checkpoint, dtype=torch.float32, device=device, attention=attention)
    if run.init is None:
        return build(network_config(config, tokenizer), seed=run.seed, device=device, attention=attention)
    folder = resolve(run.init)
    found = model.hub.read_config(folder)
    if found.head != task.head:
        say(f"{run.init} has the head {found.head!r}: {task.head!r} takes its place")
    network = model.hub.load(folder, dtype=torch.float32, device=device, attention=attention, head=task.head, seed=run.seed)
    for name in ("context", "width", "depth", "heads", "mlp_width"):
        given, has = getattr(asked, name), getattr(network.config, name)
        if given is not None and given != has and not (name == "context" and given < has):
            raise TrainError(f"--{name.replace('_', '-')} {given} does not go with --init {run.init}, which has {has}")
    return network


def resolve_network(config: TrainConfig, network: nn.Module) -> TrainConfig:
    """Write what the network is, and what speed will be used, back into the settings."""
    has, speed = network.config, config.speed
    context = config.network.context or has.context
    asked = replace(config.network, context=context, width=has.width, depth=has.depth, heads=has.heads, mlp_width=has.mlp_width)
    device = torch.device(config.run.device)
    precision = speed.precision
    if precision == "auto":
        precision = choose_precision(device, has.width, has.mlp_width)
    compiled = speed.compile
    if compiled == "auto":
        compiled = "on" if device.type == "cuda" else "off"
    return replace(config, network=asked, speed=replace(speed, precision=precision, compile=compiled))


def compile_blocks(network: nn.Module, say: Say) -> bool:
    """torch.compile, a block at a time: one small graph serves all. False, and a line why, where that cannot work."""
    device = next(network.parameters()).device
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises, the run can go on without it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        say(f"not compiled, because torch.compile does not work here: {lines[0] if lines else type(error).__name__}")
        return False
    for block in network.body.blocks:
        block.compile(dynamic=False)
    return True


def open_optimizers(config: TrainConfig, network: nn.Module) -> Optimizers:
    asked = config.optimizer
    try:
        return build_optimizer(
            asked.optimizer,
            network.named_parameters(),
            lambda name: role_of(network.config, name),
            lr=asked.lr,
            matrix_lr=asked.matrix_lr,
            weight_decay=asked.weight_decay,
            betas=asked.betas,
            eps=asked.eps,
            momentum=asked.momentum,
        )
    except ValueError as error:  # the optimizers know which values they can have
        raise TrainError(f"--optimizer {asked.optimizer}: {error}") from None
