"""A training step of MoCo and of the methods that it is compared with (arXiv:2003.04297, table 3), each by its recipe.

Architecture, heads, dictionary and optimizer are the recipe's; batch, image size and precision are the same for all. The step
is `training_step`, from uint8 views that are on the device: one of every image for a bank, two for the others.
"""

import argparse
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.encoder_moco import build_encoder

from ...recipe import PretrainArguments, load_recipe, parse_pretrain
from ...trainer import VIEWS, MoCoTrainer
from ..measure import Benchmark, in_own_process, peak_memory, time_rounds
from .variants import Step, training_step

BASELINE = "queue"
RECIPES = {
    BASELINE: "moco_v2_r50_in1k_200ep",
    "end_to_end": "end_to_end_r50_in1k",
    "simclr": "simclr_r50_in1k_200ep",
    "bank": "memory_bank_r50_in1k",
    "moco_v3": "moco_v3_r50_in1k_100ep",
}
IMAGENET = 1_281_167  # training images of ImageNet-1k
EPOCHS = 200
HOURS = f"hours for {EPOCHS} epochs"
# arXiv:2003.04297, table 3, in its units.
PAPER = "paper's 8 V100 x 32 images:"
PUBLISHED: dict[str, dict[str, float]] = {
    f"{PAPER} G a GPU": {BASELINE: 5.0, "end_to_end": 7.4},
    f"{PAPER} hours": {BASELINE: 53, "end_to_end": 65},
}
REMARKS = [
    f"{HOURS}: {EPOCHS} x {IMAGENET:,} images at the median speed of this one device, compute only",
    "the paper's numbers (arXiv:2003.04297, table 3) are of other hardware, with loading and communication, 256 images on all "
    "GPUs; its end-to-end stands for SimCLR too, and with 4,096 images takes 93.0 G a GPU by its authors' estimate",
]


def hours(images_per_second: float) -> float:
    """Hours that the steps of `EPOCHS` epochs of ImageNet take."""
    return EPOCHS * IMAGENET / images_per_second / 3600


def run(args: argparse.Namespace) -> list[Benchmark]:
    _check(args)
    names = list(dict.fromkeys([BASELINE, *args.method]))
    _ = [settings(name, args) for name in names]  # refuses before anything is measured
    threads = torch.get_num_threads()
    return [compare(names, args, partial(in_own_process, measure, args, threads))]


