"""Every form of a dataset gives the same images and objects, and what cannot be right is one line."""

import io
import json
import logging
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from boxed_images import CLASSES, SPLITS, TEST, TRAIN, picture, write_coco, write_metadata, write_parquet, write_voc
from PIL import Image

from training.detection.dataset.annotations import AnnotatedImage, check_objects
from training.detection.dataset.opening import DetectionDataArguments, load_detection
from training.errors import DataError
from training.transfer.source import find_eval_split

FORMS = {
    "struct of lists": write_parquet,
    "list of structs": lambda folder: write_parquet(folder, structs=True),
    "corners": lambda folder: write_parquet(folder, form="xyxy"),
    "sizes from headers": lambda folder: write_parquet(folder, sizes=False),
    "imagefolder": write_metadata,
    "COCO": write_coco,
    "VOC": write_voc,
}
WITHOUT_CROWDS = {"VOC"}
WITHOUT_DIFFICULT = {"COCO"}


def load(folder: Path, **flags):
    if (folder / "VOC2007").exists():
        flags = {"train_split": "2007_train"} | flags
    return load_detection(DetectionDataArguments(dataset_name=str(folder), **flags))


def _replace_pictures(folder, picture_of):
    path = str(folder / "train-00000-of-00001.parquet")
    rows = datasets.Dataset.from_parquet(path).cast_column("image", datasets.Image(decode=False))
    rows.map(lambda _, number: {"image": {"bytes": picture_of(number), "path": None}}, with_indices=True).to_parquet(
        path
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_and_objects(form, tmp_path, capsys):
    splits = load(FORMS[form](tmp_path / "data"))
    assert splits.class_names == CLASSES
    crowds = form not in WITHOUT_CROWDS
    kept = [image for image in TRAIN if any(not (crowds and crowd) for crowd in image[3])]
    for split, images in ((splits.train, kept), (splits.eval, TEST)):
        assert len(split) == len(images)
        for number, (size, boxes, labels, crowd, difficult) in enumerate(images):
            objects = split.objects[number]
            assert tuple(split.sizes[number]) == size == split.image(number).size
            assert np.array_equal(objects.boxes, np.array(boxes, np.float64).reshape(-1, 4))
            assert objects.labels.tolist() == labels
            assert objects.iscrowd.tolist() == [bool(one) and crowds for one in crowd]
            assert objects.difficult.tolist() == [bool(one) and form not in WITHOUT_DIFFICULT for one in difficult]
            assert objects.area.tolist() == [(b[2] - b[0]) * (b[3] - b[1]) for b in boxes]
            assert objects.segmentations is None
    assert splits.difficult is (form not in WITHOUT_DIFFICULT)
    told = capsys.readouterr().out
    left_out = len(TRAIN) - len(kept)
    name = "2007_train" if form == "VOC" else "train"
    assert f"{left_out} images of {name} without objects are left out of training" in told
    assert f"{name} has 6 objects in 5 images" in told


def test_several_splits_are_one(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit", {"train": "2007", "test": "2012"})
    both = load(folder, train_split="2007_train+2012_test").train
    alone = [load(folder, train_split=name).train for name in ("2007_train", "2012_test")]
    assert len(both) == sum(map(len, alone))
    assert both.image(len(alone[0])).size == TEST[0][0]
    assert both.objects[len(alone[0])].boxes.tolist() == TEST[0][1]
    with pytest.raises(ValueError, match=r"split '2007_train\+2007_train' names one split twice"):
        load(folder, train_split="2007_train+2007_train")


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "detection.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, re.S)[1]
    for year in ("2007", "2012"):
        write_voc(tmp_path / year, {"train": year, "test": year})
        (tmp_path / "VOCdevkit").mkdir(exist_ok=True)
        (tmp_path / year / f"VOC{year}").rename(tmp_path / "VOCdevkit" / f"VOC{year}")
        lists = tmp_path / "VOCdevkit" / f"VOC{year}" / "ImageSets" / "Main"
        (lists / "train.txt").rename(lists / "trainval.txt")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "docs/detection.md", "exec"), names)
    assert len(names["splits"].train) == 2 * 4  # one image of each year has no object
    assert len(names["splits"].eval) == 3
    assert [len(batch) for batch in names["batches"]] == [2] * 4
    assert min(names["images"][0]["pixel_values"].shape[1:]) in range(480, 801, 32)


