"""Images to train on by index, whose views depend on (seed, epoch, index) alone."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from PIL import Image

from ..views.policy import seeded_generator


class TransferImages(torch.utils.data.Dataset, ABC):
    """Views of the images of a split, by index.

    An image that cannot be read is logged once and counted, and the next readable one takes its place, so that batches keep
    their size.

    Args:
        split: the images: `image(index)`, `names`, `rows`, and `broken`, which keeps those that cannot be read.
        seed: of the views.

    Raises:
        ValueError: no image can be read; raised where one is asked for.
    """

    def __init__(self, split: Any, seed: int = 0):
        self.split: Any = split
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes read it

    def __len__(self) -> int:
        return len(self.split)

    @property
    def images_per_epoch(self) -> int:
        """Number of images that all processes see in one epoch, but for less than a batch."""
        return len(self)

    @property
    def epoch(self) -> int:
        """That of the views, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Select the views and the order of an epoch, also in workers that are already running.

        Args:
            epoch: from 0.
            skip_batches: the sampler skips, not the images.
        """
        self._epoch.fill_(epoch)

    def unreadable(self) -> list[str]:
        """Names of the images that this process has met and could not read; each once."""
        return [self.split.names[number] for number in self.split.broken.numbers]

    def generator(self, index: int) -> torch.Generator:
        """Draws the view of an image in this epoch."""
        return seeded_generator(self.seed, self.epoch, index)

    @abstractmethod
    def view_of(self, index: int, image: Image.Image) -> dict[str, Any]:
        """A view of a decoded image, with what is annotated in it."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        for number in (*range(index, len(self)), *range(index)):
            try:
                image = self.split.image(number)
            except OSError as error:
                self.split.broken.add(self.split.rows[number], number, error)
                continue
            return self.view_of(number, image)
        raise ValueError(f"no image of split {self.split.name!r} can be read: check the files")
