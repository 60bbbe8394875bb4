"""Our reading of the safetensors format beside the library's, for every dtype; and every way a file can be damaged."""

import io
import json
import random

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.safetensors_file import DTYPES, WeightFile, WeightFileError

SHAPES = {"scalar": (), "one": (1,), "odd": (3, 5, 7), "matrix": (13, 6), "empty": (0,), "no_columns": (4, 0), "line": (1, 37)}
FLOATS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]


def random_bits(shape, dtype) -> torch.Tensor:
    """Every pattern of bits may come, NaN and infinities too; of bool, 0 and 1."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def read_all(path, **options) -> dict[str, torch.Tensor]:
    with WeightFile(path, **options) as file:
        out = {name: torch.empty(file.shape(name), dtype=file.dtype(name)) for name in file.names}
        for name, tensor in out.items():
            file.read(name, tensor)
    return out


def write(path, header: dict | bytes, data: bytes = b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some.safetensors"


def test_the_dtypes_are_the_library_s():
    assert DTYPES == safetensors.torch._TYPES


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_and_shape(code, path):
    written = {name: random_bits(shape, DTYPES[code]) for name, shape in SHAPES.items()}
    save_file(written, path, metadata={"format": "pt", "said": "ünï"})
    ours, theirs = read_all(path), load_file(path)
    assert ours.keys() == theirs.keys() == written.keys()
    assert all(same(ours[name], theirs[name]) and same(ours[name], written[name]) for name in written)
    with WeightFile(path) as file:
        assert file.metadata == {"format": "pt", "said": "ünï"}


def test_dtypes_side_by_side(path):
    save_file({code: random_bits((5, 3), dtype) for code, dtype in DTYPES.items()}, path)
    ours, theirs = read_all(path), load_file(path)
    assert all(same(ours[name], theirs[name]) for name in theirs) and len(ours) == len(DTYPES)
    with WeightFile(path) as file:
        assert file.metadata == {} and sorted(file.names) == sorted(DTYPES)
    save_file({}, path)
    assert read_all(path) == {}


@pytest.mark.parametrize("chunk_bytes", [1, 40, 100, 2**20])
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("code", [*FLOATS, "I64", "BOOL"])
def test_casting_in_chunks(code, target, chunk_bytes, path):
    """Chunks of one element, of less than a row, of a few rows, and of everything."""
    save_file({name: (20 * torch.randn(shape)).to(DTYPES[code]) for name, shape in SHAPES.items()}, path)
    theirs = load_file(path)
    with WeightFile(path, chunk_bytes=chunk_bytes) as file:
        for name in file.names:
            out = random_bits(file.shape(name), DTYPES[target])
            file.read(name, out)
            assert same(out, theirs[name].to(DTYPES[target]))


@pytest.mark.parametrize("chunk_bytes", [1, 40, 100, 2**20])
@pytest.mark.parametrize("target", ["F32", "BF16"])
@pytest.mark.parametrize("shape", [(13, 6), (6, 13), (1, 37), (37, 1), (4, 0)])
def test_transposed_in_chunks(shape, target, chunk_bytes, path):
    save_file({"w": torch.randn(shape)}, path)
    out = random_bits(shape[::-1], DTYPES[target])
    with WeightFile(path, chunk_bytes=chunk_bytes) as file:
        file.read("w", out, transposed=True)
    assert same(out, load_file(path)["w"].T.to(DTYPES[target]))


def test_into_a_part_of_a_larger_tensor(path):
    """Strided memory is filled where it is, and nothing beside it."""
    save_file({"w": torch.randn(13, 6), "b": torch.randn(4)}, path)
    theirs = load_file(path)
    for chunk_bytes in (1, 40, 2**20):
        whole, line = torch.zeros(13, 9), torch.zeros(4, 5)
        with WeightFile(path, chunk_bytes=chunk_bytes) as file:
            file.read("w", whole[:, 2:8])
            file.read("b", line[:, 3])
        assert torch.equal(whole[:, 2:8], theirs["w"]) and torch.equal(line[:, 3], theirs["b"])
        assert not whole[:, :2].any() and not whole[:, 8:].any() and not line[:, :3].any() and not line[:, 4:].any()


def test_into_a_parameter(path):
    save_file({"w": torch.randn(3, 4)}, path)
    parameter, cast = torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(3, 4).double())
    with WeightFile(path) as file:
        file.read("w", parameter)
        file.read("w", cast)
    assert torch.equal(parameter, load_file(path)["w"]) and torch.equal(cast.float(), parameter)


@pytest.mark.parametrize("case", ["straight", "cast", "transposed", "cast and transposed"])
def test_memory_beside_the_tensor(case, path, monkeypatch):
    """Straight: the file is read into the tensor's own memory at once. Else: in pieces, none above the limit."""
    save_file({"w": torch.randn(200, 30)}, path)
    out = torch.empty((200, 30), dtype=torch.float64 if "cast" in case else torch.float32)
    out = out.T.contiguous() if "transposed" in case else out
    reads, real = [], WeightFile._read_bytes
    with WeightFile(path, chunk_bytes=1000) as file:
        monkeypatch.setattr(
            WeightFile, "_read_bytes", lambda self, memory, *rest: (reads.append(len(memory)), real(self, memory, *rest))
        )
        file.read("w", out, transposed="transposed" in case)
        if case == "straight":
            assert reads == [24000] and file._staging is None
        else:
            assert max(reads) == 960 and sum(reads) == 24000 and file._staging.nbytes == 1000
            staging = file._staging
            file.read("w", out, transposed="transposed" in case)
            assert file._staging is staging  # made once a file: many short-lived ones leave holes in the heap


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_onto_a_device(dtype, path):
    save_file({"w": torch.randn(13, 6), "s": torch.tensor(2.5)}, path)
    theirs = load_file(path)
    with WeightFile(path, chunk_bytes=100) as file:
        out, turned = torch.empty(13, 6, dtype=dtype, device="cuda"), torch.empty(6, 13, dtype=dtype, device="cuda")
        scalar = torch.empty((), dtype=dtype, device="cuda")
        file.read("w", out)
        file.read("s", scalar)
        assert same(out.cpu(), theirs["w"].to(dtype)) and scalar.item() == 2.5
        file.read("w", turned, transposed=True)
        assert same(turned.cpu(), theirs["w"].T.to(dtype))


