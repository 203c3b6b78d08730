"""From what files and columns say about the objects of images to checked `Objects`. What cannot be right is one line."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from ...data.folders import FoundFile
from ...errors import one_line, shown
from . import masks
from .objects import Objects, is_empty

LARGEST = 2.0**31  # number of a box; no image has as many pixels
OVER_THE_BORDER = 1.0  # pixels that a rounded box may reach over it, where the format of the boxes is found out
FORMATS = ("xywh", "xyxy")
Box = Sequence[float]


@dataclass
class AnnotatedImage:
    """What a dataset says about an image, unchecked.

    Args:
        name: of the image in messages.
        size: width and height in pixels; None where the image's header has to tell.
        boxes: four numbers of each object.
        categories: class numbers or names.
        area: of each object in square pixels; None, of one or of all, for the area of its mask, or else of its box.
        iscrowd, difficult: of each object; None for no object.
        segmentations: an RLE or polygons of each object; None without masks.
    """

    name: str
    size: tuple[int, int] | None
    boxes: list[Any] = field(default_factory=list)
    categories: list[Any] = field(default_factory=list)
    area: list[Any] | None = None
    iscrowd: list[Any] | None = None
    difficult: list[Any] | None = None
    segmentations: list[Any] | None = None


@dataclass
class AnnotatedSplit:
    """The images of a split with what their dataset says about them.

    Args:
        name: of the split.
        images: a column `image` with bytes or paths, a row for each of `annotations`.
        annotations: in the same order.
        class_names: by class number, where the categories are numbers; None otherwise.
        bbox_format: "xywh" or "xyxy"; None where it has to be found out.
        places: see `Decoder`.
        files: of the images; empty where they are no files.
    """

    name: str
    images: datasets.Dataset
    annotations: list[AnnotatedImage]
    class_names: list[str] | None
    bbox_format: str | None
    places: tuple[str, ...] = ()
    files: list[FoundFile] = field(default_factory=list)


def join(splits: Sequence[AnnotatedSplit]) -> AnnotatedSplit:
    """Several splits of a dataset as one.

    Raises:
        ValueError: an image is in two of them, or their classes differ.
    """
    first = splits[0]
    for other in splits[1:]:
        refuse_shared_images(first, other)
        if other.class_names != first.class_names:
            raise ValueError(
                f"splits {first.name!r} and {other.name!r} have other classes: write both with the same ones in one order"
            )
        first = AnnotatedSplit(
            f"{first.name}+{other.name}",
            datasets.concatenate_datasets([first.images, other.images]),
            [*first.annotations, *other.annotations],
            first.class_names,
            first.bbox_format,
            (*first.places, *(place for place in other.places if place not in first.places)),
            [*first.files, *other.files],
        )
    return first


def refuse_shared_images(split: AnnotatedSplit, other: AnnotatedSplit) -> None:
    """
    Raises:
        ValueError: a file is an image of both splits: one that is trained on and tested makes every number too good.
    """
    names = {file.inode: one.name for file, one in zip(split.files, split.annotations, strict=False)}
    shared = [file.inode for file in other.files if file.inode in names]
    if shared:
        raise ValueError(
            f"splits {split.name!r} and {other.name!r} share {len(shared):,} images, for example {names[shared[0]]}: choose "
            "splits without common images"
        )


def find_classes(
    train: AnnotatedSplit, others: Sequence[AnnotatedSplit], known: Sequence[str] | None = None
) -> list[str]:
    """The names of the classes by their numbers: those of the train split.

    Args:
        others: splits to evaluate on, which may have no other classes.
        known: the classes of a detector that is evaluated; by default those of the data.

    Raises:
        ValueError: a split has other classes.
    """
    names = list(known) if known is not None else train.class_names
    if names is None:
        used = {category for image in train.annotations for category in image.categories}
        if all(isinstance(one, str) for one in used):
            names = sorted(used)
        elif all(_is_number(one) for one in used):
            names = [str(number) for number in range(max(used) + 1)]
        else:
            odd = next(one for one in used if not isinstance(one, str) and not _is_number(one))
            raise ValueError(
                f"category ({shown(odd)}) of split {train.name!r} is neither a name nor a number from 0: correct it"
            )
    for split in (train, *others):
        if split.class_names is not None and split.class_names != names:
            raise ValueError(
                f"split {split.name!r} has the classes {shown(split.class_names)} and not {shown(names)}: write all splits "
                "with the same classes in the same order"
            )
    if not names:
        raise ValueError(f"split {train.name!r} has no objects: choose another with --train_split")
    if known is None:
        _refuse_odd_names(names, train.name)
    return names


def _refuse_odd_names(names: Sequence[str], split: str) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(
                f"classes {names.index(name)} and {number} of split {split!r} are both called {shown(name)}: give each its own "
                "name"
            )
        if not name.strip() or not name.isprintable():
            raise ValueError(
                f"class {number} of split {split!r} is called {shown(name)!r}, which is no name: give it one"
            )


def _is_number(category: Any) -> bool:
    return isinstance(category, int) and not isinstance(category, bool) and category >= 0


class AmbiguousBoxesError(ValueError):
    """All boxes may be read in two ways. Those of other splits may tell."""


def find_bbox_format(splits: Iterable[AnnotatedSplit], sizes: Iterable[Sequence[tuple[int, int]]]) -> str:
    """Whether boxes are (left, top, width, height), "xywh", or (left, top, right, bottom), "xyxy".

    Args:
        splits: of one dataset.
        sizes: width and height of each image of each split.

    Raises:
        AmbiguousBoxesError: all boxes may be both.
        ValueError: some can be neither, or they are no pixels.
    """
    possible = dict.fromkeys(FORMATS, True)
    example, largest = "", 0.0
    for split, known in zip(splits, sizes, strict=True):
        for image, size in zip(split.annotations, known, strict=True):
            boxes = _numbers(image)
            largest = max(largest, float(boxes.max(initial=0)))
            fits = {name: _fits(_corners(boxes, name), size) for name in FORMATS}
            if not example and (neither := ~(fits["xywh"] | fits["xyxy"])).any():
                example = f"box {boxes[neither][0].tolist()} of {image.name}, {size[0]} x {size[1]} pixels"
            for name in FORMATS:
                possible[name] &= bool(fits[name].all())
    if 0 < largest <= 1:
        raise ValueError(
            f"boxes have no number above {largest}, so they seem to be fractions of the image: write pixels"
        )
    found = [name for name in FORMATS if possible[name]]
    if len(found) == 1:
        return found[0]
    if found:
        raise AmbiguousBoxesError(
            "boxes may be left, top, width, height or left, top, right, bottom: pass --bbox_format xywh or xyxy"
        )
    raise ValueError(
        f"boxes are neither all left, top, width, height nor all left, top, right, bottom inside their images"
        f"{f' ({example})' if example else ''}: correct them, or pass --bbox_format xywh or xyxy, which cuts them at the border"
    )


def _fits(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which boxes (n, 4) lie in the image and have their corners in order (n,)."""
    low, high = corners[:, :2], corners[:, 2:]
    inside = (low >= -OVER_THE_BORDER) & (high <= np.array(size) + OVER_THE_BORDER) & (low <= high)
    return np.asarray(inside.all(1))


