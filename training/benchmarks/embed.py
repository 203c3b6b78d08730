"""Embedding beside the encoder alone, and the exact search of a large set: time and memory."""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_moco import MoCoConfig, MoCoModel

from ..cli import cores
from ..data.images import MapImages
from ..data.sources import SplitDataArguments, load_splits
from ..embedding.embed import EmbedArguments, claim, describe, embed
from ..embedding.search import search
from ..embedding.shards import DATA, Shard, read_embeddings, row_features, shards_of, write_shard
from ..evaluation.features import encode, extract_features
from .measure import Benchmark, PeakMemory, elapsed, in_own_process, time_rounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset_name", default="digits", help="Images to embed.")
    parser.add_argument("--images", type=int, default=256, help="Number of first images of a split to embed.")
    parser.add_argument("--image_size", type=int, default=224, help="Side of a view in pixels.")
    parser.add_argument("--architecture", default="resnet50", help="Encoder, by timm's name.")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=32, help="Images at once.")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that read images.")
    parser.add_argument("--rows", type=int, default=1_000_000, help="Rows of the made set that is searched.")
    parser.add_argument("--dim", type=int, default=2_048, help="Width of its embeddings, float16.")
    parser.add_argument("--queries", type=int, default=8, help="Number of queries.")
    parser.add_argument("--rounds", type=int, default=3, help="Number of rounds, each of which runs all variants.")


def run(args: argparse.Namespace) -> list[Benchmark]:
    with tempfile.TemporaryDirectory() as name:
        return [measure_embedding(args, Path(name)), measure_search(args, Path(name) / "made")]


def measure_embedding(args: argparse.Namespace, folder: Path) -> Benchmark:
    """The encoder on views in memory, the same with reading, and a whole set: the last encodes the same images."""
    data = SplitDataArguments(
        dataset_name=args.dataset_name, splits=["train"], max_samples=args.images, image_size=args.image_size
    )
    loading: dict[str, Any] = {
        "num_workers": args.dataloader_num_workers,
        "batch_size": args.per_device_eval_batch_size,
    }
    settings = EmbedArguments(
        per_device_eval_batch_size=args.per_device_eval_batch_size, dataloader_num_workers=args.dataloader_num_workers
    )
    images = load_splits(data)
    torch.manual_seed(0)
    model = MoCoModel(MoCoConfig(architecture=args.architecture, batch_norm="plain"), momentum_encoder=False).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    record = describe(model, data, images, settings)
    views = MapImages(images.rows["train"], data.evaluation_view(), decode=images.decoder.image)
    pixels = torch.stack([views[i]["pixel_values"] for i in range(len(views))])
    numbers = count()

    @torch.no_grad()
    def encoder_alone() -> None:
        for batch in pixels.split(args.per_device_eval_batch_size):
            encode(model, batch.to(model.device), "backbone").cpu()

    def whole() -> None:
        place = folder / f"set_{next(numbers)}"
        claim(place, record)
        embed(model, images, place, settings, data)

    variants: dict[str, Callable[[], Any]] = {
        "encoder alone": encoder_alone,
        "read and encode": partial(extract_features, model, views, **loading),
        "embed": whole,
    }
    title = (
        f"{len(views):,} images of {args.image_size} px, {args.architecture}, batch {args.per_device_eval_batch_size}, "
        f"{args.dataloader_num_workers} workers, {cores()} cores, {torch.get_num_threads()} threads"
    )
    seconds = time_rounds(variants, args.rounds)
    return Benchmark(title, seconds, ("encoder alone", "read and encode"), len(views))


def make_set(folder: Path, rows: int, dim: int) -> list[Shard]:
    """A set of random embeddings with the names and classes of photographs."""
    (folder / DATA).mkdir(parents=True)
    shards, features = (
        shards_of(folder, {"train": rows}),
        row_features(dim, "float16", True, [str(i) for i in range(1000)]),
    )
    generator = torch.Generator().manual_seed(0)
    for shard in shards:
        numbers = np.arange(shard.start, shard.stop)
        embeddings = torch.randn(len(shard), dim, generator=generator).relu().half().numpy()
        paths = [f"train/n{row % 1000:08}/image_{row:08}.jpg" for row in numbers]
        write_shard(shard.path, {"row": numbers, "path": paths, "label": numbers % 1000}, embeddings, features)
    return shards


def _read(shards: list[Shard]) -> None:
    for _ in read_embeddings(shards):
        pass


def search_process(name: str, shards: list[Shard], args: argparse.Namespace) -> tuple[float, int, int]:
    """Seconds, peak memory beside the program, and with it, in bytes."""
    torch.manual_seed(1)
    queries = torch.randn(args.queries, args.dim)
    call = partial(search, shards, queries, 10) if name == "search" else partial(_read, shards)
    with PeakMemory() as memory:
        seconds = elapsed(call)
    return seconds, memory.bytes, memory.before + memory.bytes


def measure_search(args: argparse.Namespace, folder: Path) -> Benchmark:
    """The search beside reading alone, which is its limit."""
    shards = make_set(folder, args.rows, args.dim)
    measured: dict[str, list[tuple[float, int, int]]] = {"reading alone": [], "search": []}
    for _ in range(args.rounds):
        for name in measured:  # one process each, so that its peak memory is the variant's
            measured[name].append(in_own_process(search_process, name, shards, args))
    columns = {
        "GB beside the program": {n: max(peak for _, peak, _ in rounds) / 1e9 for n, rounds in measured.items()},
        "GB in all": {n: max(whole for _, _, whole in rounds) / 1e9 for n, rounds in measured.items()},
    }
    title = f"{args.queries} queries in {args.rows:,} rows of {args.dim:,} float16 on disk, {cores()} cores"
    seconds = {name: [s for s, _, _ in rounds] for name, rounds in measured.items()}
    return Benchmark(title, seconds, ("reading alone",), 0, columns)
