"""Boxes and masks go with the pixels of a view; batches keep orientations apart and go on where a run was stopped."""

import logging
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from boxed_images import TEST, polygon, rectangle, write_coco, write_parquet
from PIL import Image
from torch.utils.data import DataLoader

from modeling_moco import MoCoConfig
from training.detection.dataset.batches import DetectionCollator, OrientationBatches
from training.detection.dataset.objects import Objects
from training.detection.dataset.opening import DetectionDataArguments, load_detection
from training.detection.dataset.views import (
    DetectionEvaluationImages,
    DetectionImages,
    DetectionView,
    DetectionViewParams,
    view_size,
)

SIZES = (24, 30, 36)
CONFIG = MoCoConfig()


def objects(boxes, segmentations=None, iscrowd=None) -> Objects:
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    count = len(boxes)
    crowd = np.zeros(count, bool) if iscrowd is None else np.array(iscrowd)
    return Objects(boxes, np.arange(count), np.ones(count), crowd, np.zeros(count, bool), segmentations)


@pytest.fixture
def splits(tmp_path):
    return load_detection(DetectionDataArguments(dataset_name=str(write_coco(tmp_path / "data")), masks=True))


def corners(labels, view) -> np.ndarray:
    """(left, top, right, bottom) in pixels of a view."""
    centre, side = labels["boxes"][:, :2], labels["boxes"][:, 2:]
    width, height = view
    return (torch.cat([centre - side / 2, centre + side / 2], 1) * torch.tensor([width, height, width, height])).numpy()


# Sizes


@pytest.mark.parametrize("short", [480, 512, 640, 800])
def test_sizes_are_rounded_to_the_nearest_pixel_of_the_exact_ones(short):
    generator = np.random.default_rng(short)
    odd = 0
    for width, height in generator.integers(100, 2000, (300, 2)).tolist():
        scale = Fraction(short, min(width, height))
        if scale * max(width, height) > 1333:
            scale = Fraction(1333, max(width, height))
        exact = [scale * width, scale * height]
        for found, side in zip(view_size(width, height, short), exact, strict=True):
            assert abs(found - side) <= Fraction(1, 2) + Fraction(1, 10**9)
        odd += any(found != int(side) for found, side in zip(view_size(width, height, short), exact, strict=True))
    assert odd > 50  # where rounding down, as DETR's processor, would give another size


@pytest.mark.parametrize(
    ("size", "view"),
    [((500, 375), (1067, 800)), ((375, 500), (800, 1067)), ((640, 427), (1199, 800)), ((500, 100), (1333, 267))],
)
def test_sizes_of_usual_images(size, view):
    assert view_size(*size, 800) == view


@pytest.mark.parametrize("short", [30, 50, 90])
def test_pixels_are_resized_without_aliases(short):
    # torch's interpolation is another implementation; both round to levels.
    image = Image.effect_noise((90, 70), 90).convert("RGB")
    view = DetectionView((short,)).pixels(image, DetectionViewParams(short, False))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(pixels, view.shape[1:], mode="bilinear", antialias=True)[0]
    assert (view - expected).abs().max() <= 1.5


