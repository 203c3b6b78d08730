"""Decode small images of one size once and keep them in memory, on the training device where they fit."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..engine.preemption import outlive_signals
from ..views.device import params_of, sample_views
from ..views.policy import Policies, ViewParams, seeded_generator
from .decode import Unreadable, decode_tensor
from .images import Decode
from .sources import MAX_IN_MEMORY_PX

MANY = 10_000  # images that worker processes decode sooner
MAX_ON_DEVICE = 4 * 2**30  # bytes of images that a training device keeps


class _Pixels(torch.utils.data.Dataset):
    """The pixels of every row (3, H, W), or the error that its image raises; arrays, for a tensor would take a file handle."""

    def __init__(self, source: datasets.Dataset, decode: Decode):
        self.source = source
        self.decode = decode

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray | OSError:
        try:
            pixels: np.ndarray = self.decode(self.source[index]["image"]).numpy()
        except OSError as error:
            return error
        return pixels


class MemoryImages(torch.utils.data.Dataset):
    """Small images of one size, decoded once. A batch says which, with random numbers for `DeviceViews`.

    The training device keeps a copy of the images, of up to 4 GiB: `with_pixels` takes those of a batch from it.

    The views of one image depend on (seed, epoch, index) alone. An image that cannot be read is logged and counted, and the
    image before it replaces it (the next readable one, at the start).

    Args:
        source: rows of `load_images`.
        policies: distribution of each view.
        seed: of the random views.
        decode: decodes the image of a row, to uint8 (3, H, W).
        numbered: whether a batch has "index", the numbers of the rows whose images it has.
        broken: keeps the images that cannot be read.
        workers: processes that decode, where there are many images.

    Raises:
        ValueError: no image can be read, or the images differ in size.
    """

    def __init__(
        self,
        source: datasets.Dataset,
        policies: Policies,
        seed: int = 0,
        decode: Decode = decode_tensor,
        numbered: bool = False,
        broken: Unreadable | None = None,
        workers: int = 0,
    ):
        self.policies = policies
        self.seed = seed
        self.numbered = numbered
        self.broken = broken or Unreadable(len(source))
        self._unreadable: list[str] = []
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._row_numbers = torch.arange(len(source))  # whose image is at each place
        self.images = self._decode_all(source, decode, workers)  # uint8 (images, 3, H, W); forked workers share it
        self._on_device = self.images

    def _decode_all(self, source: datasets.Dataset, decode: Decode, workers: int) -> torch.Tensor:
        images: torch.Tensor | None = None
        few = len(source) < MANY
        loader = DataLoader(
            _Pixels(source, decode),
            batch_size=256,
            collate_fn=list,
            num_workers=0 if few else workers,
            worker_init_fn=outlive_signals,
        )
        decoded = chain.from_iterable(loader)
        for index, pixels in enumerate(tqdm(decoded, "decoding", len(source), leave=False, disable=few or None)):
            if isinstance(pixels, OSError):
                row = source[index]
                self._unreadable.append(self.broken.name(row, index))
                self.broken.add(row, index, pixels)
                if images is not None:
                    images[index], self._row_numbers[index] = images[index - 1], self._row_numbers[index - 1]
                continue
            if images is None:
                images = torch.empty(len(source), *pixels.shape, dtype=torch.uint8)
                images[:index], self._row_numbers[:index] = torch.from_numpy(pixels), index
            elif pixels.shape != images.shape[1:]:
                (height, width), other = images.shape[2:], pixels.shape[1:]
                raise ValueError(
                    f"images have {width} x {height} and {other[1]} x {other[0]} pixels: --view_backend device needs one size "
                    f"for images of up to {MAX_IN_MEMORY_PX} px; choose another --view_backend"
                )
            images[index] = torch.from_numpy(pixels)
        if images is None:
            raise ValueError(f"none of the {len(source)} images can be read: is this an image dataset?")
        return images

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_on_device": self.images
        }  # a worker that is not forked has no use for the device's copy

    def __len__(self) -> int:
        return len(self.images)

    @property
    def images_per_epoch(self) -> int:
        """Number of images that all processes see in one epoch."""
        return len(self)

    def unreadable(self) -> list[str]:
        """Paths, or else rows, of the images that could not be read."""
        return list(self._unreadable)

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Select the views of an epoch. Streams alone use `skip_batches`."""
        self._epoch.fill_(epoch)

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, torch.Tensor]:
        """A batch for `with_pixels`.

        Returns:
            "places" of the images here, int64 (N,), and of their V views in this epoch "boxes" (N, V, 4) and "numbers"
            (N, V, NUMBERS), both float32; "index", int64 (N,), if they are numbered.
        """
        height, width = self.images.shape[2:]
        places = torch.as_tensor(indices)
        boxes, numbers = sample_views(
            self.policies, width, height, seed=self.seed, epoch=epoch, indices=np.asarray(indices)
        )
        batch = {"places": places, "boxes": boxes, "numbers": numbers}
        return batch | ({"index": self._row_numbers[places]} if self.numbered else {})

    def with_pixels(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch for `DeviceViews`, on its device: "images", uint8 (N, 3, H, W), instead of "places"."""
        device = batch["places"].device
        if self._on_device.device != device and self.images.nbytes <= MAX_ON_DEVICE:
            self._on_device = self.images.to(device)
        places = batch["places"].to(self._on_device.device)
        images = self._on_device.index_select(0, places).to(device)
        return {"images": images} | {name: x for name, x in batch.items() if name != "places"}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self.batch(indices, int(self._epoch))

    def sample(self, count: int, epoch: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        """A batch of up to `count` random images of this process's part, with their numbers of `epoch`."""
        order = torch.randperm(len(self), generator=seeded_generator(self.seed, epoch)).tolist()
        return self.batch(order[: count * world_size][rank::world_size], epoch)

    def view_params(self, index: int, image: Any) -> list[ViewParams]:
        """Parameters of all views of an image in this epoch. `image` is not used: all images have one size."""
        batch = self.batch([index], int(self._epoch))
        return params_of(batch["boxes"][0], batch["numbers"][0], self.policies)
