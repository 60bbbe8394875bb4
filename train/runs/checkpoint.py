"""A run's state on disk. At every moment a checkpoint is whole or is not there.

A checkpoint is a folder of safetensors and JSON; nothing in it can run code:

    config.json, model.safetensors   the network in the Hugging Face layout (`model.hub`); where an adapter is trained,
    adapter_config.json, adapter_…   that instead, as PEFT writes it, and base.json: on which network (`lora.peft_io`)
    tokenizer.model                  the tokenizer; tokenizer.json and tokenizer_config.json say it to transformers
    optimizer.safetensors            every optimizer slot, by parameter name
    averages.safetensors, raw…       with --ema: the averages, and the weights they follow (model.safetensors has averages);
                                     of an adapter raw.safetensors is always there: all that is trained, as it is
    what lay beside --init's weights chat template, generation_config.json, label files … (`model.folders.copy_auxiliary_files`)
    state.json                       step, tokens, loss scale, best validation …
    manifest.json                    format version; size and SHA-256 of each file above

Where ranks hold weights in parts, `train.runs.sharded`'s files take the place of all those with tensors. Random states
are not kept: every draw is a function of the seed and the step.

It is written to a temporary folder, synced, then renamed; so a crash leaves the previous one untouched. Loading checks
every file against the manifest before anything is believed.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import tomli_w

from data.shell import command
from data.words import counted
from train.config import TrainConfig
from train.config_toml import to_plain, with_absolute_paths
from train.parallel.ranks import Ranks

FORMAT = 2
MANIFEST = "manifest.json"
STATE, STATE_FORMAT = "state.json", 2
IN_PARTS = "tensors.json"  # the index of train.runs.sharded
_NAME = re.compile(r"step-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint that is not what was written; the message names the file and what is wrong with it."""


def write_checkpoint(run: Path, step: int, write: Callable[[Path], None], ranks: Ranks | None = None) -> Path:
    """Call `write(folder)` on a temporary folder, seal it, and make it `run/checkpoints/step-N` in one rename.

    Every rank writes its share into the same folder; rank 0 makes it and seals it. An OSError (a full disk) on any of them
    removes the temporary folder and leaves the earlier checkpoints as they were.
    """
    ranks, parent = ranks or Ranks(), run / "checkpoints"
    target, making = parent / f"step-{step}", parent / f".making-step-{step}"
    try:
        with ranks.together():
            if ranks.main:
                parent.mkdir(parents=True, exist_ok=True)
                for left in parent.glob(".*-step-*"):  # by a kill, at this step or at another
                    shutil.rmtree(left)
                making.mkdir()
        with ranks.together():
            write(making)
        with ranks.together():
            if ranks.main:
                seal(making, target)
    except BaseException:
        if ranks.main:
            shutil.rmtree(making, ignore_errors=True)
        raise
    return target


def seal(making: Path, target: Path) -> None:
    files = sorted(path for path in making.rglob("*") if path.is_file())
    folders = [path for path in making.rglob("*") if path.is_dir()]
    names = {path: path.relative_to(making).as_posix() for path in files}
    entries = {names[path]: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    manifest = json.dumps({"format": FORMAT, "files": entries}, indent=2)
    (making / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    for path in (*files, *folders, making / MANIFEST, making):
        sync(path)
    if target.exists():  # a broken one, which a resume passed over
        _remove(target)
    making.rename(target)
    sync(target.parent)


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and SHA-256."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], dict(manifest["files"])
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder / MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from None
    if version != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST} has format {version!r}; this version reads {FORMAT}")
    for name, (size, digest) in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{folder / MANIFEST} points outside its folder: {name!r}")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {counted(path.stat().st_size, 'byte')}, {size:,} were written")
        if _sha256(path) != digest:
            raise CheckpointError(f"{path} was changed after it was written (its SHA-256 is not that of {MANIFEST})")


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, latest first; what a kill left half-made is not among them."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name)[1])


