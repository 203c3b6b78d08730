"""Every row is read once, by one worker, for any number of processes, workers and shards; and in a shuffled order."""

import random
import shutil
import time
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

import datasets
import pytest
import torch.distributed as dist
from numbered_images import ROWS, number, stream, table, write_parquet, write_tars
from ranks import run_ranks

from training.data.decode import decode_image
from training.data.shards import Piece, ShardedRows, batches_per_epoch, count_rows, plan_epoch, shuffled_places
from training.data.sources import DataArguments, load_images
from training.errors import DataError

LENGTHS = {
    "even": [8] * 4,
    "uneven": [1, 17, 3, 0, 40, 2, 5, 0],
    "one": [50],
    "one row each": [1] * 30,
    "none to spare": [0, 24, 24],
    "too few": [2, 1],
}


def plans(lengths, ranks, workers, batch_size=4, seed=0, epoch=0) -> dict[tuple[int, int], list[Piece]]:
    """What each (rank, worker) reads."""
    sizes = {"seed": seed, "epoch": epoch, "batch_size": batch_size, "ranks": ranks, "workers": workers}
    consumers = product(range(ranks), range(workers))
    return {(rank, worker): plan_epoch(lengths, rank=rank, worker=worker, **sizes) for rank, worker in consumers}


def places(pieces: list[Piece]) -> list[tuple[int, int]]:
    return [(piece.shard, row) for piece in pieces for row in range(piece.start, piece.stop)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_row_is_read_once_but_for_less_than_a_batch_of_all_processes(lengths, batch_size):
    everything = {(shard, row) for shard, length in enumerate(lengths) for row in range(length)}
    for ranks, workers, epoch in product((1, 2, 3, 5), (1, 2, 3, 7), range(2)):
        found = [places(pieces) for pieces in plans(lengths, ranks, workers, batch_size, epoch=epoch).values()]
        read = [row for rows in found for row in rows]
        assert len(read) == len(set(read))
        assert set(read) <= everything
        assert len(everything) - len(read) < ranks * batch_size
        assert len(read) == ranks * batch_size * batches_per_epoch(lengths, batch_size, ranks)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_workers_have_the_batches_that_the_loader_asks_them_for(lengths):
    for ranks, workers in product((1, 2, 3), (1, 2, 3, 7)):
        batches = batches_per_epoch(lengths, 4, ranks)
        for (_, worker), pieces in plans(lengths, ranks, workers).items():
            assert len(places(pieces)) == 4 * len(range(worker, batches, workers))


def test_a_worker_starts_within_a_shard_at_most_once_and_leaves_one_at_most_once():
    for ranks, workers in product((1, 2, 3), (1, 2, 3)):
        for pieces in plans(LENGTHS["uneven"], ranks, workers).values():
            assert all(piece.start == 0 for piece in pieces[1:])
            assert all(piece.stop == LENGTHS["uneven"][piece.shard] for piece in pieces[:-1])
            assert all(piece.start < piece.stop for piece in pieces)


def test_the_order_of_shards_and_the_rows_left_out_change_with_seed_and_epoch():
    lengths = list(range(3, 23))  # 250 rows: two remain
    found = [places(plans(lengths, 1, 1, seed=seed, epoch=epoch)[0, 0]) for seed in range(3) for epoch in range(10)]
    assert found[0] == places(plans(lengths, 1, 1)[0, 0])
    assert len({tuple(rows) for rows in found}) == 30
    for of_seed in (found[:10], found[10:20], found[20:]):
        assert len({frozenset(rows) for rows in of_seed}) > 3


def test_a_thousand_uneven_shards_are_shared_evenly_by_512_workers():
    generator = random.Random(0)
    lengths = [generator.randrange(200, 2400) for _ in range(1000)]
    ranks, workers, batch_size = 64, 8, 32
    started = time.perf_counter()
    found = plans(lengths, ranks, workers, batch_size)
    seconds = time.perf_counter() - started
    shares = [sum(piece.stop - piece.start for piece in pieces) for pieces in found.values()]
    assert 0 <= sum(lengths) - sum(shares) < ranks * batch_size
    assert max(shares) - min(shares) <= batch_size
    read: dict[int, list[Piece]] = {}
    for piece in (piece for pieces in found.values() for piece in pieces):
        read.setdefault(piece.shard, []).append(piece)
    for pieces in read.values():
        ordered = sorted(pieces)
        assert all(before.stop == after.start for before, after in pairwise(ordered))
    passed, opened = [pieces[0].start for pieces in found.values()], [len(pieces) for pieces in found.values()]
    print(f"\n{sum(lengths):,} rows in 1,000 shards of 200 to 2,399; {ranks} processes x {workers} workers, batch 32")
    print(f"left out {sum(lengths) - sum(shares)}; rows of a worker {min(shares)} to {max(shares)}")
    print(f"rows passed before the first image: mean {sum(passed) / 512:.0f}, largest {max(passed)}")
    print(f"rows passed in all: {100 * sum(passed) / sum(shares):.0f} % of those read")
    print(f"shards opened by a worker: mean {sum(opened) / 512:.2f}, largest {max(opened)}")
    print(f"time to plan: {1000 * seconds / 512:.2f} ms per worker")


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_the_buffer_loses_nothing_and_holds_no_more_than_its_size(size):
    order = list(shuffled_places(50, size, random.Random(0)))
    assert sorted(order) == list(range(50))
    assert (order == list(range(50))) == (size == 1)
    # Rows arrive in their order: when the k-th leaves, those up to the last one that has left have arrived.
    assert all(place < k + size for k, place in enumerate(order))


def test_the_buffer_draws_every_place_equally_often():
    firsts = [next(shuffled_places(20, 5, random.Random(seed))) for seed in range(5000)]
    assert [firsts.count(i) for i in range(5)] == pytest.approx([1000] * 5, rel=0.15)


@pytest.mark.parametrize("skip", [0, 1, 13, 29, 30, 44, 45])
def test_a_skip_leaves_the_same_rows_and_does_not_open_what_is_behind_it(skip):
    rows = stream([range(15), range(15, 30), range(30, 45)])
    pieces = [Piece(2, 0, 15), Piece(0, 0, 15), Piece(1, 0, 15)]

    def numbers(skip):
        return [i for i, _ in rows.read_shuffled(pieces, 3, random.Random(1), skip)]

    rows = Watched(rows.source, rows.columns, rows.lengths)
    assert numbers(skip) == numbers(0)[skip:]
    rows.opened.clear()
    left = numbers(skip)
    assert {piece.shard for piece in rows.opened} == {i // 15 for i in left}
    assert (
        sum(piece.stop - piece.start for piece in rows.opened) <= len(left) + 15
    )  # a row may wait in the buffer for long


@dataclass(frozen=True)
class Watched(ShardedRows):
    """Rows that note which pieces are read."""

    opened: list[Piece] = field(default_factory=list)

    def read(self, piece):
        self.opened.append(piece)
        return super().read(piece)


def write(kind: str, folder: Path) -> Path:
    return write_tars(folder) if kind == "tar" else write_parquet(folder, [range(6), range(6, ROWS)])


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_piece_is_read_from_the_middle_of_a_shard_with_the_numbers_of_its_rows(kind, tmp_path):
    rows = load_images(DataArguments(dataset_name=str(write(kind, tmp_path / "source")), streaming=True)).train
    for shard, start, stop in ((0, 0, 6), (0, 2, 5), (1, 0, 1), (1, 3, 6), (1, 2, 2)):
        found = [(i, number(decode_image(row["image"]))) for i, row in rows.read(Piece(shard, start, stop))]
        assert found == [(i, i) for i in range(6 * shard + start, 6 * shard + stop)]


def test_a_shard_that_has_become_shorter_is_an_error_and_not_a_shorter_epoch():
    rows = ShardedRows(stream([range(4), range(4, 6)]).source, {"image": "image"}, [4, 3])
    with pytest.raises(DataError, match="shard 1 of the stream has 1 images fewer than were counted"):
        list(rows)


def test_a_shard_that_breaks_off_is_named_with_the_row(tmp_path):
    source = write_tars(tmp_path / "source")
    rows = load_images(DataArguments(dataset_name=str(source), streaming=True)).train
    broken = source / "train-1.tar"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: whole.index(b"0009.jpg") + 600])
    with pytest.raises(
        DataError, match=rf"shard 1 of the stream, {broken}, cannot be read from row 0 on \(unexpected end"
    ):
        list(rows)


