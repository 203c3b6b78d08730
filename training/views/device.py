"""The backend `device`: the training device renders the views of a whole batch at once, each with its own parameters.

The CPU decodes and crops the images; small images in memory are cropped on the device too. Jitter, grayscale, blur and flip
are tensor operations. An image comes with uniform random numbers: the CPU turns some of them into crop boxes, and the device
turns the rest into the parameters of the operations.
Shapes: `N` images, `V` views of an image (two, or one), `S` view size, `H`, `W` image size.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .opencv import crop_and_resize
from .policy import ASPECT_RATIO, BLUR_SIGMA, VIEWS, Policies, ViewParams, ViewPolicy, centred_box, image_size
from .scaled import Encoded, pixels_for

JITTER = ("brightness", "contrast", "saturation", "hue")
# The operations of a view are a row of float32 numbers: the index in JITTER of the operation at each place (-1: none); the
# factor of each operation; whether gray; the standard deviation of the blur in pixels; whether flipped; whether solarized.
ORDER, FACTORS = slice(0, 4), slice(4, 8)
GRAY, BLUR, FLIP, SOLARIZE = 8, 9, 10, 11
CPU_CHUNK = 128  # images that a CPU renders together: they fit into its cache
TRIES = 10  # boxes to try before the largest centred box is used, as in torchvision
BOX_NUMBERS = 2 * TRIES + 2  # uniform numbers that determine a box: areas, aspect ratios, top, left
NUMBERS = 14  # uniform numbers that determine the operations, see `sample_operations`
ADDED = 1  # of them, the last ones, are drawn apart: they came later, and the others had to stay what they were
LOG_RATIO = tuple(map(math.log, ASPECT_RATIO))


def unpack_params(box: torch.Tensor, row: torch.Tensor) -> ViewParams:
    """The parameters of a view, from its box (4,) and its row of `sample_operations`."""
    top, left, height, width = (int(number) for number in box)
    factors = row[FACTORS].tolist()
    jitter = tuple((JITTER[int(i)], factors[int(i)]) for i in row[ORDER] if i >= 0)
    return ViewParams(
        (top, left, height, width), jitter, bool(row[GRAY]), float(row[BLUR]), bool(row[FLIP]), bool(row[SOLARIZE])
    )


def params_of(boxes: torch.Tensor, numbers: torch.Tensor, policies: Policies) -> list[ViewParams]:
    """The parameters of the views of one image, from their boxes (V, 4) and uniform numbers (V, NUMBERS)."""
    views = zip(boxes, numbers.split(1), policies, strict=True)
    return [unpack_params(box, sample_operations(u, policy)[0]) for box, u, policy in views]


# Sampling


def uniform_numbers(seed: int, epoch: int, indices: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
    """Uniform numbers in [0, 1), float32 (N, count), for images with these indices (N,).

    Number j of an image depends on (seed, epoch, index, j) alone, and on `count`. Another `stream` has other numbers.
    """
    # SplitMix64 (Steele, Lea and Flood, 2014) on a counter; each stream begins at another place.
    start = np.random.SeedSequence((seed, epoch)).generate_state(stream + 1, np.uint64)[stream:]
    with np.errstate(over="ignore"):
        counter = indices.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
        z: np.ndarray = start + counter * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def sample_views(
    policies: Policies, width: int, height: int, *, seed: int, epoch: int, indices: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample views of images of `width` x `height` pixels.

    Args:
        policies: distribution of each view (V,).
        indices: of the images (N,).

    Returns:
        boxes in pixels (N, V, 4) and the numbers for `sample_operations` (N, V, NUMBERS), both float32.
    """
    shape = len(indices), len(policies), -1
    u = uniform_numbers(seed, epoch, indices, len(policies) * (BOX_NUMBERS + NUMBERS - ADDED)).reshape(shape)
    added = uniform_numbers(seed, epoch, indices, len(policies) * ADDED, stream=1).reshape(shape)
    min_scales = np.tile([policy.min_scale for policy in policies], len(indices))[:, None]
    boxes = sample_boxes(u[:, :, :BOX_NUMBERS].reshape(-1, BOX_NUMBERS), width, height, min_scales)
    numbers = np.concatenate([u[:, :, BOX_NUMBERS:], added], axis=2)
    return torch.from_numpy(boxes).view(*shape[:2], 4), torch.from_numpy(numbers)


def sample_box(u: list[float], width: int, height: int, min_scale: float) -> tuple[int, int, int, int]:
    """Turn BOX_NUMBERS uniform numbers into top, left, height and width in pixels, with the distribution of `sample_view`."""
    low, high = LOG_RATIO
    for share, ratio in zip(u[:TRIES], u[TRIES : 2 * TRIES], strict=True):
        area, ratio = width * height * (min_scale + (1 - min_scale) * share), math.exp(low + (high - low) * ratio)
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w
    return centred_box(width, height)


