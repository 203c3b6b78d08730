"""The reference backend `pil`: random views for pretraining and probing, a fixed view for evaluation.

`sample_view` samples the parameters of a random view (a few numbers), then `render_view` makes its pixels. Parameters can
therefore be shown, tested and reproduced. Sampling consumes the generator exactly as torchvision's reference transforms
consume the global generator: equal seeds give equal images. Views are uint8, a quarter of the bytes of float32; the model
normalises them. Sizes are in pixels, probabilities lie in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode

from .policy import VIEWS, Policies, ViewParams, ViewPolicy, image_size, sample_view
from .scaled import Scaled, pixels_for

_JITTER = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
}


def render_view(image: Image.Image | Scaled, params: ViewParams, size: int, policy: ViewPolicy) -> torch.Tensor:
    """Render the view of an RGB image with these parameters: uint8 (3, size, size)."""
    if isinstance(image, Scaled):
        view = image.crop(params.box, size)
    else:
        view = TF.resized_crop(image, *params.box, [size, size], InterpolationMode.BILINEAR)
    if params.gray and policy.gray_first:
        view = TF.rgb_to_grayscale(view, num_output_channels=3)
    for name, factor in params.jitter:
        view = _JITTER[name](view, factor)
    if params.gray and not policy.gray_first:
        view = TF.rgb_to_grayscale(view, num_output_channels=3)
    if params.blur:
        view = view.filter(ImageFilter.GaussianBlur(radius=params.blur))
    if params.solarize:
        view = ImageOps.solarize(view)
    if params.flip:
        view = TF.hflip(view)
    return _to_uint8(view)


def _to_uint8(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Views:
    """Independent random views of one image: two to pretrain, one for a memory bank or to train a classifier.

    Args:
        policies: distribution of each view.
        size: side of a view in pixels.
        render: `render_view` for PIL images, or `render_view_cv2` for tensors.
    """

    policies: Policies
    size: int
    render: Callable[[Any, ViewParams, int, ViewPolicy], torch.Tensor] = render_view

    def __call__(self, image: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Views of an image: "pixel_values" (the query) and, of two, "key_pixel_values", uint8 (3, size, size)."""
        sampled = self.sample(image, generator)
        pixels = pixels_for(image, [params.box for params in sampled], self.size)
        views = zip(VIEWS, sampled, self.policies, strict=False)
        return {name: self.render(pixels, params, self.size, policy) for name, params, policy in views}

    def sample(self, image: Any, generator: torch.Generator) -> list[ViewParams]:
        """Sample the parameters of each view, the query first."""
        return [sample_view(policy, *image_size(image), generator) for policy in self.policies]


@dataclass(frozen=True)
class OwnViews:
    """Pretraining: views of one image by a function of one's own.

    Args:
        view: makes a view (3, S, S) of an RGB image, drawn from the generator alone: uint8, or of floats and normalised.
        count: views of an image: two, or one for a memory bank.
    """

    view: Callable[[Image.Image, torch.Generator], torch.Tensor]
    count: int = 2

    def __call__(self, image: Image.Image, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """
        Raises:
            ValueError: what the function makes is no view.
        """
        return {name: self._view(image, generator) for name in VIEWS[: self.count]}

    def _view(self, image: Image.Image, generator: torch.Generator) -> torch.Tensor:
        view = self.view(image, generator)
        if not isinstance(view, torch.Tensor) or view.ndim != 3 or len(view) != 3:
            found = tuple(view.shape) if isinstance(view, torch.Tensor) else type(view).__name__
            raise ValueError(
                f"view makes {found} of an image: return a tensor (3, S, S), uint8 or of normalised floats"
            )
        return view


@dataclass(frozen=True)
class EvaluationView:
    """Resize the short side to `resize` pixels, then cut out the centre of `size` x `size` pixels."""

    resize: int
    size: int

    def __call__(self, image: Image.Image, generator: torch.Generator) -> dict[str, torch.Tensor]:
        view = TF.resize(image, [self.resize], InterpolationMode.BILINEAR)
        return {"pixel_values": _to_uint8(TF.center_crop(view, [self.size, self.size]))}
