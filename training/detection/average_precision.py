"""Average precision (AP) of detectors: VOC's metric as detectron2 computes it, and COCO's by its official method.

Boxes are as in `objects.py`: in pixels from the top left corner, so that two pixels side by side are 2 wide. The files of VOC
count pixels from 1 and name the last one inside a box, and its metric adds 1 to a width. These overlaps equal ours, because the
reader of such files subtracts that 1 on the left. APs lie in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .dataset.masks import coco_library
from .dataset.objects import Objects

OVERLAPS = tuple(number / 100 for number in range(50, 100, 5))  # IoUs at which AP is measured
# These of floating-point numbers are what detectron2 and py-faster-rcnn compare with: the fourth is a little above 0.3.
ELEVEN_RECALLS = np.arange(0.0, 1.1, 0.1)
COCO_NAMES = [
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
]


@dataclass(frozen=True)
class Found:
    """What a detector has found in one image.

    Args:
        boxes: (n, 4), as in `objects.py`.
        scores: (n,), in any unit.
        labels: class numbers from 0 (n,).
        masks: an RLE of the whole image for each, as `masks.encode` makes them; None without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None = None

    def __post_init__(self):
        lengths = {len(self.boxes), len(self.scores), len(self.labels)} | (
            {len(self.masks)} if self.masks is not None else set()
        )
        if len(lengths) > 1:
            raise ValueError(
                f"found has {sorted(lengths)} boxes, scores, labels and masks: give one of each for every detection"
            )
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise ValueError("found has boxes or scores that are not finite: see whether the model's weights are")


@dataclass(frozen=True)
class AveragePrecision:
    """The result of a metric.

    Args:
        values: "AP", the mean over classes and overlaps; "AP50" and "AP75", at these overlaps; for COCO all twelve of
            `COCO_NAMES`. NaN where there is no object to find.
        per_class: AP of each class by name, the mean over overlaps; NaN as above.
    """

    values: dict[str, float]
    per_class: dict[str, float] = field(default_factory=dict)


def voc_average_precision(
    truth: Sequence[Objects], found: Sequence[Found], class_names: Sequence[str], eleven_points: bool = True
) -> AveragePrecision:
    """AP by the metric of PASCAL VOC at ten overlaps, as detectron2's `PascalVOCDetectionEvaluator`.

    A detection belongs to the object of its class and image with the largest overlap. It is right if the overlap is larger than
    the threshold (not equal to it) and no detection with a higher score has taken that object. A detection that belongs to a
    difficult object counts neither way. Equal scores keep the order in which they are given. A class without an object that
    counts has AP 0, where detectron2's area under the curve is NaN if something is found.

    detectron2 first rounds scores to 0.001 and boxes to 0.1 pixels, as VOC's text files do; here nothing is rounded.

    Args:
        truth: the objects of each image.
        found: the detections of the same images.
        class_names: by class number.
        eleven_points: the mean of the precision at eleven recalls, as in 2007; otherwise the area under the curve, as from
            2010 on.

    Raises:
        ValueError: there are not as many detections as images, or a class number has no name.
    """
    _check(truth, found, class_names)
    table = np.array([voc_class(truth, found, number, eleven_points) for number in range(len(class_names))])  # (K, 10)
    values = {
        "AP": table.mean(),
        "AP50": table[:, OVERLAPS.index(0.5)].mean(),
        "AP75": table[:, OVERLAPS.index(0.75)].mean(),
    }
    per_class = dict(zip(class_names, table.mean(1).tolist(), strict=True))
    return AveragePrecision({name: float(value) for name, value in values.items()}, per_class)


def _check(truth: Sequence[Objects], found: Sequence[Found], class_names: Sequence[str]) -> None:
    if len(truth) != len(found) or not len(truth):
        raise ValueError(
            f"found is of {len(found):,} images and truth of {len(truth):,}: give the same images, at least one"
        )
    labelled: list[Any] = [*truth, *found]
    for what in labelled:
        if len(what.labels) and not 0 <= what.labels.min() <= what.labels.max() < len(class_names):
            raise ValueError(
                f"labels has numbers {what.labels.min()} to {what.labels.max()}: there are {len(class_names)} class names, "
                "from 0 on"
            )


def voc_class(
    truth: Sequence[Objects],
    found: Sequence[Found],
    number: int,
    eleven_points: bool,
    overlaps: Sequence[float] = OVERLAPS,
) -> list[float]:
    """AP of one class by VOC's metric at each of these overlaps; the arguments are those of [`voc_average_precision`]."""
    objects, scores, best = [np.zeros(0, np.int64)], [np.zeros(0)], [np.zeros(0)]
    difficult = [np.zeros(0, bool)]
    before = 0  # objects of other images
    for image, detections in zip(truth, found, strict=True):
        mine, theirs = image.labels == number, detections.labels == number
        if not mine.any() and not theirs.any():
            continue
        overlap, place = _best(detections.boxes[theirs], image.boxes[mine])
        best.append(overlap)
        objects.append(place + before)
        scores.append(detections.scores[theirs])
        difficult.append(image.difficult[mine])
        before += len(difficult[-1])
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hard = np.concatenate(difficult)
    return [
        _curve(np.concatenate(best)[order] > least, np.concatenate(objects)[order], hard, eleven_points)
        for least in overlaps
    ]