def test_splits_that_share_images_are_refused(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit")
    lists = folder / "VOC2007" / "ImageSets" / "Main"
    (lists / "trainval.txt").write_text((lists / "train.txt").read_text() + (lists / "test.txt").read_text())
    with pytest.raises(
        ValueError, match="splits '2007_trainval' and '2007_test' share 3 images, for example JPEGImages"
    ):
        load(folder, train_split="2007_trainval")


@pytest.mark.parametrize("form", ["COCO", "parquet"])
def test_masks_are_those_of_the_annotations(form, tmp_path):
    folder = write_coco(tmp_path / "data") if form == "COCO" else write_parquet(tmp_path / "data", masks=True)
    split = load(folder, masks=True).eval
    from training.detection.dataset.masks import rasterize

    for number, (size, boxes, *_) in enumerate(TEST):
        for box, mask in zip(boxes, split.objects[number].segmentations, strict=True):
            expected = np.zeros(size[::-1], bool)
            expected[box[1] : box[3], box[0] : box[2]] = True
            assert np.array_equal(rasterize(mask, *size), expected)


def test_the_classes_of_a_detector_number_the_objects_and_the_train_split_is_not_read(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit")
    (folder / "VOC2007" / "ImageSets" / "Main" / "train.txt").write_text("gone\n")
    args = DetectionDataArguments(dataset_name=str(folder), eval_split="2007_test")
    splits = load_detection(args, class_names=["emu", "fox", "dog", "cat"], training=False)
    assert splits.train is None
    assert splits.eval.objects[0].labels.tolist() == [1]
    assert splits.eval.objects[2].labels.tolist() == [3, 2]
    with pytest.raises(ValueError, match=r"category .*fox.* of .*png is not one of the 2 classes"):
        load_detection(args, class_names=["cat", "dog"], training=False)


def test_categories_that_are_names_are_numbered_by_the_train_split(tmp_path):
    folder = write_metadata(tmp_path / "data")
    lines = (folder / "test" / "metadata.jsonl").read_text().replace('"fox"', '"wolf"')
    (folder / "test" / "metadata.jsonl").write_text(lines)
    with pytest.raises(
        ValueError, match=r"category \(wolf\) of test/0.png is not one of the 3 classes \['cat', 'dog', 'fox'\]"
    ):
        load(folder)


# The format of boxes


def test_boxes_that_may_be_both_are_refused_and_the_flag_decides(tmp_path):
    image = ((40, 30), [[2, 3, 20, 22]], [0], [0], [0])
    folder = write_parquet(tmp_path / "data", form="xyxy", splits={"train": [image, image]})
    # left, top, width, height: (2, 3) to (22, 25) is inside too
    with pytest.raises(
        ValueError, match="boxes may be left, top, width, height or left, top, right, bottom: pass --bbox_format"
    ):
        load(folder)
    assert load(folder, bbox_format="xyxy").train.objects[0].boxes.tolist() == [[2, 3, 20, 22]]
    assert load(folder, bbox_format="xywh").train.objects[0].boxes.tolist() == [[2, 3, 22, 25]]


def test_an_evaluation_reads_boxes_as_the_training_did(tmp_path):
    """Where those to evaluate on fit both readings, those of the training decide, of every split that it has read."""
    both = ((40, 30), [[2, 3, 18, 19]], [0], [0], [0])
    ends = ((40, 30), [[20, 15, 40, 30]], [0], [0], [0])  # as width and height these are beyond the border
    evaluate = {"class_names": CLASSES, "training": False}
    for name, deciding in (("one", "train"), ("two", "validation")):
        splits = {split: [both, ends if split == deciding else both] for split in ("train", "validation", "test")}
        folder = write_parquet(tmp_path / name, form="xyxy", splits=splits)
        place = load_detection(DetectionDataArguments(dataset_name=str(folder))).place
        args = DetectionDataArguments(dataset_name=str(folder), eval_split="test")
        args.content = place["content"]
        found = load_detection(args, **evaluate)
        assert found.train is None
        assert found.eval.objects[0].boxes.tolist() == [[2, 3, 18, 19]]
        assert found.place["content"].keys() == {"test"}
    args.content = None  # of no record: train and test alone fit both
    with pytest.raises(ValueError, match="boxes may be left, top, width, height or left, top, right, bottom: pass"):
        load_detection(args, **evaluate)
    (folder / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="boxes may be left, top, width, height or left, top, right, bottom: pass"):
        load_detection(args, **evaluate)


def test_boxes_that_are_neither_are_refused_by_name(tmp_path):
    image = ((40, 30), [[2, 3, 60, 22]], [0], [0], [0])
    folder = write_parquet(tmp_path / "data", form="xyxy", splits={"train": [image, TRAIN[0]]})
    with pytest.raises(
        ValueError, match=r"neither all .*box \[2.0, 3.0, 60.0, 22.0\] of row 0 of train, 40 x 30 pixels"
    ):
        load(folder)
    assert len(load(folder, bbox_format="xyxy").train) == 2  # over the border: views clip it


def test_boxes_that_are_fractions_are_refused(tmp_path):
    image = ((40, 30), [[0.1, 0.2, 0.5, 0.9]], [0], [0], [0])
    folder = write_parquet(tmp_path / "data", form="xyxy", splits={"train": [image, image]})
    with pytest.raises(
        ValueError, match=r"boxes have no number above 0.89\d*, so they seem to be fractions of the image: write"
    ):
        load(folder)


# What cannot be right


def checked(boxes, categories=(0,), size=(40, 30), **columns):
    image = AnnotatedImage("a.png", size, list(boxes), list(categories), **columns)
    return check_objects(image, size, ["cat", "dog"], "xyxy")


WRONG = {
    "swapped": (
        dict(boxes=[[20, 3, 2, 22]]),
        r"box \[20.0, 3.0, 2.0, 22.0\] .* of a.png has its corners swapped: correct it",
    ),
    "right of it": (
        dict(boxes=[[40, 3, 50, 22]]),
        r"box \[40.0, .* is outside of its 40 x 30 pixels: correct or remove it",
    ),
    "above it": (dict(boxes=[[4, -9, 8, 0]]), r"box \[4.0, -9.0, 8.0, 0.0\] .* is outside of its 40 x 30 pixels"),
    "three numbers": (
        dict(boxes=[[1, 2, 3]]),
        r"box \(\[1, 2, 3\]\) of a.png is not four finite numbers: correct or remove it",
    ),
    "not a number": (dict(boxes=[[1, 2, 3, float("nan")]]), r"box \(\[1, 2, 3, nan\]\) of a.png is not four finite"),
    "a word": (dict(boxes=[[1, 2, 3, "x"]]), r"box .* of a.png is not four finite numbers"),
    "no box": (dict(boxes=[None]), r"box \(None\) of a.png is not four finite numbers"),
    "ragged": (
        dict(boxes=[[1, 2, 3, 4], [1]], categories=[0, 0]),
        r"box \(\[1\]\) of a.png is not four finite numbers",
    ),
    "unknown name": (
        dict(boxes=[[1, 2, 3, 4]], categories=["emu"]),
        r"category \(emu\) of a.png is not one of the 2 classes",
    ),
    "unknown number": (
        dict(boxes=[[1, 2, 3, 4]], categories=[2]),
        r"category \(2\) of a.png is not one of the 2 classes",
    ),
    "unlabelled": (dict(boxes=[[1, 2, 3, 4]], categories=[-1]), r"category \(-1\) of a.png"),
    "null": (dict(boxes=[[1, 2, 3, 4]], categories=[None]), r"category \(None\) of a.png"),
    "two lengths": (
        dict(boxes=[[1, 2, 3, 4]], iscrowd=[0, 1]),
        "a.png has 1 boxes and 2 of iscrowd: give one to each object",
    ),
    "crowd": (dict(boxes=[[1, 2, 3, 4]], iscrowd=[7]), r"iscrowd \(\[7\]\) of a.png is not 0 or 1"),
    "area": (dict(boxes=[[1, 2, 3, 4]], area=["big"]), r"area of a.png \(big\) is not a number: correct it"),
    "area below 0": (
        dict(boxes=[[1, 2, 3, 4]], area=[-6]),
        r"area \(-6\) of a.png is no number of square pixels: correct",
    ),
    "area of nan": (
        dict(boxes=[[1, 2, 3, 4]], area=[float("nan")]),
        r"area \(nan\) of a.png is no number of square pixels",
    ),
    "mask of another size": (
        dict(boxes=[[1, 2, 3, 4]], segmentations=[{"size": [40, 30], "counts": [1200]}]),
        r"a mask has the size \[40, 30\] of \(height, width\) and its image \[30, 40\] \(a.png\): write masks of the",
    ),
    "mask of other length": (
        dict(boxes=[[1, 2, 3, 4]], segmentations=[{"size": [30, 40], "counts": [1199]}]),
        r"a mask \(\[1199\]\) has run lengths that do not fill its 40 x 30 pixels \(a.png\)",
    ),
    "no mask": (
        dict(boxes=[[1, 2, 3, 4]], segmentations=[[]]),
        r"a mask \(\[\]\) is neither an RLE .* nor a list of polygons",
    ),
    "two points": (
        dict(boxes=[[1, 2, 3, 4]], segmentations=[[[1, 2, 3, 4]]]),
        r"a polygon \(\[1, 2, 3, 4\]\) is no list of at",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_objects_are_one_line(what):
    arguments, message = WRONG[what]
    with pytest.raises(ValueError, match=message) as error:
        checked(**arguments)
    assert "\n" not in str(error.value)


def test_boxes_over_the_border_stay_as_they_are_and_empty_ones_are_named(tmp_path, capsys):
    assert checked([[-3, -2, 50, 30]]).boxes.tolist() == [[-3, -2, 50, 30]]
    images = [
        ((40, 30), [[7, 5, 7, 9], [2, 3, 20, 22]], [0, 1], [0, 0], [0, 0]),
        ((40, 30), [[4, 4, 4, 4]], [0], [0], [0]),
    ]
    folder = write_parquet(tmp_path / "data", splits={"train": [*images, TRAIN[0]]})
    split = load(folder, bbox_format="xywh").train
    assert len(split) == 2  # nothing is left to learn of the second image
    assert split.objects[0].trainable().tolist() == [False, True]
    told = capsys.readouterr().out
    assert (
        "warning: 2 boxes of train are empty, for example [7.0, 5.0, 7.0, 9.0] of row 0 of train: no detector learns"
        in told
    )
    assert "1 images of train without objects are left out of training" in told


def test_a_split_without_objects_is_refused(tmp_path):
    empty = [((40, 30), [], [], [], [])] * 2
    folder = write_parquet(tmp_path / "data", splits={"train": TRAIN, "test": empty})
    with pytest.raises(ValueError, match=r"split 'test' of .*data has no objects: choose another"):
        load(folder, bbox_format="xywh")
    only_crowds = [((40, 30), [[1, 1, 9, 9]], [0], [1], [0])]
    folder = write_parquet(tmp_path / "crowds", splits={"train": only_crowds})
    with pytest.raises(ValueError, match=r"split 'train' of .*crowds has no objects to learn from: choose another"):
        load(folder, bbox_format="xywh")


@pytest.mark.parametrize(("form", "gone"), [(write_coco, "train/1.png"), (write_voc, "VOC2007/JPEGImages/000001.png")])
def test_a_missing_image_is_named(form, gone, tmp_path):
    folder = form(tmp_path / "data")
    (folder / gone).unlink()
    with pytest.raises(
        ValueError, match=r"image .*1\.(png|jpg) of split '(2007_)?train' is not in .*: add it, or remove its annot"
    ):
        load(folder)


def test_a_split_of_which_the_metadata_lists_nothing_has_no_objects_to_evaluate_on(tmp_path):
    folder = write_metadata(tmp_path / "data")
    (folder / "test" / "metadata.jsonl").unlink()
    assert load(folder, bbox_format="xywh").eval is None


def test_a_missing_image_of_the_metadata_is_named(tmp_path):
    folder = write_metadata(tmp_path / "data")
    (folder / "train" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"metadata of .* lists train/3.png, which is no image there"):
        load(folder)


def test_an_image_of_another_size_than_its_annotations_is_refused(tmp_path):
    folder = write_coco(tmp_path / "data")
    Image.new("RGB", (30, 40)).save(folder / "train" / "0.png")
    with pytest.raises(
        ValueError, match=r"train/0.png has 30 x 40 pixels .* and its annotations are of 40 x 30: correct them"
    ):
        load(folder)


@pytest.mark.parametrize("form", ["COCO", "VOC", "columns"])
def test_every_image_is_compared_with_its_annotations_before_anything_is_trained(form, tmp_path):
    """Those of a file whose tag turns it are often of the file as it lies."""
    size, number = (64, 48), 33  # none of the sixteen that are decoded
    images = [(size, [[4, 4, 34, 44]], [0], [0], [0])] * 40
    splits = {"train": images}
    folder = {"COCO": write_coco, "VOC": write_voc, "columns": write_parquet}[form](tmp_path / "data", splits=splits)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", size).save(file, "PNG", exif=exif)
    if form == "columns":
        _replace_pictures(folder, lambda row: file.getvalue() if row == number else picture(size, row))
    else:
        names = {"COCO": f"train/{number}.png", "VOC": f"VOC2007/JPEGImages/{number:06}.png"}
        (folder / names[form]).write_bytes(file.getvalue())
    with pytest.raises(ValueError, match=r"33.* has 48 x 64 pixels \(upright, .* annotations are of 64 x 48: correct"):
        load(folder, bbox_format="xywh")


def test_an_image_that_is_exchanged_in_a_training_ends_it_and_not_as_an_unreadable_one(tmp_path):
    folder = write_coco(tmp_path / "data")
    split = load(folder).train
    Image.new("RGB", (30, 40)).save(folder / "train" / "0.png")
    with pytest.raises(DataError, match=r"train/0.png has 30 x 40 pixels .* annotations are of 40 x 30: correct them"):
        split.image(0)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("annotations/instances_train.json", "{", "", "is not JSON"),
        ("annotations/instances_train.json", '"images"', '"pictures"', "has no list 'images' of objects"),
        (
            "annotations/instances_train.json",
            '"category_id": 3',
            '"category_id": 4',
            r"category_id \(4\) of train/0.png is not in",
        ),
        (
            "annotations/instances_train.json",
            '"image_id": 100',
            '"image_id": 900',
            "annotates the image 900, which is not in its",
        ),
        ("annotations/instances_train.json", '"id": 101', '"id": 100', "has the image id 100 twice"),
        ("annotations/instances_train.json", '"width": 40', '"width": "40"', r"with width and height \['40', 30\]"),
        (
            "annotations/instances_train.json",
            '"0.png"',
            '"../../etc/passwd"',
            "image train/../../etc/passwd of split 'train' is not",
        ),
        (
            "annotations/instances_train.json",
            '"0.png"',
            '"/etc/passwd"',
            "is an absolute path, and not below",
        ),
        ("annotations/instances_test.json", '"fox"', '"wolf"', "split 'test' has the classes"),
    ],
)
def test_a_wrong_coco_file_is_one_line(file, old, new, message, tmp_path):
    folder = write_coco(tmp_path / "data")
    (folder / file).write_text((folder / file).read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<annotation>", "<annotation", "000000.xml is not XML"),
        ("<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', "has a document type"),
        ("<xmin>3</xmin>", "<xmin>three</xmin>", r"xmin in .*000000.xml \(three\) is not a number"),
        ("<xmin>3</xmin>", "", r"xmin in .*000000.xml \(None\) is not a number"),
    ],
)
def test_a_wrong_voc_file_is_one_line(old, new, message, tmp_path):
    folder = write_voc(tmp_path / "data")
    path = folder / "VOC2007" / "Annotations" / "000000.xml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_names_of_a_voc_may_have_spaces_and_dots_and_no_part_of_one_is_another_image(tmp_path):
    folder = write_voc(tmp_path / "data")
    plain, year = load(folder), folder / "VOC2007"
    renamed = {"000000": "cat 1", "000001": "cat.v 2", "000002": "cat"}
    for old, new in renamed.items():
        (year / f"JPEGImages/{old}.png").rename(year / f"JPEGImages/{new}.png")
        (year / f"Annotations/{old}.xml").rename(year / f"Annotations/{new}.xml")
    listed = year / "ImageSets/Main/train.txt"
    listed.write_text("".join(f"{renamed.get(name, name)}\n" for name in listed.read_text().split()))
    assert load(folder).train.sizes.tolist() == plain.train.sizes.tolist()
    (year / "JPEGImages/cat.v 2.png").unlink()
    with pytest.raises(ValueError, match=r"image JPEGImages/cat.v 2.jpg of split '2007_train' is not in"):
        load(folder)


def test_a_voc_split_may_have_any_name_without_an_underscore(tmp_path):
    folder = write_voc(tmp_path / "data")
    lists, count = folder / "VOC2007/ImageSets/Main", len(load(folder).train)
    (lists / "train.txt").rename(lists / "Fold-1.txt")
    assert len(load(folder, train_split="2007_Fold-1").train) == count


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dog", r"classes 1 and 2 of split 'train' are both called dog: give each its own name"),
        ("", r"class 2 of split 'train' is called '', which is no name: give it one"),
        ("fo\nx", r"class 2 of split 'train' is called 'fo.*x', which is no name"),
    ],
)
def test_classes_that_cannot_be_told_apart_by_name_are_refused(name, message, tmp_path):
    folder = write_coco(tmp_path / "data")
    for path in (folder / "annotations").iterdir():
        path.write_text(path.read_text().replace('"name": "fox"', f'"name": {json.dumps(name)}'))
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_an_image_that_is_listed_twice_is_refused(tmp_path):
    folder = write_voc(tmp_path / "data")
    (folder / "VOC2007/ImageSets/Main/train.txt").write_text("000000\n000001\n000000\n")
    with pytest.raises(ValueError, match=r"split '2007_train' of .* lists an image twice: remove one of its lines"):
        load(folder)


