"""Decode the rows of a dataset and transform them to uint8 views, by index or from a stream."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice, repeat
from typing import Any, Protocol, Self

import datasets
import torch
from torch.utils.data import get_worker_info
from transformers import default_data_collator

from ..views.policy import ViewParams, seeded_generator
from .decode import Unreadable, decode_image
from .shards import ShardedRows, batches_per_epoch, plan_epoch

Transform = Any  # callable: (image, torch.Generator) -> dict of tensors
Decode = Callable[[Any], Any]  # from the image of a row to the input of the transform


class TrainingImages(Protocol):
    """The interface of training images, whether they are indexed, kept in memory or streamed."""

    def __len__(self) -> int: ...

    @property
    def images_per_epoch(self) -> int:
        """Number of images that all processes see in one epoch."""

    def unreadable(self) -> list[str]:
        """Paths, or else rows, of the images that this process has met and could not read; each once."""

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Select the order and the views of an epoch."""

    def view_params(self, index: int, image: Any) -> list[ViewParams]:
        """Parameters of all views of a decoded image in this epoch."""

    def sample(self, count: int, epoch: int, rank: int, world_size: int) -> Any:
        """Up to `count` images for this process with their views of `epoch`, in a form that `collate` takes."""


class _Images:
    def __init__(self, transform: Transform, seed: int, decode: Decode, numbered: bool, broken: Unreadable):
        self.transform = transform
        self.seed = seed
        self.decode = decode
        self.numbered = numbered
        self.broken = broken
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes read it

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Select the views of an epoch, also in workers that are already running.

        Args:
            epoch: from 0.
            skip_batches: used by streams only; here the sampler skips.
        """
        self._epoch.fill_(epoch)

    def at_epoch(self, epoch: int) -> Self:
        """A copy with the views of another epoch."""
        other = copy.copy(self)
        other._epoch = torch.tensor(epoch)
        return other

    def unreadable(self) -> list[str]:
        """Paths, or else rows, of the images that this process has met and could not read; each once."""
        return [self.broken.name({"image": None}, number) for number in self.broken.numbers]

    def generator(self, index: int) -> torch.Generator:
        """The generator that the views of an image are sampled from in this epoch."""
        return seeded_generator(self.seed, int(self._epoch), index)

    def view_params(self, index: int, image: Any) -> list[ViewParams]:
        """Parameters of all views of a decoded image in this epoch."""
        params: list[ViewParams] = self.transform.sample(image, self.generator(index))
        return params

    def _views(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        views: dict[str, Any] = self.transform(self.decode(row["image"]), self.generator(index))
        if self.numbered:
            views["index"] = index
        elif "label" in row and "key_pixel_values" not in views:
            views["labels"] = -1 if row["label"] is None else row["label"]
        return views


class MapImages(_Images, torch.utils.data.Dataset):
    """Transformed images by index. The views of one image depend on (seed, epoch, index) alone.

    An image that cannot be read is logged and counted, and the next readable image replaces it. Batches therefore keep
    their size, which the queue and the other processes rely on.

    Args:
        source: rows of `load_images`.
        transform: makes the views of a decoded image.
        seed: of the random views.
        decode: decodes the image of a row.
        numbered: whether an image comes with "index", the number of its row, instead of its label.
        broken: keeps the images that cannot be read; the same for several views of a split, so that each is named once.
        numbers: of the rows in that split, where they are a part of it.

    Raises:
        ValueError: no image can be read; raised where the first one is asked for.
    """

    def __init__(
        self,
        source: datasets.Dataset,
        transform: Transform,
        seed: int = 0,
        decode: Decode = decode_image,
        numbered: bool = False,
        broken: Unreadable | None = None,
        numbers: Sequence[int] | None = None,
    ):
        super().__init__(transform, seed, decode, numbered, broken or Unreadable(len(source)))
        self.source = source
        self._numbers = range(len(source)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.source)

    @property
    def images_per_epoch(self) -> int:
        """Number of images that all processes see in one epoch."""
        return len(self)

    def rows(self, start: int, stop: int) -> "MapImages":
        """Images `start` to `stop` (exclusive), or to the last one where there are fewer."""
        return self.select(range(start, min(stop, len(self))))

    def evenly_spaced(self, count: int) -> "MapImages":
        """`count` evenly spaced images, or all where there are fewer. The first ones would be of few classes."""
        if count >= len(self):
            return self
        return self.select([i * len(self) // count for i in range(count)])

    def sample(self, count: int, epoch: int, rank: int, world_size: int) -> list[dict[str, Any]]:
        """Up to `count` random images of this process's part, with their views of `epoch`."""
        order = torch.randperm(len(self), generator=seeded_generator(self.seed, epoch)).tolist()
        images = self.at_epoch(epoch)
        return [images[i] for i in order[: count * world_size][rank::world_size]]

    def select(self, indices: Sequence[int]) -> "MapImages":
        """The images of these indices."""
        rows, numbers = self.source.select(indices), [self._numbers[i] for i in indices]
        chosen = MapImages(rows, self.transform, self.seed, self.decode, self.numbered, self.broken, numbers)
        return chosen.at_epoch(int(self._epoch))

    def unreadable(self) -> list[str]:
        """Paths, or else rows, of those of these images that this process has met and could not read; each once."""
        met = set(self.broken.numbers)
        places = [i for i, number in enumerate(self._numbers) if number in met] if met else []
        return [self.broken.name(self.source[i], self._numbers[i]) for i in places]

    def read(self, index: int) -> dict[str, Any] | None:
        """The views of this image and no other; None, with a line in the log, for one that cannot be read."""
        row = self.source[index]
        try:
            return self._views(row, index)
        except OSError as error:
            self.broken.add(row, self._numbers[index], error)
            return None

    def __getitem__(self, index: int) -> dict[str, Any]:
        for i in range(index, index + len(self)):
            if (views := self.read(i % len(self))) is not None:
                return views
        raise ValueError(f"none of the {len(self)} images can be read: is this an image dataset?")


