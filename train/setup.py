"""From settings to objects: the data, the network, the optimizers, the engine."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import model.hub
from data.tokenizer.base import Tokenizer
from data.tokenizer.open import load_tokenizer
from lora.adalora import RankAllocator
from lora.base import check_base
from model.block import Block
from model.config import ModelConfig, load_family, presets
from model.generation_config import FILE as GENERATION
from model.generation_config import read_generation_config
from model.heads import CLASSIFIERS, is_tied
from model.init import build_network, empty_network
from model.parameters import parameters
from model.weights import pool_of
from quant.config import FourBit
from quant.linear import follow_autocast, quantized_layers
from train import qat
from train.adapters import NAME, add_adapter, cast_frozen_weights, rate, role, table
from train.config import TrainConfig
from train.engine import Engine
from train.freeze import freeze, selected_names
from train.layer_groups import HEAD, layer_groups
from train.losses.choose import LOSSES
from train.optimizers.build import build_optimizer
from train.optimizers.ema import EMA
from train.optimizers.named_optimizer import Optimizers
from train.optimizers.precision import PRECISIONS, autocast
from train.optimizers.scaler import GradScaler
from train.optimizers.schedule import SCHEDULES
from train.parallel.mesh import build_mesh
from train.parallel.parallelize import parallelize, unwrapped
from train.parallel.ranks import Ranks
from train.recompute import recompute
from train.registry import load, names
from train.runs.checkpoint import SHARDED_INDEX
from train.runs.errors import TrainError
from train.runs.open import checked_device, resolve
from train.task import Info, Task
from train.unfreeze import Unfreezing


def own_device(config: TrainConfig, ranks: Ranks) -> torch.device:
    """This rank's device: under torchrun each rank of a machine has a GPU of its own."""
    device = torch.device(config.run.device)
    if device.type == "cuda" and ranks.world > 1:
        device = checked_device(f"cuda:{ranks.local}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def network_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The preset's config with the options' changes and the tokenizer's vocabulary. Errors (TrainError): an architecture that
    the objective cannot train."""
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
    changes |= dict.fromkeys(load_family(base.family).DROPOUTS, asked.dropout or 0.0)
    pad_id = tokenizer.pad_id
    if base.architecture != "decoder":
        pad_id = tokenizer.unknown_id if pad_id is None else pad_id  # such a family's config.json has one always
        if base.architecture == "encoder" and base.position_offset:  # RoBERTa's first position has the row after the pad's
            changes["position_offset"] = pad_id + 1
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "stop_ids": (), "pad_id": pad_id}
    return base.replace(**changes, **ids, vocab_size=tokenizer.vocab_size, head=task.head_of(config))


def trainable(task: type[Task]) -> str:
    """
    >>> trainable(load("clm"))
    "'decoder'"
    """
    return " or ".join(map(repr, task.architectures))


def open_data(config: TrainConfig, checkpoint: Path | None, info: Info) -> object:
    """Prepare the task's data; with --init, by the tokenizer in that folder."""
    tokenizer, task = None, load(config.run.objective)
    if config.data.weights and not task.can_mix:
        raise TrainError(f"--objective {config.run.objective} does not mix sources by weight: give --corpus without names")
    if config.run.init is not None:  # a checkpoint has its own tokenizer, and a resume needs that folder no more
        # But an adapter's resume does: its network is built anew, and with it the rows of control tokens that the task adds.
        folder = resolve(config.run.init) if checkpoint is None or config.method else checkpoint
        found = model.hub.read_config(folder)
        if found.architecture not in task.architectures:
            raise TrainError(
                f"--objective {config.run.objective} trains networks of the architecture {trainable(task)}; "
                f"--init {config.run.init} is one of {found.architecture!r}"
                + ": add --objective " + " or ".join(name for name in names() if found.architecture in load(name).architectures)
            )
        tokenizer = load_tokenizer(folder, found.vocab_size)
    progress = config.report.verbose and sys.stderr.isatty()
    return task.open_data(config, tokenizer, info, progress=progress)


def open_network(
    config: TrainConfig, data: object, checkpoint: Path | None, device: torch.device, info: Info = print
) -> nn.Module:
    """The network of a checkpoint, else of --init with its adapter, else a new one; in float32, or in 16 bits by --precision.

    The weights of a sharded checkpoint are not read here: each rank reads its own after sharding (`Engine.load`).
    """
    policy = PRECISIONS.get(config.speed.precision)  # None: "auto", which chooses among those with float32 weights
    dtype = policy.parameters if policy else torch.float32
    common = {"dtype": dtype, "device": device, "attention": config.speed.attention}
    if checkpoint is not None and config.method is None:
        return resumed_network(config, checkpoint, common)
    if config.run.init is not None:
        return initial_network(config, data, checkpoint, common, info)
    task = load(config.run.objective)
    network = build_network(task.network(config, network_config(config, data.tokenizer), data), seed=config.run.seed, **common)
    return network if config.run.qat == "none" else qat.prepare_network(config, network)


def resumed_network(config: TrainConfig, checkpoint: Path, common: dict) -> nn.Module:
    """The network of a checkpoint; with zero weights where `Engine.load` reads them (sharded, or --qat)."""
    is_sharded = (checkpoint / SHARDED_INDEX).is_file()
    if config.run.qat == "none" and not is_sharded:
        return model.hub.load(checkpoint, **common)
    network = empty_network(model.hub.read_config(checkpoint), **common)
    if (checkpoint / GENERATION).is_file():  # what --init's file said beside the ids goes on into the next checkpoint
        network.generation = dict(read_generation_config(checkpoint, network.config).raw)
    if is_sharded:
        return network
    for parameter in network.parameters():
        parameter.data.zero_()
    return qat.prepare_network(config, network)


def initial_network(config: TrainConfig, data: object, checkpoint: Path | None, common: dict, info: Info) -> nn.Module:
    """The network of --init, with the head of the task and the adapter of the options. Errors (TrainError): quantized weights
    without an adapter, or a shape other than the options'."""
    task, run = load(config.run.objective), config.run
    folder = resolve(run.init)
    found = model.hub.read_config(folder)
    head = task.head_of(config)
    wanted = task.network(config, found.replace(head=head, bidirectional_prompt=False), data)
    if config.method is not None and head == "lm" and wanted.bidirectional_prompt != found.bidirectional_prompt:
        reads = "in both directions" if found.bidirectional_prompt else "causally"
        raise TrainError(
            f"--objective {run.objective} --adapter {run.adapter}: {run.init} reads a prompt {reads}, which an adapter "
            "cannot change: train all weights, or an adapter with the base's own objective (prefix: both directions)"
        )
    labels = None if wanted.labels == found.labels else wanted.labels
    new_head = ""  # the reason for one
    if found.head != head:
        new_head = f"{run.init} has the head {found.head!r}: {head!r} takes its place"
    elif head == "sequence" and (pools := (pool_of(found), pool_of(wanted)))[0] != pools[1]:
        new_head = f"{run.init} pools {pools[0]!r}: a new head that pools {pools[1]!r} takes the place of its own"
    elif labels is not None:
        new_head = f"{run.init} has a head of {found.labels} labels: a new one of {labels} takes its place"
    if new_head and checkpoint is None:
        info(new_head)
    check_freeze(config, found, wanted, bool(new_head))
    four_bit = None if run.quantize == "none" else FourBit(scheme=run.quantize)
    common = common | {"head": head, "labels": labels, "pool": wanted.pool, "seed": run.seed}
    dropout = config.network.dropout if config.method is None else None  # an older version stored 0 beside an adapter
    if config.network.dropout and (config.method is not None or not task.has_dropout):  # of a recipe: it is no option given
        why = f"--adapter {run.adapter}" if config.method is not None else f"--objective {run.objective}"
        raise TrainError(f"--dropout {config.network.dropout} would have no effect with {why}")
    if dropout is not None:
        info(describe_dropout(found, dropout))
    network = model.hub.load(folder, quantization=four_bit, check_finite=True, dropout=dropout, **common)
    network.config = task.network(config, network.config.replace(bidirectional_prompt=False), data)
    network = task.adapt_network(config, network, data)
    if follow_autocast(network) and config.method is None:
        scheme = next(iter(quantized_layers(network).values())).weight.scheme
        advice = "add --adapter lora" if run.qat == "none" else f"--qat {run.qat} begins with those it was made from"
        raise TrainError(f"--init {run.init} has weights in {scheme}, which cannot be trained: {advice}")
    if four_bit is not None and network.quantization is None:
        info(f"{run.init} is quantized already, and is taken as it is: {next(iter(quantized_layers(network).values())).weight}")
    for name in ("context", "width", "depth", "heads", "mlp_width"):
        given, has = getattr(config.network, name), getattr(network.config, name)
        if given is not None and given != has and not (name == "context" and given < has):
            raise TrainError(f"--{name.replace('_', '-')} {given} does not go with --init {run.init}, which has {has}")
    if config.method is not None:
        if checkpoint is not None:
            check_base(checkpoint, folder)
        add_adapter(config, network, data.tokenizer, new_head=found.head != head or head in CLASSIFIERS)
        info(table(network))
    else:
        add_stop_id(network, data.tokenizer.eos_id)
    return network if run.qat == "none" else qat.prepare_network(config, network)


def describe_dropout(found: ModelConfig, asked: float) -> str:
    """Describe the rates of --init that --dropout takes the place of.

    >>> describe_dropout(ModelConfig.preset("gpt2"), 0.2)
    'dropout 0.2 takes the place of dropout 0.1 and attention_dropout 0.1 of --init'
    """
    own = " and ".join(f"{name} {getattr(found, name):g}" for name in load_family(found.family).DROPOUTS)
    return f"dropout {asked:g} takes the place of {own} of --init"


def check_freeze(config: TrainConfig, found: ModelConfig, wanted: ModelConfig, is_new_head: bool) -> None:
    """Refuse --freeze all without a new head, and any --freeze of the whole of a new one (TrainError)."""
    what, init = config.run.freeze, config.run.init
    if what == "all" and not is_new_head:
        other = "which is its embedding too: --freeze top:1 trains a layer" if is_tied(found) else "--freeze body trains it"
        raise TrainError(f"--freeze all: {init} has the head {found.head!r} of this objective already, {other}")
    if what is not None and is_new_head:
        frozen, head = set(selected_names(wanted, what)), layer_groups(wanted, parameters(wanted))[HEAD]
        if head and frozen.issuperset(head):
            raise TrainError(f"--freeze {what} freezes the new head, whose weights are random; --freeze body: all but the head")


def add_stop_id(network: nn.Module, eos_id: int) -> None:
    """Make the id that ends documents in training a stop id of generation, where the folder of --init does not."""
    config = network.config
    if eos_id in (config.eos_id, *config.stop_ids):
        return
    if config.eos_id is None:
        network.config = config.replace(eos_id=eos_id)
    else:
        network.config = config.replace(stop_ids=(*config.stop_ids, eos_id))
    if network.generation is not None and (said := network.generation.get("eos_token_id")) is not None:
        network.generation |= {"eos_token_id": [*(said if isinstance(said, list) else [said]), eos_id]}


def compile_blocks(network: nn.Module, info: Info) -> bool:
    """Compile each block by torch.compile: one small graph serves all. Return False, and print the reason, where that fails."""
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
    """Build the engine: freeze, recompute, compile and parallelize the network, and build its optimizers. Also return the
    settings, with compile = "off" where compiling failed."""
    asked, speed, policy = config.optimizer, config.speed, PRECISIONS[config.speed.precision]
    loss = LOSSES[speed.loss]
    learned = partial(loss, smoothing=asked.label_smoothing, z_loss=asked.z_loss)
    if config.method is not None:
        cast_frozen_weights(network, policy.autocast)
    if config.run.freeze is not None:
        freeze(network, config.run.freeze)
    initial = partial(open_network, config, getattr(task, "data", None), None, device, info=lambda line: None)
    objective = task.objective(task.networks(network, initial), learned, held_out=loss)
    recompute(network, speed.recompute, speed.recompute_every)
    if speed.compile == "on" and ranks.any(not compile_blocks(network, info)):
        config = replace(config, speed=replace(speed, compile="off"))
    mesh = build_mesh(config.run.mesh, ranks, device)
    objective = parallelize(objective, mesh, device, compute=policy.autocast, reshard=speed.reshard == "on")
    network = unwrapped(objective).network
    planned = config.recorded.scheduled_steps or config.run.steps
    warmup = round(asked.warmup * planned)
    factor = partial(SCHEDULES[asked.schedule], warmup=warmup, total=planned, final=asked.final_lr)
    optimizers = open_optimizers(config, network)
    unfreeze = config.run.unfreeze
    engine = Engine(
        objective,
        optimizers,
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
        unfreezing=Unfreezing(network, int(unfreeze), computes_all=ranks.world > 1) if unfreeze else None,
    )
    return engine, config


def open_optimizers(config: TrainConfig, network: nn.Module) -> Optimizers:
    """Build the run's optimizers. Errors (TrainError): a value that the optimizer refuses."""
    asked, layer_rates = config.optimizer, rates_by_layer(network, config.optimizer.layer_rate)
    try:
        optimizers = build_optimizer(
            asked.optimizer,
            network.named_parameters(),
            partial(role if config.method is not None else qat.role, network),
            lr=asked.lr,
            matrix_lr=asked.matrix_lr,
            weight_decay=asked.weight_decay,
            betas=asked.betas,
            eps=asked.eps,
            momentum=asked.momentum,
            lr_multiple_of=lambda name: rate(config, name) * layer_rates.get(name, 1.0),
        )
    except ValueError as error:  # the optimizers know which values they can have
        raise TrainError(f"--optimizer {asked.optimizer}: {error}") from None
    if asked.layer_rate != 1 and len({group["lr_multiple"] for group in optimizers.param_groups}) == 1:
        raise TrainError(f"--layer-rate {asked.layer_rate:g} would have no effect: one layer group alone is trained")
    return optimizers


def rates_by_layer(network: nn.Module, layer_rate: float) -> dict[str, float]:
    """Return each parameter's learning rate as a multiple of --lr: 1 for the topmost layer group, and for each one below
    `layer_rate` times the one above.

    Source: Howard & Ruder 2018, arXiv 1801.06146, section 3.2, where `layer_rate` is 1 / 2.6.
    """
    groups = [names for names in layer_groups(network.config, dict(network.named_parameters())).values() if names]
    return {name: layer_rate**number for number, names in enumerate(groups) for name in names}
