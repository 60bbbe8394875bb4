"""A base's folder, opened to be read a weight at a time."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora.config import AdapterError
from model.config import ModelConfig
from model.hub import quantized_weights
from model.init import empty
from model.rope import interleaved_to_halves
from model.safetensors_file import WeightFile
from model.weights import Weight, published_names, published_shape, weight_table
from quant.config import FourBit, Int8


class Base:
    """The base's open files and its network on the meta device."""

    def __init__(self, folder: Path, files: list[WeightFile], config: ModelConfig, asked: FourBit | Int8 | None):
        self.folder, self.files, self.config = folder, files, config
        self.table, names = weight_table(config), published_names(config)
        wide = any(file.dtype(name) == torch.float64 for file in files for name in file.names)
        self.dtype = torch.float64 if wide else torch.float32
        self.network = empty(config, device="meta", dtype=self.dtype)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.network.named_parameters()}
        self.small = quantized_weights(folder, files, empty(config, device="meta"), asked)  # before adapters are put on
        self.tensors: list[tuple[WeightFile, str, str | None]] = []  # file, name there, our name
        self.sources: dict[str, tuple[WeightFile, str]] = {}
        for file in files:
            for published in file.names:
                if self.small and published in self.small.others:
                    continue
                spelled = names.canonical(published)
                original = spelled if spelled in names.rows else names.aliases.get(spelled)
                ours = names.rows.get(original)
                self.tensors.append((file, published, ours))
                if ours is not None:
                    self.sources.setdefault(ours, (file, published))
        for one, other in (("head.weight", "body.embedding.weight"), ("body.embedding.weight", "head.weight")):
            if config.tie_embeddings and one in self.table and one not in self.sources and other in self.sources:
                self.sources[one] = self.sources[other]

    def packed(self, ours: str | None, published: str) -> bool:
        """Whether the adapter was trained on this weight quantized."""
        return self.small is not None and ours is not None and self.small.takes(ours, published)

    def format(self, file: WeightFile, published: str) -> torch.dtype:
        stored = self.small is not None and published in self.small.stored
        return self.small.format(published) if stored else file.dtype(published)

    def shape(self, file: WeightFile, published: str, ours: str | None) -> tuple[int, ...]:
        if not self.packed(ours, published):
            return file.shape(published)
        return published_shape(self.table[ours], self.shapes[ours])

    def read(self, ours: str) -> Tensor:
        """A weight in our layout, in the format that is computed in."""
        if ours not in self.sources:
            raise AdapterError(f"{self.folder} lacks {self.table[ours].published}")
        (file, published), row = self.sources[ours], self.table[ours]
        if self.packed(ours, published):
            value = self.small.layer(ours, published, partial(self.stored, file, published, row)).dequantize(self.dtype)
            return interleaved_to_halves(value, self.config.head_width) if row.layout == "interleaved" else value
        value = torch.empty(file.shape(published), dtype=self.dtype)
        file.read(published, value)
        if row.layout == "interleaved":
            return interleaved_to_halves(value, self.config.head_width)
        if row.layout == "transposed":
            return value.T
        return value.reshape(-1) if row.layout == "row" else value

    def stored(self, file: WeightFile, published: str, row: Weight) -> Tensor:
        """A matrix that is to be quantized: O × I in its own format, rows in the file's order."""
        value = torch.empty(file.shape(published), dtype=file.dtype(published))
        file.read(published, value)
        return value.T if row.layout == "transposed" else value
