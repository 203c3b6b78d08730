"""SIGTERM saves and stops a run; the workers of its loaders live on until the step is done."""

import os
import signal
import sys
import threading
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from modeling_moco.distributed_moco import world_size


class SaveOnSigterm(TrainerCallback):
    """After the step in which any process gets a SIGTERM (preemption, end of a job's time), save and stop."""

    def __init__(self):
        self.stopped = False
        self._received = False
        self._group: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped = self._received = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        if world_size() > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")  # on the CPU: the GPUs need not be waited for

    def _receive(self, number, frame):
        self._received = True  # again and again: launchers forward what their processes get anyway

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor(self._received, device="cpu")
        if self._group is not None:
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self._group)  # all stop after the same step
        if received and state.global_step < state.max_steps:  # else the run is about to end by itself
            self.stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # it may not be the end of an epoch, and time is short
            control.should_evaluate = control.should_save = False

    def on_train_end(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)


def outlive_sigterm(worker: int) -> None:
    """For the workers of a DataLoader: a job's SIGTERM reaches them too, but the step under way needs their images."""
    if sys.platform == "linux":  # elsewhere nobody can tell who sent a signal, and such a run ends without a last save
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_parent_says_so, daemon=True).start()


def _exit_when_parent_says_so() -> None:
    # The parent sends SIGTERM to end a worker, and would wait for ever for one that ignored it.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
