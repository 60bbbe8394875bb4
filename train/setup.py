"""From options to objects: the machine, the data, the network, the optimizers. Every "auto" is decided here, once."""

import importlib.util
import math
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import model.hub
from data.tokenizer.base import Tokenizer, load_tokenizer
from lora.adalora import RankAllocator
from lora.base import check_base
from model.block import Block
from model.config import ModelConfig, load_family, presets
from model.heads import CLASSIFIERS
from model.init import build_network, empty_network
from model.training import USUAL_CONTEXT
from quant.config import FourBit
from quant.linear import follow_autocast, quantized_layers
from train import qat
from train.adapters import NAME, narrow, put_on, rate, role, table
from train.config import (
    ADAPTER_LR,
    DEFAULT_DECAY,
    DEFAULT_MATRIX_LR,
    FURTHER,
    WIDTH,
    OptimizerConfig,
    TrainConfig,
    TrainError,
    mesh_sizes,
    optimizer_of,
)
from train.engine import Engine
from train.freeze import freeze
from train.losses.choose import LOSSES, choose_loss
from train.optimizers.build import build_optimizer
from train.optimizers.ema import EMA
from train.optimizers.named_optimizer import Optimizers
from train.optimizers.precision import PRECISIONS, autocast, choose_precision
from train.optimizers.scaler import GradScaler
from train.optimizers.schedule import SCHEDULES
from train.parallel.ranks import Ranks, lay_out, spread, unwrapped
from train.recompute import recompute
from train.registry import file_hash, load, names
from train.runs.checkpoint import IN_PARTS, resolve
from train.runs.lock import unused
from train.task import Info, Task


