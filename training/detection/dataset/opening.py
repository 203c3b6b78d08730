"""From the name of a dataset to splits of images with their objects.

No other module knows which form a dataset has. A dataset may be a stranger's: paths lead to files of its own folder alone,
images are decoded by the rules of `data/decode.py`, and what cannot be right is refused in one line.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np

from modeling_moco.distributed_moco import rank

from ...data.decode import Decoder, Unreadable
from ...data.sources import LOOKED_AT, SourceArguments
from ...errors import DataError
from ...transfer.source import Source, find_eval_split, identify, look_at_all
from .annotations import (
    AmbiguousBoxesError,
    AnnotatedSplit,
    check_objects,
    find_bbox_format,
    find_classes,
    join,
    refuse_shared_images,
)
from .columns import has_metadata, read_columns, read_folder
from .layouts import coco_splits, read_coco, read_voc, voc_splits
from .objects import PackedObjects, is_empty

VOC_EVAL_SPLITS = ("2007_test",)


@dataclass
class DetectionDataArguments(SourceArguments):
    """Flags of a command that reads images with boxes."""

    NOT_OFFERED = ("label_column",)

    train_split: str = field(
        default="train", metadata={"help": "Split to train on; several with +, as in 2007_trainval+2012_trainval."}
    )
    objects_column: str = field(default="objects", metadata={"help": "Column of the boxes and categories."})
    category_column: str | None = field(
        default=None,
        metadata={"help": "Name of the categories in that column. By default category, or a similar name."},
    )
    bbox_format: Literal["auto", "xywh", "xyxy"] = field(
        default="auto",
        metadata={
            "help": "Numbers of a box in that column: left, top, width, height (xywh), or left, top, right, bottom (xyxy). By "
            "default what all boxes allow."
        },
    )
    masks: bool = field(default=False, metadata={"help": "Read masks too: RLE or polygons, as COCO has them."})


@dataclass(frozen=True)
class DetectionSplit:
    """Images of a split with their objects.

    Args:
        name: of the split.
        rows: a column `image` with bytes or paths.
        sizes: width and height of each image (n, 2).
        names: of the images in messages.
        objects: of each image.
        digests: of the images, as of `identify` (n,).
        decoder: of the images.
        broken: keeps the images that cannot be read.
    """

    name: str
    rows: datasets.Dataset
    sizes: np.ndarray
    names: list[str]
    objects: PackedObjects
    digests: np.ndarray
    decoder: Decoder
    broken: Unreadable

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Any:
        """The decoded image, RGB.

        Raises:
            OSError: it cannot be read.
            DataError: it has another size than when the split was opened, so that its boxes would be elsewhere.
        """
        image = self.decoder.image(self.rows[index]["image"])
        if image.size != (size := tuple(self.sizes[index].tolist())):
            raise DataError(_of_another_size(self.names[index], image.size, size))
        return image

    def select(self, indices: Sequence[int]) -> "DetectionSplit":
        """The split with these images alone."""
        objects = self.objects.select(indices)
        names = [self.names[i] for i in indices]
        broken = Unreadable(len(indices), self.broken.split)
        kept = np.asarray(indices, np.int64)
        sizes, digests = self.sizes[kept], self.digests[kept]
        return DetectionSplit(
            self.name, self.rows.select(indices), sizes, names, objects, digests, self.decoder, broken
        )

    def content(self) -> str:
        """Number of images and a digest of them and their objects: whether a run goes on with what it was begun with."""
        digest = hashlib.sha256("\n".join(self.names).encode(errors="replace"))
        for numbers in (self.sizes, self.digests):
            digest.update(np.ascontiguousarray(numbers, "<i8").tobytes())  # the same on every machine
        self.objects.update(digest)
        return f"{len(self):,} images {digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class DetectionSplits:
    """What a detector is trained on and evaluated on.

    Args:
        train: images with at least one object to learn from; None where only an evaluation was asked for.
        eval: all images of the split to evaluate on; None without such a split.
        class_names: by class number.
        difficult: whether any object of the evaluated split is marked difficult, for which VOC's metric is made.
        place: "dataset", its name or absolute path, and "content", which identifies both splits.
    """

    train: DetectionSplit | None
    eval: DetectionSplit | None
    class_names: list[str]
    difficult: bool
    place: dict[str, Any]


def load_detection(
    args: DetectionDataArguments, class_names: Sequence[str] | None = None, training: bool = True
) -> DetectionSplits:
    """Open a dataset with boxes. Of several processes each reads the headers of its share of the images.

    Args:
        args: where it is.
        class_names: of a detector that is evaluated; by default those of the train split.
        training: whether the train split is used. Without, and with `class_names`, it is read only where the boxes to evaluate
            on do not tell their format.

    Raises:
        ValueError: the dataset, a split, a column or an image does not exist; a split has no objects; an object is not what it
            should be; or the two splits share images.
    """
    source = _Source(args)
    eval_split = find_eval_split(source.names, args, training, VOC_EVAL_SPLITS)
    needed = [args.train_split] if training or class_names is None else []
    opened = [source.read(name) for name in (*needed, *([eval_split] if eval_split else []))]
    if not opened:
        raise ValueError(
            f"{args.dataset_name} has no split to evaluate on, only {', '.join(source.names)}: see --eval_split"
        )
    train, evaluation = (opened[0] if needed else None), (opened[-1] if eval_split else None)
    if train is not None and evaluation is not None:
        refuse_shared_images(train, evaluation)
    names = find_classes(opened[0], opened[1:], class_names)
    limits = [*([args.max_train_samples] if needed else []), *([args.max_eval_samples] if eval_split else [])]
    readable = [_measure(split, limit, args) for split, limit in zip(opened, limits, strict=True)]
    bbox_format = opened[0].bbox_format or (args.bbox_format if args.bbox_format != "auto" else None)
    bbox_format = bbox_format or _find_format(source, readable, args)
    checked = [_check(part, names, bbox_format, args) for part in readable]
    totals = [len(split.annotations) for split in opened]
    content = source.same_content(
        {
            split.name: (split.content(), limit is not None and limit < total)
            for split, limit, total in zip(checked, limits, totals, strict=True)
        }
    )
    for split in checked:
        _say(split, args)
    splits = DetectionSplits(
        _for_training(checked[0], args) if training else None,
        checked[-1] if eval_split else None,
        names,
        bool(eval_split) and bool(checked[-1].objects.every.difficult.any()),
        {"dataset": args.dataset_name, "content": content},
    )
    for used in (splits.train, splits.eval):
        if used is not None:
            _look_at_images(used)
    return splits


def _of_another_size(name: str, size: tuple[int, int], stated: tuple[int, int]) -> str:
    return (
        f"{name} has {size[0]} x {size[1]} pixels (upright, as its EXIF tag turns it), and its annotations are of "
        f"{stated[0]} x {stated[1]}: correct them"
    )


class _Source(Source):
    FORMS = "VOCdevkit, COCO (instances_SPLIT.json), metadata with a column of objects"
    args: DetectionDataArguments

    def __init__(self, args: DetectionDataArguments):
        super().__init__(args)
        self.voc = voc_splits(self.root) if self.local else {}
        self.coco = coco_splits(self.root) if self.local and not self.voc else {}
        self.folder: dict[str, AnnotatedSplit] = {}
        if not self.voc and not self.coco:
            if self.local and has_metadata(self.root):
                files = self.files_of(self.root)
                found = read_folder(files, args.objects_column, args.category_column, args.masks, self.asked)
                self.folder = found or {}
            if not self.folder:
                self.open_columns()
        self.names = list(self.voc or self.coco or self.folder or self.columns)

    def read(self, name: str) -> AnnotatedSplit:
        """A split, or several with +."""
        return join([self._read(part) for part in self.parts(name)])

    def _read(self, name: str) -> AnnotatedSplit:
        args = self.args
        if self.voc:
            if args.masks:
                raise ValueError(
                    f"masks are not read from the VOCdevkit {args.dataset_name}: use COCO's JSON, or leave --masks out"
                )
            return read_voc(name, self.files_of(self.voc[name]))
        if self.coco:
            return read_coco(name, self.files_of(self.root), self.coco[name], args.masks)
        if self.folder:
            return self.folder[name]
        split = read_columns(
            name,
            self.columns[name],
            image_column=args.image_column,
            objects_column=args.objects_column,
            category_column=args.category_column,
            masks=args.masks,
        )
        split.places = self.places
        return split


class _Measured(NamedTuple):
    """The images of a split whose size is known, their sizes and digests (n,), and the decoder of them."""

    split: AnnotatedSplit
    sizes: list[tuple[int, int]]
    digests: list[int]
    decoder: Decoder


def _measure(split: AnnotatedSplit, limit: int | None, args: DetectionDataArguments) -> _Measured:
    """The images whose size is known, or can be read; the others are named and left out.

    Raises:
        ValueError: an image has another size than its annotations say, or none can be read.
    """
    decoder = Decoder(args.max_image_pixels, split.places)
    count = min(len(split.annotations), limit or len(split.annotations))
    headers = look_at_all(lambda number: _read_header(split, decoder, number), count, f"images of {split.name}")
    _refuse_other_sizes(split, headers)
    broken = Unreadable(count, split.name)
    kept, sizes = [], []
    for number, (image, header) in enumerate(zip(split.annotations, headers, strict=False)):
        if image.size is None and isinstance(header.size, OSError):
            broken.add(split.images[number], number, header.size)
        else:
            kept.append(number)
            sizes.append(image.size or header.size)
    if not kept:
        raise ValueError(f"no image of split {split.name!r} of {args.dataset_name} can be read: check the files")
    if len(kept) < len(split.annotations):
        split = replace(
            split,
            images=split.images.select(kept),
            annotations=[split.annotations[number] for number in kept],
            files=[split.files[number] for number in kept] if split.files else [],
        )
    return _Measured(split, sizes, [headers[number].digest for number in kept], decoder)


def _find_format(source: _Source, splits: list[_Measured], args: DetectionDataArguments) -> str:
    """As `find_bbox_format`. Where these splits do not tell, those that the model was trained with are looked at too."""
    try:
        return find_bbox_format([part.split for part in splits], [part.sizes for part in splits])
    except AmbiguousBoxesError:
        known = {part.split.name for part in splits}
        others = [
            _measure(source.read(name), args.max_train_samples if name == args.train_split else None, args)
            for name in args.content or [args.train_split]
            if name not in known and set(name.split("+")) <= set(source.names)
        ]
        if not others:
            raise
    return find_bbox_format([part.split for part in (*others, *splits)], [part.sizes for part in (*others, *splits)])


class _Header(NamedTuple):
    """Width and height of an image, or why they cannot be read; and its digest, as of `identify`."""

    size: Any
    digest: int


def _read_header(split: AnnotatedSplit, decoder: Decoder, number: int) -> _Header:
    row = split.images[number]["image"]
    digest = identify(row, split.files[number] if split.files else None)
    try:
        return _Header(decoder.size(row), digest)
    except OSError as error:
        return _Header(error, digest)


def _refuse_other_sizes(split: AnnotatedSplit, headers: Sequence[_Header]) -> None:
    wrong = [
        _of_another_size(image.name, header.size, image.size)
        for image, header in zip(split.annotations, headers, strict=False)
        if image.size is not None and not isinstance(header.size, OSError) and header.size != image.size
    ]
    if wrong:
        more = f" ({len(wrong):,} images of split {split.name!r} have another size)" if len(wrong) > 1 else ""
        raise ValueError(wrong[0] + more)


def _check(measured: _Measured, names: list[str], bbox_format: str, args: DetectionDataArguments) -> DetectionSplit:
    split, sizes = measured.split, measured.sizes
    images = zip(split.annotations, sizes, strict=True)
    objects = PackedObjects(check_objects(image, size, names, bbox_format) for image, size in images)
    if not len(objects.every):
        raise ValueError(f"split {split.name!r} of {args.dataset_name} has no objects: choose another")
    image_names = [image.name for image in split.annotations]
    return DetectionSplit(
        split.name,
        split.images,
        np.array(sizes),
        image_names,
        objects,
        np.array(measured.digests),
        measured.decoder,
        Unreadable(len(image_names), split.name),
    )


def _look_at_images(split: DetectionSplit) -> None:
    """Decode some images before anything is trained.

    Raises:
        ValueError: none can be read.
    """
    looked_at = sorted({i * len(split) // LOOKED_AT for i in range(LOOKED_AT)})
    errors = []
    for index in looked_at:
        try:
            split.image(index)
        except OSError as error:
            errors.append(error)
            split.broken.add(split.rows[index], index, error)
    if len(errors) == len(looked_at):
        raise ValueError(
            f"none of the {len(errors)} images looked at in split {split.name!r} can be read ({errors[0]}): check the files"
        )


def _say(split: DetectionSplit, args: DetectionDataArguments) -> None:
    if rank() > 0:
        return
    every = split.objects.every
    text = f"{args.dataset_name}: {split.name} has {len(every):,} objects in {len(split):,} images"
    for what, flags in (("crowds", every.iscrowd), ("difficult", every.difficult)):
        if flags.any():
            text += f", {int(flags.sum()):,} {what}"
    print(text)
    empty = np.flatnonzero(is_empty(every.boxes))
    if len(empty):
        name = split.names[split.objects.image_of(int(empty[0]))]
        print(
            f"warning: {len(empty):,} boxes of {split.name} are empty, for example {every.boxes[empty[0]].tolist()} of {name}: "
            "no detector learns from them"
        )


def _for_training(split: DetectionSplit, args: DetectionDataArguments) -> DetectionSplit:
    """The images with objects to learn from. detectron2 leaves the others out too."""
    kept = np.flatnonzero(split.objects.count(split.objects.every.trainable())).tolist()
    if not kept:
        raise ValueError(f"split {split.name!r} of {args.dataset_name} has no objects to learn from: choose another")
    if len(kept) == len(split):
        return split
    if rank() == 0:
        print(
            f"{args.dataset_name}: {len(split) - len(kept):,} images of {split.name} without objects are left out of training"
        )
    return split.select(kept)
