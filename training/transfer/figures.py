"""Figures of models around an encoder: their training, and what they reach for each class."""

from pathlib import Path
from typing import Any

import numpy as np

from ..plots import BLUE, GRAY, VERMILION, Panel, curves, figure, short_names

MOST_BARS = 40
PANELS = (
    Panel("Loss", {"loss": "loss"}),
    Panel("Losses of the proposals", {"loss_rpn_cls": "objects", "loss_rpn_loc": "boxes"}),
    Panel("Losses of the detector", {"loss_cls": "classes", "loss_box_reg": "boxes", "loss_mask": "masks"}),
    Panel("Learning rate", {"learning_rate": "rate"}),
)


def draw_training(history: list[dict[str, Any]], path: Path) -> None:
    """What a training has logged, by step; nothing if that is nothing."""
    if history := [entry for entry in history if "loss" in entry]:
        curves(PANELS, history, path, by="step")


def draw_bars(measured: dict[str, dict[str, float]], measure: str, path: Path) -> None:
    """A measure of each class, the best first; of many classes the best and the worst. NaN is left out.

    Args:
        measured: per cent by class name, of one or two kinds of outputs.
        measure: its name.
    """
    kinds = list(measured)
    values = {kind: {name: value for name, value in measured[kind].items() if value == value} for kind in kinds}
    names = sorted(values[kinds[0]], key=lambda name: -values[kinds[0]][name])
    if len(names) > MOST_BARS:
        names = names[: MOST_BARS // 2] + names[-MOST_BARS // 2 :]
    width = 0.8 / len(kinds)
    with figure(path, 0.7 + 0.22 * max(1, len(names)), layout="constrained") as fig:
        axis = fig.add_subplot()
        for number, (kind, colour) in enumerate(zip(kinds, (BLUE, VERMILION), strict=False)):
            places = np.arange(len(names)) + (number - (len(kinds) - 1) / 2) * width
            axis.barh(
                places, [values[kind].get(name, 0) for name in names], width, color=colour, label=f"{kind} {measure}"
            )
        axis.set_yticks(range(len(names)), short_names(names, 24))
        axis.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 100), xlabel=f"{measure}, %")
        axis.grid(False, axis="y")
        axis.set_axisbelow(True)
        axis.tick_params(colors=GRAY)
        if len(kinds) > 1:
            axis.legend(loc="lower right")
