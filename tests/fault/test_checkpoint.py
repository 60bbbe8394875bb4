"""Broken, missing and half-written checkpoints; crashes at every point of a save."""

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train.runs.checkpoint
from tests.damage import flip_bit, shorten
from tests.runs import assert_same_end, command, last_checkpoint, nothing_half_made, steps_of
from train.runs.checkpoint import (
    SHARDED_INDEX,
    checkpoints,
    latest_verified,
    prune,
    read_pointer,
    restore_pointers,
    verify,
    write_atomically,
    write_checkpoint,
    write_pointer,
)
from train.runs.errors import CheckpointError
from train.runs.open import resolve
from train.runs.sharded import ShardedTensors, file_name, shard_rows

FILES = [
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


def remove(path):
    path.unlink()


def test_a_checkpoint_holds_these_files(finished):
    assert sorted(path.name for path in last_checkpoint(finished).iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [remove, flip_bit, shorten])
def test_damage_is_named_and_passed_over(halfway, name, damage):
    latest, before = checkpoints(halfway)[:2]
    damage(latest / name)
    if (damage, name) == (shorten, "manifest.json"):  # its last byte is a newline
        shorten(latest / name)
    with pytest.raises(CheckpointError, match=name):
        verify(latest)
    said = []
    assert latest_verified(halfway, said.append) == before
    assert len(said) == 1 and latest.name in said[0] and name in said[0]


def test_resume_falls_back_to_the_one_before(halfway, finished):
    flip_bit(last_checkpoint(halfway) / "model.safetensors")
    said = command("--resume", halfway)
    assert said.code == 0, said.err
    assert "skipping checkpoint step-70" in said.out and "model.safetensors was changed" in said.out
    assert "steps 60 to 160" in said.out
    assert_same_end(halfway, finished)


def test_all_broken(halfway):
    for folder in checkpoints(halfway):
        remove(folder / "state.json")
    said = command("--resume", halfway)
    assert said.code == 2 and "none of 3 checkpoints" in said.err and "Traceback" not in said.err
    assert said.out.count("state.json is missing") == 3


@pytest.mark.parametrize(
    "manifest, message",
    [
        ('{"format": 99, "files": {}}', "format 99; this version reads 2"),
        ('{"format": 2}', "cannot be read"),
        ("[1]", "cannot be read"),
        ('{"format": 2, "files": {"../config.toml": {"bytes": 1, "sha256": ""}}}', "outside its folder"),
    ],
)
def test_manifest_of_another_kind(tmp_path, manifest, message):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path)


def test_what_a_command_opens_is_verified(halfway):
    best = read_pointer(halfway, "best")
    assert resolve(halfway) == best and resolve(best) == best
    flip_bit(best / "model.safetensors")
    for path in (halfway, best):
        with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
            resolve(path)
    (halfway / "best.json").unlink()
    assert resolve(halfway) == last_checkpoint(halfway)
    (halfway / "last.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"last\.json cannot be read"):
        resolve(halfway)
    (halfway / "last.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither a run .* nor a model folder"):
        resolve(halfway)
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(halfway / "nothing")


def test_pointers_never_lead_out_of_the_run(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "best.json").write_text('{"checkpoint": "../elsewhere", "step": 1}')
    assert read_pointer(tmp_path / "run", "best") is None


def test_repoint(tmp_path):
    folder = write_checkpoint(tmp_path, 4, small)
    restore_pointers(tmp_path, folder, {"step": 4, "loss": 2.0})
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "checkpoint": "checkpoints/step-4",
        "step": 4,
        "loss": 2.0,
    }
    restore_pointers(tmp_path, folder, {"step": 3, "loss": 1.0})  # no such checkpoint any more
    assert not (tmp_path / "best.json").exists() and read_pointer(tmp_path, "last") == folder


def test_what_the_pointers_name_stays(tmp_path):
    """A resume from before a broken checkpoint writes one that is not the latest by its number."""
    for step in (2, 4, 6, 8):
        folder = write_checkpoint(tmp_path, step, small)
        if step < 6:
            write_pointer(tmp_path, "best" if step == 2 else "last", folder)
    prune(tmp_path, keep=1)
    assert steps_of(tmp_path) == [8, 4, 2]


@pytest.mark.parametrize("readers", range(1, 8))
def test_any_number_of_ranks_reads_its_rows(readers, tmp_path):
    """Five rows by four ranks, the last of which had none; some of those that read get none too."""
    value, cuts = torch.arange(10.0).view(5, 2), [shard_rows(5, part, 4) for part in range(4)]
    for part, (start, stop) in enumerate(cuts):
        save_file({"x": value[start:stop].clone()}, tmp_path / file_name(part, 4))
    (tmp_path / SHARDED_INDEX).write_text(json.dumps({"parts": 4, "tensors": {"x": {"shape": [5, 2], "rows": cuts}}}))
    stored = ShardedTensors(tmp_path)
    read = [stored.rows("x", *shard_rows(5, part, readers)) for part in range(readers)]
    assert torch.equal(torch.cat(read), value) and torch.equal(stored["x"], value)
    assert [len(part) for part in read] == [stop - start for start, stop in (shard_rows(5, p, readers) for p in range(readers))]


