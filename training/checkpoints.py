"""Checkpoints that are whole or do not count, whether a run may go on from one, and a last one on SIGTERM.

A checkpoint counts from the moment that its manifest, written last, is there and the files have the sizes that it lists.
"""

import json
import math
import os
import shutil
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from modeling_moco.distributed_moco import world_size

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Division:
    """How a run's images are divided: what decides which images the next step sees.

    Args:
        processes, per_device_batch, accumulation: their product is the global batch.
        images: in an epoch.
        workers: per process, for a stream, whose order hangs on them; None for indexed images.
        epoch: passes over the images so far.
    """

    processes: int
    per_device_batch: int
    accumulation: int
    images: int
    workers: int | None
    epoch: float = 0.0

    @property
    def global_batch(self) -> int:
        return self.processes * self.per_device_batch * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.images // (self.processes * self.per_device_batch) / self.accumulation)


def seal(checkpoint: Path, division: Division) -> None:
    """Declare a checkpoint complete. Everything in it must have been written."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    for path in [*files, checkpoint]:  # or a machine that loses power could keep the manifest alone
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    unfinished = checkpoint / f"{MANIFEST}.tmp"
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump({"files": sizes, "division": asdict(division)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(checkpoint / MANIFEST)


def flaw(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None for a complete one."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return "it was not written to the end"
    try:
        sizes = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return f"its {MANIFEST} cannot be read"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return None


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete all checkpoints but the newest `limit` complete ones and the best one; none without a limit."""
    if limit is None:
        return
    checkpoints = _by_step(output_dir)
    keep = [checkpoint for checkpoint in checkpoints if flaw(checkpoint) is None][-limit:]
    for checkpoint in checkpoints:
        if checkpoint not in keep and (best is None or checkpoint != Path(best)):
            shutil.rmtree(checkpoint, ignore_errors=True)


def _by_step(output_dir: Path) -> list[Path]:
    return [Path(path) for path in sort_checkpoints(str(output_dir), PREFIX_CHECKPOINT_DIR)]


def newest_complete(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, and a sentence for every newer one that is damaged."""
    damaged: list[str] = []
    for checkpoint in reversed(_by_step(output_dir)):
        wrong = flaw(checkpoint)
        if wrong is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint} is damaged ({wrong}) and passed over")
    return None, damaged


def check_division(checkpoint: Path, now: Division) -> str | None:
    """Whether a run divided like `now` can go on from a checkpoint.

    Returns:
        None for the same division, else a sentence that says what changes.

    Raises:
        ValueError: what follows would be undefined.
    """
    then = Division(**json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["division"])
    if then.global_batch != now.global_batch:
        raise ValueError(
            f"{checkpoint} was trained with a global batch of {then.global_batch} ({_product(then)}), this run has "
            f"{now.global_batch} ({_product(now)}): its place in the epoch and its rate count in such batches. Launch it "
            "with the same global batch, or pass another --output_dir"
        )
    if (then.images, then.steps_per_epoch) != (now.images, now.steps_per_epoch):
        raise ValueError(
            f"{checkpoint} was trained in epochs of {then.steps_per_epoch:,} steps of {then.images:,} images "
            f"({_product(then)}), this run has epochs of {now.steps_per_epoch:,} steps of {now.images:,} images "
            f"({_product(now)}): its place would be another. Launch it as before, or pass another --output_dir"
        )
    same_readers = (then.processes, then.workers) == (now.processes, now.workers)
    if now.workers is not None and not same_readers and then.epoch != int(then.epoch):
        raise ValueError(
            f"{checkpoint} lies within an epoch of a stream read by {_readers(then)}, this run has {_readers(now)}: which "
            "images are left would be undefined. Launch it as before, or continue from the end of an epoch"
        )
    if _product(then) != _product(now):
        return (
            f"{checkpoint} was trained on {_product(then)}, this run on {_product(now)}: every step has as many images as "
            "before, but BatchNorm normalises them in other groups"
        )
    return None


def _product(division: Division) -> str:
    return f"{division.processes} processes x {division.per_device_batch} images x {division.accumulation} accumulated"


def _readers(division: Division) -> str:
    return f"{division.processes} processes x {division.workers} workers"


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
