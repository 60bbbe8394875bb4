"""Identifies the base that an adapter was trained on.

An adapter is a difference: on another base of the same shapes it computes nonsense. So its folder names its base in
`base.json`: {"path": the folder at that time, "sha256": `digest` of its tensors, …}.
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
from model.weights import pool_of, published_names
from quant.config import FourBit, Int8, from_table, to_table

BASE = "base.json"
PIECE = 2**20  # bytes
CODES = {dtype: code for code, dtype in DTYPES.items()}


def digest(folder: str | Path) -> str:
    """Return the sha256 of a model folder's tensors: sorted by name, each one's name, dtype and shape as a line of JSON, then
    its bytes.

    It does not depend on sharding, on the body's prefix in the names, on copies of tied matrices, or on constants that
    transformers recomputes. Read a piece at a time. Errors: model.hub.HubError, WeightFileError.
    """
    files = [path.resolve() for path in weight_files(Path(folder))]
    return _digest(Path(folder).resolve(), tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache  # a run calls it at each of its checkpoints
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
            for piece in read_pieces(file, published):
                hashed.update(piece)
    return hashed.hexdigest()


def tensor_offsets(file: WeightFile) -> dict[str, tuple[int, int]]:
    """Return name → (offset, size) in bytes: tensors are stored in order, without gaps, up to the end of the file."""
    sizes = {name: math.prod(file.shape(name)) * file.dtype(name).itemsize for name in file.names}
    found, begin = {}, file.path.stat().st_size - sum(sizes.values())
    for name, size in sizes.items():
        found[name] = (begin, size)
        begin += size
    return found


def read_pieces(file: WeightFile, name: str) -> Iterator[bytes]:
    """Yield a tensor's bytes as they are in the file."""
    begin, left = tensor_offsets(file)[name]
    with open(file.path, "rb") as source:
        source.seek(begin)
        while left:
            piece = source.read(min(PIECE, left))
            if not piece:
                raise AdapterError(f"{file.path} ends within {name!r}")
            left -= len(piece)
            yield piece


# ---- base.json


def write_base(folder: Path, base: Path, config: ModelConfig, quantization: FourBit | Int8 | None = None) -> None:
    """Write base.json into an adapter's folder.

    config: that of the network in training; head and names of labels may differ from the base folder's. quantization: how the
    weights were quantized when they were read; None: they were not.
    """
    note = {"path": str(base.resolve()), "sha256": digest(base), "head": config.head, "labels": config.labels}
    note |= {} if quantization is None else {"quantization": to_table(quantization)}
    if config.head in CLASSIFIERS:
        note |= {"names": {name: config.extra[name] for name in NAMES_OF_LABELS if name in config.extra}}
    if config.head == "sequence":
        note["pool"] = pool_of(config)
    (folder / BASE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def read_base(folder: Path) -> dict | None:
    """Read base.json: `path`, `sha256`, `head`, `labels`, `names` of labels (entries of config.json), `pool` of a sequence
    classifier (None: the base's), `quantization`. Return None if the folder has none, as PEFT's."""
    path = folder / BASE
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"path": str, "sha256": str, "head": str, "labels": int}
        how = note.get("quantization")
        how = None if how is None else from_table(how)
        names = {name: value for name, value in dict(note.get("names", {})).items() if name in NAMES_OF_LABELS}
        found = {name: kind(note[name]) for name, kind in wanted.items()}
        return found | {"quantization": how, "names": names, "pool": note.get("pool")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path} cannot be read: {error!r}") from None


def check_base(folder: Path, base: Path) -> None:
    """Raise AdapterError unless `base` is the base of the adapter in `folder`; pass if the folder has no base.json."""
    note = read_base(folder)
    if note is not None and (found := digest(base)) != note["sha256"]:
        raise AdapterError(
            f"{folder} was trained on another base: on {note['path']}, whose tensors have sha256 {note['sha256'][:12]}…, and "
            f"those of {base} have {found[:12]}…"
        )
