"""Every form of a dataset gives the same images and masks, and what cannot be right is one line before anything is trained."""

import io
import re
import shutil
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from masked_images import (
    CLASSES,
    as_png,
    draw_splits,
    write_cityscapes,
    write_folder,
    write_parquet,
    write_saved,
    write_voc,
)
from PIL import Image

from modeling_moco import MoCoConfig, MoCoModel
from training.data.decode import Decoder
from training.errors import DataError
from training.segmentation.dataset.layouts import CITYSCAPES_CLASSES
from training.segmentation.dataset.opening import SegmentationDataArguments, load_segmentation

FORMS = {
    "folder": write_folder,
    "palette": lambda folder: write_folder(folder, palette=True),
    "VOC": write_voc,
    "VOC with SBD": lambda folder: write_voc(
        folder, {f"{s}aug": p for s, p in draw_splits().items()}, "SegmentationClassAug"
    ),
    "Cityscapes": write_cityscapes,
    "columns": write_parquet,
    "saved": write_saved,
    "label column": lambda folder: write_parquet(folder, mask_column="label"),
}
SPLITS = {"VOC": "2012_{}", "VOC with SBD": "2012_{}aug"}
CITY = np.full(256, 255, np.uint8)
CITY[:3] = (0, 13, 11)  # road, car, person


def load(folder, train="train", test="test", **flags):
    names = {"train_split": train, "eval_split": test}
    return load_segmentation(SegmentationDataArguments(dataset_name=str(folder), **names | flags))


def test_what_is_exchanged_in_a_training_ends_it_and_a_removed_image_is_unreadable(tmp_path):
    folder = write_folder(tmp_path / "data")
    split = load(folder).train
    images, masks = folder / "train" / "images", folder / "train" / "masks"
    Image.new("RGB", (30, 40)).save(images / "00.png")
    with pytest.raises(DataError, match=r"00.png has 30 x 40 pixels, and had 72 x 48 when the split was opened"):
        split.image(0)
    (images / "01.png").unlink()
    with pytest.raises(FileNotFoundError):
        split.image(1)
    Image.new("L", (30, 40)).save(masks / "02.png")
    Image.fromarray(np.zeros((72, 48), np.uint8)).save(masks / "03.png")
    for number in (2, 3):
        with pytest.raises(
            DataError, match=rf"the mask of .*0{number}.png is not the one with which the split was opened"
        ):
            split.mask(number)
    (masks / "04.png").unlink()
    with pytest.raises(
        DataError, match=r"the mask of .*04.png cannot be read \(.*No such file.*\): bring its file back"
    ):
        split.mask(4)
    split.mask(5)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_and_masks(form, tmp_path, capsys):
    name = SPLITS.get(form, "{}")
    splits = load(FORMS[form](tmp_path / "data"), name.format("train"), name.format("test"))
    expected = draw_splits()
    for split, pairs in ((splits.train, expected["train"]), (splits.eval, expected["test"])):
        assert len(split) == len(pairs)
        for number, (image, mask) in enumerate(pairs):
            assert np.array_equal(np.asarray(split.image(number)), image)
            mask = CITY[mask] if form == "Cityscapes" else mask
            assert np.array_equal(split.mask(number), mask)
            assert tuple(split.sizes[number]) == mask.shape[::-1]
            counts = np.bincount(mask[mask != 255], minlength=len(splits.class_names))
            assert np.array_equal(split.pixels[number], counts)
    first = {
        "folder": "ground",
        "palette": "ground",
        "Cityscapes": "road",
        "columns": "0",
        "saved": "0",
        "label column": "0",
    }
    assert splits.class_names[0] == first.get(form, "background")
    count = {"Cityscapes": 19, "VOC": 21, "VOC with SBD": 21}.get(form, 3)
    assert len(splits.class_names) == count
    told = capsys.readouterr().out
    assert f"{splits.train.name} has 6 images of {count} classes, 3.5 % ignored" in told


def test_cityscapes_has_the_nineteen_classes_of_its_own_table():
    """The trainId of each id, as cityscapesScripts has it: helpers/labels.py."""
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    names = "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,"
    assert list(CITYSCAPES_CLASSES) == ids
    assert list(CITYSCAPES_CLASSES.values()) == [*names.split(",")[:-1], "bus", "train", "motorcycle", "bicycle"]


