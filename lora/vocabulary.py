"""A vocabulary that was resized before training. PEFT saves the larger (or smaller) embedding and head along with the adapter:
they stand in the place of the base's own."""

import torch
from torch import Tensor, nn

from lora.config import AdapterError
from lora.lora import EmbeddingLora, Lora
from lora.peft_names import bias_key, module_of, plain
from lora.peft_read import VOCABULARY, Copy, Read
from model.heads import TIED_HEADS
from model.safetensors_file import WeightFile
from model.weights import weight_table


def vocabulary_of(network: nn.Module, read: Read) -> int:
    """How many tokens the tensors of an adapter's file are for: the network's own number, where none of them tells. Error: two
    numbers."""
    table, found = weight_table(network.config), {}

    def see(there: str | None, axes: int, axis: int) -> None:
        if there is not None and there not in read.parts and len(shape := read.file.shape(there)) == axes:
            found.setdefault(shape[axis], there)

    for weight, axis in VOCABULARY.items():
        if weight in table:
            row, key = table[weight], read.own + table[weight].published
            there = [read.keys.get(key), *(copy.there for copy in read.base if copy.weight == weight)]
            for each in (*there, *(again for of, again in read.again if of == key)):
                see(each, 2 if weight.endswith("weight") or row.layout == "row" else 1, axis)
            if weight.endswith("weight"):
                module = f"{read.own}{module_of(row)}"
                see(read.keys.get(f"{module}.lora_embedding_A"), 2, 1)
                see(read.keys.get(f"{module}.lora_B.weight") if weight == "head.weight" else None, 2, 0)
    if len(found) > 1:
        said = " and ".join(f"{size} ({there})" for size, there in found.items())
        raise AdapterError(f"{read.file.path} has tensors for vocabularies of two sizes: {said}")
    return next(iter(found), network.config.vocab_size)


def is_tied(network: nn.Module) -> bool:
    """Whether the head's matrix is the embedding's."""
    config = network.config
    return config.tie_embeddings and config.head in TIED_HEADS and getattr(network.head, "packed", None) is None


def refuse_unknown_rows(network: nn.Module, read: Read, base_size: int) -> None:
    """An error unless the file holds every matrix of the resized vocabulary: those of the base have other rows. A bias that the
    network holds as a constant (BART's) is 0 for new tokens."""
    table, own = weight_table(network.config), {copy.weight for copy in read.base}
    keys = {name: (read.own + table[name].published, bias_key(network.config, name)) for name in VOCABULARY if name in table}
    given = own | {name for name, spelled in keys.items() if any(key in read.keys for key in spelled)}
    for path, parameter in network.named_parameters():
        name = plain(path)
        if name not in VOCABULARY or not parameter.requires_grad:
            continue
        ends = {"body.embedding.weight", "head.weight"} if name == "body.embedding.weight" and is_tied(network) else {name}
        if not (ends <= given or ends & own):
            lacking = ", ".join(table[each].published for each in sorted(ends - given))
            raise AdapterError(
                f"{read.file.path} is for a vocabulary of {network.config.vocab_size} tokens, its base has {base_size}, and no "
                f"{lacking} of that size is there: save it with the adapter (PEFT's save_pretrained(folder, "
                "save_embedding_layers=True))"
            )


def same_change(embedding: nn.Module, head: nn.Module) -> bool:
    """Whether what was learned at the two ends of a tied matrix is the same matrix: two copies, or B A and its factors in the
    other order (an embedding's delta is (B A)ᵀ)."""
    if isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear):
        return torch.equal(embedding.weight, head.weight)
    if type(embedding) is not EmbeddingLora or not isinstance(head, Lora) or embedding.scale != head.scale:
        return False
    return torch.equal(head.A, embedding.B.T) and torch.equal(head.B, embedding.A.T)


def resized_weights(network: nn.Module, read: Read) -> dict[str, Copy]:
    """Our name of a weight -> what stands in the place of the base's, of a resized vocabulary. Error: a tied matrix twice, with
    other values."""
    found: dict[str, Copy] = {}
    for copy in read.base:
        if copy.weight in VOCABULARY:
            name = "body.embedding.weight" if copy.weight == "head.weight" and is_tied(network) else copy.weight
            if name in found and not same(read, found[name].there, copy.there):
                raise AdapterError(f"{read.file.path}: {copy.there!r} and {found[name].there!r} differ, and are one matrix")
            found.setdefault(name, copy)
    return found


def same(read: Read, one: str, other: str) -> bool:
    return read.file.equals(other, tensor(read.file, one))


def tensor(file: WeightFile, there: str) -> Tensor:
    value = torch.empty(file.shape(there), dtype=file.dtype(there))
    file.read(there, value)
    return value


def first_rows(value: Tensor, size: int) -> Tensor:
    """Of the tokens that two vocabularies have in common. A published bias may have one row."""
    return value[:size] if value.dim() != 2 or len(value) != 1 else value[:, :size]
