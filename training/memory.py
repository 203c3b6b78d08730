"""Memory that is kept: on Linux, a step of a network on a CPU is otherwise spent on the kernel's zeros."""

import ctypes
import platform

# Numbers of glibc's malloc.h: what mallopt sets.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEPT = 2**31 - 1  # bytes at the end of the heap above which some are given back
AT_ONCE = 100_000_000  # bytes that the heap grows by


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for this process and the workers it starts. Elsewhere nothing happens.

    By default it maps every block above 32 MB, and at first every one above 128 kB, from the kernel and gives it back when
    it is freed, so that the kernel zeroes all pages again for the next layer or the next image. The price is that a process
    keeps the most it has ever needed.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEPT), (M_TOP_PAD, AT_ONCE)):
            mallopt(option, value)
