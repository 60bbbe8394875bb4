"""One live run a folder: two that write into one would each spoil what the other keeps."""

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.shell import command
from train.config import TrainError
from train.config_toml import read_settings

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


LEFT = {".config.toml"}  # by a run that was killed while it wrote its first file


def refuse_taken(out: Path) -> None:
    """Refuse a folder that a new run cannot have: another run's, or one with any files."""
    if all(path.name in LEFT for path in out.iterdir()):
        return
    try:
        read_settings(out)
    except TrainError:
        raise TrainError(f"--out {out} is there already, and is not an empty folder") from None
    raise TrainError(f"{out} already holds a run: go on, `{command('train', '--resume', out)}`, or choose another --out")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, made if need be, for this process. The kernel lets go of it however the process ends.

    A folder that was made for this and is still empty afterwards goes again. Where a file system has no locks (some
    network ones), nothing is held.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"{folder} cannot be made ({error.strerror}): choose another --out") from None
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise TrainError(
                        f"{folder} is being written by a run that is still going: wait for its end, stop it, or choose "
                        "another --out"
                    ) from None
        yield
    finally:
        if fcntl:
            os.close(descriptor)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def unused(path: Path) -> Path:
    """The path, or where a run of the same second has it, one with a number."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(other for other in numbered if not other.exists())
