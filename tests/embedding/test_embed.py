"""An embedded set: its rows against the encoder called by hand, what is left out, finished and refused."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from ranks import join_trainers, run_ranks
from safetensors.torch import load_file, save_file
from tiny_models import save_encoder

from modeling_moco import MoCoModel
from modeling_moco.image_processing_moco import normalize
from training.commands import embed as command
from training.data.formats import load_digits
from training.embedding import shards as shards_module
from training.embedding.embed import EmbedArguments
from training.embedding.shards import find_missing, row_features, shards_of, write_shard
from training.views.pil import EvaluationView

VIEW = ["--image_size", "32", "--eval_resize", "32"]
DIGITS = ["--dataset_name", "digits", "--max_samples", "50", *VIEW]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards_module, "ROWS_PER_SHARD", 16)
    monkeypatch.setattr(shards_module, "ROWS_PER_GROUP", 5)


@pytest.fixture
def photos(tmp_path):
    """A folder of images in two classes and two splits, two of which cannot be read."""
    random = np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 5)):
        for number in range(count):
            folder = tmp_path / "photos" / split / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "photos" / "train" / "cat" / "4.png").write_bytes(b"no image")
    (tmp_path / "photos" / "test" / "dog" / "3.png").write_bytes(b"nor this")
    return tmp_path / "photos"


def by_hand(encoder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled features, and the mean of the map of layer3, of uint8 images (N, 3, S, S)."""
    model = MoCoModel.from_pretrained(encoder).eval()
    maps = []
    model.encoder_q.layer3.register_forward_hook(lambda module, args, output: maps.append(output))
    with torch.no_grad():
        pooled = model(normalize(pixels, model.config.image_mean, model.config.image_std)).pooler_output
    return pooled, maps[0].flatten(2).mean(dim=2)


def refuse(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit):
        command.main(argv)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


def test_rows_are_the_embeddings_of_all_images_of_all_splits_in_order(encoder, tmp_path, small_shards):
    command.main([str(encoder), *DIGITS, "--output_dir", str(tmp_path / "set"), "--per_device_eval_batch_size", "7"])
    names = {path.name for path in (tmp_path / "set" / "data").iterdir()}
    assert names == {f"{split}-0000{i}-of-00004.parquet" for split in ("train", "test") for i in range(4)}
    found = datasets.load_dataset(str(tmp_path / "set"))
    source = load_digits()
    assert list(found) == ["train", "test"]
    view = EvaluationView(32, 32)
    for split, rows in found.items():
        assert rows.features["embedding"] == datasets.List(datasets.Value("float16"), length=96)
        assert rows.features["label"] == datasets.ClassLabel(names=list("0123456789"))
        assert rows["row"][:] == list(range(50))
        assert rows["label"][:] == source[split]["label"][:50]
        pixels = [view(source[split][i]["image"].convert("RGB"), None)["pixel_values"] for i in range(50)]
        pooled, _ = by_hand(encoder, torch.stack(pixels))
        embeddings = torch.tensor(np.stack(rows.with_format("numpy")["embedding"][:])).float()
        torch.testing.assert_close(embeddings, pooled, atol=2e-3, rtol=2e-3)


def test_a_folder_that_datasets_takes_for_a_pattern_is_said_to_be_one(encoder, tmp_path, capsys):
    few = [*DIGITS, "--max_samples", "4"]
    for name in ("one", "one [1]"):
        command.main([str(encoder), *few, "--output_dir", str(tmp_path / name)])
        said = capsys.readouterr().out
        try:
            opens = len(datasets.load_dataset(str(tmp_path / name), split="train")) == 4
        except datasets.exceptions.DataFilesNotFoundError:
            opens = False
        assert (f"datasets.load_dataset({str(tmp_path / name)!r})" in said) == opens
        assert ("for a pattern, so that only another name opens it" in said) != opens


def test_a_stage_is_the_mean_of_its_map_and_float32_is_exact(encoder, tmp_path):
    argv = [str(encoder), *DIGITS, "--output_dir", str(tmp_path / "set"), "--splits", "test"]
    command.main([*argv, "--stage", "layer3", "--dtype", "float32"])
    images = load_digits()["test"].select(range(50))["image"][:]
    view = EvaluationView(32, 32)
    pixels = [view(image.convert("RGB"), None)["pixel_values"] for image in images]
    _, expected = by_hand(encoder, torch.stack(pixels))
    found = datasets.load_dataset(str(tmp_path / "set"))
    assert list(found) == ["test"]
    embeddings = torch.tensor(np.stack(found["test"].with_format("numpy")["embedding"][:]))
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)


