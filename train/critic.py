"""The critic of PPO: a second network with its own optimizer, which values the states of a reply."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

import model.hub
from model.folders import HubError
from model.reward import check_reward_model
from quant.config import FourBit
from train.adapters import add_adapter
from train.engine import Engine
from train.optimizers.precision import PRECISIONS
from train.parallel.mesh_sizes import mesh_sizes
from train.parallel.parallelize import unwrapped
from train.runs.errors import CheckpointError, TrainError
from train.runs.open import resolve
from train.step import StepResult
from train.value_objective import ValueObjective

if TYPE_CHECKING:
    from data.tokenizer.base import Tokenizer
    from train.config import TrainConfig
    from train.loop import Run
    from train.objective import Objective

FOLDER, STATE = "critic", "engine.json"  # in a checkpoint
DIVERGED = 1e4  # times the returns' own size


class CriticOwner(Protocol):
    """The parts of a task that its critic needs."""

    settings: Any
    tokenizer: "Tokenizer"
    value_folder: Path
    clip_value: float | None

    def adapt_value_network(self, network: nn.Module) -> nn.Module: ...


class CriticTask:
    """The parts of a task that `train.setup.open_engine` needs of the critic."""

    def __init__(self, clip: float | None):
        self.clip = clip

    def networks(self, network: nn.Module, initial: Callable[[], nn.Module]) -> nn.Module:
        return network

    def objective(self, networks: nn.Module, loss: Callable, held_out: Callable | None = None) -> "Objective":
        return ValueObjective(networks, self.clip)


class Critic:
    """The value network of a run, by an engine of its own: its weights, moments and steps are apart from the policy's.

    It begins with the weights of a reward model, or with those of --init and a head of zeros: all values are 0 then. Freezing,
    averages and penalties are the policy's alone; an adapter is of the same kind, and the head is trained as a whole.
    """

    def __init__(self, run: "Run", task: CriticOwner):
        from train.setup import open_engine

        config = self.config = critic_config(run.config, task.settings.value_lr)
        folder = task.value_folder
        network = open_value_network(config, folder, task, run)
        self.engine: Engine
        self.engine, _ = open_engine(config, run.ranks, run.device, CriticTask(task.clip_value), network, lambda line: None)
        self.ranks, self.name = run.ranks, str(folder)

    @property
    def objective(self) -> ValueObjective:
        return unwrapped(self.engine.objective)

    def values(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the values of this rank's rows, 1 B T."""
        return self.objective.collect(self.engine.objective, batch, self.engine.autocast)

    def train(self, own: list[dict[str, Tensor]], phase: Callable = lambda name: nullcontext()) -> StepResult:
        """Take one step on this rank's rows. Errors (TrainError): a loss or gradient that is not finite."""
        result = self.engine.train(own, phase)
        if not result.is_updated and not self.engine.scaler.is_enabled():
            raise TrainError(
                f"step {self.engine.step}: the critic's loss is {float(result.loss)}, its gradient norm "
                f"{float(result.grad_norm)}: its values diverge; lower --ppo.value-lr (now {self.config.optimizer.lr:g})"
            )
        return result

    def check(self, values_M: Tensor, returns_M: Tensor) -> None:
        """Raise TrainError where values are far from all returns: the critic diverges."""
        if not values_M.isfinite().all() or values_M.abs().max() > DIVERGED * max(1.0, float(returns_M.abs().max())):
            raise TrainError(
                f"the critic's values diverge: the largest is {float(values_M.abs().max()):g}, the largest return "
                f"{float(returns_M.abs().max()):g}; lower --ppo.value-lr (now {self.config.optimizer.lr:g})"
            )

    # ---- state

    def save(self, folder: Path) -> None:
        """Write the critic into a folder of a checkpoint, a reward model's layout; called on all ranks."""
        place = folder / FOLDER
        place.mkdir(exist_ok=True)
        self.engine.save(place)
        if self.ranks.is_main:
            (place / STATE).write_text(json.dumps(self.engine.state(), indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Load the critic from a checkpoint of the run. Errors (CheckpointError): there is none, or it does not fit."""
        place = folder / FOLDER
        try:
            state = json.loads((place / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{place} cannot be read: {error}") from None
        self.engine.load(place, state)
        if not (place / "tensors.json").is_file() and not self.engine.saves_raw_weights:
            self.engine.restore_weights(place)


def critic_config(config: "TrainConfig", value_lr: float | None) -> "TrainConfig":
    """Return the settings of the critic's engine: those of the run without what is the policy's alone."""
    optimizer = replace(config.optimizer, ema=0.0, layer_rate=1.0)
    if value_lr is not None:
        optimizer = replace(optimizer, lr=value_lr)
    return replace(config, optimizer=optimizer, run=replace(config.run, freeze=None, unfreeze=0, qat="none"))


def check_value_folder(config: "TrainConfig", folder: Path, vocab_size: int) -> None:
    """Raise TrainError or ConfigError where a folder cannot begin the critic: another vocabulary than the policy's or no
    reward model, or a context that the policy's texts exceed."""
    try:
        found = model.hub.read_config(resolve(folder))
    except (HubError, OSError, CheckpointError) as error:
        raise TrainError(f"--ppo.value {folder}: {error}") from None
    if found.head != "lm":
        check_reward_model(found, f"--ppo.value {folder}")
    own = model.hub.read_config(resolve(config.run.init)).vocab_size
    if found.vocab_size not in (own, vocab_size):  # new control tokens are added to a copy of --init too
        raise TrainError(
            f"--ppo.value {folder} has a vocabulary of {found.vocab_size:,} tokens, and --init one of {own:,}: both must read "
            "the same ids"
        )
    if found.context < config.network.context:
        raise TrainError(f"--ppo.value {folder} reads {found.context:,} tokens, and --context is {config.network.context:,}")


def open_value_network(config: "TrainConfig", folder: Path, task: CriticOwner, run: "Run") -> nn.Module:
    """Return a network with one value a position."""
    is_new = model.hub.read_config(resolve(folder)).head == "lm"
    is_sharded = mesh_sizes(config.run.mesh, run.ranks.world)["shard"] > 1
    precision = PRECISIONS[config.speed.precision]
    network = model.hub.load(
        resolve(folder),
        head="sequence",
        labels=1,
        pool="last",
        seed=config.run.seed,
        dtype=precision.parameters,
        device=torch.device("cpu") if is_sharded else run.device,
        attention=config.speed.attention,
        quantization=None if config.run.quantize == "none" else FourBit(scheme=config.run.quantize),
        check_finite=True,
    )
    if is_new:
        network = task.adapt_value_network(network)
        with torch.no_grad():
            network.head.out.weight.zero_()
    if config.method is not None:
        add_adapter(config, network, task.tokenizer, new_head=True)
    return network
