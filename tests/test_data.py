"""Every source gives the same rows, by index or as a stream, and what cannot work is refused by name."""

import re
from collections import Counter
from pathlib import Path

import datasets
import pytest
from numbered_images import CLASSES, ROWS, encoded, number, table, write_folders, write_parquet, write_tars

from training.augment import EvaluationView
from training.data import DataArguments, load_digits, load_images
from training.images import decode_image


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
    found = sorted((number(decode_image(row["image"])), row["label"]) for row in rows)
    assert found == [(i, i % 3) for i in range(6 if "file" in kind else ROWS)]
    # Not decoded and encoded again on the way, which would cost time and, for JPEG, quality.
    stored = {encoded(i, "JPEG" if kind.startswith("tar") else "PNG") for i in range(ROWS)}
    assert {row["image"]["bytes"] for row in rows} <= stored | {None}
    if "file" in kind:
        assert splits.eval is None
    else:
        held_out = sorted(number(decode_image(row["image"])) for row in splits.eval)
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
    said = re.search(r"Counting the images of (\d+) files by reading them, once\. Parquet", capsys.readouterr().out)
    assert bool(said) == (not kind.startswith("parquet"))


def test_an_empty_file_among_others_is_an_empty_shard(tmp_path):
    source = write_parquet(tmp_path / "source", [range(5), range(0), range(5, ROWS)])
    rows = load_images(DataArguments(dataset_name=str(source), streaming=True)).train
    assert rows.lengths == [5, 0, 7]
    assert [number(decode_image(row["image"])) for row in rows] == list(range(ROWS))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"image_column": "photo"}, ["image_column ('photo')", "it has img, fine, thumb"]),
        ({"image_column": "fine"}, ["image_column ('fine')", "holds no images", "image columns are img, thumb"]),
        ({}, ["2 image columns (img, thumb)", "--image_column"]),
        ({"image_column": "img", "label_column": "coarse"}, ["label_column ('coarse')", "it has img, fine, thumb"]),
        ({"train_split": "unlabeled", "image_column": "img"}, ["train_split ('unlabeled')", "it has train"]),
        ({"eval_split": "dev", "image_column": "img"}, ["eval_split ('dev')", "it has train"]),
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
