"""The backend `cv2`: torch and OpenCV render the views of `pil.py` from the same parameters, more than three times as fast.

A view differs from PIL's by half a level of 255 on average (tests/views/test_renderers.py). The crop uses PIL's filter in
another arithmetic, hues are rounded differently, and the blur is a true Gaussian, which PIL approximates by three box blurs.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from .policy import ViewParams, ViewPolicy
from .scaled import Box, Scaled

cv2.setNumThreads(1)  # each worker is a process: threads inside the workers would compete for the same cores


def crop_and_resize(image: torch.Tensor | Scaled, box: Box, size: int) -> torch.Tensor:
    """Crop an image, uint8 (3, H, W), to a box and resize it with PIL's antialiasing.

    Returns:
        the crop, uint8 (3, size, size), whose channels lie last in memory.
    """
    if isinstance(image, Scaled):
        return torch.from_numpy(np.array(image.crop(box, size))).permute(2, 0, 1)
    top, left, h, w = box
    # torch resizes fastest in channels-last layout, which decoders return. A slice is not in that layout, hence the copy.
    crop = image[None, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
    return F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True, align_corners=False)[0]


def render_view_cv2(image: torch.Tensor | Scaled, params: ViewParams, size: int, policy: ViewPolicy) -> torch.Tensor:
    """Render the view with these parameters.

    Args:
        image: RGB, uint8 (3, H, W).
        size: side of the view in pixels.

    Returns:
        the view, uint8 (3, size, size).
    """
    view = crop_and_resize(image, params.box, size).permute(1, 2, 0).contiguous().numpy()
    if params.gray and policy.gray_first:
        view = _grayscale(view)
    for name, factor in params.jitter:
        view = _JITTER[name](view, factor)
    if params.gray and not policy.gray_first:
        view = _grayscale(view)
    if params.blur:
        view = cv2.GaussianBlur(view, (0, 0), params.blur, borderType=cv2.BORDER_REPLICATE)
    if params.solarize:
        view = cv2.LUT(view, SOLARIZED)
    if params.flip:
        view = cv2.flip(view, 1)
    return torch.from_numpy(view).permute(2, 0, 1)


def _luminance(view: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)


def _grayscale(view: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(_luminance(view), cv2.COLOR_GRAY2RGB)


LEVELS = np.arange(256, dtype=np.float32)
SOLARIZED = np.minimum(LEVELS, 255 - LEVELS).astype(np.uint8)  # levels from 128 on fall again


def _blend_with(level: float, view: np.ndarray, factor: float) -> np.ndarray:
    return cv2.LUT(view, np.clip(level + factor * (LEVELS - level), 0, 255).astype(np.uint8))  # PIL truncates too


def _brightness(view: np.ndarray, factor: float) -> np.ndarray:
    return _blend_with(0, view, factor)


def _contrast(view: np.ndarray, factor: float) -> np.ndarray:
    return _blend_with(int(cv2.mean(_luminance(view))[0] + 0.5), view, factor)


def _saturation(view: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(view, factor, _grayscale(view), 1 - factor, -0.499)  # it rounds, PIL truncates


def _hue(view: np.ndarray, factor: float) -> np.ndarray:
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(factor * 255) % 256)  # a turn has 256 steps; the sum wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


_JITTER = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}
