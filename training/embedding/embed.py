"""Embed the images of a dataset: every split, a row an image, shared over the processes, shard by shard.

A set is finished by the same command, and by no other: its record says which encoder, images and view it is of. Shapes: `N` a
batch, `D` width of an embedding, `S` side of a view.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from modeling_moco import MoCoModel
from modeling_moco.distributed_moco import rank

from ..data.decode import public_path
from ..data.images import MapImages
from ..data.sources import AllSplits, SplitDataArguments
from ..engine import lock
from ..engine.checkpoints import decided_by_main
from ..engine.files import UNFINISHED, read_object, write_json, write_whole
from ..engine.results import Feature, encoder_digest
from ..engine.run_folder import EMBEDDED, LOCK, UNREADABLE, refuse_inside
from ..errors import one_line, shown
from ..evaluation.features import encode_in_order
from .shards import DATA, Shard, find_missing, row_features, shards_of, write_shard

RECORDED = ("features", "model", "dtype", "dataset", "config", "image_column", "label_column", "view", "splits")


@dataclass
class EmbedArguments:
    """What is embedded, and what is done with the set."""

    _argument_group_name = "embedding"

    output_dir: str = field(
        default="", metadata={"help": "Folder of the embedded set. By default `embeddings` in the folder of the model."}
    )
    features: Feature = field(
        default="backbone",
        metadata={"help": "The pooled output of the backbone, or its projection by the head, without a predictor."},
    )
    stage: str | None = field(
        default=None,
        metadata={
            "help": "Stage of the backbone, by timm's name, e.g. layer3: the mean of its map instead of the pooled output."
        },
    )
    dtype: Literal["float16", "float32"] = field(default="float16", metadata={"help": "Numbers of an embedding."})
    search: list[str] = field(
        default_factory=list, metadata={"help": "Files of images whose nearest images of the set are listed and drawn."}
    )
    neighbours: int = field(default=10, metadata={"help": "Nearest images to list, with --search."})
    duplicates: float | None = field(
        default=None,
        metadata={
            "help": "List and draw groups of near-duplicates, within and between splits: least cosine similarity of a pair, "
            "e.g. 0.98."
        },
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Publish the set as this dataset, org/name, with a card."}
    )
    private: bool = field(default=False, metadata={"help": "Make the dataset private when it is created."})
    license: str = field(default="unknown", metadata={"help": "Licence of the published set, by the Hub's short name."})
    include_pictures: bool = field(
        default=False,
        metadata={"help": "Publish pictures of search and duplicates too, which show images of the dataset."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "With --push_to_hub, show the files and the card, without a network."}
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images per device at once."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read images, per device."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights of --random_encoder."})
    use_cpu: bool = field(default=False, metadata={"help": "Compute on the CPU, even where there is a GPU."})

    def __post_init__(self):
        self.output_dir = os.path.expanduser(self.output_dir)  # as transformers' arguments do
        if self.duplicates is not None and not 0 < self.duplicates <= 1:
            raise ValueError(f"duplicates ({self.duplicates}) must lie in (0, 1]: it is a cosine similarity, e.g. 0.98")
        for name in ("neighbours", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1: leave it out for the default")
        if self.stage is not None and self.features == "head":
            raise ValueError(f"stage ({self.stage}) is of the backbone, and features is head: leave one of them out")
        if self.push_to_hub is None and (self.dry_run or self.private or self.include_pictures):
            name = next(name for name in ("dry_run", "private", "include_pictures") if getattr(self, name))
            raise ValueError(f"{name} (True) is about publishing: name the dataset with --push_to_hub, or leave it out")


def stage_number(model: MoCoModel, stage: str | None) -> int | None:
    """Its place among the hidden states.

    Raises:
        ValueError: the encoder has no such stage.
    """
    if stage is None:
        return None
    names = [info["module"] for info in model.encoder_q.feature_info]
    if stage not in names:
        raise ValueError(f"stage ({stage}) is not one of {model.config.architecture}: choose one of {', '.join(names)}")
    return names.index(stage)


def describe(model: MoCoModel, data: SplitDataArguments, images: AllSplits, args: EmbedArguments) -> dict[str, Any]:
    """What a set is of: the record by which it is finished, and found to be the same.

    Raises:
        ValueError: a split has a name that `datasets` does not read from the name of a file.
    """
    if odd := [name for name in images.rows if not re.fullmatch(r"\w+", name)]:
        raise ValueError(
            f"split {odd[0]!r} of {data.dataset_name} cannot be a split of `datasets`, whose names have letters, digits and _ "
            "alone: rename it, or name others with --splits"
        )
    pooled = "pooled" if args.stage is None else f"mean of {args.stage}"
    view = data.evaluation_view()
    splits = {name: {"images": len(rows), "content": images.content[name]} for name, rows in images.rows.items()}
    return {
        "model": encoder_digest(model, args.features),
        "architecture": model.config.architecture,
        "features": "head" if args.features == "head" else f"backbone, {pooled}",
        "dtype": args.dtype,
        "dataset": data.dataset_name,
        "config": data.dataset_config_name,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "view": f"short side {view.resize} px, centre {data.image_size} px",
        "splits": splits,
    }


def claim(folder: Path, record: dict[str, Any]) -> None:
    """Make a folder the place of this set, and this process's own until its end.

    Raises:
        ValueError: it holds another set or something else, it lies in the dataset, another process is writing to it, or it
            cannot be written. All processes raise it.
    """

    def decide() -> None:
        check_place(folder, record)
        refuse_inside(folder, record["dataset"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.take(folder)
            if not (folder / EMBEDDED).is_file():
                write_json(folder / EMBEDDED, record)
            (folder / DATA).mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir ({folder}) cannot be written ({error}): pass another --output_dir") from error

    decided_by_main(decide)


def check_place(folder: Path, record: dict[str, Any]) -> None:
    """Look at a folder before anything is written.

    Raises:
        ValueError: it holds another set or something else.
    """
    if not (folder / EMBEDDED).is_file():
        if not folder.exists():
            return
        if not folder.is_dir() or any(not path.name.startswith((LOCK, UNFINISHED)) for path in folder.iterdir()):
            raise ValueError(f"output_dir ({folder}) holds files of something else: pass another --output_dir")
        return
    saved = read_object(folder / EMBEDDED, "bring it back, or pass another --output_dir")
    for key in RECORDED:
        if saved.get(key) != record[key]:
            raise ValueError(
                f"output_dir ({folder}) holds other embeddings: {key} is {shown(saved.get(key))} there and "
                f"{shown(record[key])} here. Pass another --output_dir, or the same settings to finish it"
            )


def embed(
    model: MoCoModel, images: AllSplits, folder: Path, args: EmbedArguments, data: SplitDataArguments
) -> list[Shard]:
    """Write the shards that a set still lacks. Call it on all processes; the first one writes.

    Images that cannot be read are left out, and listed in the set's folder.

    Returns:
        all shards.

    Raises:
        ValueError: a shard that is there is damaged, or an embedding is not finite in its dtype.
    """
    shards = shards_of(folder, {name: len(rows) for name, rows in images.rows.items()})
    missing = decided_by_main(lambda: find_missing(shards))
    total, left = sum(map(len, shards)), sum(map(len, missing))
    bar = tqdm(desc="embedding", total=total, initial=total - left, unit=" images", disable=rank() > 0 or None)
    with bar:
        for name, rows in images.rows.items():
            if todo := [shard for shard in missing if shard.split == name]:
                view = MapImages(rows, data.evaluation_view(), decode=images.decoder.image)
                batches = encode_in_order(
                    model,
                    _OrBlack(view, [row for shard in todo for row in range(shard.start, shard.stop)], data.image_size),
                    feature=args.features,
                    stage=stage_number(model, args.stage),
                    batch_size=args.per_device_eval_batch_size,
                    num_workers=args.dataloader_num_workers,
                )
                blocks = _of_sizes(_counted(batches, bar), [len(shard) for shard in todo])
                for shard, (x, readable) in zip(todo, blocks, strict=True):
                    _write(shard, x, readable, rows, args.dtype, images.class_names, data.dataset_name)
    if rank() == 0:
        list_unreadable(shards, images, data.dataset_name)
    return shards


class _OrBlack(Dataset):
    """Chosen images of a split, with 1 for a label. One that cannot be read is black and has 0: all keep their places."""

    def __init__(self, images: MapImages, numbers: list[int], size: int):
        self.images, self.numbers, self.size = images, numbers, size

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        views = self.images.read(self.numbers[index])
        if views is None:
            return {"pixel_values": torch.zeros(3, self.size, self.size, dtype=torch.uint8), "labels": 0}
        return {"pixel_values": views["pixel_values"], "labels": 1}


Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def _counted(batches: Batches, bar: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for batch in batches:
        bar.update(len(batch[0]))
        yield batch


def _of_sizes(batches: Batches, sizes: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same rows in blocks of these sizes."""
    source = iter(batches)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for size in sizes:
        while sum(len(x) for x, _ in parts) < size:
            parts.append(next(source))
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        yield x[:size], y[:size]
        parts = [(x[size:], y[size:])]


