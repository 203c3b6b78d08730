"""Prepare a dataset: every image of every split, made smaller, in Parquet shards that are finished one by one.

A folder is finished by the same command and by no other. Its bytes do not depend on the number of processes, nor on where the
command was stopped: how many images a shard has is decided before the first one and recorded. The images of a split are
shuffled, so that a stream of shards does not meet its classes one after the other.
"""

import hashlib
import os
import random
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import datasets
import PIL
import pyarrow
import pyarrow.parquet as pq
from datasets.utils.py_utils import convert_file_size_to_int
from PIL import features
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..cli import cores
from ..data.decode import public_path
from ..data.sources import AllSplits, SplitDataArguments
from ..embedding.shards import DATA, Shard, find_missing
from ..engine import lock
from ..engine.files import UNFINISHED, below, read_object, write_json, write_whole
from ..engine.preemption import outlive_signals
from ..engine.run_folder import LOCK, PREPARED, UNREADABLE, refuse_inside
from ..errors import one_line, shown
from ..hub.model_card import public_name
from .resize import Resizer, Stored
from .shards import COLUMNS, Row, counts_of, features_of, write_shard

BATCH = 16  # images that a process hands over together
LOOKED_AT = 64  # images from which the size of the others is estimated
MADE_LATER = ("images_per_shard", "files", "totals")  # of the record; the rest says which dataset this is


@dataclass
class PrepareDataArguments(SplitDataArguments):
    """Flags of the source. Its name is the first word of the command."""

    NOT_OFFERED: ClassVar[tuple[str, ...]] = (
        *SplitDataArguments.NOT_OFFERED,
        "dataset_name",
        "image_size",
        "eval_resize",
    )


@dataclass
class PrepareArguments:
    """How images are stored."""

    _argument_group_name = "preparation"

    short_side: int = field(
        default=256,
        metadata={"help": "Images whose short side is longer are resized to it, in pixels; others stay as they are."},
    )
    quality: int = field(
        default=90, metadata={"help": "Quality of JPEG, from 1 to 100, with colours at full resolution."}
    )
    shard_size: str = field(default="500MB", metadata={"help": "About how large a file is to be, e.g. 500MB or 1GB."})
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that read and resize images. By default one for each core."}
    )

    def __post_init__(self):
        if self.short_side < 1:
            raise ValueError(f"short_side ({self.short_side}) must be at least 1 pixel: 256 is usual for views of 224")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality ({self.quality}) must lie in 1 to 100: leave it out for 90")
        if not re.fullmatch(r"\d+(\.\d+)?([kKMGT]i?B)", self.shard_size) or self.shard_bytes < 1:
            raise ValueError(f"shard_size ({self.shard_size}) is no size: write it like 500MB or 1GB")
        if self.dataloader_num_workers is not None and self.dataloader_num_workers < 0:
            raise ValueError(
                f"dataloader_num_workers ({self.dataloader_num_workers}) must be at least 0: leave it out for all cores"
            )

    @property
    def shard_bytes(self) -> int:
        """About how large a file is to be."""
        return int(convert_file_size_to_int(self.shard_size.upper()))

    @property
    def workers(self) -> int:
        """Processes that read and resize images."""
        return cores() if self.dataloader_num_workers is None else self.dataloader_num_workers


def describe(data: PrepareDataArguments, images: AllSplits, args: PrepareArguments) -> dict[str, Any]:
    """What a prepared dataset is of: the record by which it is finished. No path of this machine is in it.

    Raises:
        ValueError: a split has a name that cannot be read from the name of a file.
    """
    if odd := [name for name in images.rows if not re.fullmatch(r"\w+", name)]:
        raise ValueError(
            f"split {odd[0]!r} of {data.dataset_name} cannot be a split of `datasets`, whose names have letters, digits and _ "
            "alone: rename it, or name others with --splits"
        )
    splits = {name: {"images": len(rows), "content": images.content[name]} for name, rows in images.rows.items()}
    jpeg = features.version("libjpeg_turbo") or features.version("jpg")
    return {
        "dataset": public_name(data.dataset_name, data.local),
        "config": data.dataset_config_name,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "max_image_pixels": data.max_image_pixels,
        "splits": splits,
        "short_side": args.short_side,
        "quality": args.quality,
        "shard_size": args.shard_bytes,
        "written_by": f"Pillow {PIL.__version__}, libjpeg {jpeg}, pyarrow {pyarrow.__version__}",
    }


