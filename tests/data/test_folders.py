"""Folders as people keep them are read as they are meant, or refused in one line that says what to do."""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.decode import FORMATS
from training.data.folders import arrange, list_files
from training.data.sources import DataArguments, SplitDataArguments, load_images, load_splits


def put(folder: Path, count: int = 3, name: str = "{}.png", start: int = 0) -> None:
    """Write different small pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        path = folder / name.format(i)
        noise = np.random.default_rng(abs(hash(str(path))) % 2**32).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format=None if path.suffix.lower() == ".png" else "PNG")


def found(folder: Path, **flags) -> dict[str, Counter]:
    """The number of images of each class, by split."""
    splits = load_images(DataArguments(dataset_name=str(folder), **flags))
    names = {None: None} | dict(enumerate(splits.class_names))
    counts = {splits.about["train_split"]: Counter(names[row.get("label")] for row in splits.train)}
    if splits.eval is not None:
        counts[splits.about["split"]] = Counter(names[row.get("label")] for row in splits.eval)
    return counts


def refusal(folder: Path, **flags) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the message is returned)
        load_images(DataArguments(dataset_name=str(folder), **flags))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    "names",
    [
        *[("flask", "test-tube"), ("flask", "test"), ("bus", "train"), ("bus", "train_station"), ("bus", "val-pass")],
        *[
            ("eval", "x"),
            ("v1.0", "a.b.png"),
            ("control", "validation"),
            ("dev board", "flask"),
            ("été", "猫"),
            ("c[1]", "100%"),
            ("a*", "b?"),
        ],
    ],
)
def test_a_class_may_have_any_name(names, streaming, tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for name in names:
            put(tmp_path / split / name, count)
    splits = load_images(DataArguments(dataset_name=str(tmp_path), streaming=streaming))
    assert splits.class_names == sorted(names)
    for rows, split, count in ((splits.train, "train", 4), (splits.eval, "test", 2)):
        places = Counter((*Path(row["image"]["path"]).parts[-3:-1], splits.class_names[row["label"]]) for row in rows)
        assert places == {(split, name, name): count for name in names}


@pytest.mark.parametrize("name", ["run[1]", "data*", "a?", "x{1,2}", "50%", "with space", "train_set", "a#b"])
def test_the_name_of_the_folder_means_itself(name, tmp_path):
    for folder, count in ((name, 3), ("run1", 5), ("data_of_somebody", 5), ("ab", 5), ("x1", 5)):
        for split in ("train", "test"):
            for label in ("a", "b"):
                put(tmp_path / folder / split / label, count)
    assert found(tmp_path / name) == {"train": {"a": 3, "b": 3}, "test": {"a": 3, "b": 3}}


def test_without_folders_of_splits_the_first_folders_are_the_classes(tmp_path):
    for name in ("bus", "car", "train"):
        put(tmp_path / "vehicles" / name)
    assert found(tmp_path / "vehicles") == {"train": {"bus": 3, "car": 3, "train": 3}}
    for name in ("control", "test"):
        put(tmp_path / "study" / name, name="train_{}.png")
        put(tmp_path / "study" / name, name="IMG_{}.png")
    assert found(tmp_path / "study") == {"train": {"control": 6, "test": 6}}


def test_deeper_folders_belong_to_their_class(tmp_path, capsys):
    for split in ("train", "test"):
        for name in ("birds", "machines"):
            put(tmp_path / split / name / "crane")
            put(tmp_path / split / name / "monday" / "camera 2")
    assert found(tmp_path) == {key: {"birds": 6, "machines": 6} for key in ("train", "test")}
    assert capsys.readouterr().out == (
        f"{tmp_path}: 24 images of 24 files; splits train (12), test (12); deeper folders belong to their class; 2 classes: "
        "birds, machines\n"
    )


def test_capitals_of_splits_are_understood_and_other_splits_left_alone(tmp_path):
    for split in ("Train", "TEST", "Unlabeled", "extra"):
        for name in ("a", "b"):
            put(tmp_path / split / name)
    assert found(tmp_path) == {key: {"a": 3, "b": 3} for key in ("train", "test")}
    assert list(found(tmp_path, train_split="extra")) == ["extra", "test"]
    put(tmp_path / "train" / "a")
    assert "has folders Train and train for one split: merge them" in refusal(tmp_path)


def test_pictures_without_classes_have_no_labels(tmp_path):
    put(tmp_path / "flat")
    assert found(tmp_path / "flat") == {"train": {None: 3}}
    for split in ("train", "test"):
        put(tmp_path / "both" / split)
    assert found(tmp_path / "both") == {"train": {None: 3}, "test": {None: 3}}


def test_labels_are_asked_for_where_a_folder_has_them(tmp_path):
    for split in ("train", "test"):
        put(tmp_path / split)
    (tmp_path / "train.csv").write_text("id,label\n0,a\n1,b\n2,b\n")  # a list as of a competition
    problem = load_images(DataArguments(dataset_name=str(tmp_path))).label_problem
    assert "has no label column: write FOLDER/train/CLASS and FOLDER/test/CLASS, list them in a metadata.csv" in problem


def test_loose_pictures_do_not_cost_the_others_their_class(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            put(tmp_path / split / name)
    put(tmp_path / "train", 2, "loose{}.png")
    assert found(tmp_path)["train"] == {"a": 3, "b": 3, None: 2}
    problem = load_images(DataArguments(dataset_name=str(tmp_path))).label_problem
    assert problem.startswith("2 of 8 images of split 'train' have no label")


def test_links_are_followed_and_loops_refused(tmp_path):
    for split in ("train", "test"):
        for name in ("n01", "n02", "n03"):
            put(tmp_path / "imagenet" / split / name)
        (tmp_path / "subset" / split).mkdir(parents=True)
        for name in ("n01", "n03"):
            (tmp_path / "subset" / split / name).symlink_to(tmp_path / "imagenet" / split / name)
    assert found(tmp_path / "subset") == {key: {"n01": 3, "n03": 3} for key in ("train", "test")}
    for split in ("train", "test"):  # a whole split elsewhere
        (tmp_path / "linked").mkdir(exist_ok=True)
        (tmp_path / "linked" / split).symlink_to(tmp_path / "imagenet" / split)
    assert found(tmp_path / "linked") == {key: {"n01": 3, "n02": 3, "n03": 3} for key in ("train", "test")}
    (tmp_path / "imagenet" / "train" / "n01" / "up").symlink_to(tmp_path / "imagenet")
    assert "train/n01/up leads back to a folder that contains it" in refusal(tmp_path / "imagenet")


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_an_image_in_two_splits_or_twice_in_one_is_refused_by_name(link, tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            put(tmp_path / split / name)
    link(tmp_path / "train" / "a" / "0.png", tmp_path / "test" / "a" / "9.png")
    assert "test/a/9.png and train/a/0.png in " in refusal(tmp_path) or "train/a/0.png and test/a/9.png" in refusal(
        tmp_path
    )
    (tmp_path / "test" / "a" / "9.png").rename(tmp_path / "train" / "b" / "9.png")
    assert "train/a/0.png and train/b/9.png" in refusal(tmp_path)


def test_every_file_is_accounted_for(tmp_path, capsys):
    for split in ("train", "test"):
        for name in ("a", "b"):
            put(tmp_path / split / name)
    folder = tmp_path / "train" / "a"
    put(folder, 1, "Capital{}.Jpeg")
    put(folder, 1, "no_extension_{}")
    put(folder, 1, "odd{}.camera")
    put(tmp_path / "train" / ".thumbnails", 2)
    put(tmp_path / "__MACOSX" / "train", 1, "._{}.png")
    put(tmp_path, 1, "overview{}.png")
    (folder / "0.json").write_text("{}")
    (folder / "notes").write_text("not a picture at all")
    (folder / "raw.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "old.zip").write_bytes(b"PK\3\4")
    (folder / "zero.png").touch()
    (folder / "dead.png").symlink_to(tmp_path / "nowhere")
    (folder / ".DS_Store").write_bytes(b"\0")
    assert found(tmp_path)["train"] == {"a": 6, "b": 3}
    line = capsys.readouterr().out
    counts, splits, classes = line.removeprefix(f"{tmp_path}: ").split("; ")
    total, reasons = counts.split(": ")
    assert total == "15 images of 26 files"
    assert set(reasons.split(", ")) == {
        *("3 in hidden folders", "2 not images", "1 .heic (pip install pillow-heif)", "1 hidden", "1 empty"),
        *("1 links to nowhere", "1 beside the folders of the splits", "1 .zip (unpack it and pass the folder)"),
    }
    assert splits == "splits train (9), test (6)"
    assert classes == "2 classes: a, b\n"


def test_what_is_taken_as_classes_is_said(tmp_path, capsys):
    for number in range(1, 8):
        put(tmp_path / "data" / f"images_{number:03}")
    found(tmp_path / "data")
    assert "7 classes: images_001, images_002, images_003, images_004, images_005, ...\n" in capsys.readouterr().out
    (tmp_path / "data" / "metadata.csv").write_text("file_name,label\nimages_001/0.png,owl\n")
    found(tmp_path / "data")
    assert "20 not listed in the metadata, 1 metadata; 1 class: owl\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["0.json", "0.txt", "0a.txt"])
def test_files_beside_the_pictures_change_nothing(name, tmp_path):
    for split in ("train", "test"):
        for label in ("a", "b"):
            put(tmp_path / split / label)
            for i in range(9):
                (tmp_path / split / label / f"{i}{name}").write_text("{}")
    (tmp_path / "prepared.json").write_text("{}")  # not of a prepared dataset, which has more in it
    assert found(tmp_path) == {key: {"a": 3, "b": 3} for key in ("train", "test")}


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"])
def test_what_a_system_keeps_beside_the_files_is_no_part_of_a_dataset(name, tmp_path, capsys):
    """A NAS keeps a thumbnail of every photograph, others what was deleted."""
    for label in ("a", "b"):
        put(tmp_path / "train" / label)
        put(tmp_path / "train" / label / name / "0.png")
    put(tmp_path / name / "a")
    assert found(tmp_path) == {"train": {"a": 3, "b": 3}}
    assert "6 images of 15 files: 9 in hidden folders" in capsys.readouterr().out


@pytest.mark.parametrize("extension", [".NEF", ".dng", ".cr2", ".arw"])
def test_the_thumbnail_in_a_raw_file_is_not_its_image(extension, tmp_path, capsys):
    put(tmp_path)
    Image.new("RGB", (160, 120)).save(tmp_path / f"DSC0001{extension}", format="TIFF")
    assert found(tmp_path) == {"train": {None: 3}}
    assert f"1 {extension.lower()} (raw files of cameras: develop them to JPEG or TIFF)" in capsys.readouterr().out


def test_a_link_to_itself_or_through_a_file_leads_nowhere(tmp_path, capsys):
    put(tmp_path)
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "through.png").symlink_to("0.png/x.png")
    assert found(tmp_path) == {"train": {None: 3}}
    assert "3 images of 5 files: 2 links to nowhere" in capsys.readouterr().out


FORBIDDEN = """
import os, sys
from pathlib import Path
from training.data.folders import list_files
os.setuid(65534)
print(sorted(file.path for file in list_files(Path(sys.argv[1]))))
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root alone can become somebody else")
def test_a_forbidden_folder_ends_the_walk_unless_nothing_in_it_is_read(tmp_path_factory):
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        put(Path(place) / "a")
        (Path(place) / "lost+found").mkdir(mode=0o700)

        def walked() -> subprocess.CompletedProcess:
            return subprocess.run([sys.executable, "-c", FORBIDDEN, place], capture_output=True, text=True)

        assert walked().stdout == "['a/0.png', 'a/1.png', 'a/2.png']\n"
        (Path(place) / "b").mkdir(mode=0o700)
        assert f"{place}/b cannot be listed" in walked().stderr


