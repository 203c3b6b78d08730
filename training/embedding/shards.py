"""The files of an embedded set: Parquet shards with a row an image, which `datasets` opens as they are.

Shapes: `n` rows, `D` width of an embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ..engine.files import UNFINISHED, below, inside, whole_file
from ..errors import one_line

DATA = "data"  # folder of the shards
ROWS_PER_SHARD = (
    16_384  # images of one file, and what an interrupted embedding repeats at most: 67 MB of float16 (n, 2048)
)
ROWS_PER_GROUP = 4_096  # what a reader takes at once
EMBEDDING = "embedding"  # the column; the others say which image it is of
SPLIT = "split"


@dataclass(frozen=True)
class Shard:
    """A file of an embedded set.

    Args:
        folder: of the set.
        split: it belongs to.
        number, count: of this file and of all files of the split.
        start, stop: images of the split that it has, but for those that cannot be read.
    """

    folder: Path
    split: str
    number: int
    count: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def path(self) -> Path:
        return self.folder / DATA / f"{self.split}-{self.number:05}-of-{self.count:05}.parquet"


def shards_of(folder: Path, lengths: dict[str, int]) -> list[Shard]:
    """All files of a set, in order.

    Args:
        lengths: number of images of each split.
    """
    starts = {split: range(0, length, ROWS_PER_SHARD) for split, length in lengths.items()}
    return [
        Shard(folder, split, number, len(starts[split]), start, min(start + ROWS_PER_SHARD, lengths[split]))
        for split in lengths
        for number, start in enumerate(starts[split])
    ]


def row_features(width: int, dtype: str, labelled: bool, class_names: list[str]) -> datasets.Features:
    """The columns of every shard, of which `label` is there with labels only.

    Args:
        width: of an embedding, D.
        dtype: "float16" or "float32".
        class_names: by class number; empty for labels without names.
    """
    label = datasets.ClassLabel(names=class_names) if class_names else datasets.Value("int64")
    return datasets.Features(
        {"row": datasets.Value("int64"), "path": datasets.Value("string")}
        | ({"label": label} if labelled else {})
        | {EMBEDDING: datasets.List(datasets.Value(dtype), length=width)}
    )


def write_shard(path: Path, columns: dict[str, Any], embeddings: np.ndarray, features: datasets.Features) -> None:
    """Write a shard, which is there with all its rows or not at all.

    Args:
        columns: "row", "path" and with labels "label", n values each.
        embeddings: (n, D).
    """
    values = pa.array(np.ascontiguousarray(embeddings).reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
    schema = features.arrow_schema
    arrays = [lists if name == EMBEDDING else pa.array(columns[name], schema.field(name).type) for name in schema.names]
    with whole_file(path) as unfinished:
        pq.write_table(
            pa.table(arrays, schema=schema),
            unfinished,
            row_group_size=ROWS_PER_GROUP,
            use_dictionary=["path"],
            compression="snappy",
        )


def find_missing(shards: Sequence[Shard], columns: Sequence[str] = ("row", "path", EMBEDDING)) -> list[Shard]:
    """The shards that are still to be written.

    Args:
        columns: that each of them has.

    Raises:
        ValueError: one that is there is damaged or a link, or the folder has a file that is none of them.
    """
    folder = below(shards[0].folder, DATA)
    names = {shard.path.name for shard in shards}
    for path in folder.glob("*"):
        if path.name not in names and not path.name.startswith((".", UNFINISHED)):
            raise ValueError(
                f"{one_line(path)} is not of this set, and would be read as one of its files: move it away"
            )
    return [shard for shard in shards if not _is_there(shard, columns)]


def _is_there(shard: Shard, columns: Sequence[str]) -> bool:
    if not shard.path.is_file():
        return False
    try:
        footer = pq.read_metadata(inside(shard.path))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{shard.path} is damaged ({one_line(error)}): delete it, and it is made again") from error
    lacking = set(columns) - set(footer.schema.to_arrow_schema().names)
    if lacking or footer.num_rows > len(shard):
        defect = f"no column {min(lacking)}" if lacking else f"{footer.num_rows:,} rows of {len(shard):,} images"
        raise ValueError(f"{shard.path} has {defect}: delete it, and it is made again")
    return True


def count_rows(shards: Sequence[Shard]) -> dict[str, int]:
    """Rows of each split."""
    counts = dict.fromkeys((shard.split for shard in shards), 0)
    for shard in shards:
        counts[shard.split] += pq.read_metadata(shard.path).num_rows
    return counts


def read_embeddings(
    shards: Sequence[Shard], start: int = 0, doing: str | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """The embeddings of a set from row `start` on, a row group at a time: the number of its first row, and (n, D).

    Rows are numbered through all shards. Row groups before `start` are not read.

    Args:
        doing: words for a progress bar; None for none.
    """
    with tqdm(total=sum(count_rows(shards).values()), desc=doing, unit=" rows", disable=None if doing else True) as bar:
        first = 0
        for shard in shards:
            with pq.ParquetFile(shard.path) as file:
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if rows > 0 and first + rows > start:
                        lists = file.read_row_group(group, columns=[EMBEDDING])[EMBEDDING].combine_chunks()
                        values = lists.flatten().to_numpy().reshape(rows, -1)
                        yield max(first, start), values[max(0, start - first) :]
                    first += rows
                    bar.update(rows)


def read_places(shards: Sequence[Shard]) -> pa.Table:
    """Which image each row of a set is of: split, row, path and with labels label."""
    tables = []
    for shard in shards:
        with pq.ParquetFile(shard.path) as file:
            table = file.read([name for name in file.schema_arrow.names if name != EMBEDDING])
        splits = pa.array([shard.split] * len(table), pa.string()).dictionary_encode()
        tables.append(table.add_column(0, SPLIT, splits))
    return pa.concat_tables(tables).unify_dictionaries()
