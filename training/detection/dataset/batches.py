"""Batches of images of different sizes: which images are together, and how they become one tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modeling_moco.image_processing_moco import normalize

from ...views.policy import seeded_generator
from .views import DetectionImages

ORDER = 2**32  # keeps the order of images apart from their views, whose third number is an index


class OrientationBatches(torch.utils.data.Sampler[list[int]]):
    """The numbers of the images of each batch of an epoch: wide images apart from tall ones, since padding costs time.

    The order is drawn anew in every epoch. What is left of both kinds makes the last batch together, so that an epoch leaves
    out less than one batch, as with other images here; detectron2, which has no epochs, never mixes them. The k-th batch of an
    epoch depends on seed, epoch and batch size alone, so that a run goes on where it was stopped.

    Args:
        images: whose sizes, seed and epoch are taken.
        batch_size: images of a batch.

    Raises:
        ValueError: there are fewer images than a batch has.
    """

    def __init__(self, images: DetectionImages, batch_size: int):
        if not 1 <= batch_size <= len(images):
            raise ValueError(
                f"batch size ({batch_size}) must lie between 1 and the number of images, {len(images)}: lower it"
            )
        self.images = images
        self.batch_size = batch_size
        sizes = images.split.sizes
        self.wide = (sizes[:, 0] > sizes[:, 1]).tolist()

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches(self.images.epoch))

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch."""
        generator = seeded_generator(self.images.seed, epoch, ORDER)
        found: list[list[int]] = []
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for number in torch.randperm(len(self.images), generator=generator).tolist():
            group = waiting[self.wide[number]]
            group.append(number)
            if len(group) == self.batch_size:
                found.append(group[:])
                group.clear()
        rest = [*waiting[True], *waiting[False]]
        if len(rest) >= self.batch_size:
            kept = torch.randperm(len(rest), generator=generator)[: self.batch_size].tolist()
            found.append([rest[place] for place in kept])
        return found


@dataclass(frozen=True)
class DetectionCollator:
    """Make a batch of images of different sizes, as transformers' detectors take it.

    Images are normalised before they are padded: padding is zero then. It goes to the largest height and width of the batch,
    and to no multiple of anything, since it enters the statistics of BatchNorm.

    Args:
        image_mean, image_std: one number per channel, as in `MoCoConfig`.
    """

    image_mean: Sequence[float]
    image_std: Sequence[float]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of N images.

        Returns:
            "pixel_values" (N, 3, H, W), float32; "pixel_mask" (N, H, W), int64, 1 where an image is; "image_id" (N,); and with
            "labels" in `rows` a list of them, whose boxes are fractions of the images without padding, and whose masks have the
            size of these.
        """
        height, width = (max(row["pixel_values"].shape[axis] for row in rows) for axis in (1, 2))
        pixels = torch.zeros(len(rows), 3, height, width)
        mask = torch.zeros(len(rows), height, width, dtype=torch.int64)
        for place, row in enumerate(rows):
            image = row["pixel_values"]
            where = (slice(image.shape[1]), slice(image.shape[2]))
            pixels[place, :, *where] = normalize(image[None], self.image_mean, self.image_std)[0]
            mask[place, *where] = 1
        batch: dict[str, Any] = {
            "pixel_values": pixels,
            "pixel_mask": mask,
            "image_id": torch.tensor([row["image_id"] for row in rows]),
        }
        if "labels" in rows[0]:
            batch["labels"] = [row["labels"] for row in rows]
        return batch