def sample_boxes(u: np.ndarray, width: int, height: int, min_scale: float | np.ndarray) -> np.ndarray:
    """`sample_box` for each row of `u` (B, BOX_NUMBERS): float32 (B, 4). For a single image `sample_box` is far faster.

    `min_scale` may differ between the rows (B, 1).
    """
    u = u.astype(np.float64)
    area = width * height * (min_scale + (1 - min_scale) * u[:, :TRIES])
    low, high = LOG_RATIO
    ratio = np.exp(low + (high - low) * u[:, TRIES : 2 * TRIES])
    sides, limits = np.rint(np.sqrt([area / ratio, area * ratio])), np.array([[height], [width]])
    inside = (sides > 0) & (sides <= limits[:, :, None])
    fits = inside[0] & inside[1]
    first = np.arange(len(u)), fits.argmax(axis=1)
    sides = sides[:, *first]
    corners = np.floor(u[:, 2 * TRIES :].T * (limits - sides + 1))
    boxes = np.concatenate([corners, sides]).T.astype(np.float32)
    boxes[~fits[first]] = centred_box(width, height)
    return boxes


def sample_operations(u: torch.Tensor, policy: ViewPolicy) -> torch.Tensor:
    """Turn uniform numbers (B, NUMBERS) into one row of operations per view, with the distribution of `sample_view`."""
    order = torch.where(u[:, :1] < policy.jitter_p, u[:, 1:5].argsort(dim=1), -1)
    factors = [
        centre + (2 * u[:, 5 + i] - 1) * strength
        for i, (centre, strength) in enumerate(zip((1, 1, 1, 0), policy.jitter, strict=True))
    ]
    low, high = BLUR_SIGMA
    gray, flip, solarize = u[:, 9] < policy.gray_p, u[:, 12] < policy.flip_p, u[:, 13] < policy.solarize_p
    blur = (u[:, 10] < policy.blur_p) * (low + (high - low) * u[:, 11])
    return torch.cat([order, torch.stack([*factors, gray, blur, flip, solarize], dim=1)], dim=1)


# Rendering


