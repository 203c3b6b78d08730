"""Images per second of a stream, and the time to resume it."""

import argparse
import time
from itertools import islice
from statistics import median

from torch.utils.data import DataLoader

from ..cli import cores
from ..data.images import StreamedImages
from ..data.sources import DataArguments, load_images
from ..views.pil import Views
from ..views.policy import build_policies
from .measure import Benchmark

WORKERS = (0, 1, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset_name", required=True, help="Folder of parquet or tar files, or a Hub dataset.")
    parser.add_argument("--per_device_train_batch_size", type=int, default=32, help="Number of images per batch.")
    parser.add_argument("--image_size", type=int, default=224, help="Side of a view in pixels.")
    parser.add_argument("--shuffle_buffer", type=int, default=500, help="Number of images in the shuffle buffer.")
    parser.add_argument("--batches", type=int, default=8, help="Number of batches whose time is measured.")
    parser.add_argument("--rounds", type=int, default=5, help="Number of rounds, each of which runs all variants.")


def seconds_to_first_batch(images: StreamedImages, batch_size: int, workers: int, epoch: int, skip: int) -> float:
    """Seconds until a resumed epoch returns its first batch after `skip` skipped ones."""
    images.set_epoch(epoch, skip_batches=skip)
    start = time.perf_counter()
    loader = DataLoader(images, batch_size, num_workers=workers)
    next(islice(loader, skip, None))
    return time.perf_counter() - start


def run(args: argparse.Namespace) -> list[Benchmark]:
    data = DataArguments(dataset_name=args.dataset_name, streaming=True, image_size=args.image_size)
    views = Views(build_policies("v2"), args.image_size)
    splits = load_images(data)
    images = StreamedImages(
        splits.train,
        views,
        batch_size=args.per_device_train_batch_size,
        buffer_size=args.shuffle_buffer,
        decode=splits.decoder.image,
    )
    skips = [images.batches * tenths // 10 for tenths in (1, 5, 9)]
    speed: dict[str, list[float]] = {_name(workers): [] for workers in WORKERS}
    first: dict[str, list[float]] = {_name(workers, skip): [] for workers in WORKERS for skip in [0, *skips]}
    timed = min(args.batches, images.batches - 1)
    for epoch in range(args.rounds):
        for workers in WORKERS:
            for skip in [0, *skips]:
                first[_name(workers, skip)].append(
                    seconds_to_first_batch(images, args.per_device_train_batch_size, workers, epoch, skip)
                )
            images.set_epoch(epoch)
            loader = iter(DataLoader(images, args.per_device_train_batch_size, num_workers=workers))
            next(loader)
            start = time.perf_counter()
            for _ in islice(loader, timed):
                pass
            speed[_name(workers)].append(time.perf_counter() - start)
    title = (
        f"stream of {images.images_per_epoch:,} images in {images.shards} files, buffer {args.shuffle_buffer}, two v2 views "
        f"of {args.image_size} px, {cores()} cores, {args.rounds} interleaved rounds"
    )
    costs = {}
    for workers in WORKERS:
        for skip in skips[1:]:  # relative to the shortest skip: every skip opens files and fills the buffer
            more = (skip - skips[0]) * args.per_device_train_batch_size
            pairs = zip(first[_name(workers, skip)], first[_name(workers, skips[0])], strict=True)
            costs[_name(workers, skip)] = median(1000 * (s - b) / more for s, b in pairs)
    return [
        Benchmark(
            f"{title}: {timed} batches of {args.per_device_train_batch_size}",
            speed,
            images=timed * args.per_device_train_batch_size,
        ),
        Benchmark(
            f"{title}: time to the first batch after a skip", first, columns={"ms per further image skipped": costs}
        ),
    ]


def _name(workers: int, skip: int | None = None) -> str:
    return f"{workers} workers" + ("" if skip is None else f", {skip:,} batches skipped")
