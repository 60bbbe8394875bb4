"""Huge pages (2 MiB) for new memory, where Linux grants them on request."""

import ctypes
import mmap
from functools import cache

from torch import Tensor

SMALL, LARGE = mmap.PAGESIZE, 1 << 21  # bytes


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """Request huge pages for a large CPU tensor that has not been written yet, and return it.

    New memory costs a page fault at each page's first touch. Measured for 64 MiB on two threads: filling it takes 29 ms in
    pages of 4 KiB, 6 in huge pages; unpacking 4,096 × 4,096 4-bit numbers into it 49 and 24. Elsewhere this does nothing.
    """
    madvise = find_madvise()
    if madvise is not None and tensor.device.type == "cpu" and tensor.nbytes >= 2 * LARGE:
        begin = -(-tensor.data_ptr() // SMALL) * SMALL
        madvise(begin, (tensor.data_ptr() + tensor.nbytes - begin) // SMALL * SMALL, mmap.MADV_HUGEPAGE)
    return tensor


@cache
def find_madvise():
    """Return the C library's madvise(address, length, advice), or None without it."""
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise if hasattr(mmap, "MADV_HUGEPAGE") else None
