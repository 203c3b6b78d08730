"""Mean intersection over union, from the confusion of all pixels of a dataset.

Shapes: `L` classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .dataset.layouts import IGNORED


def confusion(labels: torch.Tensor, predicted: torch.Tensor, classes: int) -> torch.Tensor:
    """How many pixels of each class are predicted as which: int64 (L, L), a row for each true class.

    Args:
        labels: true classes, any shape and integer type; pixels of class 255 are left out.
        predicted: classes of the same shape.
        classes: L.
    """
    counted = labels != IGNORED
    places = labels[counted].long() * classes + predicted[counted].long()
    return torch.bincount(places, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class SegmentationScores:
    """What was measured, in [0, 1].

    Args:
        miou: mean of `per_class` without NaN.
        pixel_accuracy: share of the pixels that are predicted right.
        per_class: intersection over union of each class by name, over all pixels of the dataset; NaN for one that is neither in
            the masks nor predicted.
    """

    miou: float
    pixel_accuracy: float
    per_class: dict[str, float]


def scores(counts: torch.Tensor, class_names: Sequence[str]) -> SegmentationScores:
    """The scores of a confusion (L, L) with at least one pixel."""
    right = counts.diagonal().double()
    union = (counts.sum(0) + counts.sum(1)).double() - right
    per_class = right / union  # 0 / 0 is NaN
    return SegmentationScores(
        per_class.nanmean().item(),
        (right.sum() / counts.sum()).item(),
        dict(zip(class_names, per_class.tolist(), strict=True)),
    )
