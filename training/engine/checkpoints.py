"""Checkpoints that are complete or do not count, and which one a run continues from.

A checkpoint counts from the moment that its manifest, written last, is there and the files have the sizes that it lists.
"""

import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_moco.distributed_moco import rank, world_size

from ..errors import one_line
from . import lock
from .files import check_model_files, inside, read_json, write_json
from .run_folder import (
    DATASET,
    MANIFEST,
    check_free,
    check_same_data,
    check_same_run,
    ended,
    has_begun,
    refuse_inside,
    write_recipe,
)

T = TypeVar("T")


@dataclass(frozen=True)
class BatchLayout:
    """How a run divides its images into batches, which decides which images the next step sees.

    Args:
        processes, per_device_batch_size, accumulation: their product is the global batch.
        images: in an epoch.
        workers: per process, for a stream, whose order depends on them; None for indexed images.
        epoch: passes over the images so far.
    """

    processes: int
    per_device_batch_size: int
    accumulation: int
    images: int
    workers: int | None
    epoch: float = 0.0

    @property
    def global_batch_size(self) -> int:
        return self.processes * self.per_device_batch_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.images // (self.processes * self.per_device_batch_size) / self.accumulation)


class CompleteCheckpoints(TrainerCallback):
    """Makes a checkpoint count when all processes have written their part of it, and deletes older ones then.

    Args:
        layout: gives the layout of the run when a checkpoint is complete.
    """

    def __init__(self, layout: Callable[[], BatchLayout]):
        self.layout = layout
        self.limit: int | None = None  # newest checkpoints to keep; None for all
        self._begun: Path | None = None
        self._saved_at: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._begun = self._saved_at = None

    def begin(self, checkpoint: Path) -> None:
        """Make a checkpoint's folder, without what a killed process left of it. Call it on all processes before any writes.

        Raises:
            OSError: it cannot be made.
        """
        self._begun = checkpoint
        if rank() == 0:
            if checkpoint.is_symlink():
                checkpoint.unlink()
            shutil.rmtree(checkpoint, ignore_errors=True)
            checkpoint.mkdir(parents=True)
        _wait()

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._saved_at == state.global_step:  # at the end of the step already
            control.should_save = False

    def on_save(self, args, state, control, **kwargs):
        _wait()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_manifest(checkpoint, self.layout())
            rotate(checkpoint.parent, self.limit, state.best_model_checkpoint)
        self._begun, self._saved_at = None, state.global_step

    def explain(self, error: Exception) -> str | None:
        """Say that an error kept a checkpoint from being written, and remove what there is of it; None for another error."""
        if self._begun is None:
            return None
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's for a full disk
            return None
        if rank() == 0:
            shutil.rmtree(self._begun, ignore_errors=True)
        return f"{self._begun} could not be written ({error})"


def _wait() -> None:
    if world_size() > 1:
        dist.barrier()


def write_manifest(checkpoint: Path, layout: BatchLayout) -> None:
    """Declare a checkpoint complete. Everything in it must have been written."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    for path in [*files, checkpoint]:  # or a machine that loses power could keep the manifest alone
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    write_json(checkpoint / MANIFEST, {"files": sizes, "batch_layout": asdict(layout)}, durable=True)


def find_defect(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None for a complete one."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return "it was not written to the end"
    try:
        sizes, _ = _read_manifest(checkpoint)
    except ValueError:
        return f"its {MANIFEST} cannot be read"
    if checkpoint.is_symlink():
        return "it is a link"
    try:
        check_model_files(checkpoint)
        for path in (*checkpoint.rglob("*"), *(checkpoint / name for name in sizes)):
            inside(path, checkpoint)
    except ValueError as error:
        return str(error)
    for name, size in sizes.items():
        file = str(checkpoint / name)
        if not os.path.isfile(file):  # a Path of too long a name would raise
            return f"{one_line(name)} is missing"
        if os.path.getsize(file) != size:
            return f"{one_line(name)} has {os.path.getsize(file):,} bytes instead of {size:,}"
    return None


def _read_manifest(checkpoint: Path) -> tuple[dict[str, int], BatchLayout]:
    """The sizes of a checkpoint's files, and the layout of its run.

    Raises:
        ValueError: the manifest is damaged.
    """
    path, remedy = checkpoint / MANIFEST, "delete this checkpoint, and the one before it is used"
    content = read_json(path, remedy)
    try:
        sizes, layout = dict(content["files"]), BatchLayout(**content["batch_layout"])
        counts = [
            layout.processes,
            layout.per_device_batch_size,
            layout.accumulation,
            layout.images,
            layout.workers or 0,
        ]
        whole = all(type(count) is int for count in (*counts, *sizes.values())) and min(counts[:3]) > 0
        if not whole or not math.isfinite(layout.epoch):
            raise ValueError("a size is no number of bytes, or a count no number of things")
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a manifest ({one_line(error)}): {remedy}") from error
    return sizes, layout


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete all checkpoints but the newest `limit` complete ones and the best one; none without a limit."""
    if limit is None:
        return
    checkpoints = _by_step(output_dir)
    keep = [checkpoint for checkpoint in checkpoints if find_defect(checkpoint) is None][-limit:]
    for checkpoint in checkpoints:
        if checkpoint not in keep and (best is None or checkpoint != Path(best)):
            shutil.rmtree(checkpoint, ignore_errors=True)


