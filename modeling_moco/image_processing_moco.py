"""The ImageNet evaluation transform: resize the short side, cut the centre, normalise.

Equal to torchvision's `Resize(256)`, `CenterCrop(224)`, `ToTensor`, `Normalize`. Sizes are pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

MAX_SAMPLE_VALUE = 281  # TIFF 6.0, section 8


def to_rgb(image: Image.Image) -> Image.Image:
    """The image with 8 bits of red, green and blue, the same in training, evaluation and the image processors.

    Grey levels of 16 bits are scaled to 8 (PIL would clip them), by their own number of bits where a TIFF file states it.
    Transparency is dropped, as transformers' pipelines and timm do before any processor sees the image.

    Raises:
        ValueError: the pixels have 32 bits, whose range nobody knows, or PIL cannot convert them.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PIL scales PPM to 16 bits
        white = _white(image)
        levels = np.minimum(np.asarray(image).astype(np.uint32), white)
        return Image.fromarray(((levels * 255 + white // 2) // white).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("grey levels of 32 bits have no known range: write the images with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # or PIL warns that it drops the transparency
    return image.convert("RGB")


def _white(image: Image.Image) -> int:
    """The largest grey level that a 16-bit image can have."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        return int(image.tag_v2.get(MAX_SAMPLE_VALUE, (2**bits - 1,))[0])
    return 2**16 - 1


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalise uint8 images (N, 3, H, W): scale to [0, 1], subtract the mean, divide by the standard deviation.

    Args:
        mean, std: one number per channel.

    Returns:
        float32 images (N, 3, H, W) in channels_last layout.
    """
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.div_(255).sub_(_per_channel(mean, images.device)).div_(_per_channel(std, images.device))


def _per_channel(values: Sequence[float], device: torch.device) -> torch.Tensor:
    # Filled on the device: a copy from the host's memory could wait for all that a GPU has been given before.
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])


class _EvaluationTransform:
    resample = PILImageResampling.BILINEAR
    size = {"shortest_edge": 256}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def process_image(self, image, do_convert_rgb=None, *args, **kwargs):
        # transformers would clip 16 bits and put white behind what is transparent.
        if do_convert_rgb and isinstance(image, Image.Image):
            image = to_rgb(image)
        return super().process_image(image, do_convert_rgb, *args, **kwargs)  # type: ignore[misc]  # the backend's

    def center_crop(self, image, size, **kwargs):
        # transformers truncates an odd margin, torchvision rounds it: a fifth of all images would be shifted by one pixel.
        height, width = image.shape[-2:]
        if height < size.height or width < size.width:
            return super().center_crop(image, size, **kwargs)  # type: ignore[misc]  # the backend's method, which pads
        top, left = round((height - size.height) / 2), round((width - size.width) / 2)
        return image[..., top : top + size.height, left : left + size.width]


class MoCoImageProcessor(_EvaluationTransform, TorchvisionBackend):
    """Evaluation transform on torchvision tensors: fast, and within one grey level of the PIL backend."""


class MoCoImageProcessorPil(_EvaluationTransform, PilBackend):
    """Evaluation transform on PIL: equal to the papers' transform."""
