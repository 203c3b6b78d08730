"""Precise BatchNorm: statistics of many batches instead of a running average, as fvcore's `update_bn_stats` computes them.

A running average is mostly of the last ten batches. A detector sees few images in a batch, so that it is evaluated with the
statistics of about two hundred images; these here are of as many batches as are given.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from modeling_moco.distributed_moco import world_size


class _Sums:
    """Of the values that a BatchNorm normalises: number, sum, and sum of squares, for each channel (3, C)."""

    def __init__(self, norm: _BatchNorm):
        assert norm.running_mean is not None
        # In float64 where the device has it: a variance is a small difference of these.
        kind = torch.float32 if norm.running_mean.device.type == "mps" else torch.float64
        self.total = torch.zeros(3, norm.num_features, dtype=kind, device=norm.running_mean.device)

    def __call__(self, norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().transpose(0, 1).flatten(1).to(self.total.dtype)  # (C, values)
        count = torch.full_like(x[:, 0], x.shape[1])
        self.total += torch.stack([count, x.sum(dim=1), x.square().sum(dim=1)])


@torch.no_grad()
def set_precise_statistics(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any]) -> None:
    """Give every BatchNorm of a model the mean and the variance of all values that it normalises in these batches.

    Every value counts the same, on whatever process and in whatever batch it is. The variance is that of the values, not an
    estimate of another's. Layers that do not normalise by the batch keep their statistics.

    Args:
        model: is left in training mode.
        batches: of this process; all processes have as many.
        forward: runs the model on a batch.

    Raises:
        ValueError: there is no batch.
    """
    model.train()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.weight.requires_grad]
    sums = [_Sums(norm) for norm in norms]
    hooks = [norm.register_forward_pre_hook(some) for norm, some in zip(norms, sums, strict=True)]
    try:
        seen = sum(1 for _ in map(forward, batches))
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError("batches is empty: give at least one for the statistics of BatchNorm")
    for norm, some in zip(norms, sums, strict=True):
        if world_size() > 1:
            dist.all_reduce(some.total)
        count, first, second = some.total
        mean = first / count
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((second / count - mean.square()).clamp(min=0))
