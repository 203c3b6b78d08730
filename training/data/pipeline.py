"""The training images of a run, and what renders their views, for the chosen view back end."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from transformers import TrainingArguments

from ..views.device import DeviceViews, TwoCrops
from ..views.opencv import render_view_cv2
from ..views.pil import TwoViews, render_view
from ..views.policy import build_policy
from .decode import decode_image, decode_tensor
from .images import MapImages, StreamedImages, TrainingImages
from .memory_images import MemoryImages
from .sources import SMALL, DataArguments


def training_images(data: DataArguments, rows: Any, training: TrainingArguments) -> TrainingImages:
    """Images with the two views that training sees.

    Args:
        rows: `ImageSplits.train` of the same arguments.
        training: whose seed, batch and processes they are for.

    Raises:
        ValueError: the images do not suit the view back end, or none can be read.
    """
    transform = two_views(data)
    decode = decode_image if data.augment == "pil" else decode_tensor
    if not data.streaming:
        if data.augment == "device" and _are_small(rows):
            return MemoryImages(rows, transform.policy, training.seed)
        return MapImages(rows, transform, training.seed, decode)
    return StreamedImages(
        rows,
        transform,
        batch_size=training.per_device_train_batch_size,
        seed=training.seed,
        rank=training.process_index,
        world_size=training.world_size,
        buffer_size=data.shuffle_buffer,
        decode=decode,
    )


def two_views(data: DataArguments) -> TwoViews | TwoCrops:
    """The transform from an image to its two views, or to the crops that `build_render` makes views of."""
    policy = build_policy(data.augmentation, data.horizontal_flip, data.crop_min_scale)
    if data.augment == "device":
        return TwoCrops(policy, data.image_size)
    return TwoViews(policy, data.image_size, render_view_cv2 if data.augment == "cv2" else render_view)


def build_render(data: DataArguments, compiled: bool) -> Callable | None:
    """What makes the views of a batch on the device; None where the images come as views."""
    if data.augment != "device":
        return None
    views = two_views(data)
    render = DeviceViews(views.policy, views.size)
    return torch.compile(render.__call__) if compiled else render


def _are_small(rows: Any) -> bool:
    for row in rows:
        with suppress(OSError):
            return max(decode_image(row["image"]).size) <= SMALL
    return False
