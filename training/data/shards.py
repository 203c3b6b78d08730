"""Plan which rows of which shards each worker of each process reads in an epoch, and in which order.

The rows of a stream have one numbering over all its shards: row `i` is the same image in every epoch.
"""

import hashlib
import json
import os
import random
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch.distributed as dist
from datasets.utils.file_utils import xopen
from pyarrow import ArrowException
from pyarrow.parquet import read_metadata
from tqdm import tqdm

from modeling_moco.distributed_moco import world_size

from ..engine.files import write_json
from ..errors import DataError, one_line

CHUNK = 32  # rows to ask `datasets` for at a time: single rows take longer
# What reading a shard may raise, of its file and of the Hub.
UNREADABLE = (OSError, ValueError, EOFError, ArrowException, tarfile.TarError, DataError)
OPEN_FOOTERS = 16  # parquet footers to read in parallel: on the Hub each request takes a while


class Piece(NamedTuple):
    """Rows `start` to `stop` (exclusive) of one shard."""

    shard: int
    start: int
    stop: int


def batches_per_epoch(lengths: Sequence[int], batch_size: int, ranks: int = 1) -> int:
    """Number of whole batches of `batch_size` images on each of `ranks` processes, from shards with these `lengths` in rows."""
    return sum(lengths) // (batch_size * ranks)


def plan_epoch(
    lengths: Sequence[int],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    worker: int = 0,
    workers: int = 1,
) -> list[Piece]:
    """The pieces that one worker of one process reads, in order.

    The plan shuffles the shards and divides their rows into contiguous ranges, one for each worker of each process, so that
    no two workers read the same row. Less than one global batch remains unread, from other shards in other epochs.

    Args:
        lengths: number of rows of each shard.
        seed, epoch: determine the order of the shards.
        batch_size: images per process.
        rank, ranks: number of this process, and how many there are.
        worker, workers: number of this worker, and how many each process has. The DataLoader takes whole batches from them in
            turn.
    """
    batches = batches_per_epoch(lengths, batch_size, ranks)
    shares = [len(range(w, batches, workers)) * batch_size for w in range(workers)]
    start = rank * batches * batch_size + sum(shares[:worker])
    stop = start + shares[worker]
    order = list(range(len(lengths)))
    random.Random(f"shards of seed {seed}, epoch {epoch}").shuffle(order)
    pieces, end = [], 0
    for shard in order:
        begin, end = end, end + lengths[shard]
        if max(start, begin) < min(stop, end):
            pieces.append(Piece(shard, max(start, begin) - begin, min(stop, end) - begin))
    return pieces


def shuffled_places(count: int, size: int, generator: random.Random) -> Iterator[int]:
    """Shuffle the numbers below `count` with a buffer of `size`, which is filled in ascending order."""
    buffer = list(range(min(size, count)))
    for place in range(size, count):
        i = generator.randrange(size)
        yield buffer[i]
        buffer[i] = place
    generator.shuffle(buffer)
    while buffer:
        yield buffer.pop()


