"""Options of `python -m train` that work only together with other options; given alone they are an error."""

import os

from data.config import BUILT_IN, BUILT_IN_RECORDS
from data.sources.find import may_hold_records
from lora.config import CONFIGS
from quant.config import QatConfig
from train.command_line import Needs
from train.config import TrainConfig, optimizer_of
from train.record_task import RecordTask
from train.registry import load
from train.rewards.names import is_function, runs_code


def _uses(*names: str):
    return lambda config: optimizer_of(config) in names


def _paths(config: TrainConfig) -> tuple[str, ...]:
    """Return the paths of all text: trained on, held out, scored."""
    return (*config.data.all_paths, *(path for paths in config.report.eval_corpora.values() for path in paths))


def _files(config: TrainConfig) -> bool:
    return any(path not in BUILT_IN for path in _paths(config))


def _new(config: TrainConfig) -> bool:
    return config.run.init is None


def _drops(config: TrainConfig) -> bool:
    return load(config.run.objective).has_dropout


def _texts(config: TrainConfig) -> bool:
    return not issubclass(load(config.run.objective), RecordTask)


def _is_split(config: TrainConfig) -> bool:
    """True unless the records are an objective's built-in ones, which come as two splits."""
    own = load(config.run.objective).default_corpus
    if config.data.corpus in ((name,) for name in BUILT_IN_RECORDS):
        return False
    return own is None or config.data.corpus != type(config.data)().corpus


INIT = "--init brings its own"
NEEDS = (
    Needs(("preset",), _new, INIT),
    Needs(("dropout",), lambda config: config.method is None, "--adapter leaves the network of --init as it is"),
    Needs(("dropout",), _drops, "this objective trains without: its loss compares log probabilities, which noise would change"),
    Needs(("vocab_size",), _new, f"{INIT} tokenizer"),
    Needs(("steps",), lambda config: config.run.epochs is None, "--epochs says how long"),
    Needs(("extend",), lambda config: False, "it says how a finished run goes on: --resume RUN --steps MORE"),
    Needs(("val_fraction",), lambda config: not config.data.validation, "--validation names what is held out"),
    Needs(("val_fraction",), _is_split, "the built-in records are split by modules"),
    Needs(("validation",), lambda config: bool(config.data.validation), "it names nothing: give files, folders or globs"),
    Needs(("eval_corpus",), lambda config: bool(config.report.eval_corpus), "it names nothing: give NAME=PATH"),
    Needs(("mix",), lambda config: bool(config.data.weights), "it is of a mixture, --corpus NAME=PATH:WEIGHT …"),
    Needs(("mix_temperature",), lambda config: config.data.mix == "temperature", "it is of --mix temperature"),
    Needs(("text_key",), lambda config: may_hold_records(_paths(config)), "the corpus holds no records"),
    Needs(("text_key", "dedup", "separator"), _texts, "this objective reads records, each by itself and by columns of its own"),
    Needs(("on_bad_text",), _files, "the corpus comes with Python, and is no file of yours"),
    Needs(("matrix_lr",), _uses("muon"), "it is Muon's rate, --optimizer muon"),
    Needs(("momentum",), _uses("muon", "sgd"), "Muon and SGD have one: --optimizer muon or sgd"),
    Needs(("betas", "eps"), _uses("adamw", "adamw8bit", "muon"), "they are AdamW's, which --optimizer sgd does without"),
    Needs(
        ("final_lr",),
        lambda config: config.optimizer.schedule != "constant",
        "--schedule constant keeps the rate to the end",
    ),
    Needs(("early_stop_on",), lambda config: bool(config.report.early_stop_on), "it names nothing: give names of scores"),
    Needs(("early_stop_on", "min_delta"), lambda config: config.report.early_stop > 0, "they are of --early-stop N"),
    Needs(("anchor_weight",), lambda config: config.anchor.anchor != "none", "it is λ of --anchor l2-sp, ewc or ewc-empirical"),
    Needs(
        ("anchor_corpus", "anchor_rows"),
        lambda config: config.anchor.anchor.startswith("ewc"),
        "they are what F of --anchor ewc and ewc-empirical is estimated from",
    ),
    Needs(
        ("reward", "reward_weights", "reward_workers", "reward_timeout", "allow_code_rewards"),
        lambda config: load(config.run.objective).needs_rewards,
        "this objective does not learn from rewards",
    ),
    Needs(
        ("reward", "reward_weights", "reward_workers", "reward_timeout", "allow_code_rewards"),
        lambda config: bool(config.rewards.reward),
        "no reward is named: --reward NAME or PATH.py:FUNCTION",
    ),
    Needs(
        ("reward_workers", "reward_timeout"),
        lambda config: any(is_function(text) or runs_code(text) for text in config.rewards.reward),
        "they are of functions of your own, --reward PATH.py:FUNCTION, and of --reward tests; other named rewards are computed "
        "in the training's process",
    ),
    Needs(("allow_code_rewards",), lambda config: any(map(runs_code, config.rewards.reward)), "it is of --reward tests"),
    Needs(
        ("reward_timeout",),
        lambda config: config.rewards.reward_workers > 0,
        "--reward-workers 0 runs your functions in the training's process, without a timeout",
    ),
    Needs(("recompute_every",), lambda config: config.speed.recompute != "none", "it is of --recompute blocks or selective"),
    Needs(("reshard",), lambda config: "shard" in (config.run.mesh or ""), "it is of --mesh shard"),
    Needs(("mesh",), lambda config: "RANK" in os.environ, "one process shares with nobody: start it with torchrun"),
    Needs(("qat.group_size",), lambda config: config.qat.granularity == "group", "it is of --qat.granularity group"),
    Needs(
        ("qat.observer", "qat.freeze"),
        lambda config: config.qat.inputs == "static",
        "they are of inputs with one scale, --qat.inputs static",
    ),
    *(
        Needs(
            tuple(f"{name}.{field}" for field in kind.__dataclass_fields__),
            lambda config, name=name: config.run.adapter == name,
            f"it says how an adapter is made that is not asked for: add --adapter {name}",
        )
        for name, kind in CONFIGS.items()
    ),
    Needs(
        tuple(f"qat.{field}" for field in QatConfig.__dataclass_fields__),
        lambda config: config.run.qat != "none",
        "it says how numbers are rounded in a training that is not asked for: add --qat int8",
    ),
)
