"""Checks of a run's settings: refused values, and options that exclude each other. Imports no torch."""

import math
from typing import Any

from lora.config import CONFIGS
from quant.config import QatConfig
from train.runs.errors import TrainError

# Scores of an eval corpus of such a name would have the name of another number of metrics.jsonl.
SCORES = ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "lr", "step", "split", "scale")


def check(config: Any) -> None:
    """Refuse invalid values of a TrainConfig (TrainError); each message names the option and the value."""
    run, optimizer, report = config.run, config.optimizer, config.report
    least = {
        "steps": (run.steps, 1),
        "seed": (run.seed, 0),
        "threads": (run.threads, 0),
        "batch-size": (optimizer.batch_size, 1),
        "accumulate": (optimizer.accumulate, 1),
        "log-every": (1 if report.log_every is None else report.log_every, 1),
        "eval-every": (1 if report.eval_every is None else report.eval_every, 1),
        "eval-tokens": (report.eval_tokens, 2),
        "sample-every": (report.sample_every, 0),
        "save-every": (1 if report.save_every is None else report.save_every, 1),
        "keep": (report.keep, 1),
        "early-stop": (report.early_stop, 0),
        "min-delta": (report.min_delta, 0),
        "clip": (optimizer.clip, 0),
        "lr": (0 if optimizer.lr is None else optimizer.lr, 0),
        "matrix-lr": (0 if optimizer.matrix_lr is None else optimizer.matrix_lr, 0),
        "z-loss": (optimizer.z_loss, 0),
        "recompute-every": (config.speed.recompute_every, 1),
        "weight-decay": (0 if optimizer.weight_decay is None else optimizer.weight_decay, 0),
    }
    for name, (value, minimum) in least.items():
        if not minimum <= value < math.inf:  # so that NaN is refused too
            raise TrainError(f"--{name} {value}: must be at least {minimum}, and finite")
    for name, value in (("warmup", optimizer.warmup), ("final-lr", optimizer.final_lr)):
        if not 0 <= value <= 1:
            raise TrainError(f"--{name} {value}: a fraction, from 0 to 1")
    rates = [
        ("momentum", optimizer.momentum),
        ("dropout", config.network.dropout or 0.0),
        ("label-smoothing", optimizer.label_smoothing),
        ("ema", optimizer.ema),
    ]
    for name, value in rates + [("betas", beta) for beta in optimizer.betas]:
        if not 0 <= value < 1:
            raise TrainError(f"--{name} {value}: must be at least 0 and below 1")
    if run.seed >= 2**63:
        raise TrainError(f"--seed {run.seed}: must be below 2^63")
    if run.threads > 1024:
        raise TrainError(f"--threads {run.threads}: must be at most 1024, and is best at most the number of cores")
    for name in ("context", "width", "depth", "heads", "mlp_width"):
        value = getattr(config.network, name)
        if value is not None and value < 1:
            raise TrainError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if run.epochs is not None and not 0 < run.epochs < math.inf:
        raise TrainError(f"--epochs {run.epochs}: must be above 0, and finite")
    for option, value in (("freeze", run.freeze), ("unfreeze", run.unfreeze)):
        if value is not None and run.adapter != "none":
            raise TrainError(f"--{option} {value}: --adapter {run.adapter} freezes all weights of --init already")
    if run.freeze == "all" and run.init is None:
        raise TrainError("--freeze all keeps what --init brings, and there is none: nothing but random weights")
    if run.unfreeze not in (None, "gradual") and not (run.unfreeze.isdecimal() and int(run.unfreeze)):
        raise TrainError(f"--unfreeze {run.unfreeze}: gradual (one layer an epoch), or steps a layer, 1 at least")
    if not 0 < optimizer.layer_rate <= 1:
        raise TrainError(f"--layer-rate {optimizer.layer_rate}: above 0 and at most 1, as lower layers hold what is general")
    check_adapter(config)
    check_qat(config)
    if config.data.mix == "temperature" and not config.data.weights:
        raise TrainError(f"--mix temperature with --corpus {' '.join(config.data.corpus)}: each source is NAME=PATH")
    check_eval_corpora(config)
    check_anchor(config)
    check_rewards(config)