def test_lists_of_sbd_may_name_files(tmp_path):
    folder = write_voc(tmp_path)
    path = folder / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt"
    names = path.read_text().split()
    path.write_text("".join(f"/JPEGImages/{name}.jpg /SegmentationClass/{name}.png\n" for name in names))
    assert len(load(folder, "2012_train", "2012_test").train) == 6


def test_names_of_a_voc_may_have_spaces_and_dots(tmp_path):
    year = write_voc(tmp_path) / "VOC2012"
    for path in [*year.glob("JPEGImages/*"), *year.glob("SegmentationClass/*")]:
        path.rename(path.with_name(path.name.replace("2012_", "my frame.v")))
    for path in year.glob("ImageSets/Segmentation/*.txt"):
        path.write_text(path.read_text().replace("2012_", "my frame.v"))
    assert len(load(tmp_path, "2012_train", "2012_test").train) == 6


def test_several_splits_are_one_and_splits_share_no_image(tmp_path):
    pairs = draw_splits(test=5)
    pairs["more"] = [pairs["test"].pop()]
    folder = write_folder(tmp_path, pairs)
    both = load(folder, "train+more").train
    assert len(both) == 7
    assert np.array_equal(both.mask(6), pairs["more"][0][1])
    with pytest.raises(
        ValueError, match=r"splits 'train\+test' and 'test' share 4 images, for example test/images/00.png"
    ):
        load(folder, "train+test", "test")


def test_names_of_the_classes_come_from_the_flag_the_file_or_the_numbers(tmp_path):
    folder = write_folder(tmp_path)
    assert load(folder).class_names == CLASSES
    assert load(folder, class_names=["x", "y", "z", "w"]).class_names == ["x", "y", "z", "w"]
    (folder / "classes.txt").unlink()
    assert load(folder).class_names == ["0", "1", "2"]
    for wrong in ("one", "a\na", "a\n\x1b[2J"):
        (folder / "classes.txt").write_text(wrong)
        with pytest.raises(ValueError, match=r"classes.txt \(.*\) must be 2 to 255 different names") as error:
            load(folder)
        assert str(error.value).isprintable()
    with pytest.raises(ValueError, match=r"class_names \(x x\) must be 2 to 255 different names"):
        load(folder, class_names=["x", "x"])


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "segmentation.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, re.S)[1]
    pairs = draw_splits()
    write_voc(tmp_path / "VOCdevkit", {"trainaug": pairs["train"]}, "SegmentationClassAug")
    write_voc(tmp_path / "VOCdevkit", {"val": pairs["test"]})
    MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=16)).save_pretrained(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example.replace("513", "65"), "docs/segmentation.md", "exec"), names)
    assert names["outputs"].logits.shape[1] == 21
    assert names["outputs"].loss.isfinite()


def test_the_classes_of_a_model_are_kept_and_the_train_split_is_not_read(tmp_path):
    folder = write_folder(tmp_path)
    shutil.rmtree(folder / "train" / "masks")
    (folder / "train" / "masks").mkdir()
    (folder / "classes.txt").unlink()
    args = SegmentationDataArguments(dataset_name=str(folder))
    splits = load_segmentation(args, ["a", "b", "c", "d"], training=False)
    assert splits.train is None
    assert splits.class_names == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="has class 2, and there are 2 classes, a to b"):
        load_segmentation(args, ["a", "b"], training=False)


