"""An exponential moving average of the weights, kept beside them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from train.parallel.shard import copy_
from train.runs.sharded import local

UPDATES = "updates"  # the key of their count


class EMA:
    """Averages of all trainable parameters, in float32 or wider, wherever the parameters are.

        average = decay average + (1 - decay) parameter      after every optimizer step that was taken

    They start as copies of the parameters. `warmup` lowers the decay of update t (from 0) to (1 + t) / (10 + t), so that
    early averages do not consist of the initial weights. A tensor under two names is averaged once, under the first. The
    averages of sharded parameters are sharded alike (build after `fully_shard`).
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
            raise ValueError(f"a parameter is called {UPDATES!r}, which is the key of the count")
        self.averages = {name: self._wide(param.detach()).clone() for name, param in self.parameters.items()}
        self._applied = False

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    @torch.no_grad()
    def update(self) -> None:
        """Once an optimizer step; not at one that was skipped, nor at micro-batches."""
        if self._applied:
            raise RuntimeError("the averages stand in the network: updating would average them with themselves")
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        alike: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
        for name, param in self.parameters.items():
            average, param = local(self.averages[name]), local(param)
            if param.dtype != average.dtype:
                average.lerp_(param.to(average.dtype), 1 - decay)  # one widened at a time, not the network
                continue
            averages, params = alike.setdefault((param.device, param.dtype), ([], []))
            averages.append(average)
            params.append(param)
        for averages, params in alike.values():
            torch._foreach_lerp_(averages, params, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self, network: nn.Module | None = None) -> Iterator[None]:
        """The averages in the parameters; afterwards, whatever happened, the raw weights again, bit for bit.

        It copies: the parameters stay the same tensors, for whoever holds them. Under FSDP2 give the network too: blocks
        that keep their gathered weights after a forward (the outermost does) would compute with the other ones.
        """
        if self._applied:
            raise RuntimeError("the averages stand in the network already")
        raw = {name: local(param.detach()).clone() for name, param in self.parameters.items()}
        self._applied = True
        try:
            self._put(self.averages, network)
            yield
        finally:
            self._put(raw, network)
            self._applied = False

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor], network: nn.Module | None) -> None:
        for module in network.modules() if network is not None else ():
            if hasattr(module, "reshard"):  # FSDP2's
                module.reshard()
        for name, param in self.parameters.items():
            local(param).copy_(local(values[name]))

    def named_state(self) -> dict[str, Tensor]:
        """The live averages under their parameters' names, and the count of updates under "updates"."""
        return {**self.averages, UPDATES: torch.tensor(self.updates)}

    def load_named_state(self, named_state: Mapping[str, Tensor]) -> None:
        """Take copies of all of it, bit for bit; on a KeyError or ValueError, which name the key, nothing has changed.

        For a sharded parameter a plain tensor is the whole average, of which each rank takes its part.
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
