"""Views of images with masks: scaled, cut and perhaps mirrored (arXiv:1911.05722, A.5); or whole, to evaluate.

Sizes are pixels. PIL scales images bilinearly and masks by the nearest pixel. A view depends on (seed, epoch, index) alone, as
all views here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from modeling_moco.image_processing_moco import normalize

from ...transfer.images import TransferImages
from .layouts import IGNORED
from .opening import SegmentationSplit

GREY = (124, 116, 104)  # the mean of ImageNet, which becomes about zero
TRIES = 10


@dataclass(frozen=True)
class SegmentationViewParams:
    """What is drawn for a view.

    Args:
        scale: factor of both sides.
        flip: whether the view is mirrored.
        top, left: place of the crop, in [0, 1): 0 at the upper left of the scaled image, 1 at the lower right.
    """

    scale: float
    flip: bool
    top: float
    left: float


@dataclass(frozen=True)
class SegmentationView:
    """The distribution of views.

    Args:
        crop: side of a view. What is left of it beside a smaller image is padded.
        scales: the least and the greatest factor, between which one is drawn with equal density.
        flip_p: probability of a mirrored view.

    Raises:
        ValueError: a setting is out of its range.
    """

    crop: int
    scales: tuple[float, float] = (0.5, 2.0)
    flip_p: float = 0.5

    def __post_init__(self):
        if self.crop < 1:
            raise ValueError(f"crop ({self.crop}) must be at least 1 pixel: the paper uses 513 and 769")
        if not 0 < self.scales[0] <= self.scales[1] < 100:
            raise ValueError(
                f"scales ({self.scales[0]:g}, {self.scales[1]:g}) must be two factors above 0, the least one first: the paper "
                "uses 0.5 and 2"
            )

    def sample(self, generator: torch.Generator) -> SegmentationViewParams:
        """Draw a view: four numbers, whatever comes of them."""
        scale, flip, top, left = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        low, high = self.scales
        return SegmentationViewParams(low + (high - low) * scale, flip < self.flip_p, top, left)

    def box(
        self, size: tuple[int, int], params: SegmentationViewParams
    ) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
        """Width and height of the scaled image, and left, top, right and bottom of the crop in it."""
        width, height = (max(1, int(side * params.scale + 0.5)) for side in size)
        left = int(params.left * (max(0, width - self.crop) + 1))
        top = int(params.top * (max(0, height - self.crop) + 1))
        return (width, height), (left, top, min(left + self.crop, width), min(top + self.crop, height))

    def pixels(self, image: Image.Image, params: SegmentationViewParams) -> torch.Tensor:
        """The view of an RGB image without padding, uint8 (3, H, W)."""
        view = self._render(image, params, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()

    def labels(self, mask: np.ndarray, params: SegmentationViewParams) -> torch.Tensor:
        """The view of a mask, uint8 (H, W)."""
        return torch.from_numpy(np.array(self._render(Image.fromarray(mask), params, Image.Resampling.NEAREST)))

    def _render(self, image: Image.Image, params: SegmentationViewParams, by: Image.Resampling) -> Image.Image:
        size, box = self.box(image.size, params)
        view = image.resize(size, by).crop(box)
        return ImageOps.mirror(view) if params.flip else view


class SegmentationImages(TransferImages):
    """Views of the images of a split to train on, by index.

    A view in which no pixel counts is drawn again, at most ten times; then the crop moves to a pixel that counts.

    Args:
        split: the images and their masks; each has a pixel that counts.
        view: the distribution of views.
        seed: of the views.
    """

    split: SegmentationSplit

    def __init__(self, split: SegmentationSplit, view: SegmentationView, seed: int = 0):
        super().__init__(split, seed)
        self.view = view

    def view_of(self, index: int, image: Image.Image) -> dict[str, Any]:
        """ "pixel_values", uint8 (3, H, W), and "labels", uint8 (H, W): at most the crop's size."""
        generator, mask = self.generator(index), self.split.mask(index)
        for _ in range(TRIES):
            params = self.view.sample(generator)
            labels = self.view.labels(mask, params)
            if (labels != IGNORED).any():
                break
        else:
            params = self._towards_a_label(mask)
            labels = self.view.labels(mask, params)
        return {"pixel_values": self.view.pixels(image, params), "labels": labels}

    def _towards_a_label(self, mask: np.ndarray) -> SegmentationViewParams:
        row, column = (int(place) for place in np.argwhere(mask != IGNORED)[0])
        height, width = (max(0, side - self.view.crop) + 1 for side in mask.shape)
        return SegmentationViewParams(1.0, False, min(row, height - 1) / height, min(column, width - 1) / width)


class SegmentationEvaluationImages(torch.utils.data.Dataset):
    """The images of a split to evaluate on, whole and at their own size, by index.

    An image that cannot be read is logged once and counted, and a grey one of its size takes its place.

    Args:
        split: the images and their masks.
    """

    def __init__(self, split: SegmentationSplit):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """ "pixel_values", uint8 (3, H, W); "labels", uint8 (H, W); and "image_id", the number of the image."""
        try:
            image = self.split.image(index)
        except OSError as error:
            self.split.broken.add(self.split.rows[index], index, error)
            image = Image.new("RGB", tuple(self.split.sizes[index].tolist()), GREY)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return {"pixel_values": pixels, "labels": torch.from_numpy(self.split.mask(index)), "image_id": index}


@dataclass(frozen=True)
class SegmentationCollator:
    """Make a batch of views of at most the crop's size.

    Images are normalised before they are padded on the right and below, so that padding is zero; its label is 255.

    Args:
        image_mean, image_std: one number per channel, as in `MoCoConfig`.
        crop: side of the batch's images.
    """

    image_mean: Sequence[float]
    image_std: Sequence[float]
    crop: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """ "pixel_values" (N, 3, crop, crop), float32, and "labels" (N, crop, crop), int64."""
        pixels = torch.zeros(len(rows), 3, self.crop, self.crop)
        labels = torch.full((len(rows), self.crop, self.crop), IGNORED)
        for place, row in enumerate(rows):
            height, width = row["labels"].shape
            pixels[place, :, :height, :width] = normalize(row["pixel_values"][None], self.image_mean, self.image_std)[0]
            labels[place, :height, :width] = row["labels"]
        return {"pixel_values": pixels, "labels": labels}
