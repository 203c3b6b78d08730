"""Every source gives the same rows, by index or as a stream, and what cannot work is refused by name."""

import re
import sys
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from numbered_images import CLASSES, ROWS, encoded, number, table, write_folders, write_parquet, write_tars

from training.data.decode import decode_image
from training.data.formats import load_digits
from training.data.labels import SplitLabels, find_label_problem, number_classes
from training.data.sources import DataArguments, SplitDataArguments, load_images, load_splits
from training.pretrain import build_trainer
from training.recipe import parse_pretrain
from training.reports.run import draw_features
from training.views.pil import EvaluationView


def write_source(kind: str, folder: Path) -> Path:
    if kind.startswith("parquet"):
        write_parquet(folder, [range(6), range(6, ROWS)])
        write_parquet(folder, [range(ROWS, 2 * ROWS)], split="test")
        return folder / "train-00000-of-00002.parquet" if kind == "parquet file" else folder
    if kind == "imagefolder":
        return write_folders(folder)
    return write_tars(folder) / ("train-0.tar" if kind == "tar file" else "")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", ["parquet folder", "parquet file", "imagefolder", "tar folder", "tar file"])
def test_every_source_gives_the_same_rows(kind, streaming, tmp_path):
    source = write_source(kind, tmp_path / "source")
    splits = load_images(DataArguments(dataset_name=str(source), streaming=streaming))
    rows = list(splits.train)
    assert all(row.keys() == {"image", "label"} and row["image"].keys() == {"bytes", "path"} for row in rows)
    found = sorted((number(splits.decoder.image(row["image"])), row["label"]) for row in rows)
    assert found == [(i, i % 3) for i in range(6 if "file" in kind else ROWS)]
    # Not decoded and encoded again on the way, which would cost time and, for JPEG, quality.
    stored = {encoded(i, "JPEG" if kind.startswith("tar") else "PNG") for i in range(ROWS)}
    assert {row["image"]["bytes"] for row in rows} <= stored | {None}
    if "file" in kind:
        assert splits.eval is None
    else:
        held_out = sorted(number(splits.decoder.image(row["image"])) for row in splits.eval)
        assert held_out == list(range(ROWS, 2 * ROWS))
    if not kind.startswith("tar"):
        assert splits.class_names == CLASSES
    elif not streaming:  # bare integers: a stream does not know how many classes will come
        assert splits.class_names == ["0", "1", "2"]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_digits_give_the_same_rows_as_every_source(streaming):
    splits = load_images(DataArguments(dataset_name="digits", streaming=streaming), labelled=True)
    assert splits.class_names == list("0123456789")
    for split, count in ((splits.train, 1437), (splits.eval, 360)):
        rows = list(split)
        assert len(rows) == count
        assert rows[0].keys() == {"image", "label"}
        assert rows[0]["image"].keys() == {"bytes", "path"}
        assert decode_image(rows[0]["image"]).size == (32, 32)


def test_digits_keep_the_share_of_every_class_in_both_splits():
    digits = load_digits()
    train, test = Counter(digits["train"]["label"]), Counter(digits["test"]["label"])
    for label in range(10):
        assert test[label] == pytest.approx((train[label] + test[label]) * 360 / 1797, abs=1)
    assert digits["train"][0]["image"].size == (32, 32)


def test_columns_of_other_names_are_found_by_their_type_or_named(tmp_path):
    source = write_parquet(tmp_path / "named", [range(ROWS)], image="img", label="fine")
    for names in ({}, {"image_column": "img", "label_column": "fine"}, {"streaming": True}):
        splits = load_images(DataArguments(dataset_name=str(source), **names))
        assert splits.class_names == CLASSES
        rows = list(splits.train)
        assert all(row.keys() == {"image", "label"} for row in rows)
        assert [row["label"] for row in rows] == [i % 3 for i in range(ROWS)]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("count", [5, 8, 99])