@dataclass(frozen=True)
class DeviceViews:
    """Renders the views of every image of a batch, from whole images or from crops that already have the view size.

    Args:
        policies: distribution of each view.
        size: S, the side of a view in pixels.
    """

    policies: Policies
    size: int

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Render a batch.

        Args:
            batch: "numbers" (N, V, NUMBERS), and either crops "pixel_values" and, of two views, "key_pixel_values"
                (N, S, S, 3), or "images" (N, 3, H, W) and "boxes" (N, V, 4); pixels are uint8. "index" (N,) may be there.

        Returns:
            "pixel_values" and, of two views, "key_pixel_values", uint8 (N, 3, S, S), and "index" where it was there.
        """
        if len(self.policies) == 2 and self.policies[0] == self.policies[1]:
            views = self._render(batch, VIEWS, self.policies[0])  # fewer and larger operations
        else:
            views = {}
            for name, policy in zip(VIEWS, self.policies, strict=False):
                views |= self._render(batch, (name,), policy)
        return views | ({"index": batch["index"]} if "index" in batch else {})

    def _render(
        self, batch: dict[str, torch.Tensor], names: tuple[str, ...], policy: ViewPolicy
    ) -> dict[str, torch.Tensor]:
        """The views of these names, all of one policy."""
        places = [VIEWS.index(name) for name in names]
        operations = sample_operations(_in_turn(batch["numbers"], places), policy)
        flip = operations[:, FLIP] > 0
        if "images" in batch:
            images = batch["images"].repeat(len(names), 1, 1, 1)
            x = self.crop(images, _in_turn(batch["boxes"], places), flip)
        else:
            x = _where(flip, torch.cat([batch[name] for name in names]).movedim(3, 1), _flip)
        return dict(zip(names, self.render(x, operations, policy).chunk(len(names)), strict=True))

    def crop(self, images: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """Crop images (B, 3, H, W) to boxes (B, 4) and mirror those where `flip` (B,) is true: (B, 3, S, S), all uint8."""
        chunk = len(images) if _all_at_once(images) else CPU_CHUNK
        parts = zip(*(tensor.split(chunk) for tensor in (images, boxes, flip)), strict=True)
        return torch.cat([_to_uint8(crop_views(x.float(), box, mirror, self.size)) for x, box, mirror in parts])

    def render(self, x: torch.Tensor, operations: torch.Tensor, policy: ViewPolicy) -> torch.Tensor:
        """Apply jitter, grayscale, blur and solarizing to crops `x`: both uint8 (B, 3, S, S)."""
        if _all_at_once(x):
            return render_views(x.float(), operations, policy)
        # A CPU renders the views with the same order of operations together, so that it computes no unused result.
        code = (operations[:, ORDER] @ torch.tensor([64.0, 16.0, 4.0, 1.0])).int()
        rows, counts = code.argsort(), code.unique(return_counts=True)[1]
        groups = [index for group in rows.split(counts.tolist()) for index in group.split(CPU_CHUNK)]
        views = [render_views(x.index_select(0, index).float(), operations[index], policy) for index in groups]
        return torch.cat(views).index_select(0, rows.argsort())


@dataclass(frozen=True)
class DeviceCrops:
    """The work that remains for the CPU: the crops of one image. `DeviceViews` makes views of them.

    Args:
        policies: distribution of each view.
        size: S, the side of a view in pixels.
    """

    policies: Policies
    size: int

    def __call__(self, image: torch.Tensor | Encoded, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Crops (S, S, 3) of an image (3, H, W), both uint8, and the numbers of their operations (V, NUMBERS)."""
        boxes, numbers = self._sample(image, generator)
        # Channels stay last, as the resize returns them: collating channels-first crops would take as long as cropping.
        pixels = pixels_for(image, boxes, self.size)
        crops = (crop_and_resize(pixels, box, self.size).permute(1, 2, 0) for box in boxes)
        return {**dict(zip(VIEWS, crops, strict=False)), "numbers": numbers}

    def sample(self, image: Any, generator: torch.Generator) -> list[ViewParams]:
        """Sample the parameters of each view, the query first."""
        boxes, numbers = self._sample(image, generator)
        return params_of(torch.tensor(boxes), numbers, self.policies)

    def _sample(self, image: Any, generator: torch.Generator) -> tuple[list[tuple[int, int, int, int]], torch.Tensor]:
        u = torch.rand(len(self.policies), BOX_NUMBERS + NUMBERS - ADDED, generator=generator)
        added = torch.rand(len(self.policies), ADDED, generator=generator)
        rows = zip(u[:, :BOX_NUMBERS].tolist(), self.policies, strict=True)
        boxes = [sample_box(row, *image_size(image), policy.min_scale) for row, policy in rows]
        return boxes, torch.cat([u[:, BOX_NUMBERS:], added], dim=1)


def _in_turn(x: torch.Tensor, places: list[int]) -> torch.Tensor:
    return torch.cat([x[:, place] for place in places])  # (N, V, ...) to (len(places) · N, ...)


def _all_at_once(x: torch.Tensor) -> bool:
    # Selecting some of the images on a GPU would make the host wait for their indices.
    return x.is_cuda or torch.compiler.is_compiling()


