"""Computes each weight of a base with the adapter merged into it, and checks the coverage: every tensor of the adapter's file
is used in a weight that is written, and every weight of the network is written."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lora.base_weights import BaseWeights
from lora.config import AdapterError
from lora.installed import holders
from lora.layer import AdaptedLayer, Holder, ModulesToSave, Part
from lora.peft_names import Entry, base_name
from lora.peft_read import FileContents
from lora.vocabulary import same_change
from model.words import join_names

TIED_ENDS = ("body.embedding", "head")


class Coverage:
    """Tracks the tensors of an adapter's file that are used in written weights, and the weights that are still to be
    written."""

    def __init__(self, base: BaseWeights, contents: FileContents, places: Mapping[str, Entry]):
        self.file = contents.file
        self.of_parameter: dict[int, list[str]] = {}  # id → stored names of its tensor and repetitions
        for key, stored_name in (*contents.keys.items(), *contents.repeats):
            self.of_parameter.setdefault(id(places[key].parameter), []).append(stored_name)
        self.of_weight: dict[str, list[str]] = {}  # weight → stored names of its copies
        for copy in contents.base_copies:
            stored_parts = contents.quantized_parts.get(copy.stored_name, {}).values()
            self.of_weight.setdefault(copy.weight, []).extend((copy.stored_name, *stored_parts))
        self.used: dict[str, list[int]] = {}  # weight → ids of the parameters in its value
        self.module_of: dict[str, str] = {}  # stored name → the module whose weight uses it
        self.unwritten = set(base.shapes)

    def uses(self, weight: str, parameters: Iterable[Tensor]) -> None:
        """Note the adapter's parameters in the value of a weight."""
        self.used[weight] = [id(parameter) for parameter in parameters]

    def mark_written(self, weight: str) -> None:
        """Note that a weight is in a file. Error: a tensor of the adapter is used in two modules."""
        module = weight.rpartition(".")[0]
        tensors = [name for each in self.used.get(weight, ()) for name in self.of_parameter.get(each, ())]
        for name in (*tensors, *self.of_weight.get(weight, ())):
            if self.module_of.setdefault(name, module) != module:
                raise AdapterError(f"{self.file.path}: {name!r} would change both {self.module_of[name]} and {module}")
        self.unwritten.discard(weight)

    def close(self) -> None:
        """Raise AdapterError if a tensor was not used or a weight not written."""
        if lost := sorted(set(self.file.names) - set(self.module_of)):
            raise AdapterError(f"{self.file.path}: not used in any weight: {join_names(lost)}")
        if self.unwritten:
            raise AdapterError(f"not written: {join_names(sorted(self.unwritten))}")


class MergedWeights:
    """Each weight of the base with the active adapters merged into it."""

    def __init__(self, base: BaseWeights, contents: FileContents, places: Mapping[str, Entry]):
        self.base, network = base, base.network
        active = {path: holder for path, holder in holders(network).items() if holder.active}
        self.holders: dict[str, Holder] = {base_name(path): holder for path, holder in active.items()}
        for path, holder in self.holders.items():
            if not isinstance(holder, AdaptedLayer | ModulesToSave):
                raise AdapterError("a prompt or prefix does not change weights: it cannot be merged")
            for part in holder.parts.values():
                if isinstance(part, Part) and type(part).merge_into is Part.merge_into:
                    raise AdapterError(f"{path}: a {type(part).__name__.lower()} does not change weights: it cannot be merged")
        self.filled = {id(places[key].parameter) for key in contents.keys}
        own = {base_name(path): value for path, value in network.named_parameters() if ".parts." not in path}
        self.trained = {name: value for name, value in own.items() if not value.is_meta}  # biases that are trained in place
        self.cache: dict[tuple[str, str], Tensor] = {}  # the other half of the layer that was merged last
        self.coverage = Coverage(base, contents, places)
        self.ends_equal = self.has_equal_ends()

    # ---- a matrix in two places

    def has_equal_ends(self) -> bool:
        """True if head and embedding are one matrix and have the same change."""
        if not self.base.tied or not all(self.is_changed(f"{end}.weight") for end in TIED_ENDS):
            return False
        return same_change(*(next(iter(self.holders[end].parts.values())) for end in TIED_ENDS))

    def changed_end(self) -> str | None:
        """Return which of embedding and head the adapter changes differently from the other; None if the matrix can stay
        tied."""
        if not self.base.tied or self.ends_equal:
            return None
        return next((end for end in TIED_ENDS if self.is_changed(f"{end}.weight")), None)

    # ---- weights

    def is_changed(self, ours: str | None) -> bool:
        return ours is not None and (ours in self.trained or self.holder(ours) is not None)

    def holder(self, ours: str) -> tuple[str, str] | None:
        """Return (path of the adapted module, the weight's name inside it); None if no adapter changes the weight. The file of
        a module trained in full may hold some weights only."""
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
        """Return a weight in our layout, in the format of the computation."""
        found = self.holder(ours)
        if found is None and ours in self.trained:
            self.coverage.uses(ours, [self.trained[ours]])
            return self.trained[ours].data
        if found is None:
            return self.base.current(ours)
        path, leaf = found
        holder = self.holders[path]
        if isinstance(holder, ModulesToSave):
            self.coverage.uses(ours, [holder.active_module.get_parameter(leaf)])
            return holder.active_module.get_parameter(leaf).data
        other = "bias" if leaf == "weight" else "weight"
        if (path, leaf) not in self.cache:
            self.cache.clear()  # first, to free memory: it is as large as the weight to compute
            weight, bias = self.merged_layer(path, holder)
            both = {"weight": weight, "bias": bias}
            if both[other] is not None:  # a layer's weight and bias are mostly adjacent in the file
                self.cache[path, other] = both[other]
            return both[leaf]
        return self.cache.pop((path, leaf))

    def merged_layer(self, path: str, layer: AdaptedLayer) -> tuple[Tensor, Tensor | None]:
        """Merge the parts of one layer into its weight and bias, which are read from the base's folder for that moment."""
        weight_name, bias_name = f"{path}.weight", f"{path}.bias"
        own = layer.base.weight, getattr(layer.base, "bias", None)
        weight, bias, used = self.base.current(weight_name), None, []
        if own[1] is not None:
            bias = self.trained[bias_name].data if bias_name in self.trained else self.base.current(bias_name)
        layer.base.weight = nn.Parameter(weight, requires_grad=False)  # DoRA reads the layer's own
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
        self.coverage.uses(weight_name, used)
        if bias is not None:
            self.coverage.uses(bias_name, [*used, *([self.trained[bias_name]] if bias_name in self.trained else [])])
        return weight, bias

    def mark_written(self, weights: Iterable[str], *, untied: bool) -> None:
        """Note that these weights are in a file; a matrix that stays tied counts for both ends."""
        for ours in weights:
            self.coverage.mark_written(ours)
            if self.base.tied and not untied and ours == "body.embedding.weight":
                if self.ends_equal:
                    head = self.holders["head"]
                    part = next(iter(head.parts.values()))
                    self.coverage.uses("head.weight", [part.weight] if isinstance(head, ModulesToSave) else part.parameters())
                self.coverage.mark_written("head.weight")
