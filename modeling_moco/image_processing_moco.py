"""The ImageNet evaluation transform: resize the short side, cut the centre, normalise.

Equal to torchvision's `Resize(256)`, `CenterCrop(224)`, `ToTensor`, `Normalize`. Sizes are pixels.
"""

from collections.abc import Sequence

import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 images (N, 3, H, W) to float32 in channels_last layout, scaled to [0, 1] and standardised per channel."""
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.div_(255).sub_(_per_channel(mean, images.device)).div_(_per_channel(std, images.device))


def _per_channel(values: Sequence[float], device: torch.device) -> torch.Tensor:
    # Made on the device itself it would wait for a GPU to finish what it is doing.
    return torch.tensor(values).view(-1, 1, 1).to(device, non_blocking=True)


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

    def center_crop(self, image, size, **kwargs):
        # transformers truncates an odd margin where torchvision rounds it: one pixel in a fifth of all images.
        height, width = image.shape[-2:]
        if height < size.height or width < size.width:
            return super().center_crop(image, size, **kwargs)  # type: ignore[misc]  # pads; a backend's method
        top, left = round((height - size.height) / 2), round((width - size.width) / 2)
        return image[..., top : top + size.height, left : left + size.width]


class MoCoImageProcessor(_EvaluationTransform, TorchvisionBackend):
    """Evaluation transform on torchvision tensors: fast, within one grey level of the PIL backend."""


class MoCoImageProcessorPil(_EvaluationTransform, PilBackend):
    """Evaluation transform on PIL: equal to the transform that the papers evaluate with."""