def _best(boxes: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest overlap of each box (n, 4) with an object (m, 4), and which it is: (n,) twice; -1 without any object."""
    if not len(objects):
        return np.full(len(boxes), -1.0), np.zeros(len(boxes), np.int64)
    overlap = box_overlaps(boxes, objects)
    return overlap.max(1), overlap.argmax(1)


def box_overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of every box (n, 4) with every other (m, 4): (n, m); 0 where both are empty."""
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = [(some[:, 2:] - some[:, :2]).prod(1) for some in (boxes, others)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _curve(hit: np.ndarray, objects: np.ndarray, hard: np.ndarray, eleven_points: bool) -> float:
    """AP of detections in the order of their scores.

    Args:
        hit: whether a detection overlaps its object enough (n,).
        objects: number of that object (n,).
        hard: whether an object is difficult (m,).
    """
    wanted = int((~hard).sum())
    if not wanted or not len(hit):
        return 0.0
    counted = ~hit
    right = np.zeros(len(hit), bool)
    places = np.flatnonzero(hit)
    places = places[~hard[objects[places]]]
    counted[places] = True
    right[places[np.unique(objects[places], return_index=True)[1]]] = True  # the first of each object
    rights = right.cumsum()
    recall, precision = rights / wanted, rights / np.maximum(counted.cumsum(), 1)
    if eleven_points:
        return sum(float(precision[recall >= least].max(initial=0.0)) for least in ELEVEN_RECALLS) / len(ELEVEN_RECALLS)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * best_from_here).sum())


def coco_average_precision(
    truth: Sequence[Objects],
    found: Sequence[Found],
    class_names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    masks: bool = False,
) -> AveragePrecision:
    """AP and AR by COCO's metric, of boxes or of masks. faster-coco-eval computes them.

    Args:
        truth: the objects of each image; crowds among them are ignored as COCO does.
        found: the detections of the same images.
        class_names: by class number.
        sizes: width and height of each image in pixels.
        masks: whether masks are compared; the size of a detection is then the area of its mask, as in detectron2.

    Raises:
        ValueError: faster-coco-eval is not installed; there are not as many detections or sizes as images; a class number has
            no name; or masks are missing.
    """
    _check(truth, found, class_names)
    if len(sizes) != len(truth):
        raise ValueError(f"sizes is of {len(sizes):,} images and truth of {len(truth):,}: give the same images")
    if masks and not _have_masks(truth, found):
        raise ValueError("masks are missing of truth or found: give them, or compare boxes")
    library = coco_library()
    dataset: dict[str, list[dict[str, Any]]] = {
        "images": [{"id": i, "width": int(width), "height": int(height)} for i, (width, height) in enumerate(sizes)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(class_names)],
        "annotations": [one for i, image in enumerate(truth) for one in _as_annotations(i, image, masks)],
    }
    for number, annotation in enumerate(dataset["annotations"], 1):
        annotation["id"] = number  # 0 would mean no object to COCO's code
    results = [one for i, image in enumerate(found) for one in _as_results(i, image, masks)]
    loaded = library.COCO(dataset)
    evaluation = library.COCOeval_faster(loaded, loaded.loadRes(results), iouType="segm" if masks else "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = zip(COCO_NAMES, _nan_for_none(evaluation.stats[: len(COCO_NAMES)]), strict=True)
    by_class = _nan_for_none(evaluation.eval["precision"])[
        :, :, :, 0, -1
    ]  # (overlaps, recalls, K) of all sizes, 100 detections
    per_class = {name: float(by_class[:, :, number].mean()) for number, name in enumerate(class_names)}
    return AveragePrecision({name: float(value) for name, value in values}, per_class)


def _have_masks(truth: Sequence[Objects], found: Sequence[Found]) -> bool:
    return all(image.segmentations is not None for image in truth) and all(image.masks is not None for image in found)


def _nan_for_none(values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return np.where(values < 0, np.nan, values)  # COCO writes -1


def _as_annotations(image_id: int, image: Objects, masks: bool) -> list[dict[str, Any]]:
    found = []
    for number, (box, label, area, crowd) in enumerate(
        zip(image.boxes.tolist(), image.labels.tolist(), image.area.tolist(), image.iscrowd.tolist(), strict=True)
    ):
        one = {"image_id": image_id, "category_id": label, "bbox": _as_xywh(box), "area": area, "iscrowd": int(crowd)}
        if masks:
            assert image.segmentations is not None
            one["segmentation"] = image.segmentations[number]
        found.append(one)
    return found


def _as_results(image_id: int, image: Found, masks: bool) -> list[dict[str, Any]]:
    shapes = image.masks if masks else [_as_xywh(box) for box in image.boxes.tolist()]
    assert shapes is not None
    # Of masks without the box: COCO's code would take the size of an object from it.
    name = "segmentation" if masks else "bbox"
    rows = zip(shapes, image.labels.tolist(), image.scores.tolist(), strict=True)
    return [{"image_id": image_id, "category_id": label, "score": score, name: shape} for shape, label, score in rows]


def _as_xywh(box: list[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]
