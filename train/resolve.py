"""Every setting "auto", and every default that depends on another setting, decided once; config.toml holds the result."""

import importlib.util
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import model.hub
from data.tokenizer.base import Tokenizer
from model.training import USUAL_CONTEXT
from train.config import (
    DEFAULT_DECAY,
    DEFAULT_MATRIX_LR,
    DEFAULT_WIDTH,
    INIT_LR_DIVISOR,
    OptimizerConfig,
    TrainConfig,
    optimizer_of,
)
from train.losses.choose import choose_loss
from train.optimizers.precision import PRECISIONS, choose_precision
from train.parallel.mesh_sizes import mesh_sizes
from train.parallel.ranks import Ranks
from train.registry import file_hash, load
from train.rewards.given import reward_hashes
from train.runs.errors import TrainError
from train.runs.lock import unused
from train.runs.open import checked_device, resolve
from train.task import Task


def resolve_machine(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Resolve device, threads, mesh, learning rates and run folder, and set torch's process-wide switches by them."""
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
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory
    mesh, on_nonfinite = run.mesh or "replicate", run.on_nonfinite or "stop"
    mesh_sizes(mesh, ranks.world)
    if config.optimizer.batch_size < ranks.world:
        raise TrainError(
            f"--batch-size {config.optimizer.batch_size}: {ranks.world} ranks share its sequences, and each needs one at least"
        )
    task, data = load(run.objective), config.data
    if task.needs_rewards and not config.rewards.reward:
        forms = "--reward NAME, PATH.py:FUNCTION or a reward model's folder"
        raise TrainError(f"--objective {run.objective} needs a judge: {forms}")
    if task.default_corpus is not None and data.corpus == type(data)().corpus:
        data = replace(data, corpus=(task.default_corpus,))
    network = replace(config.network, preset=config.network.preset or task.defaults_of(config).preset)
    out = Path(ranks.broadcast(str(run.out or unused(Path("runs") / f"{network.preset}-{time.strftime('%Y%m%d-%H%M%S')}"))))
    threads = torch.get_num_threads()
    run = replace(run, device=device, threads=threads, out=out, mesh=mesh, on_nonfinite=on_nonfinite)
    hashes = reward_hashes(config.rewards.reward)
    recorded = replace(config.recorded, objective_sha256=file_hash(run.objective), reward_sha256=hashes)
    speed = replace(speed, deterministic=deterministic)
    chosen = {"optimizer": resolve_rates(config), "speed": speed, "recorded": recorded}
    return replace(config, run=run, data=data, network=network, **chosen)


def resolve_steps(config: TrainConfig, task: Task) -> TrainConfig:
    """Convert --epochs and --unfreeze to steps; resolve the steps between validations and between checkpoints."""
    run, report, recorded = config.run, config.report, config.recorded
    if run.epochs is not None:
        recorded = replace(recorded, epochs=run.epochs)
        run = replace(run, steps=max(1, math.ceil(run.epochs / task.epochs(1) - 1e-9)), epochs=None)
    if run.unfreeze == "gradual":
        run = replace(run, unfreeze=str(max(1, math.ceil(1 / task.epochs(1) - 1e-9))))
    eval_every = report.eval_every or max(1, min(100, run.steps // 6))
    log_every = report.log_every or task.log_every
    report = replace(report, log_every=log_every, eval_every=eval_every, save_every=report.save_every or eval_every)
    return replace(config, run=run, report=report, recorded=recorded)


def resolve_rates(config: TrainConfig) -> OptimizerConfig:
    """Resolve optimizer, learning rates and decay: by the objective; with an adapter by its method; lower, and scaled by the
    width, where the weights of --init are trained further."""
    asked, run, adapted = config.optimizer, config.run, config.method is not None
    usual = load(run.objective).defaults_of(config)
    lr, matrix_lr = usual.lr, usual.matrix_lr or DEFAULT_MATRIX_LR
    if adapted:
        lr = (usual.adapter_lr or {}).get(run.adapter, config.method.learning_rate)
    if run.init is not None and not adapted and not is_probe(config):
        width = model.hub.read_config(resolve(run.init)).width if asked.lr is None else DEFAULT_WIDTH
        lr, matrix_lr = float(f"{lr / INIT_LR_DIVISOR * min(1.0, DEFAULT_WIDTH / width):.2g}"), matrix_lr / INIT_LR_DIVISOR
    decay = 0.0 if adapted else DEFAULT_DECAY
    return replace(
        asked,
        optimizer=optimizer_of(config),
        lr=lr if asked.lr is None else asked.lr,
        matrix_lr=matrix_lr if asked.matrix_lr is None else asked.matrix_lr,
        weight_decay=decay if asked.weight_decay is None else asked.weight_decay,
    )


def is_probe(config: TrainConfig) -> bool:
    """True where a head alone is trained: its rates are those of pretraining, as no weight of --init changes."""
    return config.run.freeze in ("all", "body")


def resolve_data(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """Record the token between documents, and the size of a vocabulary that was trained on the corpus."""
    separator = None if tokenizer.affixes.prefix else tokenizer.token_name(tokenizer.bos_id)
    vocab_size = tokenizer.vocab_size if config.run.init is None else config.data.vocab_size
    return replace(config, data=replace(config.data, separator=separator, vocab_size=vocab_size))


def resolve_network(config: TrainConfig, ranks: Ranks, network: nn.Module) -> TrainConfig:
    """Record the network's shape, and resolve context, precision, loss and compilation."""
    has, speed = network.config, config.speed
    before = max(network.body.num_virtual_tokens, getattr(network.body, "prompt_length", 0))  # of either stack
    room = has.context if has.position == "relative" else has.context - before
    # A network that reads 131,072 tokens is not meant to be trained on so many at a time unless that is asked for.
    context = config.network.context or (room if config.run.init is None else min(room, USUAL_CONTEXT))
    if before and context > room:
        what = f"{before} positions before the text exceed {has.context}"
        raise TrainError(f"--context {context} and {what}: --context {room} fits")
    asked = replace(config.network, context=context, width=has.width, depth=has.depth, heads=has.heads, mlp_width=has.mlp_width)
    if config.run.init is None:
        asked = replace(asked, dropout=asked.dropout or 0.0)
    precision = speed.precision
    if precision == "auto":
        precision = ranks.broadcast(choose_precision(torch.device(config.run.device), has.width))
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