# Boxes and masks


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("short", [40, 77, 130])
@pytest.mark.parametrize("form", [polygon, rectangle])
def test_boxes_and_masks_cover_what_they_covered(form, short, flip):
    size, box = (90, 70), [13, 22, 41, 63]
    pixels = np.zeros((70, 90, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    mask = polygon(box) if form is polygon else rectangle(box, size)
    view, params = DetectionView((short,)), DetectionViewParams(short, flip)
    seen = view.pixels(Image.fromarray(pixels), params).numpy()[0] > 127
    labels = view.labels(objects([box], [mask]), size, params)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    drawn = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert np.abs(corners(labels, seen.shape[::-1])[0] - drawn).max() <= 0.5
    assert labels["masks"].shape == (1, *seen.shape)
    disagree = labels["masks"][0].numpy() != seen
    assert disagree.sum() <= rows.size + columns.size  # a pixel at one side in each direction


def test_a_mirrored_view_has_mirrored_pixels_boxes_and_masks():
    image = Image.effect_noise((90, 70), 90).convert("RGB")
    boxes = [[3, 5, 60, 33], [20, 0, 90, 70]]
    view = DetectionView((50,))
    plain, mirrored = (DetectionViewParams(50, flip) for flip in (False, True))
    assert torch.equal(view.pixels(image, mirrored), view.pixels(image, plain).flip(2))
    some = objects(boxes, [rectangle(box, (90, 70)) for box in boxes])
    one, other = (view.labels(some, (90, 70), params) for params in (plain, mirrored))
    assert torch.equal(other["masks"], one["masks"].flip(2))
    assert torch.allclose(other["boxes"][:, 0], 1 - one["boxes"][:, 0], atol=1e-6)
    assert torch.equal(other["boxes"][:, 1:], one["boxes"][:, 1:])
    assert other["class_labels"].tolist() == [0, 1]


def test_boxes_are_clipped_and_what_is_empty_then_is_left_out():
    boxes = [[-10, -10, 20, 20], [30, 5, 30, 9], [50, 5, 99, 99], [90, 70, 95, 75]]
    view = DetectionView((30,)).labels(objects(boxes), (60, 60), DetectionViewParams(30, False))
    assert np.allclose(corners(view, (30, 30)), [[0, 0, 10, 10], [25, 2.5, 30, 30]], atol=1e-5)
    assert view["class_labels"].tolist() == [0, 2]
    assert view["boxes"].dtype == torch.float32
    assert "masks" not in view


def test_crowds_and_masks_without_a_pixel_are_left_out():
    boxes = [[0, 0, 20, 20], [0, 0, 40, 40], [10, 10, 11, 11]]
    masks = [rectangle(box, (60, 60)) for box in boxes]
    masks[2] = {"size": [60, 60], "counts": [3600]}
    view = DetectionView((60,)).labels(
        objects(boxes, masks, [False, True, False]), (60, 60), DetectionViewParams(60, False)
    )
    assert view["class_labels"].tolist() == [0]
    assert len(view["boxes"]) == len(view["masks"]) == 1


def test_wrong_views_are_refused():
    with pytest.raises(ValueError, match=r"sizes \(\[\]\) must be lengths of 1 to 1333 pixels"):
        DetectionView(())
    with pytest.raises(ValueError, match=r"sizes \(\[2000\]\) must be"):
        DetectionView((2000,))
    with pytest.raises(ValueError, match=r"flip_p \(2\) must lie in \[0, 1\]"):
        DetectionView((200,), flip_p=2)


# Draws


def test_a_view_depends_on_seed_epoch_and_index_alone(splits):
    images = DetectionImages(splits.train, DetectionView(SIZES), seed=3)
    images.set_epoch(5)
    drawn = [images.view_params(i) for i in range(3)]
    again = DetectionImages(splits.train, DetectionView(SIZES), seed=3)
    again.set_epoch(5)
    assert [again.view_params(i) for i in (2, 0, 1)] == [drawn[2], drawn[0], drawn[1]]
    batch = [images[i] for i in range(3)]
    loaded = list(DataLoader(again, batch_size=None, num_workers=2))
    for one, other in zip(batch, loaded, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["labels"]["boxes"], other["labels"]["boxes"])


def test_every_size_is_drawn_as_often_and_half_of_the_views_are_mirrored(splits):
    images = DetectionImages(splits.train, DetectionView(SIZES))
    drawn = []
    for epoch in range(1000):
        images.set_epoch(epoch)
        drawn += [images.view_params(index) for index in range(3)]
    for size in SIZES:
        assert abs(sum(one.short == size for one in drawn) - 1000) < 5 * (3000 * 2 / 9) ** 0.5
    assert abs(sum(one.flip for one in drawn) - 1500) < 5 * (3000 / 4) ** 0.5
    both = sum(one.flip and one.short == SIZES[0] for one in drawn)
    assert abs(both - 500) < 5 * (3000 * 5 / 36) ** 0.5


def test_a_broken_image_is_replaced_in_training_and_grey_in_an_evaluation(tmp_path, caplog):
    folder = write_coco(tmp_path / "data")
    for broken in ("train/1.png", "test/0.png"):
        (folder / broken).write_bytes(b"not a picture")
    with caplog.at_level(logging.WARNING):
        splits = load_detection(DetectionDataArguments(dataset_name=str(folder)))
        images = DetectionImages(splits.train, DetectionView(SIZES))
        tested = DetectionEvaluationImages(splits.eval, 33)
        replaced, grey = images[1], tested[0]
    assert replaced["image_id"] == 2
    assert torch.equal(replaced["pixel_values"], images[2]["pixel_values"])
    assert grey["image_id"] == 0
    assert grey["pixel_values"].shape == (3, 33, 44)
    assert [len(grey["pixel_values"][channel].unique()) for channel in range(3)] == [1, 1, 1]
    assert images.unreadable() == ["train/1.png"]
    assert tested.unreadable() == ["test/0.png"]
    assert caplog.text.count("skipped an image that cannot be read") == 2


def test_an_evaluation_has_every_image_at_one_size(splits):
    tested = DetectionEvaluationImages(splits.eval, 20, 28)
    assert [one["image_id"] for one in tested] == [0, 1, 2]
    assert [tuple(one["pixel_values"].shape[1:]) for one in tested] == [
        view_size(*image[0], 20, 28)[::-1] for image in TEST
    ]


# Batches


@pytest.fixture
def many(tmp_path):
    """23 wide images and 14 tall ones."""
    wide, tall = ((40, 30), [[2, 3, 20, 25]], [0], [0], [0]), ((30, 40), [[1, 1, 9, 39]], [1], [0], [0])
    folder = write_parquet(tmp_path / "many", splits={"train": [wide] * 16 + [tall] * 14 + [wide] * 7})
    args = DetectionDataArguments(dataset_name=str(folder), bbox_format="xywh")
    return DetectionImages(load_detection(args).train, DetectionView(SIZES), seed=1)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 9])
