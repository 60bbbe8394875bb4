"""A disk without room, at every kind of file: a clear message, the checkpoints before it whole, and on when there is room."""

import errno
import gc
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager

import pytest
from safetensors import SafetensorError

from tests.runs import assert_same_end, command, nothing_half_made, steps_of
from train.runs.checkpoint import checkpoints, read_pointer, verify
from train.runs.open import resolve


def test_a_safetensors_error_is_a_full_disk_too(halfway, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("train.engine.save_file", full)
        said = command("--resume", halfway)
    assert said.code == 2 and "No space left" in said.err and nothing_half_made(halfway)


# Full disks, by the kernel's own word.


@contextmanager
def files_no_larger_than(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_full_and_then_room(run, finished, no_room):
    before = steps_of(run)
    with no_room:
        said = command("--resume", run)
    assert said.code == 2 and said.err.count("\n") == 1, said.err
    assert said.err.startswith("error: could not write at step ") and f"--resume {run}" in said.err
    assert "File too large" in said.err or "No space left" in said.err
    assert steps_of(run) == before and nothing_half_made(run)
    for folder in checkpoints(run):
        verify(folder)
    assert resolve(run) == read_pointer(run, "best")
    said = command("--resume", run)
    assert said.code == 0, said.err
    assert_same_end(run, finished)


def test_no_room_for_the_weights(halfway, finished):
    assert_full_and_then_room(halfway, finished, files_no_larger_than(100_000))  # the weights take 147,000


def test_no_room_for_the_metrics(halfway, finished):
    size = (halfway / "metrics.jsonl").stat().st_size
    assert_full_and_then_room(halfway, finished, files_no_larger_than(size + 300))


def test_full_file_system(halfway, finished, tmp_path):
    """The same on a small file system of memory that is full; beside the two above, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk]
    if not shutil.which("mount") or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        run = disk / "run"
        shutil.copytree(halfway, run)

        @contextmanager
        def filled():
            free = shutil.disk_usage(disk).free
            (disk / "filler").write_bytes(bytes(free - 300_000))  # a checkpoint takes 450,000
            yield
            (disk / "filler").unlink()

        assert_full_and_then_room(run, finished, filled())
    finally:
        gc.collect()  # networks read from there map their files
        subprocess.run(["umount", disk], check=True)


def test_no_room_for_the_curves(halfway, monkeypatch):
    """The run is done and saved: a picture that cannot be drawn does not make it fail."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tests.runs.diagnose", full)
    said = command("--resume", halfway)
    assert said.code == 0 and "curves   not drawn: [Errno 28] No space left on device" in said.out