def _write(
    shard: Shard,
    x: torch.Tensor,
    readable: torch.Tensor,
    rows: datasets.Dataset,
    dtype: str,
    class_names: list[str],
    dataset: str,
) -> None:
    kept = readable.bool()
    embeddings = x[kept].to(getattr(torch, dtype)).numpy()
    if not np.isfinite(embeddings).all():
        finite = bool(torch.isfinite(x[kept]).all())
        remedy = "pass --dtype float32" if finite else "its weights are damaged: pass another model"
        raise ValueError(
            f"an embedding of split {shard.split!r} is {'too large for' if finite else 'not finite in'} {dtype}: {remedy}"
        )
    if rank() == 0:
        # As Arrow: the bytes of the images lie beside their paths, and are not touched.
        table = rows.with_format("arrow")[shard.start : shard.stop]
        mask = kept.numpy()
        paths = table["image"].combine_chunks().field("path").to_pylist()
        columns = {
            "row": np.arange(shard.start, shard.stop)[mask],
            "path": [public_path(path, dataset) for path, keep in zip(paths, mask, strict=True) if keep],
        }
        labelled = "label" in table.column_names
        if labelled:
            columns["label"] = table["label"].filter(mask).combine_chunks()
        features = row_features(embeddings.shape[1], dtype, labelled, class_names)
        write_shard(shard.path, columns, embeddings, features)


def list_unreadable(shards: list[Shard], images: AllSplits, dataset: str) -> int:
    """Write the images that the shards lack to a file beside them, a line each; no file where there is none.

    Returns:
        their number.
    """
    lines = []
    for shard in shards:
        if pq.read_metadata(shard.path).num_rows < len(shard):
            there = set(pq.read_table(shard.path, columns=["row"])["row"].to_pylist())
            for row in range(shard.start, shard.stop):
                if row not in there:
                    path = (images.rows[shard.split][row]["image"] or {}).get("path")
                    lines.append(one_line(f"{shard.split}: row {row} {public_path(path, dataset) or ''}"))
    if lines:
        write_whole(shards[0].folder / UNREADABLE, "\n".join(lines) + "\n")
    return len(lines)