def break_off(shards):
    yield from ({"image": i} for numbers in shards for i in numbers)
    raise OSError("the disk is gone")


def test_what_came_before_a_break_is_given():
    source = datasets.IterableDataset.from_generator(break_off, gen_kwargs={"shards": [range(40)]})
    found = []
    with pytest.raises(DataError, match=r"shard 0 of the stream cannot be read from row 32 on \(the disk is gone\)"):
        found.extend(ShardedRows(source, {"image": "image"}, [60]).read(Piece(0, 0, 60)))
    assert found == [(i, {"image": i}) for i in range(32)]


def test_files_are_read_once_for_their_length_until_they_change(tmp_path, capsys):
    source = write_tars(tmp_path / "source")

    def lengths(**flags):
        rows = load_images(DataArguments(dataset_name=str(source), streaming=True, **flags)).train
        return rows.lengths, "Counting" in capsys.readouterr().out

    assert lengths() == ([6, 6], True)
    assert lengths() == ([6, 6], False)
    assert lengths(max_train_samples=7) == ([6, 1], True)
    shutil.copy(source / "test-0.tar", source / "train-0.tar")
    assert lengths() == ([12, 6], True)


def test_counting_stops_where_enough_rows_are_found():
    source = stream([range(4), range(4, 10), range(10, 12)]).source
    assert count_rows(source, []) == [4, 6, 2]
    for limit in range(14):
        rows = ShardedRows(source, {"image": "image"}, count_rows(source, [], limit)).first(limit)
        assert rows.lengths == ShardedRows(source, {"image": "image"}, [4, 6, 2]).first(limit).lengths
        assert len(rows) == min(limit, 12)
    assert count_rows(source, [], 5) == [4, 1, 0]


def count_as(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    source = table(range(ROWS)).to_iterable_dataset(num_shards=5)
    assert count_rows(source, []) == [3, 3, 2, 2, 2]
    for limit in (1, 4, 7, 11, 12):
        rows = ShardedRows(source, {"image": "image"}, count_rows(source, [], limit)).first(limit)
        assert rows.lengths == ShardedRows(source, {"image": "image"}, [3, 3, 2, 2, 2]).first(limit).lengths
    opened = datasets.load_dataset_builder(f"{folder}/source", cache_dir=f"{folder}/cache")
    source, files = opened.as_streaming_dataset(split="train"), opened.config.data_files["train"]
    assert count_rows(source, files) == [1, 2, 3, 0, 6]
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_counting_and_know_all_of_it(tmp_path):
    write_parquet(tmp_path / "source", [range(1), range(1, 3), range(3, 6), range(0), range(6, ROWS)])
    run_ranks(count_as, (str(tmp_path),), 2)