def test_a_voc_list_leads_out_of_no_folder(tmp_path):
    folder = write_voc(tmp_path / "data")
    (tmp_path / "secret.png").write_bytes((folder / "VOC2007/JPEGImages/000000.png").read_bytes())
    (tmp_path / "secret.xml").write_bytes((folder / "VOC2007/Annotations/000000.xml").read_bytes())
    (folder / "VOC2007/ImageSets/Main/train.txt").write_text("../../../secret\n")
    with pytest.raises(ValueError, match=r"image JPEGImages/../../../secret.jpg of split '2007_train' is not in"):
        load(folder)


def test_a_voc_without_sizes_has_those_of_the_images(tmp_path):
    folder = write_voc(tmp_path / "data")
    for path in (folder / "VOC2007" / "Annotations").glob("*.xml"):
        path.write_text(re.sub(r"<(width|height)>\d+", r"<\1>0", path.read_text()))
    assert load(folder).eval.sizes.tolist() == [list(image[0]) for image in TEST]


def test_missing_splits_and_columns_are_named(tmp_path):
    folder = write_voc(tmp_path / "voc")
    with pytest.raises(
        ValueError, match=r"split 'train' is not in .*voc: it has 2007_test, 2007_train; name them with"
    ):
        load_detection(DetectionDataArguments(dataset_name=str(folder)))
    with pytest.raises(ValueError, match="masks are not read from the VOCdevkit"):
        load(folder, masks=True)
    folder = write_parquet(tmp_path / "parquet")
    with pytest.raises(
        ValueError, match=r"objects_column \('things'\) is not in split 'train': it has image, objects, width"
    ):
        load(folder, objects_column="things")
    with pytest.raises(ValueError, match="the objects of row 0 of train have no list kind, only bbox, category"):
        load(folder, category_column="kind")
    with pytest.raises(ValueError, match="have no list segmentation or segmentations, only bbox"):
        load(folder, masks=True)


