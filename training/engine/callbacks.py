"""What happens around the steps of a trainer: the progress, the epoch of the images, each process's statistics."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_moco.distributed_moco import rank, world_size

from .files import inside, write_whole
from .run_folder import UNREADABLE


def gather_lists(mine: list[str]) -> list[str]:
    """The lists of all processes, one after the other."""
    parts: list[list[str]] = [mine]
    if world_size() > 1:
        parts = [[] for _ in range(world_size())]
        dist.all_gather_object(parts, mine)
    return [name for part in parts for name in part]


# Numbers that are shown while a run trains: the name that is logged, the one that is shown, its form.
SHOWN = {
    "loss": ("loss", "{:.3f}"),
    "contrast_top1": ("contrast", "{:.1f}%"),
    "eval_knn_top1": ("kNN", "{:.1f}%"),
    "eval_top1": ("top-1", "{:.1f}%"),
    "eval_rankme": ("RankMe", "{:.1f}"),
    "images_per_second": ("images/s", "{:.0f}"),
}
SECONDS_BETWEEN_LINES = 60  # 200 epochs of ImageNet in 53 hours make 0.3 MB


def newest_numbers(logs: dict[str, Any]) -> dict[str, str]:
    """What `SHOWN` has of a log entry. RankMe speaks for the features where no label does."""
    hidden = "eval_rankme" if "eval_knn_top1" in logs else None
    return {name: form.format(logs[key]) for key, (name, form) in SHOWN.items() if key in logs and key != hidden}


class ProgressBar(ProgressCallback):
    """For a terminal: one bar with the newest numbers in it, and a line at every evaluation."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.shown: dict[str, str] = {}
        if self.training_bar is not None:
            self.training_bar.update(state.global_step)  # of a resumed run
            self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:
            return
        self.shown |= newest_numbers(logs)
        self.training_bar.set_postfix(self.shown)
        if any(key.startswith("eval_") for key in logs):
            numbers = "  ".join(f"{name} {value}" for name, value in self.shown.items())
            self.training_bar.write(f"epoch {logs['epoch']:g} of {args.num_train_epochs:g}: {numbers}")


class ProgressLines(TrainerCallback):
    """For a log: a line with the newest numbers once a minute, at every evaluation and at the end. A bar would fill it.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.shown: dict[str, str] = {}
        self.printed_at = -math.inf

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.shown |= newest_numbers(logs)
        evaluated = any(key.startswith("eval_") for key in logs)
        last = state.global_step >= state.max_steps and "loss" in logs
        due = self.clock() - self.printed_at >= SECONDS_BETWEEN_LINES
        if state.is_world_process_zero and self.shown and (evaluated or last or due):
            self.printed_at = self.clock()
            numbers = "  ".join(f"{name} {value}" for name, value in self.shown.items())
            place = f"step {state.global_step:,} of {state.max_steps:,}, epoch {state.epoch or 0:.4g}"
            print(f"{place}: {numbers}", flush=True)  # a log is not written line by line
        for key in logs.keys() & SHOWN.keys():
            if key.startswith("eval_"):  # a later line is of other weights
                self.shown.pop(SHOWN[key][0], None)


class SetEpoch(TrainerCallback):
    """Sets the epoch of the images: accelerate does not, with several processes or after a resume."""

    def __init__(self, images: Any):
        self.images = images

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # A resumed epoch begins with the batches that were trained before, which Trainer draws and throws away.
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        trained = 0 if args.ignore_data_skip else state.global_step % steps * args.gradient_accumulation_steps
        self.images.set_epoch(int(state.epoch), skip_batches=trained)


class ListUnreadable(TrainerCallback):
    """Keeps a list of the images that could not be read, in the run's folder.

    Args:
        images: of training, with `unreadable`, which names those that this process has met.
        evaluated: the same of another split.
    """

    def __init__(self, images: Any, evaluated: Any = None):
        self.parts = [part for part in (images, evaluated) if part is not None]

    def on_save(self, args, state, control, **kwargs):
        self.write(Path(args.output_dir))

    def write(self, folder: Path) -> int:
        """Write the list of all processes, and of the run's earlier parts, and return its length."""
        names = gather_lists([name for part in self.parts for name in part.unreadable()])
        path = folder / UNREADABLE
        if path.is_file():
            names += inside(path).read_text(encoding="utf-8").splitlines()
        names = sorted(set(names))
        if names and rank() == 0:
            write_whole(path, "".join(f"{name}\n" for name in names))
        return len(names)


class RankStatistics(TrainerCallback):
    """Keeps the BatchNorm statistics of every process in a checkpoint: the model's file has those of the first alone."""

    def on_save(self, args, state, control, model=None, **kwargs):
        if args.process_index > 0:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_file(_statistics(model), self._path(folder, args.process_index))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.resume_from_checkpoint is None:
            return
        path = self._path(Path(args.resume_from_checkpoint), args.process_index)
        if path.is_file():  # a run on fewer processes did not write it
            statistics = _statistics(model)
            for name, tensor in load_file(path).items():
                statistics[name].copy_(tensor)

    @staticmethod
    def _path(checkpoint: Path, process: int) -> Path:
        return checkpoint / f"statistics_{process}.safetensors"


def _statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    return {f"{prefix}.{name}": buffer for prefix, norm in norms for name, buffer in norm.named_buffers()}