@pytest.mark.parametrize("kind", ["parquet folder", "tar folder"])
def test_first_samples_are_kept_where_fewer_are_asked_for(kind, count, streaming, tmp_path):
    source = write_source(kind, tmp_path / "source")
    args = DataArguments(dataset_name=str(source), max_train_samples=count, max_eval_samples=3, streaming=streaming)
    splits = load_images(args)
    assert [number(decode_image(row["image"])) for row in splits.train] == list(range(min(count, ROWS)))
    assert len(splits.train) == min(count, ROWS)
    if not streaming:
        assert [number(decode_image(row["image"])) for row in splits.eval] == list(range(ROWS, ROWS + 3))


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [("parquet folder", [6, 6]), ("parquet file", [6]), ("imagefolder", [ROWS]), ("tar folder", [6, 6])],
)
def test_the_shards_of_a_stream_are_counted_and_parquet_is_not_read_for_it(kind, lengths, tmp_path, capsys):
    source = write_source(kind, tmp_path / "source")
    rows = load_images(DataArguments(dataset_name=str(source), streaming=True)).train
    assert rows.lengths == lengths
    said = re.search(r"Counting the images of (\d+) files by reading them once\. Parquet", capsys.readouterr().out)
    assert bool(said) == kind.startswith("tar")  # a folder has been walked


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("first", [False, True], ids=["among others", "before others"])
def test_a_parquet_file_without_rows_is_passed_over(first, streaming, tmp_path):
    shards = [range(0), range(5), range(5, ROWS)] if first else [range(5), range(0), range(5, ROWS)]
    source = write_parquet(tmp_path / "source", shards)
    splits = load_images(DataArguments(dataset_name=str(source), streaming=streaming))
    assert [number(decode_image(row["image"])) for row in splits.train] == list(range(ROWS))
    assert splits.place["content"]["train"].startswith("2 files ")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_tar_without_members_is_passed_over(streaming, tmp_path):
    source = write_tars(tmp_path / "source")
    with tarfile.open(source / "train--.tar", "w"):  # before the others
        pass
    rows = load_images(DataArguments(dataset_name=str(source), streaming=streaming)).train
    assert len(rows) == ROWS


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"image_column": "photo"}, ["image_column ('photo')", "it has img, fine, thumb"]),
        (
            {"image_column": "fine"},
            ["image_column ('fine')", "contains ClassLabel", "its image columns are img, thumb"],
        ),
        ({}, ["2 image columns (img, thumb)", "--image_column"]),
        ({"image_column": "img", "label_column": "coarse"}, ["label_column ('coarse')", "it has img, fine, thumb"]),
        ({"train_split": "unlabeled", "image_column": "img"}, ["train_split ('unlabeled')", "it has train"]),
        ({"eval_split": "dev", "image_column": "img"}, ["eval_split ('dev')", "it has train"]),
        ({"eval_split": "train", "image_column": "img"}, ["eval_split ('train') is the split that is trained on"]),
        ({"dataset_name": "/no/such/folder"}, ["/no/such/folder", "does not exist: pass a folder"]),
        ({"dataset_name": __file__}, [__file__, "neither .parquet nor .tar: pass the folder"]),
    ],
)
def test_errors_name_the_value_and_a_remedy(flags, parts, tmp_path):
    rows = table(range(3), image="img", label="fine").cast_column("img", datasets.Image())
    thumbs = rows.select_columns("img").rename_column("img", "thumb")
    datasets.concatenate_datasets([rows, thumbs], axis=1).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the parts are the match)
        load_images(DataArguments(**{"dataset_name": str(tmp_path)} | flags))
    for part in parts:
        assert part in str(error.value)


def test_labels_and_an_evaluation_split_are_asked_for_by_name(tmp_path):
    rows = table(range(3)).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "labelled.parquet")
    rows.remove_columns("label").to_parquet(tmp_path / "bare.parquet")
    for name, remedy in (("labelled", "--eval_split"), ("bare", "--label_column")):
        args = DataArguments(dataset_name=str(tmp_path / f"{name}.parquet"))
        assert len(load_images(args).train) == 3
        with pytest.raises(ValueError, match=f"{name}.parquet.*{remedy}"):
            load_images(args, labelled=True)


def test_the_split_that_is_trained_on_is_not_the_one_to_evaluate_on(tmp_path):
    source = tmp_path / "source"
    for count, split in enumerate(("train", "validation", "test"), 3):
        write_parquet(source, [range(count)], split=split)
    for train, evaluation in (("train", 4), ("validation", 5), ("test", 4)):
        images = load_images(DataArguments(dataset_name=str(source), train_split=train))
        assert images.eval is not None
        assert len(images.eval) == evaluation


