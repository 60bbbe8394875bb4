"""Reads the weights of a base's folder one at a time."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora.config import AdapterError
from lora.peft_read import VOCABULARY, BaseCopy
from lora.vocabulary import read_tensor
from model.config import ModelConfig
from model.finite import non_finite, non_finite_message
from model.folders import HubError
from model.hub import quantized_weights
from model.init import empty_network
from model.matching import match_weights
from model.rope import interleaved_to_halves
from model.safetensors_file import WeightFile
from model.weights import Weight, published_names, published_shape, weight_table
from quant.config import FourBit, Int8, QuantError
from quant.layer import QuantizedLinear


class BaseWeights:
    """The open files of a base, and its network on the meta device.

    As in `model.hub.load`, every weight must be present with its shape, and nothing else (HubError). new_head: the config's
    head is not the folder's; its weights may be absent, and are then in `missing`.
    """

    def __init__(
        self, folder: Path, files: list[WeightFile], config: ModelConfig, asked: FourBit | Int8 | None, *, new_head: bool
    ):
        self.folder, self.files, self.config, self.new_head = folder, files, config, new_head
        self.table, self.names = weight_table(config), published_names(config)
        wide = any(file.dtype(name) == torch.float64 for file in files for name in file.names)
        self.dtype = torch.float64 if wide else torch.float32
        own, by_path = empty_network(config, device="meta"), {file.path: file for file in files}
        self.quantized_files = quantized_weights(folder, files, own, asked)
        found = match_weights(folder, by_path, own, self.quantized_files, is_new_head=new_head)
        stored = self.quantized_files.stored if self.quantized_files else ()
        # tensors of other heads; a quantized one cannot be copied unchanged
        self.left_out = [name for name in found.other_heads if new_head or name in stored]
        self.missing = found.missing
        self.sources = {name: (by_path[path], published) for name, (path, published) in found.sources.items()}
        self.tied = "head.weight" in self.table and "head.weight" not in dict(own.named_parameters())
        if self.tied:
            self.sources["head.weight"] = self.sources["body.embedding.weight"]
        elif config.tie_embeddings and "head.weight" in self.table:  # a quantized head is no copy of the embedding
            self.config = config.replace(tie_embeddings=False)
        self.replacements: dict[str, tuple[WeightFile, BaseCopy]] = {}
        self.build()
        for path, published, name in found.copies:
            if not by_path[path].equals(published, self.stored(*self.sources[name])):
                original = self.sources[name][1]
                raise HubError(f"{published!r} differs from {original!r}, though config.json says that the two are tied")

    def build(self) -> None:
        """Build the network of the current config."""
        self.network = empty_network(self.config, device="meta", dtype=self.dtype)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.network.named_parameters()}
        self.shapes |= {"head.weight": self.shapes["body.embedding.weight"]} if self.tied else {}

    def resize(self, size: int) -> None:
        """Treat the base as one of another vocabulary size: rows that it does not have are 0 until `replace_weights`."""
        own = self.config.vocab_size
        self.config = self.config.replace(vocab_size=size)
        self.build()
        self.network.resized_from = own

    def replace_weights(self, file: WeightFile, copies: dict[str, BaseCopy]) -> None:
        """Read these weights from the adapter's file instead: those of a resized vocabulary."""
        self.replacements = {name: (file, copy) for name, copy in copies.items()}
        if self.tied and "body.embedding.weight" in self.replacements:
            self.replacements["head.weight"] = self.replacements["body.embedding.weight"]

    def tensors(self) -> list[tuple[WeightFile, str, str | None]]:
        """Return (file, stored name, our name) of each tensor but the parts of quantized weights; None: no weight of this
        network."""
        found, parts = [], () if self.quantized_files is None else self.quantized_files.part_names
        for file in self.files:
            for published in file.names:
                if published not in self.left_out and published not in parts:
                    spelled = self.names.canonical(published)
                    original = spelled if spelled in self.names.rows else self.names.aliases.get(spelled)
                    found.append((file, published, self.names.rows.get(original)))
        return found

    def is_resized(self, ours: str | None) -> bool:
        return ours in VOCABULARY and hasattr(self.network, "resized_from")

    def is_quantized(self, ours: str | None) -> bool:
        """True if the adapter was trained on this weight quantized."""
        if self.quantized_files is None or ours not in self.sources:
            return False
        return self.quantized_files.is_quantized(ours, self.sources[ours][1])

    def format(self, file: WeightFile, published: str) -> torch.dtype:
        stored = self.quantized_files is not None and published in self.quantized_files.stored
        return self.quantized_files.format(published) if stored else file.dtype(published)

    def shape(self, file: WeightFile, published: str, ours: str | None) -> tuple[int, ...]:
        return published_shape(self.table[ours], self.shapes[ours]) if ours is not None else file.shape(published)

    def read(self, ours: str) -> Tensor:
        """Return a weight in our layout and the format of the computation; with a resized vocabulary, the base's rows."""
        if ours not in self.sources:
            raise AdapterError(f"{self.folder} lacks {self.table[ours].published}")
        (file, published), row = self.sources[ours], self.table[ours]
        if self.is_quantized(ours):
            value = self.quantized_layer(ours).dequantize(self.dtype)
            return interleaved_to_halves(value, self.config.head_width) if row.layout == "interleaved" else value
        value = torch.empty(file.shape(published), dtype=self.dtype)
        file.read(published, value)
        if broken := non_finite(value):
            raise HubError(non_finite_message(file.path, published, broken))
        return self.in_our_layout(value, row)

    def in_our_layout(self, value: Tensor, row: Weight) -> Tensor:
        if row.layout == "interleaved":
            return interleaved_to_halves(value, self.config.head_width)
        if row.layout == "transposed":
            return value.T
        return value.reshape(-1) if row.layout == "row" else value

    def current(self, ours: str) -> Tensor:
        """Return the weight for the adapter's vocabulary: its replacement, or the base's rows and 0 for new tokens."""
        if ours in self.replacements:
            file, copy = self.replacements[ours]
            return self.in_our_layout(read_tensor(file, copy.stored_name).to(self.dtype), self.table[ours])
        value = self.read(ours)
        if not self.is_resized(ours):
            return value
        rows = self.config.vocab_size
        return torch.cat((value, value.new_zeros(max(0, rows - len(value)), *value.shape[1:])))[:rows]

    def quantized(self, ours: str) -> QuantizedLinear | None:
        return self.quantized_layer(ours) if self.is_quantized(ours) else None

    def quantized_layer(self, ours: str) -> QuantizedLinear:
        file, published = self.sources[ours]
        try:
            return self.quantized_files.layer(ours, published, partial(self.linear, file, published, self.table[ours]))
        except QuantError as error:
            raise HubError(f"{self.folder}: {error}") from None

    def linear(self, file: WeightFile, published: str, row: Weight) -> Tensor:
        """Return a matrix to be quantized: O × I in its own format, rows in the file's order."""
        value = self.stored(file, published)
        return value.T if row.layout == "transposed" else value

    def stored(self, file: WeightFile, published: str) -> Tensor:
        return read_tensor(file, published)