def test_a_model_is_evaluated_on_its_own_classes_alone(tmp_path):
    folder = write_folder(tmp_path / "data")

    def evaluate(names, **flags):
        args = SegmentationDataArguments(dataset_name=str(flags.pop("folder", folder)), **flags)
        return load_segmentation(args, names, training=False)

    assert evaluate(CLASSES).class_names == CLASSES
    other = ["ground", "green", "red"]
    message = (
        r"class 1 of split 'test' of .*data is red \(3 classes\), and of the model green \(3 classes\): choose data"
    )
    with pytest.raises(ValueError, match=message) as error:
        evaluate(other)
    assert "\n" not in str(error.value)
    assert evaluate(other, class_names=other).class_names == other  # the user says so
    with pytest.raises(ValueError, match=r"class 1 of --class_names is red .* of the model green .*: pass those of"):
        evaluate(other, class_names=CLASSES)
    with pytest.raises(ValueError, match=r"class 3 of split 'test' .* is None .*, and of the model blue \(4 classes\)"):
        evaluate([*CLASSES, "blue"])
    voc = write_voc(tmp_path / "voc")
    with pytest.raises(ValueError, match=r"class 0 of split '2012_test' .* is background \(21 classes\), and of the"):
        evaluate(CLASSES, folder=voc, eval_split="2012_test")


def test_a_foreground_of_255_is_refused_in_an_evaluation_too(tmp_path):
    folder = write_folder(tmp_path)
    _binary(folder)
    args = SegmentationDataArguments(dataset_name=str(folder))
    with pytest.raises(
        ValueError, match=r"split 'test' of .* have class 0 alone and 255, which counts nowhere: number"
    ):
        load_segmentation(args, ["ground", "thing"], training=False)


def test_images_without_a_pixel_that_counts_are_left_out_of_training_alone(tmp_path, capsys):
    pairs = draw_splits()
    for split in ("train", "test"):
        pairs[split][1][1][:] = 255
    splits = load(write_folder(tmp_path, pairs))
    assert (len(splits.train), len(splits.eval)) == (5, 4)
    assert "1 images of train without a pixel that counts are left out of training" in capsys.readouterr().out
    assert np.array_equal(np.asarray(splits.train.image(1)), pairs["train"][2][0])
    assert splits.train.names[1] == "train/images/02.png"


def _remove(name):
    return lambda folder: (folder / name).unlink()


def _resize(folder):
    path = folder / "train" / "masks" / "03.png"
    Image.open(path).resize((40, 30), Image.Resampling.NEAREST).save(path)


def _as_rgb(folder):
    path = folder / "train" / "masks" / "03.png"
    Image.open(path).convert("RGB").save(path)


def _as_jpeg(folder):
    path = folder / "train" / "masks" / "03.png"
    Image.open(path).save(path, "JPEG")


def _of_sixteen_bits(folder):
    path = folder / "train" / "masks" / "03.png"
    Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16)).save(path)


def _change(split, number, value):
    def change(folder):
        path = folder / split / "masks" / f"{number:02}.png"
        mask = np.array(Image.open(path))
        mask[0, 0] = value
        path.write_bytes(as_png(mask))

    return change


def _binary(folder):
    (folder / "classes.txt").unlink()
    for path in folder.glob("*/masks/*.png"):
        path.write_bytes(as_png(np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)))


def _all(value):
    def change(folder):
        for path in folder.glob("train/masks/*.png"):
            path.write_bytes(as_png(np.full_like(np.asarray(Image.open(path)), value)))

    return change