def crop_views(images: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """Crop and resize images by two matrix products with PIL's antialiasing weights.

    Args:
        images: float32 (N, 3, H, W), 0 to 255.
        boxes: top, left, height, width in pixels (N, 4).
        flip: whether each crop is mirrored (N,).
        size: S, the side of a crop in pixels.

    Returns:
        crops, float32 (N, 3, S, S), rounded.
    """
    n, channels, height, width = images.shape
    top, left, h, w = boxes.unbind(dim=1)
    rows = _resize_weights(top, h, height, size)
    columns = _resize_weights(torch.where(flip, left + w, left), torch.where(flip, -w, w), width, size)
    wide = torch.bmm(images.reshape(n, channels * height, width), columns.mT).view(n, channels, height, size)
    return torch.matmul(rows[:, None], wide.round_()).round_()  # PIL rounds after each direction too


def _resize_weights(start: torch.Tensor, length: torch.Tensor, pixels: int, size: int) -> torch.Tensor:
    # (N, size, pixels): a triangle around the centre of each output pixel. Its half-width is the distance between output
    # pixels, at least 1. `inside` is at least 1 for pixels of the box and negative elsewhere. A negative length mirrors.
    step = (length / size)[:, None, None]
    places = torch.arange(size, device=start.device)[:, None] + 0.5
    sources = torch.arange(pixels, device=start.device) + 0.5
    triangle = 1 - (sources - (start[:, None, None] + places * step)).abs_().div_(step.abs().clamp(min=1))
    inside = length.abs()[:, None, None] - 2 * (sources - (start + length / 2)[:, None, None]).abs_()
    weights = torch.minimum(triangle, inside).clamp_(min=0)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def render_views(x: torch.Tensor, operations: torch.Tensor, policy: ViewPolicy) -> torch.Tensor:
    """Apply jitter, grayscale, blur and solarizing to crops.

    Args:
        x: crops, float32 (B, 3, S, S), 0 to 255. On a CPU they may be overwritten.
        operations: a row for each crop. On a CPU all rows must have the same order of jitter.

    Returns:
        views, uint8 (B, 3, S, S).
    """
    gray = operations[:, GRAY] > 0
    if policy.gray_first:
        x = _where(gray, x, _grayscale)
    x = _jitter(x, operations[:, ORDER], operations[:, FACTORS])
    if not policy.gray_first:
        x = _where(gray, x, _grayscale)
    if policy.blur_p > 0:
        x = _where(operations[:, BLUR] > 0, x, _blur, operations[:, BLUR])
    if policy.solarize_p > 0:
        x = _where(operations[:, SOLARIZE] > 0, x, _solarize)
    return _to_uint8(x.round())


def _to_uint8(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.int16).to(torch.uint8)  # on a CPU the direct cast from float32 is slow


def _jitter(x: torch.Tensor, order: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    if _all_at_once(x):
        for place in range(len(JITTER)):
            for number, operation in enumerate(_OPERATIONS):
                x = _where(order[:, place] == number, x, operation, factors[:, number])
    else:
        for number in order[0].int().tolist():
            x = _OPERATIONS[number](x, factors[:, number]) if number >= 0 else x
    return x


def _where(chosen: torch.Tensor, x: torch.Tensor, operation, *numbers: torch.Tensor) -> torch.Tensor:
    if _all_at_once(x):
        return torch.where(chosen[:, None, None, None], operation(x, *numbers), x)
    index = chosen.nonzero().squeeze(1)
    if len(index) == 0:
        return x
    return x.index_copy_(0, index, operation(x[index], *(number[index] for number in numbers)))


def _luminance(x: torch.Tensor) -> torch.Tensor:
    return (x[:, 0] * 0.299).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114)  # ITU-R 601-2


def _grayscale(x: torch.Tensor) -> torch.Tensor:
    return _luminance(x).round_()[:, None].expand_as(x)


def _truncate(x: torch.Tensor) -> torch.Tensor:
    return x.clamp_(0, 255).floor_()  # as PIL's enhancers do: other + factor (x - other)


def _brightness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _truncate(x * factor[:, None, None, None])


def _contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    factor = factor[:, None, None, None]
    mean = _luminance(x.mean(dim=(2, 3), keepdim=True)).add_(0.5).floor_()[:, None]
    return _truncate((x * factor).add_((1 - factor) * mean))


def _saturation(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _truncate(torch.lerp(_luminance(x)[:, None], x, factor[:, None, None, None]))


def _hue(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    # Few calls: on small images a call costs more than its arithmetic. `red` and `green` are 1 where that colour is the
    # largest, else 0; they are floats because boolean masks are slow.
    r, g, b = x.unbind(dim=1)
    value, least = x.amax(dim=1), x.amin(dim=1)
    chroma = value - least
    red, green = r.clone().eq_(value), g.clone().eq_(value)
    # The hue in sixths of a turn (red is 0) times the chroma, for blue as the largest colour, then for green, then for red.
    hue = (r - g).add_(chroma, alpha=4).lerp_((b - r).add_(chroma, alpha=2), green).lerp_(g - b, red)
    shift = (turns * 255).trunc() / 256 + 1  # in turns, positive; PIL's hue is a byte
    hue = hue.div_((6 * chroma).clamp_(min=1)).add_(shift[:, None, None]).frac_().mul_(6)
    parts = torch.stack([(hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], dim=1).clamp_(0, 1)
    return parts.mul_(chroma[:, None]).add_(least[:, None])


def _blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    n, channels, size, _ = x.shape
    radius = round(3 * BLUR_SIGMA[1])
    taps = torch.arange(-radius, radius + 1, device=x.device)
    weights = (-0.5 * (taps / sigma.clamp(min=BLUR_SIGMA[0])[:, None]) ** 2).exp()
    weights = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)[:, None]  # (3N, 1, taps)
    x = F.pad(x, (radius,) * 4, mode="replicate").reshape(1, n * channels, size + 2 * radius, size + 2 * radius)
    x = F.conv2d(x, weights[:, :, :, None], groups=n * channels)
    return F.conv2d(x, weights[:, :, None, :], groups=n * channels).view(n, channels, size, size)


def _solarize(x: torch.Tensor) -> torch.Tensor:
    return torch.minimum(x, 255 - x)  # levels from 128 on fall again


def _flip(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


_OPERATIONS = (_brightness, _contrast, _saturation, _hue)
