"""A reader of the safetensors format that fills tensors which are already allocated.

    bytes 0 to 7     N, little-endian, unsigned: the length of the header
    N bytes          JSON, {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {str: str}}
    the rest         the tensors, row-major, little-endian; offsets count from here, and every byte belongs to one tensor

The library's own reader maps the whole file, whose pages are resident beside the tensors made from them: a network then needs
twice its size. Reading by offset needs each tensor once, and `chunk_bytes` where one is cast, moved or transposed.

Source: the format's description, https://huggingface.co/docs/safetensors. For little-endian machines.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # the format's own limit; a corrupt length cannot ask for all memory
CHUNK_BYTES = 2**20  # fits the CPU cache: 16 MiB chunks were slower to transpose

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_ITEMSIZE = max(dtype.itemsize for dtype in DTYPES.values())


class WeightFileError(ValueError):
    """Raised for a damaged safetensors file or a tensor that does not fit; the message names the file and the tensor."""


@dataclass(frozen=True)
class Entry:
    """The place of one tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes after the header
    end: int


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file by the library, with the default permissions of new files (the library's are for the owner alone)."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


class WeightFile:
    """An open safetensors file; its header is read and checked on opening, a tensor by `read`. Not thread-safe.

    `names` are in the order of the data, which is the fastest order to read them in. Errors: WeightFileError.

    >>> import tempfile
    >>> header = b'{"w": {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]}}'
    >>> path = Path(tempfile.mkdtemp(), "example.safetensors")
    >>> _ = path.write_bytes(len(header).to_bytes(8, "little") + header + bytes([1, 0, 0, 1]))
    >>> with WeightFile(path) as file:
    ...     out = torch.empty(file.shape("w"))
    ...     file.read("w", out)
    ...     file.names, file.dtype("w"), out.tolist()
    (['w'], torch.int16, [1.0, 256.0])
    """

    def __init__(self, path: str | Path, *, chunk_bytes: int = CHUNK_BYTES):
        self.path, self.chunk_bytes = Path(path), max(chunk_bytes, MAX_ITEMSIZE)
        self._staging: Tensor | None = None
        try:
            self._file = open(path, "rb", buffering=0)
        except OSError as error:
            raise self._error(error.strerror) from None
        try:
            self._entries, self.metadata, self._data_start = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def names(self) -> list[str]:
        """The tensors' names, in the order of the data."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self._entry(name).dtype

    def read(self, name: str, out: Tensor, *, transposed: bool = False) -> None:
        """Read a tensor into `out`, cast to its dtype and moved to its device; `transposed` if the file holds `out.T`.

        Errors: another shape; a cast such as float to int (`torch.can_cast`); a file truncated meanwhile.
        """
        entry = self._entry(name)
        if transposed and out.ndim != 2:
            raise self._error(f"{name!r} can be transposed into two dimensions only, not into {tuple(out.shape)}")
        target = out.detach().T if transposed else out.detach()  # a view of `out` in the file's layout
        if tuple(target.shape) != entry.shape:
            raise self._error(f"{name!r} has shape {entry.shape}, {tuple(target.shape)} is expected")
        if not torch.can_cast(entry.dtype, out.dtype):
            raise self._error(f"{name!r} is {entry.dtype}, which cannot be cast to {out.dtype}")
        self._fill(target, name, entry.dtype, self._data_start + entry.begin)

    def equals(self, name: str, value: Tensor) -> bool:
        """Return True where the tensor in the file equals `value`, cast to its dtype; reads a chunk at a time."""
        entry = self._entry(name)
        if entry.shape != tuple(value.shape):
            return False
        size, flat, offset = value.numel(), value.detach().reshape(-1), self._data_start + entry.begin
        count = max(self.chunk_bytes // entry.dtype.itemsize, 1)
        for start in range(0, size, count):
            piece = torch.empty(min(count, size - start), dtype=value.dtype, device=value.device)
            self._fill(piece, name, entry.dtype, offset + start * entry.dtype.itemsize)
            if not torch.equal(piece, flat[start : start + count]):
                return False
        return True

    def _fill(self, target: Tensor, name: str, dtype: torch.dtype, offset: int) -> None:
        """Read directly into the target's memory where the bytes are the same, else through a buffer of `chunk_bytes`."""
        if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
            self._read_bytes(bytes_view(target), offset, repr(name))
            return
        size = target.numel() * dtype.itemsize
        if size <= self.chunk_bytes:
            if self._staging is None:  # reused: a buffer a tensor fragments the heap, measured 1.4 times the weights
                self._staging = torch.empty(self.chunk_bytes, dtype=torch.uint8)
            piece = self._staging[:size]
            self._read_bytes(bytes_view(piece), offset, repr(name))
            target.copy_(piece.view(dtype).view(target.shape))
            return
        rows = self.chunk_bytes * len(target) // size
        for part in target.split(rows) if rows else target.unbind():  # unbind: one row is longer than a chunk
            self._fill(part, name, dtype, offset)
            offset += part.numel() * dtype.itemsize

    def _read_bytes(self, memory: memoryview, offset: int, what: str) -> None:
        try:
            self._file.seek(offset)
            done = 0
            while done < len(memory):  # one call reads 2 GiB at most
                count = self._file.readinto(memory[done:])
                if not count:
                    raise self._error(f"ends at byte {offset + done}, before the end of {what} at {offset + len(memory)}")
                done += count
        except OSError as error:
            raise self._error(f"{what} cannot be read: {error.strerror}") from None

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str], int]:
        """Return the entries by offset, the metadata, and the offset of the data."""
        size = os.fstat(self._file.fileno()).st_size
        if size < 8:
            raise self._error(f"too short for safetensors, of size {size}")
        length = bytearray(8)
        self._read_bytes(memoryview(length), 0, "the header's length")
        header_size = int.from_bytes(length, "little")
        longest = min(MAX_HEADER_BYTES, size - 8)
        if header_size > longest:
            raise self._error(f"the header's length is {header_size} bytes, at most {longest} are possible")
        text = bytearray(header_size)
        self._read_bytes(memoryview(text), 8, "the header")
        header = self._parse(text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._error("'__metadata__' is not an object of strings")
        entries = {name: self._checked(name, value) for name, value in header.items()}
        data_start = 8 + header_size
        return self._gapless(entries, size - data_start), metadata, data_start

    def _parse(self, text: bytearray) -> dict:
        if not text.startswith(b"{"):
            raise self._error(f"the header is not a JSON object: it starts with {bytes(text[:8])!r}")
        try:
            return json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._error(f"the header is not JSON: {error}") from None

    def _checked(self, name: str, value: object) -> Entry:
        """Parse and check one tensor's entry."""
        if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
            raise self._error(f"{name!r} is not described by dtype, shape and data_offsets: {value!r}")
        code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise self._error(f"{name!r} has dtype {code!r}; known: {', '.join(DTYPES)}")
        if not _is_sizes(shape):
            raise self._error(f"{name!r} has shape {shape!r}, not a list of sizes")
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._error(f"{name!r} has data_offsets {offsets!r}, not [begin, end]")
        (begin, end), dtype = offsets, DTYPES[code]
        if end - begin != (needed := math.prod(shape) * dtype.itemsize):
            raise self._error(f"{name!r} of {code} {shape} needs {needed} bytes, its data_offsets {offsets} hold {end - begin}")
        return Entry(dtype, tuple(shape), begin, end)

    def _gapless(self, entries: dict[str, Entry], size: int) -> dict[str, Entry]:
        """Sort the entries by offset; each must start where the one before it ends, and the last must end with the file."""
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
        reached = 0
        for name, entry in ordered.items():
            if entry.begin != reached:
                raise self._error(f"{name!r} starts at byte {entry.begin} of the data, where {reached} is expected")
            reached = entry.end
        if reached != size:
            raise self._error(f"the header describes {reached} bytes of data, the file holds {size}")
        return ordered

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise self._error(f"holds no tensor {name!r}")
        return self._entries[name]

    def _error(self, what: str) -> WeightFileError:
        return WeightFileError(f"{self.path}: {what}")


class ScratchMemory:
    """A scratch buffer: makes tensors, each in the memory of the previous one, for weights that are needed one at a time. New
    memory for each fragments the heap, measured as two to five times the retained weights."""

    def __init__(self):
        self.memory = torch.empty(0, dtype=torch.uint8)

    def __call__(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size > self.memory.numel():
            self.memory = torch.empty(0, dtype=torch.uint8)  # free the old buffer first
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        return self.memory[:size].view(dtype).view(shape)


def bytes_view(tensor: Tensor) -> memoryview:
    """Return a writable view of a contiguous tensor's bytes; as uint8, since numpy lacks bfloat16 and float8."""
    return memoryview(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy())


def _is_sizes(value: object) -> bool:
    """Return True for a list of non-negative 64-bit integers; `True` is no integer here."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """Build a dict; a duplicate name raises, since it would drop a tensor silently."""
    values: dict = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} occurs twice")
        values[name] = value
    return values
