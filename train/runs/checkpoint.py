"""A run's state on disk. A checkpoint is complete or absent, at every moment.

A checkpoint is a folder of safetensors and JSON; nothing in it can run code:

    config.json, model.safetensors   the network in the Hugging Face layout (`model.hub`); of a run with an adapter instead
    adapter_config.json, adapter_…   the adapter as PEFT writes it, and base.json, which names its base (`lora.peft_io`)
    tokenizer.model                  the tokenizer; tokenizer.json and tokenizer_config.json hold it for transformers
    optimizer.safetensors            every optimizer slot, by parameter name
    averages.safetensors, raw…       with --ema: the averages, and the weights they follow (model.safetensors has averages);
                                     with an adapter raw.safetensors always exists: the trainable parameters
    files that lay beside --init     chat template, generation_config.json, label files … (`model.folders.copy_auxiliary_files`)
    state.json                       step, tokens, loss scale, best validation …
    manifest.json                    format version; size and SHA-256 of each file above

When ranks hold sharded weights, the files of `train.runs.sharded` replace all files with tensors. Random states are not
saved: every draw is a function of the seed and the step.

A checkpoint is written to a temporary folder, synced, then renamed, so that a crash leaves the previous one untouched. Loading
checks every file against the manifest first.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import tomli_w

from data.messages import format_count
from train.runs.errors import CheckpointError

FORMAT = 2
MANIFEST, SETTINGS = "manifest.json", "config.toml"
STATE, STATE_FORMAT = "state.json", 2
SHARDED_INDEX = "tensors.json"  # of a checkpoint with sharded weights, see train.runs.sharded
# The other files with tensors, beside those of `model.hub`. "averages" exists with --ema. "weights" exists where
# model.safetensors differs from the trained weights: with averages, integer weights (`train.qat`), or an adapter.
TENSOR_FILES = {"optimizer": "optimizer.safetensors", "averages": "averages.safetensors", "weights": "raw.safetensors"}
_NAME = re.compile(r"step-(\d+)")



def write_checkpoint(
    run: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    together: Callable[[], AbstractContextManager] = nullcontext,
    is_main: bool = True,
) -> Path:
    """Call `write(folder)` on a temporary folder, then commit it as `run/checkpoints/step-N` in one rename.

    Of several ranks each writes its shard into the same folder; the main one makes and commits it. `together()` is a block that
    all ranks enter and leave together, and that fails on all where it fails on one (`Ranks.together`). An OSError (a full disk)
    on any of them removes the temporary folder and leaves the earlier checkpoints unchanged.
    """
    parent = run / "checkpoints"
    target, temporary = parent / f"step-{step}", parent / f".making-step-{step}"
    try:
        with together():
            if is_main:
                parent.mkdir(parents=True, exist_ok=True)
                for abandoned in parent.glob(".*-step-*"):  # by a kill, at this step or at another
                    shutil.rmtree(abandoned)
                temporary.mkdir()
        with together():
            write(temporary)
        with together():
            if is_main:
                commit(temporary, target)
    except BaseException:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def commit(temporary: Path, target: Path) -> None:
    """Write the manifest, sync every file and folder to disk, and rename the folder to its final name."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    folders = [path for path in temporary.rglob("*") if path.is_dir()]
    names = {path: path.relative_to(temporary).as_posix() for path in files}
    entries = {names[path]: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    manifest = json.dumps({"format": FORMAT, "files": entries}, indent=2)
    (temporary / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    for path in (*files, *folders, temporary / MANIFEST, temporary):
        sync(path)
    if target.exists():  # a damaged one, which a resume skipped
        _remove(target)
    temporary.rename(target)
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
            raise CheckpointError(f"{path} has {format_count(path.stat().st_size, 'byte')}, {size:,} were written")
        if _sha256(path) != digest:
            raise CheckpointError(f"{path} was changed after it was written (its SHA-256 is not that of {MANIFEST})")


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, latest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name)[1])


def latest_verified(run: Path, info: Callable[[str], None]) -> Path | None:
    """The latest checkpoint that verifies; `info` is told of each damaged one. None if there is no checkpoint at all."""
    folders = checkpoints(run)
    for folder in folders:
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            info(f"skipping checkpoint {folder.name}: {error}")
    if folders:
        raise CheckpointError(f"none of {format_count(len(folders), 'checkpoint')} in {run / 'checkpoints'} is whole")
    return None


def write_pointer(run: Path, name: str, folder: Path, **values: object) -> None:
    """Write the pointer `best.json` or `last.json` in one rename."""
    entry = {"checkpoint": f"checkpoints/{folder.name}", "step": step_of(folder), **values}
    write_atomically(run / f"{name}.json", json.dumps(entry) + "\n")


def read_pointer(run: Path, name: str) -> Path | None:
    """The checkpoint that a pointer names; None unless both exist."""
    path = run / f"{name}.json"
    if not path.is_file():
        return None
    try:
        checkpoint = str(json.loads(path.read_text(encoding="utf-8"))["checkpoint"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    folder = run / "checkpoints" / Path(checkpoint).name  # never outside the run
    return folder if folder.is_dir() else None


def restore_pointers(run: Path, last: Path, best: dict | None) -> None:
    """Set both pointers to the state of the checkpoint `last`, from which a run resumes.

    A kill between a checkpoint and its pointers leaves them behind it; a damaged checkpoint leaves them ahead.
    """
    write_pointer(run, "last", last)
    folder = run / "checkpoints" / f"step-{best['step']}" if best else None
    if folder is not None and folder.is_dir():
        write_pointer(run, "best", folder, **{key: value for key, value in best.items() if key != "step"})
    else:
        (run / "best.json").unlink(missing_ok=True)


def prune(run: Path, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints and those that best.json and last.json name."""
    named = {read_pointer(run, "best"), read_pointer(run, "last")}
    for folder in checkpoints(run)[keep:]:
        if folder not in named:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Rename, then delete file by file: a kill leaves no half of a checkpoint under its name."""
    old = folder.with_name(f".old-{folder.name}")
    folder.rename(old)
    shutil.rmtree(old)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file in one rename: a crash or a full disk leaves the earlier file."""
    making = path.with_name(f".{path.name}")
    try:
        making.write_text(text, encoding="utf-8")
        sync(making)
        making.rename(path)
    except BaseException:
        making.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_settings(folder: Path, settings: dict, begun: str) -> None:
    """Write config.toml: tables of plain values below a comment that says where the run began."""
    write_atomically(folder / SETTINGS, f"# {begun}\n\n{tomli_w.dumps(settings)}")


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(folder: Path) -> dict:
    """Read state.json; that of an older run is brought to today's format (format 1 had no number and no source)."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state.get("format", 1) > STATE_FORMAT:
        raise ValueError(f"{STATE} has format {state['format']}, and this reads up to {STATE_FORMAT}")
    return {"source": {}} | state
