"""The learning rate of the official scripts: constant within an epoch, by a cosine or by milestones."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


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