def test_the_head_is_what_the_query_projector_makes_at_unit_length(encoder, tmp_path):
    weights = {name: x.double() for name, x in load_file(encoder / "model.safetensors").items()}
    shutil.copytree(encoder, tmp_path / "encoder")
    saved = load_file(encoder / "model.safetensors")  # another key side, which may not show
    saved |= {name: torch.randn_like(x) for name, x in saved.items() if name.startswith("projector_k.")}
    save_file(saved, tmp_path / "encoder" / "model.safetensors", metadata={"format": "pt"})
    argv = [str(tmp_path / "encoder"), *DIGITS, "--splits", "test", "--max_samples", "6"]
    command.main([*argv, "--output_dir", str(tmp_path / "set"), "--features", "head", "--dtype", "float32"])
    rows = datasets.load_dataset(str(tmp_path / "set"), split="test")
    assert rows.features["embedding"] == datasets.List(datasets.Value("float32"), length=128)
    images, view = load_digits()["test"].select(range(6))["image"][:], EvaluationView(32, 32)
    pooled, _ = by_hand(encoder, torch.stack([view(image.convert("RGB"), None)["pixel_values"] for image in images]))

    def linear(layer: int, x: list[float]) -> list[float]:
        weight, bias = (weights[f"projector_q.{layer}.{name}"].tolist() for name in ("weight", "bias"))
        return [
            sum(w * value for w, value in zip(line, x, strict=True)) + b for line, b in zip(weight, bias, strict=True)
        ]

    for embedding, x in zip(rows["embedding"], pooled.tolist(), strict=True):
        z = linear(2, [max(0.0, value) for value in linear(0, x)])
        length = sum(value**2 for value in z) ** 0.5
        np.testing.assert_allclose(embedding, [value / length for value in z], atol=2e-6)
    assert "float32, of unit length" in (tmp_path / "set" / "README.md").read_text()


def test_unreadable_images_are_left_out_and_listed_and_paths_are_relative(encoder, photos, tmp_path, capsys):
    command.main([str(encoder), "--dataset_name", str(photos), *VIEW, "--output_dir", str(tmp_path / "set")])
    found = datasets.load_dataset(str(tmp_path / "set"))
    train = [f"train/{name}/{number}.png" for name, first in (("cat", 0), ("dog", 1)) for number in range(first, 9, 2)]
    assert found["train"]["path"][:] == [path for path in train if path != "train/cat/4.png"]
    assert found["train"]["row"][:] == [0, 1, 3, 4, 5, 6, 7, 8]
    assert found["test"]["path"][:] == ["test/cat/0.png", "test/cat/2.png", "test/cat/4.png", "test/dog/1.png"]
    assert found["train"].features["label"].names == ["cat", "dog"]
    assert found["train"]["label"][:] == [0] * 4 + [1] * 4
    # Each row is of the image that its path names, though others before it are left out.
    view = EvaluationView(32, 32)
    pixels = [view(Image.open(photos / path), None)["pixel_values"] for path in found["train"]["path"]]
    pooled, _ = by_hand(encoder, torch.stack(pixels))
    embeddings = torch.tensor(np.stack(found["train"].with_format("numpy")["embedding"][:])).float()
    torch.testing.assert_close(embeddings, pooled, atol=2e-3, rtol=2e-3)
    listed = (tmp_path / "set" / "unreadable_images.txt").read_text().splitlines()
    assert listed == ["train: row 2 train/cat/4.png", "test: row 4 test/dog/3.png"]
    assert "2 images cannot be read and are left out" in capsys.readouterr().err


def test_the_same_command_writes_what_is_missing_and_nothing_else(encoder, tmp_path, small_shards):
    argv = [str(encoder), *DIGITS, "--output_dir", str(tmp_path / "set")]
    command.main(argv)
    files = sorted((tmp_path / "set" / "data").iterdir())
    tables, inodes = [pq.read_table(path) for path in files], [path.stat().st_ino for path in files]
    gone = [files[1], files[6], files[7]]
    for path in gone:
        path.unlink()
    (tmp_path / "set" / "data" / ".unfinished.x").mkdir()  # of a process that was killed
    command.main(argv)
    again = [path for path in sorted((tmp_path / "set" / "data").iterdir()) if path.suffix == ".parquet"]
    assert again == files
    assert all(pq.read_table(path).equals(table) for path, table in zip(files, tables, strict=True))
    kept = [path.stat().st_ino for path in files if path not in gone]
    assert kept == [inode for path, inode in zip(files, inodes, strict=True) if path not in gone]


