"""The views of `augment.py` for a whole batch at once, on the device that trains: every image has draws of its own.

The CPU decodes and crops (or, for small images in memory, does nothing at all); jitter, grayscale, blur and flip are
arithmetic on tensors. Shapes: `N` images, `S` view size, `H`, `W` image size. A draw is a row of `DRAW` float32 numbers.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .augment import ASPECT_RATIO, BLUR_SIGMA, TwoViews, ViewDraw, ViewPolicy
from .augment_cv2 import crop_and_resize

JITTER = ("brightness", "contrast", "saturation", "hue")
# Columns: top, left, height, width; which operation of JITTER comes at each place (-1: none); the factor of each operation;
# whether gray; the blur's deviation in pixels; whether flipped.
BOX, ORDER, FACTORS = slice(0, 4), slice(4, 8), slice(8, 12)
GRAY, BLUR, FLIP, DRAW = 12, 13, 14, 15
AT_ONCE = 256  # images on a CPU
TRIES = 10  # boxes tried before the largest centred one is taken, as torchvision does


def pack_draw(draw: ViewDraw) -> torch.Tensor:
    """One draw as a row (DRAW,)."""
    order = [JITTER.index(name) for name, _ in draw.jitter] or [-1] * 4
    factors = [dict(draw.jitter).get(name, 0.0) for name in JITTER]
    return torch.tensor([*draw.box, *order, *factors, draw.gray, draw.blur, draw.flip], dtype=torch.float32)


def unpack_draw(row: torch.Tensor) -> ViewDraw:
    """The draw of a row (DRAW,)."""
    top, left, height, width = (int(number) for number in row[BOX])
    factors = row[FACTORS].tolist()
    jitter = tuple((JITTER[int(i)], factors[int(i)]) for i in row[ORDER] if i >= 0)
    return ViewDraw((top, left, height, width), jitter, bool(row[GRAY]), float(row[BLUR]), bool(row[FLIP]))


# Drawing


def _uniforms(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    # SplitMix64 (Steele, Lea and Flood, 2014) on a counter: number j of an image depends on (seed, epoch, index, j) alone.
    start = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    with np.errstate(over="ignore"):
        counter = indices.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
        z: np.ndarray = start + counter * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def draw_views(
    policy: ViewPolicy, width: int, height: int, *, views: int, seed: int, epoch: int, indices: np.ndarray
) -> torch.Tensor:
    """Draws (len(indices), views, DRAW) of images of one size, from the distribution of `augment.draw_view`."""
    count = 2 * TRIES + 2 + 13
    u = _uniforms(seed, epoch, indices, views * count).reshape(-1, count)
    draws = np.zeros((len(u), DRAW), dtype=np.float32)
    draws[:, BOX] = _draw_boxes(u[:, : 2 * TRIES + 2], width, height, policy.min_scale)
    u = u[:, 2 * TRIES + 2 :]
    draws[:, ORDER] = np.where(u[:, :1] < policy.jitter_p, u[:, 1:5].argsort(axis=1), -1)
    strengths = np.array(policy.jitter)
    draws[:, FACTORS] = np.array([1, 1, 1, 0]) + (2 * u[:, 5:9] - 1) * strengths
    draws[:, GRAY] = u[:, 9] < policy.gray_p
    low, high = BLUR_SIGMA
    draws[:, BLUR] = np.where(u[:, 10] < policy.blur_p, low + (high - low) * u[:, 11], 0)
    draws[:, FLIP] = u[:, 12] < policy.flip_p
    return torch.from_numpy(draws).view(len(indices), views, DRAW)


def _draw_boxes(u: np.ndarray, width: int, height: int, min_scale: float) -> np.ndarray:
    area = width * height * (min_scale + (1 - min_scale) * u[:, :TRIES])
    low, high = np.log(ASPECT_RATIO)
    ratio = np.exp(low + (high - low) * u[:, TRIES : 2 * TRIES])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(axis=1)[:, None]
    w, h = (np.take_along_axis(x, first, axis=1)[:, 0] for x in (w, h))
    top, left = np.floor(u[:, -2] * (height - h + 1)), np.floor(u[:, -1] * (width - w + 1))
    centred_w, centred_h = min(width, round(height * ASPECT_RATIO[1])), min(height, round(width / ASPECT_RATIO[0]))
    centred = [(height - centred_h) // 2, (width - centred_w) // 2, centred_h, centred_w]
    return np.where(fits.any(axis=1)[:, None], np.stack([top, left, h, w], axis=1), centred)


# Rendering


@dataclass(frozen=True)
class DeviceViews:
    """Two views of every image of a batch: from `images` (N, 3, H, W), or from crops that are already of their size."""

    policy: ViewPolicy
    size: int

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`pixel_values` and `key_pixel_values`, uint8 (N, 3, S, S).

        Args:
            batch: "draws" (N, 2, DRAW), and either "images" or crops as "pixel_values", "key_pixel_values"; uint8.
        """
        draws = batch["draws"].transpose(0, 1).flatten(0, 1)  # those of the queries, then those of the keys
        if "images" in batch:
            images, crop = batch["images"].repeat(2, 1, 1, 1), True
        else:
            images, crop = torch.cat([batch["pixel_values"], batch["key_pixel_values"]]), False
        query, key = self._render_by_order(images, draws, crop).chunk(2)
        return {"pixel_values": query, "key_pixel_values": key}

    def _render_by_order(self, images: torch.Tensor, draws: torch.Tensor, crop: bool) -> torch.Tensor:
        if _all_at_once(images):
            return self._render(images, draws, crop)
        # A CPU takes those with the same order of operations together: none is done in vain, and they fit into its cache.
        code = (draws[:, ORDER] @ torch.tensor([64.0, 16.0, 4.0, 1.0])).int()
        rows, counts = code.argsort(), code.unique(return_counts=True)[1]
        groups = [index for group in rows.split(counts.tolist()) for index in group.split(AT_ONCE)]
        views = [self._render(images.index_select(0, index), draws[index], crop) for index in groups]
        return torch.cat(views).index_select(0, rows.argsort())

    def _render(self, images: torch.Tensor, draws: torch.Tensor, crop: bool) -> torch.Tensor:
        x, flip = images.float(), draws[:, FLIP] > 0
        x = crop_views(x, draws[:, BOX], flip, self.size) if crop else _where(flip, x, _flip)
        return render_views(x, draws, self.policy)