REFUSED = {
    "splits inside classes": (
        ["a/train", "a/test", "b/train", "b/test"],
        "a has the splits test, train inside it: arrange",
    ),
    "a folder around": (["archive/train/a", "archive/test/a"], "inside it: pass {}/archive"),
    "VOC": (["JPEGImages", "SegmentationClass"], "are pictures and their masks and no classes: pass {}/JPEGImages"),
    "masks": (["train/images", "train/masks", "test/images", "test/masks"], "no classes: pass {}/train/images"),
    "VOCdevkit": (["VOC2007/JPEGImages", "VOC2007/SegmentationClass"], "no classes: pass {}/VOC2007/JPEGImages"),
    "CUB": (["images/a", "images/b", "segmentations/a", "segmentations/b"], "no classes: pass {}/images"),
    "nuclei": (["train/0a/images", "train/0a/masks", "train/0b/images"], "no classes: pass {}/train/0a/images"),
    "ILSVRC": (["ILSVRC/Data/CLS-LOC/train/n01", "ILSVRC/Data/CLS-LOC/test"], "inside it: pass {}/ILSVRC/Data/CLS-LOC"),
    "accents": (
        ["train/caf\u00e9", "train/cafe\u0301"],
        r"has classes 'cafe\u0301' and 'caf\xe9', which look alike: give",
    ),
    "spaces": (["cat", "cat "], "has classes 'cat' and 'cat ', which look alike: give them one name"),
    "COCO": (["train2017", "val2017"], "train2017, val2017 of {} may be splits or classes: for splits name the one"),
    "Intel": (
        ["seg_train/seg_train/a", "seg_test/seg_test/a", "seg_pred/seg_pred"],
        "folders seg_test, seg_train of {} may be splits or classes: for splits name the one to train on with --train_split",
    ),
    "GTSRB": (
        ["Final_Training/Images/0", "Final_Test/Images"],
        "folders Final_Test, Final_Training of {} may be splits",
    ),
    "sets": (["trainset/a", "trainset/b", "valset/a"], "folders trainset, valset of {} may be splits or classes"),
    "doubled split": (
        ["training/training/a", "training/training/b", "test/test/a"],
        "{}/training/training has the name of its split and is no class: move what is in it to {}/training",
    ),
    "doubled classes": (
        ["a", "b", "c", "archive/a", "archive/b"],
        "{}/archive has folders a, b, and so has the folder around",
    ),
    "doubled classes in a split": (
        ["train/a", "train/b", "train/x/a", "train/x/b", "test/a"],
        "{}/train/x has folders a, b",
    ),
    "LoveDA": (
        ["Urban/images_png", "Urban/masks_png", "Rural/images_png"],
        "{}/Urban has images_png and masks_png, which are",
    ),
    "ADE20K": (
        ["images/training", "images/validation", "annotations/training", "annotations/validation"],
        "pass {}/images, or",
    ),
    "labelme": (
        ["JPEGImages", "SegmentationClassPNG"],
        "{} has JPEGImages and SegmentationClassPNG, which are pictures and",
    ),
    "radiographs": (
        ["a/images", "a/masks", "b/images", "b/masks"],
        "pass {}/a/images, or move every folder masks out of {}",
    ),
    "Carvana": (["train", "train_masks"], "{} has train and train_masks, pictures and their masks: pass {}/train"),
    "dogs and cats": (
        ["train", "test1"],
        "for splits name test1 with --eval_split (to embed or prepare, all with --splits), for classes",
    ),
    "mixed": (["train/a", "train/b", "extra/a"], "{} has train beside extra, which may be splits or classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_mean_two_things_is_refused_with_a_remedy(case, tmp_path):
    folders, message = REFUSED[case]
    for folder in folders:
        put(tmp_path / folder)
    assert message.replace("{}", str(tmp_path)) in refusal(tmp_path)


@pytest.mark.parametrize("end", ["_mask", "_mask_1", "-Mask", "_seg", "_ground_truth", "_superpixels"])
def test_a_mask_beside_its_picture_is_no_image(end, tmp_path):
    put(tmp_path / "benign", name="benign ({}).png")
    put(tmp_path / "benign", count=2, name=f"benign ({{}}){end}.png")
    put(tmp_path / "malignant", name=f"{{}}{end}.png")  # pictures of masks, or of nothing else
    told = refusal(tmp_path)
    assert (
        f"benign/benign (0).png and benign/benign (0){end}.png in {tmp_path} are a picture and its mask (2 in all)"
        in told
    )
    for mask in (tmp_path / "benign").glob(f"*{end}.png"):
        mask.unlink()
    assert found(tmp_path) == {"train": {"benign": 3, "malignant": 3}}


def test_the_remedies_work(tmp_path):
    for folder in ("train2017", "val2017"):
        put(tmp_path / folder)
    assert found(tmp_path, train_split="train2017", eval_split="val2017") == {
        "train2017": {None: 3},
        "val2017": {None: 3},
    }
    for folder in ("train", "test1"):
        put(tmp_path / "pets" / folder)
    assert found(tmp_path / "pets", eval_split="test1") == {"train": {None: 3}, "test1": {None: 3}}
    assert list(load_splits(SplitDataArguments(str(tmp_path / "pets"), splits=["train", "test1"])).rows) == [
        "train",
        "test1",
    ]
    for folder in ("set_train/a", "set_train/b", "set_test/a"):
        put(tmp_path / "sets" / folder)
    assert found(tmp_path / "sets", train_split="set_train", eval_split="set_test") == {
        "set_train": {"a": 3, "b": 3},
        "set_test": {"a": 3},
    }


def test_an_anomaly_layout_is_read_with_its_masks_left_alone(tmp_path):
    for folder in ("train/good", "test/good", "test/broken", "ground_truth/broken"):
        put(tmp_path / folder)
    assert found(tmp_path) == {"train": {"good": 3}, "test": {"good": 3, "broken": 3}}
    assert list(load_splits(SplitDataArguments(dataset_name=str(tmp_path))).rows) == ["train", "test"]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("train.zip", ".zip (unpack it and pass the folder)"),
        ("train.tar.gz", ".gz (unpack it and pass the folder)"),
        ("train.npz", ".npz (write its images to files of their own"),
        ("train.csv", "a list of images must be called metadata.csv"),
        ("labels.jsonl", "a list of images must be called metadata.jsonl"),
    ],
)
def test_a_folder_without_images_says_what_it_has_and_what_to_do(name, remedy, tmp_path):
    (tmp_path / name).write_bytes(b"path,label\n1.png,2\n")
    assert "has 0 images of 1 files" in refusal(tmp_path)
    assert remedy in refusal(tmp_path)


