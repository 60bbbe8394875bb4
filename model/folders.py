"""The files of a model folder: its weights, and the auxiliary files that are copied with them.

Where a folder is ambiguous, its files are those that transformers reads: `model.safetensors` alone if present, whatever an
index beside it says.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/"  # the first bytes of a pointer in place of the file
LARGEST_COPY = 100_000_000  # bytes of an auxiliary file
# Weights in any format, which are stale once the network has changed; and an adapter's.
WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf")
# Further files of a tokenizer, which an adapter's folder gets too.
EXTRAS = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
EXTRAS += ("added_tokens.json", "vocab.json", "merges.txt")
# Files that are not copied: written anew, a checkpoint's own, or about a quantization.
NOT_COPIED = ("config.json", "manifest.json", "state.json", "tensors.json", "base.json", "adapter_config.json")
NOT_COPIED += ("quantization.png",)


class HubError(ValueError):
    """Raised for a folder that cannot be read as a network; the message names the file or the weight."""


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files: the single one, or those that the index names. Errors: HubError."""
    if (folder / SINGLE).is_file():
        if (folder / INDEX).is_file():
            warnings.warn(f"{folder}: {SINGLE} is read, as transformers reads it, not what {INDEX} names", stacklevel=2)
        return [refuse_lfs_pointer(folder / SINGLE)]
    if (folder / INDEX).is_file():
        return [refuse_lfs_pointer(path) for path in indexed_files(folder)]
    if parts := sorted(path.name for path in folder.glob("*-of-*.safetensors")):
        raise HubError(f"{folder} holds shards ({parts[0]} …) and no {INDEX}, which says how they belong together")
    if sorted(folder.glob("pytorch_model*.bin")):
        raise HubError(
            f"{folder} holds pytorch_model.bin, a pickle, which can run code when opened and is refused; convert it with "
            "transformers' save_pretrained(folder, safe_serialization=True) in a place that you trust"
        )
    raise HubError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def indexed_files(folder: Path) -> list[Path]:
    """Return the shards that the index names; each must exist (HubError)."""
    try:
        weight_map = dict(json.loads(refuse_lfs_pointer(folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        names = sorted({str(file) for file in weight_map.values()})
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, HubError):
            raise
        raise HubError(f"{folder / INDEX} cannot be read: {error!r}") from None
    for name in names:
        if Path(name).name != name:
            raise HubError(f"{INDEX} points outside its folder: {name!r}")
        if not (folder / name).is_file():
            raise HubError(f"{INDEX} names {name}, which is not there: the folder is incomplete, or has another's index")
    return [folder / name for name in names]


def refuse_lfs_pointer(path: Path) -> Path:
    """Return the path; HubError where it holds a Git LFS pointer instead of the file."""
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise HubError(f"{path} is a Git LFS pointer, not the file: fetch it, `git lfs pull` in {path.parent}")
    return path


def remove_stale_weights(folder: Path, files: list[str]) -> None:
    """Delete the weight files of an earlier network in the folder, which would be read instead of `files` or beside them."""
    index = [] if len(files) == 1 else [INDEX]
    for path in (folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
        if path.name not in (*files, *index):
            path.unlink(missing_ok=True)


def make_folder(path: Path) -> Path:
    """Create a command's output folder. Error: it cannot be created (HubError)."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HubError(f"{path} cannot be made ({error.strerror}): choose another --out") from None
    return path


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that is renamed to `out` on success and deleted on an error. `out` must be empty or
    absent (HubError)."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise HubError(f"--out {out} is there already, and is not an empty folder")
    out = out.resolve()
    making = out.with_name(f".{out.name}.partial-{os.getpid()}")
    make_folder(making)
    try:
        yield making
        making.rename(out)
    except BaseException:
        shutil.rmtree(making)
        raise


def copy_auxiliary_files(source: Path, out: Path, *, only: tuple[str, ...] | None = None) -> list[str]:
    """Copy the files that do not depend on the weights: tokenizer, chat templates, generation_config.json, label files,
    licence …; files that exist in `out` stay. only: the names to copy (default: all). Returns the copied names."""
    copied = []
    for path in auxiliary_files(source):
        target = out / path.relative_to(source)
        wanted = only is None or path.relative_to(source).parts[0] in only
        if wanted and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            copied.append(str(path.relative_to(source)))
    return copied


def auxiliary_files(folder: Path) -> list[Path]:
    """Return the files to copy: of the folder itself, and of the subfolders that transformers (further chat templates) and
    sentence-transformers (the modules after the network) read."""
    found = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*.jinja")]
    for name in module_folders(folder):
        found += (folder / name).iterdir()
    return sorted(
        path
        for path in found
        if path.is_file()
        and path.stat().st_size <= LARGEST_COPY
        and not path.name.startswith(".")
        and not path.name.endswith(WEIGHTS)
        and not (path.parent == folder and path.name in NOT_COPIED)
    )


def module_folders(folder: Path) -> list[str]:
    """Return the subfolders with settings of a sentence-transformers folder's modules, by its modules.json."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        names = [str(module["path"]) for module in modules if module["path"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if Path(name).name == name and (folder / name).is_dir()]
