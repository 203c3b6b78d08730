"""The ImageNet evaluation transform: resize the short side, cut the centre, normalise.

Equal to torchvision's `Resize(256)`, `CenterCrop(224)`, `ToTensor`, `Normalize`. Sizes are pixels.
"""

from collections.abc import Sequence

import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


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
    # Creating it on a GPU would make the host wait for the GPU.
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
