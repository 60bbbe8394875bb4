"""Gradual unfreezing: the head is trained first, then one more layer group at a time, from the top down.

Source: Howard & Ruder 2018, arXiv 1801.06146, section 3.3 (one group an epoch).
"""

from collections.abc import Iterable

from torch import nn

from train.layer_groups import layer_groups
from train.runs.errors import TrainError


class Unfreezing:
    """Group g of the network's trainable parameters (from the top, 0) learns from step g · every on.

    Groups without a trainable parameter do not count: where head and embedding are one matrix, the top layer is group 0, and
    the head learns with the embeddings, last.

    Until then it has no gradient, no moments and no decay. Which groups are frozen depends on the step alone: a resume needs
    no state. Build it after the optimizers, which must know all parameters.

    computes_all: wrappers that average gradients over ranks (DDP, FSDP2) expect every gradient; those of frozen groups are
    then computed, and dropped before clipping. Errors (TrainError): a single group.
    """

    def __init__(self, network: nn.Module, every: int, *, computes_all: bool = False):
        named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        groups = layer_groups(network.config, named)
        self.groups = {group: [named[name] for name in names] for group, names in groups.items() if names}
        self.every, self.computes_all = every, computes_all
        if len(self.groups) < 2:
            raise TrainError(f"--unfreeze: {next(iter(self.groups))} alone is trained, which leaves nothing to unfreeze")

    def frozen(self, step: int) -> list[nn.Parameter]:
        return [p for number, group in enumerate(self.groups.values()) if step < number * self.every for p in group]

    def begin(self, step: int) -> None:
        """Freeze and unfreeze for a step (from 0)."""
        if not self.computes_all:
            frozen = set(map(id, self.frozen(step)))
            for parameter in (p for group in self.groups.values() for p in group):
                parameter.requires_grad_(id(parameter) not in frozen)

    def drop_gradients(self, step: int) -> None:
        """Drop the gradients of frozen groups, where they are computed."""
        if self.computes_all:
            for parameter in self.frozen(step):
                parameter.grad = None

    def starts(self) -> dict[str, int]:
        """Return the first step of each group."""
        return {name: number * self.every for number, name in enumerate(self.groups)}


def describe(starts: dict[str, int], steps: int) -> str:
    """Describe the schedule of a run, and the groups that it ends before.

    >>> describe({"head": 0, "layer 0": 40, "embeddings": 80}, 60)
    'head from step 0, layer 0 from 40; embeddings would begin at 80, and the run ends at 60'
    """
    begun = {name: step for name, step in starts.items() if step < steps}
    never = {name: step for name, step in starts.items() if step >= steps}
    text = ", ".join(f"{name} from {'step ' * (not number)}{step}" for number, (name, step) in enumerate(begun.items()))
    if never:
        first = next(iter(never.values()))
        later = f"{first}" if len(never) == 1 else f"{first} and later"
        text += f"; {listed(never)} would begin at {later}, and the run ends at {steps}"
    return text


def listed(names: Iterable[str]) -> str:
    """
    >>> listed(["layer 3", "layer 2", "layer 1", "embeddings"]), listed(["embeddings"])
    ('layer 3 to embeddings', 'embeddings')
    """
    names = list(names)
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