def test_an_empty_stream_is_refused_by_name(tmp_path):
    source = write_parquet(tmp_path / "source", [range(0)])
    with pytest.raises(ValueError, match="split 'train' is empty"):
        load_images(DataArguments(dataset_name=str(source), streaming=True))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split_is_refused_by_name(split, tmp_path):
    for name in ("train", "test"):
        write_parquet(tmp_path / "source", [range(0 if name == split else 3)], split=name)
    with pytest.raises(ValueError, match=f"source.*{split}.* no data"):
        load_images(DataArguments(dataset_name=str(tmp_path / "source")))


def test_sizes_that_would_pad_the_evaluation_crop_are_refused():
    with pytest.raises(ValueError, match=r"eval_resize \(200\) is smaller than image_size \(224\): raise it"):
        DataArguments(eval_resize=200)
    with pytest.raises(ValueError, match=r"image_size \(0\)"):
        DataArguments(image_size=0)
    assert DataArguments().evaluation_view() == EvaluationView(256, 224)


def test_a_buffer_without_images_is_refused():
    with pytest.raises(ValueError, match=r"^shuffle_buffer \(-5\) must be at least 1 image, which shuffles nothing$"):
        DataArguments(shuffle_buffer=-5)


@pytest.mark.parametrize("name", ["max_train_samples", "max_eval_samples"])
@pytest.mark.parametrize("count", [0, -3])
def test_no_samples_are_refused(name, count):
    with pytest.raises(ValueError, match=rf"^{name} \({count}\) must be at least 1: leave it out for all images$"):
        DataArguments(**{name: count})


# Labels that no evaluation can use

CAT_DOG_FOX = datasets.ClassLabel(names=CLASSES)
INTEGER = datasets.Value("int64")


def write_labelled(folder: Path, train: list, test: list, feature=CAT_DOG_FOX, test_feature=None) -> str:
    """A parquet file of images with these labels for each split."""
    folder.mkdir()
    for split, labels, kind in (("train", train, feature), ("test", test, test_feature or feature)):
        features = datasets.Features({"image": datasets.Image(decode=False), "label": kind})
        images = [{"bytes": encoded(i), "path": None} for i in range(len(labels))]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.cast_column("image", datasets.Image()).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def problem_of(source: str, **flags) -> str:
    """What an evaluation says of the data, in one line, and pretraining keeps for itself."""
    args = DataArguments(dataset_name=source, **flags)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the message is returned)
        load_images(args, labelled=True)
    assert "\n" not in str(error.value)
    assert load_images(args).label_problem == str(error.value)
    return str(error.value)


