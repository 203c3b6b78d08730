"""Datasets of files with boxes: a VOCdevkit, and COCO's JSON with a folder of images."""

import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ...data.folders import FoundFile
from ...errors import one_line, shown
from ...transfer.source import Files, image_rows, voc_image
from .annotations import AnnotatedImage, AnnotatedSplit, parse_number

MOST_XML = 2**24  # bytes of the annotations of one image
MOST_JSON = 2**32  # bytes of those of a split: COCO's largest file has 2**29
VOC_YEAR = re.compile(r"VOC(\d{4})")
COCO_FILE = re.compile(r"instances_(.+)\.json")
COCO_BESIDE = "_annotations.coco.json"  # lies in the folder of each split


def split_of_files(
    name: str,
    files: Files,
    images: list[FoundFile],
    annotations: list[AnnotatedImage],
    names: list[str] | None,
    form: str | None,
) -> AnnotatedSplit:
    """A split whose images are files.

    Args:
        names: of the classes by number.
        form: "xywh" or "xyxy", if it is known.

    Raises:
        ValueError: it has no images, or one of them twice.
    """
    if not images:
        raise ValueError(f"split {name!r} of {files.root} has no images: choose another")
    seen: dict[int, str] = {}
    for file in images:
        if seen.setdefault(file.inode, file.path) != file.path:
            raise ValueError(
                f"{seen[file.inode]} and {file.path} in {files.root} are one file: remove one of these links"
            )
    if len(seen) < len(images):
        raise ValueError(f"split {name!r} of {files.root} lists an image twice: remove one of its lines")
    return AnnotatedSplit(name, image_rows(files.root, images), annotations, names, form, files.places(), images)


# VOC


def voc_splits(root: Path) -> dict[str, Path]:
    """The folder of each split of a VOCdevkit, by names such as 2007_trainval; without a year where its folder has none.

    Args:
        root: the devkit, a folder around it, or the folder of a year. Empty for other folders.
    """
    years = [root, *sorted(root.glob("VOC*")), *sorted(root.glob("VOCdevkit/VOC*"))]
    found = {}
    for year in years:
        if (year / "Annotations").is_dir() and (year / "JPEGImages").is_dir():
            named = VOC_YEAR.fullmatch(year.name)
            for path in sorted(year.glob("ImageSets/Main/*.txt")):
                if re.fullmatch(r"[^_+]+", path.stem):  # other files are of one class each: cat_train.txt
                    found[f"{named[1]}_{path.stem}" if named else path.stem] = year
    return found


def read_voc(name: str, files: Files) -> AnnotatedSplit:
    """A split of a VOCdevkit. Its pixels count from 1, and the last one is inside a box.

    Args:
        name: a key of `voc_splits`.
        files: of the folder that is its value.

    Raises:
        ValueError: a file of it is not there, or not as VOC writes it.
    """
    listed = files.read(f"ImageSets/Main/{name.rpartition('_')[2]}.txt", MOST_XML)
    images, annotations = [], []
    for line in filter(str.strip, listed.splitlines()):
        image, stem = voc_image(files, line, f"split {name!r}")
        images.append(image)
        path = f"Annotations/{stem}.xml"
        annotations.append(_read_xml(files.read(path, MOST_XML), image.path, files.root / path))
    return split_of_files(name, files, images, annotations, None, "xyxy")


def _read_xml(text: str, name: str, path: Path) -> AnnotatedImage:
    if "<!" in text.replace("<!--", ""):  # a document type may define entities that unpack to any size
        raise ValueError(f"{path} has a document type, which VOC's annotations have not: remove it")
    try:
        tree = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not XML ({one_line(error)}): bring it back") from error
    size = [int(parse_number(tree.findtext(f"size/{side}", "0"), f"{side} in {path}")) for side in ("width", "height")]
    image = AnnotatedImage(name, (size[0], size[1]) if min(size) > 0 else None, difficult=[])  # some tools write 0
    for one in tree.iter("object"):
        corners = [
            parse_number(one.findtext(f"bndbox/{side}"), f"{side} in {path}")
            for side in ("xmin", "ymin", "xmax", "ymax")
        ]
        image.boxes.append([corners[0] - 1, corners[1] - 1, corners[2], corners[3]])
        image.categories.append((one.findtext("name") or "").strip())
        assert image.difficult is not None
        image.difficult.append(int(parse_number(one.findtext("difficult") or 0, f"difficult in {path}")))
    return image


# COCO


def coco_splits(root: Path) -> dict[str, str]:
    """The JSON file of each split of a folder: instances_SPLIT.json, also in annotations/; SPLIT/_annotations.coco.json."""
    found = {}
    for path in sorted([*root.glob("instances_*.json"), *root.glob("annotations/instances_*.json")]):
        if named := COCO_FILE.fullmatch(path.name):
            found[named[1]] = path.relative_to(root).as_posix()
    for path in sorted(root.glob(f"*/{COCO_BESIDE}")):
        found.setdefault(path.parent.name, path.relative_to(root).as_posix())
    return found


