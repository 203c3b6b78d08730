"""The learning rate: how high for a batch, and what it is in every step of a run.

v1 and v2 change it at the start of every epoch (facebookresearch/moco main_moco.py), SimCLR and v3 in every step, after a
warm-up (facebookresearch/moco-v3 main_moco.py). Detectors drop it at steps, after a warm-up (detectron2).
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

Scaling = Literal["none", "linear", "sqrt"]
UNIT = 256  # images that a learning rate of the linear rule is for
LARGEST = 2**63  # number that is shown of what others have recorded
# Schedules that an evaluation drives. It would choose the rate by the images that are reported on, or finds no loss there.
DRIVEN = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def scaled_rate(rate: float, scaling: Scaling, batch: int) -> float:
    """The optimizer's learning rate for a global batch: `rate`, `rate` x batch/256 (linear) or `rate` x √batch (sqrt)."""
    if scaling == "linear":
        return rate * batch / UNIT
    return rate * math.sqrt(batch) if scaling == "sqrt" else rate


def rates_in_words(rates: list[float], scaling: Scaling, batch: int) -> str:
    """Learning rates as they were given and as the optimizer has them: "0.6 x 4096/256 = 9.6"."""
    given, scaled = (" ".join(f"{rate:g}" for rate in some) for some in (rates, _all_scaled(rates, scaling, batch)))
    factor = {"none": "", "linear": f"{batch}/{UNIT}", "sqrt": f"sqrt({batch})"}[scaling]
    return f"{given} x {factor} = {scaled}" if factor else given


def _all_scaled(rates: list[float], scaling: Scaling, batch: int) -> list[float]:
    return [scaled_rate(rate, scaling, batch) for rate in rates]


def recorded_rate(settings: Mapping[str, Any]) -> str | None:
    """The same of recorded settings; None where nothing scales the learning rate, or the batch is not known."""
    names = ("learning_rate", "learning_rate_scaling", "global_batch_size")
    rate, scaling, batch = map(settings.get, names)
    if scaling not in ("linear", "sqrt") or not (_is_number(rate) and _is_number(batch)):
        return None
    return rates_in_words([float(rate)], scaling, int(batch))


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and 0 < value < LARGEST


def read_scheduler_arguments(text: str | dict[str, Any] | None) -> dict[str, Any]:
    """What `--lr_scheduler_kwargs` says.

    Raises:
        ValueError: it is no JSON of names and values.
    """
    try:
        arguments = json.loads(text) if isinstance(text, str) else text or {}
    except json.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(
            f"lr_scheduler_kwargs ({text}) is no JSON of names and values: write it like '{{\"min_lr\": 0.001}}'"
        )
    return arguments


def check_scheduler(kind: SchedulerType, arguments: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: a run cannot have this schedule of transformers, or not with these arguments.
    """
    if kind in DRIVEN:
        raise ValueError(
            f"lr_scheduler_type ({kind.value}) would follow the loss of an evaluation: choose one that is known in advance, as "
            "cosine or linear"
        )
    blank = SGD([torch.zeros(1)], lr=1.0)
    try:
        get_scheduler(kind, blank, num_warmup_steps=1, num_training_steps=9, scheduler_specific_kwargs=arguments)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs ({json.dumps(arguments)}) do not fit lr_scheduler_type ({kind.value}): {error}"
        ) from error


def epoch_factor(epoch: int, epochs: int, milestones: list[int] | None) -> float:
    """Factor of the learning rate in `epoch` (from 0): x0.1 at every milestone passed, or without them a half cosine."""
    if milestones:
        return math.prod(0.1 for milestone in milestones if epoch >= milestone)
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def epoch_schedule(
    optimizer: Optimizer, steps_per_epoch: int, epochs: int, milestones: list[int] | None = None
) -> LambdaLR:
    """A scheduler that is stepped at every optimizer step and changes the learning rate at the start of every epoch.

    Args:
        steps_per_epoch: optimizer steps of one epoch.
        epochs: epochs of the run.
        milestones: epochs at which the learning rate drops to a tenth; none for the cosine.
    """
    return LambdaLR(optimizer, lambda step: epoch_factor(step // steps_per_epoch, epochs, milestones))


def warmup_factor(epoch: float, warmup: float, epochs: float, milestones: list[int] | None = None) -> float:
    """Factor of the learning rate when `epoch` epochs have passed: linear from 0, then a half cosine that ends at 0.

    Args:
        epoch: with its fraction, so that the factor changes in every step.
        warmup: epochs in which the factor rises. At epoch 0 it is 0: as in the official code, the first step moves nothing.
        epochs: of the run, the warm-up included.
        milestones: epochs, counted from the start, at which the learning rate drops to a tenth; none for the cosine.
    """
    rising = min(1.0, epoch / warmup)
    if milestones:
        return rising * epoch_factor(math.floor(epoch), 0, milestones)
    if epoch < warmup or epochs <= warmup:
        return rising
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def warmup_schedule(
    optimizer: Optimizer, steps_per_epoch: int, steps: int, warmup: float, milestones: list[int] | None = None
) -> LambdaLR:
    """A scheduler that changes the learning rate in every step, as `warmup_factor` says.

    Args:
        steps_per_epoch: optimizer steps of one epoch.
        steps: optimizer steps of the run, after which the cosine has reached 0.
        warmup: epochs of the warm-up, above 0. One as long as the run or longer has no cosine after it.
    """
    epochs = steps / steps_per_epoch
    return LambdaLR(optimizer, lambda step: warmup_factor(step / steps_per_epoch, warmup, epochs, milestones))


def step_factor(step: int, warmup: int, milestones: list[int]) -> float:
    """Factor of the learning rate in `step` (from 0): x0.1 at every milestone passed, after a linear rise from 0.001.

    Args:
        warmup: steps of the rise, as `WarmupMultiStepLR` of detectron2 makes it; 0 for none.
        milestones: steps.
    """
    passed = min(1.0, step / warmup) if warmup else 1.0
    return (0.001 * (1 - passed) + passed) * math.prod(0.1 for milestone in milestones if step >= milestone)


def step_schedule(optimizer: Optimizer, warmup: int, milestones: list[int]) -> LambdaLR:
    """A scheduler that changes the learning rate in every step, as `step_factor` says."""
    return LambdaLR(optimizer, lambda step: step_factor(step, warmup, milestones))