def resolve_machine(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Device, threads, mesh, run folder; and the process-wide switches that follow from them."""
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
    mesh, on_nonfinite = run.mesh or "replicate", run.on_nonfinite or "stop"
    mesh_sizes(mesh, ranks.world)
    if config.optimizer.batch_size < ranks.world:
        raise TrainError(
            f"--batch-size {config.optimizer.batch_size}: {ranks.world} ranks share its sequences, and each needs one at least"
        )
    network = replace(config.network, preset=config.network.preset or load(run.objective).defaults.preset)
    out = Path(ranks.agree(str(run.out or unused(Path("runs") / f"{network.preset}-{time.strftime('%Y%m%d-%H%M%S')}"))))
    threads = torch.get_num_threads()
    run = replace(run, device=device, threads=threads, out=out, mesh=mesh, on_nonfinite=on_nonfinite)
    recorded = replace(config.recorded, objective_sha256=file_hash(run.objective))
    speed = replace(speed, deterministic=deterministic)
    chosen = {"optimizer": resolve_rates(config), "speed": speed, "recorded": recorded}
    return replace(config, run=run, network=network, **chosen)


def resolve_steps(config: TrainConfig, task: Task) -> TrainConfig:
    """--epochs in steps; how often a run of so many is validated and saved."""
    run, report, recorded = config.run, config.report, config.recorded
    if run.epochs is not None:
        recorded = replace(recorded, epochs=run.epochs)
        run = replace(run, steps=max(1, math.ceil(run.epochs / task.epochs(1) - 1e-9)), epochs=None)
    eval_every = report.eval_every or max(1, min(100, run.steps // 6))
    report = replace(report, eval_every=eval_every, save_every=report.save_every or eval_every)
    return replace(config, run=run, report=report, recorded=recorded)


def resolve_rates(config: TrainConfig) -> OptimizerConfig:
    """The optimizer, its rates and its decay, where they are not asked for: by the objective, by the adapter's method, or lower
    and by the width where the weights of --init are trained further."""
    asked, run, adapted = config.optimizer, config.run, config.method is not None
    usual = load(run.objective).defaults
    lr, matrix_lr = (usual.adapter_lr or ADAPTER_LR)[run.adapter] if adapted else usual.lr, DEFAULT_MATRIX_LR
    if run.init is not None and not adapted:
        width = model.hub.read_config(resolve(run.init)).width if asked.lr is None else WIDTH
        lr, matrix_lr = float(f"{lr / FURTHER * min(1.0, WIDTH / width):.2g}"), matrix_lr / FURTHER
    decay = 0.0 if adapted else DEFAULT_DECAY
    return replace(
        asked,
        optimizer=optimizer_of(config),
        lr=lr if asked.lr is None else asked.lr,
        matrix_lr=matrix_lr if asked.matrix_lr is None else asked.matrix_lr,
        weight_decay=decay if asked.weight_decay is None else asked.weight_decay,
    )


def own_device(config: TrainConfig, ranks: Ranks) -> torch.device:
    """This rank's: under torchrun each of a machine's ranks has a GPU of its own."""
    device = torch.device(config.run.device)
    if device.type == "cuda" and ranks.world > 1:
        device = checked_device(f"cuda:{ranks.local}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


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
    asked, task = config.network, load(config.run.objective)
    base = ModelConfig.preset(asked.preset)
    if base.architecture not in task.architectures:
        fits = task.architectures
        fitting = [name for name, values in presets().items() if values.get("architecture", "decoder") in fits]
        raise TrainError(
            f"--objective {config.run.objective} trains networks of the architecture {trainable(task)}; "
            f"--preset {asked.preset} is one of {base.architecture!r}. Those that fit: {', '.join(fitting)}"
        )
    changes = {name: getattr(asked, name) for name in ("context", "width", "depth", "heads", "mlp_width")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if asked.width is not None and asked.mlp_width is None:  # keep the preset's proportion, in multiples of 16
        changes["mlp_width"] = max(16, round(base.mlp_width / base.width * asked.width / 16) * 16)
    if asked.heads is not None:
        changes["kv_heads"] = asked.heads
    if asked.depth is not None and base.decoder_depth is not None:
        changes["decoder_depth"] = asked.depth
    changes |= dict.fromkeys(load_family(base.family).DROPOUTS, asked.dropout)
    pad_id = tokenizer.pad_id
    if base.architecture != "decoder":
        pad_id = tokenizer.unknown_id if pad_id is None else pad_id  # such a family's config.json has one always
        if base.architecture == "encoder" and base.position_offset:  # RoBERTa's first position has the row after the pad's
            changes["position_offset"] = pad_id + 1
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "stop_ids": (), "pad_id": pad_id}
    return base.replace(**changes, **ids, vocab_size=tokenizer.vocab_size, head=task.head)


def trainable(task: type[Task]) -> str:
    """
    >>> trainable(load("clm"))
    "'decoder'"
    """
    return " or ".join(map(repr, task.architectures))


def open_data(config: TrainConfig, checkpoint: Path | None, info: Info) -> object:
    """The task's data; with --init, in the tokens of the folder that the weights come from."""
    tokenizer, task = None, load(config.run.objective)
    if config.data.weights and not task.mixes:
        raise TrainError(f"--objective {config.run.objective} does not mix sources by weight: give --corpus without names")
    if config.run.init is not None:  # a resume has them in its own checkpoint, and needs that folder no more
        init = resolve(config.run.init) if checkpoint is None or config.method else None  # an adapter's resume needs it too
        folder = checkpoint or init
        found = model.hub.read_config(init or folder)
        if found.architecture not in task.architectures:
            raise TrainError(
                f"--objective {config.run.objective} trains networks of the architecture {trainable(task)}; "
                f"--init {config.run.init} is one of {found.architecture!r}"
                + ": add --objective " + " or ".join(name for name in names() if found.architecture in load(name).architectures)
            )
        tokenizer = load_tokenizer(folder, found.vocab_size)
    progress = config.report.verbose and sys.stderr.isatty()
    return task.open_data(config, tokenizer, info, progress=progress)


def resolve_data(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """Write back into the settings what separates documents, and the size of a vocabulary that was made of them."""
    separator = None if tokenizer.affixes.prefix else tokenizer.name_of(tokenizer.bos_id)
    vocab_size = tokenizer.vocab_size if config.run.init is None else config.data.vocab_size
    return replace(config, data=replace(config.data, separator=separator, vocab_size=vocab_size))


def open_network(
    config: TrainConfig, data: object, checkpoint: Path | None, device: torch.device, info: Info = print
) -> nn.Module:
    """From a checkpoint, else from --init, else new; in float32, unless all is to be in 16 bits.

    Of a checkpoint in parts the weights are not read here: each rank reads its own, when they have been spread.
    """
    task = load(config.run.objective)
    run, asked = config.run, config.network
    asked_for = PRECISIONS.get(config.speed.precision)  # None: "auto", which chooses among those with float32 weights
    dtype = asked_for.parameters if asked_for else torch.float32
    common = {"dtype": dtype, "device": device, "attention": config.speed.attention}
    if checkpoint is not None and config.method is None:
        if (checkpoint / IN_PARTS).is_file():
            return empty_network(model.hub.read_config(checkpoint), **common)
        if run.qat == "none":
            return model.hub.load(checkpoint, **common)
        network = empty_network(model.hub.read_config(checkpoint), **common)  # what is trained stands beside what is published
        for parameter in network.parameters():
            parameter.data.zero_()
        return qat.put_on(config, network)
    if run.init is None:
        network = build_network(task.network(config, network_config(config, data.tokenizer), data), seed=run.seed, **common)
        return network if run.qat == "none" else qat.put_on(config, network)
    folder = resolve(run.init)
    found = model.hub.read_config(folder)
    wanted = task.network(config, found.replace(head=task.head), data)
    labels = None if wanted.labels == found.labels else wanted.labels
    if found.head != task.head:
        info(f"{run.init} has the head {found.head!r}: {task.head!r} takes its place")
    how = None if run.quantize == "none" else FourBit(scheme=run.quantize)
    network = model.hub.load(folder, head=task.head, labels=labels, seed=run.seed, quantization=how, finite=True, **common)
    network.config = task.network(config, network.config, data)
    packed = follow_autocast(network)
    if packed and config.method is None:
        kind = next(iter(quantized_layers(network).values())).weight.scheme
        rest = "add --adapter lora" if run.qat == "none" else f"--qat {run.qat} begins with those it was made from"
        raise TrainError(f"--init {run.init} has weights in {kind}, which cannot be trained: {rest}")
    if how is not None and network.quantization is None:
        info(f"{run.init} is quantized already, and is taken as it is: {next(iter(quantized_layers(network).values())).weight}")
    for name in ("context", "width", "depth", "heads", "mlp_width"):
        given, has = getattr(asked, name), getattr(network.config, name)
        if given is not None and given != has and not (name == "context" and given < has):
            raise TrainError(f"--{name.replace('_', '-')} {given} does not go with --init {run.init}, which has {has}")
    if config.method is not None:
        if checkpoint is not None:
            check_base(checkpoint, folder)
        put_on(config, network, data.tokenizer, new_head=found.head != task.head or task.head in CLASSIFIERS)
        info(table(network))
    else:
        also_end_with(network, data.tokenizer.eos_id)
    return network if run.qat == "none" else qat.put_on(config, network)


def also_end_with(network: nn.Module, eos_id: int) -> None:
    """What ends documents in training ends generated texts too, also where the folder of --init did not say so."""
    config = network.config
    if eos_id in (config.eos_id, *config.stop_ids):
        return
    if config.eos_id is None:
        network.config = config.replace(eos_id=eos_id)
    else:
        network.config = config.replace(stop_ids=(*config.stop_ids, eos_id))
    if network.generation is not None and (said := network.generation.get("eos_token_id")) is not None:
        network.generation |= {"eos_token_id": [*(said if isinstance(said, list) else [said]), eos_id]}


def resolve_network(config: TrainConfig, ranks: Ranks, network: nn.Module) -> TrainConfig:
    """Write what the network is and what speed will be used back into the settings."""
    has, speed = network.config, config.speed
    before = max(network.body.num_virtual_tokens, getattr(network.body, "prompt_length", 0))  # of either stack
    room = has.context if has.position == "relative" else has.context - before
    # A network that reads 131,072 tokens is not meant to be trained on so many at a time unless that is asked for.
    context = config.network.context or (room if config.run.init is None else min(room, USUAL_CONTEXT))
    if before and context > room:
        what = f"{before} positions before the text exceed {has.context}"
        raise TrainError(f"--context {context} and {what}: --context {room} fits")
    asked = replace(config.network, context=context, width=has.width, depth=has.depth, heads=has.heads, mlp_width=has.mlp_width)
    precision = speed.precision
    if precision == "auto":
        precision = ranks.agree(choose_precision(torch.device(config.run.device), has.width))
    if torch.device(config.run.device).type == "cuda":
        torch.set_float32_matmul_precision(PRECISIONS[precision].matmul)
    compiled = speed.compile
    if compiled == "auto":
        compiled = "on" if torch.device(config.run.device).type == "cuda" else "off"
    loss = speed.loss
    if loss == "auto":
        rows = -(-config.optimizer.batch_size // ranks.world) * context
        loss = choose_loss(rows, has.vocab_size, torch.device(config.run.device))
    if loss == "triton" and (torch.device(config.run.device).type != "cuda" or not importlib.util.find_spec("triton")):
        raise TrainError("--loss triton needs a CUDA device and triton; --loss chunked computes the same without")
    return replace(
        config,
        network=asked,
        recorded=replace(config.recorded, decoder_start_id=has.decoder_start_id),
        speed=replace(speed, precision=precision, compile=compiled, loss=loss),
    )


def compile_blocks(network: nn.Module, info: Info) -> bool:
    """torch.compile, a block at a time: one small graph serves all. False, and a line why, where that cannot work."""
    device = next(network.parameters()).device
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises, the run can go on without it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        info(f"not compiled, because torch.compile does not work here: {lines[0] if lines else type(error).__name__}")
        return False
    for block in (module for module in network.modules() if isinstance(module, Block)):
        block.compile(dynamic=False)
    return True


def open_engine(
    config: TrainConfig, ranks: Ranks, device: torch.device, task: Task, network: nn.Module, info: Info
) -> tuple[Engine, TrainConfig]:
    """The network made ready to train: recomputed, compiled, spread over the ranks, with its optimizers; and the settings,
    which say "off" where compiling did not work."""
    asked, speed, policy = config.optimizer, config.speed, PRECISIONS[config.speed.precision]
    loss = LOSSES[speed.loss]
    learned = partial(loss, smoothing=asked.label_smoothing, z_loss=asked.z_loss)
    if config.method is not None:
        narrow(network, policy.autocast)
    if config.run.freeze is not None:
        freeze(network, config.run.freeze)
    initial = partial(open_network, config, getattr(task, "data", None), None, device, info=lambda line: None)
    objective = task.objective(task.networks(network, initial), learned, held_out=loss)
    recompute(network, speed.recompute, speed.recompute_every)
    if speed.compile == "on" and ranks.any(not compile_blocks(network, info)):
        config = replace(config, speed=replace(speed, compile="off"))
    mesh = lay_out(config.run.mesh, ranks, device)
    objective = spread(objective, mesh, device, compute=policy.autocast, reshard=speed.reshard == "on")
    network = unwrapped(objective).network
    planned = config.recorded.scheduled_steps or config.run.steps
    warmup = round(asked.warmup * planned)
    factor = partial(SCHEDULES[asked.schedule], warmup=warmup, total=planned, final=asked.final_lr)
    engine = Engine(
        objective,
        open_optimizers(config, network),
        scaler=GradScaler(enabled=policy.needs_scaler),
        averages=EMA(network.named_parameters(), asked.ema) if asked.ema else None,
        factor=factor,
        max_norm=asked.clip or None,
        autocast=autocast(device, speed.precision),
        ranks=ranks,
        mesh=mesh,
        seed=config.run.seed,
        allocator=RankAllocator(network, NAME, config.run.steps) if config.run.adapter == "adalora" else None,
        observers=qat.observers(config, network, ranks),
    )
    return engine, config


def open_optimizers(config: TrainConfig, network: nn.Module) -> Optimizers:
    asked = config.optimizer
    try:
        return build_optimizer(
            asked.optimizer,
            network.named_parameters(),
            partial(role if config.method is not None else qat.role, network),
            lr=asked.lr,
            matrix_lr=asked.matrix_lr,
            weight_decay=asked.weight_decay,
            betas=asked.betas,
            eps=asked.eps,
            momentum=asked.momentum,
            lr_multiple_of=partial(rate, config),
        )
    except ValueError as error:  # the optimizers know which values they can have
        raise TrainError(f"--optimizer {asked.optimizer}: {error}") from None