def check_place(folder: Path, source: str, record: dict[str, Any]) -> dict[str, Any] | None:
    """Look at a folder before anything is written.

    Returns:
        its record; None where nothing was prepared there yet.

    Raises:
        ValueError: it holds another dataset or something else, or it lies in the source.
    """
    refuse_inside(folder, source)
    if not (folder / PREPARED).is_file():
        ours = (LOCK, UNFINISHED)
        if folder.exists() and (
            not folder.is_dir() or any(not path.name.startswith(ours) for path in folder.iterdir())
        ):
            raise ValueError(f"{folder} holds files of something else: name another folder")
        return None
    saved = read_object(folder / PREPARED, "bring it back, or name another folder")
    for key, value in record.items():
        if saved.get(key) != value:
            raise ValueError(
                f"{folder} holds a dataset that was prepared otherwise: {key} is {shown(saved.get(key))} there and "
                f"{shown(value)} here. Name another folder, or give the same settings to finish it"
            )
    step, files = saved.get("images_per_shard"), saved.get("files", {})
    whole = isinstance(step, int) and step > 0 and isinstance(files, dict)
    if not whole or not all(isinstance(about, dict) for about in files.values()):
        raise ValueError(f"{folder / PREPARED} is damaged: bring it back, or name another folder")
    return saved


def claim(folder: Path, source: str, record: dict[str, Any], images: AllSplits, resizer: Resizer) -> dict[str, Any]:
    """Make a folder the place of this dataset, and this process's own until its end.

    Returns:
        the record as it is there.

    Raises:
        ValueError: it holds something else, another process is writing to it, or it cannot be written.
    """
    check_place(folder, source, record)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.take(folder)
        saved = check_place(folder, source, record)
        if saved is None:
            saved = record | {"images_per_shard": estimate_images(images, resizer, record["shard_size"])}
            write_json(folder / PREPARED, saved)
        below(folder, DATA).mkdir(exist_ok=True)
        for path in (folder / DATA).glob(f"{UNFINISHED}*"):  # of a process that was killed
            shutil.rmtree(path)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error}): name another folder") from error
    return saved