def _annotate(path, old, new):
    def change(folder):
        text = (folder / path).read_text()
        assert old in text
        (folder / path).write_text(text.replace(old, new, 1))

    return change


OF_COCO = "annotations/instances_train.json"
CHANGES = {
    "box": (write_coco, _annotate(OF_COCO, '"bbox": [2,', '"bbox": [3,')),
    "crowd": (write_coco, _annotate(OF_COCO, '"iscrowd": 0', '"iscrowd": 1')),
    "area": (write_coco, _annotate(OF_COCO, '"area": 396.0', '"area": 4.0')),
    "mask": (write_coco, _annotate(OF_COCO, '"segmentation": [[2', '"segmentation": [[3')),
    "difficult": (write_voc, _annotate("VOC2007/Annotations/000000.xml", "<difficult>0", "<difficult>1")),
    "file": (write_coco, lambda folder: Image.new("RGB", TRAIN[0][0]).save(folder / "train" / "0.png")),
    "image of a column": (  # of the same size in pixels, and in bytes
        write_parquet,
        lambda folder: _replace_pictures(folder, lambda number: picture(TRAIN[number][0], number + 50)),
    ),
}


@pytest.mark.parametrize(
    "start", ["./", "../train/", "..\\train\\", "train/", ".\\", "{folder}/train/", "train/../train/", "{link}/train/"]
)
def test_images_of_coco_are_found_as_other_tools_write_their_names(start, tmp_path):
    plain = load(write_coco(tmp_path / "plain")).train
    folder = write_coco(tmp_path / "data")
    (link := tmp_path / "link").symlink_to(folder)
    path = folder / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = start.format(folder=folder, link=link) + image["file_name"]
    path.write_text(json.dumps(content))
    train = load(link).train
    boxes = [[found.objects[i].boxes.tolist() for i in range(len(found))] for found in (train, plain)]
    assert boxes[0] == boxes[1] != []


