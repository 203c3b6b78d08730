"""Datasets as people write them, with pandas, as tars, saved to disk: opened, or refused with the true reason."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered_images import CLASSES, encoded, number, table, write_folders, write_parquet, write_tars
from PIL import Image

from training.data import folders
from training.data.decode import decode_image
from training.data.sources import DataArguments, load_images
from training.engine.run_folder import check_same_run, write_recipe


def load(folder: Path, **flags):
    return load_images(DataArguments(dataset_name=str(folder), **flags))


def refusal(folder: Path, **flags) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the message is returned)
        load(folder, **flags)
    return str(error.value)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    "kind", ["bytes", "large bytes", "view", "fixed", "struct", "struct without a path", "fixed struct"]
)
def test_parquet_of_pandas_and_polars_is_read(kind, streaming, tmp_path):
    folder = tmp_path / "run[1]"  # a pattern that means its neighbour, where names are patterns
    for place, first in ((folder, 0), (tmp_path / "run1", 20)):
        place.mkdir()
        for split, numbers in (("train", range(first, first + 6)), ("test", range(first + 6, first + 9))):
            images: list | pa.Array = [encoded(i) for i in numbers]
            if kind == "large bytes":  # as polars writes them
                images = pa.array(images, pa.large_binary())
            elif kind == "view":
                images = pa.array(images, pa.binary_view())
            elif kind == "fixed":
                images = pa.array([image.ljust(200) for image in images], pa.binary(200))
            elif kind == "struct":
                images = [{"bytes": image, "path": f"{i}.png"} for i, image in zip(numbers, images, strict=True)]
            elif kind == "struct without a path":
                images = [{"bytes": image} for image in images]
            elif kind == "fixed struct":
                of_files = pa.struct([("bytes", pa.binary(200)), ("path", pa.string())])
                images = pa.array([{"bytes": image.ljust(200), "path": None} for image in images], of_files)
            pq.write_table(pa.table({"image": images, "label": [i % 3 for i in numbers]}), place / f"{split}.parquet")
    splits = load(folder, streaming=streaming)
    assert [(number(decode_image(row["image"])), row["label"]) for row in splits.train] == [
        (i, i % 3) for i in range(6)
    ]
    assert [number(decode_image(row["image"])) for row in splits.eval] == [6, 7, 8]


def test_paths_in_a_column_are_not_followed(tmp_path):
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "label": [0, 1]}), tmp_path / "train.parquet")
    assert "0 image columns (none) among image, label: store the bytes of the images' files in one; paths, " in refusal(
        tmp_path
    )


def test_a_digest_beside_the_bytes_is_no_second_image_column(tmp_path):
    digests = pa.array([bytes([i]) * 20 for i in range(3)], pa.binary(20))
    columns = {"image": [encoded(i) for i in range(3)], "sha1": digests, "label": [0, 1, 2]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    assert load(tmp_path).train.column_names == ["image", "label"]


def write_columns(folder: Path, **columns: datasets.ClassLabel | datasets.Value) -> Path:
    features = datasets.Features({"image": datasets.Image(decode=False)} | columns)
    values = {name: [(i + place) % 2 for i in range(6)] for place, name in enumerate(columns)}
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(i), "path": None} for i in range(6)]} | values, features=features
    )
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        rows.cast_column("image", datasets.Image()).to_parquet(folder / f"{split}.parquet")
    return folder


SIDES, PETS = datasets.ClassLabel(names=["front", "back"]), datasets.ClassLabel(names=["cat", "dog"])


def test_a_column_called_label_wins_and_others_are_asked_for(tmp_path):
    for kind in (PETS, datasets.Value("int64"), datasets.Value("uint8"), datasets.Value("uint64")):
        splits = load(write_columns(tmp_path / "a", camera=SIDES, label=kind))
        assert splits.about["label_column"] == "label"
        assert splits.train["label"] == [1, 0, 1, 0, 1, 0]
        assert splits.class_names == (["cat", "dog"] if kind is PETS else ["0", "1"])
    both = write_columns(tmp_path / "b", coarse_label=SIDES, fine_label=PETS)
    assert "has 2 class columns (coarse_label, fine_label): name one with --label_column" in refusal(both)
    assert load(both, label_column="fine_label").class_names == ["cat", "dog"]
    # A label that holds no classes is not replaced by another column that does.
    strings = write_columns(tmp_path / "c", camera=SIDES, label=datasets.Value("float64"))
    assert "'label' holds Value('float64')" in str(load(strings).label_problem)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_tars_whose_keys_have_dots_say_so(tmp_path):
    write_tar(tmp_path / "train-0.tar", {f"img.{i:04}.jpg": encoded(i, "JPEG") for i in range(6)})
    assert "what follows the first dot of a name as its column: write names such as 000123.jpg" in refusal(tmp_path)


def test_the_true_reason_is_given(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 is not all that it takes")
    assert "Parquet magic bytes not found in footer" in refusal(tmp_path)


def test_a_dataset_saved_to_disk_is_read(tmp_path):
    whole = datasets.DatasetDict({"train": table(range(6)), "test": table(range(6, 9))})
    whole.save_to_disk(tmp_path / "both")
    splits = load(tmp_path / "both")
    assert [number(decode_image(row["image"])) for row in splits.train] == list(range(6))
    assert len(splits.eval) == 3
    table(range(6)).save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "one", streaming=True).train) == 6


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", ["torch", "arrow", "pandas", "hidden columns", "few rows"])
def test_a_dataset_is_read_whatever_format_was_saved_with_it(kind, streaming, tmp_path):
    rows = table(range(1 if kind == "few rows" else 6))
    if kind == "hidden columns":
        rows = rows.with_format(None, columns=["label"])
    elif kind != "few rows":
        rows = rows.with_format(kind)
    rows.save_to_disk(tmp_path / "saved")
    found = list(load(tmp_path / "saved", streaming=streaming).train)
    assert [number(decode_image(row["image"])) for row in found] == list(range(len(rows)))
    assert [(type(row["label"]), row["label"]) for row in found] == [(int, i % 3) for i in range(len(rows))]


def test_the_folder_around_a_dataset_saved_to_disk_says_which_to_pass(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [encoded(0)]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    assert (
        refusal(tmp_path)
        == f"dataset_name ({tmp_path}) has a dataset of `save_to_disk` inside it: pass {tmp_path}/saved"
    )


def test_parquet_files_are_divided_by_their_own_names(tmp_path):
    source = write_parquet(tmp_path / "my test data", [range(3), range(3, 6)])
    write_parquet(source, [range(6, 9)], split="validation")
    splits = load(source)
    assert (len(splits.train), len(splits.eval), splits.about["split"]) == (6, 3, "validation")
    (source / "train-00000-of-00002.parquet").rename(source / "00000.parquet")
    assert "00000.parquet names no split, but other files are of train, validation" in refusal(source)
    for path in source.iterdir():
        path.rename(source / f"part{path.name[-20:]}")
    assert len(load(source).train) == 9


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("name", ["imagenet1k-{}-0000", "cifar10_{}", "data/cc3m-{}-00"])
def test_data_files_named_after_their_dataset_and_then_their_split_are_divided(name, kind, tmp_path):
    for split, numbers in (("train", range(6)), ("validation", range(6, 9))):
        path = tmp_path / f"{name.format(split)}.{kind}"
        path.parent.mkdir(exist_ok=True)
        if kind == "parquet":
            table(numbers).to_parquet(path)
        else:
            write_tar(path, {f"{i:05}.png": encoded(i) for i in numbers})
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.eval), splits.about["split"]) == (6, 3, "validation")


@pytest.mark.parametrize("end", ["", "-0123456789abcdef"], ids=["plain", "digest"])
def test_a_folder_that_lacks_some_of_its_numbered_files_is_refused(end, tmp_path):
    source = write_parquet(tmp_path / "source", [range(3), range(3, 6), range(6, 9)])
    write_parquet(source, [range(9, 12)], split="test")
    for path in source.iterdir():
        path.rename(path.with_stem(path.stem + end))
    assert len(load(source).train) == 9
    (source / f"train-00001-of-00003{end}.parquet").rename(tmp_path / "lost")
    for flags in ({}, {"streaming": True}):
        told = refusal(source, **flags)
        assert "has no train-00001-of-00003, and 2 of these 3 files: copy the others, or rename" in told
        assert "\n" not in told
    assert len(load(source / f"train-00000-of-00003{end}.parquet").train) == 3  # which was asked for by its name
    (tmp_path / "lost").rename(source / f"train-00007-of-00003{end}.parquet")
    assert "has no train-00001-of-00003" in refusal(source)
    # A number that nobody could count to is no work.
    (source / f"train-00000-of-00003{end}.parquet").rename(source / f"train-00000-of-99999999999999{end}.parquet")
    assert "has no train-0000" in refusal(source)


def test_a_folder_of_parquet_keeps_its_pictures_beside_it(tmp_path):
    source = write_parquet(tmp_path / "source", [range(200)])
    (source / "banner.png").write_bytes(encoded(1))
    assert len(load(source).train) == 200


# Whose data it is


def test_a_folder_is_known_by_its_absolute_place(tmp_path, monkeypatch):
    write_folders(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("data", "./data", "data/", "../" + tmp_path.name + "/data", "~/data"):
        splits = load_images(DataArguments(dataset_name=name))
        assert splits.about["dataset"] == str(tmp_path / "data")
        assert splits.about["local"] is True
    write_folders(tmp_path / "digits")
    assert load_images(DataArguments(dataset_name="./digits")).class_names == CLASSES
    assert load_images(DataArguments(dataset_name="digits")).class_names == list("0123456789")


def test_no_name_is_not_the_folder_here(tmp_path, monkeypatch):
    """As of a variable of the shell that is not set."""
    write_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"dataset_name \(''\) is empty: pass a folder"):
        DataArguments(dataset_name="")
    assert load(Path()).about["dataset"] == str(tmp_path)


def remove(source: Path) -> None:
    (source / "train" / "cat" / "0.png").unlink()


def add(source: Path) -> None:
    (source / "train" / "cat" / "new.png").write_bytes(encoded(40))


def replace(source: Path) -> None:
    path = source / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes() + b"\0")


def exchange(source: Path) -> None:
    """For another image of the same size in bytes, as all are that are not compressed."""
    path = source / "train" / "cat" / "0.png"
    size = path.stat().st_size
    path.write_bytes(encoded(40).ljust(size, b"\0")[:size])


def rename(source: Path) -> None:
    (source / "train" / "cat").rename(source / "train" / "kitten")


def assert_train_split_is_other_content(source: Path, before: dict[str, str], was: str = "12 images") -> None:
    after = load(source).place["content"]
    assert after["train"] != before["train"]
    assert after["test"] == before["test"]
    args = DataArguments(dataset_name=str(source))
    args.content = before
    with pytest.raises(ValueError, match=f"is not what the run was begun with: split 'train' was {was}"):
        load_images(args)


@pytest.mark.parametrize("change", [remove, add, replace, exchange, rename])
def test_changed_files_are_another_content(change, tmp_path):
    source = write_folders(tmp_path / "source")
    before = load(source).place["content"]
    assert load(source).place["content"] == before
    shutil.move(source, tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", source, copy_function=shutil.copyfile)  # other times, the same images
    assert load(source).place["content"] == before
    assert before["train"].startswith("12 images ")
    change(source)
    assert_train_split_is_other_content(source, before)


def test_many_large_images_are_compared_by_parts_of_some(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LOOKED_INTO", 4)
    random = np.random.default_rng(0)
    for i in range(20):
        pixels = random.integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.bmp")  # of one size in bytes, which is more than 64 kB
    before = load(tmp_path).place["content"]
    assert load(tmp_path).place["content"] == before
    for i in range(20):
        (tmp_path / f"{i:02}.bmp").replace(tmp_path / f"{(i + 1) % 20:02}.bmp.new")
    for path in tmp_path.glob("*.new"):
        path.replace(path.with_suffix(""))
    assert load(tmp_path).place["content"] != before


def test_a_run_goes_on_with_images_that_were_moved_by_a_link_at_their_place(tmp_path):
    old, new, run = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    old.mkdir()
    run.mkdir()
    write_recipe(run, {"data": {"dataset_name": str(old)}})
    old.rename(new)
    settings = {"data": {"dataset_name": str(new)}}
    with pytest.raises(ValueError, match=f"if its images were moved, leave a link to them at {old}$"):
        check_same_run(run, settings, {})
    old.symlink_to(new)
    check_same_run(run, settings, {})
    old.unlink()
    old.mkdir()
    with pytest.raises(ValueError, match=r"or the same settings to continue it$"):
        check_same_run(run, settings, {})


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_data_files_of_the_same_sizes_with_other_images_are_another_content(form, tmp_path):
    source = tmp_path / "source"
    source.mkdir()

    def write(first: int) -> int:
        images = [encoded(i, "BMP") for i in range(first, first + 6)]
        path = source / f"train.{form}"
        if form == "parquet":
            pq.write_table(pa.table({"image": images}), path, compression="none", write_statistics=False)
        else:
            with tarfile.open(path, "w") as tar:
                for i, image in enumerate(images):
                    member = tarfile.TarInfo(f"{i}.bmp")
                    member.size = len(image)
                    tar.addfile(member, io.BytesIO(image))
        return path.stat().st_size

    size = write(0)
    before = load(source).place["content"]
    assert load(source).place["content"] == before
    assert write(6) == size
    assert load(source).place["content"] != before


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_changed_labels_of_metadata_are_another_content(kind, tmp_path):
    source = write_folders(tmp_path / "source")
    bare = load(source).place["content"]

    def label(split: str, names: list[str]) -> None:
        files = sorted(path.relative_to(source / split).as_posix() for path in (source / split).rglob("*.png"))
        labels = [names[i % len(names)] for i in range(len(files))]
        rows = datasets.Dataset.from_dict({"file_name": files, "label": labels})
        write = {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[kind]
        write(source / split / f"metadata.{kind}")

    label("train", ["a", "b"])
    label("test", ["a", "b"])
    before = load(source).place["content"]
    assert load(source).place["content"] == before
    assert before["train"].startswith(f"{bare['train']} with metadata ")  # the images are the same
    label("train", ["b", "a"])
    assert_train_split_is_other_content(source, before)


@pytest.mark.parametrize("changed", ["labels", "class names", "paths"])
def test_a_parquet_file_of_the_same_size_with_other_labels_is_another_content(changed, tmp_path):
    """Also where its footer is the same, which has the least and the largest label of a group of rows."""
    source = tmp_path / "source"

    def write(split: str, labels: list[int], names: list[str], paths: str) -> None:
        images = [{"bytes": encoded(i), "path": f"{paths}{i}.png"} for i in range(6)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        source.mkdir(exist_ok=True)
        pq.write_table(rows.data.table, source / f"{split}.parquet", compression="none", row_group_size=3)

    for split in ("train", "test"):
        write(split, [0, 1, 2, 0, 1, 2], ["a", "b", "c"], "x")
    before, size = load(source).place["content"], (source / "train.parquet").stat().st_size
    assert load(source).place["content"] == before
    os.utime(source / "train.parquet")
    assert load(source).place["content"] == before  # it says the same
    labels = [0, 1, 2, 1, 0, 2] if changed == "labels" else [0, 1, 2, 0, 1, 2]
    names = ["b", "a", "c"] if changed == "class names" else ["a", "b", "c"]
    write("train", labels, names, "y" if changed == "paths" else "x")
    assert (source / "train.parquet").stat().st_size == size
    for streaming in (False, True):
        assert load(source, streaming=streaming).place["content"]["train"] != before["train"]
    assert_train_split_is_other_content(source, before, "1 files")


def test_a_tar_of_the_same_size_with_other_labels_is_another_content(tmp_path):
    source = write_tars(tmp_path / "source")
    before = load(source).place["content"]
    assert load(source).place["content"] == before
    path = source / "train-0.tar"
    size = path.stat().st_size
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO({b"0": b"1", b"1": b"0"}.get(content, content)))
    assert path.stat().st_size == size
    assert_train_split_is_other_content(source, before, "2 files")


def test_metadata_beside_the_splits_belongs_to_all_of_them(tmp_path):
    source = write_folders(tmp_path / "source")
    files = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.png"))
    contents = []
    for labels in ("ab", "ba"):
        lines = [f"{name},{labels[i % 2]}" for i, name in enumerate(files)]
        (source / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
        contents.append(load(source).place["content"])
    assert all(contents[0][split] != contents[1][split] for split in ("train", "test"))


def test_a_parquet_file_that_is_replaced_at_the_same_time_is_read_anew(tmp_path):
    source = write_parquet(tmp_path / "source", [range(3)])
    (path,) = source.iterdir()
    time = path.stat().st_mtime_ns
    assert len(load(source).train) == 3
    write_parquet(source, [range(5)])
    os.utime(path, ns=(time, time))
    assert len(load(source).train) == 5


def test_features_are_kept_for_the_very_files_even_if_their_times_say_nothing(tmp_path):
    source = write_folders(tmp_path / "source")
    before = load(source).train
    assert load(source).train._fingerprint == before._fingerprint  # of which kept features are
    path = source / "train" / "cat" / "0.png"
    time, content = path.stat().st_mtime_ns, bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(time, time))
    assert load(source).train._fingerprint != before._fingerprint
