"""Which head an adapter is of. A classifier's adapter holds its head whole, and its base may be a language model's folder,
which does not: what reads the two together needs the classifier's network."""

from contextlib import ExitStack
from pathlib import Path

from torch import nn

from lora.base import read_base
from lora.config import AdapterError
from lora.peft_config import TASKS
from lora.peft_load import read_json, tensor_file
from lora.peft_names import PREFIX, PREFIX_BEFORE, entries
from lora.peft_read import Read
from model.config import ModelConfig
from model.folders import weight_files
from model.heads import CLASSIFIERS, HEADS
from model.hub import read_config
from model.init import empty_network
from model.safetensors_file import WeightFile
from model.weights import published_names, published_shape, weight_table


def config_with_head(
    base: Path, folder: Path, head: str | None = None, labels: int | None = None
) -> tuple[ModelConfig, str | None]:
    """The base's config, with the head that is asked for; else with that of our note; else with that of PEFT's task, as many
    classes as its matrix has rows. And what is to be said, where the settings alone have told."""
    own = read_config(base, any_head=True)
    if head is not None and head not in HEADS:
        raise AdapterError(f"unknown head {head!r}; heads: {', '.join(HEADS)}")
    note, given = read_base(folder), read_json(folder)
    if note is not None and head is None:
        refuse_labels(labels, note["head"], folder)
        names = note["names"] if labels in (None, note["labels"]) else {}
        return own.replace(head=note["head"], labels=labels or note["labels"], extra={**own.extra, **names}), None
    task = {task: ours for ours, task in TASKS.items() if ours != "none"}.get(given.get("task_type"))
    wanted = head or task or own.head
    if wanted == "unknown":
        read_config(base)  # says which architecture it is
    refuse_labels(labels, wanted, folder)
    if labels is None and wanted in CLASSIFIERS:
        labels = rows_of_head(folder, own.replace(head=wanted))
        if labels is None and wanted != own.head:
            raise AdapterError(f"{folder} does not say how many classes its head {wanted!r} has: --labels N (labels=…)")
    config = own.replace(head=wanted, labels=labels or own.labels)
    if head is not None or (config.head, config.labels) == (own.head, own.labels):
        return config, None
    asked = f"--head {config.head}" + (f" --labels {config.labels}" if config.head in CLASSIFIERS else "")
    return config, f"{folder} has the task {given['task_type']}, {base} the head {own.head!r}: read as with {asked}"


def refuse_labels(labels: int | None, head: str, folder: Path) -> None:
    if labels is not None and head not in CLASSIFIERS:
        raise AdapterError(f"--labels {labels} (labels=…): {folder} is of the head {head!r}, which has no classes")


def rows_of_head(folder: Path, config: ModelConfig) -> int | None:
    """How many classes the adapter's own head has; None: it holds no such head."""
    out = weight_table(config)["head.out.weight"].published
    with WeightFile(tensor_file(folder)) as file:
        found = [file.shape(name) for name in (PREFIX + out, PREFIX_BEFORE + out) if name in file.names]
    return found[0][0] if found and found[0] else None


def lacking(base: Path, config: ModelConfig) -> list[str]:
    """Our names of the head's weights that the base's folder does not hold in this shape."""
    names, table = published_names(config), weight_table(config)
    with ExitStack() as opened:
        files = [opened.enter_context(WeightFile(path)) for path in weight_files(base)]
        stored = {names.rows.get(names.canonical(each)): file.shape(each) for file in files for each in file.names}
    own = {name: tuple(value.shape) for name, value in empty_network(config, device="meta").named_parameters()}
    head = {name: published_shape(table[name], shape) for name, shape in own.items() if name.startswith("head.")}
    return [name for name, shape in head.items() if stored.get(name) != shape]


def refuse_random_head(missing: list[str], network: nn.Module, name: str, read: Read, base: Path) -> None:
    """An error if weights of the head are in neither: what they say would be chance."""
    places = entries(network, name)
    trained = {places[key].row.name for key in read.keys if places[key].whole}
    table = weight_table(network.config)
    if lost := [table[weight].published for weight in missing if weight not in trained]:
        raise AdapterError(f"neither {base} nor {read.file.path} holds {', '.join(lost)}, of the head {network.config.head!r}")
