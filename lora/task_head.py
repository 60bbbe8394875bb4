"""Finds the head that an adapter was trained with. A classifier's adapter contains its head, while its base may be a language
model's folder without one: reading the two together needs the classifier's network."""

from contextlib import ExitStack
from pathlib import Path

from torch import nn

from lora.base import read_base
from lora.config import AdapterError
from lora.peft_config import TASKS
from lora.peft_load import read_json, tensor_file
from lora.peft_names import PREFIX, PREFIX_WITHOUT_TUNER, entries
from lora.peft_read import FileContents
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
    """Return the base's config with the adapter's head, and a message if only PEFT's task says which head that is.

    The head is the one that is asked for; else that of `base.json`; else that of PEFT's task, with as many classes as the
    stored matrix has rows. Errors (AdapterError): an unknown head; labels for a head without classes; an unknown number of
    classes.
    """
    own = read_config(base, any_head=True)
    if head is not None and head not in HEADS:
        raise AdapterError(f"unknown head {head!r}; heads: {', '.join(HEADS)}")
    note, peft_config = read_base(folder), read_json(folder)
    if note is not None and note["pool"] is not None:
        own = own.replace(pool=note["pool"])
    if note is not None and head is None:
        refuse_labels(labels, note["head"], folder)
        names = note["names"] if labels in (None, note["labels"]) else {}
        return own.replace(head=note["head"], labels=labels or note["labels"], extra={**own.extra, **names}), None
    task = {task: ours for ours, task in TASKS.items() if ours != "none"}.get(peft_config.get("task_type"))
    wanted = head or task or own.head
    if wanted == "unknown":
        read_config(base)  # raises: it names the architecture
    refuse_labels(labels, wanted, folder)
    if labels is None and wanted in CLASSIFIERS:
        labels = rows_of_head(folder, own.replace(head=wanted))
        if labels is None and wanted != own.head:
            raise AdapterError(f"{folder} does not say how many classes its head {wanted!r} has: --labels N (labels=…)")
    config = own.replace(head=wanted, labels=labels or own.labels)
    if head is not None or (config.head, config.labels) == (own.head, own.labels):
        return config, None
    asked = f"--head {config.head}" + (f" --labels {config.labels}" if config.head in CLASSIFIERS else "")
    return config, f"{folder} has the task {peft_config['task_type']}, {base} the head {own.head!r}: read as with {asked}"


def refuse_labels(labels: int | None, head: str, folder: Path) -> None:
    if labels is not None and head not in CLASSIFIERS:
        raise AdapterError(f"--labels {labels} (labels=…): {folder} is of the head {head!r}, which has no classes")


def rows_of_head(folder: Path, config: ModelConfig) -> int | None:
    """Return the number of classes of the adapter's stored head, None if it has no such head."""
    out = weight_table(config)["head.out.weight"].published
    with WeightFile(tensor_file(folder)) as file:
        found = [file.shape(name) for name in (PREFIX + out, PREFIX_WITHOUT_TUNER + out) if name in file.names]
    return found[0][0] if found and found[0] else None


def missing_head_weights(base: Path, config: ModelConfig) -> list[str]:
    """Return our names of the head's weights that the base's folder does not have in the config's shape."""
    names, table = published_names(config), weight_table(config)
    with ExitStack() as opened:
        files = [opened.enter_context(WeightFile(path)) for path in weight_files(base)]
        stored = {names.rows.get(names.canonical(each)): file.shape(each) for file in files for each in file.names}
    own = {name: tuple(value.shape) for name, value in empty_network(config, device="meta").named_parameters()}
    head = {name: published_shape(table[name], shape) for name, shape in own.items() if name.startswith("head.")}
    return [name for name, shape in head.items() if stored.get(name) != shape]


def refuse_random_head(missing: list[str], network: nn.Module, name: str, contents: FileContents, base: Path) -> None:
    """Raise AdapterError if weights of the head are in neither folder: they would be random."""
    places = entries(network, name)
    trained = {places[key].row.name for key in contents.keys if places[key].in_module_to_save}
    table = weight_table(network.config)
    if lost := [table[weight].published for weight in missing if weight not in trained]:
        head = network.config.head
        raise AdapterError(f"neither {base} nor {contents.file.path} holds {', '.join(lost)}, of the head {head!r}")
