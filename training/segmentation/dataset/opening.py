"""From the name of a dataset to splits of images with masks, checked before anything is trained.

No other module knows which form a dataset has. Every mask is decoded once: its size, its classes and a digest are known then. A
dataset may be a stranger's: paths lead to files of its own folder alone, and what cannot be right is refused in one line.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, NamedTuple

import datasets
import numpy as np

from modeling_moco.distributed_moco import rank

from ...data.decode import Decoder, Unreadable
from ...data.sources import SourceArguments
from ...errors import DataError, one_line, shown
from ...transfer.source import Source, find_eval_split, identify, look_at_all
from .layouts import (
    IGNORED,
    MaskedSplit,
    check_class_names,
    cityscapes_splits,
    folder_splits,
    join,
    read_cityscapes,
    read_columns,
    read_folder,
    read_voc,
    refuse_unlike_or_shared,
    voc_splits,
)

VOC_EVAL_SPLITS = ("2012_val",)


@dataclass
class SegmentationDataArguments(SourceArguments):
    """Flags of a command that reads images with masks."""

    NOT_OFFERED = ("label_column",)

    train_split: str = field(
        default="train", metadata={"help": "Split to train on; several with +, as in train+validation."}
    )
    mask_column: str | None = field(
        default=None, metadata={"help": "Column of the masks. By default mask, annotation, label, or a similar name."}
    )
    class_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the classes 0, 1, ... By default those of VOC or Cityscapes, of classes.txt in the folder, or "
            "the numbers that the train split has. Pixels of class 255 count nowhere."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.class_names is not None:
            check_class_names(self.class_names, "class_names")


@dataclass(frozen=True)
class SegmentationSplit:
    """Images of a split with their masks.

    Args:
        name: of the split.
        rows: columns `image` and `mask` with bytes or paths.
        names: of the images in messages.
        sizes: width and height of each image (n, 2).
        pixels: of each image and class (n, L), int64, without those that count nowhere.
        digests: of each image, as of `identify`, and of its mask (n, 2).
        classes: the class of each number in a mask, uint8 (256,).
        decoder: of the images and masks.
        broken: keeps the images that cannot be read.
    """

    name: str
    rows: datasets.Dataset
    names: list[str]
    sizes: np.ndarray
    pixels: np.ndarray
    digests: np.ndarray
    classes: np.ndarray
    decoder: Decoder
    broken: Unreadable

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Any:
        """The decoded image, RGB.

        Raises:
            OSError: it cannot be read.
            DataError: it has another size than when the split was opened, so that its mask would be elsewhere.
        """
        image = self.decoder.image(self.rows[index]["image"])
        if image.size != (size := tuple(self.sizes[index].tolist())):
            raise DataError(
                f"{self.names[index]} has {image.size[0]} x {image.size[1]} pixels, and had {size[0]} x {size[1]} when the "
                "split was opened: bring its file back"
            )
        return image

    def mask(self, index: int) -> np.ndarray:
        """The class of each pixel, uint8 (H, W); 255 counts nowhere.

        Raises:
            DataError: it cannot be read, or is not the one with which the split was opened.
        """
        try:
            mask = self.decoder.mask(self.rows[index]["mask"])
        except OSError as error:
            raise DataError(
                f"the mask of {self.names[index]} cannot be read ({one_line(error)}): bring its file back"
            ) from error
        if (
            mask.shape[::-1] != tuple(self.sizes[index].tolist())
            or zlib.crc32(mask.tobytes()) != self.digests[index, 1]
        ):
            raise DataError(
                f"the mask of {self.names[index]} is not the one with which the split was opened: bring its file back"
            )
        return np.asarray(self.classes[mask])

    def select(self, indices: Sequence[int]) -> "SegmentationSplit":
        """The split with these images alone."""
        kept = np.asarray(indices, np.int64)
        return SegmentationSplit(
            self.name,
            self.rows.select(indices),
            [self.names[i] for i in indices],
            self.sizes[kept],
            self.pixels[kept],
            self.digests[kept],
            self.classes,
            self.decoder,
            Unreadable(len(kept), self.broken.split),
        )

    def content(self) -> str:
        """Number of images and a digest of them and their masks: whether a run goes on with what it was begun with."""
        digest = hashlib.sha256("\n".join(self.names).encode(errors="replace"))
        for numbers in (self.sizes, self.pixels, self.digests):
            digest.update(np.ascontiguousarray(numbers, "<i8").tobytes())  # the same on every machine
        return f"{len(self):,} images {digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class SegmentationSplits:
    """What a model is trained on and evaluated on.

    Args:
        train: images with at least one pixel that counts; None where only an evaluation was asked for.
        eval: all images of the split to evaluate on; None without such a split.
        class_names: by class number.
        place: "dataset", its name or absolute path, and "content", which identifies both splits.
    """

    train: SegmentationSplit | None
    eval: SegmentationSplit | None
    class_names: list[str]
    place: dict[str, Any]


def load_segmentation(
    args: SegmentationDataArguments, class_names: Sequence[str] | None = None, training: bool = True
) -> SegmentationSplits:
    """Open a dataset with masks. Of several processes each looks at its share of the masks.

    Args:
        args: where it is.
        class_names: of a model that is evaluated; by default those of the data.
        training: whether the train split is used. Without, and with `class_names`, it is not read.

    Raises:
        ValueError: the dataset, a split, a column, an image or a mask does not exist; a mask has another size than its image,
            or a class that is not there; a split has nothing that counts, or 255 for its foreground; the data or `args` name
            other classes than the model; or the two splits share images.
    """
    source = _Source(args)
    eval_split = find_eval_split(source.names, args, training, VOC_EVAL_SPLITS)
    needed = [args.train_split] if training or class_names is None else []
    opened = [source.read(name) for name in (*needed, *([eval_split] if eval_split else []))]
    if not opened:
        raise ValueError(
            f"{args.dataset_name} has no split to evaluate on, only {', '.join(source.names)}: see --eval_split"
        )
    if len(opened) == 2:
        refuse_unlike_or_shared(*opened)
    if class_names is not None:
        _refuse_other_classes(opened, class_names, args)
    limits = [*([args.max_train_samples] if needed else []), *([args.max_eval_samples] if eval_split else [])]
    looked_at = [_look_at(split, limit, args) for split, limit in zip(opened, limits, strict=True)]
    names = _find_classes(looked_at[0], opened[0].class_names, args) if class_names is None else list(class_names)
    checked = [_check(split, names, args) for split in looked_at]
    totals = [len(split.rows) for split in opened]
    content = source.same_content(
        {
            split.name: (split.content(), limit is not None and limit < total)
            for split, limit, total in zip(checked, limits, totals, strict=True)
        }
    )
    train = _for_training(checked[0], names, args) if training else None
    for split in checked:
        _say(split, names, args)
    place = {"dataset": args.dataset_name, "content": content}
    return SegmentationSplits(train, checked[-1] if eval_split else None, names, place)


class _Source(Source):
    FORMS = "VOCdevkit, Cityscapes, SPLIT/images and SPLIT/masks"
    args: SegmentationDataArguments

    def __init__(self, args: SegmentationDataArguments):
        super().__init__(args)
        self.voc = voc_splits(self.root) if self.local else {}
        self.cityscapes = cityscapes_splits(self.root) if self.local else []
        self.folder = folder_splits(self.root) if self.local else {}
        if not (self.voc or self.cityscapes or self.folder):
            self.open_columns()
        self.names = list(self.voc or self.cityscapes or self.folder or self.columns)

    def read(self, name: str) -> MaskedSplit:
        """A split, or several with +."""
        return join([self._read(part) for part in self.parts(name)])

    def _read(self, name: str) -> MaskedSplit:
        if self.voc:
            return read_voc(name, self.files_of(self.voc[name]))
        if self.cityscapes:
            return read_cityscapes(name, self.files_of(self.root))
        if self.folder:
            return read_folder(name, self.files_of(self.root), self.folder[name])
        rows, args = self.columns[name], self.args
        split = read_columns(name, rows, image_column=args.image_column, mask_column=args.mask_column)
        split.places = self.places
        return split


class _Seen(NamedTuple):
    """Width and height of an image, the pixels of each class (256,), and digests of the image and its mask."""

    size: tuple[int, int]
    pixels: np.ndarray
    digests: tuple[int, int]


def _look_at(split: MaskedSplit, limit: int | None, args: SegmentationDataArguments) -> SegmentationSplit:
    """The images that can be read, with the numbers in their masks; the others are named and left out.

    Raises:
        ValueError: a mask cannot be read, or has another size than its image, or a number that means nothing; or no image can
            be read.
    """
    decoder = Decoder(args.max_image_pixels, split.places)
    count = min(len(split.rows), limit or len(split.rows))
    every: Any = look_at_all(lambda number: _look_at_one(split, decoder, number), count, f"masks of {split.name}")
    broken = Unreadable(count, split.name)
    for number, seen in enumerate(every):
        if isinstance(seen, OSError):
            broken.add(split.rows[number], number, seen)
    wrong = [seen for seen in every if isinstance(seen, str)]
    if wrong:
        more = f" ({len(wrong):,} masks of split {split.name!r} are not as they must be)" if len(wrong) > 1 else ""
        raise ValueError(wrong[0] + more)
    kept = [number for number, seen in enumerate(every) if isinstance(seen, _Seen)]
    if not kept:
        raise ValueError(f"no image of split {split.name!r} of {args.dataset_name} can be read: check the files")
    classes = np.arange(256, dtype=np.uint8) if split.classes is None else split.classes
    return SegmentationSplit(
        split.name,
        split.rows.select(range(count)).select(kept),
        [split.names[number] for number in kept],
        np.array([every[number].size for number in kept]),
        np.stack([every[number].pixels for number in kept]),
        np.array([every[number].digests for number in kept]),
        classes,
        decoder,
        Unreadable(len(kept), split.name),
    )


def _look_at_one(split: MaskedSplit, decoder: Decoder, number: int) -> _Seen | OSError | str:
    """What is in a row; why its image cannot be read; or what is wrong with its mask, in words."""
    row, name = split.rows[number], split.names[number]
    try:
        size = decoder.size(row["image"])
    except OSError as error:
        return error
    try:
        mask = decoder.mask(row["mask"])
    except OSError as error:
        return f"the mask of {name} cannot be read ({one_line(error)}): correct it"
    if mask.shape[::-1] != size:
        return (
            f"{name} has {size[0]} x {size[1]} pixels (upright, as its EXIF tag turns it), and its mask "
            f"{mask.shape[1]} x {mask.shape[0]}: correct one of them"
        )
    counts = np.bincount(mask.ravel(), minlength=256)
    if split.ids is not None and (beyond := np.flatnonzero(counts[split.ids.stop : IGNORED])).size:
        return f"the mask of {name} has the number {split.ids.stop + beyond[0]}, which is none of this dataset's: correct it"
    of_classes = counts if split.classes is None else np.bincount(split.classes, counts, minlength=256).astype(np.int64)
    of_image = identify(row["image"], split.files[number] if split.files else None)
    return _Seen(size, of_classes, (of_image, zlib.crc32(mask.tobytes())))


def _find_classes(split: SegmentationSplit, known: list[str] | None, args: SegmentationDataArguments) -> list[str]:
    if args.class_names is not None or known is not None:
        return list(args.class_names or known or [])
    counts = split.pixels.sum(0)
    present = np.flatnonzero(counts[:IGNORED])
    if present.size and present[-1] > 0:
        return [str(number) for number in range(present[-1] + 1)]
    raise ValueError(_class_0_alone(split, args))


def _class_0_alone(split: SegmentationSplit, args: SegmentationDataArguments) -> str:
    also = f" and {IGNORED}, which counts nowhere" if split.pixels[:, IGNORED].any() else ""
    return (
        f"the masks of split {split.name!r} of {args.dataset_name} have class 0 alone{also}: number the classes 0, 1, ..., as "
        "in 1 for the foreground"
    )


def _refuse_other_classes(
    splits: Sequence[MaskedSplit], of_model: Sequence[str], args: SegmentationDataArguments
) -> None:
    """
    Raises:
        ValueError: the classes that the flag names, or else a split itself, are not those of the model.
    """
    for split in splits:
        names = args.class_names or split.class_names or list(of_model)
        for number, (name, known) in enumerate(zip_longest(names, of_model)):
            if name != known:
                flag = args.class_names is not None
                where = "--class_names" if flag else f"split {split.name!r} of {args.dataset_name}"
                remedy = "" if flag else "choose data with the model's, or, if its masks have their numbers, "
                raise ValueError(
                    f"class {number} of {where} is {shown(name)} ({len(names)} classes), and of the model {shown(known)} "
                    f"({len(of_model)} classes): {remedy}pass those of the model with --class_names"
                )


def _check(split: SegmentationSplit, names: list[str], args: SegmentationDataArguments) -> SegmentationSplit:
    """The split with the pixels of its classes.

    Raises:
        ValueError: a mask has a class that is not there, none has any, or the foreground seems to be 255.
    """
    beyond = split.pixels[:, len(names) : IGNORED]
    if beyond.any():
        image = int(np.flatnonzero(beyond.any(1))[0])
        number = len(names) + int(np.flatnonzero(beyond[image])[0])
        raise ValueError(
            f"the mask of {split.names[image]} in split {split.name!r} of {args.dataset_name} has class {number}, and there "
            f"are {len(names)} classes, {names[0]} to {names[-1]}: correct it, or name all with --class_names; {IGNORED} "
            "counts nowhere"
        )
    counted = split.pixels[:, : len(names)]
    if not counted.any():
        raise ValueError(f"split {split.name!r} of {args.dataset_name} has no pixel that counts: choose another")
    if not counted[:, 1:].any() and split.pixels[:, IGNORED].any():
        raise ValueError(_class_0_alone(split, args))
    return replace(split, pixels=counted)


def _for_training(split: SegmentationSplit, names: list[str], args: SegmentationDataArguments) -> SegmentationSplit:
    """The images with a pixel to learn from."""
    if np.count_nonzero(split.pixels.sum(0)) < 2:
        name = names[int(split.pixels.sum(0).argmax())]
        raise ValueError(
            f"split {split.name!r} of {args.dataset_name} has pixels of class {name} alone: there is nothing to tell apart"
        )
    kept = np.flatnonzero(split.pixels.any(1)).tolist()
    if len(kept) == len(split):
        return split
    if rank() == 0:
        print(
            f"{args.dataset_name}: {len(split) - len(kept):,} images of {split.name} without a pixel that counts are left out "
            "of training"
        )
    return split.select(kept)


def _say(split: SegmentationSplit, names: list[str], args: SegmentationDataArguments) -> None:
    if rank() > 0:
        return
    pixels = split.pixels.sum(0)
    ignored = 1 - pixels.sum() / split.sizes.prod(1).sum()
    text = f"{args.dataset_name}: {split.name} has {len(split):,} images of {len(names)} classes, {100 * ignored:.1f} % ignored"
    absent = [name for name, count in zip(names, pixels, strict=True) if not count]
    print(text + (f", none of {', '.join(absent[:5])}" + (", ..." if len(absent) > 5 else "") if absent else ""))