WRONG = {
    "no mask": (
        _remove("train/masks/03.png"),
        "images of split 'train' have no mask, for example train/images/03.png",
    ),
    "no image": (
        _remove("test/images/02.png"),
        "masks of split 'test' have no image, for example test/masks/02.png",
    ),
    "another size": (
        _resize,
        "images/03.png has 48 x 72 pixels (upright, as its EXIF tag turns it), and its mask 40 x 30",
    ),
    "colours": (
        _as_rgb,
        "the mask of train/images/03.png cannot be read (a mask has one number of 8 bits for each pixel",
    ),
    "loss": (
        _as_jpeg,
        "the mask of train/images/03.png cannot be read (JPEG changes the numbers of pixels",
    ),
    "16 bits": (_of_sixteen_bits, "grey or in a palette, and this has I;16"),
    "one more class": (_change("train", 4, 3), "the mask of train/images/04.png in split 'train'"),
    "one more in the test": (_change("test", 1, 9), "has class 9, and there are 3 classes, ground to green"),
    "foreground 255": (
        _binary,
        "have class 0 alone and 255, which counts nowhere: number the classes 0, 1, ...",
    ),
    "one class": (_all(1), "has pixels of class red alone: there is nothing to tell apart"),
    "nothing counts": (_all(255), "split 'train' of"),
    "another file": (
        lambda f: (f / "train/images/notes.txt").write_text("x"),
        "train/images/notes.txt is no image: remove it",
    ),
    "two of a name": (lambda f: shutil.copy(f / "train/images/01.png", f / "train/images/01.jpg"), "01.png in"),
    "two folders of masks": (
        lambda f: shutil.copytree(f / "test/masks", f / "test/labels"),
        "test has labels, masks, of which one is to be read: move the others away",
    ),
    "broken mask": (
        lambda f: (f / "test/masks/00.png").write_bytes(b"x"),
        "the mask of test/images/00.png cannot be read",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_right_is_refused_in_one_line_by_name(what, tmp_path):
    change, words = WRONG[what]
    folder = write_folder(tmp_path)
    change(folder)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_what_is_missing_in_a_voc_or_in_cityscapes_is_named(tmp_path):
    voc, city = write_voc(tmp_path / "voc"), write_cityscapes(tmp_path / "city")
    (voc / "VOC2012/SegmentationClass/2012_train03.png").unlink()
    with pytest.raises(ValueError, match=r"SegmentationClass/2012_train03[.]png of split '2012_train', the mask of"):
        load(voc, "2012_train", "2012_test")
    with pytest.raises(ValueError, match=r"split '2012_trainaug' is not in .*: it has 2012_test, 2012_train"):
        load(voc, "2012_trainaug", "2012_test")
    path = next((city / "gtFine/test/town").glob("*000002*labelIds.png"))
    mask = np.array(Image.open(path))
    mask[3, 3] = 34
    path.write_bytes(as_png(mask))
    with pytest.raises(ValueError, match=r"_000019_leftImg8bit.png has the number 34, which is none of this dataset's"):
        load(city)
    path.unlink()
    with pytest.raises(ValueError, match=r"000002_000019_gtFine_labelIds.png of split 'test', the mask of leftImg8bit"):
        load(city)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [False, True])
def test_masks_of_few_bits_have_the_numbers_that_are_written(bits, palette):
    mask = np.random.default_rng(0).integers(0, 2**bits, (5, 7), np.uint8)
    lines = b"".join(b"\0" + _packed(line, bits) for line in mask)
    parts = {b"IHDR": struct.pack(">IIBBBBB", 7, 5, bits, 3 if palette else 0, 0, 0, 0)}
    parts |= {b"PLTE": bytes(3 * 2**bits)} if palette else {}
    parts |= {b"IDAT": zlib.compress(lines), b"IEND": b""}
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in parts.items()
    )
    assert np.array_equal(Decoder().mask({"bytes": png, "path": None}), mask)


def _packed(line: np.ndarray, bits: int) -> bytes:
    return np.packbits(np.unpackbits(line[:, None], axis=1)[:, 8 - bits :]).tobytes()


@pytest.mark.parametrize("written", [("GIF", {}), ("JPEG2000", {}), ("TIFF", {"compression": "jpeg"}), ("AVIF", {})])
def test_masks_of_a_format_that_may_change_numbers_are_refused(written):
    content = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(content, written[0], **written[1])
    with pytest.raises(OSError, match="changes the numbers of pixels: write masks as PNG"):
        Decoder().mask({"bytes": content.getvalue(), "path": None})
    with pytest.raises(OSError, match="its grey levels end at 3, and PIL scales them: write masks as PNG"):
        Decoder().mask({"bytes": b"P5 4 1 3\n\0\1\2\3", "path": None})


def test_other_data_in_the_folders_of_voc_may_name_its_classes(tmp_path):
    folder = write_voc(tmp_path)
    assert load(folder, "2012_train", "2012_test").class_names[1] == "aeroplane"
    names = ["background", *(f"tissue {number}" for number in range(1, 20)), "tumour"]
    (folder / "VOC2012" / "classes.txt").write_text("\n".join(names))
    assert load(folder, "2012_train", "2012_test").class_names == names
    write_voc(tmp_path / "other")
    (tmp_path / "other" / "VOC2012").rename(folder / "VOC2007")
    with pytest.raises(ValueError, match=r"'2012_train' and '2007_test' have other class names: write one classes.txt"):
        load(folder, "2012_train", "2007_test")