def read_coco(name: str, files: Files, path: str, masks: bool) -> AnnotatedSplit:
    """A split of a folder with COCO's JSON. The images lie in SPLIT, images/SPLIT, images, or beside the file.

    Args:
        name: of the split.
        files: of the folder.
        path: of its JSON file below that.
        masks: whether to read the masks too.

    Raises:
        ValueError: the file or an image is not there, or not as COCO writes it.
    """
    where = files.root / path
    content = _read_json(files.read(path, MOST_JSON), where)
    names, numbers = _categories(content["categories"], where)
    images: list[FoundFile] = []
    annotations: list[AnnotatedImage] = []
    by_id: dict[Any, AnnotatedImage] = {}
    owner = f"split {name!r}"
    places = [f"{name}/", f"images/{name}/", "images/", f"{path.rpartition('/')[0]}/".removeprefix("/"), ""]
    for image in content["images"]:
        file_name = str(_value(image, "file_name", where))
        found = files.image(_candidates(file_name, places, files.root, where), owner)
        annotated = AnnotatedImage(
            found.path, _size(image, where), area=[], iscrowd=[], segmentations=[] if masks else None
        )
        if by_id.setdefault(_value(image, "id", where), annotated) is not annotated:
            raise ValueError(f"{where} has the image id {shown(image['id'])} twice: number the images")
        images.append(found)
        annotations.append(annotated)
    for one in content["annotations"]:
        _add_annotation(one, by_id, numbers, where)
    return split_of_files(name, files, images, annotations, names, "xywh")


def _candidates(file_name: str, places: list[str], root: Path, where: Path) -> Iterator[str]:
    """Where an image may lie: its name below each place as it stands, and as tools mean it that write `..` or `\\`."""
    name = file_name.replace("\\", "/")
    for whole in (root.as_posix(), root.absolute().as_posix()):
        name = name.removeprefix(f"{whole}/")
    if name.startswith("/"):
        real = Path(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        if real.is_relative_to(root.resolve()):  # by a link to the folder
            name = real.relative_to(root.resolve()).as_posix()
    if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
        raise ValueError(
            f"file_name ({shown(file_name)}) in {where} is an absolute path, and not below {root}: write it as a path below "
            "the folder of the images"
        )
    yield from (f"{place}{file_name}" for place in places)
    yield from (posixpath.normpath(f"{place}{name}") for place in places)


def _read_json(text: str, path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({one_line(error)}): bring it back") from error
    for name in ("images", "annotations", "categories"):
        part = content.get(name) if isinstance(content, dict) else None
        if not isinstance(part, list) or not all(isinstance(one, dict) for one in part):
            raise ValueError(f"{path} has no list {name!r} of objects: write it as COCO's instances files are")
    return content


def _value(one: dict[str, Any], name: str, path: Path) -> Any:
    value = one.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{path} has {shown(one)} with {name} {shown(value)}: it must be a number or a name")
    return value


def _size(image: dict[str, Any], path: Path) -> tuple[int, int] | None:
    size = [image.get(side) for side in ("width", "height")]
    if size == [None, None]:
        return None
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(
            f"{path} has {shown(image)} with width and height {shown(size)}: they must be numbers of pixels"
        )
    return size[0], size[1]  # type: ignore[return-value]


def _categories(categories: list[dict[str, Any]], path: Path) -> tuple[list[str], dict[Any, int]]:
    """The names in the order of their ids, and the class number of each id. detectron2 numbers them in that order too."""
    names = {_value(one, "id", path): str(_value(one, "name", path)) for one in categories}
    if len(names) < len(categories) or len({type(one) for one in names}) > 1:
        raise ValueError(f"{path} has categories with one id, or ids of two kinds: number them")
    order = sorted(names)
    return [names[one] for one in order], {one: place for place, one in enumerate(order)}


def _add_annotation(
    one: dict[str, Any], images: dict[Any, AnnotatedImage], numbers: dict[Any, int], path: Path
) -> None:
    image = images.get(_value(one, "image_id", path))
    if image is None:
        raise ValueError(f"{path} annotates the image {shown(one['image_id'])}, which is not in its list: add it")
    category = _value(one, "category_id", path)
    if category not in numbers:
        raise ValueError(
            f"category_id ({shown(category)}) of {image.name} is not in the categories of {path}: add it there"
        )
    image.boxes.append(one.get("bbox"))
    image.categories.append(numbers[category])
    assert image.area is not None
    assert image.iscrowd is not None
    image.area.append(one.get("area"))
    image.iscrowd.append(one.get("iscrowd", 0))
    if image.segmentations is not None:
        image.segmentations.append(one.get("segmentation"))