@dataclass(frozen=True)
class ShardedRows:
    """A stream of rows that can start at any row.

    Args:
        source: the dataset, with undecoded images and its own column names.
        columns: maps column names of `source` to names in the rows.
        lengths: number of first rows that are used of each shard, in the order of `source.shard`.
        files: of the shards, where they have some.
    """

    source: datasets.IterableDataset
    columns: dict[str, str]
    lengths: list[int]
    files: Sequence[str] = ()

    def __len__(self) -> int:
        return sum(self.lengths)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for shard, length in enumerate(self.lengths):
            for _, row in self.read(Piece(shard, 0, length)):
                yield row

    def first(self, count: int) -> "ShardedRows":
        """A stream of the first `count` rows, or of all where there are fewer."""
        ends = accumulate(self.lengths)
        kept = [min(n, max(0, count - end + n)) for n, end in zip(self.lengths, ends, strict=True)]
        return replace(self, lengths=kept)

    def read_shuffled(
        self, pieces: list[Piece], buffer_size: int, generator: random.Random, skip: int = 0
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read the rows of `pieces` in shuffled order.

        The order is fixed before anything is read. A piece of which every row is skipped is not read.

        Args:
            pieces: in the order of reading.
            buffer_size: rows in the shuffle buffer.
            generator: of the order.
            skip: number of first rows, in shuffled order, to leave out.

        Yields:
            the number of a row in the whole stream, and the row.
        """
        count = sum(piece.stop - piece.start for piece in pieces)
        order = array("q", shuffled_places(count, buffer_size, generator))[skip:]
        wanted = bytearray(count)
        for place in order:
            wanted[place] = 1
        arriving = self._read_wanted(pieces, wanted)
        held: dict[int, tuple[int, dict[str, Any]]] = {}
        for place in order:
            while place not in held:
                arrived, row = next(arriving)
                held[arrived] = row
            yield held.pop(place)

    def _read_wanted(self, pieces: list[Piece], wanted: bytearray) -> Iterator[tuple[int, tuple[int, dict[str, Any]]]]:
        end = 0
        for shard, start, stop in pieces:
            begin, end = end, end + stop - start
            first, last = wanted.find(1, begin, end), wanted.rfind(1, begin, end)
            if first >= 0:
                left = Piece(shard, start + first - begin, start + last + 1 - begin)
                for place, row in zip(range(first, last + 1), self.read(left), strict=True):
                    if wanted[place]:
                        yield place, row

    def read(self, piece: Piece) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read rows of one shard in order.

        Yields:
            the number of a row in the whole stream, and the row.

        Raises:
            DataError: the shard cannot be read, or has fewer rows than were counted.
        """
        before = sum(self.lengths[: piece.shard])
        row = piece.start
        shard = self.source.shard(num_shards=len(self.lengths), index=piece.shard).skip(piece.start)
        try:
            # Not `for row in shard`, which would divide the shard among the workers of a DataLoader a second time.
            for chunk in shard.iter(batch_size=CHUNK):
                for values in zip(*(chunk[name] for name in self.columns), strict=True):
                    if row == piece.stop:
                        return
                    yield before + row, dict(zip(self.columns.values(), values, strict=True))
                    row += 1
        except UNREADABLE as error:
            raise DataError(
                f"{self._name(piece.shard)} cannot be read from row {row} on ({one_line(error)})"
            ) from error
        if row < piece.stop:
            raise DataError(
                f"{self._name(piece.shard)} has {piece.stop - row} images fewer than were counted: its file has changed, start "
                "the run again"
            )

    def _name(self, shard: int) -> str:
        file = f", {self.files[shard]}," if len(self.files) == len(self.lengths) else ""
        return f"shard {shard} of the stream{file}"


def are_parquet(files: list[str]) -> bool:
    """Whether the shards of a stream are parquet files."""
    return bool(files) and all(file.endswith(".parquet") for file in files)


def count_rows(source: datasets.IterableDataset, files: list[str], limit: int | None = None) -> list[int]:
    """Count the rows of each shard of a stream, in the order of `source.shard`. The processes share the work.

    The footer of a parquet file states its length. Other shards are read once from start to end, and their lengths are
    cached beside the cache of `datasets` until the files change.

    Args:
        source: the stream.
        files: of the shards; empty where the stream has none.
        limit: stop after this many rows. Later shards may then be counted as too short.
    """
    if are_parquet(files):
        assert len(files) == source.num_shards, f"{len(files)} files, but {source.num_shards} shards"
        return _share(source.num_shards, lambda mine: _count_by_footer([files[i] for i in mine]))
    quiet = not files or (world_size() > 1 and dist.get_rank() > 0)
    memory = _memory(files, limit)
    remembered = _first_ranks(json.loads(memory.read_text(encoding="utf-8")) if files and memory.is_file() else None)
    if remembered is not None:
        return remembered
    if not quiet:
        print(f"Counting the images of {len(files)} files by reading them once. Parquet files would not need this.")
    lengths = _share(source.num_shards, lambda mine: _count_by_reading(source, mine, limit, quiet))
    if not quiet:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, lengths)
    return lengths


def _memory(files: list[str], limit: int | None) -> Path:
    # The address of a file on the Hub contains its revision, so local files alone need size and time.
    states = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files if os.path.isfile(file)]
    key = hashlib.sha256(repr((files, states, limit)).encode()).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "shard_lengths" / f"{key}.json"


def _first_ranks(value: Any) -> Any:
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _share(shards: int, count: Callable[[range], list[int]]) -> list[int]:
    ranks = world_size()
    if ranks == 1:
        return count(range(shards))
    parts: list[list[int]] = [[] for _ in range(ranks)]
    dist.all_gather_object(parts, count(range(dist.get_rank(), shards, ranks)))
    lengths = [0] * shards
    for i, part in enumerate(parts):
        lengths[i::ranks] = part
    return lengths


def _count_by_footer(files: list[str]) -> list[int]:
    def rows(file: str) -> int:
        try:
            with xopen(file, "rb") as opened:
                return read_metadata(opened).num_rows
        except UNREADABLE as error:
            raise DataError(f"the footer of {file} cannot be read ({one_line(error)})") from error

    with ThreadPoolExecutor(OPEN_FOOTERS) as pool:
        return list(pool.map(rows, files))


def _count_by_reading(source: datasets.IterableDataset, shards: range, limit: int | None, quiet: bool) -> list[int]:
    counts: list[int] = []
    with tqdm(desc="images", unit="", disable=quiet or None, dynamic_ncols=True) as bar:
        for i in shards:
            left = None if limit is None else limit - sum(counts)
            counts.append(0)
            for _ in islice(source.shard(num_shards=source.num_shards, index=i), left):
                counts[-1] += 1
                bar.update()
    return counts