@dataclass(frozen=True)
class TwoCrops:
    """What is left to the CPU: two crops of one image, and the draws for `DeviceViews`."""

    views: TwoViews

    def __call__(self, image: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Crops (3, S, S) of an image (3, H, W), both uint8, and their draws (2, DRAW)."""
        draws = self.views.draws(image, generator)
        query, key = (crop_and_resize(image, draw.box, self.views.size) for draw in draws)
        packed = torch.stack([pack_draw(draw) for draw in draws])
        return {"pixel_values": query, "key_pixel_values": key, "draws": packed}


def _all_at_once(x: torch.Tensor) -> bool:
    # To work on a part of the images a GPU would have to tell the host which, and wait.
    return x.is_cuda or torch.compiler.is_compiling()


def crop_views(images: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """Boxes (N, 4) of images (N, 3, H, W), resized (N, 3, S, S): two matrix products with PIL's antialiased weights.

    Args:
        flip: which are mirrored (N,).
    """
    n, channels, height, width = images.shape
    top, left, h, w = boxes.unbind(dim=1)
    rows = _resize_weights(top, h, height, size)
    columns = _resize_weights(torch.where(flip, left + w, left), torch.where(flip, -w, w), width, size)
    wide = torch.bmm(images.reshape(n, channels * height, width), columns.mT).view(n, channels, height, size)
    return torch.einsum("nsh,nchw->ncsw", rows, wide.round_()).round_()  # PIL too rounds after each direction


def _resize_weights(start: torch.Tensor, length: torch.Tensor, pixels: int, size: int) -> torch.Tensor:
    # (N, size, pixels): a triangle around each output pixel's centre, as wide as it is apart from the next one, within the
    # box. `inside` is at least 1 for the pixels of the box and negative for others. A negative length runs backwards.
    step = (length / size)[:, None, None]
    places = torch.arange(size, device=start.device)[:, None] + 0.5
    sources = torch.arange(pixels, device=start.device) + 0.5
    triangle = 1 - (sources - (start[:, None, None] + places * step)).abs_().div_(step.abs().clamp(min=1))
    inside = length.abs()[:, None, None] - 2 * (sources - (start + length / 2)[:, None, None]).abs_()
    weights = torch.minimum(triangle, inside).clamp_(min=0)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def render_views(x: torch.Tensor, draws: torch.Tensor, policy: ViewPolicy) -> torch.Tensor:
    """Everything but crop and flip: views uint8 (N, 3, S, S) of crops (N, 3, S, S) in float32, 0 to 255.

    On a CPU all must have the same order of operations.
    """
    gray = draws[:, GRAY] > 0
    if policy.gray_first:
        x = _where(gray, x, _grayscale)
    x = _jitter(x, draws[:, ORDER], draws[:, FACTORS])
    if not policy.gray_first:
        x = _where(gray, x, _grayscale)
    if policy.blur_p > 0:
        x = _where(draws[:, BLUR] > 0, x, _blur, draws[:, BLUR])
    return x.round().to(torch.uint8)


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
    return x.index_copy(0, index, operation(x[index], *(number[index] for number in numbers)))


def _luminance(x: torch.Tensor) -> torch.Tensor:
    return (x[:, 0] * 0.299).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114)  # ITU-R 601-2


def _grayscale(x: torch.Tensor) -> torch.Tensor:
    return _luminance(x).round_()[:, None].expand_as(x)


def _blend(x: torch.Tensor, other: torch.Tensor | float, factor: torch.Tensor) -> torch.Tensor:
    # PIL's enhancers: other + factor (x - other), truncated.
    return torch.add(x * factor, other).clamp_(0, 255).floor_()


def _brightness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(x, 0.0, factor[:, None, None, None])


def _contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    factor = factor[:, None, None, None]
    mean = _luminance(x.mean(dim=(2, 3), keepdim=True)).add_(0.5).floor_()[:, None]
    return _blend(x, (1 - factor) * mean, factor)


def _saturation(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    factor = factor[:, None, None, None]
    return _blend(x, (1 - factor) * _luminance(x)[:, None], factor)


def _hue(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    r, g, b = x.unbind(dim=1)
    value, least = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - least
    # Levels are whole numbers: 1 where red, and else where green, is the largest, 0 elsewhere; without slow masks.
    red = (r - value + 1).clamp_(min=0)
    green = (g - value + 1).clamp_(min=0).mul_(1 - red)
    blue = 1 - red - green
    # The hue in sixths of a turn, red at 0, and where the shift takes it.
    hue = red.mul_(g - b).addcmul_(green, b - r).addcmul_(blue, r - g).div_(chroma.clamp(min=1))
    hue.add_(green, alpha=2).add_(blue, alpha=4)
    shift = (turns * 255).trunc() * (6 / 256)  # PIL's hue is a byte
    hue += shift[:, None, None]
    hue -= 6 * (hue / 6).floor_()
    parts = [(hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()]
    return torch.stack([part.clamp_(0, 1).mul_(chroma).add_(least) for part in parts], dim=1)


def _blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    n, channels, size, _ = x.shape
    radius = round(3 * BLUR_SIGMA[1])
    taps = torch.arange(-radius, radius + 1, device=x.device)
    weights = (-0.5 * (taps / sigma.clamp(min=BLUR_SIGMA[0])[:, None]) ** 2).exp()
    weights = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)[:, None]  # (3N, 1, taps)
    x = F.pad(x, (radius,) * 4, mode="replicate").reshape(1, n * channels, size + 2 * radius, size + 2 * radius)
    x = F.conv2d(x, weights[:, :, :, None], groups=n * channels)
    return F.conv2d(x, weights[:, :, None, :], groups=n * channels).view(n, channels, size, size)


def _flip(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


_OPERATIONS = (_brightness, _contrast, _saturation, _hue)