@pytest.mark.parametrize("name", ["/data/birds/0.png", "C:\\birds\\0.png"])
def test_an_absolute_name_of_another_machine_is_refused(name, tmp_path):
    folder = write_coco(tmp_path)
    path = folder / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["images"][2]["file_name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is an absolute path, and not below .*: write it as a path below the folder"):
        load(folder)


def test_the_split_that_is_trained_on_is_evaluated_by_an_evaluation_alone(tmp_path):
    args = DetectionDataArguments(dataset_name=str(write_coco(tmp_path / "data")), eval_split="train")
    with pytest.raises(ValueError, match=r"eval_split \('train'\) is the split that is trained on: name another"):
        load_detection(args)
    splits = load_detection(args, CLASSES, training=False)
    assert (splits.train, splits.eval.name, len(splits.eval)) == (None, "train", 5)
    other = DetectionDataArguments(dataset_name=args.dataset_name, train_split="validation")
    assert find_eval_split(["train", "validation", "test"], other, training=True) == "test"


@pytest.mark.parametrize("what", CHANGES)
def test_other_content_than_the_runs_is_refused(what, tmp_path):
    write, change = CHANGES[what]
    folder = write(tmp_path / "data")
    flags = {"train_split": "2007_train"} if write is write_voc else {"masks": write is write_coco}
    args = DetectionDataArguments(dataset_name=str(folder), **flags)
    args.content = load_detection(args).place["content"]
    assert load_detection(args).place["content"] == args.content
    change(folder)
    with pytest.raises(ValueError, match=r"is not what the run was begun with: split '(2007_)?train' was 5 images"):
        load_detection(args)


