"""One live run a folder: two that write into one would each spoil what the other keeps."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.config import TrainError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, made if need be, for this process. The kernel lets go of it however the process ends.

    A folder that was made for this and is still empty afterwards goes again. Where a file system has no locks (some
    network ones), nothing is held.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
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
