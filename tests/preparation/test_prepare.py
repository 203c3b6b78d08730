"""A prepared dataset: its images against PIL called by hand, what is left out, finished and refused, and training on it."""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from tiny_models import save_encoder

from training.commands import prepare as command
from training.data.formats import load_digits
from training.data.sources import DataArguments, SplitDataArguments, load_images, load_splits
from training.preparation.prepare import shuffled

ROOT = Path(__file__).parents[2]
SIDE = 32
FLAGS = ["--short_side", str(SIDE), "--quality", "95", "--dataloader_num_workers", "0"]
# Of every class: how the file is made, and whether it is written anew.
KINDS = {
    "large.jpg": (dict(size=(90, 70)), True),
    "huge.jpg": (dict(size=(803, 601)), True),  # decoded at 1/8, and no side of it is a multiple of 8
    "tall.png": (dict(size=(40, 81)), True),
    "turned.jpg": (dict(size=(90, 70), orientation=6), True),
    "huge_turned.jpg": (dict(size=(803, 601), orientation=3), True),
    "gray.jpg": (dict(size=(90, 70), mode="L"), True),
    "cmyk.jpg": (dict(size=(90, 70), mode="CMYK"), True),
    "progressive.jpg": (dict(size=(301, 250), progressive=True), True),
    "small.jpg": (dict(size=(40, 32)), False),
    "small.png": (dict(size=(20, 30), mode="RGBA"), False),
    "small_turned.jpg": (dict(size=(30, 20), orientation=8), True),
}


