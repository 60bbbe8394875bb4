"""Ways to damage what lies on disk: a file's bytes at one place or at random, and a model folder's tensors and config."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file


def flip_bit(path: Path, at: int | None = None) -> None:
    """One bit of the byte at `at`, or in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def shorten(path: Path, count: int = 1) -> None:
    """Lose the last bytes."""
    path.write_bytes(path.read_bytes()[:-count])


# ---- a file's content, at random


def flip(content: bytes, draw: random.Random) -> bytes:
    """Every bit of 1 to 64 neighbouring bytes."""
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice((1, 1, 8, 64)))
    return content[:start] + bytes(255 - byte for byte in content[start:stop]) + content[stop:]


def cut_end(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def cut_middle(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + content[start + 1 + draw.randrange(100) :]


def overwrite(content: bytes, draw: random.Random) -> bytes:
    """A page of zeros, as a lost block leaves, of which at least one byte was another."""
    start = draw.randrange(max(1, len(content) - 512))
    spoilt = content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :]
    return spoilt if spoilt != content else flip(content, draw)


def append(content: bytes, draw: random.Random) -> bytes:
    return content + draw.randbytes(1 + draw.randrange(100))


def pickled(content: bytes, draw: random.Random) -> bytes:
    return pickle.dumps(draw.random())


DAMAGES = (flip, flip, flip, cut_end, cut_end, cut_middle, overwrite, append, pickled)


# ---- a model folder


def damaged(source: Path, folder: Path, change: Callable[[dict, dict], object]) -> Path:
    """A copy; change(tensors, config) alters it."""
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    change(tensors, config)
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def settings(**changes):
    return lambda tensors, config: config["quantization_config"].update(changes)


def without(*names: str):
    return lambda tensors, config: [(tensors if name in tensors else config).pop(name) for name in names]