def check_adapter(config: Any) -> None:
    chosen = config.run.adapter
    if chosen != "none" and config.run.init is None:
        raise TrainError(f"--adapter {chosen} needs a network's weights: --init RUN or a model folder")
    if chosen == "none" and config.run.quantize != "none":
        raise TrainError(f"--quantize {config.run.quantize}: 4-bit weights cannot be trained: add --adapter lora")
    if chosen != "none" and "shard" in (config.run.mesh or ""):
        raise TrainError(f"--adapter {chosen} does not go with --mesh {config.run.mesh}: replicate does")
    if chosen != "none" and config.speed.precision == "bf16-pure":
        raise TrainError(f"--adapter {chosen} is trained in float32: --precision bf16 casts the frozen weights alone")
    for name in CONFIGS:
        if name != chosen and getattr(config, name) != CONFIGS[name]():
            raise TrainError(f"--{name}.… has no effect: add --adapter {name}")


def check_qat(config: Any) -> None:
    chosen = config.run.qat
    if chosen == "none" and config.qat != QatConfig():
        raise TrainError("--qat.… has no effect: add --qat int8")
    if chosen != "none" and config.run.adapter != "none":
        raise TrainError(f"--qat {chosen} trains all weights, and --adapter {config.run.adapter} freezes them")
    if chosen != "none" and "shard" in (config.run.mesh or ""):
        raise TrainError(f"--qat {chosen} does not go with --mesh {config.run.mesh}: replicate does")
    if chosen != "none" and config.speed.precision == "bf16-pure":
        raise TrainError(f"--qat {chosen}: bfloat16 weights lose small updates; --precision bf16 keeps them in float32")


def check_eval_corpora(config: Any) -> None:
    for name in config.report.eval_corpora:
        if name in config.data.weights:
            raise TrainError(f"--eval-corpus {name}: a source of the mixture has this name, and a loss_{name}: choose another")
        if name in SCORES:
            raise TrainError(f"--eval-corpus {name}: this is the name of a score: choose another")


def check_anchor(config: Any) -> None:
    asked, run = config.anchor, config.run
    if asked.anchor == "none":
        return
    option = f"--anchor {asked.anchor}"
    if not 0 < asked.anchor_weight < math.inf:
        raise TrainError(f"--anchor-weight {asked.anchor_weight}: must be above 0, and finite")
    if asked.anchor_rows < 1:
        raise TrainError(f"--anchor-rows {asked.anchor_rows}: must be at least 1")
    if run.init is None:
        raise TrainError(f"{option} holds weights near those of --init: add --init RUN or a model folder")
    if run.adapter != "none":
        raise TrainError(f"{option}: --adapter {run.adapter} freezes the weights of --init, which then stay what they are")
    if run.qat != "none":
        raise TrainError(f"{option} does not go with --qat {run.qat}: rounded weights are never those of --init")
    if "shard" in (run.mesh or ""):
        raise TrainError(f"{option} does not go with --mesh {run.mesh}: replicate does")
    if asked.anchor != "l2-sp" and not asked.anchor_corpus:
        raise TrainError(f"{option} needs the text that is not to be forgotten: --anchor-corpus PATH")


def check_rewards(config: Any) -> None:
    asked = config.rewards
    if not asked.reward:
        return
    from train.rewards.named import open_named
    from train.rewards.names import is_function, is_model, parse_function, require_permission

    for text in asked.reward:
        if is_function(text):
            parse_function(text)
        elif not is_model(text):
            open_named(text)
    require_permission(asked)
    if repeated := [text for text in asked.reward if asked.reward.count(text) > 1]:
        raise TrainError(f"--reward {repeated[0]} is given twice: --reward-weights gives it more weight")
    weights = asked.reward_weights
    if weights and len(weights) != len(asked.reward):
        raise TrainError(f"--reward-weights has {len(weights)} values for {len(asked.reward)} rewards: one each is expected")
    if not all(map(math.isfinite, weights)) or (weights and not any(weights)):
        shown = " ".join(f"{weight:g}" for weight in weights)
        raise TrainError(f"--reward-weights {shown}: finite numbers are expected, one of them at least not 0")
    if not 0 <= asked.reward_workers <= 256:
        raise TrainError(f"--reward-workers {asked.reward_workers}: from 0 to 256")
    if asked.reward_timeout is not None and not 0 < asked.reward_timeout <= 1e6:
        raise TrainError(f"--reward-timeout {asked.reward_timeout}: above 0, and at most 1,000,000 seconds")