def _check(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a flag that is not for methods, or a number that no step can have.
    """
    if args.compile:
        raise ValueError("compile is for the step without method: leave out one of the two")
    if args.batch_norm != "plain":
        raise ValueError(
            f"batch_norm ({args.batch_norm}) is for the step without method: the heads of simclr and moco_v3 have "
            "BatchNorm1d, which cannot be split. Leave it out"
        )
    if args.global_batch_size < 2:
        raise ValueError(f"global_batch_size ({args.global_batch_size}) must be at least 2: one image has no negatives")
    if args.queue_size < args.global_batch_size:
        raise ValueError(
            f"queue_size ({args.queue_size}) must be at least global_batch_size ({args.global_batch_size}): change either"
        )


def settings(name: str, args: argparse.Namespace) -> PretrainArguments:
    """The recipe of a method, with the architecture, batch and dictionary asked for, in one process.

    Raises:
        ValueError: the recipe is not for this architecture.
    """
    flags: dict[str, Any] = {
        "recipe": RECIPES[name],
        "architecture": args.architecture,
        "queue_size": args.queue_size,
        "batch_norm": "plain",
        "global_batch_size": args.global_batch_size,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }
    parsed = parse_pretrain([word for flag, value in flags.items() for word in (f"--{flag}", str(value))])
    if parsed.config.dictionary == "bank":
        parsed.config.bank_size = args.bank_size
    try:
        with torch.device("meta"):
            build_encoder(parsed.config)
    except ValueError as error:
        raise ValueError(f"method ({name}): {error}") from error
    return parsed


def build(name: str, args: argparse.Namespace) -> tuple[MoCoModel, Step]:
    """A model of the method, and its step on random views."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    parsed = settings(name, args)
    model = MoCoModel(parsed.config).to(device, memory_format=torch.channels_last).train()
    return model, training_step(model, _batch(parsed.config, args, device), _optimizer(model, parsed), args.precision)


def _batch(config: MoCoConfig, args: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    n, side = args.global_batch_size, args.image_size
    views = 1 if config.dictionary == "bank" else 2
    pixels = torch.randint(256, (views, n, 3, side, side), dtype=torch.uint8).to(device)
    batch = dict(zip(VIEWS, pixels, strict=False))
    if config.dictionary == "bank":
        batch["index"] = torch.randint(config.bank_size, (n,)).to(device)
    return batch


def _optimizer(model: MoCoModel, parsed: PretrainArguments) -> torch.optim.Optimizer:
    kind, values = MoCoTrainer.get_optimizer_cls_and_kwargs(parsed.training, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return kind(parameters, weight_decay=parsed.training.weight_decay, **values)


def measure(args: argparse.Namespace, threads: int, name: str) -> dict[str, float]:
    """Peak memory of two steps of a method in GB, see `peak_memory`, and what of it the model always holds."""
    torch.set_num_threads(threads)
    held: dict[str, float] = {}

    def build_step() -> Step:
        model, step = build(name, args)
        held["parameters, M"] = sum(p.numel() for p in model.parameters()) / 1e6
        held["dictionary, MB"] = sum(x.numel() * x.element_size() for x in model.dictionary.buffers()) / 1e6
        return step

    return peak_memory(build_step) | held


def compare(names: list[str], args: argparse.Namespace, measured: Callable[[str], dict[str, float]]) -> Benchmark:
    """Time and memory of the methods of these names, without those that the memory is too small for.

    Args:
        measured: what `measure` says of a name.

    Raises:
        ValueError: the memory is too small for all of them.
    """
    columns: dict[str, dict[str, float]] = {}
    fitting = []
    for name in tqdm(names, "memory", disable=None):
        try:
            found = measured(name)
        except (torch.OutOfMemoryError, BrokenProcessPool):  # on a CPU the system ends the process
            continue
        fitting.append(name)
        for column, value in found.items():
            columns.setdefault(column, {})[name] = value
    if not fitting:
        raise ValueError(
            f"global_batch_size ({args.global_batch_size}) is too much for the memory here, for every method: lower it"
        )
    seconds = time_rounds({name: build(name, args)[1] for name in fitting}, args.rounds)
    return table(seconds, columns, args, [name for name in names if name not in fitting])


def table(
    seconds: dict[str, list[float]],
    columns: dict[str, dict[str, float]],
    args: argparse.Namespace,
    too_large: list[str],
) -> Benchmark:
    """What was measured, beside what the paper has."""
    n, names = args.global_batch_size, list(seconds)
    title = (
        f"the methods, a step of each: {args.architecture}, {n} images of {args.image_size} px, K {args.queue_size:,}, "
        f"{_in_words(args.precision)}, {args.rounds} interleaved rounds"
    )
    measured = Benchmark(title, seconds, images=n)
    columns = columns | {HOURS: {name: hours(n / measured.median(name)) for name in names}} | PUBLISHED
    left_out = [f"not enough memory here for a step of {', '.join(too_large)}"] if too_large else []
    remarks = [*left_out, *_batch_norms(names), *REMARKS]
    return Benchmark(title, seconds, (BASELINE,) * (BASELINE in names), n, columns, remarks)


def _in_words(precision: str) -> str:
    tf32 = torch.cuda.is_available() and torch.backends.cudnn.allow_tf32
    return "fp32 with TF32 convolutions" if precision == "fp32" and tf32 else precision


def _batch_norms(names: list[str]) -> list[str]:
    """What the recipes do with BatchNorm on several devices, which one process cannot do."""
    modes: dict[str, list[str]] = {}
    for name in names:
        modes.setdefault(load_recipe(RECIPES[name]).value("batch_norm"), []).append(name)
    others = [f"{mode} for {', '.join(some)}" for mode, some in modes.items() if mode != "plain"]
    return [f"BatchNorm is plain, in one process; the recipes have {'; '.join(others)}"] if others else []
