"""Opening a folder of images: seconds and memory until its rows are known, the first time and from the kept index."""

import argparse
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
from PIL import Image
from torchvision.datasets import ImageFolder

from ..data.formats import open_dataset
from .measure import Benchmark, PeakMemory, in_own_process

CACHES = Path("/proc/sys/vm/drop_caches")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=200_000, help="Number of images that are made.")
    parser.add_argument("--classes", type=int, default=1000, help="Number of class folders.")
    parser.add_argument(
        "--cold", action="store_true", help="Let Linux forget its file caches before every measurement (needs root)."
    )
    parser.add_argument("--rounds", type=int, default=3, help="Number of rounds, each of which runs all variants.")


def make_folder(root: Path, images: int, classes: int) -> None:
    """One tiny image under many names, as FOLDER/train/CLASS/NUMBER.png."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    for i in range(images):
        folder = root / "train" / f"n{i % classes:08}"
        if i < classes:
            folder.mkdir(parents=True)
        (folder / f"{i:08}.png").write_bytes(file.getvalue())


def list_and_stat(root: Path) -> int:
    """The unavoidable work: to ask for every name and every size."""
    return sum(1 for folder, _, names in os.walk(root) for name in names if os.stat(f"{folder}/{name}").st_size)


def ours(root: Path) -> int:
    opened = open_dataset(str(root), streaming=False, train_split="train", asked=set(), label_column="label")
    return len(opened.splits["train"])


def ours_first_time(root: Path) -> int:
    shutil.rmtree(Path(datasets.config.HF_DATASETS_CACHE) / "folders_of_images", ignore_errors=True)
    return ours(root)


def with_datasets(root: Path) -> int:
    """The image folders of `datasets`, which keeps no index of a folder either where its files are stated anew."""
    builder = datasets.load_dataset_builder(str(root))
    builder.download_and_prepare()
    return len(builder.as_dataset(split="train"))


VARIANTS: dict[str, Callable[[Path], int]] = {
    "list and stat": list_and_stat,
    "ours, first time": ours_first_time,
    "ours, kept index": ours,
    "torchvision": lambda root: len(ImageFolder(str(root / "train"))),
    "datasets": with_datasets,
}


def folder_process(name: str, root: Path, args: argparse.Namespace) -> tuple[float, int]:
    """Seconds and peak memory in bytes of one variant."""
    datasets.config.HF_DATASETS_CACHE = root.parent / "cache"
    datasets.disable_progress_bars()
    if args.cold:
        CACHES.write_text("3")
    with PeakMemory() as memory:
        start = time.perf_counter()
        count = VARIANTS[name](root)
        seconds = time.perf_counter() - start
    assert count == args.images, f"{name} has found {count} of {args.images} images"
    return seconds, memory.bytes


def run(args: argparse.Namespace) -> list[Benchmark]:
    if args.cold and not os.access(CACHES, os.W_OK):
        raise ValueError(f"--cold writes to {CACHES}, which needs root on Linux: leave it out")
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "images"
        make_folder(root, args.images, args.classes)
        for _ in range(args.rounds):
            for name in VARIANTS:  # one process each, so that its peak memory is the variant's
                measured[name].append(in_own_process(folder_process, name, root, args))
    title = (
        f"open {args.images:,} images in {args.classes:,} folders, {'cold' if args.cold else 'warm'} file caches, "
        f"{args.rounds} interleaved rounds"
    )
    columns = {"MB": {name: max(peak for _, peak in rounds) / 1e6 for name, rounds in measured.items()}}
    seconds = {name: [s for s, _ in rounds] for name, rounds in measured.items()}
    return [Benchmark(title, seconds, ("list and stat", "datasets"), args.images, columns)]