def test_a_folder_of_no_known_form_is_told_the_forms_of_masks(tmp_path):
    """And not those of classes alone."""
    folder = write_folder(tmp_path / "plain")
    for split in ("train", "test"):
        for kind in ("images", "masks"):
            (tmp_path / "ade" / kind).mkdir(parents=True, exist_ok=True)
            (folder / split / kind).rename(tmp_path / "ade" / kind / split)
    with pytest.raises(
        ValueError, match=r"has none of the forms VOCdevkit, Cityscapes, SPLIT/images and SPLIT/masks; with"
    ):
        load(tmp_path / "ade")


def test_a_column_that_is_no_image_is_no_mask(tmp_path):
    folder = write_parquet(tmp_path, mask_column="other")
    with pytest.raises(ValueError, match=r"mask_column \(None\) is no column of images of split 'train'"):
        load(folder)
    assert len(load(folder, mask_column="other").train) == 6
    with pytest.raises(ValueError, match=r"mask_column \('depth'\) is no column of images"):
        load(folder, mask_column="depth")


def test_columns_may_have_each_others_names(tmp_path):
    folder = write_parquet(tmp_path, mask_column="image", image_column="mask")
    split = load(folder, mask_column="image", image_column="mask").train
    image, mask = draw_splits()["train"][0]
    assert np.array_equal(np.asarray(split.image(0)), image)
    assert np.array_equal(split.mask(0), mask)


def test_a_broken_image_is_left_out_and_named(tmp_path, caplog):
    folder = write_folder(tmp_path)
    (folder / "train/images/02.png").write_bytes(b"no image")
    splits = load(folder)
    assert len(splits.train) == 5
    assert np.array_equal(splits.train.mask(2), draw_splits()["train"][3][1])
    assert "train/images/02.png" in caplog.text


def test_a_changed_mask_is_other_content_and_the_first_images_are_used(tmp_path):
    folder = write_folder(tmp_path)
    splits = load(folder, max_train_samples=3)
    assert len(splits.train) == 3
    args = SegmentationDataArguments(dataset_name=str(folder), max_train_samples=3)
    args.content = splits.place["content"]
    load_segmentation(args)
    path = folder / "train/masks/01.png"
    path.write_bytes(as_png(np.asarray(Image.open(path))[::-1].copy()))  # as many pixels of each class
    with pytest.raises(ValueError, match="is not what the run was begun with: split 'train'"):
        load_segmentation(args)


def _of_other_pictures(folder):
    """The same table with other images of the same size and the same masks."""
    path = str(folder / "train-00000-of-00001.parquet")
    rows = datasets.Dataset.from_parquet(path).cast_column("image", datasets.Image(decode=False))
    pictures = [as_png(image[:, ::-1].copy()) for image, _ in draw_splits()["train"]]
    rows.map(lambda row, number: {"image": {"bytes": pictures[number], "path": None}}, with_indices=True).to_parquet(
        path
    )


@pytest.mark.parametrize(
    ("write", "change"),
    [
        (write_folder, lambda folder: Image.new("RGB", (72, 48)).save(folder / "train/images/00.png")),
        (write_parquet, _of_other_pictures),
    ],
)
def test_a_changed_image_is_other_content(write, change, tmp_path):
    folder = write(tmp_path / "data")
    args = SegmentationDataArguments(dataset_name=str(folder))
    args.content = load_segmentation(args).place["content"]
    assert load_segmentation(args).place["content"] == args.content
    change(folder)
    with pytest.raises(ValueError, match="is not what the run was begun with: split 'train'"):
        load_segmentation(args)


def test_files_of_the_system_are_nobodys(tmp_path):
    folder = write_folder(tmp_path)
    for name in ("train/images/Thumbs.db", "train/masks/desktop.ini", "train/images/.DS_Store"):
        (folder / name).write_text("x")
    splits = load_segmentation(SegmentationDataArguments(dataset_name=str(folder)))
    assert len(splits.train) == len(list((folder / "train/images").glob("*.png")))
