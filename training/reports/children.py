"""Commands of this project as processes of their own, which stop in order when this one is told to."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..cli import script_here

PACKAGE = __name__.partition(".")[0]  # moco_hf in an installation
PATIENCE = 60  # seconds for what a launcher has left behind
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def program(module: str) -> list[str]:
    """What python or a launcher of processes is given to start a command.

    Args:
        module: of `commands`, whose last word is the name of its script.
    """
    script = script_here(module.rpartition(".")[2])
    if PACKAGE == "training" and Path(script).is_file():
        return [script]
    return ["-m", f"{PACKAGE}.commands.{module}"]


class Children:
    """Starts commands one after the other, each in a group of processes of its own.

    Ctrl-C, SIGTERM and SIGHUP are passed on to the whole group, once each time, and no further command starts. Where a launcher
    ends at once, what it has started is waited for.

    Attributes: `stopped_by`, the signal that was received, if any.
    """

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self._group: int | None = None
        self._waiting: int | None = None  # a signal that came while a command was being started

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """While this is entered the signals are received; afterwards they do what they did before."""
        previous: dict[signal.Signals, Any] = {}
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a shell
                previous[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self.stopped_by = signal.Signals(number)
        if self._group is None:
            self._waiting = number
        else:
            self._send(self._group, number)

    def run(self, words: list[str]) -> int:
        """Run a command to its end.

        Returns:
            its exit status, or minus the signal that ended it or kept it from being started.
        """
        if self.stopped_by is not None:
            return -self.stopped_by
        sys.stdout.flush()
        child = subprocess.Popen(words, process_group=0)
        self._group = child.pid
        if self._waiting is not None:
            self._send(self._group, self._waiting)
        status = child.wait()
        until = time.monotonic() + PATIENCE
        while self.stopped_by is not None and self._send(child.pid, 0) and time.monotonic() < until:
            time.sleep(0.1)
        self._group = None
        return status

    @staticmethod
    def _send(group: int, number: int) -> bool:
        """Whether there was a process to get it."""
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return False
        return True


def in_words(command: list[str]) -> str:
    """A command for a shell."""
    return shlex.join(["python" if word == sys.executable else word for word in command])
