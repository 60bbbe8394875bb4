"""A lock on a run's folder: two live runs in one folder would overwrite each other's files."""

import errno
import itertools
import os
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.shell import command
from train.runs.checkpoint import SETTINGS
from train.runs.errors import TrainError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


LEFTOVERS = {".config.toml"}  # of a run that was killed while it wrote its first file


def refuse_taken(out: Path) -> None:
    """Refuse a new run's folder that has another run or other files in it (TrainError)."""
    if all(path.name in LEFTOVERS for path in out.iterdir()):
        return
    if not is_run(out):
        raise TrainError(f"--out {out} is there already, and is not an empty folder")
    raise TrainError(f"{out} already holds a run: go on, `{command('train', '--resume', out)}`, or choose another --out")


def refuse_unwritable(out: Path) -> None:
    """Refuse a run's folder that cannot be made or written (TrainError). What is made for the test is removed again."""
    try:
        if out.is_dir():
            Path(tempfile.mkdtemp(prefix=".touchstone-", dir=out)).rmdir()
            return
        missing = out
        while not missing.parent.exists():
            missing = missing.parent
        missing.mkdir()
    except OSError as error:
        raise TrainError(f"{out} cannot be made ({error.strerror}): choose another --out") from None
    with suppress(OSError):  # another run may have begun in it
        missing.rmdir()


def is_run(folder: Path) -> bool:
    """True where config.toml can be read and has a table [run]."""
    try:
        return isinstance(tomllib.loads((folder / SETTINGS).read_text(encoding="utf-8")).get("run"), dict)
    except (OSError, ValueError):
        return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder if need be, and lock it for this process. The kernel releases the lock however the process ends.

    A folder that was created here and is still empty at the end is removed. On a file system without locks (some network
    ones) nothing is locked.
    """
    is_new = not folder.exists()
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
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def unused(path: Path) -> Path:
    """A path that does not exist yet: the given one, with a number appended if needed."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(other for other in numbered if not other.exists())
