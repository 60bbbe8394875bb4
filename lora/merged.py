"""Each weight of a base as an adapter makes it, and the account: every tensor of the adapter's file comes into a weight that is
written, and every weight of the network is written."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lora.base_weights import Base
from lora.config import AdapterError
from lora.installed import holders
from lora.layer import AdaptedLayer, Holder, ModulesToSave, Part
from lora.peft_names import Entry, plain
from lora.peft_read import Read
from lora.vocabulary import same_change
from model.words import join_names

ENDS = ("body.embedding", "head")  # of a tied matrix


class Account:
    """Which tensors of an adapter's file have come into weights that were written, and which weights those are."""

    def __init__(self, base: Base, read: Read, places: Mapping[str, Entry]):
        self.file = read.file
        self.of_parameter: dict[int, list[str]] = {}  # by identity: the tensors that it was filled from, or that repeat them
        for key, there in (*read.keys.items(), *read.again):
            self.of_parameter.setdefault(id(places[key].parameter), []).append(there)
        self.of_weight: dict[str, list[str]] = {}  # tensors that are the base's own
        for copy in read.base:
            self.of_weight.setdefault(copy.weight, []).extend((copy.there, *read.parts.get(copy.there, {}).values()))
        self.used: dict[str, list[int]] = {}  # weight -> the parameters that are in its value
        self.landed: dict[str, str] = {}  # tensor -> the module that it has changed, or whose own it is
        self.unwritten = set(base.shapes)

    def uses(self, weight: str, parameters: Iterable[Tensor]) -> None:
        self.used[weight] = [id(parameter) for parameter in parameters]

    def written(self, weight: str) -> None:
        module = weight.rpartition(".")[0]
        tensors = [there for each in self.used.get(weight, ()) for there in self.of_parameter.get(each, ())]
        for there in (*tensors, *self.of_weight.get(weight, ())):
            if self.landed.setdefault(there, module) != module:
                raise AdapterError(f"{self.file.path}: {there!r} would change both {self.landed[there]} and {module}")
        self.unwritten.discard(weight)

    def close(self) -> None:
        """An error unless all is accounted for."""
        if lost := sorted(set(self.file.names) - set(self.landed)):
            raise AdapterError(f"{self.file.path}: into no weight have come: {join_names(lost)}")
        if self.unwritten:
            raise AdapterError(f"not written: {join_names(sorted(self.unwritten))}")


class Merged:
    """Each weight of the base as the active adapter makes it."""

    def __init__(self, base: Base, read: Read, places: Mapping[str, Entry]):
        self.base, network = base, base.network
        self.holders: dict[str, Holder] = {plain(path): holder for path, holder in holders(network).items() if holder.active}
        for path, holder in self.holders.items():
            if not isinstance(holder, AdaptedLayer | ModulesToSave):
                raise AdapterError("a prompt or prefix is no change of weights: it cannot be merged")
            for part in holder.parts.values():
                if isinstance(part, Part) and type(part).merge_into is Part.merge_into:
                    raise AdapterError(f"{path}: a {type(part).__name__.lower()} is no change of weights: it cannot be merged")
        self.filled = {id(places[key].parameter) for key in read.keys}
        own = {plain(path): value for path, value in network.named_parameters() if ".parts." not in path}
        self.trained = {name: value for name, value in own.items() if not value.is_meta}  # biases of the network itself
        self.kept: dict[tuple[str, str], Tensor] = {}
        self.account = Account(base, read, places)
        self.alike = self.both_ends_alike()

    # ---- a matrix in two places

    def both_ends_alike(self) -> bool:
        """Whether head and embedding are one matrix, and were changed alike."""
        if not self.base.tied or not all(self.changes(f"{end}.weight") for end in ENDS):
            return False
        return same_change(*(next(iter(self.holders[end].parts.values())) for end in ENDS))

    def torn(self) -> str | None:
        """Which end of a tied matrix was changed otherwise than the other; None: neither."""
        if not self.base.tied or self.alike:
            return None
        return next((end for end in ENDS if self.changes(f"{end}.weight")), None)

    # ---- weights

    def changes(self, ours: str | None) -> bool:
        return ours is not None and (ours in self.trained or self.holder(ours) is not None)

    def holder(self, ours: str) -> tuple[str, str] | None:
        """The path of the holder that a weight is in, and the weight's name there. Of a module that was trained whole the file
        may hold some weights alone."""
        for path, holder in self.holders.items():
            leaf = ours.removeprefix(f"{path}.")
            if leaf == ours:
                continue
            if isinstance(holder, ModulesToSave):
                return (path, leaf) if id(holder.active_module.get_parameter(leaf)) in self.filled else None
            if leaf in ("weight", "bias"):
                return path, leaf
        return None

    def value(self, ours: str) -> Tensor:
        """In our layout, in the format that is computed in."""
        found = self.holder(ours)
        if found is None and ours in self.trained:
            self.account.uses(ours, [self.trained[ours]])
            return self.trained[ours].data
        if found is None:
            return self.base.current(ours)
        path, leaf = found
        holder = self.holders[path]
        if isinstance(holder, ModulesToSave):
            self.account.uses(ours, [holder.active_module.get_parameter(leaf)])
            return holder.active_module.get_parameter(leaf).data
        other = "bias" if leaf == "weight" else "weight"
        if (path, leaf) not in self.kept:
            self.kept.clear()  # first: what is kept is as large as what is now made
            weight, bias = self.layer(path, holder)
            both = {"weight": weight, "bias": bias}
            if both[other] is not None:  # a layer's weight and bias mostly lie side by side
                self.kept[path, other] = both[other]
            return both[leaf]
        return self.kept.pop((path, leaf))

    def layer(self, path: str, layer: AdaptedLayer) -> tuple[Tensor, Tensor | None]:
        weight_name, bias_name = f"{path}.weight", f"{path}.bias"
        own = layer.base.weight, getattr(layer.base, "bias", None)
        weight, bias, used = self.base.current(weight_name), None, []
        if own[1] is not None:
            bias = self.trained[bias_name].data if bias_name in self.trained else self.base.current(bias_name)
        layer.base.weight = nn.Parameter(weight, requires_grad=False)  # DoRA looks at the layer's own
        if bias is not None:
            layer.base.bias = nn.Parameter(bias, requires_grad=False)
        try:
            for part in layer.active_parts():
                weight, bias = part.merge_into(weight, bias)
                used += part.parameters()
        finally:
            layer.base.weight = own[0]
            if bias is not None:
                layer.base.bias = own[1]
        self.account.uses(weight_name, used)
        if bias is not None:
            self.account.uses(bias_name, [*used, *([self.trained[bias_name]] if bias_name in self.trained else [])])
        return weight, bias

    def written(self, weights: Iterable[str], *, untied: bool) -> None:
        """Note that these weights are in a file. A matrix that stays tied is there for both ends."""
        for ours in weights:
            self.account.written(ours)
            if self.base.tied and not untied and ours == "body.embedding.weight":
                if self.alike:
                    head = self.holders["head"]
                    part = next(iter(head.parts.values()))
                    self.account.uses("head.weight", [part.weight] if isinstance(head, ModulesToSave) else part.parameters())
                self.account.written("head.weight")
