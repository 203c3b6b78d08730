"""Views for detectors: the whole image at one of several sizes, perhaps mirrored, with its boxes and masks.

Sizes are pixels. The rules are detectron2's (`ResizeShortestEdge`, `RandomFlip`, `transform_instance_annotations`), and PIL
resizes. A view depends on (seed, epoch, index) alone, as all views here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ...transfer.images import TransferImages
from .masks import rasterize
from .objects import Objects, is_empty
from .opening import DetectionSplit

LONGEST = 1333  # of the long side, in all published runs
GREY = (124, 116, 104)  # the mean of ImageNet, which becomes about zero


def view_size(width: int, height: int, short: int, longest: int = LONGEST) -> tuple[int, int]:
    """Width and height of an image whose short side is made `short`, or whose long side `longest` where it would be longer.

    Each is rounded to the nearest pixel, as detectron2 does; transformers' DETR rounds down.
    """
    scale = short / min(width, height)
    sides = [scale * side if side != min(width, height) else float(short) for side in (width, height)]
    if max(sides) > longest:
        scale = longest / max(sides)
        sides = [side * scale for side in sides]
    return max(int(sides[0] + 0.5), 1), max(int(sides[1] + 0.5), 1)


@dataclass(frozen=True)
class DetectionViewParams:
    """What is drawn for a view.

    Args:
        short: length of the short side in pixels.
        flip: whether the view is mirrored.
    """

    short: int
    flip: bool


@dataclass(frozen=True)
class DetectionView:
    """The distribution of views.

    Args:
        sizes: lengths of the short side, one of which is drawn.
        longest: of the long side.
        flip_p: probability of a mirrored view.

    Raises:
        ValueError: a size is no length, or larger than `longest`; or `flip_p` is no probability.
    """

    sizes: Sequence[int]
    longest: int = LONGEST
    flip_p: float = 0.5

    def __post_init__(self):
        if not self.sizes or not all(1 <= size <= self.longest for size in self.sizes):
            raise ValueError(
                f"sizes ({list(self.sizes)}) must be lengths of 1 to {self.longest} pixels: detectron2 trains with 480 to 800"
            )
        if not 0 <= self.flip_p <= 1:
            raise ValueError(f"flip_p ({self.flip_p}) must lie in [0, 1]: detectron2 flips half of the images, 0.5")

    def sample(self, generator: torch.Generator) -> DetectionViewParams:
        """Draw a view."""
        size = int(torch.randint(len(self.sizes), (1,), generator=generator))
        flip = torch.rand(1, generator=generator).item() < self.flip_p
        return DetectionViewParams(self.sizes[size], flip)

    def pixels(self, image: Image.Image, params: DetectionViewParams) -> torch.Tensor:
        """The view of an RGB image, uint8 (3, H, W)."""
        view = image.resize(view_size(*image.size, params.short, self.longest), Image.Resampling.BILINEAR)
        if params.flip:
            view = ImageOps.mirror(view)
        return torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()

    def labels(self, objects: Objects, size: tuple[int, int], params: DetectionViewParams) -> dict[str, torch.Tensor]:
        """The objects of a view that a detector learns from, in transformers' form.

        Boxes are clipped to the view. Crowds, boxes that are empty then, and masks without a pixel are left out.

        Args:
            objects: of the image.
            size: width and height of the image.
            params: of the view.

        Returns:
            "boxes" (n, 4): centre x, centre y, width and height as fractions of the view, float32; "class_labels" (n,), int64;
            and with masks "masks" (n, H, W), bool.
        """
        objects = objects.select(objects.trainable())
        width, height = view_size(*size, params.short, self.longest)
        boxes = _move(objects.boxes.reshape(-1, 2), size, (width, height), params.flip).reshape(-1, 4)
        if params.flip:
            boxes = boxes[:, [2, 1, 0, 3]]
        boxes = np.clip(boxes, 0, [width, height, width, height])
        kept = ~is_empty(boxes)
        labels = {}
        if objects.segmentations is not None:
            masks = np.zeros((len(boxes), height, width), bool)
            for place, mask in enumerate(objects.segmentations):
                masks[place] = _view_of_mask(mask, size, (width, height), params.flip)
            kept &= masks.any((1, 2))
            labels["masks"] = torch.from_numpy(masks[kept])
        boxes = boxes[kept]
        centred = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
        labels["boxes"] = torch.from_numpy(centred / [width, height, width, height]).float()
        labels["class_labels"] = torch.from_numpy(objects.labels[kept])
        return labels


def _move(points: np.ndarray, size: tuple[int, int], view: tuple[int, int], flip: bool) -> np.ndarray:
    """Where points x, y (n, 2) of an image lie in its view."""
    moved = points * (np.array(view) / np.array(size))
    if flip:
        moved = np.stack([view[0] - moved[:, 0], moved[:, 1]], 1)
    return np.asarray(moved)


def _view_of_mask(mask: Any, size: tuple[int, int], view: tuple[int, int], flip: bool) -> np.ndarray:
    if isinstance(mask, dict):
        pixels = rasterize(mask, *view)
        return pixels[:, ::-1] if flip else pixels
    moved = (_move(np.array(polygon).reshape(-1, 2), size, view, flip).ravel().tolist() for polygon in mask)
    return rasterize(list(moved), *view)


class DetectionImages(TransferImages):
    """Views of the images of a split to train on, by index.

    Args:
        split: the images and their objects.
        view: the distribution of views.
        seed: of the views, and of the order in which batches are made.
    """

    split: DetectionSplit

    def __init__(self, split: DetectionSplit, view: DetectionView, seed: int = 0):
        super().__init__(split, seed)
        self.view = view

    def view_params(self, index: int) -> DetectionViewParams:
        """What is drawn for an image in this epoch."""
        return self.view.sample(self.generator(index))

    def view_of(self, index: int, image: Image.Image) -> dict[str, Any]:
        """ "pixel_values", uint8 (3, H, W); "labels", as of `DetectionView.labels`; and "image_id", the number of the image."""
        params = self.view_params(index)
        labels = self.view.labels(self.split.objects[index], image.size, params)
        return {"pixel_values": self.view.pixels(image, params), "labels": labels, "image_id": index}


class DetectionEvaluationImages(torch.utils.data.Dataset):
    """The images of a split to evaluate on, at one size, by index.

    An image that cannot be read is logged once and counted, and a grey one of its size takes its place: what is in it counts as
    missed.

    Args:
        split: the images.
        short: length of the short side in pixels.
        longest: of the long side.
    """

    def __init__(self, split: DetectionSplit, short: int, longest: int = LONGEST):
        self.split = split
        self.view = DetectionView((short,), longest, flip_p=0.0)

    def __len__(self) -> int:
        return len(self.split)

    def unreadable(self) -> list[str]:
        """As of `DetectionImages`."""
        return [self.split.names[number] for number in self.split.broken.numbers]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """ "pixel_values", uint8 (3, H, W), and "image_id", the number of the image."""
        try:
            image = self.split.image(index)
        except OSError as error:
            self.split.broken.add(self.split.rows[index], index, error)
            width, height = self.split.sizes[index].tolist()
            image = Image.new("RGB", (width, height), GREY)
        params = DetectionViewParams(self.view.sizes[0], flip=False)
        return {"pixel_values": self.view.pixels(image, params), "image_id": index}
