"""Masks against COCO's own code, as faster-coco-eval has it. tests/records/coco_fake100.json.gz names its sources."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import mask as official

from training.detection.dataset.masks import area, check_segmentation, encode, rasterize
from training.detection.dataset.objects import Objects, PackedObjects

RECORD = Path(__file__).parents[1] / "records" / "coco_fake100.json.gz"


@pytest.fixture(scope="module")
def record():
    return json.loads(gzip.decompress(RECORD.read_bytes()))


def test_run_lengths_are_read_as_cocos_code_reads_them(record):
    for one in record["segm"]:
        mask = one["segmentation"]
        height, width = mask["size"]
        ours = check_segmentation(mask, width, height)
        assert np.array_equal(rasterize(ours, width, height), official.decode(mask).astype(bool))
        assert area(ours) == official.area(mask)
    assert len(record["segm"]) == 734


def test_polygons_are_drawn_and_measured_as_coco_does(record):
    sizes = {image["id"]: (image["width"], image["height"]) for image in record["instances"]["images"]}
    plain = [one for one in record["instances"]["annotations"] if not one["iscrowd"]]
    single = 0
    for one in plain[::3]:
        width, height = sizes[one["image_id"]]
        mask = check_segmentation(one["segmentation"], width, height)
        drawn = rasterize(mask, width, height)
        union = np.zeros_like(drawn)
        for polygon in one["segmentation"]:
            union |= official.decode(official.frPyObjects([polygon], height, width)[0]).astype(bool)
        assert np.array_equal(drawn, union)
        # COCO's areas are of polygons without rounding; where a line crosses itself they are not of these.
        single += abs(area(mask) - one["area"]) < 1e-3 * one["area"]
    assert single > 0.95 * len(plain[::3])


def test_masks_come_back_from_their_run_lengths():
    masks = np.random.default_rng(0).random((5, 17, 23)) < 0.4
    masks[3] = False
    masks[4] = True
    back = [rasterize(check_segmentation(one, 23, 17), 23, 17) for one in encode(masks)]
    assert np.array_equal(back, masks)
    assert encode(np.zeros((0, 3, 3), bool)) == []


@pytest.mark.parametrize(
    "text", ["", "0", "P" * 5000, "o" * 5000, "~" * 5000, "\x00\xff", "09999999999", "ooooooooooooooo"]
)
def test_run_lengths_of_a_stranger_take_no_memory_and_are_refused(text):
    with pytest.raises(ValueError, match=r"a mask .* has run lengths that do not fill its 20 x 10 pixels"):
        check_segmentation({"size": [10, 20], "counts": text}, 20, 10)


@pytest.mark.parametrize(
    "mask", [None, 3, "x", {}, {"counts": [1]}, {"size": 3, "counts": []}, {"size": None}, [None], [["a"] * 6]]
)
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match=r"a mask|a polygon"):
        check_segmentation(mask, 20, 10)


def test_objects_of_many_images_come_back():
    generator = np.random.default_rng(0)
    images = []
    for count in (2, 0, 3, 0, 1):
        masks = [{"size": [4, 5], "counts": [int(k := generator.integers(20)), 20 - int(k)]} for _ in range(count)]
        flags = [generator.random(count) < 0.5 for _ in range(2)]
        images.append(
            Objects(
                generator.random((count, 4)), generator.integers(0, 9, count), generator.random(count), *flags, masks
            )
        )
    packed = PackedObjects(images)
    assert len(packed) == 5
    for number, image in enumerate(images):
        for name, value in vars(image).items():
            assert np.array_equal(value, getattr(packed[number], name)) or value == getattr(packed[number], name)
    assert packed.count(packed.every.iscrowd).tolist() == [int(image.iscrowd.sum()) for image in images]
    assert [packed.image_of(k) for k in range(6)] == [0, 0, 2, 2, 2, 4]
    chosen = packed.select([4, 1, 0])
    for number, place in enumerate([4, 1, 0]):
        for name, value in vars(images[place]).items():
            assert np.array_equal(value, getattr(chosen[number], name)) or value == getattr(chosen[number], name)
    with pytest.raises(IndexError):
        packed[5]
