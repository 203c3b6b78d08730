"""The annotated objects of images: one image's, those of a split, and what is no box.

Boxes (n, 4) are (left, top, right, bottom) in pixels of the whole image, from its top left corner (0, 0), so that a box that
covers the image is (0, 0, width, height). They stay as they are annotated, also where they reach over the border: views clip
them.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

COLUMNS = ("boxes", "labels", "area", "iscrowd", "difficult")
LEAST_SIDE = 1e-5  # pixels; narrower boxes are empty, as for detectron2


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Args:
        boxes: (n, 4), float64.
        labels: class numbers from 0 (n,).
        area: square pixels (n,), by which COCO tells small objects from large ones.
        iscrowd: whether a box stands for many objects that nobody counted (n,). No detector learns from them; for COCO's
            metric what is found there is neither right nor wrong.
        difficult: whether VOC's annotators found an object hard to recognise (n,). Training uses them; VOC's metric does not
            ask for them.
        segmentations: a checked RLE, or checked polygons, for each object; None where the dataset has no masks.
    """

    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray
    difficult: np.ndarray
    segmentations: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, kept: np.ndarray) -> "Objects":
        """The objects whose flag in `kept` (n,) is true."""
        segmentations = self.segmentations
        if segmentations is not None:
            segmentations = [one for one, keep in zip(segmentations, kept, strict=True) if keep]
        return _of((getattr(self, name)[kept] for name in COLUMNS), segmentations)

    def trainable(self) -> np.ndarray:
        """Which objects a detector learns from (n,): those that are no crowd and have a box that is not empty."""
        return ~self.iscrowd & ~is_empty(self.boxes)


def is_empty(boxes: np.ndarray) -> np.ndarray:
    """Which boxes (n, 4) have no area (n,)."""
    return ((boxes[:, 2:] - boxes[:, :2]) <= LEAST_SIDE).any(1)


class PackedObjects:
    """The objects of many images in a few arrays, which worker processes share without copies.

    Args:
        images: the objects of each image; either all or none have segmentations.
    """

    def __init__(self, images: Iterable[Objects]):
        parts, texts, masks = [no_objects()], [], False
        for one in images:
            parts.append(_of(getattr(one, name) for name in COLUMNS))
            masks = masks or one.segmentations is not None
            texts += [
                json.dumps(mask) for mask in one.segmentations or ()
            ]  # as numbers of Python they take much memory
        self.ends = np.cumsum([0, *map(len, parts[1:])])  # objects of image i are those from ends[i] to ends[i + 1]
        self.every = _of(
            np.concatenate([getattr(one, name) for one in parts]) for name in COLUMNS
        )  # without segmentations
        self._segmentations = pa.array(texts, pa.large_string()) if masks else None

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Objects:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(self.ends[index], self.ends[index + 1])
        texts = self._segmentations
        segmentations = None if texts is None else [json.loads(one.as_py()) for one in texts[part]]
        return _of((getattr(self.every, name)[part] for name in COLUMNS), segmentations)

    def update(self, digest: Any) -> None:
        """Give a digest of hashlib all that is known of the objects."""
        for numbers in (self.ends, *(getattr(self.every, name) for name in COLUMNS)):
            digest.update(np.ascontiguousarray(numbers, "<f8").tobytes())  # the same on every machine
        for text in self._segmentations if self._segmentations is not None else ():
            digest.update(f"{text.as_py()}\n".encode())

    def select(self, indices: Sequence[int]) -> "PackedObjects":
        """The objects of these images alone."""
        chosen = PackedObjects([])
        spans = [np.arange(self.ends[i], self.ends[i + 1]) for i in indices]
        rows = np.concatenate([np.zeros(0, np.int64), *spans])
        chosen.ends = np.cumsum([0, *map(len, spans)])
        chosen.every = _of(getattr(self.every, name)[rows] for name in COLUMNS)
        chosen._segmentations = None if self._segmentations is None else self._segmentations.take(pa.array(rows))
        return chosen

    def count(self, flags: np.ndarray) -> np.ndarray:
        """How many objects of each image (n,) have a true flag, of all objects."""
        before = np.concatenate([[0], np.cumsum(flags)])
        return np.asarray(before[self.ends[1:]] - before[self.ends[:-1]])

    def image_of(self, number: int) -> int:
        """The image to which an object of all belongs."""
        return int(np.searchsorted(self.ends, number, side="right")) - 1


def _of(columns: Iterable[np.ndarray], segmentations: list[Any] | None = None) -> Objects:
    boxes, labels, area, iscrowd, difficult = columns
    return Objects(boxes, labels, area, iscrowd, difficult, segmentations)


def no_objects() -> Objects:
    """Of an image without any."""
    return Objects(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool), np.zeros(0, bool))
