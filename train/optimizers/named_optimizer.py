"""What every optimizer here shares: one `step`, state that has names, and several optimizers that act as one.

A subclass gives the update of plain tensors; which part of a sharded parameter this rank has, and what a bfloat16
parameter loses in rounding, is dealt with once, in `NamedOptimizer.step`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from train.optimizers.rounding import stochastic_round_
from train.parallel.shard import copy_, local_grad
from train.runs.sharded import is_sharded, local

WIDENED_ELEMENTS = 1 << 24  # of parameters that are float32 at one time (64 MiB, and as much for each slot)


class NamedOptimizer(torch.optim.Optimizer):
    """Base of our optimizers: state as a flat `{"<parameter name>.<slot>": tensor}`, which safetensors can hold.

    It is a `torch.optim.Optimizer`, so groups, `zero_grad` and torch's schedulers work as everywhere. A group also has
    `names` (one a parameter; `Optimizer(network.named_parameters())` fills them in) and `base_lr`, the rate that a
    schedule multiplies. A parameter has state only once it has stepped: a step that is not called, or a parameter
    without a gradient, moves nothing, neither weight nor moment nor step count.

    Parameters may be sharded (build the optimizer after `fully_shard`): their state is sharded with them. With `rounding`,
    a generator on the parameters' device, those in bfloat16 are updated in float32 and rounded back by chance, their
    moments too: at beta2 = 0.999 a second moment changes by less than half its last place, and would stand still. All
    ranks give it one seed, or copies of a parameter would drift apart.
    """

    slots: tuple[str, ...] = ()
    rounding: torch.Generator | None = None

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
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
        """The `slots` of a parameter before its first step, all zeros; what loads must have their shapes and dtypes."""
        raise NotImplementedError

    def update(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: dict, owners: list[Tensor]
    ) -> None:
        """Change `params` and `states` in place by one step. All are plain tensors, this rank's parts, never an empty list.

        `owners` are the parameters as the network has them: what an update that needs whole matrices asks for their cut.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            owners = [param for param in group["params"] if param.grad is not None]
            rounded = [param for param in owners if self.rounding is not None and param.dtype == torch.bfloat16]
            if rounded:
                owners = [param for param in owners if param.dtype != torch.bfloat16]
                for few in _few_at_a_time(rounded):
                    self._update_rounded(few, group)
            if owners:
                self.update(*self._local(owners), group, owners)

    def _local(self, owners: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]]]:
        states = [self.state_of(param) for param in owners]
        if any(map(is_sharded, owners)):
            states = [{slot: local(value) for slot, value in state.items()} for state in states]
        return [local(param) for param in owners], [local_grad(param) for param in owners], states

    def _update_rounded(self, owners: list[Tensor], group: dict) -> None:
        params, grads, states = self._local(owners)
        wide_params, wide_grads = ([tensor.float() for tensor in tensors] for tensors in (params, grads))
        wide_states = [  # float32 stays itself, and so do codes
            {slot: value.float() if value.is_floating_point() else value for slot, value in state.items()} for state in states
        ]
        self.update(wide_params, wide_grads, wide_states, group, owners)
        for param, wide_param, state, wide_state in zip(params, wide_params, states, wide_states, strict=True):
            stochastic_round_(param, wide_param, self.rounding)
            for slot, value in state.items():
                if value.dtype == torch.bfloat16:
                    stochastic_round_(value, wide_state[slot], self.rounding)

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        if not self.state[param]:
            self.state[param] = self.new_state(param)
        return self.state[param]

    def named_parameters(self) -> dict[str, Tensor]:
        if any("names" not in group for group in self.param_groups):
            raise ValueError('named state needs names: build from (name, tensor) pairs or give each group "names"')
        return {n: p for group in self.param_groups for n, p in zip(group["names"], group["params"], strict=True)}

    def named_state(self) -> dict[str, Tensor]:
        """The live state tensors, not copies, under flat names; parameters that never stepped are absent."""
        named = self.named_parameters().items()
        return {f"{n}.{slot}": value for n, p in named for slot, value in self.state.get(p, {}).items()}

    def load_named_state(self, named_state: Mapping[str, Tensor]) -> None:
        """Replace the whole state by copies, bit for bit; on any KeyError or ValueError nothing has changed.

        A parameter with no key at all is one that never stepped. One with some of its slots, a key of no parameter, and
        another shape or dtype than the slot's raise and name the key. For a sharded parameter a plain tensor is the whole
        slot, of which each rank takes its part.
        """
        self.replace_state(self.read_named_state(named_state))

    def read_named_state(self, named_state: Mapping[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        rest, read = dict(named_state), {}
        for name, param in self.named_parameters().items():
            if not any(f"{name}.{slot}" in rest for slot in self.slots):
                continue
            read[param] = self.new_state(param)
            for slot, value in read[param].items():
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
        return read

    def replace_state(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        self.state.clear()
        self.state.update(state)


def _few_at_a_time(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """By the size of the whole, not of this rank's part: all ranks cut alike, as an update that gathers must."""
    few, elements = [], 0
    for param in params:
        if few and elements + param.numel() > WIDENED_ELEMENTS:
            yield few
            few, elements = [], 0
        few.append(param)
        elements += param.numel()
    yield few


class Optimizers:
    """Several optimizers that act as one: `Optimizers([Muon(...), AdamW(...)])`."""

    def __init__(self, optimizers: Iterable[NamedOptimizer]) -> None:
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def set_lr(self, factor: float) -> None:
        """The rate of the next step in every group: lr = base_lr x factor, the factor from `train.optimizers.schedule`."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    def set_rounding(self, generator: torch.Generator | None) -> None:
        """Round bfloat16 parameters by chance from now on (None: to nearest, as torch's optimizers do)."""
        for optimizer in self.optimizers:
            optimizer.rounding = generator

    def named_state(self) -> dict[str, Tensor]:
        return {key: value for optimizer in self.optimizers for key, value in optimizer.named_state().items()}

    def load_named_state(self, named_state: Mapping[str, Tensor]) -> None:
        """As `NamedOptimizer.load_named_state`: everything is read and checked before anything is replaced."""
        rest, parts = dict(named_state), []
        for optimizer in self.optimizers:
            keys = [f"{name}.{slot}" for name in optimizer.named_parameters() for slot in optimizer.slots]
            parts.append(optimizer.read_named_state({key: rest.pop(key) for key in keys if key in rest}))
        if rest:
            raise KeyError(f"optimizer state has keys of no parameter here: {sorted(rest)}")
        for optimizer, part in zip(self.optimizers, parts, strict=True):
            optimizer.replace_state(part)
