"""The views: random ones for pretraining and probing, a fixed one for evaluation.

A random view is drawn first (`draw_view`: a few numbers) and rendered afterwards (`render_view`: pixels), so that every
draw can be seen, tested and reproduced. Draws consume the generator exactly as torchvision's reference transforms
consume the global one: equal seeds give equal images. Views leave as uint8 and the model normalises them, which moves a
quarter of the bytes. Sizes are pixels, probabilities lie in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode

from .policy import ViewDraw, ViewPolicy, draw_view, image_size

_JITTER = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
}


def render_view(image: Image.Image, draw: ViewDraw, size: int, policy: ViewPolicy) -> torch.Tensor:
    """The drawn view of an RGB image, uint8 (3, size, size)."""
    top, left, h, w = draw.box
    view = TF.resized_crop(image, top, left, h, w, [size, size], InterpolationMode.BILINEAR)
    if draw.gray and policy.gray_first:
        view = TF.rgb_to_grayscale(view, num_output_channels=3)
    for name, factor in draw.jitter:
        view = _JITTER[name](view, factor)
    if draw.gray and not policy.gray_first:
        view = TF.rgb_to_grayscale(view, num_output_channels=3)
    if draw.blur:
        view = view.filter(ImageFilter.GaussianBlur(radius=draw.blur))
    if draw.flip:
        view = TF.hflip(view)
    return _to_uint8(view)


def _to_uint8(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class TwoViews:
    """Pretraining: two independent random views of one image.

    Args:
        render: `render_view` for PIL images, or `augment_cv2.render_view_cv2` for tensors.
    """

    policy: ViewPolicy
    size: int
    render: Callable[[Any, ViewDraw, int, ViewPolicy], torch.Tensor] = render_view

    def __call__(self, image: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        query, key = (self.render(image, draw, self.size, self.policy) for draw in self.draws(image, generator))
        return {"pixel_values": query, "key_pixel_values": key}

    def draws(self, image: Any, generator: torch.Generator) -> list[ViewDraw]:
        """The random numbers of the query's view and of the key's."""
        return [draw_view(self.policy, *image_size(image), generator) for _ in range(2)]


@dataclass(frozen=True)
class OneView:
    """Training view of the linear protocol."""

    policy: ViewPolicy
    size: int

    def __call__(self, image: Image.Image, generator: torch.Generator) -> dict[str, torch.Tensor]:
        draw = draw_view(self.policy, image.width, image.height, generator)
        return {"pixel_values": render_view(image, draw, self.size, self.policy)}


@dataclass(frozen=True)
class EvaluationView:
    """Short side to `resize`, then the centre `size` x `size`."""

    resize: int
    size: int

    def __call__(self, image: Image.Image, generator: torch.Generator) -> dict[str, torch.Tensor]:
        view = TF.resize(image, [self.resize], InterpolationMode.BILINEAR)
        return {"pixel_values": _to_uint8(TF.center_crop(view, [self.size, self.size]))}
