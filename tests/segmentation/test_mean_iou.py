"""Mean IoU: against scikit-learn and a plain loop, and apart from what it is often mistaken for."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

from training.segmentation.mean_iou import confusion, scores

NAMES = ["a", "b", "c", "d"]


def maps(seed: int, images: int = 3):
    """Masks and predictions that agree on some places, of images with very different shares of the classes."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(images):
        shares = random.dirichlet([0.5] * 4)
        labels = random.choice(4, (30, 20 + 10 * number), p=shares)
        predicted = np.where(random.random(labels.shape) < 0.6, labels, random.integers(0, 4, labels.shape))
        labels[random.random(labels.shape) < 0.1] = 255
        found.append((labels.astype(np.uint8), predicted))
    return found


def counts_of(found):
    return sum(confusion(torch.from_numpy(labels), torch.from_numpy(predicted), 4) for labels, predicted in found)


@pytest.mark.parametrize("seed", range(5))
def test_it_equals_scikit_learns_over_all_pixels_that_count(seed):
    found = maps(seed)
    counts = counts_of(found)
    assert counts.dtype == torch.int64
    truth, predicted = (np.concatenate([pair[i].ravel() for pair in found]) for i in (0, 1))
    counted = truth != 255
    truth, predicted = truth[counted], predicted[counted]
    assert np.array_equal(counts.numpy(), confusion_matrix(truth, predicted, labels=range(4)))
    measured = scores(counts, NAMES)
    per_class = jaccard_score(truth, predicted, labels=range(4), average=None)
    assert list(measured.per_class.values()) == pytest.approx(per_class.tolist(), rel=1e-12)
    assert list(measured.per_class) == NAMES
    assert measured.miou == pytest.approx(jaccard_score(truth, predicted, average="macro"), rel=1e-12)
    assert measured.pixel_accuracy == pytest.approx(accuracy_score(truth, predicted), rel=1e-12)


def test_it_is_of_the_dataset_and_not_a_mean_over_images():
    found = maps(0)
    of_images = [scores(counts_of([pair]), NAMES).miou for pair in found]
    assert abs(scores(counts_of(found), NAMES).miou - sum(of_images) / len(of_images)) > 0.01


def test_pixels_that_do_not_count_count_nowhere():
    labels, predicted = torch.tensor([0, 0, 1, 255, 255]), torch.tensor([0, 1, 1, 1, 0])
    assert confusion(labels, predicted, 2).tolist() == [[1, 1], [0, 1]]
    measured = scores(confusion(labels, predicted, 2), NAMES[:2])
    assert measured.per_class == {"a": 1 / 2, "b": 1 / 2}
    assert measured.pixel_accuracy == pytest.approx(2 / 3)


def test_a_class_that_is_nowhere_is_left_out_and_one_that_is_only_predicted_or_only_missed_is_zero():
    labels, predicted = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 3, 0])
    measured = scores(confusion(labels, predicted, 4), NAMES)
    assert measured.per_class["a"] == 2 / 4
    assert math.isnan(measured.per_class["b"])
    assert measured.per_class["c"] == measured.per_class["d"] == 0
    assert measured.miou == pytest.approx((0.5 + 0 + 0) / 3)


def test_many_classes_in_masks_of_eight_bits_are_told_apart():
    labels = torch.arange(150, dtype=torch.uint8)
    counts = confusion(labels, labels.flip(0).long(), 150)
    assert torch.equal(counts, torch.eye(150, dtype=torch.int64).flip(1))


def test_more_pixels_than_float32_can_count_are_counted():
    counts = confusion(torch.tensor([0, 1]), torch.tensor([0, 1]), 2) * (2**31 + 1)
    assert counts[0, 0].item() + 1 == 2**31 + 2
    counts[0, 1] = 1
    measured = scores(counts, NAMES[:2])
    assert 0 < 1 - measured.pixel_accuracy < 1e-9
