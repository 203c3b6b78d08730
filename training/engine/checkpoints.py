"""Checkpoints that are whole or do not count, and which one a run continues from.

A checkpoint counts from the moment that its manifest, written last, is there and the files have the sizes that it lists.
"""

import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from modeling_moco.distributed_moco import world_size

from .run_folder import MANIFEST, SAVED_RECIPE, check_same_run, write_json, write_recipe


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
    write_json(checkpoint / MANIFEST, {"files": sizes, "division": asdict(division)}, durable=True)


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


def claim_output_dir(
    training: TrainingArguments,
    division: Division | None,
    settings: dict[str, dict[str, Any]],
    about: dict[str, str],
) -> str | None:
    """Make the output directory this run's own.

    An empty one gets `about` and `settings` as `recipe.yaml`. One that holds the same run is continued.

    Args:
        division: how the run divides its images; None for one without checkpoints.

    Returns:
        the checkpoint to continue from, if any.

    Raises:
        ValueError: the directory holds another run, or something else.
    """
    folder = Path(str(training.output_dir))
    saved = folder / SAVED_RECIPE
    with training.main_process_first(local=False, desc="claiming the output directory"):
        checkpoint = None
        if saved.is_file() and len(list(folder.iterdir())) > 1:  # alone, it is what a crash at the start left
            check_same_run(folder, settings)
            checkpoint = None if division is None else _checkpoint_of(folder, training, division)
        elif training.process_index == 0:
            write_recipe(folder, {"about": about} | settings)
    _check_same_view(folder, checkpoint)
    return checkpoint


def _checkpoint_of(folder: Path, training: TrainingArguments, division: Division) -> str | None:
    checkpoint, remarks = newest_complete(folder)
    if checkpoint is not None:
        remarks += filter(None, [check_division(checkpoint, division)])
    if training.process_index == 0:
        for remark in remarks:
            print(f"warning: {remark}", file=sys.stderr)
    return None if checkpoint is None else str(checkpoint)


def _check_same_view(folder: Path, checkpoint: str | None) -> None:
    if world_size() == 1:
        return
    seen: list[str | None] = [None] * world_size()
    dist.all_gather_object(seen, checkpoint)
    if len(set(seen)) > 1:
        raise ValueError(
            f"output_dir ({folder}) has {seen[0] or 'no checkpoint'} for the first process and not for all others: pass a "
            "folder that all machines share"
        )