def picture(seed: int, size: tuple[int, int], mode: str = "RGB", orientation: int = 1, **options):
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    grain = random.normal(0, 4, (size[1], size[0], 1))
    image = Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image, {"exif": exif} | options


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images of every kind in two classes and two splits, three of which cannot be read."""
    root = tmp_path_factory.mktemp("source") / "photos"
    for split, classes in {"train": ("cat", "dog"), "test": ("cat", "dog")}.items():
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for seed, (file, (kind, _)) in enumerate(KINDS.items()):
                image, options = picture(100 * number + seed + 1000 * (split == "test"), **kind)
                image.save(folder / file, **options)
    content = (root / "train" / "cat" / "huge.jpg").read_bytes()
    (root / "train" / "cat" / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (root / "train" / "dog" / "words.jpg").write_bytes(b"no image")
    content = (root / "test" / "dog" / "small.jpg").read_bytes()
    (root / "test" / "dog" / "small_truncated.jpg").write_bytes(content[:-200])
    return root


@pytest.fixture(scope="module")
def prepared(photos, tmp_path_factory):
    """The same folder prepared without an interruption."""
    folder = tmp_path_factory.mktemp("prepared") / "photos"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        command.main([str(photos), str(folder), *FLAGS, "--shard_size", "10kB"])
    return folder


def refuse(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit):
        command.main(argv)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


def digests(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def rows_of(folder: Path, split: str) -> list[dict]:
    found = datasets.load_dataset(str(folder), split=split).cast_column("image", datasets.Image(decode=False))
    return sorted(found, key=lambda row: row["file_name"])


# What it holds


def test_every_image_that_can_be_read_is_there_once_with_its_class(prepared, photos, capsys):
    assert len(list((prepared / "data").glob("train-*-of-*.parquet"))) > 2
    for split in ("train", "test"):
        rows = rows_of(prepared, split)
        names = [f"{split}/{name}/{file}" for name in ("cat", "dog") for file in KINDS]
        assert [row["file_name"] for row in rows] == sorted(names)
        label = datasets.load_dataset(str(prepared), split=split).features["label"]
        assert label == datasets.ClassLabel(names=["cat", "dog"])
        assert all(label.names[row["label"]] == row["file_name"].split("/")[1] for row in rows)
        assert all(row["image"]["path"] == row["file_name"].rsplit("/", 1)[-1] for row in rows)
        source = load_splits(SplitDataArguments(dataset_name=str(photos))).rows[split]
        for row in rows:
            assert source[row["row"]]["image"]["path"] == f"{photos}/{row['file_name']}"
    listed = (prepared / "unreadable_images.txt").read_text().splitlines()
    assert [line.split(" ", 3)[3] for line in listed] == [
        *("train/cat/truncated.jpg", "train/dog/words.jpg", "test/dog/small_truncated.jpg"),
    ]


def test_an_image_is_what_pil_makes_of_it(prepared, photos):
    for split in ("train", "test"):
        for row in rows_of(prepared, split):
            path = photos / row["file_name"]
            _, written = KINDS[path.name]
            if not written:
                assert row["image"]["bytes"] == path.read_bytes()
                continue
            upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            factor = min(1, SIDE / min(upright.size))
            size = round(upright.width * factor), round(upright.height * factor)
            expected = upright if factor == 1 else upright.resize(size, Image.LANCZOS)
            expected.save(file := io.BytesIO(), "JPEG", quality=95, subsampling=0)
            found = Image.open(io.BytesIO(row["image"]["bytes"]))
            assert (found.format, found.mode, found.size) == ("JPEG", "RGB", size)
            assert not found.getexif()
            if "huge" in path.name or "progressive" in path.name:  # decoded at 1/8, 1/2
                difference = np.abs(np.asarray(found).astype(int) - np.asarray(Image.open(file)))
                assert difference.mean() < 2  # and 4 where the corners are not those of the whole image
            else:
                assert row["image"]["bytes"] == file.getvalue()


def test_the_record_counts_and_knows_every_file(prepared, photos):
    record = json.loads((prepared / "prepared.json").read_text())
    assert record["totals"] == {
        "images": 44,
        "resized": 2 * 2 * sum(written for _, written in KINDS.values()),
        "left_out": 3,
        "bytes_before": sum(
            (photos / row["file_name"]).stat().st_size
            for split in ("train", "test")
            for row in rows_of(prepared, split)
        ),
        "bytes": sum(path.stat().st_size for path in (prepared / "data").iterdir()),
    }
    files = {path.name: path.read_bytes() for path in (prepared / "data").iterdir()}
    assert {name: (about["sha256"], about["bytes"]) for name, about in record["files"].items()} == {
        name: (hashlib.sha256(content).hexdigest(), len(content)) for name, content in files.items()
    }
    assert record["splits"]["train"]["images"] == 24
    assert str(photos.parent) not in (prepared / "prepared.json").read_text()  # it may be published


def test_files_have_about_the_size_that_was_asked_for(tmp_path):
    flags = ["--dataloader_num_workers", "0", "--splits", "train"]
    command.main(["digits", str(tmp_path / "digits"), "--shard_size", "250kB", *flags])
    sizes = [path.stat().st_size for path in sorted((tmp_path / "digits" / "data").iterdir())]
    assert len(sizes) > 3
    assert all(200_000 < size < 320_000 for size in sizes[:-1])


def test_images_of_a_table_keep_their_bytes_and_splits_their_names(tmp_path):
    source = datasets.DatasetDict({"train": load_digits()["test"], "extra": load_digits()["train"].select(range(40))})
    source.save_to_disk(str(tmp_path / "saved"))
    command.main([str(tmp_path / "saved"), str(tmp_path / "out"), "--dataloader_num_workers", "0"])
    found = datasets.load_dataset(str(tmp_path / "out"))
    ours = load_splits(SplitDataArguments(dataset_name=str(tmp_path / "out")))
    assert list(ours.rows) == ["train", "extra"]  # the names of files say them
    for split, rows in source.items():
        assert found[split].features["label"] == rows.features["label"]
        assert found[split].num_rows == ours.rows[split].num_rows == rows.num_rows
        mine = {row["row"]: row for row in found[split].cast_column("image", datasets.Image(decode=False))}
        assert [mine[i]["label"] for i in range(len(rows))] == rows["label"][:]
        undecoded = rows.cast_column("image", datasets.Image(decode=False))
        assert [mine[i]["image"]["bytes"] for i in range(len(rows))] == [row["image"]["bytes"] for row in undecoded]
        assert {row["file_name"] for row in mine.values()} == {None}


def test_an_order_has_every_row_once_and_mixes_them():
    order = shuffled(1000)
    assert sorted(order) == list(range(1000))
    assert abs(np.mean(order[:500]) - 499.5) < 50
    assert shuffled(1000) == order


# The same bytes


@pytest.mark.parametrize("workers", ["1", "2"])
def test_processes_make_the_same_files(workers, prepared, photos, tmp_path):
    flags = [*FLAGS[:-1], workers, "--shard_size", "10kB"]
    command.main([str(photos), str(tmp_path / "photos"), *flags])
    assert digests(tmp_path / "photos") == digests(prepared)


def test_a_stopped_preparation_is_finished_by_the_same_command(prepared, photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(prepared, folder)
    # As a process leaves it that was killed: a first record, some files, and part of one under another name.
    record = json.loads((folder / "prepared.json").read_text())
    del record["files"], record["totals"]
    (folder / "prepared.json").write_text(json.dumps(record))
    (folder / "README.md").unlink()
    (folder / "unreadable_images.txt").unlink()
    kept, *lost = sorted((folder / "data").iterdir())
    for path in lost:
        path.unlink()
    (folder / "data" / ".unfinished.abc").mkdir()
    (folder / "data" / ".unfinished.abc" / lost[0].name).write_bytes(b"half")
    stamp = kept.stat().st_mtime_ns
    command.main([str(photos), str(folder), *FLAGS, "--shard_size", "10kB"])
    assert digests(folder) == digests(prepared)
    assert kept.stat().st_mtime_ns == stamp  # it was not written again
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.name != ".lock"}
    command.main([str(photos), str(folder), *FLAGS, "--shard_size", "10kB"])  # there is nothing left to do
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_leaves_whole_files(sign, photos, tmp_path):
    source = tmp_path / "source"
    for number in range(25):
        shutil.copytree(photos / "train" / "cat", source / "train" / f"{number}")
        (source / "train" / f"{number}" / "truncated.jpg").unlink()
    flags = ["--short_side", "96", "--dataloader_num_workers", "2", "--shard_size", "40kB"]
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    start = [sys.executable, str(ROOT / "scripts" / "prepare.py")]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    kwargs = {"env": env, "stderr": subprocess.PIPE, "text": True}
    # What a shell starts in the background ignores Ctrl-C, these tests among them.
    kwargs["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*start, str(source), str(stopped), *flags], **kwargs) as process:
        while process.poll() is None and not list(stopped.glob("data/*.parquet")):
            time.sleep(0.01)
        process.send_signal(sign)
        _, said = process.communicate()
    assert process.returncode == (130 if sign == signal.SIGINT else -signal.SIGKILL), said
    found = list(stopped.glob("data/*.parquet"))
    assert found
    assert sum(pq.read_metadata(path).num_rows for path in found) < 25 * len(KINDS)
    if sign == signal.SIGINT:
        assert said.splitlines()[-1] == "Interrupted. What was complete is kept; give the same command again."
        assert not list(stopped.glob("data/.unfinished*/*"))
    for folder in (stopped, whole):
        subprocess.run([*start, str(source), str(folder), *flags], env=env, check=True, capture_output=True)
    names = {"README.md"}  # whose title is the name of its folder
    assert {k: v for k, v in digests(stopped).items() if k not in names} == {
        k: v for k, v in digests(whole).items() if k not in names
    }


def test_a_full_disk_leaves_no_half_file(photos, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    argv = [str(photos), str(tmp_path / "full"), *FLAGS, "--shard_size", "1MB"]
    load_splits(SplitDataArguments(dataset_name=str(photos)))  # its index is in the cache
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SystemExit):
            command.main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert "train-00000-of-00001.parquet" in error
    assert list((tmp_path / "full" / "data").iterdir()) == []
    command.main(argv)
    assert pq.read_metadata(tmp_path / "full" / "data" / "train-00000-of-00001.parquet").num_rows == 22


# What is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--short_side", "0"], "short_side (0) must be at least 1 pixel"),
        (["--quality", "101"], "quality (101) must lie in 1 to 100"),
        (["--shard_size", "large"], "shard_size (large) is no size: write it like 500MB"),
        (["--shard_size", "0MB"], "shard_size (0MB) is no size"),
        (["--dataloader_num_workers", "-1"], "dataloader_num_workers (-1) must be at least 0"),
        (["--splits", "val"], "splits ('val') is not in"),
        (["--image_size", "224"], "flag --image_size is unknown"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(flags, message, photos, tmp_path, capsys):
    assert message in refuse([str(photos), str(tmp_path / "out"), *flags], capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_not_written_over(prepared, photos, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "holds files of something else" in refuse([str(photos), str(tmp_path / "mine")], capsys)
    assert "holds files of something else" in refuse([str(photos), str(photos)[:-7]], capsys)
    assert "lies in" in refuse([str(photos), str(photos / "prepared")], capsys)
    folder = tmp_path / "photos"
    shutil.copytree(prepared, folder)
    for flags, key in ((["--quality", "80"], "quality"), (["--short_side", "33"], "short_side")):
        argv = [str(photos), str(folder), *FLAGS, "--shard_size", "10kB", *flags]
        assert f"was prepared otherwise: {key} is" in refuse(argv, capsys)
    assert "was prepared otherwise: dataset is photos there and digits here" in refuse(["digits", str(folder)], capsys)
    assert "two names are needed" in refuse([str(photos)], capsys)
    assert digests(folder) == digests(prepared)


def test_a_changed_file_is_refused(prepared, photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(prepared, folder)
    argv = [str(photos), str(folder), *FLAGS, "--shard_size", "10kB"]
    first, *_ = sorted((folder / "data").iterdir())
    content = first.read_bytes()
    first.write_bytes(content[:-100])
    assert "is damaged" in refuse(argv, capsys)
    first.write_bytes(bytes([*content[:200], content[200] ^ 1, *content[201:]]))
    assert "is not what was written there: delete it" in refuse(argv, capsys)
    first.unlink()
    command.main(argv)
    assert digests(folder) == digests(prepared)
    capsys.readouterr()
    record = json.loads((folder / "prepared.json").read_text())
    for damage in ({"images_per_shard": 0}, {"images_per_shard": "9"}, {"files": []}, {"files": {first.name: "a"}}):
        (folder / "prepared.json").write_text(json.dumps(record | damage))
        assert "prepared.json is damaged: bring it back" in refuse(argv, capsys)
    (folder / "prepared.json").write_text("{")
    assert "prepared.json is not JSON" in refuse(argv, capsys)


@pytest.mark.parametrize("stopped", ["before the first file", "between files", "before the record"])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_unfinished_folder_is_no_dataset(stopped, streaming, prepared, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(prepared, folder)
    record = json.loads((folder / "prepared.json").read_text())
    del record["files"], record["totals"]
    (folder / "prepared.json").write_text(json.dumps(record))
    files = sorted((folder / "data").iterdir())
    for path in {"before the first file": files, "between files": files[-3:], "before the record": []}[stopped]:
        path.unlink()
    told = (
        f"^{folder} is a prepared dataset that is not finished: give the command again that began it .* SOURCE {folder}"
    )
    with pytest.raises(ValueError, match=told):
        load_images(DataArguments(dataset_name=str(folder), image_size=SIDE, streaming=streaming))
    with pytest.raises(ValueError, match=told):
        load_splits(SplitDataArguments(dataset_name=str(folder)))
    assert "is not finished" in refuse([str(folder), str(tmp_path / "again"), *FLAGS], capsys)


def test_the_files_of_a_prepared_dataset_are_not_read_without_its_record(prepared, tmp_path):
    """Which says whether the last ones were written."""
    folder = tmp_path / "photos"
    shutil.copytree(prepared, folder)
    with pytest.raises(ValueError, match=rf"^{folder}/data has the files of a prepared dataset.*: pass {folder}$"):
        load_images(DataArguments(dataset_name=str(folder / "data"), image_size=SIDE))
    (folder / "prepared.json").unlink()
    assert len(load_images(DataArguments(dataset_name=str(folder / "data"), image_size=SIDE)).train)


def test_a_finished_folder_that_has_lost_a_split_is_no_dataset(prepared, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(prepared, folder)
    for path in (folder / "data").glob("test-*"):
        path.unlink()
    with pytest.raises(ValueError, match="is not finished"):
        load_images(DataArguments(dataset_name=str(folder), image_size=SIDE))


def test_labels_that_were_corrected_meanwhile_are_not_mixed_with_the_first(tmp_path, capsys):
    source, folder = tmp_path / "source", tmp_path / "out"
    (source / "train").mkdir(parents=True)
    for number in range(12):
        picture(number, (40, 32))[0].save(source / "train" / f"{number}.png")
    argv = [str(source), str(folder), *FLAGS, "--shard_size", "5kB"]
    for labels in ("ab", "ba"):
        lines = [f"{number}.png,{labels[number % 2]}" for number in range(12)]
        (source / "train" / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
        if labels == "ab":
            command.main(argv)
            sorted((folder / "data").iterdir())[-1].unlink()
    assert "was prepared otherwise: splits is" in refuse(argv, capsys)


def test_a_snapshot_of_the_hub_is_a_dataset(prepared, tmp_path):
    repository = tmp_path / "datasets--org--photos"
    shutil.copytree(prepared, repository / "blobs")
    for path in [path for path in prepared.rglob("*.*") if path.is_file() and path.name != ".lock"]:
        link = repository / "snapshots" / "0123" / path.relative_to(prepared)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(repository / "blobs" / path.relative_to(prepared))
    args = DataArguments(dataset_name=str(repository / "snapshots" / "0123"), image_size=SIDE)
    assert len(load_images(args).train) == 22


def test_a_launcher_is_refused(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were launched: start one" in refuse([str(photos), str(tmp_path / "out")], capsys)


# What it is for


@pytest.mark.parametrize("streaming", [False, True])
def test_training_reads_every_image_of_it(streaming, prepared):
    args = DataArguments(dataset_name=str(prepared), image_size=SIDE, streaming=streaming)
    splits = load_images(args, labelled=not streaming)
    assert splits.class_names == ["cat", "dog"]
    labels = [row["label"] for row in splits.train]
    assert (len(labels), sum(labels)) == (22, 11)
    sizes = [min(splits.decoder.image(row["image"]).size) for row in splits.train]
    assert sizes.count(SIDE) == 18
    assert sizes.count(20) == 4


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [[], ["--streaming", "--shuffle_buffer", "10"]])
def test_a_run_trains_on_it_and_is_evaluated(streaming, script, tmp_path):
    command.main(["digits", str(tmp_path / "digits"), "--shard_size", "100kB", "--dataloader_num_workers", "0"])
    data = ["--dataset_name", str(tmp_path / "digits"), "--image_size", "32", "--eval_resize", "32"]
    flags = ["--recipe", "quickstart", *data, "--max_steps", "3", "--global_batch_size", "16", "--use_cpu"]
    flags += [*streaming, "--queue_size", "64", "--report_to", "none", "--output_dir", str(tmp_path / "run")]
    script("pretrain").main(flags)
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 3
    script("knn").main([str(tmp_path / "run"), "--knn_k", "5", "--use_cpu"])
    assert json.loads((tmp_path / "run" / "results.json").read_text())[-1]["value"] > 30


def test_knn_evaluates_on_it(tmp_path, script, capsys):
    encoder = save_encoder(tmp_path / "encoder")
    command.main(["digits", str(tmp_path / "digits"), "--max_samples", "200", "--dataloader_num_workers", "0"])
    flags = ["--image_size", "32", "--eval_resize", "32", "--knn_k", "5", "--use_cpu"]
    found = []
    for name in ("digits", str(tmp_path / "digits")):
        limits = ["--max_train_samples", "200", "--max_eval_samples", "200"]
        script("knn").main([str(encoder), "--dataset_name", name, *limits, *flags])
        found.append(json.loads((encoder / "results.json").read_text())[-1]["value"])
    assert found[0] == found[1]  # the images are the same files
