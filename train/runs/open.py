"""The checkpoint or model folder that a command is given, and the device for its network."""

from pathlib import Path

import torch

from data.shell import command
from train.runs.checkpoint import MANIFEST, SHARDED_INDEX, read_pointer, verify
from train.runs.errors import CheckpointError, TrainError


def checkpoint_of(path: str | Path) -> Path:
    """The folder that a command given RUN opens: a run's best checkpoint, then its last; or a checkpoint, model or adapter
    folder itself.

    A checkpoint is verified; a model folder of other origin has no manifest. Errors (CheckpointError): the path does not exist,
    is neither, or is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path.absolute()} does not exist")
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        if (path / MANIFEST).exists():
            verify(path)
        return path
    for name in ("best", "last"):
        folder = read_pointer(path, name)
        if folder is not None:
            verify(folder)
            return folder
    raise CheckpointError(f"{path} is neither a run (no best.json, no last.json) nor a model folder (no config.json)")


def resolve(path: str | Path) -> Path:
    """Return the folder to open for a path, as `checkpoint_of`. Errors (CheckpointError): also a sharded checkpoint, which
    must be exported as one model folder first."""
    folder = checkpoint_of(path)
    if (folder / SHARDED_INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds sharded weights, as the ranks wrote them. Export it as one model folder first: "
            f"{command('model', 'export', path, '--out', 'FOLDER')}"
        )
    return folder


def checked_device(name: str) -> torch.device:
    """The device of that name. Errors (TrainError): not a device, or this machine does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainError(f"--device {name}: not a device; cpu, cuda, cuda:1 … are") from None
    if device.type not in ("cpu", "cuda"):
        raise TrainError(f"--device {name}: cpu and cuda are supported")
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= found:
        raise TrainError(f"--device {name}: torch {torch.__version__} sees {found} {device.type} devices here")
    return device
