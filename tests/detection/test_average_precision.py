"""AP of detectors against published numbers, and against a plain loop in float64.

tests/records/voc_toy.json, voc_detectron2.json and coco_fake100.json.gz name their sources and licences.
"""

import builtins
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from training.detection.average_precision import (
    COCO_NAMES,
    OVERLAPS,
    Found,
    box_overlaps,
    coco_average_precision,
    voc_average_precision,
    voc_class,
)
from training.detection.dataset.masks import check_segmentation, encode
from training.detection.dataset.objects import Objects

RECORDS = Path(__file__).parents[1] / "records"


def objects(boxes, labels=None, difficult=None, iscrowd=None, area=None, segmentations=None) -> Objects:
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    count = len(boxes)
    return Objects(
        boxes,
        np.zeros(count, np.int64) if labels is None else np.array(labels, np.int64),
        (boxes[:, 2:] - boxes[:, :2]).prod(1) if area is None else np.array(area, np.float64),
        np.zeros(count, bool) if iscrowd is None else np.array(iscrowd, bool),
        np.zeros(count, bool) if difficult is None else np.array(difficult, bool),
        segmentations,
    )


def found(boxes, scores, labels=None, masks=None) -> Found:
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return Found(
        boxes, np.array(scores, np.float64), np.zeros(len(boxes), np.int64) if labels is None else labels, masks
    )


# VOC


def toy():
    record = json.loads((RECORDS / "voc_toy.json").read_text())
    truth, detections = [], []
    for image in record["images"].values():
        # From pixels that count from 1 and name the last one inside: x, y, x + w, y + h.
        truth.append(objects([[x - 1, y - 1, x + w, y + h] for x, y, w, h in image["objects"]]))
        boxes = [[x - 1, y - 1, x + w, y + h] for _, x, y, w, h in image["detections"]]
        detections.append(found(boxes, [score for score, *_ in image["detections"]]))
    return record, truth, detections


@pytest.mark.parametrize("kind", ["eleven_points", "area"])
def test_the_published_toy_has_its_published_aps(kind):
    record, truth, detections = toy()
    ours = voc_class(truth, detections, 0, kind == "eleven_points", record["overlaps"])
    assert np.allclose(ours, record[kind], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["eleven_points", "area"])
def test_detectron2s_own_code_has_the_same_aps(kind):
    record = json.loads((RECORDS / "voc_detectron2.json").read_text())
    for case in record["cases"]:
        truth = [
            objects([one[:4] for one in image], [one[4] for one in image], [one[5] for one in image])
            for image in case["objects"]
        ]
        detections = [
            found(
                [[side / 10 for side in one[:4]] for one in image],
                [one[5] / 1000 for one in image],
                np.array([one[4] for one in image], np.int64),
            )
            for image in case["found"]
        ]
        theirs = np.array(case[kind], np.float64)  # null is NaN
        without_truth = [not any(one[4] == number for image in case["objects"] for one in image) for number in range(4)]
        assert without_truth == [False, False, False, True]
        assert np.array_equal(np.isnan(theirs).all(1), [False, False, False, kind == "area"])
        ours = np.array([voc_class(truth, detections, number, kind == "eleven_points") for number in range(4)])
        assert np.allclose(ours, np.nan_to_num(theirs), rtol=0, atol=1e-12)
        assert theirs[:3, 0].min() > 0.1
    assert any(one[5] for case in record["cases"] for image in case["objects"] for one in image)