PROBLEMS = {
    "strings": (
        {"train": ["a", "b"], "test": ["a", "b"], "feature": datasets.Value("string")},
        ["has no column of class numbers: 'label' holds Value('string')", "class_encode_column", "--label_column"],
    ),
    "floats": (
        {"train": [0.5, 1.0], "test": [0.5, 1.0], "feature": datasets.Value("float64")},
        ["has no column of class numbers: 'label' holds Value('float64')", "class_encode_column", "--label_column"],
    ),
    "one class": (
        {"train": [1, 1, 1], "test": [0, 1]},
        [
            "all images of split 'train' belong to one class, 'dog'",
            "use images of two classes, or another --label_column",
        ],
    ),
    "unlabelled test": (
        {"train": [0, 1, 2], "test": [0, -1, -1]},
        ["2 of 3 images of split 'test' have no label", "choose another split with --eval_split"],
    ),
    "missing label": (
        {"train": [0, None, 2, 1], "test": [0, 1, 2]},
        ["1 of 4 images of split 'train' have no label", "choose another split with --train_split"],
    ),
    "no labels in the test": (
        {"train": [0, 1], "test": [None, None], "feature": INTEGER},
        ["2 of 2 images of split 'test' have no label", "--eval_split"],
    ),
    "more classes": (
        {"train": [0, 1, 2], "test": [0, 5], "feature": INTEGER},
        ["label 5 of split 'test' is not one of the 3 classes of 'train', 0 to 2", "remove its images"],
    ),
    "no class numbers": (
        {"train": [7, 1_000_000_007], "test": [7, 7], "feature": INTEGER},
        ["split 'train' has 2 images and labels up to 1,000,000,007", "class_encode_column", "--label_column"],
    ),
    "other order": (
        {"train": [0, 1, 2], "test": [0, 1, 2], "test_feature": datasets.ClassLabel(names=["cat", "fox", "dog"])},
        [
            "class 1 is 'dog' in ",
            "train.parquet and 'fox' in ",
            "test.parquet",
            "the same class names in the same order",
        ],
    ),
    "more names": (
        {"train": [0, 1, 2], "test": [0, 1, 2], "test_feature": datasets.ClassLabel(names=[*CLASSES, "gnu"])},
        [
            "class 3 is absent in ",
            "train.parquet and 'gnu' in ",
            "test.parquet",
            "the same class names in the same order",
        ],
    ),
    "unseen class": (
        {"train": [0, 1, 0], "test": [2, 2]},
        [
            "class 'fox' of split 'test' has no image in split 'train'",
            "use the same class names in both, or remove it",
        ],
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_labels_that_no_evaluation_can_use_are_named_with_a_remedy(case, tmp_path):
    content, parts = PROBLEMS[case]
    problem = problem_of(write_labelled(tmp_path / "source", **content))
    for part in parts:
        assert part in problem


def save_splits(folder: Path, form: str, **names: list[str]) -> str:
    """Splits of six images, each with classes of its own, in one of the forms that keep names."""
    splits = {}
    for split, classes in names.items():
        labels = [i % len(classes) for i in range(6)]
        splits[split] = table(range(6)).remove_columns("label").add_column("label", labels)
        splits[split] = splits[split].cast_column("label", datasets.ClassLabel(names=classes))
    if form == "saved":
        datasets.DatasetDict(splits).save_to_disk(folder)
    else:
        folder.mkdir()
        for split, rows in splits.items():
            rows.cast_column("image", datasets.Image()).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_splits_that_were_encoded_one_by_one_are_refused_wherever_labels_are_read(form, tmp_path):
    # As `class_encode_column` of each split leaves them where a class is in one split alone.
    source = save_splits(tmp_path / "source", form, train=["cat", "dog", "owl"], test=["dog", "owl"])
    told = r"^class 0 is 'cat' in .*train.* and 'dog' in .*test.*: write all splits and files with the same class names"
    assert re.match(told, problem_of(source))
    assert re.match(told, str(load_images(DataArguments(dataset_name=source, streaming=True)).label_problem))
    with pytest.raises(ValueError, match=told) as error:
        load_splits(SplitDataArguments(dataset_name=source))
    assert "\n" not in str(error.value)
    alone = load_splits(SplitDataArguments(dataset_name=source, splits=["train"]))
    assert alone.class_names == ["cat", "dog", "owl"]


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_splits_with_the_same_names_are_read_whichever_classes_they_have(form, tmp_path):
    source = save_splits(tmp_path / "source", form, train=CLASSES, test=CLASSES)
    assert load_images(DataArguments(dataset_name=source), labelled=True).class_names == CLASSES
    assert load_splits(SplitDataArguments(dataset_name=source)).class_names == CLASSES


def test_a_label_beyond_the_names_of_its_own_file_is_refused(tmp_path):
    source = write_labelled(tmp_path / "source", [0, 1, 5], [0, 1], feature=INTEGER)
    path = tmp_path / "source" / "train.parquet"
    stated = datasets.Features({"image": datasets.Image(), "label": CAT_DOG_FOX}).arrow_schema.metadata
    pq.write_table(pq.read_table(path).replace_schema_metadata(stated), path)
    assert "label 5 of split 'train' is not one of the 3 classes" in problem_of(source)


def test_a_class_folder_that_only_the_test_split_has_is_named(tmp_path):
    source = write_folders(tmp_path / "source")
    (source / "test" / "fox").rename(source / "test" / "wolf")
    assert "class 'wolf' of split 'test' has no image in split 'train'" in problem_of(str(source))


def test_a_class_that_a_small_sample_lacks_is_announced(tmp_path, capsys):
    source = write_labelled(tmp_path / "source", [0, 1, 0], [0, 1, 2])
    assert load_images(DataArguments(dataset_name=source)).label_problem is None
    assert capsys.readouterr().out == ""
    load_images(DataArguments(dataset_name=source), labelled=True)
    assert capsys.readouterr().out == (
        "warning: 1 of the 3 classes of split 'test' have no image in split 'train', for example 'fox': a classifier cannot "
        "predict them\n"
    )


def test_good_labels_have_no_problem_with_names_or_numbers(tmp_path):
    for name, feature in (("names", CAT_DOG_FOX), ("numbers", INTEGER)):
        source = write_labelled(tmp_path / name, [2, 0, 1, 0], [0, 2], feature=feature)
        splits = load_images(DataArguments(dataset_name=source), labelled=True)
        assert splits.label_problem is None
        assert splits.class_names == (CLASSES if name == "names" else ["0", "1", "2"])
    # Bare numbers beside names are taken as numbers of these names.
    mixed = write_labelled(tmp_path / "mixed", [0, 1, 2], [0, 1, 2], test_feature=INTEGER)
    assert load_images(DataArguments(dataset_name=mixed), labelled=True).class_names == CLASSES


def test_a_subset_of_one_class_is_refused_and_of_some_classes_announced(tmp_path, capsys):
    # Sorted by class, as folders are.
    source = write_labelled(tmp_path / "source", [0] * 4 + [1] * 4 + [2] * 4, [0, 0, 1, 1, 2, 2], feature=INTEGER)
    assert "the first 4 images of split 'train' belong to one class, '0': raise --max_train_samples" in problem_of(
        source, max_train_samples=4
    )
    assert capsys.readouterr().out == ""
    args = DataArguments(dataset_name=source, max_train_samples=8, max_eval_samples=2)
    splits = load_images(args, labelled=True)
    assert capsys.readouterr().out.splitlines() == [
        "warning: the first 8 images of split 'train' cover 2 of its 3 classes: raise --max_train_samples, or shuffle the "
        "dataset",
        "warning: the first 2 images of split 'test' cover 1 of its 3 classes: raise --max_eval_samples, or shuffle the "
        "dataset",
    ]
    assert splits.class_names == ["0", "1", "2"]  # of the whole split, as the classifier of a longer run has them
    load_images(args)  # pretraining uses no labels but in its monitor
    load_images(DataArguments(dataset_name=source), labelled=True)
    assert capsys.readouterr().out == ""


def lines_run(call) -> int:
    """How many lines of Python a call runs, and functions it enters: what it costs on any machine, however busy."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_a_million_labels_are_checked_without_a_loop_over_them():
    labels = np.arange(1_280_000) % 1000
    train, test = SplitLabels("train", labels, len(labels)), SplitLabels("test", labels[:50_000], 50_000)
    names = number_classes(labels)
    assert find_label_problem(names, train, test) is None
    assert lines_run(lambda: number_classes(labels)) < 20_000  # a few for each class
    assert lines_run(lambda: find_label_problem(names, train, test)) < 20_000


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_column_of_bytes_that_are_no_images_is_refused(split, tmp_path):
    for name in ("train", "test"):
        rows = table(range(12), broken={i: b"words" for i in range(12)} if name == split else None)
        rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / f"{name}.parquet")
    message = f"none of the 12 images looked at in split '{split}', column 'image', can be read .* --image_column"
    with pytest.raises(ValueError, match=message):
        load_images(DataArguments(dataset_name=str(tmp_path)))


def test_one_readable_image_among_the_first_is_enough(tmp_path):
    rows = table(range(9), broken={i: b"words" for i in range(7)})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "train.parquet")
    assert len(load_images(DataArguments(dataset_name=str(tmp_path))).train) == 9


@pytest.mark.parametrize("test_labels", [[0, -1], [0, None], [0, 5]])
def test_pretraining_goes_on_without_its_monitor_where_labels_are_unusable(test_labels, tmp_path, capsys):
    kind = datasets.Value("int64") if 5 in test_labels else CAT_DOG_FOX  # `datasets` refuses to write a sixth of three
    source = write_labelled(tmp_path / "source", [0, 1, 2] * 4, test_labels, kind)
    flags = ["--architecture", "test_resnet", "--queue_size", "16", "--global_batch_size", "4", "--image_size", "16"]
    flags += ["--eval_resize", "16", "--dataset_name", source, "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    args = parse_pretrain(flags)
    splits = load_images(args.data)
    trainer = build_trainer(args, splits)
    assert trainer.monitor.queries is None
    assert set(trainer.evaluate()) == {"eval_rankme"}
    line, rankme = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 0 of \d+, epoch 0: RankMe \d+\.\d", rankme)
    assert line.startswith("The kNN monitor is off: ")
    assert ("label 5 of split 'test'" if 5 in test_labels else "1 of 2 images of split 'test' have no label") in line
    draw_features(trainer.model, splits, args.data, tmp_path)
    names = re.findall(r"<!-- (.*?) -->", (tmp_path / "tsne.svg").read_text())
    assert not {*CLASSES, "0", "1", "2"} & set(names)
