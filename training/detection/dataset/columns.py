"""Datasets whose rows have a column of objects: on the Hub, in parquet files, or in the metadata of a folder of images.

The column has a struct of lists, or a list of structs, with `bbox`, a category, and perhaps `area`, `iscrowd`, `difficult` and
`segmentation`.
"""

from pathlib import Path
from typing import Any

import datasets

from ...data.folders import METADATA, arrange, use_metadata
from ...errors import shown
from ...transfer.source import Files, find_image_column
from .annotations import AnnotatedImage, AnnotatedSplit
from .layouts import split_of_files

CATEGORIES = ("category", "categories", "category_id", "label", "labels")
BOXES = ("bbox", "boxes", "bboxes")
MASKS = ("segmentation", "segmentations")
SIDES = ("width", "height")
ROWS_AT_A_TIME = 1000


def read_columns(
    name: str,
    rows: datasets.Dataset,
    *,
    image_column: str | None,
    objects_column: str,
    category_column: str | None,
    masks: bool,
) -> AnnotatedSplit:
    """A split with a column of objects.

    Args:
        name: of the split.
        rows: of the split.
        image_column: of the images. By default `image`, else the only one.
        objects_column: of the objects.
        category_column: name of the categories in it. By default the first of `CATEGORIES`.
        masks: whether to read the masks too.

    Raises:
        ValueError: a column does not exist, or holds something else.
    """
    if objects_column not in rows.features:
        raise ValueError(
            f"objects_column ({objects_column!r}) is not in split {name!r}: it has {', '.join(rows.features)}; boxes are read "
            "from such a column, a VOCdevkit, or COCO's instances_SPLIT.json"
        )
    image = find_image_column(name, rows.features, image_column)
    sides = [side for side in SIDES if _holds_numbers(rows.features.get(side))]
    sides = sides if len(sides) == len(SIDES) else []
    annotations: list[AnnotatedImage] = []
    for batch in rows.select_columns([objects_column, *sides]).iter(ROWS_AT_A_TIME):
        sizes = zip(*(batch[side] for side in sides), strict=True) if sides else [None] * len(batch[objects_column])
        for objects, size in zip(batch[objects_column], sizes, strict=True):
            image_name = f"row {len(annotations):,} of {name}"
            annotated = read_objects(objects, image_name, category_column, masks)
            annotated.size = size if size and all(isinstance(side, int) and side > 0 for side in size) else None
            annotations.append(annotated)
    if not annotations:
        raise ValueError(f"split {name!r} is empty: choose another")
    images = rows.cast_column(image, datasets.Image(decode=False)).select_columns([image])
    names = _class_names(rows.features[objects_column], category_column)
    return AnnotatedSplit(
        name, images.rename_column(image, "image") if image != "image" else images, annotations, names, None
    )


def _holds_numbers(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and "int" in feature.dtype


def _class_names(feature: Any, category_column: str | None) -> list[str] | None:
    """The names of a ClassLabel, whichever form the column has; None for other categories."""
    inner = getattr(feature, "feature", feature)  # of a list of structs
    if not isinstance(inner, dict):
        return None
    category = inner.get(category_column or next((name for name in CATEGORIES if name in inner), ""))
    category = getattr(category, "feature", category)  # of a struct of lists
    return list(category.names) if isinstance(category, datasets.ClassLabel) else None


def read_objects(objects: Any, name: str, category_column: str | None, masks: bool) -> AnnotatedImage:
    """What a row says about its objects.

    Args:
        objects: a dict of lists, a list of dicts, or None for no object.
        name: of the image in messages.
        category_column: name of the categories. By default the first of `CATEGORIES`.
        masks: whether to read the masks too.

    Raises:
        ValueError: it is none of these, or has no boxes, categories or masks.
    """
    image = AnnotatedImage(name, None, segmentations=[] if masks else None)
    columns = _as_columns(objects, name)
    if columns is None:
        return image
    image.boxes = _column(columns, BOXES, name)
    image.categories = _column(columns, (category_column,) if category_column else CATEGORIES, name)
    image.area, image.iscrowd, image.difficult = (columns.get(key) for key in ("area", "iscrowd", "difficult"))
    if masks:
        image.segmentations = _column(columns, MASKS, name)
    return image


def _as_columns(objects: Any, name: str) -> dict[str, Any] | None:
    """The lists of a struct; None without objects."""
    if isinstance(objects, list) and all(isinstance(one, dict) for one in objects):
        keys = {key for one in objects for key in one}
        objects = {key: [one.get(key) for one in objects] for key in keys}
    if not isinstance(objects, dict) and objects is not None:
        raise ValueError(
            f"the objects of {name} ({shown(objects)}) are neither a dict of lists nor a list of dicts: write them so"
        )
    if not objects or all(value is None or value == [] for value in objects.values()):
        return None
    return objects


def _column(columns: dict[str, Any], names: tuple[str, ...], image: str) -> list[Any]:
    found = next((columns[name] for name in names if isinstance(columns.get(name), list)), None)
    if found is None:
        raise ValueError(
            f"the objects of {image} have no list {' or '.join(names)}, only {', '.join(map(str, columns))}: rename one, or "
            "see --category_column and --masks"
        )
    return found


# A folder of images with metadata


def has_metadata(root: Path) -> bool:
    """Whether a folder, or one in it, has a metadata file."""
    return any(path.is_file() for name in METADATA for path in (root / name, *root.glob(f"*/{name}")))


def read_folder(
    files: Files, objects_column: str, category_column: str | None, masks: bool, asked: set[str]
) -> dict[str, AnnotatedSplit] | None:
    """The splits of a folder of images whose metadata has a column of objects; None where it has not.

    Args:
        asked: names of splits that the user gave.

    The others are those of `read_columns`.

    Raises:
        ValueError: the metadata cannot be read, or lists an image that is not there; or as `read_objects`.
    """
    folder = arrange(files.root, files.found.values(), asked)
    objects = use_metadata(folder, objects_column)
    if objects is None:
        return None
    splits = {}
    for name, images in folder.splits.items():
        if not images or images[0].path not in objects:  # a split of which the metadata lists nothing
            continue
        annotations = [read_objects(objects[image.path], image.path, category_column, masks) for image in images]
        splits[name] = split_of_files(name, files, images, annotations, None, None)
    return splits