def estimate_images(images: AllSplits, resizer: Resizer, size: int) -> int:
    """How many images make a file of `size` bytes, from some that are spread over all splits."""
    step = max(1, sum(map(len, images.rows.values())) // LOOKED_AT)
    found = (store(rows[i], resizer) for rows in images.rows.values() for i in range(0, len(rows), step))
    sizes = [len(stored.content) for stored in found if stored is not None]
    return max(1, round(size * len(sizes) / sum(sizes))) if sizes else 1


def shards_of(folder: Path, record: dict[str, Any]) -> list[Shard]:
    """All files of a prepared dataset, in order."""
    step, shards = record["images_per_shard"], []
    for split, about in record["splits"].items():
        starts = range(0, about["images"], step)
        for number, start in enumerate(starts):
            stop = min(start + step, about["images"])
            shards.append(Shard(folder, split, number, len(starts), start, stop))
    return shards


def prepare(images: AllSplits, shards: list[Shard], resizer: Resizer, data: PrepareDataArguments, workers: int) -> None:
    """Write the shards that are still missing. Images that cannot be read are left out, and listed beside them.

    Raises:
        ValueError: a shard that is there is damaged.
    """
    missing = find_missing(shards, COLUMNS)
    total, left = sum(map(len, shards)), sum(map(len, missing))
    with tqdm(
        desc="preparing", total=total, initial=total - left, unit=" images", disable=None, dynamic_ncols=True
    ) as bar:
        for split, rows in images.rows.items():
            if todo := [shard for shard in missing if shard.split == split]:
                order = shuffled(len(rows))
                numbers = [row for shard in todo for row in order[shard.start : shard.stop]]
                loader = DataLoader(
                    _Prepared(rows, resizer, numbers, data.dataset_name),
                    batch_size=BATCH,
                    collate_fn=list,
                    num_workers=min(workers, -(-len(numbers) // BATCH)),
                    worker_init_fn=_begin_worker,
                )
                prepared = _counted((row for batch in loader for row in batch), bar)
                for shard in todo:
                    columns = features_of("label" in rows.column_names, images.class_names)
                    write_shard(shard.path, islice(prepared, len(shard)), columns)
    list_unreadable(shards, images, data.dataset_name)


def _begin_worker(worker: int) -> None:
    outlive_signals(worker)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    # A worker whose parent was killed would wait for ever until somebody takes its images.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def shuffled(count: int) -> list[int]:
    """The rows of a split in the order of a prepared dataset."""
    order = list(range(count))
    random.Random("order of a prepared dataset").shuffle(order)
    return order


def list_unreadable(shards: list[Shard], images: AllSplits, dataset: str) -> None:
    """Write the images that the shards lack to a file beside them, a line each; no file where there is none."""
    lines = []
    for split, rows in images.rows.items():
        paths = [shard.path for shard in shards if shard.split == split]
        if sum(counts_of(path)["left_out"] for path in paths):
            there = {row for path in paths for row in pq.read_table(path, columns=["row"])["row"].to_pylist()}
            for row in sorted(set(range(len(rows))) - there):
                name = public_path((rows[row]["image"] or {}).get("path"), dataset)
                lines.append(one_line(f"{split}: row {row} {name or ''}"))
    path, text = shards[0].folder / UNREADABLE, "".join(f"{line}\n" for line in lines)
    if lines and not (path.is_file() and path.read_text(encoding="utf-8") == text):
        write_whole(path, text)


def _counted(rows: Iterable[Row], bar: Any) -> Iterator[Row]:
    for row in rows:
        bar.update()
        yield row


class _Prepared(Dataset):
    """Chosen images of a split as they are stored."""

    def __init__(self, rows: datasets.Dataset, resizer: Resizer, numbers: list[int], dataset: str):
        self.rows, self.resizer, self.numbers, self.dataset = rows, resizer, numbers, dataset

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Row:
        number = self.numbers[index]
        row = self.rows[number]
        path = public_path((row["image"] or {}).get("path"), self.dataset)
        return Row(number, store(row, self.resizer), row.get("label"), path)


def store(row: dict[str, Any], resizer: Resizer) -> Stored | None:
    """The image of a row as it is stored; None for one that cannot be read."""
    try:
        return resizer(row["image"])
    except OSError:
        return None


def finish(folder: Path, record: dict[str, Any], shards: list[Shard]) -> dict[str, int]:
    """Complete the record with what each file holds, and compare it with what was there before.

    Returns:
        the sums of all files: images, resized, left_out, bytes and bytes_before.

    Raises:
        ValueError: a file is not the one that was written.
    """
    files: dict[str, dict[str, Any]] = {}
    totals: Counter[str] = Counter()
    for shard in tqdm(shards, "checking", unit=" files", disable=None, leave=False, dynamic_ncols=True):
        with shard.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        counts = counts_of(shard.path)
        files[shard.path.name] = {"sha256": digest, "bytes": shard.path.stat().st_size} | counts
        totals.update(counts | {"bytes": shard.path.stat().st_size})
        before = record.get("files", {}).get(shard.path.name, {}).get("sha256", digest)
        if before != digest:
            raise ValueError(f"{shard.path} is not what was written there: delete it, and it is made again")
    complete = {key: value for key, value in record.items() if key not in MADE_LATER}
    complete |= {"images_per_shard": record["images_per_shard"], "totals": dict(totals), "files": files}
    if complete != record:
        write_json(folder / PREPARED, complete)
    return dict(totals)


def refuse_launchers() -> None:
    """
    Raises:
        ValueError: a launcher has started several of these processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were launched: start one, which has --dataloader_num_workers"
        )


def show(folder: Path, totals: dict[str, int]) -> None:
    """Say what a prepared dataset has become."""
    count, before, after = totals["images"], totals["bytes_before"], totals["bytes"]
    print(
        f"{count:,} images, {totals['resized']:,} of them resized: {after / 1e6:,.1f} MB of {before / 1e6:,.1f} MB. "
        f"Train on them by --dataset_name {folder}"
    )
    if totals["left_out"]:
        print(
            f"warning: {totals['left_out']:,} images cannot be read and are left out: {folder / UNREADABLE}",
            file=sys.stderr,
        )