def random_images(seed: int, images: int = 12):
    """Objects of three classes, some difficult, and detections near them, away from them and again."""
    generator = np.random.default_rng(seed)
    truth, detections = [], []
    for _ in range(images):
        count = int(generator.integers(0, 6))
        corner, side = generator.integers(0, 60, (count, 2)), generator.integers(4, 30, (count, 2))
        boxes = np.concatenate([corner, corner + side], 1).astype(np.float64)
        labels = generator.integers(0, 3, count)
        truth.append(objects(boxes, labels, difficult=generator.random(count) < 0.3))
        again = generator.integers(0, max(count, 1), 3 * count)
        near = boxes[again] + generator.integers(-3, 4, (3 * count, 4)) if count else np.zeros((0, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        far = np.concatenate([c := generator.integers(0, 60, (2, 2)), c + generator.integers(1, 30, (2, 2))], 1)
        every = np.concatenate([near, far]).astype(np.float64)
        guessed = np.concatenate([labels[again] if count else np.zeros(0, np.int64), generator.integers(0, 3, 2)])
        scores = generator.permutation(len(every)) / 64 + generator.integers(0, 2, len(every)) / 8  # with ties
        detections.append(found(every, scores, guessed))
    return truth, detections


def plain_ap(truth, detections, number, least, eleven_points):
    """VOC's metric, one detection after another, on pixels that count from 1."""
    every = [
        (score, image, box)
        for image, some in enumerate(detections)
        for box, score, label in zip(some.boxes.tolist(), some.scores.tolist(), some.labels, strict=True)
        if label == number
    ]
    every.sort(key=lambda one: -one[0])
    taken, right, wrong, curve = set(), 0, 0, []
    wanted = sum(int(((t.labels == number) & ~t.difficult).sum()) for t in truth)
    for _, image, (x0, y0, x1, y1) in every:
        best, which = -math.inf, None
        for place, (box, label) in enumerate(zip(truth[image].boxes.tolist(), truth[image].labels, strict=True)):
            if label != number:
                continue
            gx0, gy0, gx1, gy1 = box[0] + 1, box[1] + 1, box[2], box[3]
            w = max(min(x1, gx1) - max(x0 + 1, gx0) + 1, 0)
            h = max(min(y1, gy1) - max(y0 + 1, gy0) + 1, 0)
            union = (x1 - x0) * (y1 - y0) + (gx1 - gx0 + 1) * (gy1 - gy0 + 1) - w * h
            if w * h / union > best:
                best, which = w * h / union, place
        if best > least and truth[image].difficult[which]:
            continue
        if best > least and (image, which) not in taken:
            taken.add((image, which))
            right += 1
        else:
            wrong += 1
        curve.append((right / wanted if wanted else 0.0, right / (right + wrong)))
    if not wanted:
        return 0.0
    if eleven_points:
        reached = [[p for r, p in curve if r >= 0.1 * i] for i in range(11)]
        return sum(max(some, default=0.0) for some in reached) / 11
    area, before = 0.0, 0.0
    for place, (r, _) in enumerate(curve):
        area += (r - before) * max(p for _, p in curve[place:])
        before = r
    return area


@pytest.mark.parametrize("eleven_points", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_voc_equals_a_plain_loop(seed, eleven_points):
    truth, detections = random_images(seed)
    result = voc_average_precision(truth, detections, ["a", "b", "c"], eleven_points)
    table = np.array([[plain_ap(truth, detections, c, t, eleven_points) for t in OVERLAPS] for c in range(3)])
    assert table[:, 0].min() > 0.1
    assert math.isclose(result.values["AP"], table.mean(), abs_tol=1e-12)
    assert math.isclose(result.values["AP50"], table[:, 0].mean(), abs_tol=1e-12)
    assert math.isclose(result.values["AP75"], table[:, 5].mean(), abs_tol=1e-12)
    assert np.allclose(list(result.per_class.values()), table.mean(1), atol=1e-12)


def ap(truth, detections, least=0.5, eleven_points=False):
    return voc_class(truth, detections, 0, eleven_points, [least])[0]


def test_widths_are_those_of_pixels_side_by_side():
    # 9 of 11 pixels are shared. With another pixel on every side it would be 10 of 12, which is above 0.82.
    assert ap([objects([0, 0, 10, 1])], [found([1, 0, 11, 1], [1])], 0.82) == 0
    assert ap([objects([0, 0, 10, 1])], [found([1, 0, 11, 1], [1])], 0.81) == 1


def test_an_overlap_equal_to_the_threshold_is_not_enough():
    assert ap([objects([0, 0, 10, 10])], [found([0, 0, 10, 5], [1])]) == 0
    assert ap([objects([0, 0, 10, 10])], [found([0, 0, 10, 5.01], [1])]) == 1


def test_equal_scores_keep_their_order():
    right, wrong = [0, 0, 10, 10], [50, 50, 60, 60]
    assert ap([objects(right)], [found([right, wrong], [0.5, 0.5])]) == 1
    assert ap([objects(right)], [found([wrong, right], [0.5, 0.5])]) == 0.5
    many = [found([right] + [wrong] * 40, [0.5] * 41)]  # where an unstable sort would change them
    assert ap([objects(right)], many) == 1


def test_a_recall_of_three_tenths_does_not_reach_the_fourth_point():
    # As in detectron2 and py-faster-rcnn, whose fourth recall is 0.30000000000000004.
    boxes = [[20 * i, 0, 20 * i + 10, 10] for i in range(10)]
    assert math.isclose(ap([objects(boxes)], [found(boxes[:3], [3, 2, 1])], eleven_points=True), 3 / 11)


def test_what_belongs_to_a_difficult_object_counts_neither_way():
    easy, hard = [0, 0, 10, 10], [100, 0, 110, 10]
    truth = [objects([easy, hard], difficult=[False, True])]
    assert ap(truth, [found([hard, hard, easy], [3, 2, 1])]) == 1
    assert ap(truth, [found([easy], [1])]) == 1  # nor is it missed
    assert ap([objects([easy, hard])], [found([easy], [1])]) == 0.5


def test_an_object_is_found_once_and_a_second_detection_of_it_is_wrong():
    first, second = [0, 0, 10, 10], [0, 12, 10, 22]
    assert ap([objects([first, second])], [found([first, first, second], [3, 2, 1])]) == pytest.approx(
        0.5 + 0.5 * 2 / 3
    )


def test_a_class_without_objects_has_ap_zero():
    result = voc_average_precision([objects([0, 0, 9, 9])], [found([0, 0, 9, 9], [1])], ["there", "absent"])
    assert result.per_class == {"there": 1.0, "absent": 0.0}
    assert result.values["AP"] == 0.5


def test_overlaps_of_boxes_equal_torchvisions():
    import torch
    from torchvision.ops import box_iou

    generator = np.random.default_rng(0)
    a, b = (np.sort(generator.random((n, 2, 2)), 1).reshape(n, 4) for n in (7, 5))
    assert np.allclose(box_overlaps(a, b), box_iou(torch.tensor(a), torch.tensor(b)).numpy(), atol=1e-12)


# COCO


@pytest.fixture(scope="module")
def coco():
    """The official fake results of 100 images, in our form."""
    record = json.loads(gzip.decompress((RECORDS / "coco_fake100.json.gz").read_bytes()))
    images = sorted(record["instances"]["images"], key=lambda image: image["id"])
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    numbers = {one["id"]: number for number, one in enumerate(record["instances"]["categories"])}
    truth = {image: [] for image in sizes}
    for one in record["instances"]["annotations"]:
        truth[one["image_id"]].append(one)
    names = [one["name"] for one in record["instances"]["categories"]]
    return record, sizes, numbers, truth, names


def corners(one):
    x, y, w, h = one["bbox"]
    return [x, y, x + w, y + h]


def as_objects(some, numbers, size) -> Objects:
    return objects(
        [corners(one) for one in some],
        [numbers[one["category_id"]] for one in some],
        iscrowd=[one["iscrowd"] for one in some],
        area=[one["area"] for one in some],
        segmentations=[check_segmentation(one["segmentation"], *size) for one in some],
    )


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_coco_has_the_official_numbers(coco, kind):
    record, sizes, numbers, truth, names = coco
    results = {image: [one for one in record[kind] if one["image_id"] == image] for image in sizes}
    found_there = [
        found(
            [corners(one) if kind == "bbox" else [0, 0, 1, 1] for one in some],
            [one["score"] for one in some],
            np.array([numbers[one["category_id"]] for one in some], np.int64),
            [one["segmentation"] for one in some] if kind == "segm" else None,
        )
        for some in results.values()
    ]
    known = [as_objects(truth[image], numbers, size) for image, size in sizes.items()]
    result = coco_average_precision(known, found_there, names, list(sizes.values()), masks=kind == "segm")
    assert list(result.values) == list(COCO_NAMES)
    assert [round(value, 3) for value in result.values.values()] == record["published"][kind]
    present = [value for value in result.per_class.values() if not math.isnan(value)]
    assert len(result.per_class) == 80 > len(present)
    assert math.isclose(float(np.mean(present)), result.values["AP"], abs_tol=1e-12)


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong():
    here, crowd = [0, 0, 10, 10], [20, 20, 90, 90]
    truth = [objects([here, crowd], iscrowd=[False, True])]
    result = coco_average_precision(truth, [found([[30, 30, 50, 50], here], [2, 1])], ["a"], [(100, 100)])
    assert result.values["AP"] == pytest.approx(1)
    plain = coco_average_precision([objects([here])], [found([[30, 30, 50, 50], here], [2, 1])], ["a"], [(100, 100)])
    assert plain.values["AP"] == pytest.approx(0.5)


def test_the_size_of_a_found_mask_is_its_own_area_and_not_its_boxes():
    # An L of 49 of 100 x 100 pixels: small by its area, large by its box. What is not small does not count among the small.
    mask = np.zeros((1, 200, 200), bool)
    mask[0, 10, 10:110] = mask[0, 10:110, 10] = True
    segmentations = [check_segmentation(one, 200, 200) for one in encode(mask)]
    truth = [objects([10, 10, 110, 110], area=[199], segmentations=segmentations)]
    wrong = np.zeros((1, 200, 200), bool)
    wrong[0, 150, 10:190] = wrong[0, 120:190, 150] = True
    boxes = [[10, 120, 190, 190], [10, 10, 110, 110]]
    theirs = [found(boxes, [2, 1], masks=encode(np.concatenate([wrong, mask])))]
    result = coco_average_precision(truth, theirs, ["a"], [(200, 200)], masks=True)
    assert result.values["AP_small"] == pytest.approx(0.5)
    assert math.isnan(result.values["AP_large"])


def test_nothing_found_is_zero_and_nothing_to_find_is_not_a_number():
    nothing = found(np.zeros((0, 4)), [])
    assert coco_average_precision([objects([0, 0, 9, 9])], [nothing], ["a"], [(9, 9)]).values["AP"] == 0
    assert math.isnan(coco_average_precision([objects([])], [nothing], ["a"], [(9, 9)]).values["AP"])
    assert voc_average_precision([objects([0, 0, 9, 9])], [nothing], ["a"]).values["AP"] == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="found is of 1 images and truth of 2: give the same images"):
        voc_average_precision([objects([]), objects([])], [found([], [])], ["a"])
    with pytest.raises(ValueError, match="labels has numbers 3 to 3: there are 1 class names, from 0 on"):
        voc_average_precision([objects([0, 0, 1, 1], [3])], [found([], [])], ["a"])
    with pytest.raises(ValueError, match="boxes or scores that are not finite"):
        found([0, 0, 1, 1], [math.nan])
    with pytest.raises(ValueError, match=r"found has \[1, 2\] boxes, scores, labels and masks"):
        found([0, 0, 1, 1], [1, 2])
    with pytest.raises(ValueError, match="masks are missing of truth or found"):
        coco_average_precision([objects([0, 0, 1, 1])], [found([], [])], ["a"], [(9, 9)], masks=True)


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch):
    load = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("faster_coco_eval"):
            raise ModuleNotFoundError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match="pip install faster-coco-eval"):
        coco_average_precision([objects([0, 0, 1, 1])], [found([], [])], ["a"], [(9, 9)])
    assert voc_average_precision([objects([0, 0, 1, 1])], [found([0, 0, 1, 1], [1])], ["a"]).values["AP"] == 1
