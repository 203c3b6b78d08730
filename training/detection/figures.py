"""Figures of a detector: what it finds beside what is there, and its AP by class."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..plots import BLUE, GREEN, HALO, INK, VERMILION, figure, short_names
from ..transfer.figures import draw_bars
from .average_precision import AveragePrecision, Found
from .dataset.opening import DetectionSplit

SHOWN = 6  # images
LEAST_SCORE = 0.5  # of a detection that is drawn
ROW = 2.9  # inches


def draw_detections(split: DetectionSplit, found: list[Found], class_names: list[str], path: Path) -> None:
    """Some evenly spaced images twice: with the boxes that are annotated, and with those that are found.

    Args:
        found: of each image of the split. Those with a score above 0.5 are drawn.
    """
    places = [i * len(split) // min(SHOWN, len(split)) for i in range(min(SHOWN, len(split)))]
    with figure(path, 0.3 + ROW * len(places), layout="constrained") as fig:
        axes = fig.subplots(len(places), 2, squeeze=False)
        axes[0, 0].set_title("annotated")
        axes[0, 1].set_title(f"found, with a score above {LEAST_SCORE:g}")
        for (left, right), place in zip(axes, places, strict=True):
            try:
                image = np.asarray(split.image(place))
            except OSError:
                image = np.full((*split.sizes[place][::-1], 3), 200, np.uint8)
            objects, detections = split.objects[place], found[place]
            shown = detections.scores > LEAST_SCORE
            scores = [f"{score:.2f}" for score in detections.scores[shown]]
            _draw(left, image, objects.boxes, objects.labels, [""] * len(objects), class_names)
            _draw(right, image, detections.boxes[shown], detections.labels[shown], scores, class_names)


def _draw(axis: Axes, image: np.ndarray, boxes: Any, labels: Any, words: list[str], class_names: list[str]) -> None:
    axis.imshow(image)
    axis.set_axis_off()
    names = short_names(class_names, 14)
    colours = (BLUE, VERMILION, GREEN, INK)
    for (left, top, right, bottom), label, word in zip(boxes, labels, words, strict=True):
        colour = colours[label % len(colours)]
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.1))
        name = f"{names[label]} {word}".strip()
        place = "bottom" if top > 0.05 * len(image) else "top"  # into the box where there is no room above it
        axis.text(left, top, name, color=colour, fontsize=6, va=place, path_effects=[HALO], clip_on=True)


def draw_classes(measured: dict[str, AveragePrecision], path: Path) -> None:
    """The AP of each class in per cent, of boxes and of masks, the best first. Of many classes the best and the worst."""
    values = {kind: {name: 100 * ap for name, ap in found.per_class.items()} for kind, found in measured.items()}
    draw_bars(values, "AP", path)