# Crashes. What follows a crash is nothing: every later call raises too, `except` and `finally` notwithstanding.


class Crash(BaseException):
    pass


CALLS = ("mkdir", "rename", "fsync", "unlink", "rmdir")


@contextmanager
def crash_at(monkeypatch, call: int, root: Path):
    """The call-th file-system call, and all after it, raise. Then what was written and never synced is lost."""
    counted, crashed, synced = [0], [], {path.stat().st_ino for path in root.rglob("*")}

    def counting(real, name):
        def act(*args, **keywords):
            counted[0] += 1
            if counted[0] >= call:
                raise Crash(f"{name} {args}")
            if name == "fsync":
                synced.add(os.fstat(args[0]).st_ino)
            result = real(*args, **keywords)
            if name == "write_text":
                synced.discard(args[0].stat().st_ino)  # the number may have been another file's
            return result

        return act

    with monkeypatch.context() as patched:
        for name in CALLS:
            patched.setattr(os, name, counting(getattr(os, name), name))
        patched.setattr(Path, "write_text", counting(Path.write_text, "write_text"))
        try:
            yield crashed
        except Crash:
            crashed.append(call)
    for path in root.rglob("*"):
        if path.is_file() and path.stat().st_ino not in synced:
            os.truncate(path, 0)


def small(folder):
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_text(folder.name)


def save(run, step, *, best):
    folder = write_checkpoint(run, step, small)
    if best:
        write_pointer(run, "best", folder, loss=1.0)
    write_pointer(run, "last", folder)
    prune(run, keep=1)


def old_run(root):
    run = root / "run"
    run.mkdir()
    save(run, 1, best=True)
    save(run, 2, best=False)
    (run / "checkpoints" / ".making-step-3").mkdir()  # of a kill before
    small(run / "checkpoints" / ".making-step-3")
    return run


def broken_run(root):
    """Step 3 is there and broken; a resume from step 2 comes to it again."""
    run = old_run(root)
    write_checkpoint(run, 3, small)
    (run / "checkpoints" / "step-3" / "weights").unlink()
    return run


@pytest.mark.parametrize("make", [old_run, broken_run])
def test_a_crash_at_any_call_leaves_a_whole_checkpoint(make, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # counted below; the disk itself need not be waited for
    crashes, found = 0, set()
    while True:
        root = tmp_path / str(crashes)
        root.mkdir()
        run = make(root)
        with crash_at(monkeypatch, crashes + 1, root) as crashed:
            save(run, 3, best=True)
        if not crashed:
            break  # that was the last call
        crashes += 1
        latest = latest_verified(run, lambda _: None)
        found.add(latest.name)
        assert latest.name in ("step-2", "step-3")
        verify(resolve(run))  # best, or last where best is not there
        for folder in checkpoints(run):
            if folder.name != "step-3" or make is old_run:
                verify(folder)  # none of them is half of one
        if latest.name == "step-2":  # what a resume does: step 3 once more
            save(run, 3, best=True)
        else:
            restore_pointers(run, latest, {"step": 3, "loss": 1.0})
        save(run, 4, best=False)
        assert steps_of(run) == [4, 3] and read_pointer(run, "best").name == "step-3"
        assert nothing_half_made(run)
    assert crashes >= 20 and found == {"step-2", "step-3"}


def test_mutant_that_does_not_sync_loses_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train.runs.checkpoint, "sync", lambda path: None)
    latest = []
    for call in range(1, 15):
        root = tmp_path / str(call)
        root.mkdir()
        run = old_run(root)
        with crash_at(monkeypatch, call, root):
            save(run, 3, best=True)
        try:
            verify(checkpoints(run)[0])
        except CheckpointError:
            latest.append(call)
    assert latest


@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync", "write"])
def test_an_error_while_saving_leaves_nothing_half_made(call, tmp_path, monkeypatch):
    run = old_run(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        if call != "write":
            patched.setattr(os, call, full)
        write_checkpoint(run, 3, full if call == "write" else small)
    assert steps_of(run) == [2, 1] and nothing_half_made(run)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(os, "fsync", full)
        write_atomically(run / "last.json", "{}")
    assert read_pointer(run, "last").name == "step-2" and nothing_half_made(run)


def test_files_in_subfolders_are_of_the_checkpoint(tmp_path):
    """Chat templates of a folder have one of their own."""

    def write(folder):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_text("a template")

    folder = write_checkpoint(tmp_path, 1, write)
    verify(folder)
    for damage in (flip_bit, remove):
        damage(folder / "additional_chat_templates" / "tool.jinja")
        with pytest.raises(CheckpointError, match=r"additional_chat_templates/tool\.jinja"):
            verify(folder)
