"""The network with its optimizers, gradient scaler, averages and mesh: one step, and the state on disk.

Text, the screen and the run's folder are the concern of `train.loop`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

import lora.peft_io
import model.hub
from lora.adalora import RankAllocator
from lora.inject import adapters
from model.safetensors_file import WeightFile, save_file
from quant.qat import converted
from train import qat
from train.adapters import trainable_state
from train.anchor import Anchor
from train.optimizers.ema import EMA
from train.optimizers.named_optimizer import Optimizers
from train.optimizers.scaler import GradScaler
from train.parallel.mesh import Mesh
from train.parallel.parallelize import unwrapped
from train.parallel.ranks import Ranks
from train.parallel.shard import copy_
from train.qat import Observers
from train.runs.checkpoint import SHARDED_INDEX, TENSOR_FILES
from train.runs.errors import CheckpointError
from train.runs.sharded import ShardedTensors, local, read_tensor, shard_like, write_shard
from train.step import StepResult, train_step
from train.unfreeze import Unfreezing


class Engine:
    """Network, optimizers and their state. `train` takes one step on `objective` (wrapped by `parallelize`), whose result
    depends only on the state and the batch.

    factor(update) is the schedule. Dropout's noise is a function of (seed, step, rank), and rounding's of (seed, step), so
    that no random state is saved. A step with a non-finite loss or gradient is skipped: weights, moments, averages and schedule
    stay; only `step`, which counts batches, advances.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizers: Optimizers,
        *,
        scaler: GradScaler | None = None,
        averages: EMA | None = None,
        factor: Callable[[int], float] = lambda update: 1.0,
        max_norm: float | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        ranks: Ranks | None = None,
        mesh: Mesh | None = None,
        seed: int = 0,
        allocator: RankAllocator | None = None,
        observers: Observers | None = None,
        unfreezing: Unfreezing | None = None,
    ):
        self.objective, self.optimizers = objective, optimizers
        self.scaler, self.averages = scaler or GradScaler(enabled=False), averages
        self.factor, self.max_norm, self.autocast = factor, max_norm, autocast
        self.ranks, self.mesh, self.seed = ranks or Ranks(), mesh or Mesh(), seed
        self.step, self.skipped = 0, 0
        self.allocator = allocator  # AdaLoRA's: it prunes singular values after each update
        self.observers = observers  # of quantization-aware training: ranges are updated after each step
        self.unfreezing = unfreezing
        self.anchor: Anchor | None = None  # of --anchor; its θ* and F are no state, as no step changes them
        self.rounding = torch.Generator(next(objective.parameters()).device)
        optimizers.set_rounding(self.rounding)

    @property
    def network(self) -> nn.Module:
        return unwrapped(self.objective).network

    @property
    def lr_factor(self) -> float:
        """The schedule's factor for the next update."""
        return self.factor(self.step - self.skipped)

    def train(self, micro_batches: list[dict[str, Tensor]], phase: Callable = lambda name: nullcontext()) -> StepResult:
        """Take one step on this rank's rows."""
        torch.manual_seed(noise_seed("dropout", self.seed, self.step, self.ranks.rank))
        self.rounding.manual_seed(noise_seed("rounding", self.seed, self.step))
        self.optimizers.set_lr(self.lr_factor)
        if self.unfreezing is not None:
            self.unfreezing.begin(self.step)
        result = train_step(
            self.objective,
            micro_batches,
            self.optimizers,
            max_norm=self.max_norm,
            autocast=self.autocast,
            scaler=self.scaler,
            ranks=self.ranks,
            phase=phase,
            penalty=self._penalty if self.allocator is not None or self.anchor is not None else None,
            on_gradients=self._on_gradients,
            on_update=self._on_update,
        )
        self.step += 1
        if not result.is_updated:
            self.skipped += 1
            if self.observers is not None:
                self.observers.after_skip()
        elif self.averages is not None:
            self.averages.update()
            if self.allocator is not None:
                self.allocator.mask_averages(self.averages.averages)
        return result

    def _on_gradients(self) -> None:
        """Run after the last backward, before clipping."""
        if self.unfreezing is not None:
            self.unfreezing.drop_gradients(self.step)

    def _penalty(self) -> Tensor:
        """The terms of the loss that depend on the weights alone."""
        return sum(part.penalty() for part in (self.allocator, self.anchor) if part is not None)

    def _on_update(self) -> None:
        """Run after an update, before the gradients are cleared."""
        if self.allocator is not None:
            self.allocator.after_update()
        if self.observers is not None:
            self.observers.after_update(self.step)

    def begin(self, batch: dict[str, Tensor]) -> None:
        """Initialise the observers, before the first step, with a batch that is the same on all ranks."""
        if self.observers is not None:
            objective = unwrapped(self.objective).eval()
            self.observers.begin(lambda: objective(batch), self.autocast)

    @property
    def saves_raw_weights(self) -> bool:
        """True where model.safetensors differs from the trained weights, which are then saved too."""
        return bool(adapters(self.network)) or self.averages is not None or self.observers is not None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which the network has its averaged weights, if the run keeps any; then the raw ones again."""
        with self.averages.applied(self.objective) if self.averages is not None else nullcontext():
            yield

    def is_finite(self) -> bool:
        """True where every weight, on all ranks, is finite."""
        total = sum(local(weight.detach()).sum(dtype=torch.float64) for weight in self.network.parameters())
        return not self.ranks.any(not bool(total.isfinite()))

    # ---- state

    def weights(self) -> dict[str, Tensor]:
        """All parameters and observed ranges; with an adapter, the trainable ones alone."""
        if adapters(self.network):
            return trainable_state(self.network)
        return dict(self.network.named_parameters()) | qat.buffers(self.network)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state: `weights.…`, `optimizer.…`, `averages.…`."""
        named = {"weights": self.weights(), "optimizer": self.optimizers.named_state()}
        named["averages"] = self.averages.named_state() if self.averages is not None else {}
        return {f"{kind}.{name}": value for kind, values in named.items() for name, value in values.items()}

    def state(self) -> dict:
        """The rest of the state, as JSON."""
        allocator = {"allocator": self.allocator.state_dict()} if self.allocator is not None else {}
        return {"step": self.step, "skipped": self.skipped, "scaler": self.scaler.state_dict()} | allocator

    def save(self, folder: Path) -> None:
        """Write this rank's shard of a checkpoint; without sharding rank 0 writes all of it."""
        if self.mesh.shard > 1:
            if self.mesh.is_writer:
                write_shard(folder, self.tensors(), self.mesh.shard_index, self.mesh.shard)
            if self.ranks.is_main:
                model.hub.write_settings(self.network, folder)
        elif self.ranks.is_main:
            with self.averaged(), converted(self.network):
                (lora.peft_io if adapters(self.network) else model.hub).save(self.network, folder)
            wanted = {"optimizer": True, "averages": self.averages is not None, "weights": self.saves_raw_weights}
            for kind, name in TENSOR_FILES.items():
                if wanted[kind]:
                    values = {k: v.detach().contiguous().cpu() for k, v in self.tensors().items() if k.startswith(kind)}
                    save_file(values, folder / name)

    def load(self, folder: Path, state: Mapping) -> None:
        """Load the state from a checkpoint of any number of ranks. The weights of an unsharded one are loaded before, by
        `model.hub.load`. Errors (CheckpointError, naming the folder): a state that does not fit."""
        try:
            stored, parameters = stored_tensors(folder), self.weights()
            read: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}, "averages": {}}
            for key in stored:
                kind, name = key.split(".", 1)
                owner = parameters.get(name.rsplit(".", 1)[0] if kind == "optimizer" else name)
                read[kind][name] = shard_like(stored, key, owner, self.mesh.shard_index, self.mesh.shard)
            if (read["weights"] or self.saves_raw_weights) and (differ := read["weights"].keys() ^ parameters.keys()):
                raise KeyError(f"not the same weights: {sorted(differ)[:3]}")
            for name, value in read["weights"].items():
                if value.shape != parameters[name].shape:
                    raise ValueError(f"{name} is {tuple(value.shape)}, expected {tuple(parameters[name].shape)}")
            self.optimizers.load_named_state(read["optimizer"])
            if self.averages is not None:
                self.averages.load_named_state(read["averages"])
            for name, value in read["weights"].items():
                copy_(parameters[name], value)
            self.scaler.load_state_dict(state["scaler"])
            if self.allocator is not None:
                self.allocator.load_state_dict(state["allocator"])
            self.step, self.skipped = int(state["step"]), int(state["skipped"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} does not fit this run: {error}") from error

    @torch.no_grad()
    def restore_weights(self, folder: Path) -> None:
        """Replace the weights and their averages by a checkpoint's; moments, schedule and step stay."""
        stored, parameters = stored_tensors(folder), self.weights()
        kinds = {"weights": parameters, "averages": self.averages.named_state() if self.averages is not None else {}}
        if not any(key.startswith("weights.") for key in stored):  # they are the published folder's
            loaded = model.hub.load(folder, dtype=next(self.network.parameters()).dtype).named_parameters()
            stored = {**stored, **{f"weights.{name}": value for name, value in loaded}}
        for kind, live in kinds.items():
            for name, value in live.items():
                key = f"{kind}.{name}"
                copy_(value, shard_like(stored, key, parameters.get(name), self.mesh.shard_index, self.mesh.shard))


def stored_tensors(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint, sharded or not, under the names of `Engine.tensors`."""
    if (folder / SHARDED_INDEX).is_file():
        return ShardedTensors(folder)
    found: dict[str, Tensor] = {}
    for name in TENSOR_FILES.values():
        if (folder / name).is_file():
            with WeightFile(folder / name) as file:
                found |= {key: read_tensor(file, key) for key in file.names}
    return found


def noise_seed(*parts: object) -> int:
    """A seed for each (purpose, seed, step, rank), by SHA-256.

    >>> noise_seed("dropout", 0, 7, 1) == noise_seed("dropout", 0, 7, 1) != noise_seed("dropout", 0, 8, 1)
    True
    """
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:8], "little") >> 1
