"""Time and bytes of shuffling BatchNorm on several processes."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.distributed_moco import gather
from modeling_moco.image_processing_moco import normalize

from ..cli import cores
from .measure import Benchmark

DIM = 128  # of a key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="Number of gloo processes on this machine.")
    parser.add_argument("--per_device_train_batch_size", type=int, default=32, help="Number of images per process.")
    parser.add_argument("--image_size", type=int, default=224, help="Side of an image in pixels.")
    parser.add_argument("--rounds", type=int, default=20, help="Number of measured steps of each variant.")


def ours(images: torch.Tensor, keys: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shuffle as MoCoModel does: send uint8 images to the processes that encode them, and gather the keys once."""
    model = tiny_model()
    model.shuffle_generator = generator
    mine, restore = model.shuffle(images)
    model.normalize(mine)
    return gather(keys)[restore]


@cache
def tiny_model() -> MoCoModel:
    return MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=64))


def official_style(images: torch.Tensor, keys: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shuffle as the official code does: gather all float32 images and, twice, all keys on every process."""

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
    """Bytes that one process receives in a step, averaged over random orders.

    Args:
        batch: images per process.
        size: side of an image in pixels.
    """
    pixels, others = 3 * size * size, ranks - 1
    if variant == "ours":
        return round(batch * others / ranks * pixels) + others * batch * DIM * 4
    return others * batch * (pixels + 2 * DIM) * 4 + (8 * ranks * batch if others else 0)


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself since it started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def exchange_rank(rank: int, args: argparse.Namespace, folder: str) -> None:
    """One process of the exchange benchmark; rank 0 writes its measurements."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.ranks)
    images = torch.randint(
        256, (args.per_device_train_batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8
    )
    keys, generator = torch.randn(args.per_device_train_batch_size, DIM), torch.Generator()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    moved: dict[str, list[int]] = {name: [] for name in VARIANTS}
    for step in range(args.rounds + 1):
        for name, variant in VARIANTS.items():
            dist.barrier()
            before, start = loopback_bytes(), time.perf_counter()
            variant(images, keys, generator)
            elapsed = time.perf_counter() - start
            dist.barrier()
            if step:  # the first step opens the connections
                seconds[name].append(elapsed)
                moved[name].append((loopback_bytes() - before) // args.ranks)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps({"seconds": seconds, "bytes": moved}))
    dist.destroy_process_group()


def run(args: argparse.Namespace) -> list[Benchmark]:
    if args.ranks < 2:
        raise ValueError(f"ranks ({args.ranks}) must be at least 2: one process has nobody to exchange images with")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(exchange_rank, (args, folder), nprocs=args.ranks)
        result = json.loads(Path(folder, "result.json").read_text())
    batch = args.per_device_train_batch_size
    title = (
        f"shuffling BatchNorm: {args.ranks} gloo processes on {cores()} cores, {batch} images of "
        f"{args.image_size} px per process, {args.rounds} interleaved steps"
    )
    remarks = ["MB received per process and step. The measured ones include TCP headers and barriers. Computed:"]
    for ranks in sorted({2, 8, 64, args.ranks}):
        theirs, mine = (
            computed_bytes(v, ranks, args.per_device_train_batch_size, args.image_size)
            for v in ("official style", "ours")
        )
        remarks.append(
            f"{ranks:>7} processes: ours {mine / 1e6:.2f}  official {theirs / 1e6:.2f}  ratio {theirs / mine:.1f}"
        )
    megabytes = {name: median(moved) / 1e6 for name, moved in result["bytes"].items()}
    images = args.ranks * args.per_device_train_batch_size
    return [Benchmark(title, result["seconds"], ("official style",), images, {"MB": megabytes}, remarks)]
