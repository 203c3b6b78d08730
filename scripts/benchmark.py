"""Measure what this project claims: `python scripts/benchmark.py exchange | stream | knn`.

Each benchmark times its variants in turns in the same run, and prints min, median and max of each and the ratio to a
named baseline.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import DataLoader

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.distributed_moco import gather
from modeling_moco.image_processing_moco import normalize
from training.augment import TwoViews, build_policy
from training.data import DataArguments, load_images
from training.images import StreamedImages
from training.knn import knn_predict

DIM = 128  # of a key
WORKERS = (0, 1, 2)


def ours(images: torch.Tensor, keys: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shuffling as MoCoModel does it: images of uint8 to where they are encoded, keys gathered once."""
    model = tiny_model()
    model.shuffle_generator = generator
    mine, restore = model.shuffle(images)
    model.normalize(mine)
    return gather(keys)[restore]


@cache
def tiny_model() -> MoCoModel:
    return MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=64))


def official_style(images: torch.Tensor, keys: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shuffling as the official code does it: all images and all keys to everyone in float32, the keys twice."""

    def all_gather(x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    config = MoCoConfig()
    everything = all_gather(normalize(images, config.image_mean, config.image_std).contiguous())
    order = torch.randperm(len(everything), generator=generator)
    dist.broadcast(order, src=0)
    mine = order.view(dist.get_world_size(), -1)[dist.get_rank()]
    everything[mine].clone()
    unshuffled = all_gather(keys)[order.argsort()].view(dist.get_world_size(), -1, DIM)[dist.get_rank()]
    return all_gather(unshuffled.contiguous())


VARIANTS: dict[str, Callable] = {"ours": ours, "official style": official_style}


def computed_bytes(variant: str, ranks: int, batch: int, size: int) -> int:
    """Bytes that one process receives in a step, on average over orders."""
    pixels, others = 3 * size * size, ranks - 1
    if variant == "ours":
        return round(batch * others / ranks * pixels) + others * batch * DIM * 4
    return others * batch * (pixels + 2 * DIM) * 4 + (8 * ranks * batch if others else 0)


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def exchange_rank(rank: int, args: argparse.Namespace, folder: str) -> None:
    """One process of the exchange benchmark; rank 0 writes what it measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.ranks)
    images = torch.randint(256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8)
    keys, generator = torch.randn(args.batch_size, DIM), torch.Generator()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    moved: dict[str, list[int]] = {name: [] for name in VARIANTS}
    for step in range(args.steps + 1):
        for name, variant in VARIANTS.items():
            dist.barrier()
            before, start = loopback_bytes(), time.perf_counter()
            variant(images, keys, generator)
            elapsed = time.perf_counter() - start
            dist.barrier()
            if step:  # the first one connects
                seconds[name].append(elapsed)
                moved[name].append((loopback_bytes() - before) // args.ranks)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps({"seconds": seconds, "bytes": moved}))
    dist.destroy_process_group()


def run_exchange(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(exchange_rank, (args, folder), nprocs=args.ranks)
        result = json.loads(Path(folder, "result.json").read_text())
    print(
        f"shuffling BatchNorm: {args.ranks} gloo processes on {os.cpu_count()} cores, {args.batch_size} images of "
        f"{args.image_size} px per process, {args.steps} interleaved steps, torch {torch.__version__}"
    )
    for name, seconds in result["seconds"].items():
        low, middle, high = (1000 * f(seconds) for f in (min, median, max))
        print(f"{name:>15}: min {low:.1f}  median {middle:.1f}  max {high:.1f} ms", end="")
        print(f"; {median(result['bytes'][name]) / 1e6:.2f} MB received per process, with TCP headers and barriers")
    ratio = median(result["seconds"]["official style"]) / median(result["seconds"]["ours"])
    print(f"{'ratio':>15}: {ratio:.1f} times faster than official style (median)")
    print("computed, MB received per process and step:")
    for ranks in sorted({2, 8, 64, args.ranks}):
        theirs, mine = (computed_bytes(v, ranks, args.batch_size, args.image_size) for v in ("official style", "ours"))
        print(f"{ranks:>7} processes: ours {mine / 1e6:.2f}  official {theirs / 1e6:.2f}  ratio {theirs / mine:.1f}")


def seconds_to_first_batch(images: StreamedImages, batch_size: int, workers: int, epoch: int, skip: int) -> float:
    """How long a resumed epoch takes to begin after so many batches."""
    images.set_epoch(epoch, skip_batches=skip)
    start = time.perf_counter()
    loader = DataLoader(images, batch_size, num_workers=workers)
    next(islice(loader, skip, None))
    return time.perf_counter() - start


def run_stream(args: argparse.Namespace) -> None:
    data = DataArguments(dataset_name=args.dataset_name, streaming=True, image_size=args.image_size)
    views = TwoViews(build_policy("v2"), args.image_size)
    images = StreamedImages(load_images(data).train, views, batch_size=args.batch_size, buffer_size=args.shuffle_buffer)
    print(
        f"stream of {images.images_per_epoch:,} images in {images.shards} files, buffer {args.shuffle_buffer}, two v2 views "
        f"of {args.image_size} px, {os.cpu_count()} cores, {args.steps} interleaved rounds: min / median / max"
    )
    skips = [images.batches * tenths // 10 for tenths in (1, 5, 9)]
    speed: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    first: dict[tuple[int, int], list[float]] = {(workers, skip): [] for workers in WORKERS for skip in [0, *skips]}
    for epoch in range(args.steps):
        for workers in WORKERS:
            for skip in [0, *skips]:
                seconds = seconds_to_first_batch(images, args.batch_size, workers, epoch, skip)
                first[workers, skip].append(seconds)
            images.set_epoch(epoch)
            loader = iter(DataLoader(images, args.batch_size, num_workers=workers))
            next(loader)
            start = time.perf_counter()
            batches = sum(1 for _ in islice(loader, args.batches))
            speed[workers].append(batches * args.batch_size / (time.perf_counter() - start))
    for workers in WORKERS:
        print("{} workers: {:.1f} / {:.1f} / {:.1f} images/s".format(workers, *spread(speed[workers])))
        for skip in (0, *skips):
            images_skipped, times = skip * args.batch_size, first[workers, skip]
            print(
                "  skip of {:,} images: first batch after {:.2f} / {:.2f} / {:.2f} s".format(
                    images_skipped, *spread(times)
                ),
                end="",
            )
            if skip > skips[0]:  # what both have, opening files and filling the buffer, is not the skip's
                more = 1000 / (images_skipped - skips[0] * args.batch_size)
                costs = [more * (s - b) for s, b in zip(times, first[workers, skips[0]], strict=True)]
                print("; {:.3f} / {:.3f} / {:.3f} ms for each image more".format(*spread(costs)), end="")
            print()


def knn_inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, bank and its labels: overlapping clusters of unit length."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(args.classes, (args.queries + args.bank,), generator=generator)
    centres = torch.randn(args.classes, args.dim, generator=generator)
    features = torch.randn(len(labels), args.dim, generator=generator)
    for rows, classes in zip(features.split(4096), labels.split(4096), strict=True):  # in place: it may be gigabytes
        rows.mul_(5).add_(centres[classes])
        rows.div_(rows.norm(dim=1, keepdim=True))
    return features[: args.queries], features[args.queries :], labels[args.queries :]


def knn_ours(queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    return knn_predict(queries, bank, labels, ks=[args.k])[args.k]


def knn_one_hot(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace
) -> torch.Tensor:
    """As other libraries vote: every neighbour as a one-hot row, in chunks of 256 queries."""
    predictions = []
    for rows in queries.split(256):
        similarity, index = (rows @ bank.T).topk(args.k, dim=1)
        votes = F.one_hot(labels[index], args.classes) * (similarity / 0.07).exp()[:, :, None]
        predictions.append(votes.sum(dim=1).argmax(dim=1))
    return torch.cat(predictions)


def knn_scikit_learn(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace
) -> torch.Tensor:
    classifier = KNeighborsClassifier(
        args.k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    return torch.from_numpy(classifier.fit(bank.numpy(), labels.numpy()).predict(queries.numpy()))


KNN: dict[str, Callable] = {"ours": knn_ours, "one-hot vote": knn_one_hot, "scikit-learn": knn_scikit_learn}


def knn_process(name: str, args: argparse.Namespace, results: mp.SimpleQueue) -> None:
    """One variant in a process of its own, whose peak memory is then its own too."""
    inputs = knn_inputs(args)
    KNN[name](
        inputs[0][:64], inputs[1][:1000], inputs[2][:1000], argparse.Namespace(**vars(args) | {"k": 10})
    )  # warm up
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = peak_memory(), time.perf_counter()
    predictions = KNN[name](*inputs, args)
    seconds = time.perf_counter() - start
    results.put((seconds, peak_memory() - before, predictions.tolist()))


def peak_memory() -> float:
    """Largest resident memory of this process so far, GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9


def run_knn(args: argparse.Namespace) -> None:
    print(
        f"kNN, k {args.k}: {args.queries:,} queries in a bank of {args.bank:,} x {args.dim}, {args.classes} classes, "
        f"{os.cpu_count()} cores, torch {torch.__version__}, {args.steps} interleaved rounds"
    )
    measured: dict[str, list[tuple[float, float, list[int]]]] = {name: [] for name in args.variants}
    for _ in range(args.steps):
        for name in args.variants:
            results = mp.get_context("spawn").SimpleQueue()
            process = mp.get_context("spawn").Process(target=knn_process, args=(name, args, results))
            process.start()
            measured[name].append(results.get())
            process.join()
    reference = args.variants[-1]
    expected = np.array(measured[reference][0][2])
    ours = median(seconds for seconds, _, _ in measured[args.variants[0]])
    for name, rounds in measured.items():
        seconds, memory = [s for s, _, _ in rounds], max(gb for _, gb, _ in rounds)
        agreement = 100 * np.mean(np.array(rounds[0][2]) == expected)
        print(
            "{:>15}: min {:.1f}  median {:.1f}  max {:.1f} s".format(name, *spread(seconds))
            + f" ({median(seconds) / ours:.1f} x {args.variants[0]}); {memory:.2f} GB beside the features; "
            f"{agreement:.2f} % as {reference}"
        )


def spread(values: list[float]) -> tuple[float, float, float]:
    return min(values), median(values), max(values)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("exchange", help="time and bytes of shuffling BatchNorm on several processes")
    command.add_argument("--ranks", type=int, default=2, help="gloo processes on this machine")
    command.add_argument("--batch_size", type=int, default=32, help="images per process")
    command.add_argument("--image_size", type=int, default=224, help="pixels")
    command.add_argument("--steps", type=int, default=20, help="measured steps of each variant")
    command.set_defaults(run=run_exchange)
    command = commands.add_parser("stream", help="images a second of a stream, and what it costs to resume one")
    command.add_argument("--dataset_name", required=True, help="folder of parquet or tar files, or a Hub dataset")
    command.add_argument("--batch_size", type=int, default=32, help="images")
    command.add_argument("--image_size", type=int, default=224, help="pixels")
    command.add_argument("--shuffle_buffer", type=int, default=500, help="images")
    command.add_argument("--batches", type=int, default=8, help="batches timed for the speed")
    command.add_argument("--steps", type=int, default=5, help="rounds")
    command.set_defaults(run=run_stream)
    command = commands.add_parser("knn", help="time and memory of the kNN classifier")
    command.add_argument("--bank", type=int, default=50_000, help="images")
    command.add_argument("--queries", type=int, default=10_000, help="images")
    command.add_argument("--dim", type=int, default=512, help="feature width")
    command.add_argument("--classes", type=int, default=10, help="in the labels")
    command.add_argument("--k", type=int, default=200, help="neighbours")
    command.add_argument("--variants", nargs="+", choices=KNN, default=list(KNN), help="the last is the reference")
    command.add_argument("--steps", type=int, default=3, help="rounds")
    command.set_defaults(run=run_knn)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