def test_tensors_that_do_not_fit_are_named(path):
    save_file({"w": torch.randn(3, 5), "line": torch.randn(4)}, path)
    with WeightFile(path) as file:
        for out, options in ((torch.zeros(5, 3), {}), (torch.zeros(3, 5), {"transposed": True}), (torch.zeros(15), {})):
            with pytest.raises(WeightFileError, match=r"some\.safetensors: 'w' has shape \(3, 5\), .* is expected"):
                file.read("w", out, **options)
            assert not out.any()
        with pytest.raises(WeightFileError, match=r"'line' can be transposed into two dimensions only, not into \(4,\)"):
            file.read("line", torch.zeros(4), transposed=True)
        with pytest.raises(WeightFileError, match=r"'w' is torch\.float32, which cannot be cast to torch\.int64"):
            file.read("w", torch.zeros(3, 5, dtype=torch.int64))
        for asked in (file.shape, file.dtype, lambda name: file.read(name, torch.zeros(1))):
            with pytest.raises(WeightFileError, match=r"some\.safetensors: holds no tensor 'v'"):
                asked("v")


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


# The header, and what the message says; 8 bytes of data follow each.
BROKEN = {
    "not JSON": (b'{"w":', "not JSON"),
    "not UTF-8": (b'{"w\xff": 1}', "not JSON"),
    "UTF-16": ('{"w": 1}'.encode("utf-16"), "not a JSON object"),
    "a list": (b"[]", "not a JSON object"),
    "nothing": (b"", "not a JSON object"),
    "too deep": (b'{"w":' * 100_000, "not JSON"),
    "number of 5,000 digits": (b'{"w":' + b"1" * 5000 + b"}", "not JSON"),
    "a name twice": (json.dumps({"v": entry(), "w": entry()}).replace("v", "w").encode(), "'w' occurs twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "w": entry()}, "__metadata__"),
    "metadata not an object": ({"__metadata__": [], "w": entry()}, "__metadata__"),
    "no object": ({"w": 3}, "'w' is not described"),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, "'w' is not described"),
    "unknown dtype": ({"w": entry("F31")}, "'w' has dtype 'F31'"),
    "dtype not a string": ({"w": entry(["F32"])}, r"'w' has dtype \['F32'\]"),
    "negative shape": ({"w": entry(shape=(-2,))}, r"'w' has shape \[-2\]"),
    "two negative sizes": ({"w": entry(shape=(-2, -1))}, r"'w' has shape \[-2, -1\]"),
    "fractional shape": ({"w": entry(shape=(2.0,))}, r"'w' has shape \[2.0\]"),
    "true as a size": ({"w": entry(shape=(2, True))}, r"'w' has shape \[2, True\]"),
    "shape not a list": ({"w": entry() | {"shape": 2}}, "'w' has shape 2"),
    "size past 64 bits": ({"w": entry(shape=(0, 2**64), offsets=(0, 0))}, "'w' has shape"),
    "three offsets": ({"w": entry(offsets=(0, 4, 8))}, r"'w' has data_offsets \[0, 4, 8\]"),
    "negative offset": ({"w": entry(offsets=(-8, 0))}, r"'w' has data_offsets \[-8, 0\]"),
    "end before begin": ({"w": entry(offsets=(8, 0))}, r"'w' has data_offsets \[8, 0\]"),
    "fewer bytes than the shape": ({"w": entry(offsets=(0, 4))}, "'w' of F32 .* needs 8 bytes, .* hold 4"),
    "past the end": ({"w": entry(shape=(3,), offsets=(0, 12))}, "describes 12 bytes of data, the file holds 8"),
    "bytes left over": ({"w": entry(shape=(1,), offsets=(0, 4))}, "describes 4 bytes of data, the file holds 8"),
    "a hole before": ({"w": entry(shape=(1,), offsets=(4, 8))}, "'w' starts at byte 4 .* 0 is expected"),
    "an overlap": ({"v": entry(), "w": entry(shape=(1,), offsets=(4, 8))}, "'w' starts at byte 4 .* 8 is expected"),
    "the same bytes twice": ({"v": entry(), "w": entry()}, "'w' starts at byte 0 .* 8 is expected"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_named(case, path):
    header, message = BROKEN[case]
    with pytest.raises(WeightFileError, match=rf"some\.safetensors: .*{message}"):
        WeightFile(write(path, header, bytes(8)))


def test_the_header_that_is_broken_above_can_be_read_whole(path):
    assert torch.equal(read_all(write(path, {"w": entry(more=1)}, bytes(8)))["w"], torch.zeros(2))


@pytest.mark.parametrize("length", [2**64 - 1, 100_000_001, 1000, 9])
def test_a_length_that_cannot_be_is_refused_before_memory_is_asked_for(length, path):
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightFileError, match=f"length is {length} bytes, at most 2 are possible"):
        WeightFile(path)


def test_a_header_past_the_limit_is_refused_though_the_file_is_as_long(path):
    with open(path, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # a hole: takes no room on the disk
    with pytest.raises(WeightFileError, match="length is 100000001 bytes, at most 100000000 are possible"):
        WeightFile(path)


def test_a_system_that_reads_a_little_at_a_time(path):
    """One call may give less than was asked for; past 2 GiB it always does."""

    class Slow(io.FileIO):
        def readinto(self, memory):
            return super().readinto(memory[:7])

    save_file({"w": torch.randn(13, 6)}, path)
    with WeightFile(path) as file, Slow(path) as file._file:
        out = torch.zeros(13, 6)
        file.read("w", out)
    assert torch.equal(out, load_file(path)["w"])


def test_what_is_not_a_file(tmp_path):
    for name in ("missing.safetensors", "folder.safetensors"):
        (tmp_path / "folder.safetensors").mkdir(exist_ok=True)
        with pytest.raises(WeightFileError, match=name):
            WeightFile(tmp_path / name)


def test_a_file_cut_after_it_was_opened(path):
    save_file({"v": torch.randn(50), "w": torch.randn(20, 30)}, path)
    with WeightFile(path, chunk_bytes=100) as file:
        path.write_bytes(path.read_bytes()[:-6])
        for out in (torch.zeros(20, 30), torch.zeros(20, 30).double()):
            with pytest.raises(WeightFileError, match=r"some\.safetensors: ends at byte 2722, before the end of 'w' at 2728"):
                file.read("w", out)


@pytest.mark.parametrize("chunk_bytes", [1, 100, 2**20])
def test_holds(chunk_bytes, path):
    save_file({"w": torch.randn(13, 6)}, path)
    value = load_file(path)["w"]
    with WeightFile(path, chunk_bytes=chunk_bytes) as file:
        assert file.equals("w", value) and file.equals("w", value.bfloat16()) and file.equals("w", value.T.contiguous().T)
        assert not file.equals("w", value.T) and not file.equals("w", value.view(6, 13)) and not file.equals("w", value[:12])
        for place in (0, 40, 77):
            changed = value.clone()
            changed.view(-1)[place] += 1
            assert not file.equals("w", changed)


def test_closed_when_left_or_refused(path, monkeypatch):
    save_file({"w": torch.randn(2)}, path)
    with WeightFile(path) as file:
        assert not file._file.closed
    assert file._file.closed
    closed, real = [], WeightFile.close
    monkeypatch.setattr(WeightFile, "close", lambda self: (real(self), closed.append(self._file.closed)))
    with pytest.raises(WeightFileError):
        WeightFile(write(path, b"[]"))
    assert closed == [True]


def everything(path) -> bytes:
    """A file with the shapes above in three dtypes, as bytes."""
    tensors = {f"{name}.{code}": random_bits(SHAPES[name], DTYPES[code]) for name in SHAPES for code in ("F32", "BF16", "I8")}
    save_file(tensors, path, metadata={"format": "pt"})
    return path.read_bytes()


def test_cut_anywhere(path):
    content = everything(path)
    header_end = 8 + int.from_bytes(content[:8], "little")
    places = random.Random(0).sample(range(header_end), 100) + random.Random(1).sample(range(header_end, len(content)), 100)
    for place in [0, 7, 8, header_end, len(content) - 1, *places]:
        path.write_bytes(content[:place])
        with pytest.raises(WeightFileError, match=r"some\.safetensors"):
            WeightFile(path)


CHANGES = {
    "one bit": lambda text, place, seeded: text[:place] + bytes([text[place] ^ 1 << seeded.randrange(8)]) + text[place + 1 :],
    "another byte": lambda text, place, seeded: text[:place] + bytes([seeded.choice(LIKELY)]) + text[place + 1 :],
    "a byte more": lambda text, place, seeded: text[:place] + bytes([seeded.choice(LIKELY)]) + text[place:],
    "a byte lost": lambda text, place, seeded: text[:place] + text[place + 1 :],
}
LIKELY = b'0123456789{}[]",:FI. e'  # no minus: -0 is a size of 0 to us, and no number to the library


def read_by(reader, refusal, path):
    try:
        return reader(path), None
    except refusal as error:
        return None, str(error)


@pytest.mark.parametrize("length", ["right", "damaged too"])
@pytest.mark.parametrize("change", CHANGES)
def test_damaged_headers(change, length, path):
    """What we read, the library reads too, and the same; what it refuses, we refuse. No other exception leaves."""
    content = everything(path)
    header_end = 8 + int.from_bytes(content[:8], "little")
    seeded, was_read = random.Random(change + length), 0
    for _ in range(400):
        if length == "right":
            text = content[8:header_end]
            text = CHANGES[change](text, seeded.randrange(len(text)), seeded)
            write(path, text, content[header_end:])
        else:
            path.write_bytes(CHANGES[change](content, seeded.randrange(header_end), seeded))
        (ours, said), (theirs, _) = read_by(read_all, WeightFileError, path), read_by(load_file, SafetensorError, path)
        if ours is None:
            assert "some.safetensors" in said
            continue
        was_read += 1
        assert theirs is not None, path.read_bytes()[:header_end]
        assert ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
    assert was_read < 400 and (was_read > 20 or length == "damaged too")  # both outcomes are seen
