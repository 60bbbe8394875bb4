"""The identity of a base: which network an adapter was trained on.

An adapter is a difference; put on another base it gives text of no meaning, and no shape tells. So its folder names its base,
in `base.json`: {"path": where it was, "sha256": `digest` of its tensors, …}.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from lora.config import AdapterError
from model.config import ModelConfig
from model.config_json import NAMES_OF_LABELS
from model.heads import CLASSIFIERS
from model.hub import read_config, weight_files
from model.safetensors_file import DTYPES, WeightFile
from model.weights import published_names
from quant.config import FourBit, Int8, from_table, to_table

BASE = "base.json"
PIECE = 2**20  # bytes
CODES = {dtype: code for code, dtype in DTYPES.items()}


def digest(folder: str | Path) -> str:
    """sha256 over a model folder's tensors, by name: for each its name, format and shape as one line of JSON, then its bytes.

    The same for the same tensors however they are spread over files, whether their names have the body's prefix, and whether
    a tied matrix was saved once or under each of its names; constants that transformers makes again do not count. Read a
    piece at a time. Errors: model.hub.HubError, WeightFileError.
    """
    files = [path.resolve() for path in weight_files(Path(folder))]
    return _digest(Path(folder).resolve(), tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache  # a run asks at each of its checkpoints
def _digest(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    config = read_config(folder, any_head=True)
    names = published_names(config.replace(head="none") if config.head == "unknown" else config)
    hashed = hashlib.sha256()
    with ExitStack() as opened:
        found: dict[str, tuple[WeightFile, str]] = {}
        for path, *_ in files:
            file = opened.enter_context(WeightFile(path))
            found |= {names.canonical(published): (file, published) for published in file.names}
        for copy, original in names.aliases.items():
            if copy in found:
                found.setdefault(original, found.pop(copy))
        for name in sorted(set(found) - names.ignored):
            file, published = found[name]
            line = json.dumps([name, CODES[file.dtype(published)], file.shape(published)])
            hashed.update(line.encode() + b"\n")
            for piece in pieces(file, published):
                hashed.update(piece)
    return hashed.hexdigest()


def places(file: WeightFile) -> dict[str, tuple[int, int]]:
    """name -> where its bytes begin in the file, and how many they are: tensors lie in order, without gaps, up to its end."""
    sizes = {name: math.prod(file.shape(name)) * file.dtype(name).itemsize for name in file.names}
    found, begin = {}, file.path.stat().st_size - sum(sizes.values())
    for name, size in sizes.items():
        found[name] = (begin, size)
        begin += size
    return found


def pieces(file: WeightFile, name: str) -> Iterator[bytes]:
    """A tensor's bytes as they are in the file."""
    begin, left = places(file)[name]
    with open(file.path, "rb") as source:
        source.seek(begin)
        while left:
            piece = source.read(min(PIECE, left))
            if not piece:
                raise AdapterError(f"{file.path} ends within {name!r}")
            left -= len(piece)
            yield piece


# ---- the note of it in an adapter's folder


def write_base(folder: Path, base: Path, config: ModelConfig, quantization: FourBit | Int8 | None = None) -> None:
    """config: of the network that the adapter was trained on, whose head may be another one than its folder's, and whose labels
    may have other names; quantization: how its weights were rounded when they were read, where they were."""
    note = {"path": str(base.resolve()), "sha256": digest(base), "head": config.head, "labels": config.labels}
    note |= {} if quantization is None else {"quantization": to_table(quantization)}
    if config.head in CLASSIFIERS:
        note |= {"names": {name: config.extra[name] for name in NAMES_OF_LABELS if name in config.extra}}
    (folder / BASE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def read_base(folder: Path) -> dict | None:
    """`path`, `sha256`, `head` and `labels` of the base, the `names` of labels (entries of config.json) and its `quantization`
    (None: none); or None where the folder does not say (PEFT's do not)."""
    path = folder / BASE
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"path": str, "sha256": str, "head": str, "labels": int}
        how = note.get("quantization")
        how = None if how is None else from_table(how)
        names = {name: value for name, value in dict(note.get("names", {})).items() if name in NAMES_OF_LABELS}
        return {name: kind(note[name]) for name, kind in wanted.items()} | {"quantization": how, "names": names}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path} cannot be read: {error!r}") from None


def check_base(folder: Path, base: Path) -> None:
    """An error unless `base` is what the adapter in `folder` was trained on, as far as its folder says."""
    note = read_base(folder)
    if note is not None and (found := digest(base)) != note["sha256"]:
        raise AdapterError(
            f"{folder} was trained on another base: on {note['path']}, whose tensors have sha256 {note['sha256'][:12]}…, and "
            f"those of {base} have {found[:12]}…"
        )
