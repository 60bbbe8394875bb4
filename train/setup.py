"""From options to objects: the machine, the data, the network, the optimizers. Every "auto" is decided here, once."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import model.hub
from data.clm import clm_batch
from data.shards import Shards, prepare
from data.stream import BlockStream, check_length, sequential
from data.tokenizer import Tokenizer
from model.config import ModelConfig, family
from model.init import build
from model.weights import role_of
from train.checkpoint import resolve
from train.config import TrainConfig, TrainError
from train.optim import Optimizers, build_optimizer
from train.precision import choose_precision

Say = Callable[[str], None]
Batch = dict[str, Tensor]


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
    out = run.out or Path("runs") / f"{config.network.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = replace(run, device=device, threads=torch.get_num_threads(), out=out)
    report = config.report
    eval_every = report.eval_every or max(1, min(100, run.steps // 6))
    report = replace(report, eval_every=eval_every, save_every=report.save_every or eval_every)
    return replace(config, run=run, speed=replace(speed, deterministic=deterministic), report=report)


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
    asked = config.network
    base = ModelConfig.preset(asked.preset)
    changes = {name: getattr(asked, name) for name in ("context", "width", "depth", "heads", "mlp_width")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if asked.width is not None and asked.mlp_width is None:  # keep the preset's proportion, in multiples of 16
        changes["mlp_width"] = max(16, round(base.mlp_width / base.width * asked.width / 16) * 16)
    if asked.heads is not None:
        changes["kv_heads"] = asked.heads
    changes |= dict.fromkeys(family(base.family).DROPOUTS, asked.dropout)
    return base.replace(
        **changes, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=None
    )


def open_data(config: TrainConfig, checkpoint: Path | None, say: Say) -> Shards:
    """Prepared shards; with --init, in the tokens of the folder that the weights come from."""
    tokenizer = None
    if config.run.init is not None:  # a resume has them in its own checkpoint, and needs that folder no more
        tokenizer = Tokenizer.load(checkpoint or resolve(config.run.init))
    return prepare(config.data, tokenizer=tokenizer, say=say, progress=config.report.verbose and sys.stderr.isatty())


def open_network(config: TrainConfig, tokenizer: Tokenizer, checkpoint: Path | None) -> nn.Module:
    """From a checkpoint, else from --init, else new; in float32 always: bf16 is a matter of autocast."""
    run, asked = config.run, config.network
    device, attention = torch.device(run.device), config.speed.attention
    if checkpoint is not None:
        return model.hub.load(checkpoint, dtype=torch.float32, device=device, attention=attention)
    if run.init is None:
        return build(network_config(config, tokenizer), seed=run.seed, device=device, attention=attention)
    network = model.hub.load(resolve(run.init), dtype=torch.float32, device=device, attention=attention)
    for name in ("context", "width", "depth", "heads", "mlp_width"):
        given, has = getattr(asked, name), getattr(network.config, name)
        if given is not None and given != has and not (name == "context" and given < has):
            raise TrainError(f"--{name.replace('_', '-')} {given} does not go with --init {run.init}, which has {has}")
    if tokenizer.vocab_size != network.config.vocab_size:
        given, has = tokenizer.vocab_size, network.config.vocab_size
        raise TrainError(f"{run.init}: the tokenizer has {given} ids, the network {has}")
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
    device = network.head.weight.device
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


@dataclass(frozen=True)
class Batches:
    """Training and validation batches of a prepared corpus."""

    stream: BlockStream
    accumulate: int
    bos_id: int
    validation: list[Batch]
    validation_bytes: int  # of text, in the targets that the validation batches score

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of an optimizer step, counted from 0: a pure function of (seed, step)."""
        block_BT = self.stream.batch(step)
        return [clm_batch(part, self.bos_id) for part in block_BT.chunk(self.accumulate)]


def open_batches(config: TrainConfig, shards: Shards) -> Batches:
    asked, context, bos_id = config.optimizer, config.network.context, shards.tokenizer.bos_id
    stream = BlockStream(shards.train.ids, context, asked.batch_size * asked.accumulate, config.run.seed)
    held_out = validation_ids(config, shards)
    check_length(held_out, 1, "validation")
    blocks = sequential(held_out, context, asked.batch_size, bos_id)
    validation = [clm_batch(block_BT, bos_id) for block_BT in blocks]
    # Every scored target stands for known bytes of text, so that part of the split has an exact size too.
    return Batches(stream, asked.accumulate, bos_id, validation, int(shards.tokenizer.piece_bytes[held_out[1:]].sum()))


def validation_ids(config: TrainConfig, shards: Shards):
    return shards.validation.ids[: config.report.eval_tokens]
