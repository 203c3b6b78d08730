"""SIGTERM and Ctrl-C save and stop a run; the workers of its loaders live on until the step is done."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from modeling_moco.distributed_moco import rank, world_size


class SaveAndStop(TrainerCallback):
    """After the step in which any process gets a SIGTERM (preemption, end of a job's time) or a SIGINT (Ctrl-C), save and stop.

    A second SIGINT ends a process at once.

    Attributes: `stopped_by`, the signal that stopped the run, if any.
    """

    def __init__(self):
        self.stopped_by: signal.Signals | None = None
        self._received = 0
        self._group: Any = None

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """While this is entered the signals are received; afterwards they do what they did before."""
        self.stopped_by, self._received = None, 0
        previous = {}
        if threading.current_thread() is threading.main_thread():
            previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._receive)
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a shell
                previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._receive)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number, frame):
        self._received = number  # SIGTERM again and again: launchers forward what their processes get anyway
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which acts in the middle of an operation too
            if rank() == 0:  # not by print, which the signal may have interrupted
                os.write(
                    2, b"\nCtrl-C: saving after this step, then stopping. Once more ends at once, without saving.\n"
                )

    def on_train_begin(self, args, state, control, **kwargs):
        if world_size() > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")  # on the CPU: the GPUs need not be waited for

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor(int(self._received), device="cpu")
        if self._group is not None:
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self._group)  # all stop after the same step
        if received and state.global_step < state.max_steps:  # else the run is about to end by itself
            self.stopped_by = signal.Signals(int(received))
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped_by:  # it may not be the end of an epoch, and time is short
            control.should_evaluate = control.should_save = False


def outlive_signals(worker: int) -> None:
    """For the workers of a DataLoader: a job's SIGTERM and Ctrl-C reach them too, but the step under way needs their images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere nobody can tell who sent a signal, and such a run ends without a last save
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_parent_says_so, daemon=True).start()


def _exit_when_parent_says_so() -> None:
    # The parent sends SIGTERM to end a worker, and would wait for ever for one that ignored it.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
