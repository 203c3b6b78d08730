"""Pictures of what a model segments beside what is annotated."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.patches import Patch

from modeling_moco import MoCoForSemanticSegmentation, MoCoSegmentationImageProcessor

from ..plots import figure, short_names
from .dataset.layouts import IGNORED
from .dataset.opening import SegmentationSplit
from .dataset.views import SegmentationEvaluationImages
from .evaluate import segment

SHOWN = 6  # images
ROW = 2.2  # inches
WHITE = (255, 255, 255)  # pixels that count nowhere
MOST_NAMES = 12  # classes in the legend


def palette(classes: int) -> np.ndarray:
    """A colour for each number in a mask, uint8 (256, 3): dark for class 0, which mostly is the background."""
    colours = np.full((256, 3), WHITE, np.uint8)
    chosen = matplotlib.colormaps["tab20"](np.arange(max(classes - 1, 1)) % 20)[:, :3]
    colours[1:classes] = (255 * chosen[: classes - 1]).astype(np.uint8)
    colours[0] = (40, 40, 40)
    return colours


def draw_segmentations(
    split: SegmentationSplit,
    model: MoCoForSemanticSegmentation,
    processor: MoCoSegmentationImageProcessor,
    class_names: list[str],
    path: Path,
) -> None:
    """Some evenly spaced images with their masks and with what is found; pixels that count nowhere are white in both."""
    count = min(SHOWN, len(split))
    places = [i * len(split) // count for i in range(count)]
    images, colours = SegmentationEvaluationImages(split), palette(len(class_names))
    seen: set[int] = set()
    with figure(path, 0.5 + ROW * count, layout="constrained") as fig:
        axes = fig.subplots(count, 3, squeeze=False)
        for axis, title in zip(axes[0], ("image", "annotated", "found"), strict=True):
            axis.set_title(title)
        for row, place in zip(axes, places, strict=True):
            image = images[place]
            labels = image["labels"].numpy()
            found = segment(model, image["pixel_values"], processor).cpu().numpy()
            found = np.where(labels == IGNORED, IGNORED, found)
            seen |= {*np.unique(labels).tolist(), *np.unique(found).tolist()} - {IGNORED}
            pictures: list[Any] = [image["pixel_values"].permute(1, 2, 0).numpy(), colours[labels], colours[found]]
            for axis, picture in zip(row, pictures, strict=True):
                axis.imshow(picture, interpolation="nearest")
                axis.set_axis_off()
        shown = sorted(seen)[:MOST_NAMES]
        names = short_names(class_names, 24)
        handles = [Patch(facecolor=colours[number] / 255, label=names[number]) for number in shown]
        fig.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
