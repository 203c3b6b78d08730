"""Folders of images with masks: a VOCdevkit, Cityscapes, and pictures beside masks; and rows with a column of each."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ...data.decode import EXTENSIONS
from ...data.folders import NO_FILE, OF_IMAGES, OF_MASKS, SYSTEM_FILES, FoundFile
from ...errors import one_line, shown
from ...transfer.source import Files, find_image_column, voc_image

IGNORED = 255  # label of the pixels that count nowhere
VOC_YEAR = re.compile(r"VOC(\d{4})")
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
AUGMENTED = "aug"  # what ends the name of a split whose masks are SBD's too
CITYSCAPES_CLASSES = {  # by the id in labelIds.png; the others count nowhere (cityscapesScripts, labels.py)
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
CITYSCAPES_IDS = 34
NAMES_FILE = "classes.txt"
MOST_LIST = 2**26  # bytes of a list of images or classes
MASK_COLUMNS = ("mask", "annotation", "label", "labels", "masks", "segmentation")
ROWS = datasets.Features({"image": datasets.Image(decode=False), "mask": datasets.Image(decode=False)})


@dataclass
class MaskedSplit:
    """The images of a split and their masks, not looked at yet.

    Args:
        name: of the split.
        rows: columns `image` and `mask` with bytes or paths.
        names: of the images in messages.
        class_names: by class number; None where the masks have to tell.
        classes: the class of each number in a mask, uint8 (256,); None where it is that number.
        ids: numbers that a mask may have, where `classes` is given.
        places: see `Decoder`.
        files: of the images; empty where they are no files.
    """

    name: str
    rows: datasets.Dataset
    names: list[str]
    class_names: list[str] | None = None
    classes: np.ndarray | None = None
    ids: range | None = None
    places: tuple[str, ...] = ()
    files: list[FoundFile] = field(default_factory=list)


def check_class_names(names: Sequence[str], whose: str) -> None:
    """
    Args:
        whose: what gave the names, in a message.

    Raises:
        ValueError: they are not 2 to 255 different names of one line.
    """
    if not 2 <= len(set(names)) == len(names) <= IGNORED or not all(name and name.isprintable() for name in names):
        raise ValueError(
            f"{whose} ({shown(' '.join(names))}) must be 2 to {IGNORED} different names: leave them out for numbers"
        )


def join(splits: Sequence[MaskedSplit]) -> MaskedSplit:
    """Several splits of a dataset as one.

    Raises:
        ValueError: an image is in two of them.
    """
    first = splits[0]
    for other in splits[1:]:
        refuse_unlike_or_shared(first, other)
        places = (*first.places, *(place for place in other.places if place not in first.places))
        first = MaskedSplit(
            f"{first.name}+{other.name}",
            datasets.concatenate_datasets([first.rows, other.rows]),
            [*first.names, *other.names],
            first.class_names,
            first.classes,
            first.ids,
            places,
            [*first.files, *other.files],
        )
    return first


def refuse_unlike_or_shared(split: MaskedSplit, other: MaskedSplit) -> None:
    """
    Raises:
        ValueError: a file is an image of both splits: one that is trained on and tested makes every number too good; or their
            classes are not the same.
    """
    if split.class_names != other.class_names:
        raise ValueError(
            f"splits {split.name!r} and {other.name!r} have other class names: write one {NAMES_FILE} for both of them"
        )
    names = {file.inode: name for file, name in zip(split.files, split.names, strict=False)}
    if shared := [file.inode for file in other.files if file.inode in names]:
        raise ValueError(
            f"splits {split.name!r} and {other.name!r} share {len(shared):,} images, for example {names[shared[0]]}: choose "
            "splits without common images"
        )


def _of_files(name: str, files: Files, pairs: Iterable[tuple[FoundFile, FoundFile]], **about: Any) -> MaskedSplit:
    pairs = list(pairs)
    if not pairs:
        raise ValueError(f"split {name!r} of {files.root} has no images: choose another")
    seen: dict[int, str] = {}
    for image, _ in pairs:
        if image.inode in seen:
            raise ValueError(
                f"split {name!r} of {files.root} has {image.path} twice, also as {seen[image.inode]}: remove one"
            )
        seen[image.inode] = image.path
    columns = {
        column: [{"bytes": None, "path": f"{files.root}/{pair[place].path}"} for pair in pairs]
        for place, column in enumerate(ROWS)
    }
    rows = datasets.Dataset.from_dict(columns, features=ROWS)
    images = [image for image, _ in pairs]
    return MaskedSplit(
        name, rows, [one_line(image.path) for image in images], places=files.places(), files=images, **about
    )


# VOC


def voc_splits(root: Path) -> dict[str, Path]:
    """The folder of each split of a VOCdevkit with masks, by names such as 2012_train; without a year where it has none.

    Args:
        root: the devkit, a folder around it, or the folder of a year. Empty for other folders.
    """
    found = {}
    for year in (root, *sorted(root.glob("VOC*")), *sorted(root.glob("VOCdevkit/VOC*"))):
        if (year / "JPEGImages").is_dir() and (year / "SegmentationClass").is_dir():
            named = VOC_YEAR.fullmatch(year.name)
            for path in sorted(year.glob("ImageSets/Segmentation/*.txt")):
                found[f"{named[1]}_{path.stem}" if named else path.stem] = year
    return found


def read_voc(name: str, files: Files) -> MaskedSplit:
    """A split of a VOCdevkit. Of one whose name ends in `aug` the masks are in SegmentationClassAug, as those of SBD are.

    The classes are VOC's, or those of classes.txt beside ImageSets: many other datasets are arranged so.

    Args:
        name: a key of `voc_splits`.
        files: of the folder that is its value.

    Raises:
        ValueError: an image or a mask of it is not there.
    """
    stem = re.sub(r"^\d{4}_", "", name)
    listed = files.read(f"ImageSets/Segmentation/{stem}.txt", MOST_LIST)
    folder = "SegmentationClassAug" if stem.endswith(AUGMENTED) else "SegmentationClass"
    owner, pairs = f"split {name!r}", []
    for line in filter(str.strip, listed.splitlines()):
        image, stem = voc_image(files, line, owner)
        pairs.append((image, files.image([f"{folder}/{stem}.png"], f"{owner}, the mask of {stem}")))
    return _of_files(name, files, pairs, class_names=_read_class_names(files) or [*VOC_CLASSES])


# Cityscapes


def cityscapes_splits(root: Path) -> list[str]:
    """The splits of a folder with leftImg8bit and gtFine; none for other folders."""
    if not (root / "gtFine").is_dir():
        return []
    return sorted(path.name for path in root.glob("leftImg8bit/*") if path.is_dir())


def read_cityscapes(name: str, files: Files) -> MaskedSplit:
    """A split of Cityscapes, with its 19 classes.

    Raises:
        ValueError: a mask is not there.
    """
    end, pairs = "_leftImg8bit.png", []
    for image in files.below(f"leftImg8bit/{name}/"):
        if image.path.endswith(end):
            mask = image.path.replace("leftImg8bit/", "gtFine/", 1).removesuffix(end) + "_gtFine_labelIds.png"
            pairs.append((image, files.image([mask], f"split {name!r}, the mask of {image.path}")))
    classes = np.full(256, IGNORED, np.uint8)
    classes[list(CITYSCAPES_CLASSES)] = np.arange(len(CITYSCAPES_CLASSES))
    return _of_files(
        name,
        files,
        pairs,
        class_names=[*CITYSCAPES_CLASSES.values()],
        classes=classes,
        ids=range(CITYSCAPES_IDS),
    )


# Pictures beside masks


def folder_splits(root: Path) -> dict[str, tuple[str, str]]:
    """The folders of images and of masks of each split, SPLIT/images and SPLIT/masks; none for other folders.

    Raises:
        ValueError: a split has two folders of either.
    """
    found = {}
    for split in sorted(path for path in root.iterdir() if path.is_dir()):
        below = {path.name.lower(): path.name for path in sorted(split.iterdir()) if path.is_dir()}
        images, masks = (sorted(below.keys() & kind) for kind in (OF_IMAGES, OF_MASKS))
        if images and masks:
            if len(images) + len(masks) > 2:
                several = ", ".join(below[name] for name in (images if len(images) > 1 else masks))
                raise ValueError(f"{split} has {several}, of which one is to be read: move the others away")
            found[split.name] = (f"{split.name}/{below[images[0]]}/", f"{split.name}/{below[masks[0]]}/")
    return found


def read_folder(name: str, files: Files, folders: tuple[str, str]) -> MaskedSplit:
    """A split of images and masks of the same names. classes.txt beside the splits may name the classes, one a line.

    Args:
        folders: value of `folder_splits`.

    Raises:
        ValueError: an image has no mask, a mask no image, two files one name, or a file is no image.
    """
    images, masks = (_by_stem(files, folder) for folder in folders)
    for some, others, word, other in ((images, masks, "image", "mask"), (masks, images, "mask", "image")):
        if alone := sorted(some.keys() - others.keys()):
            raise ValueError(
                f"{len(alone):,} of the {word}s of split {name!r} have no {other}, for example {shown(some[alone[0]].path)} in "
                f"{files.root}: add a file of the same name, or remove them"
            )
    pairs = ((images[stem], masks[stem]) for stem in sorted(images))
    return _of_files(name, files, pairs, class_names=_read_class_names(files))


def _read_class_names(files: Files) -> list[str] | None:
    """The lines of classes.txt; None without that file."""
    if NAMES_FILE not in files.found:
        return None
    names = [line.strip() for line in files.read(NAMES_FILE, MOST_LIST).splitlines() if line.strip()]
    check_class_names(names, f"the classes of {files.root / NAMES_FILE}")
    return names


def _by_stem(files: Files, folder: str) -> dict[str, FoundFile]:
    found: dict[str, FoundFile] = {}
    for file in files.below(folder):
        if file.path.rpartition("/")[2] in SYSTEM_FILES:  # nobody's
            continue
        stem, dot, extension = file.path.rpartition(".")
        if f"{dot}{extension}".lower() not in EXTENSIONS or file.size == NO_FILE:
            raise ValueError(f"{files.root / file.path} is no image: remove it from the images and masks")
        stem = stem.removeprefix(folder)
        if found.setdefault(stem, file) is not file:
            raise ValueError(f"{found[stem].path} and {file.path} in {files.root} have one name: rename one")
    return found


# Columns


def read_columns(
    name: str, rows: datasets.Dataset, *, image_column: str | None, mask_column: str | None
) -> MaskedSplit:
    """A split with a column of images and one of masks.

    Args:
        image_column: of the images. By default `image`, else the only one.
        mask_column: of the masks. By default the first image column of `MASK_COLUMNS`.

    Raises:
        ValueError: a column does not exist, or holds something else.
    """
    pictures = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    mask = mask_column or next((column for column in MASK_COLUMNS if column in pictures), None)
    if mask not in pictures:
        raise ValueError(
            f"mask_column ({mask!r}) is no column of images of split {name!r}: there are {', '.join(pictures) or 'none'}; "
            "masks are read from such a column, a VOCdevkit, Cityscapes, or SPLIT/images and SPLIT/masks"
        )
    others = {column: feature for column, feature in rows.features.items() if column != mask}
    image = find_image_column(name, datasets.Features(others), image_column)
    if not len(rows):
        raise ValueError(f"split {name!r} is empty: choose another")
    pairs = rows.select_columns([image, mask])
    for old, new in ((image, "image "), (mask, "mask "), ("image ", "image"), ("mask ", "mask")):  # they may be swapped
        pairs = pairs.rename_column(old, new)
    pairs = pairs.cast_column("image", ROWS["image"]).cast_column("mask", ROWS["mask"])
    return MaskedSplit(name, pairs, [f"row {number:,} of {name}" for number in range(len(rows))])
