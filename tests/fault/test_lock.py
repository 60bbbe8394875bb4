"""Two live runs into one folder: the second is refused, and the first one's end, however it comes, frees the folder."""

import os
import signal

import pytest

from tests.runs import assert_same_end, command, process, wait_for_step
from train.runs.errors import TrainError
from train.runs.lock import locked


def test_a_second_live_run_is_refused(options, finished, tmp_path):
    run = tmp_path / "run"
    with process(*options, "--optimizer", "muon", "--out", run) as running:
        wait_for_step(running, run, 10)
        running.send_signal(signal.SIGSTOP)  # so that it is alive for as long as this takes
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for second in (("--resume", run), (*options, "--out", run)):
            said = command(*second)
            assert said.code == 2 and str(run) in said.err and "still going" in said.err, said
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        running.send_signal(signal.SIGCONT)
        running.kill()
        running.wait()
    said = command("--resume", run)
    assert said.code == 0, said.err
    assert_same_end(run, finished)


def test_the_lock_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "a" / "run"
    with locked(folder):
        assert folder.is_dir()
        with pytest.raises(TrainError, match="still going"), locked(folder):
            pass
        assert folder.is_dir()
    assert not folder.exists()
    folder.mkdir()
    with locked(folder):
        pass
    assert folder.is_dir()  # another made it
    with locked(folder):
        (folder / "kept").touch()
    assert os.listdir(folder) == ["kept"]
    with locked(folder):
        pass
    assert folder.is_dir()
