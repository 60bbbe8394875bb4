"""New memory in pages of 2 MiB, where Linux gives them to who asks."""

import ctypes
import mmap
from functools import cache

from torch import Tensor

SMALL, LARGE = mmap.PAGESIZE, 1 << 21  # bytes


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for large pages for a tensor that is not written yet, if it is large and on a CPU; the tensor.

    New memory costs a trap into the system at each page's first touch. Measured for 64 MiB on two threads: filling it 29 ms in
    pages of 4 KiB, 6 in large ones; unpacking 4,096 × 4,096 numbers of four bits into it 49 and 24. Elsewhere it does nothing.
    """
    ask = advise()
    if ask is not None and tensor.device.type == "cpu" and tensor.nbytes >= 2 * LARGE:
        begin = -(-tensor.data_ptr() // SMALL) * SMALL
        ask(begin, (tensor.data_ptr() + tensor.nbytes - begin) // SMALL * SMALL, mmap.MADV_HUGEPAGE)
    return tensor


@cache
def advise():
    """The system's madvise(address, length, advice), or None."""
    try:
        ask = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    ask.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return ask if hasattr(mmap, "MADV_HUGEPAGE") else None