def test_batches_keep_orientations_apart_and_leave_out_less_than_one(many, batch_size):
    batches = OrientationBatches(many, batch_size)
    for epoch in range(3):
        found = batches.batches(epoch)
        assert len(found) == len(batches) == 37 // batch_size
        assert {len(batch) for batch in found} == {batch_size}
        used = [number for batch in found for number in batch]
        assert len(set(used)) == len(used) > 37 - batch_size
        mixed = [len({16 <= number < 30 for number in batch}) == 2 for batch in found]
        assert not any(mixed[:-1])
    assert batches.batches(0) != batches.batches(1)


def test_every_image_has_its_turn_and_images_of_both_kinds_are_left_out(many):
    batches = OrientationBatches(many, 30)  # as many as neither kind has
    seen, left_out = set(), set()
    for epoch in range(40):
        used = {number for batch in batches.batches(epoch) for number in batch}
        seen |= used
        left_out |= set(range(37)) - used
    assert seen == left_out == set(range(37))


def test_a_run_goes_on_where_it_was_stopped(many):
    collate = DetectionCollator(CONFIG.image_mean, CONFIG.image_std)
    loader = DataLoader(many, batch_sampler=OrientationBatches(many, 4), collate_fn=collate)
    many.set_epoch(2)
    whole = list(loader)
    other = DetectionImages(many.split, many.view, many.seed)
    other.set_epoch(2)
    rest = list(
        skip_first_batches(DataLoader(other, batch_sampler=OrientationBatches(other, 4), collate_fn=collate), 3)
    )
    assert len(rest) == len(whole) - 3
    for one, after in zip(rest, islice(whole, 3, None), strict=True):
        assert torch.equal(one["image_id"], after["image_id"])
        assert torch.equal(one["pixel_values"], after["pixel_values"])


def test_processes_share_the_batches_of_an_epoch(many):
    batches = OrientationBatches(many, 4)
    shares = [list(BatchSamplerShard(batches, 3, rank)) for rank in range(3)]
    assert [shares[k % 3][k // 3] for k in range(9)] == batches.batches(0)


def test_a_batch_larger_than_the_data_is_refused(many):
    with pytest.raises(
        ValueError, match=r"batch size \(38\) must lie between 1 and the number of images, 37: lower it"
    ):
        OrientationBatches(many, 38)


def test_padding_is_zero_after_normalising_and_the_mask_tells_it(splits):
    images = DetectionImages(splits.train, DetectionView(SIZES))
    rows = [images[i] for i in range(len(images))]
    batch = DetectionCollator(CONFIG.image_mean, CONFIG.image_std)(rows)
    largest = [max(row["pixel_values"].shape[axis] for row in rows) for axis in (1, 2)]
    assert batch["pixel_values"].shape == (3, 3, *largest)
    assert batch["pixel_mask"].shape == (3, *largest)
    mean, std = (np.array(some, np.float64)[:, None, None] for some in (CONFIG.image_mean, CONFIG.image_std))
    for place, row in enumerate(rows):
        _, height, width = row["pixel_values"].shape
        plain = (row["pixel_values"].numpy() / 255 - mean) / std
        assert np.allclose(batch["pixel_values"][place, :, :height, :width].numpy(), plain, atol=1e-5)
        mask = np.zeros(largest, np.int64)
        mask[:height, :width] = 1
        assert np.array_equal(batch["pixel_mask"][place].numpy(), mask)
        assert not batch["pixel_values"][place][:, mask == 0].any()
        assert batch["labels"][place]["masks"].shape[1:] == (height, width)
    assert batch["image_id"].tolist() == [0, 1, 2]
    assert len({row["pixel_values"].shape for row in rows}) > 1


def test_batches_of_an_evaluation_have_no_labels(splits):
    tested = DetectionEvaluationImages(splits.eval, 20)
    batch = DetectionCollator(CONFIG.image_mean, CONFIG.image_std)([tested[0], tested[1]])
    assert set(batch) == {"pixel_values", "pixel_mask", "image_id"}