# Broken images


def test_a_broken_image_is_named_once_and_its_size_may_come_from_the_annotations(tmp_path, caplog):
    folder = write_coco(tmp_path / "data")
    (folder / "train" / "1.png").write_bytes(b"not a picture")
    with caplog.at_level(logging.WARNING):
        splits = load(folder)
        with pytest.raises(OSError, match="no image of a format that is read"):
            splits.train.image(1)
    assert caplog.text.count("skipped an image that cannot be read") == 1
    assert "train/1.png" in caplog.text
    assert splits.train.broken.numbers == [1]
    for path in (folder / "train").glob("*.png"):
        path.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="none of the 3 images looked at in split 'train' can be read"):
        load(folder)


def test_a_broken_image_whose_size_nobody_knows_is_left_out(tmp_path, caplog):
    folder = write_metadata(tmp_path / "data")
    (folder / "test" / "2.png").write_bytes(b"not a picture")
    (folder / "train" / "0.png").write_bytes(b"not a picture")
    with caplog.at_level(logging.WARNING):
        splits = load(folder, bbox_format="xywh")
    assert len(splits.eval) == 2
    assert splits.train.names == ["train/1.png", "train/3.png"]
    assert caplog.text.count("skipped an image that cannot be read") == 2


@pytest.mark.parametrize("tag", range(1, 9))
def test_an_image_turned_by_its_tag_has_its_upright_size(tag, tmp_path):
    folder = write_metadata(tmp_path / "data")
    exif = Image.Exif()
    exif[0x0112] = tag
    # The file of an upright image of 40 x 30.
    size = (40, 30) if tag < 5 else (30, 40)
    Image.effect_noise(size, 90).convert("RGB").save(folder / "train" / "0.png", exif=exif)
    split = load(folder, bbox_format="xywh").train
    assert split.sizes[0].tolist() == [40, 30]
    assert split.image(0).size == (40, 30)


