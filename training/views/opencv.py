"""The drawn views of `augment.py` rendered by torch and OpenCV instead of PIL: the same draws, more than three times as fast.

Against PIL the mean difference of a view is half a level of 255 (tests/test_augment_backends.py): the crop is PIL's
filter in another arithmetic, hues are rounded otherwise, and the blur is a Gaussian where PIL runs three boxes.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from .policy import ViewDraw, ViewPolicy

cv2.setNumThreads(1)  # workers are processes: threads of theirs would fight for the same cores


def crop_and_resize(image: torch.Tensor, box: tuple[int, int, int, int], size: int) -> torch.Tensor:
    """The box (top, left, height, width) of an image (3, H, W), uint8, as (3, size, size), antialiased like PIL's."""
    top, left, h, w = box
    # torch has fast code for the layout that decoders leave, channels last; it takes no part of an image, hence the copy.
    crop = image[None, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
    return F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True, align_corners=False)[0]


def render_view_cv2(image: torch.Tensor, draw: ViewDraw, size: int, policy: ViewPolicy) -> torch.Tensor:
    """The drawn view of an RGB image (3, H, W), uint8 (3, size, size)."""
    view = crop_and_resize(image, draw.box, size).permute(1, 2, 0).contiguous().numpy()
    if draw.gray and policy.gray_first:
        view = _grayscale(view)
    for name, factor in draw.jitter:
        view = _JITTER[name](view, factor)
    if draw.gray and not policy.gray_first:
        view = _grayscale(view)
    if draw.blur:
        view = cv2.GaussianBlur(view, (0, 0), draw.blur, borderType=cv2.BORDER_REPLICATE)
    if draw.flip:
        view = cv2.flip(view, 1)
    return torch.from_numpy(view).permute(2, 0, 1)


def _luminance(view: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)


def _grayscale(view: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(_luminance(view), cv2.COLOR_GRAY2RGB)


LEVELS = np.arange(256, dtype=np.float32)


def _blend_with(level: float, view: np.ndarray, factor: float) -> np.ndarray:
    return cv2.LUT(view, np.clip(level + factor * (LEVELS - level), 0, 255).astype(np.uint8))  # truncated, as PIL


def _brightness(view: np.ndarray, factor: float) -> np.ndarray:
    return _blend_with(0, view, factor)


def _contrast(view: np.ndarray, factor: float) -> np.ndarray:
    return _blend_with(int(cv2.mean(_luminance(view))[0] + 0.5), view, factor)


def _saturation(view: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(view, factor, _grayscale(view), 1 - factor, -0.499)  # rounded, where PIL truncates


def _hue(view: np.ndarray, factor: float) -> np.ndarray:
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(factor * 255) % 256)  # 256 steps to the turn; it wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


_JITTER = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}