def _corners(boxes: np.ndarray, bbox_format: str) -> np.ndarray:
    if bbox_format == "xyxy":
        return boxes
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _numbers(image: AnnotatedImage) -> np.ndarray:
    """The boxes of an image (n, 4), as they are written."""
    try:
        boxes = np.array(image.boxes, np.float64).reshape(len(image.boxes), -1)
    except (TypeError, ValueError):
        boxes = np.full((len(image.boxes), 4), np.nan)
    if len(boxes) and (boxes.shape[1] != 4 or not (np.abs(boxes) < LARGEST).all()):
        wrong = next((one for one in image.boxes if not _is_box(one)), image.boxes)
        raise ValueError(f"box ({shown(wrong)}) of {image.name} is not four finite numbers: correct or remove it")
    return boxes.reshape(-1, 4)


def _is_box(box: Any) -> bool:
    try:
        numbers = np.array(box, np.float64)
    except (TypeError, ValueError):
        return False
    return numbers.shape == (4,) and bool((np.abs(numbers) < LARGEST).all())


def check_objects(
    image: AnnotatedImage, size: tuple[int, int], class_names: Sequence[str], bbox_format: str
) -> Objects:
    """The objects of an image.

    Args:
        size: width and height of the image in pixels.
        class_names: by class number.
        bbox_format: "xywh" or "xyxy".

    Raises:
        ValueError: a column has another length than the boxes; a box is outside the image, or its corners are swapped; a
            category is unknown; or a mask is none, or of another size.
    """
    boxes = _corners(_numbers(image), bbox_format)
    _refuse_wrong_boxes(image, boxes, size)
    for name in ("categories", "area", "iscrowd", "difficult", "segmentations"):
        column = getattr(image, name)
        if column is not None and (not isinstance(column, list) or len(column) != len(boxes)):
            count = len(column) if isinstance(column, list) else shown(column)
            raise ValueError(f"{image.name} has {len(boxes)} boxes and {count} of {name}: give one to each object")
    segmentations = None if image.segmentations is None else [_mask(one, image, size) for one in image.segmentations]
    return Objects(
        boxes,
        _class_numbers(image, class_names),
        _areas(image, boxes, segmentations),
        _flags(image, "iscrowd"),
        _flags(image, "difficult"),
        segmentations,
    )


