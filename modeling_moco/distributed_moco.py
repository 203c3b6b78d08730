"""What several processes share: gathered keys, a BatchNorm that cannot tell keys apart by their batch, and that of detectors.

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


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, as detectron2's `NaiveSyncBatchNorm` and thus the papers' detectors have it.

    Mean and mean square of every process count the same, however many values it has, and the running variance is the biased
    one. torch's own counts values, keeps the unbiased variance, and has no version for CPUs. One process, and evaluation, are
    torch's `BatchNorm2d`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if world_size() == 1 or not self.training:
            return super().forward(input)
        with torch.autocast(
            input.device.type, enabled=False
        ):  # 16 bits cannot hold a variance as a difference of squares
            x = input.to(torch.promote_types(input.dtype, torch.float32))
            here = torch.stack([x.mean(dim=(0, 2, 3)), (x * x).mean(dim=(0, 2, 3))])  # (2, C)
            mean, square = gather(here[None]).mean(dim=0)
            variance = square - mean * mean
            scale = self.weight.to(x.dtype) * (variance + self.eps).rsqrt()
            shift = self.bias.to(x.dtype) - mean * scale
            normalised = torch.addcmul(shift[:, None, None], x, scale[:, None, None])
        self._count(mean.detach(), variance.detach())
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _count(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]  # a BatchNorm of an encoder keeps statistics
        for kept, seen in ((self.running_mean, mean), (self.running_var, variance)):
            kept.lerp_(seen.to(kept.dtype), self.momentum)  # type: ignore[union-attr, arg-type]


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that training leaves alone: its scale and shift are buffers, and its own statistics always normalise."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def set_fine_tuned_norm(module: nn.Module, config: MoCoConfig, setting: str) -> None:
    """Give the BatchNorm layers of a detector or segmentation model another behaviour, with the same state dict.

    Args:
        setting: of `config`, `detector_norm` or `fcn_norm`, which names the behaviour.

    Raises:
        ValueError: one is no `nn.BatchNorm2d`, and is to be more than plain.
    """
    mode = getattr(config, setting)
    if mode == "plain":
        return
    for name, norm in module.named_modules():
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = SyncBatchNorm2d if mode == "sync" else FrozenBatchNorm2d
            if mode == "frozen":
                _freeze(norm)
        elif isinstance(norm, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{setting} ({mode!r}) handles nn.BatchNorm2d only, but {config.architecture} has "
                f"{type(norm).__name__} at {name!r}: choose 'plain'"
            )


def _freeze(norm: nn.Module) -> None:
    # Buffers, because transformers lets all parameters require gradients after loading; all of them anew, because the digest of
    # a model depends on the order of its tensors.
    for name, value in norm.state_dict(keep_vars=True).items():
        delattr(norm, name)
        norm.register_buffer(name, value.detach())
        if getattr(value, "_is_hf_initialized", False):
            setattr(getattr(norm, name), "_is_hf_initialized", True)  # noqa: B010
