"""The files of a prepared dataset: Parquet as `datasets` writes it for the Hub, a row an image."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..engine.files import whole_file
from .resize import Stored

ROWS_PER_GROUP = 100  # what a stream reads at once: 4 MB of images of 256 px
COLUMNS = ("image", "row", "file_name")
COUNTS = "moco_prepared"  # key of what a file says about its images, beside its columns


class Row(NamedTuple):
    """An image of the source.

    Args:
        number: in its split.
        stored: None where it cannot be read.
        label: its class, or None.
        file_name: where it is in its dataset; None without a name.
    """

    number: int
    stored: Stored | None
    label: int | None
    file_name: str | None


def features_of(labelled: bool, class_names: list[str]) -> datasets.Features:
    """The columns of every file, of which `label` is there with labels only.

    Args:
        class_names: by class number; empty for labels without names.
    """
    label = datasets.ClassLabel(names=class_names) if class_names else datasets.Value("int64")
    return datasets.Features(
        {"image": datasets.Image()}
        | ({"label": label} if labelled else {})
        | {"row": datasets.Value("int64"), "file_name": datasets.Value("string")}
    )


def write_shard(path: Path, rows: Iterable[Row], columns: datasets.Features) -> None:
    """Write a file, which is there with all its images or not at all. Images that cannot be read are counted.

    Args:
        columns: of `features_of`.
    """
    schema = columns.arrow_schema
    counts = dict.fromkeys(("images", "resized", "left_out", "bytes_before"), 0)
    group: list[Row] = []
    # Nothing is compressed: JPEG files do not become smaller, and the other columns are short.
    with whole_file(path) as unfinished, pq.ParquetWriter(unfinished, schema, compression="none") as file:
        for row in rows:
            if row.stored is None:
                counts["left_out"] += 1
                continue
            counts["images"] += 1
            counts["resized"] += row.stored.resized
            counts["bytes_before"] += row.stored.before
            group.append(row)
            if len(group) == ROWS_PER_GROUP:
                file.write_table(_table(group, schema))
                group = []
        if group or not counts["images"]:
            file.write_table(_table(group, schema))
        file.add_key_value_metadata({COUNTS: json.dumps(counts)})


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    values = {
        "image": [
            {"bytes": row.stored.content, "path": row.file_name and row.file_name.rsplit("/", 1)[-1]}
            for row in rows
            if row.stored is not None
        ],
        "label": [row.label for row in rows],
        "row": [row.number for row in rows],
        "file_name": [row.file_name for row in rows],
    }
    return pa.table([pa.array(values[name], schema.field(name).type) for name in schema.names], schema=schema)


def counts_of(path: Path) -> dict[str, int]:
    """What a file says about its images: images, resized, left_out and bytes_before.

    Raises:
        ValueError: it is not a file of a prepared dataset.
    """
    try:
        counts: dict[str, int] = json.loads((pq.read_metadata(path).metadata or {})[COUNTS.encode()])
    except (LookupError, ValueError) as error:
        raise ValueError(f"{path} is not what was written there: delete it, and it is made again") from error
    return counts
