"""The base class of our optimizers: one `step`, and state with names; and several optimizers that act as one.

A subclass defines the update of plain tensors. `NamedOptimizer.step` takes this rank's shards of sharded parameters, and rounds
bfloat16 parameters stochastically.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from train.optimizers.rounding import stochastic_round_
from train.parallel.shard import copy_, local_grad
from train.runs.sharded import is_sharded, local

TORCH_SETTINGS = {"amsgrad", "maximize", "dampening", "nesterov", "momentum"}  # that change the update, where one is supported
WIDENED_ELEMENTS = 1 << 24  # of parameters that are in float32 at one time (64 MiB, and as much for each slot)


class NamedOptimizer(torch.optim.Optimizer):
    """Base class of our optimizers: state as a flat `{"<parameter name>.<slot>": tensor}`, which safetensors can hold.

    It is a `torch.optim.Optimizer`: parameters or (name, parameter) pairs, groups, `zero_grad`, closures, hooks and torch's
    learning-rate schedulers work as everywhere. A group also has `names` (one a parameter; pairs bring them) and `base_lr`,
    the learning rate that `Optimizers.set_lr` multiplies. A parameter has state only once it has stepped: a parameter without
    a gradient keeps its weight, moments and step count.

    Parameters may be sharded (build the optimizer after `fully_shard`): their state is sharded with them. With `rounding`,
    a generator on the parameters' device, those in bfloat16 are updated in float32 and rounded back stochastically, their
    moments too: at beta2 = 0.999 a second moment changes by less than half its last place, and would stand still. All
    ranks must give it one seed, or copies of a parameter would drift apart.
    """

    slots: tuple[str, ...] = ()  # names of a parameter's state tensors
    rounding: torch.Generator | None = None

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._check_group(group)
        group.setdefault("base_lr", group["lr"])
        if "names" not in group and "param_names" in group:
            group["names"] = list(group["param_names"])  # torch's own key, set when it was given (name, tensor) pairs
        names = group.get("names")
        if names is not None and len(names) != len(group["params"]):
            raise ValueError(f"a group has {len(names)} names for {len(group['params'])} parameters")
        counts = Counter(name for group in self.param_groups for name in group.get("names", ()))
        if repeated := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"parameter names must be unique; repeated: {repeated}")

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return a parameter's `slots` before its first step, all zeros; loaded state must have their shapes and dtypes."""
        raise NotImplementedError

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        group: dict,
        network_params: list[Tensor],
    ) -> None:
        """Change `params` and `states` in place by one step. All are plain tensors, this rank's shards, never an empty list.

        `network_params` are the parameters as the network has them: an update of whole matrices reads their sharding.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Returns the loss of `closure()`, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            rounded = [param for param in params if self.rounding is not None and param.dtype == torch.bfloat16]
            if rounded:
                params = [param for param in params if param.dtype != torch.bfloat16]
                for chunk in chunks_by_size(rounded):
                    self._update_rounded(chunk, group)
            if params:
                self.update(*self._local(params), group, params)
        return loss

    def _local(self, network_params: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]]]:
        states = [self.state_of(param) for param in network_params]
        if any(map(is_sharded, network_params)):
            states = [{slot: local(value) for slot, value in state.items()} for state in states]
        return [local(param) for param in network_params], [local_grad(param) for param in network_params], states

    def _update_rounded(self, network_params: list[Tensor], group: dict) -> None:
        params, grads, states = self._local(network_params)
        wide_params, wide_grads = ([tensor.float() for tensor in tensors] for tensors in (params, grads))
        wide_states = [  # float32 stays itself, and so do codes
            {slot: value.float() if value.is_floating_point() else value for slot, value in state.items()} for state in states
        ]
        self.update(wide_params, wide_grads, wide_states, group, network_params)
        for param, wide_param, state, wide_state in zip(params, wide_params, states, wide_states, strict=True):
            stochastic_round_(param, wide_param, self.rounding)
            for slot, value in state.items():
                if value.dtype == torch.bfloat16:
                    stochastic_round_(value, wide_state[slot], self.rounding)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in what groups of torch's own optimizers lack (`load_state_dict` comes here)."""
        super().__setstate__(state)
        for group in self.param_groups:
            self._check_group(group)
            group.setdefault("base_lr", group.get("initial_lr", group["lr"]))
            if "param_names" in group:
                group.setdefault("names", list(group["param_names"]))

    def _check_group(self, group: dict) -> None:
        """Refuse a setting of torch's optimizers that would change the update, and that this one does not have."""
        for name in sorted(TORCH_SETTINGS - self.defaults.keys()):
            if group.get(name):
                raise ValueError(f"{type(self).__name__} has no {name}, and a group has {name}={group[name]!r}")

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        if not self.state[param]:
            self.state[param] = self.new_state(param)
        return self.state[param]

    def named_parameters(self) -> dict[str, Tensor]:
        if any("names" not in group for group in self.param_groups):
            raise ValueError('named state needs names: build from (name, tensor) pairs or give each group "names"')
        return {n: p for group in self.param_groups for n, p in zip(group["names"], group["params"], strict=True)}

    def named_state(self) -> dict[str, Tensor]:
        """Return the live state tensors, not copies, under flat names; parameters that never stepped are absent."""
        named = self.named_parameters().items()
        return {f"{n}.{slot}": value for n, p in named for slot, value in self.state.get(p, {}).items()}

    def load_named_state(self, named_state: Mapping[str, Tensor]) -> None:
        """Replace the whole state by copies, bit for bit; on any KeyError or ValueError nothing has changed.

        A parameter without any key is one that never stepped. Errors, which name the key: a parameter with only some of its
        slots or a key of no parameter (KeyError), another shape or dtype (ValueError). For a sharded parameter a plain tensor
        is the whole slot, and each rank takes its shard.
        """
        self.replace_state(self.read_named_state(named_state))

    def read_named_state(self, named_state: Mapping[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """Return checked copies by parameter; nothing is replaced yet."""
        rest, states = dict(named_state), {}
        for name, param in self.named_parameters().items():
            if not any(f"{name}.{slot}" in rest for slot in self.slots):
                continue
            states[param] = self.new_state(param)
            for slot, value in states[param].items():
                key = f"{name}.{slot}"
                if key not in rest:
                    raise KeyError(f"optimizer state lacks {key!r}, though other slots of {name!r} are there")
                loaded = rest.pop(key)
                if loaded.shape != value.shape or loaded.dtype != value.dtype:
                    raise ValueError(
                        f"optimizer state {key!r} is {tuple(loaded.shape)} {loaded.dtype}, "
                        f"expected {tuple(value.shape)} {value.dtype}"
                    )
                copy_(value, loaded)  # into our own layout: strides are not part of a file
        if rest:
            raise KeyError(f"optimizer state has keys of no parameter here: {sorted(rest)}")
        return states

    def replace_state(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        self.state.clear()
        self.state.update(state)


def chunks_by_size(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters in chunks of at most `WIDENED_ELEMENTS`, or one by one.

    Sizes are of whole parameters, not of this rank's shards: all ranks chunk alike, as an update that gathers requires.
    """
    chunk, elements = [], 0
    for param in params:
        if chunk and elements + param.numel() > WIDENED_ELEMENTS:
            yield chunk
            chunk, elements = [], 0
        chunk.append(param)
        elements += param.numel()
    yield chunk


class Optimizers:
    """Several optimizers that act as one: `Optimizers([Muon(...), AdamW(...)])`."""

    def __init__(self, optimizers: Iterable[NamedOptimizer]) -> None:
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all optimizers. Returns the loss of `closure()`, which is called once, first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def set_lr(self, factor: float) -> None:
        """Set the learning rate of every group: lr = base_lr x factor, the factor from `train.optimizers.schedule`."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    def set_rounding(self, generator: torch.Generator | None) -> None:
        """Round bfloat16 parameters stochastically from now on (None: to nearest, as torch's optimizers do)."""
        for optimizer in self.optimizers:
            optimizer.rounding = generator

    def named_state(self) -> dict[str, Tensor]:
        return {key: value for optimizer in self.optimizers for key, value in optimizer.named_state().items()}

    def load_named_state(self, named_state: Mapping[str, Tensor]) -> None:
        """Replace the state of all, as `NamedOptimizer.load_named_state` does: all is checked before anything is replaced."""
        rest, states = dict(named_state), []
        for optimizer in self.optimizers:
            keys = [f"{name}.{slot}" for name in optimizer.named_parameters() for slot in optimizer.slots]
            states.append(optimizer.read_named_state({key: rest.pop(key) for key in keys if key in rest}))
        if rest:
            raise KeyError(f"optimizer state has keys of no parameter here: {sorted(rest)}")
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.replace_state(state)
