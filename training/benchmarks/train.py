"""Speed of whole runs of scripts/pretrain.py, compared with the limits of their data and of their step.

For 1 and for 2 loader workers, the benchmark measures the images per second that a run logs, the same DataLoader alone, and
the step of the same model on one batch. The slower of the last two is the limit. A run cannot reach it where data and step
compete for the same cores; the remark states the speed of both in turn.

A second benchmark measures the cost of transformers.Trainer per step: `MoCoTrainer` and a plain loop train a tiny model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback

from modeling_moco import MoCoConfig, MoCoImageProcessor, MoCoModel

from ..data.sources import load_images
from ..pretrain import build_trainer
from ..recipe import parse_pretrain
from ..trainer import VIEWS, MoCoTrainer, MoCoTrainingArguments
from .measure import Benchmark, elapsed
from .step.variants import Step, this_project

PRETRAIN = f"{__package__.rsplit('.', 1)[0]}.commands.pretrain"  # the module that a new process runs
WORKERS = (1, 2)
TINY_BATCH, TINY_STEPS = 8, 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", default="quickstart", help="Recipe of the runs. Its learning rate and epochs do not matter."
    )
    parser.add_argument("--dataset_name", default="digits", help="Dataset, as in scripts/pretrain.py.")
    parser.add_argument("--architecture", default="test_resnet", help="Name of a timm model.")
    parser.add_argument("--global_batch_size", type=int, default=128, help="Number of images per step.")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="Precision of the runs; bf16 uses autocast."
    )
    parser.add_argument(
        "--max_steps", type=int, default=40, help="Number of steps of a run, of which the first third is not counted."
    )
    parser.add_argument(
        "--logging_steps", type=int, default=5, help="Number of steps over which one speed is averaged."
    )
    parser.add_argument("--rounds", type=int, default=1, help="Number of runs for each number of workers.")


def run(args: argparse.Namespace) -> list[Benchmark]:
    if args.max_steps < args.logging_steps:
        raise ValueError(
            f"max_steps ({args.max_steps}) must be at least logging_steps ({args.logging_steps}): the log has the speeds"
        )
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for workers in WORKERS:
            seconds: dict[str, list[float]] = {"data alone": [], "step alone": [], "training": []}
            for i in range(args.rounds):
                flags = pretrain_flags(args, workers, Path(folder, f"{workers}_{i}"))
                trainer = _build(flags)
                seconds["data alone"] += seconds_of_data(trainer, args)
                seconds["step alone"] += seconds_of_steps(trainer, args)
                seconds["training"] += seconds_of_run(flags, args.global_batch_size)
            results.append(_against_limit(args, workers, seconds))
    return [*results, trainer_overhead(args.rounds)]


def _against_limit(args: argparse.Namespace, workers: int, seconds: dict[str, list[float]]) -> Benchmark:
    title = (
        f"pretraining: {args.recipe} with {args.architecture} on {args.dataset_name}, batch {args.global_batch_size}, "
        f"{args.precision}, {workers} workers, {args.max_steps} steps, {args.rounds} rounds; time per step"
    )
    data, step = median(seconds["data alone"]), median(seconds["step alone"])
    limit = "data alone" if data > step else "step alone"
    in_turn = args.global_batch_size / (data + step)
    remarks = [f"the limit is {limit}; data and step in turn would process {in_turn:.4g} images/s"]
    return Benchmark(title, seconds, (limit,), args.global_batch_size, remarks=remarks, paired=False)


def pretrain_flags(args: argparse.Namespace, workers: int, folder: Path) -> list[str]:
    flags = {
        "recipe": args.recipe,
        "dataset_name": args.dataset_name,
        "architecture": args.architecture,
        "global_batch_size": args.global_batch_size,
        "bf16": args.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),  # without it Trainer refuses bf16 on a CPU
        "max_steps": args.max_steps,
        "logging_steps": args.logging_steps,
        "dataloader_num_workers": workers,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "output_dir": folder,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def seconds_of_run(flags: list[str], batch_size: int) -> list[float]:
    """Run pretraining and return the seconds per step of each entry of its log, without the first third.

    Raises:
        RuntimeError: the run failed.
    """
    done = subprocess.run([sys.executable, "-m", PRETRAIN, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{PRETRAIN} ended with status {done.returncode}: {done.stderr[-2000:]}")
    folder = Path(flags[flags.index("--output_dir") + 1])
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return _steady([batch_size / entry["images_per_second"] for entry in history if "loss" in entry])


def _steady(values: list[float]) -> list[float]:
    return values[len(values) // 3 :]


def _build(flags: list[str]) -> MoCoTrainer:
    args = parse_pretrain(flags)
    return build_trainer(args, load_images(args.data))


def seconds_of_data(trainer: MoCoTrainer, args: argparse.Namespace) -> list[float]:
    """Seconds per batch of the trainer's DataLoader alone, over as many batches as a run has."""
    batches = _epochs(trainer)
    windows = args.max_steps // args.logging_steps
    return _steady(
        [elapsed(lambda: _consume(batches, args.logging_steps)) / args.logging_steps for _ in range(windows)]
    )


