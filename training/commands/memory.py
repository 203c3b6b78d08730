"""Keep freed memory: glibc returns large buffers to the kernel, which zeroes them again for the next layer."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # options of mallopt, numbered as in glibc's malloc.h
LARGEST_FREE_TOP = 2**31 - 1  # bytes: glibc returns memory where more than this is free at the end of the heap
HEAP_GROWTH = 100_000_000  # bytes by which the heap grows


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, in this process and the workers that it starts. Without glibc this does nothing.

    By default glibc maps each block above 32 MB (at first above 128 kB) from the kernel and unmaps it when it is freed. The
    kernel then zeroes all its pages again for the next layer or image, which costs much of a training step on a CPU. In
    exchange, a process keeps the largest amount of memory that it has ever used.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST_FREE_TOP), (M_TOP_PAD, HEAP_GROWTH)):
            mallopt(option, value)
