"""BatchNorm over parts of a batch, as several GPUs would see it, on one device.

Shapes: `N` batch, `G` groups of N / G consecutive images, `C` channels, `M` values of a channel in a group (N / G · H · W).
The kernels call G, C and M `groups`, `channels` and `values`. Each of the three ways takes and returns maps (N, C, H, W) and
changes the running statistics (C,) in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings it where there are NVIDIA or AMD GPUs
    triton = None


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that normalises `splits` consecutive parts of the batch by themselves.

    In training it imitates as many GPUs, each with its part of the batch (the official CIFAR-10 notebook takes image i into
    group i mod splits: the same, as a batch is in random order). The running statistics are the mean over groups.
    Parameters, buffers and evaluation are those of `nn.BatchNorm2d`.
    """

    splits: int
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(
                f"the batch per process ({len(x)}) must be a multiple of batch_norm_splits ({self.splits}): change either"
            )
        if x[:, 0].numel() == self.splits:
            raise ValueError(
                f"BatchNorm sees 1 value of a channel at once: lower batch_norm_splits ({self.splits}), or raise the batch"
            )
        assert self.momentum is not None, "timm has no BatchNorm with a cumulative average"
        self.num_batches_tracked += 1
        settings = (self.weight, self.bias, self.running_mean, self.running_var, self.splits, self.momentum, self.eps)
        if torch.compiler.is_compiling():
            return by_formula(x, *settings)
        if triton and x.is_cuda and x.is_contiguous(memory_format=torch.channels_last):
            return ByKernels.apply(x, *settings)
        return part_by_part(x, *settings)


def part_by_part(x, weight, bias, running_mean, running_var, splits, momentum, eps) -> torch.Tensor:
    """The groups one after the other: torch's own kernels, and one copy of the result."""
    mean, var = running_mean.repeat(splits, 1), running_var.repeat(splits, 1)
    parts = zip(x.chunk(splits), mean, var, strict=True)
    out = [F.batch_norm(part, m, v, weight, bias, True, momentum, eps) for part, m, v in parts]
    running_mean.copy_(mean.mean(dim=0))
    running_var.copy_(var.mean(dim=0))
    return torch.cat(out)


def by_formula(x, weight, bias, running_mean, running_var, splits, momentum, eps) -> torch.Tensor:
    """All groups at once, in operations that torch.compile makes a few kernels of."""
    groups = x.view(splits, -1, *x.shape[1:]).float()
    var, mean = torch.var_mean(groups, dim=(1, 3, 4), correction=0, keepdim=True)
    values = groups[0].numel() // x.shape[1]
    with torch.no_grad():
        running_mean.lerp_(mean.mean(dim=0).flatten(), momentum)
        running_var.lerp_(var.mean(dim=0).flatten() * (values / (values - 1)), momentum)
    out = (groups - mean) * torch.rsqrt(var + eps) * weight[:, None, None] + bias[:, None, None]
    return out.to(x.dtype).view(x.shape)


