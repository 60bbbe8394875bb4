"""Export a checkpoint, sharded or not, as one ordinary model folder; sharded weights are joined one at a time."""

import shutil
from pathlib import Path

import torch

import model.hub
from data.shell import command
from data.tokenizer.open import load_tokenizer
from model.config_json import base_of_adapter
from model.finite import non_finite, non_finite_message, refuse_non_finite
from model.folders import copy_auxiliary_files, make_folder
from model.generation_config import read_generation_config
from model.init import empty_network
from train.runs.checkpoint import MANIFEST, SHARDED_INDEX, TENSOR_FILES
from train.runs.errors import CheckpointError
from train.runs.open import checkpoint_of
from train.runs.sharded import ShardedTensors


@torch.no_grad()
def export(path: Path, out: Path) -> Path:
    """Write the network and the tokenizer of a run's best checkpoint (else its last), or of a checkpoint, to `out`.

    A run with averaged weights exports the averages. `out` must be empty or absent.
    """
    folder = checkpoint_of(path)
    if (folder / "adapter_config.json").is_file():
        merge = command("lora", "merge", base_of_adapter(folder), folder, "--out", out)
        raise CheckpointError(f"{folder} holds an adapter: {merge}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"--out {out} is there already, and is not an empty folder")
    if not (folder / SHARDED_INDEX).is_file():
        refuse_non_finite(folder)
        make_folder(out)
        for file in folder.iterdir():
            if file.is_file() and file.name not in {*TENSOR_FILES.values(), MANIFEST, "state.json"}:
                shutil.copyfile(file, out / file.name)
        copy_auxiliary_files(folder, out)
        return out
    stored = ShardedTensors(folder)
    kind = "averages" if any(name.startswith("averages.") for name in stored) else "weights"
    names = [name for name in stored if name.startswith("weights.")]
    network = empty_network(model.hub.read_config(folder), dtype=stored[names[-1]].dtype)
    network.generation = read_generation_config(folder, network.config).raw
    for name, parameter in network.named_parameters():
        there = f"{kind}.{name}" if f"{kind}.{name}" in stored.entries else f"weights.{name}"
        parameter.copy_(stored[there])
        if broken := non_finite(parameter):
            raise CheckpointError(non_finite_message(folder, there, broken))
    make_folder(out)
    model.hub.save(network, out)
    load_tokenizer(folder, network.config.vocab_size).save(out)
    copy_auxiliary_files(folder, out)
    return out
