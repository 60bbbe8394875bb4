"""An exponential moving average (EMA) of the weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from train.parallel.shard import copy_
from train.runs.sharded import local

UPDATES = "updates"  # the key of the number of updates


class EMA:
    """Exponential moving averages of all trainable parameters, in float32 or wider, on the parameters' devices.

        average = decay average + (1 - decay) parameter      after every optimizer step that was taken

    They start as copies of the parameters. `warmup` lowers the decay of update t (from 0) to (1 + t) / (10 + t), so that
    early averages do not consist of the initial weights. A tensor under two names is averaged once, under the first. The
    averages of sharded parameters are sharded alike (build after `fully_shard`). Parameters have any shape and floating dtype.
    Errors: `decay` outside [0, 1], or a parameter called "updates" (ValueError); `update` while `applied` (RuntimeError).
    Source: Polyak & Juditsky 1992; with a constant decay as in Szegedy et al. 2016, arXiv 1512.00567, section 8. The
    warm-up is TensorFlow's tf.train.ExponentialMovingAverage(num_updates=t). Without it: torch.optim.swa_utils'
    AveragedModel with get_ema_multi_avg_fn, whose first update is the copy.

    >>> weight = nn.Parameter(torch.tensor([0.0]))
    >>> ema = EMA([("weight", weight)], decay=0.75)
    >>> with torch.no_grad():
    ...     _ = weight.fill_(8.0)
    >>> ema.update()
    >>> with ema.applied():
    ...     weight.item()
    2.0
    >>> weight.item()
    8.0
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], decay: float, *, warmup: bool = False) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay} is not in [0, 1]")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.parameters: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, param in named_parameters:
            if param.requires_grad and id(param) not in seen:
                seen.add(id(param))
                self.parameters[name] = param
        if UPDATES in self.parameters:
            raise ValueError(f"a parameter is called {UPDATES!r}, which is the key of the number of updates")
        self.averages = {name: self._widen(param.detach()).clone() for name, param in self.parameters.items()}
        self._is_applied = False

    @staticmethod
    def _widen(tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages, once after each optimizer step; not after a skipped step, nor after micro-batches."""
        if self._is_applied:
            raise RuntimeError("the averages are applied to the network: an update would average them with themselves")
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        by_kind: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
        for name, param in self.parameters.items():
            average, param = local(self.averages[name]), local(param)
            if param.dtype != average.dtype:
                average.lerp_(param.to(average.dtype), 1 - decay)  # one widened at a time, not the network
                continue
            averages, params = by_kind.setdefault((param.device, param.dtype), ([], []))
            averages.append(average)
            params.append(param)
        for averages, params in by_kind.values():
            torch._foreach_lerp_(averages, params, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self, network: nn.Module | None = None) -> Iterator[None]:
        """Copy the averages into the parameters inside the context; restore the raw weights after it, bit for bit.

        The parameters stay the same tensors. Under FSDP2 give the network too: blocks that keep their gathered weights after a
        forward (the outermost does) would compute with the previous ones.
        """
        if self._is_applied:
            raise RuntimeError("the averages are applied to the network already")
        raw = {name: local(param.detach()).clone() for name, param in self.parameters.items()}
        self._is_applied = True
        try:
            self._copy_into_parameters(self.averages, network)
            yield
        finally:
            self._copy_into_parameters(raw, network)
            self._is_applied = False

    @torch.no_grad()
    def _copy_into_parameters(self, values: Mapping[str, Tensor], network: nn.Module | None) -> None:
        for module in network.modules() if network is not None else ():
            if hasattr(module, "reshard"):  # FSDP2's
                module.reshard()
        for name, param in self.parameters.items():
            local(param).copy_(local(values[name]))

    def named_state(self) -> dict[str, Tensor]:
        """Return the live averages under their parameters' names, and the number of updates under "updates"."""
        return {**self.averages, UPDATES: torch.tensor(self.updates)}

    def load_named_state(self, named_state: Mapping[str, Tensor]) -> None:
        """Replace the averages by copies, bit for bit; on a KeyError or ValueError, which name the key, nothing has changed.

        For a sharded parameter a plain tensor is the whole average, and each rank takes its shard.
        """
        if differ := sorted(named_state.keys() ^ self.named_state().keys()):
            raise KeyError(f"the averages are not of the same parameters: {differ}")
        for name, average in self.averages.items():
            loaded = named_state[name]
            if loaded.shape != average.shape or loaded.dtype != average.dtype:
                raise ValueError(
                    f"the average {name!r} is {tuple(loaded.shape)} {loaded.dtype}, "
                    f"expected {tuple(average.shape)} {average.dtype}"
                )
        for name, average in self.averages.items():
            copy_(average, named_state[name])
        self.updates = int(named_state[UPDATES])