def _by_step(output_dir: Path) -> list[Path]:
    # Other names may be a user's, as that of a copy, checkpoint-500-good.
    found = filter(is_checkpoint, output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-[0-9]+", path.name) is not None and path.is_dir()


def newest_complete(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, and a sentence for every newer one that is damaged."""
    damaged: list[str] = []
    for checkpoint in reversed(_by_step(output_dir)):
        wrong = find_defect(checkpoint)
        if wrong is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint} is damaged ({wrong}) and passed over")
    return None, damaged


def check_layout(checkpoint: Path, now: BatchLayout) -> str | None:
    """Whether a run divided like `now` can go on from a checkpoint.

    Returns:
        None for the same layout, else a sentence that says what changes.

    Raises:
        ValueError: what follows would be undefined, or the checkpoint's manifest is damaged.
    """
    _, then = _read_manifest(checkpoint)
    if then.global_batch_size != now.global_batch_size:
        raise ValueError(
            f"{checkpoint} was trained with a global batch of {then.global_batch_size} ({_product(then)}), this run has "
            f"{now.global_batch_size} ({_product(now)}): its place in the epoch and its learning rate count in such "
            "batches. Launch it with the same global batch, or pass another --output_dir"
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


def _product(layout: BatchLayout) -> str:
    return f"{layout.processes} processes x {layout.per_device_batch_size} images x {layout.accumulation} accumulated"


def _readers(layout: BatchLayout) -> str:
    return f"{layout.processes} processes x {layout.workers} workers"


def claim_output_dir(
    training: TrainingArguments,
    layout: BatchLayout | None,
    settings: dict[str, dict[str, Any]],
    defaults: dict[str, dict[str, Any]],
    about: dict[str, str],
    place: dict[str, Any],
) -> str | None:
    """Make the output directory this run's own until its process ends, or lets go of it (`lock`).

    An empty one gets `about` and `settings` as `recipe.yaml`. One that holds the same run is continued.

    Args:
        layout: how the run divides its images; None for one without checkpoints.
        place: name and content of its dataset.
        settings, defaults: as `check_same_run`.

    Returns:
        the checkpoint to continue from, if any.

    Raises:
        ValueError: another process is writing to it, it holds another run or something else, it lies in the dataset, the
            dataset has changed, or it cannot be written. All processes raise it, whichever of them has noticed.
    """
    folder = Path(str(training.output_dir))

    def claim() -> str | None:
        check_free(folder)
        refuse_inside(folder, place["dataset"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.take(folder)
            if has_begun(folder):
                check_same_run(folder, settings, defaults)
                check_same_data(folder, place)
                return None if layout is None else _checkpoint_of(folder, layout)
            write_recipe(folder, {"about": about} | settings)
            write_json(folder / DATASET, place)
        except OSError as error:
            raise ValueError(f"output_dir ({folder}) cannot be written ({error}): pass another --output_dir") from error
        return None

    checkpoint = decided_by_main(claim)
    if layout is not None:
        _check_same_view(folder, checkpoint)
    return checkpoint


def decided_by_main(decide: Callable[[], T]) -> T:
    """What `decide` returns on the main process, on all.

    Raises:
        ValueError: the one that `decide` raises, on all.
    """
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = decide()
        except ValueError as error:
            outcome[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    value, refusal = outcome
    if refusal is not None:
        raise ValueError(refusal)
    return value


def has_ended(
    training: TrainingArguments,
    settings: dict[str, dict[str, Any]],
    defaults: dict[str, dict[str, Any]],
    place: dict[str, Any] | None = None,
) -> bool:
    """Whether the output directory holds this run and it has come to its end; the main process then says so.

    Args:
        place: name and content of its dataset; None does not compare them.
        settings, defaults: as `check_same_run`.

    Raises:
        ValueError: it has ended and has other settings, weights or data.
    """
    folder = Path(str(training.output_dir))

    def look() -> str | None:
        date = ended(folder)
        if date is not None:
            check_same_run(folder, settings, defaults)
            if place is not None:
                check_same_data(folder, place)
        return date

    date = decided_by_main(look)
    if date is not None and rank() == 0:
        print(
            f"{folder} holds this run, which ended at {date}: nothing to do. Pass another --output_dir to run it again."
        )
    return date is not None


def _checkpoint_of(folder: Path, layout: BatchLayout) -> str | None:
    checkpoint, remarks = newest_complete(folder)
    if checkpoint is not None:
        remarks += filter(None, [check_layout(checkpoint, layout)])
    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr)
    return None if checkpoint is None else str(checkpoint)


def _check_same_view(folder: Path, checkpoint: str | None) -> None:
    if world_size() == 1:
        return
    newest, _ = newest_complete(folder)
    seen: list[str | None] = [None] * world_size()
    dist.all_gather_object(seen, None if newest is None else str(newest))
    if set(seen) != {checkpoint}:
        raise ValueError(
            f"output_dir ({folder}) has {checkpoint or 'no checkpoint'} for the first process and not for all others: pass a "
            "folder that all machines share"
        )
