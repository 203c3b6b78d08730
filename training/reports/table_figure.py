"""The picture of a table: ours as dots with the standard deviation of the seeds, the paper's as open circles."""

from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..errors import visible
from ..plots import COLOURS, GRAY, figure

LONGEST = 40  # signs of a row's name
ROW = 0.27  # inches
OURS, PAPER = "ours, mean ± std of the seeds", "paper"


class Line(NamedTuple):
    """A row of a table.

    Args:
        values: ours in per cent, one a seed.
        paper: per cent, or None.
    """

    group: str
    label: str
    values: list[float]
    paper: float | None


def draw_lines(lines: list[Line], x: str | None, path: Path, conditions: str, together: bool) -> bool:
    """
    Args:
        x: name of the axis on which the labels are, evenly spaced; None puts the rows below each other.
        conditions: of the paper's numbers.
        together: ours and the paper's on one axis. Numbers of other conditions get panels of their own.

    Returns:
        whether there was a number to draw.
    """
    ours, paper = any(line.values for line in lines), any(line.paper is not None for line in lines)
    panels = [(ours, paper)] if together else [(True, False)] * ours + [(False, True)] * paper
    if not ours and not paper:
        return False
    height = 3.2 if x is not None else 1.0 + ROW * len(lines)
    with figure(path, height, layout="constrained") as fig:
        axes = fig.subplots(1, len(panels), squeeze=False)[0]
        for i, (axis, (with_ours, with_paper)) in enumerate(zip(axes, panels, strict=True)):
            if x is None:
                _rows(axis, lines, with_ours, with_paper, named=i == 0)
            else:
                _curve(axis, lines, x, with_ours, with_paper)
            title = "ours" if not with_paper else conditions if not with_ours else f"ours; {conditions}"
            axis.set_title(fill(_cut(title, 180), 88 // len(panels)), fontsize=8.5)
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)))
    return True


def _curve(axis: Axes, lines: list[Line], x: str, ours: bool, paper: bool) -> None:
    labels = _in_order(list(dict.fromkeys(line.label for line in lines)))
    groups = list(dict.fromkeys(line.group for line in lines))
    for i, group in enumerate(groups):
        look: Any = {"color": COLOURS[i % len(COLOURS)]}
        of = f"{visible(group)}: " if group else ""
        own = sorted((line for line in lines if line.group == group), key=lambda line: labels.index(line.label))
        measured = [(labels.index(line.label), line.values) for line in own if line.values]
        if ours and measured:
            places, values = zip(*measured, strict=True)
            _dots(axis.errorbar, places, values, "yerr", label=f"{of}{OURS}", linestyle="-", gid=f"ours {i}", **look)
        known = [(labels.index(line.label), line.paper) for line in own if line.paper is not None]
        if paper and known:
            places, values = zip(*known, strict=True)
            axis.plot(
                places, values, "o", markerfacecolor="white", linestyle=(0, (4, 2)), linewidth=1, label=f"{of}{PAPER}",
                gid=f"paper {i}", **look,
            )  # fmt: skip
    axis.set_xticks(range(len(labels)), [_cut(label, 12) for label in labels])
    axis.set(xlim=(-0.4, len(labels) - 0.6), xlabel=x, ylabel="top-1, %")
    axis.yaxis.set_major_locator(MaxNLocator(5))


def _rows(axis: Axes, lines: list[Line], ours: bool, paper: bool, named: bool) -> None:
    measured = [(i, line.values) for i, line in enumerate(lines) if line.values]
    if ours and measured:
        places, values = zip(*measured, strict=True)

        def across(places: Any, means: Any, **kwargs: Any) -> Any:
            return axis.errorbar(means, places, **kwargs)

        _dots(across, places, values, "xerr", label=OURS, linestyle="none", color=COLOURS[0], gid="ours")
    known = [(line.paper, i) for i, line in enumerate(lines) if line.paper is not None]
    if paper and known:
        axis.plot(
            *zip(*known, strict=True),
            "o",
            color=GRAY,
            markerfacecolor="white",
            linestyle="none",
            label=PAPER,
            gid="paper",
        )
    titles = [", ".join(filter(None, [line.group, line.label])) for line in lines]
    axis.set_yticks(range(len(lines)), [_cut(title, LONGEST) for title in titles] if named else [""] * len(lines))
    axis.set(ylim=(len(lines) - 0.5, -0.5), xlabel="top-1, %")
    axis.margins(x=0.1)
    axis.xaxis.set_major_locator(MaxNLocator(5))


def _dots(draw: Any, places: Any, values: Any, direction: str, **look: Any) -> None:
    spread = [np.std(some, ddof=1) if len(some) > 1 else 0.0 for some in values]
    draw(places, [np.mean(some) for some in values], marker="o", markersize=4, capsize=3, **{direction: spread}, **look)


def _in_order(labels: list[str]) -> list[str]:
    """Numbers by their size, words as they come."""
    try:
        return sorted(labels, key=float)
    except ValueError:
        return labels


def _cut(text: str, length: int) -> str:
    text = visible(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"