def collate(rows: Any) -> dict[str, torch.Tensor]:
    """Collate images to a batch. `MemoryImages` returns batches, which pass unchanged."""
    batch: dict[str, torch.Tensor] = rows if isinstance(rows, dict) else default_data_collator(rows)
    return batch


class StreamedImages(_Images, torch.utils.data.IterableDataset):
    """Transformed images of a stream, divided over processes and workers.

    Every epoch reads each image once, except for a rest of less than one global batch, for any number of shards, processes
    and workers. The views of one image depend on (seed, epoch, index) alone, as in `MapImages`. An image that cannot be
    read is logged and counted, and the next readable image of its worker replaces it.

    Args:
        rows: training rows of `load_images`.
        transform: makes the views of a decoded image.
        batch_size: images per process, as in the DataLoader.
        seed: of the order and of the random views.
        rank: number of this process.
        world_size: number of processes.
        buffer_size: images per process in the shuffle buffer; they are not decoded there.
        decode: decodes the image of a row.
        numbered: as of `MapImages`, whose numbers these are.
        broken: keeps the images that cannot be read.

    Raises:
        ValueError: a worker finds no image that can be read; raised in iteration.
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
        numbered: bool = False,
        broken: Unreadable | None = None,
    ):
        super().__init__(transform, seed, decode, numbered, broken or Unreadable(len(rows)))
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
        """Number of images in the stream. An epoch leaves out less than one global batch of them."""
        return len(self.rows)

    @property
    def shards(self) -> int:
        """Number of files, or other parts of the stream, that contain images."""
        return sum(length > 0 for length in self.rows.lengths)

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Select the order and the views of an epoch, also in workers that are already running.

        Args:
            epoch: from 0.
            skip_batches: number of first batches that this process discards. They are blank and cost no decoding; the
                batches after them equal those of an epoch without a skip.
        """
        super().set_epoch(epoch)
        self._skip_batches.fill_(skip_batches)

    def sample(self, count: int, epoch: int, rank: int, world_size: int) -> list[dict[str, Any]]:
        """Up to `count` first images of this process's part of `epoch`."""
        assert (rank, world_size) == (self.rank, self.world_size)
        images = self.at_epoch(epoch)
        images.buffer_size, images._skip_batches = count, torch.tensor(0)
        return list(islice(images, count))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        skip = len(range(worker, int(self._skip_batches), workers)) * self.batch_size
        yield from repeat({"pixel_values": torch.empty(0)}, skip)
        waiting = 0  # places that the next readable image fills: its own, and those of the broken images before it
        for index, row in self._shuffled_rows(worker, workers, skip):
            waiting += 1
            try:
                views = self._views(row, index)
            except OSError as error:
                self.broken.add(row, index, error)
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
        # Broken images at the very end are rare, so the part is read again: after a skip its first image is unknown.
        for index, row in self._shuffled_rows(worker, workers):
            with suppress(OSError):  # it was logged before
                return self._views(row, index)
        raise ValueError("a part of the stream has no image that can be read: is this an image dataset?")