def _refuse_wrong_boxes(image: AnnotatedImage, boxes: np.ndarray, size: tuple[int, int]) -> None:
    width, height = size
    swapped = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if swapped.any():
        raise ValueError(
            f"box {boxes[swapped][0].tolist()} (left, top, right, bottom) of {image.name} has its corners swapped: correct it, "
            "or see --bbox_format"
        )
    outside = (boxes[:, :2] >= [width, height]).any(1) | (boxes[:, 2:] <= 0).any(1)
    outside &= ~is_empty(boxes)
    if outside.any():
        raise ValueError(
            f"box {boxes[outside][0].tolist()} (left, top, right, bottom) of {image.name} is outside of its {width} x {height} "
            "pixels: correct or remove it, or see --bbox_format"
        )


def _mask(mask: Any, image: AnnotatedImage, size: tuple[int, int]) -> Any:
    try:
        return masks.check_segmentation(mask, *size)
    except ValueError as error:
        raise ValueError(f"{error} ({image.name}): write masks of the whole image") from error


def _class_numbers(image: AnnotatedImage, class_names: Sequence[str]) -> np.ndarray:
    numbers = {name: number for number, name in enumerate(class_names)}
    found = []
    for category in image.categories:
        number = numbers.get(category, -1) if isinstance(category, str) else category
        if not _is_number(number) or number >= len(class_names):
            raise ValueError(
                f"category ({shown(category)}) of {image.name} is not one of the {len(class_names)} classes "
                f"{shown(list(class_names))}: correct it, or choose other splits"
            )
        found.append(number)
    return np.array(found, np.int64)


def _areas(image: AnnotatedImage, boxes: np.ndarray, segmentations: list[Any] | None) -> np.ndarray:
    of_boxes = (boxes[:, 2:] - boxes[:, :2]).prod(1).tolist()
    found = []
    for place, stated in enumerate(image.area or [None] * len(boxes)):
        if stated is not None:
            found.append(parse_number(stated, f"area of {image.name}"))
            if not 0 <= found[-1] < LARGEST**2:  # COCO's metric would ignore the object without a word
                raise ValueError(
                    f"area ({shown(stated)}) of {image.name} is no number of square pixels: correct or remove it"
                )
        else:
            found.append(of_boxes[place] if segmentations is None else masks.area(segmentations[place]))
    return np.array(found, np.float64)


def _flags(image: AnnotatedImage, name: str) -> np.ndarray:
    values = getattr(image, name)
    if values is None:
        return np.zeros(len(image.boxes), bool)
    if any(value not in (0, 1, None) for value in values):
        raise ValueError(f"{name} ({shown(values)}) of {image.name} is not 0 or 1 for each object: correct it")
    return np.array([bool(value) for value in values], bool)


def parse_number(text: Any, what: str) -> float:
    """A number of a file.

    Args:
        what: names it in the message.

    Raises:
        ValueError: it is none.
    """
    try:
        return float(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} ({one_line(shown(text))}) is not a number: correct it") from error
