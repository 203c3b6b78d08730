"""From a dataset's rows to uint8 views: decoded, transformed by `augment.py`, indexed or streamed.

Images are decoded here and not by `datasets`, so that one broken file costs one file.
"""

import io
import logging
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import get_worker_info

from .augment import seeded_generator

logger = logging.getLogger(__name__)

Transform = Callable[[Image.Image, torch.Generator], dict[str, torch.Tensor]]


def decode_image(image: dict[str, Any]) -> Image.Image:
    """RGB image of a row, turned upright by its EXIF tag as `datasets` and the pipelines do.

    Raises:
        OSError: the bytes are not an image that PIL can read, or end too early.
    """
    try:
        # `xopen` also reads inside archives, whose paths look like zip://a.png::train.zip.
        source = xopen(image["path"], "rb") if image["bytes"] is None else io.BytesIO(image["bytes"])
        with source, Image.open(source) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (Image.DecompressionBombError, RuntimeError, SyntaxError, ValueError) as error:  # PIL's, for broken files
        raise UnidentifiedImageError(str(error)) from error


class _Images:
    # The epoch and the count live in shared memory: worker processes read the one and write the other.
    def __init__(self, transform: Transform, seed: int):
        self.transform = transform
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._skipped = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Other epochs have other views. Reaches workers that are already running."""
        self._epoch.fill_(epoch)

    @property
    def skipped(self) -> int:
        """Images passed over so far because they could not be read."""
        return int(self._skipped)

    def _views(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        views: dict[str, Any] = self.transform(
            decode_image(row["image"]), seeded_generator(self.seed, int(self._epoch), index)
        )
        if "label" in row and "key_pixel_values" not in views:
            views["labels"] = row["label"]
        return views

    def _skip(self, row: dict[str, Any], place: str, error: OSError) -> None:
        self._skipped += 1
        logger.warning("skipped an image that cannot be read: %s (%s)", row["image"]["path"] or place, error)


class MapImages(_Images, torch.utils.data.Dataset):
    """Transformed images by index. The views of one image depend on (seed, epoch, index) alone.

    An image that cannot be read is named and counted, and the next readable one takes its place: batches keep their
    size, which the queue and the other processes rely on.
    """

    def __init__(self, source: datasets.Dataset, transform: Transform, seed: int = 0):
        super().__init__(transform, seed)
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    @property
    def images_per_epoch(self) -> int:
        """Over all processes."""
        return len(self)

    def first(self, count: int) -> "MapImages":
        """The first images, or all where there are fewer."""
        return MapImages(self.source.select(range(min(count, len(self)))), self.transform, self.seed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for i in range(index, index + len(self)):
            row = self.source[i % len(self)]
            try:
                return self._views(row, i % len(self))
            except OSError as error:
                self._skip(row, f"row {i % len(self)}", error)
        raise ValueError(f"none of the {len(self)} images can be read: is this an image dataset?")


class StreamedImages(_Images, torch.utils.data.IterableDataset):
    """Transformed images in a shuffled sequence of shards, divided over processes and workers.

    The views of one image depend on (seed, epoch, the image's bytes) alone: not on how many processes read the stream.
    Every epoch has the same number of whole batches on every process. A worker whose shards end early begins them again,
    one with more than its share leaves the rest for another epoch's order.

    Args:
        source: rows of `load_images`.
        images_per_epoch: images that make an epoch over all processes.
        batch_size: per process, as in the DataLoader.
        rank, world_size: this process and how many there are.
        buffer_size: images among which the next one is drawn.
    """

    def __init__(
        self,
        source: datasets.IterableDataset,
        transform: Transform,
        *,
        images_per_epoch: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        buffer_size: int = 10_000,
    ):
        super().__init__(transform, seed)
        shuffled = source.shuffle(seed=seed, buffer_size=buffer_size)
        self.source = split_dataset_by_node(shuffled, rank=rank, world_size=world_size)
        self.batch_size = batch_size
        self.images_per_epoch = images_per_epoch
        self.batches = images_per_epoch // (batch_size * world_size)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Other epochs have another order and other views. Reaches workers that are already running."""
        super().set_epoch(epoch)
        # Here and not in the workers: they share its memory, and `datasets` adds the difference, which two would do twice.
        self.source.set_epoch(epoch)

    @property
    def max_workers(self) -> int:
        """Workers that have a shard of their own to read."""
        return max(1, self.source.num_shards)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        batches = len(range(worker, self.batches, workers))  # the DataLoader asks the workers in turn
        yield from islice(self._endless(), batches * self.batch_size)

    def _endless(self) -> Iterator[dict[str, Any]]:
        while True:
            readable = 0
            for row in self.source:
                try:
                    views = self._views(row, _content_key(row["image"]))
                except OSError as error:
                    self._skip(row, "an image of the stream", error)
                    continue
                readable += 1
                yield views
            if not readable:
                raise ValueError("the stream has no image that can be read: is this an image dataset?")


def _content_key(image: dict[str, Any]) -> int:
    return zlib.crc32(image["bytes"] if image["bytes"] is not None else str(image["path"]).encode())
