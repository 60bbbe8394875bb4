"""Tied embeddings: config.json has a flag, and the weight files may contradict it.

As in transformers 5: a head that the files lack is the embedding where the flag says so (in T5 always), and two different
matrices are untied, whatever the flag says.
"""

import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from model.config import ModelConfig, load_family
from model.folders import INDEX, SINGLE, weight_files
from model.heads import TIED_HEADS
from model.safetensors_file import WeightFile
from model.weights import head_spec, published_names


def resolve_tied_embeddings(config: ModelConfig, folder: Path) -> ModelConfig:
    """Return a folder's config with `tie_embeddings` as its weight files have it, if there are any."""
    may_tie = getattr(load_family(config.family), "FILE_TIES", False)
    if config.head not in TIED_HEADS or not (config.tie_embeddings or may_tie):
        return config
    if not ((folder / SINGLE).is_file() or (folder / INDEX).is_file()):
        return config
    tied = config if config.tie_embeddings else replace(config, tie_embeddings=True)
    head = next(row[1] for row in head_spec(config).weights if row[0] == "head.weight")
    with ExitStack() as opened:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `load` warns about files
            files = [opened.enter_context(WeightFile(path)) for path in weight_files(folder)]
        names = published_names(tied)
        stored = {names.canonical(name): (file, name) for file in files for name in file.names}
        embedding = next(row[1] for row in load_family(config.family).weights(tied) if row[0] == "body.embedding.weight")
        if head not in stored or embedding not in stored:
            return tied
        if not config.tie_embeddings or are_equal(*stored[head], *stored[embedding]):
            return config
    untied = replace(config, tie_embeddings=False)
    try:
        load_family(config.family).write_config(untied)
    except ValueError:  # a family that cannot have two: `load` refuses the folder
        return config
    if not may_tie:  # T5's flag means nothing
        note = "config.json says that head and embedding are one matrix, and the files hold two that differ: both are read"
        warnings.warn(f"{folder}: {note}", stacklevel=3)
    return untied


def are_equal(file: WeightFile, name: str, other_file: WeightFile, other: str) -> bool:
    """Return True where two tensors in files are equal. A quantized one never equals one that is not."""
    if file.shape(name) != other_file.shape(other) or not file.dtype(name).is_floating_point:
        return False
    value = torch.empty(file.shape(name), dtype=file.dtype(name))
    file.read(name, value)
    return other_file.dtype(other).is_floating_point and other_file.equals(other, value)
