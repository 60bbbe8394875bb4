"""Adapters with a vocabulary that was resized before training: PEFT saves the resized embedding and head with the adapter, and
they replace the base's."""

import torch
from torch import Tensor, nn

from lora.config import AdapterError
from lora.lora import EmbeddingLora, Lora
from lora.peft_names import base_name, bias_key, module_of
from lora.peft_read import VOCABULARY, BaseCopy, FileContents
from model.heads import TIED_HEADS
from model.safetensors_file import WeightFile
from model.weights import weight_table


def vocabulary_size(network: nn.Module, contents: FileContents) -> int:
    """Return the vocabulary size of an adapter's tensors, the network's if none of them has a vocabulary axis. Error: two
    sizes."""
    table, found = weight_table(network.config), {}

    def note_size(stored_name: str | None, axes: int, axis: int) -> None:
        if stored_name is None or stored_name in contents.quantized_parts:
            return
        if len(shape := contents.file.shape(stored_name)) == axes:
            found.setdefault(shape[axis], stored_name)

    for weight, axis in VOCABULARY.items():
        if weight in table:
            row, key = table[weight], contents.prefix + table[weight].published
            stored = [contents.keys.get(key), *(copy.stored_name for copy in contents.base_copies if copy.weight == weight)]
            for each in (*stored, *(repeat for repeated, repeat in contents.repeats if repeated == key)):
                note_size(each, 2 if weight.endswith("weight") or row.layout == "row" else 1, axis)
            if weight.endswith("weight"):
                module = f"{contents.prefix}{module_of(row)}"
                note_size(contents.keys.get(f"{module}.lora_embedding_A"), 2, 1)
                note_size(contents.keys.get(f"{module}.lora_B.weight") if weight == "head.weight" else None, 2, 0)
    if len(found) > 1:
        sizes = " and ".join(f"{size} ({stored_name})" for size, stored_name in found.items())
        raise AdapterError(f"{contents.file.path} has tensors for vocabularies of two sizes: {sizes}")
    return next(iter(found), network.config.vocab_size)


def is_tied(network: nn.Module) -> bool:
    """True if the head's matrix is the embedding's."""
    config = network.config
    return config.tie_embeddings and config.head in TIED_HEADS and getattr(network.head, "packed", None) is None


def refuse_unknown_rows(network: nn.Module, contents: FileContents, base_size: int) -> None:
    """Raise AdapterError unless the file holds every matrix of the resized vocabulary: the base's have other rows. A bias that
    the network holds as a constant (BART's) is 0 for new tokens."""
    table, own = weight_table(network.config), {copy.weight for copy in contents.base_copies}
    names = [name for name in VOCABULARY if name in table]
    keys = {name: (contents.prefix + table[name].published, bias_key(network.config, name)) for name in names}
    given = own | {name for name, spelled in keys.items() if any(key in contents.keys for key in spelled)}
    for path, parameter in network.named_parameters():
        name = base_name(path)
        if name not in VOCABULARY or not parameter.requires_grad:
            continue
        ends = {"body.embedding.weight", "head.weight"} if name == "body.embedding.weight" and is_tied(network) else {name}
        if not (ends <= given or ends & own):
            missing = ", ".join(table[each].published for each in sorted(ends - given))
            raise AdapterError(
                f"{contents.file.path} is for a vocabulary of {network.config.vocab_size} tokens, its base has {base_size}, "
                f"and no {missing} of that size is there: save it with the adapter (PEFT's save_pretrained(folder, "
                "save_embedding_layers=True))"
            )


def same_change(embedding: nn.Module, head: nn.Module) -> bool:
    """True if the parts at the two ends of a tied matrix are the same change: equal copies, or equal factors in the other order
    (an embedding's change is (B A)ᵀ)."""
    if isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear):
        return torch.equal(embedding.weight, head.weight)
    if type(embedding) is not EmbeddingLora or not isinstance(head, Lora) or embedding.scale != head.scale:
        return False
    return torch.equal(head.A, embedding.B.T) and torch.equal(head.B, embedding.A.T)


def resized_weights(network: nn.Module, contents: FileContents) -> dict[str, BaseCopy]:
    """Return our name → the tensor that replaces the base's weight, for a resized vocabulary. Error: two values for a tied
    matrix."""
    found: dict[str, BaseCopy] = {}
    for copy in contents.base_copies:
        if copy.weight in VOCABULARY:
            name = "body.embedding.weight" if copy.weight == "head.weight" and is_tied(network) else copy.weight
            if name in found and not equal_tensors(contents, found[name].stored_name, copy.stored_name):
                names = f"{copy.stored_name!r} and {found[name].stored_name!r}"
                raise AdapterError(f"{contents.file.path}: {names} differ, but are one matrix")
            found.setdefault(name, copy)
    return found


def equal_tensors(contents: FileContents, one: str, other: str) -> bool:
    return contents.file.equals(other, read_tensor(contents.file, one))


def read_tensor(file: WeightFile, stored_name: str) -> Tensor:
    value = torch.empty(file.shape(stored_name), dtype=file.dtype(stored_name))
    file.read(stored_name, value)
    return value


def shared_rows(value: Tensor, size: int) -> Tensor:
    """Return the rows of the first `size` tokens. A published bias may have a single row."""
    return value[:size] if value.dim() != 2 or len(value) != 1 else value[:, :size]