def _epochs(trainer: MoCoTrainer) -> Iterator[dict[str, torch.Tensor]]:
    return chain.from_iterable(repeat(trainer.get_train_dataloader()))


def _consume(batches: Iterator[dict[str, torch.Tensor]], count: int) -> None:
    for _ in islice(batches, count):
        pass


def seconds_of_steps(trainer: MoCoTrainer, args: argparse.Namespace) -> list[float]:
    """Seconds of steps of the trainer's model on one batch."""
    batch = trainer.make_views(next(_epochs(trainer)))
    views = torch.stack([batch[name] for name in VIEWS])
    step = this_project(trainer.model.train(), views, "bf16" if trainer.args.bf16 else "fp32", compiled=False)
    return _steady([elapsed(step) for _ in range(max(6, args.max_steps // args.logging_steps))])


class RandomViews(torch.utils.data.Dataset):
    """Two views of random pixels for each image of a run, made in advance."""

    def __init__(self, images: int):
        self.views = torch.randint(256, (images, 2, 3, 32, 32), dtype=torch.uint8)
        self.images_per_epoch = images

    def __len__(self) -> int:
        return self.images_per_epoch

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return dict(zip(VIEWS, self.views[i], strict=True))

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        pass


def trainer_overhead(rounds: int) -> Benchmark:
    """Compare `MoCoTrainer` with a plain loop, on a tiny model and images in memory, without workers; means of ten steps."""
    seconds: dict[str, list[float]] = {"plain loop": [], "Trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            trainer = _tiny_trainer(folder)
            trainer.train()
            logged = [entry["images_per_second"] for entry in trainer.state.log_history if "loss" in entry]
            seconds["Trainer"] += _steady([TINY_BATCH / speed for speed in logged])
            seconds["plain loop"] += _plain_loop(_tiny_trainer(folder))
    result = Benchmark("", seconds)
    more = 1000 * (result.median("Trainer") - result.median("plain loop"))
    title = (
        f"Trainer's overhead: test_resnet, {TINY_BATCH} images of 32 px in memory, {TINY_STEPS} steps; time per step"
    )
    remarks = [f"overhead {more:.2f} ms per step"]
    return Benchmark(title, seconds, ("plain loop",), TINY_BATCH, remarks=remarks, paired=False)


def _tiny_trainer(folder: str) -> MoCoTrainer:
    model = MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=1024, batch_norm="plain"))
    args = MoCoTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=TINY_BATCH,
        num_train_epochs=1,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    images: Any = RandomViews(TINY_BATCH * TINY_STEPS)
    trainer = MoCoTrainer(model, args, images, MoCoImageProcessor())
    trainer.remove_callback(PrinterCallback)
    return trainer


def _plain_loop(trainer: MoCoTrainer) -> list[float]:
    model, device, steps = trainer.model.train(), trainer.args.device, int(trainer.args.logging_steps)
    loader = torch.utils.data.DataLoader(trainer.train_dataset, TINY_BATCH, shuffle=True)
    views = torch.empty((2, TINY_BATCH, 3, 32, 32), dtype=torch.uint8, device=device)
    step: Step = this_project(model, views, "fp32", compiled=False)
    batches = iter(loader)

    def some_steps() -> None:
        for batch in islice(batches, steps):
            for view, name in zip(views, VIEWS, strict=True):
                view.copy_(batch[name])
            step()

    return _steady([elapsed(some_steps) / steps for _ in range(TINY_STEPS // steps)])
