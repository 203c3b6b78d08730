"""What several processes share: gathered keys, and a BatchNorm that cannot tell keys apart by their batch.

Every collective is the identity in a single process. Shapes: `N` local batch (equal on all ranks), `R` ranks.
"""

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from .configuration_moco import MoCoConfig
from .split_norm_moco import SplitBatchNorm2d


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def to_device(device: torch.device, x: torch.Tensor) -> torch.Tensor:
    """A tensor of the CPU on a device, for which the host does not wait: a GPU copies pinned memory by itself."""
    copied_by_gpu = device.type == "cuda" and not x.is_cuda and not torch.compiler.is_compiling()
    return (x.pin_memory() if copied_by_gpu else x).to(device, non_blocking=True)


def local_slice(n: int) -> slice:
    """Rows of a gathered tensor that belong to this process, for `n` rows per process."""
    start = rank() * n
    return slice(start, start + n)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = x.new_empty((world_size() * len(x), *x.shape[1:]))
        # torch 2.14 renamed it, and warns of the older name.
        gather_into = dist.all_gather_single if torch.__version__ >= "2.14" else dist.all_gather_into_tensor
        gather_into(out, x.contiguous())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # The losses of all ranks read these rows. Their sum, for DistributedDataParallel takes the mean over the ranks later.
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[local_slice(len(total) // world_size())]


def gather(x: torch.Tensor) -> torch.Tensor:
    """Concatenate `x` (N, ...) of all ranks in rank order: (R·N, ...).

    The gradient of `x` is that of the sum of all ranks' losses. A gradient of the own loss alone would leave out how the rows
    act on other ranks, and the loss would not show it.
    """
    return x if world_size() == 1 else _Gather.apply(x)


@torch.no_grad()
def exchange(x: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Send each rank the rows that are to be its own, and no others.

    Args:
        x: rows of this rank (N, ...).
        parts: on the CPU (R, N), the same on all ranks; part r lists in ascending order which rows of the gathered batch
            go to rank r.

    Returns:
        the rows of this rank's part, in its order (N, ...).
    """
    n, here = len(x), rank()
    origin = parts // n  # (R, N), the rank that has the row
    rows = parts[origin == here] - here * n
    to_each = (origin == here).sum(dim=1).tolist()
    from_each = origin[here].bincount(minlength=len(parts)).tolist()
    received = x.new_empty(x.shape)
    sent = x[to_device(x.device, rows)].contiguous()
    dist.all_to_all_single(received, sent, from_each, to_each)
    return received


def convert_batch_norm(encoder: nn.Module, config: MoCoConfig) -> nn.Module:
    """Give the BatchNorm layers of an encoder or a head the behaviour that `config.batch_norm` names, keeping their state."""
    if config.batch_norm == "sync":
        return timm.layers.convert_sync_batchnorm(encoder)  # torch's own drops the activation of timm's BatchNormAct2d
    if config.batch_norm == "split":
        for name, module in encoder.named_modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SplitBatchNorm2d
                setattr(module, "splits", config.batch_norm_splits)  # noqa: B010  (mypy knows nn.BatchNorm2d only)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ValueError(
                    f"batch_norm='split' handles nn.BatchNorm2d only, but {config.architecture} has "
                    f"{type(module).__name__} at {name!r}: choose another batch_norm"
                )
    return encoder
