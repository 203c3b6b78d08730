"""What stops a run or holds it up from outside: signals, the end of its launcher, another process that hangs.

The workers of its loaders live on until the step is done.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from modeling_moco.distributed_moco import rank, world_size

# Each means: save and stop. SIGTERM: preemption, end of a job's time; SIGINT: Ctrl-C; SIGHUP: the terminal is gone.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OURS = Path(__file__).parents[1]
PARENT = os.getppid()  # when this program was started
LONG = 60.0  # seconds of a step after which several processes say where they are


class SaveAndStop(TrainerCallback):
    """After the step in which any process gets one of `STOPS`, or loses the launcher that started it, save and stop.

    A second SIGINT ends a process at once. Without their launcher (killed, out of memory) processes would train on where
    nobody sees or stops them, and hold the folder; torch's own ends its processes itself in all other cases.

    Attributes: `stopped_by`, the signal that stopped the run, if any; SIGHUP where it was the end of the launcher.
    """

    def __init__(self):
        self.stopped_by: signal.Signals | None = None
        self._received = 0
        self._terminals: list[int] = []
        self._launcher: int | None = None
        self._group: Any = None

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """While this is entered the signals are received; afterwards they do what they did before."""
        self.stopped_by, self._received = None, 0
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        self._launcher = PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None
        previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                # One that is ignored stays so: Ctrl-C in the background of a shell, SIGHUP under nohup.
                if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                    previous[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number, frame):
        self._received = number  # SIGTERM again and again: launchers forward what their processes get anyway
        if number == signal.SIGHUP:
            self._let_go_of_the_terminal()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which acts in the middle of an operation too
            if rank() == 0:  # not by print, which the signal may have interrupted
                os.write(
                    2, b"\nCtrl-C: saving after this step, then stopping. Once more ends at once, without saving.\n"
                )

    def _let_go_of_the_terminal(self) -> None:
        # Nothing can be written to one that is gone: the error would end the run before it has saved.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in self._terminals:
            os.dup2(nowhere, stream)
        os.close(nowhere)

    def on_train_begin(self, args, state, control, **kwargs):
        if world_size() > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")  # on the CPU: the GPUs need not be waited for

    def on_step_end(self, args, state, control, **kwargs):
        if self._launcher not in (None, os.getppid()):
            self._received = self._received or signal.SIGHUP
        received = torch.tensor(int(self._received), device="cpu")
        if self._group is not None:
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self._group)  # all stop after the same step
        if received and state.global_step < state.max_steps:  # else the run is about to end by itself
            self.stopped_by = signal.Signals(int(received))
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped_by:  # it may not be the end of an epoch, and time is short
            control.should_evaluate = control.should_save = False


class TellOfLongSteps(TrainerCallback):
    """Where a step of several processes takes long, each says where it is: one that hangs keeps the others waiting for ever.

    Args:
        seconds: of a step, after which this is said; each time twice as many as before.
    """

    def __init__(self, seconds: float = LONG):
        self.seconds = seconds
        self._timer: threading.Timer | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.close()
        if world_size() > 1:
            self._timer = threading.Timer(self.seconds, self._say, (state.global_step + 1, threading.get_ident()))
            self._timer.daemon = True
            self._timer.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _say(self, step: int, thread: int) -> None:
        print(
            f"process {rank()}: step {step} has taken {self.seconds:g} s so far, in {_place(thread)}. One that hangs keeps all "
            "others waiting; it says nothing, or is elsewhere",
            file=sys.stderr,
        )
        self.seconds *= 2


def _place(thread: int) -> str:
    """The innermost function of this project that a thread is in."""
    stack = traceback.extract_stack(sys._current_frames()[thread])
    place = [
        frame for frame in stack if Path(frame.filename).parent.is_relative_to(OURS) or "_moco.py" in frame.filename
    ][-1]
    return f"{place.name} ({Path(place.filename).name}, line {place.lineno})"


def outlive_signals(worker: int) -> None:
    """For the workers of a DataLoader: what stops a run reaches them too, but the step under way needs their images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere nobody can tell who sent a signal, and such a run ends without a last save
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_parent_says_so, daemon=True).start()


def _exit_when_parent_says_so() -> None:
    # The parent sends SIGTERM to end a worker, and would wait for ever for one that ignored it.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
