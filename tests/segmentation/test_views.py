"""Masks go with the pixels of a view; a view depends on (seed, epoch, index) alone; padding is zero and counts nowhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from masked_images import COLOURS, draw_splits, write_folder

from modeling_moco import MoCoConfig
from training.segmentation.dataset.opening import SegmentationDataArguments, load_segmentation
from training.segmentation.dataset.views import (
    SegmentationCollator,
    SegmentationEvaluationImages,
    SegmentationImages,
    SegmentationView,
    SegmentationViewParams,
)

CONFIG = MoCoConfig()


@pytest.fixture
def splits(tmp_path):
    return load_segmentation(SegmentationDataArguments(dataset_name=str(write_folder(tmp_path / "data"))))


def nearest_colour(pixels: np.ndarray) -> np.ndarray:
    """The class whose colour a pixel (3, H, W) has, which the drawn images make of their masks."""
    return np.abs(pixels[None].astype(int) - COLOURS[:, :, None, None] - 15).sum(1).argmin(0)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("place", [(0.0, 0.0), (0.5, 0.3), (0.999, 0.999)])
def test_the_mask_of_a_view_is_what_its_pixels_show(splits, scale, flip, place):
    view = SegmentationView(crop=40)
    params = SegmentationViewParams(scale, flip, *place)
    for number in range(3):
        pixels = view.pixels(splits.train.image(number), params).numpy()
        labels = view.labels(splits.train.mask(number), params).numpy()
        assert pixels.shape[1:] == labels.shape
        counted = labels != 255
        assert (nearest_colour(pixels) == labels)[counted].mean() > 0.93  # edges mix in the enlarged pixels
        if scale == 1.0:
            assert (nearest_colour(pixels) == labels)[counted].all()


def test_a_crop_is_cut_where_it_was_drawn(splits):
    image, mask = splits.train.image(0), splits.train.mask(0)  # 72 x 48
    view = SegmentationView(crop=32)
    for top, left, y, x in ((0.0, 0.0, 0, 0), (0.999, 0.999, 16, 40), (0.5, 0.25, 8, 10)):
        params = SegmentationViewParams(1.0, False, top, left)
        expected = np.asarray(image)[y : y + 32, x : x + 32]
        assert np.array_equal(view.pixels(image, params).permute(1, 2, 0).numpy(), expected)
        assert np.array_equal(view.labels(mask, params).numpy(), mask[y : y + 32, x : x + 32])
        mirrored = SegmentationViewParams(1.0, True, top, left)
        assert np.array_equal(view.labels(mask, mirrored).numpy(), mask[y : y + 32, x : x + 32][:, ::-1])


def test_every_place_is_drawn_as_often_and_scales_have_equal_density(splits):
    images = SegmentationImages(splits.train, SegmentationView(crop=70))
    drawn = []
    for epoch in range(500):
        images.set_epoch(epoch)
        drawn.append(images.view.sample(images.generator(0)))
    scales = np.array([params.scale for params in drawn])
    assert np.histogram(scales, bins=5, range=(0.5, 2))[0].min() > 70
    assert scales.min() >= 0.5
    assert scales.max() < 2
    assert 200 < sum(params.flip for params in drawn) < 300
    whole = SegmentationView(crop=70, scales=(1, 1))
    lefts = [whole.box((72, 48), replace(params, scale=1.0))[1][0] for params in drawn]
    assert np.bincount(lefts, minlength=3).min() > 130
    assert set(lefts) == {0, 1, 2}


def test_a_view_depends_on_seed_epoch_and_index_alone(splits):
    def views(seed, epoch, order):
        images = SegmentationImages(splits.train, SegmentationView(crop=33), seed)
        images.set_epoch(epoch)
        rows = {index: images[index] for index in order}
        return [rows[index] for index in range(6)]

    one, same = views(3, 2, range(6)), views(3, 2, reversed(range(6)))
    for a, b in zip(one, same, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"])
        assert torch.equal(a["labels"], b["labels"])
    for other in (views(4, 2, range(6)), views(3, 1, range(6))):
        assert not all(
            a["labels"].shape == b["labels"].shape and torch.equal(a["labels"], b["labels"])
            for a, b in zip(one, other, strict=True)
        )


def test_a_view_in_which_nothing_counts_is_drawn_again(tmp_path):
    pairs = draw_splits(train=4, width=200, height=200)
    for number, (_, mask) in enumerate(pairs["train"]):
        mask[:] = 255
        mask[190 * (number % 2), 195] = 1
    pairs["train"][3][1][5:60, 5:60] = 0
    splits = load_segmentation(SegmentationDataArguments(dataset_name=str(write_folder(tmp_path, pairs))))
    images = SegmentationImages(splits.train, SegmentationView(crop=24))
    for epoch in range(10):
        images.set_epoch(epoch)
        for index in range(4):
            row = images[index]
            assert (row["labels"] != 255).any()
            assert row["labels"].shape == row["pixel_values"].shape[1:]


def test_padding_is_zero_after_the_normalisation_and_counts_nowhere(splits):
    images = SegmentationImages(splits.train, SegmentationView(crop=100, scales=(1, 1), flip_p=0))
    batch = SegmentationCollator(CONFIG.image_mean, CONFIG.image_std, 100)([images[0], images[1]])
    assert batch["pixel_values"].shape == (2, 3, 100, 100)
    assert batch["labels"].dtype == torch.int64
    for number, (image, mask) in enumerate(draw_splits()["train"][:2]):
        height, width = mask.shape
        mean, std = np.array(CONFIG.image_mean), np.array(CONFIG.image_std)
        expected = torch.from_numpy((image / 255 - mean) / std).permute(2, 0, 1).float()
        torch.testing.assert_close(batch["pixel_values"][number, :, :height, :width], expected, rtol=1e-5, atol=1e-5)
        assert np.array_equal(batch["labels"][number, :height, :width].numpy(), mask)
        for outside in (np.s_[height:, :], np.s_[:, width:]):
            assert not batch["pixel_values"][number][:, *outside].any()
            assert (batch["labels"][number][outside] == 255).all()


def test_an_evaluation_has_every_image_whole(splits):
    images = SegmentationEvaluationImages(splits.eval)
    for number, (image, mask) in enumerate(draw_splits()["test"]):
        row = images[number]
        assert np.array_equal(row["pixel_values"].permute(1, 2, 0).numpy(), image)
        assert np.array_equal(row["labels"].numpy(), mask)


def test_wrong_views_are_refused():
    for flags, words in (({"crop": 0}, "crop \\(0\\)"), ({"crop": 8, "scales": (2, 1)}, "scales \\(2, 1\\)")):
        with pytest.raises(ValueError, match=words):
            SegmentationView(**flags)