def latest_whole(run: Path, say: Callable[[str], None]) -> Path | None:
    """The latest checkpoint that verifies; each broken one is named. None if there is no checkpoint at all."""
    folders = checkpoints(run)
    for folder in folders:
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            say(f"skipping checkpoint {folder.name}: {error}")
    if folders:
        raise CheckpointError(f"none of {counted(len(folders), 'checkpoint')} in {run / 'checkpoints'} is whole")
    return None


def point(run: Path, name: str, folder: Path, **values: object) -> None:
    """Write the pointer `best.json` or `last.json` in one rename."""
    entry = {"checkpoint": f"checkpoints/{folder.name}", "step": step_of(folder), **values}
    write_whole(run / f"{name}.json", json.dumps(entry) + "\n")


def pointed(run: Path, name: str) -> Path | None:
    """The checkpoint that a pointer names, if both are there."""
    path = run / f"{name}.json"
    if not path.is_file():
        return None
    try:
        checkpoint = str(json.loads(path.read_text(encoding="utf-8"))["checkpoint"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    folder = run / "checkpoints" / Path(checkpoint).name  # never outside the run
    return folder if folder.is_dir() else None


def repoint(run: Path, last: Path, best: dict | None) -> None:
    """Make the pointers say what the checkpoint `last` says, from which a resume goes on.

    A kill between a checkpoint and its pointers leaves them behind it; a broken checkpoint leaves them ahead.
    """
    point(run, "last", last)
    folder = run / "checkpoints" / f"step-{best['step']}" if best else None
    if folder is not None and folder.is_dir():
        point(run, "best", folder, **{key: value for key, value in best.items() if key != "step"})
    else:
        (run / "best.json").unlink(missing_ok=True)


def checkpoint_of(path: str | Path) -> Path:
    """What a command given RUN opens: a run's best checkpoint, then its last; or a checkpoint, model or adapter folder itself.

    A checkpoint is verified; a model folder of other origin has no manifest to verify it by.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path.absolute()} does not exist")
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        if (path / MANIFEST).exists():
            verify(path)
        return path
    for name in ("best", "last"):
        folder = pointed(path, name)
        if folder is not None:
            verify(folder)
            return folder
    raise CheckpointError(f"{path} is neither a run (no best.json, no last.json) nor a model folder (no config.json)")


def resolve(path: str | Path) -> Path:
    """The same, but for a checkpoint in parts, of which the network must be put together first."""
    folder = checkpoint_of(path)
    if (folder / IN_PARTS).is_file():
        raise CheckpointError(
            f"{folder} holds its weights in parts, as the ranks that wrote it did. Put them together first: "
            f"{command('model', 'export', path, '--out', 'FOLDER')}"
        )
    return folder


def prune(run: Path, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints and those that best.json and last.json name."""
    named = {pointed(run, "best"), pointed(run, "last")}
    for folder in checkpoints(run)[keep:]:
        if folder not in named:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Out of sight in one rename, then file by file: a kill leaves no half of a checkpoint."""
    old = folder.with_name(f".old-{folder.name}")
    folder.rename(old)
    shutil.rmtree(old)


def write_whole(path: Path, text: str) -> None:
    """A small file in one rename: a crash or a full disk leaves what stood there before."""
    making = path.with_name(f".{path.name}")
    try:
        making.write_text(text, encoding="utf-8")
        sync(making)
        making.rename(path)
    except BaseException:
        making.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_settings(folder: Path, config: TrainConfig, begun: str) -> None:
    """config.toml, below a comment that says where the run began."""
    settings = tomli_w.dumps(to_plain(with_absolute_paths(config)))
    write_whole(folder / "config.toml", f"# {begun}\n\n{settings}")


def sync(path: Path) -> None:
    """Ask the disk to hold what was written: a file's bytes, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(folder: Path) -> dict:
    """state.json as it is written today, from what older runs wrote: format 1 had no number and no source."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state.get("format", 1) > STATE_FORMAT:
        raise ValueError(f"{STATE} has format {state['format']}, and this reads up to {STATE_FORMAT}")
    return {"source": {}} | state