class ByKernels(torch.autograd.Function):
    """All groups at once on a GPU, in the channels_last layout: x is read twice and the result written once, as in
    BatchNorm itself; the gradient reads x and dy twice. torch's own operations would copy x between layouts."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, splits, momentum, eps):
        shape = _Launch(x, splits)
        mean, invstd = x.new_empty((2, splits, x.shape[1]), dtype=torch.float32)
        sums = shape.sums(x, x, mean, invstd, forward=True)
        shape.finish(_finish_forward, x, sums, mean, invstd, running_mean, running_var, momentum, eps)
        out = torch.empty_like(x)
        shape.each_tile(_normalise, x, out, mean, invstd, weight, bias)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.splits = splits
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, invstd = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        shape = _Launch(x, ctx.splits)
        sums = shape.sums(x, dy, mean, invstd, forward=False)
        means = torch.empty((2, *mean.shape), dtype=torch.float32, device=x.device)  # of dy, and of dy · normalised x
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        shape.finish(_finish_backward, sums, means, dweight, dbias)
        dx = torch.empty_like(x)
        shape.each_tile(_gradient, x, dy, dx, mean, invstd, weight, means)
        return dx, dweight, dbias, None, None, None, None, None


TILE = 64  # rows and channels that a program holds at once


class _Launch:
    """How a tensor (N, C, H, W) in the channels_last layout, which is (G, M, C) in memory, is divided over programs."""

    def __init__(self, x: torch.Tensor, groups: int):
        self.groups, self.channels = groups, x.shape[1]
        self.values = x.numel() // (groups * self.channels)
        # Programs for every group and channel, enough to fill a GPU; the same everywhere, so that sums are the same.
        self.parts = min(128, triton.cdiv(self.values, 8 * TILE))
        self.columns = triton.cdiv(self.channels, TILE)

    def sums(self, x, dy, mean, invstd, forward: bool) -> torch.Tensor:
        sums = torch.empty((2, self.groups, self.parts, self.channels), dtype=torch.float32, device=x.device)
        rows = triton.cdiv(triton.cdiv(self.values, self.parts), TILE) * TILE
        grid = (self.parts, self.columns, self.groups)
        _sum_rows[grid](x, dy, mean, invstd, sums, self.values, self.channels, rows, forward, TILE)
        return sums

    def finish(self, kernel: Any, *args: Any) -> None:
        parts = triton.next_power_of_2(self.parts)
        kernel[(self.columns,)](*args, self.values, self.channels, self.groups, self.parts, parts, TILE)

    def each_tile(self, kernel: Any, *args: Any) -> None:
        grid = (triton.cdiv(self.values, TILE), self.columns, self.groups)
        kernel[grid](*args, self.values, self.channels, TILE)


if triton:

    @triton.jit
    def _places(values, channels, start, tile: tl.constexpr):
        """Of a tile: its channels (1, tile), which of them exist, its elements (tile, tile), which of them exist, and where its
        group's channels stand in a tensor (groups, channels)."""
        group = tl.program_id(2)
        channel = tl.program_id(1) * tile + tl.arange(0, tile)[None, :]
        row = start + tl.arange(0, tile)[:, None]
        element = (group.to(tl.int64) * values + row) * channels + channel
        return channel, channel < channels, element, (channel < channels) & (row < values), group * channels + channel

    @triton.jit
    def _sum_rows(x, dy, mean, invstd, sums, values, channels, rows, forward: tl.constexpr, tile: tl.constexpr):
        """Sums over some rows of a group. Forward: of x - shift and its square, where shift is the group's first row, without
        which the variance of a channel far from 0 is lost. Backward: of dy and of dy · normalised x."""
        part = tl.program_id(0)
        first = tl.zeros((tile, tile), tl.float32)
        second = tl.zeros((tile, tile), tl.float32)
        channel, exists, element, inside, place = _places(values, channels, 0, tile)
        if forward:
            first_row = tl.program_id(2).to(tl.int64) * values * channels
            shift = tl.load(x + first_row + channel, mask=exists, other=0).to(tl.float32)
        else:
            shift = tl.load(mean + place, mask=exists, other=0)
            scale = tl.load(invstd + place, mask=exists, other=0)
        for start in range(part * rows, tl.minimum(part * rows + rows, values), tile):
            channel, exists, element, inside, place = _places(values, channels, start, tile)
            value = tl.load(x + element, mask=inside, other=0).to(tl.float32) - shift
            if forward:
                value = tl.where(inside, value, 0)
                first += value
                second += value * value
            else:
                gradient = tl.load(dy + element, mask=inside, other=0).to(tl.float32)
                first += gradient
                second += gradient * (value * scale)
        parts = tl.num_programs(0)
        column = tl.program_id(1) * tile + tl.arange(0, tile)
        out = sums + (tl.program_id(2) * parts + part) * channels + column
        tl.store(out, tl.sum(first, axis=0), mask=column < channels)
        tl.store(out + tl.num_programs(2) * parts * channels, tl.sum(second, axis=0), mask=column < channels)

    @triton.jit
    def _total(sums, group, channel, channels, parts, padded: tl.constexpr):
        """The sums of all parts of a group (tile,)."""
        part = tl.arange(0, padded)[:, None]
        inside = (part < parts) & (channel < channels)[None, :]
        return tl.sum(
            tl.load(sums + (group * parts + part) * channels + channel[None, :], mask=inside, other=0), axis=0
        )

    @triton.jit
    def _finish_forward(
        x,
        sums,
        mean,
        invstd,
        running_mean,
        running_var,
        momentum,
        eps,
        values,
        channels,
        groups,
        parts,
        padded: tl.constexpr,
        tile: tl.constexpr,
    ):
        channel = tl.program_id(0) * tile + tl.arange(0, tile)
        exists = channel < channels
        mean_over_groups = tl.zeros((tile,), tl.float32)
        var_over_groups = tl.zeros((tile,), tl.float32)
        for group in range(groups):
            shift = tl.load(x + tl.cast(group, tl.int64) * values * channels + channel, mask=exists, other=0).to(
                tl.float32
            )
            shifted = _total(sums, group, channel, channels, parts, padded) / values
            square = _total(sums + groups * parts * channels, group, channel, channels, parts, padded) / values
            var = tl.maximum(square - shifted * shifted, 0)
            tl.store(mean + group * channels + channel, shift + shifted, mask=exists)
            tl.store(invstd + group * channels + channel, 1 / tl.sqrt(var + eps), mask=exists)
            mean_over_groups += (shift + shifted) / groups
            var_over_groups += var * (values / (values - 1)) / groups
        old_mean = tl.load(running_mean + channel, mask=exists, other=0)
        old_var = tl.load(running_var + channel, mask=exists, other=0)
        tl.store(running_mean + channel, old_mean + momentum * (mean_over_groups - old_mean), mask=exists)
        tl.store(running_var + channel, old_var + momentum * (var_over_groups - old_var), mask=exists)

    @triton.jit
    def _finish_backward(
        sums, means, dweight, dbias, values, channels, groups, parts, padded: tl.constexpr, tile: tl.constexpr
    ):
        channel = tl.program_id(0) * tile + tl.arange(0, tile)
        exists = channel < channels
        of_weight = tl.zeros((tile,), tl.float32)
        of_bias = tl.zeros((tile,), tl.float32)
        for group in range(groups):
            first = _total(sums, group, channel, channels, parts, padded)
            second = _total(sums + groups * parts * channels, group, channel, channels, parts, padded)
            tl.store(means + group * channels + channel, first / values, mask=exists)
            tl.store(means + (groups + group) * channels + channel, second / values, mask=exists)
            of_bias += first
            of_weight += second
        tl.store(dweight + channel, of_weight, mask=exists)
        tl.store(dbias + channel, of_bias, mask=exists)

    @triton.jit
    def _normalise(x, out, mean, invstd, weight, bias, values, channels, tile: tl.constexpr):
        channel, exists, element, inside, place = _places(values, channels, tl.program_id(0) * tile, tile)
        scale = tl.load(invstd + place, mask=exists, other=0) * tl.load(weight + channel, mask=exists, other=0)
        value = tl.load(x + element, mask=inside, other=0).to(tl.float32) - tl.load(mean + place, mask=exists, other=0)
        value = value * scale + tl.load(bias + channel, mask=exists, other=0)
        tl.store(out + element, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _gradient(x, dy, dx, mean, invstd, weight, means, values, channels, tile: tl.constexpr):
        """dx = weight / std · (dy - mean(dy) - normalised x · mean(dy · normalised x))"""
        channel, exists, element, inside, place = _places(values, channels, tl.program_id(0) * tile, tile)
        std = tl.load(invstd + place, mask=exists, other=0)
        value = tl.load(x + element, mask=inside, other=0).to(tl.float32) - tl.load(mean + place, mask=exists, other=0)
        of_dy = tl.load(means + place, mask=exists, other=0)
        of_product = tl.load(means + tl.num_programs(2) * channels + place, mask=exists, other=0)
        gradient = tl.load(dy + element, mask=inside, other=0).to(tl.float32)
        gradient = (gradient - of_dy - value * std * of_product) * std * tl.load(weight + channel, mask=exists, other=0)
        tl.store(dx + element, gradient.to(dx.dtype.element_ty), mask=inside)
