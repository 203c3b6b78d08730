"""Small images of one size, decoded once and kept in memory."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from tqdm import tqdm

from ..views.device import draw_operations, draw_views, unpack_draw
from ..views.policy import ViewDraw, ViewPolicy, seeded_generator
from .decode import decode_tensor, log_skipped
from .sources import SMALL


class MemoryImages(torch.utils.data.Dataset):
    """Small images of one size, decoded once: a batch is a selection of them and what `DeviceViews` draws from.

    The views of one image depend on (seed, epoch, index) alone. One that cannot be read is named and counted, and the
    one before it (for the first ones, the next readable) takes its place.

    Args:
        source: rows of `load_images`.

    Raises:
        ValueError: no image can be read, or they are not of one size.
    """

    def __init__(self, source: datasets.Dataset, policy: ViewPolicy, seed: int = 0):
        self.policy = policy
        self.seed = seed
        self.skipped = 0
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.images = self._decode(source)  # (images, 3, H, W), uint8; workers are forked and share it

    def _decode(self, source: datasets.Dataset) -> torch.Tensor:
        images: torch.Tensor | None = None
        for index, row in enumerate(tqdm(source, desc="decoding", leave=False, disable=len(source) < 10_000)):
            try:
                pixels = decode_tensor(row["image"])
            except OSError as error:
                self.skipped += 1
                log_skipped(row, index, error)
                if images is not None:
                    images[index] = images[index - 1]
                continue
            if images is None:
                images = torch.empty(len(source), *pixels.shape, dtype=torch.uint8)
                images[:index] = pixels
            elif pixels.shape != images.shape[1:]:
                (height, width), other = images.shape[2:], pixels.shape[1:]
                raise ValueError(
                    f"images are of {width} x {height} and {other[1]} x {other[0]} pixels: with --augment device images of up "
                    f"to {SMALL} px must all be of one size; choose another --augment"
                )
            images[index] = pixels
        if images is None:
            raise ValueError(f"none of the {len(source)} images can be read: is this an image dataset?")
        return images

    def __len__(self) -> int:
        return len(self.images)

    @property
    def images_per_epoch(self) -> int:
        """Over all processes."""
        return len(self)

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Other epochs have other views. `skip_batches` is for streams."""
        self._epoch.fill_(epoch)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, torch.Tensor]:
        """Images (N, 3, H, W), uint8, and of their two views in that epoch the boxes (N, 2, 4) and numbers (N, 2, NUMBERS)."""
        height, width = self.images.shape[2:]
        boxes, numbers = draw_views(
            self.policy, width, height, views=2, seed=self.seed, epoch=epoch, indices=np.asarray(indices)
        )
        return {"images": self.images.index_select(0, torch.as_tensor(indices)), "boxes": boxes, "numbers": numbers}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self.batch(indices, int(self._epoch))

    def draw(self, count: int, epoch: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        """A batch of so many random images of this process's part, as `epoch` draws them; fewer if there are fewer."""
        order = torch.randperm(len(self), generator=seeded_generator(self.seed, epoch)).tolist()
        return self.batch(order[: count * world_size][rank::world_size], epoch)

    def view_draws(self, index: int, image: Any) -> list[ViewDraw]:
        """The random numbers of both views of an image in this epoch. All images have one size: `image` is not looked at."""
        batch = self.batch([index], int(self._epoch))
        rows = draw_operations(batch["numbers"][0], self.policy)
        return [unpack_draw(box, row) for box, row in zip(batch["boxes"][0], rows, strict=True)]
