"""What trains: the network with its optimizers, scaler, averages and place on the mesh; one step, and its state on disk.

Nothing here knows of text, screens or folders of runs: `train.loop` does.
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
from train.adapters import kept
from train.optimizers.ema import EMA
from train.optimizers.named_optimizer import Optimizers
from train.optimizers.scaler import GradScaler
from train.parallel.ranks import Mesh, Ranks, unwrapped
from train.parallel.shard import copy_, local
from train.qat import Observers
from train.runs.checkpoint import CheckpointError
from train.runs.sharded import INDEX, Parts, part_like, read_tensor, write_part
from train.step import StepResult, train_step

# In a checkpoint that is not in parts, beside the files of `model.hub`; the second only where there are averages, the last
# where model.safetensors has something else than what is trained: these, or whole numbers (`train.qat`). Of a network with an
# adapter the last one always is there, and holds what is trained alone; beside it, in the place of `model.hub`'s files, stand
# `lora.peft_io`'s.
FILES = {"optimizer": "optimizer.safetensors", "averages": "averages.safetensors", "weights": "raw.safetensors"}


class Engine:
    """A step trains `objective` (as `train.parallel.ranks.spread` made it) and is a function of the state and the batch.

    factor(update) is the schedule. Dropout's noise is a function of (seed, step, rank), and rounding's of (seed, step), so
    that no random state has to be kept. A step that is skipped, as its loss or gradients are not numbers, moves neither
    weights, moments, averages nor schedule; only `step`, by which batches are counted.
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
    ):
        self.objective, self.optimizers = objective, optimizers
        self.scaler, self.averages = scaler or GradScaler(enabled=False), averages
        self.factor, self.max_norm, self.autocast = factor, max_norm, autocast
        self.ranks, self.mesh, self.seed = ranks or Ranks(), mesh or Mesh(), seed
        self.step, self.skipped = 0, 0
        self.allocator = allocator  # AdaLoRA's: after each update it decides which ranks stay
        self.observers = observers  # of quantization-aware training: after each update their ranges move
        self.rounding = torch.Generator(next(objective.parameters()).device)
        optimizers.set_rounding(self.rounding)

    @property
    def network(self) -> nn.Module:
        return unwrapped(self.objective).network

    @property
    def rate(self) -> float:
        """The schedule's factor of the next update."""
        return self.factor(self.step - self.skipped)

    def train(self, micro_batches: list[dict[str, Tensor]], phase: Callable = lambda name: nullcontext()) -> StepResult:
        """One step on this rank's rows."""
        torch.manual_seed(noise_seed("dropout", self.seed, self.step, self.ranks.rank))
        self.rounding.manual_seed(noise_seed("rounding", self.seed, self.step))
        self.optimizers.set_lr(self.rate)
        result = train_step(
            self.objective,
            micro_batches,
            self.optimizers,
            max_norm=self.max_norm,
            autocast=self.autocast,
            scaler=self.scaler,
            ranks=self.ranks,
            phase=phase,
            penalty=self.allocator.penalty if self.allocator is not None else None,
            updated=self._updated,
        )
        self.step += 1
        if not result.updated:
            self.skipped += 1
            if self.observers is not None:
                self.observers.after_skip()
        elif self.averages is not None:
            self.averages.update()
            if self.allocator is not None:
                self.allocator.mask_averages(self.averages.averages)
        return result

    def _updated(self) -> None:
        """The gradients are still there."""
        if self.allocator is not None:
            self.allocator.after_update()
        if self.observers is not None:
            self.observers.after_update(self.step)

    def begin(self, batch: dict[str, Tensor]) -> None:
        """Before the first step, with a batch that is the same on all ranks: what has to have seen one."""
        if self.observers is not None:
            objective = unwrapped(self.objective).eval()
            self.observers.begin(lambda: objective(batch), self.autocast)

    @property
    def apart(self) -> bool:
        """Whether what is trained is something else than what model.safetensors has."""
        return bool(adapters(self.network)) or self.averages is not None or self.observers is not None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the network, where there are any; the raw ones again afterwards."""
        with self.averages.applied(self.objective) if self.averages is not None else nullcontext():
            yield

    def finite(self) -> bool:
        """Whether every weight, of all ranks, is a number."""
        total = sum(local(weight.detach()).sum(dtype=torch.float64) for weight in self.network.parameters())
        return not self.ranks.any(not bool(total.isfinite()))

    # ---- state

    def weights(self) -> dict[str, Tensor]:
        """All of the network, with observed ranges; where it has an adapter, what is trained."""
        if adapters(self.network):
            return kept(self.network)
        return dict(self.network.named_parameters()) | qat.kept(self.network)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that advances and is a tensor: `weights.…`, `optimizer.…`, `averages.…`."""
        named = {"weights": self.weights(), "optimizer": self.optimizers.named_state()}
        named["averages"] = self.averages.named_state() if self.averages is not None else {}
        return {f"{kind}.{name}": value for kind, values in named.items() for name, value in values.items()}

    def state(self) -> dict:
        """The rest, as JSON can say it."""
        allocator = {"allocator": self.allocator.state_dict()} if self.allocator is not None else {}
        return {"step": self.step, "skipped": self.skipped, "scaler": self.scaler.state_dict()} | allocator

    def save(self, folder: Path) -> None:
        """This rank's share of a checkpoint: in parts where weights are in parts, else all of it, by rank 0."""
        if self.mesh.shard > 1:
            if self.mesh.writes:
                write_part(folder, self.tensors(), self.mesh.part, self.mesh.shard)
            if self.ranks.main:
                model.hub.write_settings(self.network, folder)
        elif self.ranks.main:
            with self.averaged(), converted(self.network):
                (lora.peft_io if adapters(self.network) else model.hub).save(self.network, folder)
            wanted = {"optimizer": True, "averages": self.averages is not None, "weights": self.apart}
            for kind, name in FILES.items():
                if wanted[kind]:
                    values = {k: v.detach().contiguous().cpu() for k, v in self.tensors().items() if k.startswith(kind)}
                    save_file(values, folder / name)

    def load(self, folder: Path, state: Mapping) -> None:
        """All that advances, from a checkpoint by any number of ranks; the network of one that is not in parts has its
        weights already (`model.hub.load`). Whatever does not fit is a CheckpointError that names the folder."""
        try:
            stored, parameters = stored_tensors(folder), self.weights()
            read: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}, "averages": {}}
            for key in stored:
                kind, name = key.split(".", 1)
                owner = parameters.get(name.rsplit(".", 1)[0] if kind == "optimizer" else name)
                read[kind][name] = part_like(stored, key, owner, self.mesh.part, self.mesh.shard)
            if (read["weights"] or self.apart) and (differ := read["weights"].keys() ^ parameters.keys()):
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


def stored_tensors(folder: Path) -> Mapping[str, Tensor]:
    """What a checkpoint holds under the names of `Engine.tensors`, in parts or not."""
    if (folder / INDEX).is_file():
        return Parts(folder)
    found: dict[str, Tensor] = {}
    for name in FILES.values():
        if (folder / name).is_file():
            with WeightFile(folder / name) as file:
                found |= {key: read_tensor(file, key) for key in file.names}
    return found


def noise_seed(*parts: object) -> int:
    """A seed for each (what, seed, step, rank), unlike any other's.

    >>> noise_seed("dropout", 0, 7, 1) == noise_seed("dropout", 0, 7, 1) != noise_seed("dropout", 0, 8, 1)
    True
    """
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:8], "little") >> 1