def test_another_model_view_or_dataset_is_refused_and_nothing_is_changed(encoder, photos, tmp_path, capsys):
    folder = tmp_path / "set"
    command.main([str(encoder), *DIGITS, "--output_dir", str(folder)])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    other = ["--output_dir", str(folder)]
    for argv, key in (
        ([*DIGITS, "--random_encoder"], "model"),
        ([*DIGITS, "--features", "head"], "features"),
        ([*DIGITS, "--eval_resize", "36"], "view"),
        (["--dataset_name", str(photos), *VIEW], "dataset"),
    ):
        error = refuse([str(encoder), *argv, *other], capsys)
        assert f"holds other embeddings: {key} is " in error, argv
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--duplicates", "1.5"], "duplicates (1.5) must lie in (0, 1]"),
        (["--neighbours", "0", "--search", "x.png"], "neighbours (0) must be at least 1"),
        (["--search", "nowhere.png"], "search (nowhere.png) is no image that can be read"),
        (["--splits", "train", "validation"], "splits ('validation') is not in digits: it has train, test"),
        (["--stage", "layer9"], "stage (layer9) is not one of test_resnet: choose one of act1, layer1"),
        (["--stage", "layer3", "--features", "head"], "stage (layer3) is of the backbone, and features is head"),
        (["--dry_run"], "dry_run (True) is about publishing: name the dataset with --push_to_hub"),
        (["--push_to_hub", "a/b/c"], "repository (a/b/c) is not a valid repository name"),
        (["--max_samples", "0"], "max_samples (0) must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(argv, reason, encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refuse([str(encoder), *DIGITS, "--output_dir", "set", *argv], capsys)
    assert reason in error
    assert not (tmp_path / "set").exists()


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(encoder, tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    error = refuse([str(encoder), *DIGITS, "--output_dir", str(folder)], capsys)
    assert "holds files of something else: pass another --output_dir" in error
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_damaged_shard_a_strange_one_and_a_link_are_refused_by_name(tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    (shard,) = shards = shards_of(tmp_path / "set", {"train": 30})
    assert find_missing(shards) == shards
    columns = {"row": range(30), "path": [None] * 30}
    write_shard(shard.path, columns, np.zeros((30, 4), np.float16), row_features(4, "float16", False, []))
    assert find_missing(shards) == []
    whole = shard.path.read_bytes()
    shard.path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet is damaged .* delete it, and it is made again"):
        find_missing(shards)
    shard.path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"has 30 rows of 20 images: delete it"):
        find_missing(shards_of(tmp_path / "set", {"train": 20}))
    pq.write_table(pq.read_table(shard.path).drop_columns("embedding"), shard.path)
    with pytest.raises(ValueError, match=r"has no column embedding: delete it"):
        find_missing(shards)
    strange = shard.path.with_name("train-00001-of-00002.parquet")
    shard.path.rename(strange)
    with pytest.raises(ValueError, match=r"train-00001-of-00002.parquet is not of this set"):
        find_missing(shards)
    strange.unlink()
    (tmp_path / "elsewhere.parquet").write_bytes(whole)
    shard.path.symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(ValueError, match=r"leads out of"):
        find_missing(shards)


@pytest.mark.slow
def test_a_value_that_float16_cannot_hold_is_refused(encoder, tmp_path, capsys):
    model = MoCoModel.from_pretrained(encoder)
    with torch.no_grad():
        for parameter in model.encoder_q.layer4.parameters():
            parameter.mul_(1e4)
    model.save_pretrained(tmp_path / "large")
    capsys.readouterr()  # transformers' bars
    argv = [str(tmp_path / "large"), *DIGITS, "--splits", "test", "--output_dir", str(tmp_path / "set")]
    assert "too large for float16: pass --dtype float32" in refuse(argv, capsys)
    command.main([*argv, "--dtype", "float32", "--output_dir", str(tmp_path / "other")])


def _embed_on_two(rank: int, folder: str, argv: list[str]) -> None:
    join_trainers(rank, folder, 2)
    shards_module.ROWS_PER_SHARD = 16
    command.main(argv)


@pytest.mark.slow
def test_two_processes_write_the_same_set(encoder, photos, tmp_path, small_shards):
    argv = [
        str(encoder),
        "--dataset_name",
        str(photos),
        *VIEW,
        "--per_device_eval_batch_size",
        "3",
        "--dtype",
        "float32",
    ]
    command.main([*argv, "--output_dir", str(tmp_path / "one")])
    run_ranks(_embed_on_two, (str(tmp_path), [*argv, "--output_dir", str(tmp_path / "two")]), 2)
    one, two = (sorted((tmp_path / name / "data").iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    for path, other in zip(one, two, strict=True):
        table, same = pq.read_table(path), pq.read_table(other)
        assert table.drop_columns("embedding").equals(same.drop_columns("embedding"))
        x, y = (np.stack(t["embedding"].to_pylist()) for t in (table, same))
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4)
    record = json.loads(Path(tmp_path, "two", "embedding.json").read_text())
    assert record["splits"]["train"]["images"] == 9


def test_the_folder_of_a_set_may_begin_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert EmbedArguments(output_dir="~/sets").output_dir == str(tmp_path / "sets")
