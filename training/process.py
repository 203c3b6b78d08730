"""Around every command: its words fit any terminal, what stops it is one line, and all its processes end together."""

import ctypes
import errno
import functools
import io
import os
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from .engine import lock
from .engine.sgd_trainer import REQUEUE
from .errors import DataError, data_reason, first_line, one_line, visible

INTERRUPTED = 130  # exit status after Ctrl-C where nothing had to be saved: 128 + SIGINT
CURSOR_UP = "\x1b[A"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The main process may still publish, which takes as long as its network needs, while the others have nothing left to do.
PATIENCE = timedelta(days=30)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # options of mallopt, numbered as in glibc's malloc.h
LARGEST_FREE_TOP = 2**31 - 1  # bytes: glibc returns memory where more than this is free at the end of the heap
HEAP_GROWTH = 100_000_000  # bytes by which the heap grows


def command(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """A command that ends in order.

    - After Ctrl-C, on a full disk, and where images are gone it says one line; a run that is training saves first
      (`SaveAndStop`).
    - Its processes leave their group together before Python finalizes: a thread of Gloo that then still wants the
      interpreter aborts the process.
    - It has let go of its folders when it returns.
    """

    @functools.wraps(main)
    def run(argv: list[str]) -> None:
        _show_any_character()
        if warning := _of_restarts(os.environ):
            print(warning, file=sys.stderr)
        try:
            with redirect_stdout(_Visible(sys.stdout)), redirect_stderr(_Visible(sys.stderr)):
                main(argv)
            _leave_together()
        except SystemExit as end:
            if end.code == REQUEUE:  # of all processes
                _leave_together()
            elif end.code:
                _end_alone(int(end.code))
            raise
        except KeyboardInterrupt:
            if int(os.environ.get("RANK", "0")) == 0:
                print("Interrupted. What was complete is kept; give the same command again.", file=sys.stderr)
            _end_alone(INTERRUPTED)
        except DataError as error:  # after the training, whose own are caught there
            print(f"error: {one_line(data_reason(error))}. Give the same command again", file=sys.stderr)
            _end_alone(2)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _tells_of_a_full_disk(error):
                raise
            print(f"error: {_full_disk(error)}", file=sys.stderr)
            _end_alone(2)
        finally:
            lock.give_back()

    return run


class _Visible:
    """A stream on which names of files and classes move nothing: what a terminal would obey is escaped.

    Args:
        stream: all else is left to it.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        lines = text.split(CURSOR_UP)  # of a progress bar
        return int(self.stream.write(CURSOR_UP.join(visible(line, kept="\n\r\t") for line in lines)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _show_any_character() -> None:
    # Names of classes and files may have characters that the encoding of a terminal or a log lacks.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leave_together() -> None:
    if not dist.is_initialized():
        return
    try:
        group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        dist.barrier(group)
    except RuntimeError:  # another process has failed, and has said why
        _end_alone(1)
    dist.destroy_process_group()


def _end_alone(status: int) -> None:
    """End this process, whatever the others do, and without waiting for them."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of the group may not live to see Python finalize, and leaving it waits for the others.
        os._exit(status)
    raise SystemExit(status) from None


def _of_restarts(env: Mapping[str, str]) -> str | None:
    # torch gives the processes that it starts again the store of the first ones, with their addresses in it.
    restarts, rank = int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")), int(env.get("RANK", "0"))
    if restarts == 0 or rank > 0 or env.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1":
        return None
    return (
        f"warning: max_restarts ({restarts}) needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before the launcher, or processes that "
        "are started again may look for the old ones and fail (Gloo connectFullMesh failed)"
    )


def _tells_of_a_full_disk(error: Exception) -> bool:
    # safetensors and torch have the number in their words alone.
    return getattr(error, "errno", None) in DISK_FULL or any(f"os error {code})" in str(error) for code in DISK_FULL)


def _full_disk(error: Exception) -> str:
    place = getattr(error, "filename", None) or next(reversed(lock.held()), None)
    disk = "the disk" if place is None else f"the disk of {place} (mounted at {_mount(Path(str(place)))})"
    return (
        f"{disk} is full, or no larger file may be written to it ({first_line(error)}): make room there and give the "
        "same command again"
    )


def _mount(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if os.path.ismount(folder))


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
