"""A function called in two processes that can talk to one another by gloo."""

import faulthandler
import os
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing as mp

LONGEST = 600  # seconds


def in_two_ranks(function: Callable[[int, Path], None], folder: Path) -> None:
    """function(rank, folder) in each; an error in one of them is raised here."""
    mp.spawn(_alone, (function, folder), nprocs=2)


def _alone(rank: int, function: Callable[[int, Path], None], folder: Path) -> None:
    faulthandler.dump_traceback_later(LONGEST, exit=True)  # a deadlock says where it stands
    function(rank, folder)
    # gloo's threads may still be giving tensors back, for which they ask the interpreter; one that is about to end aborts
    # the process ("terminate called without an active exception"): once in some hundred runs on a busy machine.
    os._exit(0)
