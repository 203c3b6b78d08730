"""One owner at a time for the folder of a run, by a lock of the operating system, which ends with its process.

It is a POSIX record lock and not flock(2): workers that a process forks do not share it, so that it ends with the process
even where they live on for some seconds, and NFS has it on all machines.
"""

import errno
import json
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

from .run_folder import LOCK

if sys.platform != "win32":
    import fcntl

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# File descriptors by folder. Only these may be open: a process that closes any other of the same file loses the lock.
_held: dict[Path, int] = {}


def take(folder: Path) -> None:
    """Make a folder this process's own, until `give_back` or the end of the process, however that ends.

    A file system without locks is named in a warning, and a second run there goes unnoticed.

    Raises:
        ValueError: another process has it.
        OSError: its lock file cannot be written, or is a link.
    """
    if sys.platform == "win32" or folder.resolve() in _held:
        return
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(descriptor, 4096)
        os.close(descriptor)
        if error.errno in NO_LOCKS:
            print(
                f"warning: the file system of {folder} has no locks ({error}): start no second run in it",
                file=sys.stderr,
            )
            return
        raise ValueError(
            f"output_dir ({folder}) is in use by {_name(owner)}: wait for it to end, stop it there by `kill PID`, which "
            "saves what it has trained, or name another folder"
        ) from error
    _held[folder.resolve()] = descriptor
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)


def give_back() -> None:
    """Let go of all folders."""
    while _held:
        _, descriptor = _held.popitem()
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def held() -> list[Path]:
    """Folders that are this process's own, the newest last."""
    return list(_held)


def _name(owner: bytes) -> str:
    try:
        about = json.loads(owner)
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except ValueError:  # it has not written its name yet
        return "another process"