def test_pipes_and_links_to_nowhere_are_no_images(tmp_path):
    import os

    folder = write_coco(tmp_path / "data")
    (folder / "train" / "0.png").unlink()
    os.mkfifo(folder / "train" / "0.png")
    with pytest.raises(ValueError, match=r"image train/0.png of split 'train' is not in"):
        load(folder)


def test_one_file_under_two_names_is_refused(tmp_path):
    folder = write_coco(tmp_path / "data")
    (folder / "train" / "1.png").unlink()
    (folder / "train" / "1.png").symlink_to(folder / "train" / "0.png")
    with pytest.raises(ValueError, match=r"train/0.png and train/1.png in .* are one file: remove one of these links"):
        load(folder)
    (folder / "train" / "1.png").unlink()
    (folder / "train" / "1.png").symlink_to(folder / "test" / "0.png")
    with pytest.raises(ValueError, match="splits 'train' and 'test' share 1 images"):
        load(folder)


def test_a_path_in_a_parquet_file_reads_nothing(tmp_path):
    folder = write_parquet(tmp_path / "data", splits={"train": TRAIN})
    secret = tmp_path / "secret.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(secret)
    table = datasets.Dataset.from_parquet(str(folder / "train-00000-of-00001.parquet")).cast_column(
        "image", datasets.Image(decode=False)
    )
    table = table.map(lambda row: {"image": {"bytes": None, "path": str(secret)}})
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"none of the .* can be read \(the row has a path and no bytes"):
        load(folder, bbox_format="xywh")


def test_numbers_without_names_are_classes(tmp_path):
    folder = write_metadata(tmp_path / "data")
    for split in SPLITS:
        path = folder / split / "metadata.jsonl"
        text = path.read_text()
        for number, name in enumerate(CLASSES):
            text = text.replace(f'"{name}"', str(number))
        path.write_text(text)
    assert load(folder, bbox_format="xywh").class_names == ["0", "1", "2"]


def test_the_first_images_are_used(tmp_path):
    splits = load(write_coco(tmp_path / "data"), max_train_samples=2, max_eval_samples=1)
    assert (len(splits.train), len(splits.eval)) == (2, 1)


def test_coco_beside_the_images_of_each_split(tmp_path):
    folder = write_coco(tmp_path / "data")
    for split in SPLITS:
        text = (folder / "annotations" / f"instances_{split}.json").read_text()
        (folder / split / "_annotations.coco.json").write_text(json.dumps(json.loads(text)))
        (folder / "annotations" / f"instances_{split}.json").unlink()
    assert len(load(folder).train) == 3
