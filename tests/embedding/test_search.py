"""Exact search and near-duplicates against loops in float64, and what is listed and drawn of both."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_encoder

from training.commands import embed as command
from training.embedding import duplicates as duplicates_module
from training.embedding import shards as shards_module
from training.embedding.duplicates import find_duplicates
from training.embedding.search import search
from training.embedding.shards import Shard, read_embeddings, read_places, row_features, shards_of, write_shard

DIM = 12


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(shards_module, "ROWS_PER_SHARD", 40)
    monkeypatch.setattr(shards_module, "ROWS_PER_GROUP", 11)


def made(folder, lengths, dtype="float16", plant=()) -> tuple[list[Shard], np.ndarray]:
    """Shards of random embeddings of unequal lengths, and these in float64; `plant` has (row, copy, noise)."""
    (folder / "data").mkdir()
    random, n = np.random.default_rng(0), sum(lengths.values())
    x = random.normal(size=(n, DIM))
    for row, copy, noise in plant:
        x[copy] = x[row] + noise * np.linalg.norm(x[row]) / DIM**0.5 * random.normal(size=DIM)
    x = (x * random.uniform(0.1, 9, size=(n, 1))).astype(dtype)
    shards, first = shards_of(folder, lengths), 0
    for shard in shards:
        rows = range(shard.start, shard.stop)
        features = row_features(DIM, dtype, False, [])
        write_shard(shard.path, {"row": rows, "path": [None] * len(rows)}, x[first : first + len(rows)], features)
        first += len(rows)
    return shards, x.astype(np.float64)


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)


@pytest.mark.parametrize("k", [1, 7, 200])
def test_the_nearest_are_those_of_all_rows_sorted_in_float64(tmp_path, k):
    shards, x = made(tmp_path, {"train": 97, "test": 50})
    queries = np.random.default_rng(1).normal(size=(3, DIM))
    similarity, index = search(shards, torch.tensor(queries), k)
    expected = cosines(queries, x)
    order = np.argsort(-expected, axis=1)[:, : min(k, 147)]
    assert np.array_equal(index.numpy(), order)
    np.testing.assert_allclose(similarity.numpy(), np.take_along_axis(expected, order, axis=1), atol=1e-6)


def test_rows_are_read_from_any_start_and_each_names_its_image(tmp_path):
    shards, x = made(tmp_path, {"train": 97, "test": 50})
    for start in (0, 10, 11, 40, 96, 97, 146):
        parts = list(read_embeddings(shards, start))
        assert [first for first, _ in parts] == list(np.cumsum([start, *(len(part) for _, part in parts)])[:-1])
        np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), x[start:].astype(np.float16))
    places = read_places(shards)
    assert places["split"].to_pylist() == ["train"] * 97 + ["test"] * 50
    assert places["row"].to_pylist() == [*range(97), *range(50)]


def test_a_shard_of_which_no_image_could_be_read_is_passed_over(tmp_path):
    shards, x = made(tmp_path, {"train": 97})
    features = row_features(DIM, "float16", False, [])
    write_shard(shards[1].path, {"row": [], "path": []}, np.empty((0, DIM), np.float16), features)
    left = np.concatenate([x[:40], x[80:]])
    similarity, index = search(shards, torch.tensor(left[50:51]), 1)
    assert index.tolist() == [[50]]
    assert similarity.item() == pytest.approx(1, abs=1e-6)
    assert find_duplicates(shards, 0.999).groups == []
    assert read_places(shards)["row"].to_pylist() == [*range(40), *range(80, 97)]


PLANTED = [(3, 20, 0), (20, 60, 0.05), (5, 120, 0), (130, 140, 0.02), (8, 99, 0.05), (99, 100, 0.05), (30, 31, 0.6)]


@pytest.mark.parametrize(("block", "chunk"), [(16_384, 1024), (13, 4), (40, 11)])
def test_groups_are_those_of_all_pairs_compared_in_float64(tmp_path, monkeypatch, block, chunk):
    monkeypatch.setattr(duplicates_module, "BLOCK", block)
    monkeypatch.setattr(duplicates_module, "CHUNK", chunk)
    shards, x = made(tmp_path, {"train": 97, "test": 50}, plant=PLANTED)
    threshold, n = 0.98, 147
    close = cosines(x, x)
    split = np.arange(n) >= 97
    groups = [{i} for i in range(n)]
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j and close[i, j] >= threshold]
    for i, j in pairs:
        joined = groups[i] | groups[j]
        for row in joined:
            groups[row] = joined
    found = find_duplicates(shards, threshold)
    assert found.group.tolist() == [min(group) for group in groups]
    meets = np.zeros((n, 2), bool)
    for i, j in pairs:
        meets[i, int(split[j])] = True
    assert np.array_equal(found.meets, meets)
    for name, similarity, allowed in (
        (found.nearest, found.similarity, lambda i, j: True),
        (found.across, found.across_similarity, lambda i, j: split[i] != split[j]),
    ):
        for i in range(n):
            best = max((close[i, j] for k, j in pairs if k == i and allowed(i, j)), default=None)
            assert (name[i] >= 0) == (best is not None)
            if best is not None:
                assert close[i, name[i]] == pytest.approx(best, abs=1e-6)
                assert similarity[i] == pytest.approx(best, abs=1e-6)
    # The planted ones and no others: three of them across the splits, and these first.
    assert {frozenset(group.tolist()) for group in found.groups} == {
        *(frozenset(group) for group in ({3, 20, 60}, {5, 120}, {130, 140}, {8, 99, 100}))
    }
    assert [found.between(group) for group in found.groups] == [True, True, False, False]


def test_equal_rows_are_duplicates_at_a_threshold_of_one(tmp_path):
    shards, _ = made(tmp_path, {"train": 60})
    assert find_duplicates(shards, 1.0).groups == []
    table = [(row, row + 30) for row in range(30)]
    folder = tmp_path / "equal"
    (folder / "data").mkdir(parents=True)
    x = np.random.default_rng(3).normal(size=(30, DIM)).astype(np.float16)
    shards = shards_of(folder, {"train": 60})
    for shard in shards:
        rows = range(shard.start, shard.stop)
        features = row_features(DIM, "float16", False, [])
        part = np.concatenate([x, x])[shard.start : shard.stop]
        write_shard(shard.path, {"row": rows, "path": [None] * len(rows)}, part, features)
    assert [tuple(group) for group in sorted(find_duplicates(shards, 1.0).groups, key=min)] == table


# The command


@pytest.fixture
def photos(tmp_path):
    """Twelve photographs in train and eight in test, two of which are in both: once as it was, once compressed anew."""
    random = np.random.default_rng(0)

    def photo():
        small = Image.fromarray(random.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        return small.resize((48, 48), Image.Resampling.BICUBIC)

    pictures = [photo() for _ in range(20)]
    pictures[14], pictures[17] = pictures[2], pictures[5]
    for number, picture in enumerate(pictures):
        folder = tmp_path / "photos" / ("train" if number < 12 else "test") / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        if number == 17:
            picture.save(folder / f"{number}.jpg", quality=95, subsampling=0)
        else:
            picture.save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_leaks_between_splits_are_listed_and_a_search_finds_its_own_image(photos, tmp_path, capsys):
    encoder = save_encoder(tmp_path / "encoder")
    folder = tmp_path / "set"
    argv = [str(encoder), "--dataset_name", str(photos), "--image_size", "32", "--output_dir", str(folder)]
    query = photos / "test" / "dog" / "13.png"
    command.main([*argv, "--duplicates", "0.998", "--search", str(query), "--neighbours", "3"])
    shown = capsys.readouterr().out
    assert "2 groups of 4 images, 2 of them between splits" in shown
    assert "test: 2 of 8 images have a near-duplicate in train" in shown
    lines = list(csv.DictReader((folder / "duplicates_0.998.csv").read_text().splitlines()))
    assert [(line["group"], line["split"], line["path"], line["label"]) for line in lines] == [
        ("1", "train", "train/cat/2.png", "cat"),
        ("1", "test", "test/cat/14.png", "cat"),
        ("2", "train", "train/dog/5.png", "dog"),
        ("2", "test", "test/dog/17.jpg", "dog"),
    ]
    assert lines[0]["across_split"] == "test"
    assert all(line["between_splits"] == "True" for line in lines)
    found = list(csv.DictReader((folder / "search.csv").read_text().splitlines()))
    assert [line["rank"] for line in found] == ["1", "2", "3"]
    assert (found[0]["path"], found[0]["label"], found[0]["split"]) == ("test/dog/13.png", "dog", "test")
    assert float(found[0]["similarity"]) == pytest.approx(1, abs=1e-5)
    for name in ("search", "duplicates_0.998"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width == 1600
    # Another search does not take the place of the first.
    before = (folder / "search.csv").read_bytes()
    command.main([*argv, "--search", str(photos / "train" / "cat" / "0.png"), "--neighbours", "1"])
    assert (folder / "search.csv").read_bytes() == before
    assert len(list(csv.DictReader((folder / "search_2.csv").read_text().splitlines()))) == 1