def test_an_empty_folder_says_so(tmp_path):
    assert "is an empty folder: pass one with images as in FOLDER/train/CLASS" in refusal(tmp_path)


def test_the_order_is_that_of_the_paths_whatever_the_disk_says(tmp_path):
    for name in ("b", "a"):
        put(tmp_path / "train" / name, 12)
    paths = [file.path for file in arrange(tmp_path, list_files(tmp_path)).splits["train"]]
    assert paths == sorted(paths)
    assert len(paths) == 24


# Metadata


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_labels_pictures_and_what_it_does_not_list_is_counted(kind, tmp_path, capsys):
    for split in ("train", "test"):
        put(tmp_path / split, 4)
        rows = [(f"{i}.png", ("owl", "cat")[i % 2]) for i in range(3)]
        lines = {
            "csv": ["file_name,label", *(f"{name},{label}" for name, label in rows)],
            "jsonl": [f'{{"file_name": "{name}", "label": "{label}"}}' for name, label in rows],
        }[kind]
        (tmp_path / split / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    assert found(tmp_path) == {key: {"owl": 2, "cat": 1} for key in ("train", "test")}
    assert "6 images of 10 files: 2 metadata, 2 not listed in the metadata" in capsys.readouterr().out
    (tmp_path / "train" / "2.png").unlink()
    assert "lists train/2.png, which is no image there (1 in all)" in refusal(tmp_path)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_labels_are_those_of_the_column_of_the_metadata_that_is_asked_for(streaming, tmp_path):
    for split in ("train", "test"):
        put(tmp_path / split, 4)
        rows = [f"{i}.png,{('owl', 'cat')[i % 2]},{i % 3}" for i in range(4)]
        (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,species,age", *rows]))
    assert found(tmp_path, streaming=streaming) == {key: {None: 4} for key in ("train", "test")}
    numbers = {} if streaming else {"age": {"0": 2, "1": 1, "2": 1}}  # a stream does not know how many there are
    for column, counts in ({"species": {"owl": 2, "cat": 2}} | numbers).items():
        assert found(tmp_path, streaming=streaming, label_column=column) == {key: counts for key in ("train", "test")}
        splits = load_images(DataArguments(dataset_name=str(tmp_path), streaming=streaming, label_column=column))
        assert splits.about["label_column"] == column
    assert "label_column ('weight') is not in" in refusal(tmp_path, streaming=streaming, label_column="weight")


def test_metadata_lies_beside_its_images_at_any_depth(tmp_path):
    for split in ("train", "test"):
        for camera in ("a", "b"):
            put(folder := tmp_path / split / camera / "images", 2)
            (folder / "metadata.csv").write_text("file_name,label\n0.png,owl\n1.png,cat\n")
    assert found(tmp_path) == {split: {"owl": 2, "cat": 2} for split in ("train", "test")}
    before = load_images(DataArguments(dataset_name=str(tmp_path))).place["content"]
    (folder / "metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,owl\n")
    after = load_images(DataArguments(dataset_name=str(tmp_path))).place["content"]
    assert before["train"] == after["train"]
    assert before["test"] != after["test"]
    os.mkdir(tmp_path / "train" / ".kept")
    (tmp_path / "train" / ".kept" / "metadata.csv").write_text("file_name,label\nlost.png,cat\n")
    assert found(tmp_path)["train"] == {"owl": 2, "cat": 2}


@pytest.mark.parametrize("elsewhere", [False, True], ids=["twice in a file", "in two files"])
def test_an_image_with_two_labels_in_the_metadata_is_refused(elsewhere, tmp_path):
    """As where each line is an object of it. The last one was taken."""
    put(tmp_path / "train", 4)
    lines = [f"{i}.png,{'ab'[i % 2]}" for i in range(4)]
    twice = [] if elsewhere else ["1.png,b", "2.png,c"]
    (tmp_path / "train" / "metadata.csv").write_text("\n".join(["file_name,label", *lines, *twice]))
    if elsewhere:
        (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/1.png,b\ntrain/2.png,c\n")
    assert re.search(
        r"lists train/2.png twice, with (a and c|c and a): leave one line for each image", refusal(tmp_path)
    )


def test_a_cell_without_text_is_no_label(tmp_path):
    put(tmp_path / "train", 4)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n0.png,a\n1.png,\n2.png,NA\n3.png,a\n")
    splits = load_images(DataArguments(dataset_name=str(tmp_path)))
    assert splits.class_names == ["NA", "a"]
    assert splits.train["label"][:] == [1, None, 0, 1]


@pytest.mark.parametrize("header", ["file_name, label", " file_name,label"])
def test_a_column_of_metadata_with_a_space_in_its_name_is_refused(header, tmp_path):
    """Or the folders would give the labels, or nothing."""
    put(tmp_path / "a")
    (tmp_path / "metadata.csv").write_text(f"{header}\na/0.png, x\n")
    assert "separate its columns by commas, without spaces" in refusal(tmp_path)


def test_a_split_of_which_the_metadata_lists_nothing_has_no_labels(tmp_path, capsys):
    for split in ("train", "test"):
        put(tmp_path / split)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n0.png,a\n1.png,b\n")
    assert found(tmp_path) == {"train": {"a": 1, "b": 1}, "test": {None: 3}}
    assert "5 images of 7 files: 1 metadata, 1 not listed in the metadata" in capsys.readouterr().out


def test_names_of_digits_keep_their_zeros(tmp_path, capsys):
    put(tmp_path, 3, "00{}")
    (tmp_path / "metadata.csv").write_text("file_name,label\n000,a\n001,b\n002,b\n")
    assert found(tmp_path) == {"train": {"a": 1, "b": 2}}
    assert (
        capsys.readouterr().out == f"{tmp_path}: 3 images of 4 files: 1 metadata; 2 classes: a, b\n"
    )  # and not 0 of anything


def test_another_column_of_paths_is_to_be_renamed(tmp_path):
    put(tmp_path)
    (tmp_path / "metadata.csv").write_text("image_file_name,label\n0.png,owl\n")
    assert "has the column 'image_file_name': rename it to file_name" in refusal(tmp_path)


def test_metadata_that_lists_no_paths_says_how_they_are_written(tmp_path):
    put(tmp_path / "train")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0,a\n1,b\n2,b\n")
    assert "lists 0, which is no image there (3 in all)" in refusal(tmp_path)
    assert refusal(tmp_path).endswith("such as train/0.png")


@pytest.mark.parametrize("mark", [";", "\t"])
def test_metadata_whose_columns_are_not_separated_by_commas_is_refused(mark, tmp_path):
    put(tmp_path / "train" / "a", 1)
    (tmp_path / "train" / "metadata.csv").write_text(f"file_name{mark}label\na/0.png{mark}b\n")
    assert re.search(
        r"metadata.csv has the column 'file_name.{1,2}label': separate its columns by commas", refusal(tmp_path)
    )


def test_a_dataset_that_lies_in_a_folder_of_a_splits_name_is_refused(tmp_path):
    for part in ("train/cat", "train/dog", "test/cat", "test/dog"):
        put(tmp_path / "train" / part)
    assert re.search(
        rf"^{tmp_path}/train has the splits test, train inside it: pass {tmp_path}/train$", refusal(tmp_path)
    )
    assert found(tmp_path / "train") == {"train": {"cat": 3, "dog": 3}, "test": {"cat": 3, "dog": 3}}
    for part in ("train/a", "test/b", "car/c"):  # classes, one of which is none of these words
        put(tmp_path / "vehicles" / "train" / part)
    assert found(tmp_path / "vehicles") == {"train": {"car": 3, "test": 3, "train": 3}}


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow has no AVIF")
def test_avif_is_an_image_like_others(tmp_path):
    for name in ("a", "b"):
        put(tmp_path / "train" / name)
        Image.effect_noise((8, 8), 90).convert("RGB").save(tmp_path / "train" / name / "photo.avif")
    assert found(tmp_path) == {"train": {"a": 4, "b": 4}}


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        *[(f"photos{suffix}", "unpack it and pass the folder") for suffix in (".zip", ".tar.gz", ".tgz", ".7z")],
        ("photos.npz", "write its images to files of their own, or to parquet with `datasets`"),
        ("list.jsonl", "a list of images must be called metadata.jsonl"),
        ("photo.png", "pass the folder that contains it"),
    ],
)
def test_a_file_that_is_no_dataset_is_refused_with_what_to_do(name, remedy, tmp_path):
    (tmp_path / name).write_bytes(b"PK")
    assert f"({tmp_path / name}) is a file, but neither .parquet nor .tar: {remedy}" in refusal(tmp_path / name)


def test_the_remedy_for_a_table_is_not_the_folder_that_passes_over_it(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\n")
    assert "is a file, but neither .parquet nor .tar: a list of images must be called metadata.csv" in refusal(
        tmp_path / "list.csv"
    )
