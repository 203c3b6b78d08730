"""From a dataset's rows to uint8 views: decoded, transformed by `augment.py`, indexed or streamed.

Images are decoded here and not by `datasets`, so that one broken file costs one file.
"""

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice, repeat
from typing import Any, Protocol, Self

import datasets
import torch
from torch.utils.data import get_worker_info
from transformers import default_data_collator

from ..views.policy import ViewDraw, seeded_generator
from .decode import decode_image, log_skipped
from .shards import ShardedRows, batches_per_epoch, plan_epoch

Transform = Any  # callable: (image, torch.Generator) -> dict of tensors
Decode = Callable[[dict[str, Any]], Any]  # from a row's image to what the transform takes


class TrainingImages(Protocol):
    """What a trainer asks of its images, whether they are indexed, kept in memory or streamed."""

    def __len__(self) -> int: ...

    @property
    def images_per_epoch(self) -> int:
        """Over all processes."""

    @property
    def skipped(self) -> int:
        """Images passed over so far because they could not be read."""

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Give the images the order and the views of an epoch."""

    def view_draws(self, index: int, image: Any) -> list[ViewDraw]:
        """The random numbers of both views of a decoded image in this epoch."""

    def draw(self, count: int, epoch: int, rank: int, world_size: int) -> Any:
        """A part of `count` images for each process with the views of `epoch`, as `collate` takes them."""


class _Images:
    # The epoch and the count live in shared memory: worker processes read the one and write the other.
    def __init__(self, transform: Transform, seed: int, decode: Decode = decode_image):
        self.transform = transform
        self.seed = seed
        self.decode = decode
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._skipped = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Other epochs have other views. Reaches workers that are already running.

        Args:
            skip_batches: for streams; here the sampler skips.
        """
        self._epoch.fill_(epoch)

    def at_epoch(self, epoch: int) -> Self:
        """The same images with the views of another epoch; this one stays where it is."""
        other = copy.copy(self)
        other._epoch = torch.tensor(epoch)
        return other

    @property
    def skipped(self) -> int:
        """Images passed over so far because they could not be read."""
        return int(self._skipped)

    def generator(self, index: int) -> torch.Generator:
        """What the views of an image are drawn from in this epoch."""
        return seeded_generator(self.seed, int(self._epoch), index)

    def view_draws(self, index: int, image: Any) -> list[ViewDraw]:
        """The random numbers of all views of a decoded image in this epoch."""
        draws: list[ViewDraw] = self.transform.draws(image, self.generator(index))
        return draws

    def _views(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        views: dict[str, Any] = self.transform(self.decode(row["image"]), self.generator(index))
        if "label" in row and "key_pixel_values" not in views:
            views["labels"] = -1 if row["label"] is None else row["label"]
        return views

    def _pass_over(self, row: dict[str, Any], index: int, error: OSError) -> None:
        self._skipped += 1
        log_skipped(row, index, error)


class MapImages(_Images, torch.utils.data.Dataset):
    """Transformed images by index. The views of one image depend on (seed, epoch, index) alone.

    An image that cannot be read is named and counted, and the next readable one takes its place: batches keep their
    size, which the queue and the other processes rely on.
    """

    def __init__(self, source: datasets.Dataset, transform: Transform, seed: int = 0, decode: Decode = decode_image):
        super().__init__(transform, seed, decode)
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    @property
    def images_per_epoch(self) -> int:
        """Over all processes."""
        return len(self)

    def rows(self, start: int, stop: int) -> "MapImages":
        """The images from `start` up to `stop`, or up to the last where there are fewer."""
        return self._select(range(start, min(stop, len(self))))

    def spread(self, count: int) -> "MapImages":
        """So many images at equal distances (folders are sorted by class), or all where there are fewer."""
        if count >= len(self):
            return self
        return self._select([i * len(self) // count for i in range(count)])

    def draw(self, count: int, epoch: int, rank: int, world_size: int) -> list[dict[str, Any]]:
        """So many random images of this process's part, with the views that `epoch` has for them; fewer if there are fewer."""
        order = torch.randperm(len(self), generator=seeded_generator(self.seed, epoch)).tolist()
        images = self.at_epoch(epoch)
        return [images[i] for i in order[: count * world_size][rank::world_size]]

    def _select(self, indices: Iterable[int]) -> "MapImages":
        other = copy.copy(self)  # which shares the count of skipped images
        other.source = self.source.select(indices)
        return other

    def __getitem__(self, index: int) -> dict[str, Any]:
        for i in range(index, index + len(self)):
            row = self.source[i % len(self)]
            try:
                return self._views(row, i % len(self))
            except OSError as error:
                self._pass_over(row, i % len(self), error)
        raise ValueError(f"none of the {len(self)} images can be read: is this an image dataset?")


def collate(rows: Any) -> dict[str, torch.Tensor]:
    """Images to a batch; what `MemoryImages` gives is one."""
    batch: dict[str, torch.Tensor] = rows if isinstance(rows, dict) else default_data_collator(rows)
    return batch


class StreamedImages(_Images, torch.utils.data.IterableDataset):
    """Transformed images of a stream, divided over processes and workers.

    In every epoch each image is seen once, but for less than one batch of all processes, whatever the number of shards,
    processes and workers. The views of one image depend on (seed, epoch, index) alone, as those of `MapImages`. An image
    that cannot be read is named and counted, and the next readable one of its worker takes its place.

    Args:
        rows: of `load_images`.
        batch_size: per process, as in the DataLoader.
        rank, world_size: this process and how many there are.
        buffer_size: images per process among which the next one is drawn; they are kept undecoded.
    """

    def __init__(
        self,
        rows: ShardedRows,
        transform: Transform,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        buffer_size: int = 10_000,
        decode: Decode = decode_image,
    ):
        super().__init__(transform, seed, decode)
        self.rows = rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.buffer_size = buffer_size
        self.batches = batches_per_epoch(rows.lengths, batch_size, world_size)
        self._skip_batches = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.batches * self.batch_size

    @property
    def images_per_epoch(self) -> int:
        """Over all processes."""
        return len(self.rows)

    @property
    def shards(self) -> int:
        """Files, or other parts of the stream, that hold images."""
        return sum(length > 0 for length in self.rows.lengths)

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Other epochs have another order and other views. Reaches workers that are already running.

        Args:
            skip_batches: first batches of this process that will be thrown away: they are blank, and nothing is decoded
                for them. The batches that follow are those of an epoch without a skip.
        """
        super().set_epoch(epoch)
        self._skip_batches.fill_(skip_batches)

    def draw(self, count: int, epoch: int, rank: int, world_size: int) -> list[dict[str, Any]]:
        """The first so many images of this process's part of `epoch`; fewer if there are fewer."""
        assert (rank, world_size) == (self.rank, self.world_size)
        images = self.at_epoch(epoch)
        images.buffer_size, images._skip_batches = count, torch.tensor(0)
        return list(islice(images, count))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        skip = len(range(worker, int(self._skip_batches), workers)) * self.batch_size
        yield from repeat({"pixel_values": torch.empty(0)}, skip)
        waiting = 0  # places of broken images that the next readable one takes
        for index, row in self._shuffled_rows(worker, workers, skip):
            waiting += 1
            try:
                views = self._views(row, index)
            except OSError as error:
                self._pass_over(row, index, error)
                continue
            yield from repeat(views, waiting)
            waiting = 0
        if waiting:
            yield from repeat(self._first_readable(worker, workers), waiting)

    def _shuffled_rows(self, worker: int, workers: int, skip: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        epoch = int(self._epoch)
        pieces = plan_epoch(
            self.rows.lengths,
            seed=self.seed,
            epoch=epoch,
            batch_size=self.batch_size,
            rank=self.rank,
            ranks=self.world_size,
            worker=worker,
            workers=workers,
        )
        generator = random.Random(f"rows of seed {self.seed}, epoch {epoch}, rank {self.rank}, worker {worker}")
        return self.rows.read_shuffled(pieces, max(1, self.buffer_size // workers), generator, skip)

    def _first_readable(self, worker: int, workers: int) -> dict[str, Any]:
        # Read again and not remembered: after a skip nobody knows which image it is, and last images are seldom broken.
        for index, row in self._shuffled_rows(worker, workers):
            with suppress(OSError):  # named before
                return self._views(row, index)
        raise ValueError("a part of the stream has no image that can be read: is this an image dataset?")
