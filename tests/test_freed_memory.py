"""Freed memory is kept."""

import platform
import subprocess
import sys

import pytest

PAGES = """
import ctypes, resource, sys
from training.process import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
libc, size = ctypes.CDLL(None), 64_000_000
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for round in range(5):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    if round == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.slow
def test_a_large_block_is_zeroed_once():
    faults = {}
    for mode in ("kept", "given back"):
        result = subprocess.run([sys.executable, "-c", PAGES, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(result.stdout)
    assert faults["given back"] > 10_000  # four times 64 MB in pages of 4 kB, or the test would show nothing
    assert faults["kept"] < 100
