"""Figures of a run, each as PNG and SVG: legible at 800 px, safe for colour-blind eyes, the same bytes for the same data.

Every function takes data and a path without suffix.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from PIL import Image
from threadpoolctl import threadpool_limits

from .engine.files import whole_files
from .errors import visible
from .views.policy import ViewParams

# Of the palette of Okabe and Ito. The first colour of each is for queries, the second for keys and for what is wrong.
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
INK, GRAY, PALE = "#1f2933", "#6b7280", "#d5dae1"
WIDTH = 8  # inches, 800 px of a README: a point is 1.4 px there
DPI = 200  # two pixels of a file for one of a README
COLOURS = matplotlib.color_sequences["petroff10"]  # arXiv:2107.02270
MOST_NAMED_CLASSES = 2 * len(COLOURS)
MOST_CLASSES_OF_MATRIX = 40  # more names cannot be read, nor more squares
SHOWN_PAIRS = 25
PERPLEXITY = 30
POINTS = 72  # an inch
LEGEND_LINE = 0.16  # inches
NEIGHBOURS = 7  # columns of the grid of neighbours
BADGE = {"facecolor": "white", "edgecolor": "none", "pad": 1}
HALO = withStroke(linewidth=2.5, foreground="white", alpha=0.85)
STYLE = {
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # class names may have a $
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": PALE,
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.6,
    "legend.fontsize": 8,
    "legend.edgecolor": "none",
    "figure.facecolor": "white",
    "image.composite_image": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "moco",
}


@contextmanager
def figure(path: Path, height: float, **kwargs: Any) -> Iterator[Figure]:
    """A figure of the README's width and `height` inches, which is saved as `path.png` and `path.svg` in the end."""
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(WIDTH, height), **kwargs)
        yield fig
        with _without_warnings_of_characters(), whole_files(path.parent) as fresh:
            fig.savefig(fresh / f"{path.name}.png", dpi=DPI)
            fig.savefig(fresh / f"{path.name}.svg", dpi=DPI, metadata={"Date": None})


@contextmanager
def _without_warnings_of_characters() -> Iterator[None]:
    with warnings.catch_warnings():  # matplotlib's own font lacks the characters of most languages
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        yield


class Panel(NamedTuple):
    """Some of the numbers that a run logs, over its epochs: their keys and what the legend calls them."""

    title: str
    series: dict[str, str]
    from_zero: bool = True


PANELS = (
    Panel("InfoNCE loss", {"loss": "loss"}, from_zero=False),
    Panel("Contrast accuracy, %", {"contrast_top1": "top-1", "contrast_top5": "top-5"}),
    Panel("kNN accuracy, %", {}, from_zero=False),  # its series hang on the run
    Panel("Learning rate", {"learning_rate": "rate"}),
    Panel(
        "Similarity to a query",
        {"positive_similarity": "its key", "hardest_negative_similarity": "hardest negative"},
        from_zero=False,
    ),
    Panel("Alignment", {"alignment": "alignment"}),
    Panel("Uniformity", {"uniformity": "uniformity"}),
    Panel("RankMe", {"eval_rankme": "RankMe"}),
    Panel(
        "Contrast, regrouped keys, %",
        {"eval_contrast_top1": "as trained", "eval_contrast_top1_shuffled": "regrouped"},
    ),
    Panel("Queue age, steps", {"queue_age": "age"}),
    Panel("Key drift, %", {"key_drift": "lag"}),
)


def training_curves(history: list[dict[str, Any]], chance: float, path: Path, knn_k: int | None = None) -> None:
    """What a pretraining run has logged, by epoch: a panel for every kind of number that is there.

    Args:
        history: of the trainer, entries with an "epoch".
        chance: loss of a model for which all keys are equally similar.
        knn_k: number of neighbours behind `eval_knn_top1`; other numbers have theirs in their name.
    """
    ks = {
        key: f"k {match[1]}"
        for entry in history
        for key in entry
        if (match := re.fullmatch(r"eval_knn_top1_k(\d+)", key))
    }
    knn = {"eval_knn_top1": "top-1" if knn_k is None else f"k {knn_k}"} | ks
    curves([panel if panel.series else panel._replace(series=knn) for panel in PANELS], history, path, chance=chance)


def curves(
    panels: Sequence[Panel],
    history: list[dict[str, Any]],
    path: Path,
    by: str = "epoch",
    chance: float | None = None,
) -> None:
    """Those of the panels for which something has been logged.

    Args:
        by: what stands on the axis, "epoch" or "step".
        chance: a line across the panel of the loss.
    """
    logged = {key for entry in history for key in entry}
    panels = [panel for panel in panels if logged & panel.series.keys()]
    columns, height = (2, 2.35) if len(panels) <= 4 else (3, 1.9)
    width, rows = WIDTH / columns, [panels[i : i + columns] for i in range(0, len(panels), columns)]
    legends = [max(_legend_lines(panel, logged) for panel in row) for row in rows]  # above the curves, never on them
    page = (WIDTH, height * len(rows) + LEGEND_LINE * sum(legends))
    with figure(path, page[1]) as fig:
        for i, panel in enumerate(panels):
            row, column = divmod(i, columns)
            below = height * (len(rows) - 1 - row) + LEGEND_LINE * sum(legends[row + 1 :])
            # Placed by hand: matplotlib's own layout takes seconds for eleven panels.
            own = _legend_lines(panel, logged)
            tall = height - 0.7 + LEGEND_LINE * (legends[row] - own)
            place = (column * width + 0.5, below + 0.42, width - 0.62, tall)
            axis = fig.add_axes(np.divide(place, page * 2).tolist())
            if chance is not None and "loss" in panel.series:
                axis.axhline(chance, color=GRAY, linestyle=(0, (4, 2)), linewidth=1, gid="chance")
                beside: Any = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points", "ha": "right"}
                axis.annotate(f"all keys alike {chance:.2f}", (1, chance), (0, 3), color=GRAY, fontsize=8, **beside)
            _draw_panel(axis, panel, history, own, by)
            axis.set_xlim(0, 1.02 * max(entry[by] for entry in history))
            if i >= len(panels) - columns:
                axis.set_xlabel(by, labelpad=2)


def _legend_lines(panel: Panel, logged: set[str]) -> int:
    shown = [name for key, name in panel.series.items() if key in logged]
    return -(-len(shown) // _legend_columns(shown)) if len(shown) > 1 else 0


def _legend_columns(names: list[str]) -> int:
    return 2 if max(map(len, names)) <= 8 else 1  # with its number a longer one takes the width of a panel


def _draw_panel(axis: Axes, panel: Panel, history: list[dict[str, Any]], lines: int, by: str) -> None:
    shown = [(key, name) for key, name in panel.series.items() if any(key in entry for entry in history)]
    for (key, name), colour in zip(shown, (BLUE, VERMILION, GREEN, *COLOURS), strict=False):
        places, values = zip(*((entry[by], entry[key]) for entry in history if key in entry), strict=True)
        marker = "o" if len(values) < 30 else None
        last = f"{values[-1]:,.0f}" if abs(values[-1]) >= 1000 else f"{values[-1]:.3g}"
        axis.plot(places, values, color=colour, marker=marker, markersize=3, label=f"{name}: {last}", gid=key)
    pad = 4 + POINTS * LEGEND_LINE * lines
    axis.set_title(panel.title, pad=pad)
    if len(shown) > 1:
        above: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": _legend_columns([n for _, n in shown])}
        axis.legend(**above, borderpad=0.2, borderaxespad=0, handlelength=1.2, columnspacing=1, labelspacing=0.15)
    else:
        axis.set_title(last, loc="right", color=BLUE, fontweight="normal", pad=pad)
    axis.margins(y=0.15)
    if panel.from_zero:
        low, high = axis.dataLim.intervaly
        axis.set_ylim(min(0, 1.1 * low), max(0, 1.1 * high) or None)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_locator(MaxNLocator(4))


COMPARED = (
    Panel("InfoNCE loss", {"loss": "loss"}, from_zero=False),
    Panel("Contrast top-1, %", {"contrast_top1": "top-1"}),
    Panel("kNN top-1, %", {"eval_knn_top1": "top-1"}, from_zero=False),
    Panel("RankMe", {"eval_rankme": "RankMe"}),
)
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


class Overlaid(NamedTuple):
    """The runs that share a colour: their name for the legend, and what each has logged."""

    name: str
    histories: list[list[dict[str, Any]]]


def compared_curves(groups: list[Overlaid], path: Path) -> bool:
    """What several runs have logged, by epoch: a panel for every kind of number that one of them has, a line for every run.

    Args:
        groups: in the order of their colours. Of the entries of a history the numbers are drawn that have an "epoch".

    Returns:
        whether there was any; without one no figure is drawn.
    """
    panels = [panel for panel in COMPARED if any(_lines(panel, group) for group in groups)]
    if not panels:
        return False
    names = [_cut(visible(group.name), 120) for group in groups]
    columns = max(1, min(4, 110 // (6 + max(map(len, names)))))
    legend = 0.15 + LEGEND_LINE * -(-len(groups) // columns)
    height, width = 2.35, WIDTH / 2
    page = (WIDTH, height * -(-len(panels) // 2) + legend)
    with figure(path, page[1]) as fig:
        handles: list[Any] = []
        for i, panel in enumerate(panels):
            row, column = divmod(i, 2)
            below = page[1] - legend - height * (row + 1)
            axis = fig.add_axes(
                np.divide((column * width + 0.5, below + 0.42, width - 0.62, height - 0.7), page * 2).tolist()
            )
            for j, group in enumerate(groups):
                look: Any = {"color": COLOURS[j % len(COLOURS)], "linestyle": DASHES[j // len(COLOURS) % len(DASHES)]}
                if i == 0:
                    handles.append(Line2D([], [], **look))
                for epochs, values in _lines(panel, group):
                    marker = "o" if len(values) == 1 else None
                    axis.plot(
                        epochs, values, linewidth=1.1, marker=marker, markersize=3, gid=f"{panel.title} {j}", **look
                    )
            axis.set_title(panel.title, pad=4)
            axis.margins(y=0.08)
            if panel.from_zero:
                axis.set_ylim(bottom=0)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.yaxis.set_major_locator(MaxNLocator(4))
            if i >= len(panels) - 2:
                axis.set_xlabel("epoch", labelpad=2)
        fig.legend(
            handles, names, loc="upper left", ncols=columns, handlelength=2.2, labelspacing=0.15, borderaxespad=0.3
        )
    return True


def _lines(panel: Panel, group: Overlaid) -> list[tuple[list[float], list[float]]]:
    """Epochs and values of each run of a group that has logged a panel's number."""
    (key,) = panel.series
    drawn = []
    for history in group.histories:
        points = [(entry.get("epoch"), entry.get(key)) for entry in history]
        numbers = [(x, y) for x, y in points if all(isinstance(z, int | float) and np.isfinite(z) for z in (x, y))]
        if numbers:
            epochs, values = zip(*numbers, strict=True)
            drawn.append(([*epochs], [*values]))
    return drawn


def text_width(words: str, size: float) -> float:
    """Width of words in letters of that size, all in points."""
    with _without_warnings_of_characters():
        width, _, _ = text_to_path.get_text_width_height_descent(words, FontProperties(size=size), ismath=False)
    return float(width)


class Sheet:
    """A page on which images are placed in inches from its top left corner."""

    def __init__(self, fig: Figure):
        self.axis = fig.add_axes((0, 0, 1, 1))
        self.axis.axis("off")
        self.width, self.height = fig.get_size_inches()

    def image(
        self, pixels: np.ndarray, x: float, y: float, width: float, height: float, frame: str, line: float = 1
    ) -> None:
        enlarged = pixels.shape[1] < DPI * width  # by whole squares, for a blur would hide how few pixels there are
        extent, shown = (x, x + width, y + height, y), "nearest" if enlarged else "antialiased"
        self.axis.imshow(pixels, extent=extent, aspect="auto", interpolation=shown)
        self.frame(x, y, width, height, frame, line)

    def frame(self, x: float, y: float, width: float, height: float, colour: str, line: float) -> None:
        self.axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=line, zorder=3))

    def text(self, x: float, y: float, words: str, width: float | None = None, **kwargs: Any) -> None:
        """Words, in smaller letters where they would take more than `width` inches."""
        if width is not None:
            kwargs["fontsize"] *= min(1.0, POINTS * width / max(1.0, text_width(words, kwargs["fontsize"])))
        self.axis.text(x, y, words, **({"va": "top"} | kwargs))

    def finish(self) -> None:
        self.axis.set(xlim=(0, self.width), ylim=(self.height, 0))  # images have changed them


def neighbour_grid(
    queries: np.ndarray,
    neighbours: np.ndarray,
    similarities: np.ndarray,
    query_labels: np.ndarray,
    neighbour_labels: np.ndarray,
    class_names: list[str],
    bank_size: int,
    path: Path,
    columns: int = NEIGHBOURS,
) -> None:
    """Queries in the first column and their nearest bank images beside them, nearest first.

    A neighbour of another class has a vermilion frame and ≠ in its corner.

    Args:
        queries: uint8 pixels (Q, H, W, 3).
        neighbours: uint8 pixels of the k nearest images of each query (Q, k, H, W, 3).
        similarities: cosine similarities of the neighbours to their query (Q, k).
        query_labels, neighbour_labels: classes (Q,) and (Q, k), which are not read where there are no `class_names`.
        class_names: empty where the images have no labels.
        bank_size: images among which the neighbours were searched.
        columns: neighbours that a row has space for, at least k.
    """
    gap, space = 0.1, 0.15
    tile = (WIDTH - 2 * gap - space - (columns - 1) * gap) / (columns + 1)
    row = tile + 0.28
    names = short_names(class_names, 11)
    with figure(path, 0.42 + row * len(queries)) as fig:
        sheet = Sheet(fig)
        sheet.text(gap, 0.1, "query", weight="bold", color=BLUE)
        sheet.text(
            gap + tile + space, 0.1, f"nearest of {bank_size:,} training images, with cosine similarity", weight="bold"
        )
        for i, query in enumerate(queries):
            y = 0.34 + i * row
            sheet.image(query, gap, y, tile, tile, BLUE, 2)
            sheet.text(gap, y + tile + 0.04, names[query_labels[i]] if names else "", tile, color=BLUE, fontsize=7.5)
            for j, (pixels, label) in enumerate(zip(neighbours[i], neighbour_labels[i], strict=True)):
                x, other = gap + tile + space + j * (tile + gap), bool(class_names) and label != query_labels[i]
                colour, number = VERMILION if other else PALE, f"{similarities[i, j]:.2f}"
                space_of_name = tile - text_width(number, 7.5) / POINTS - 0.05
                sheet.image(pixels, x, y, tile, tile, colour, 2 if other else 0.8)
                name, ink = names[label] if names else "", VERMILION if other else INK
                sheet.text(x, y + tile + 0.04, name, space_of_name, color=ink, fontsize=7.5)
                if other:
                    sheet.text(x + tile - 0.05, y + 0.06, "≠", color=VERMILION, ha="right", weight="bold", bbox=BADGE)
                sheet.text(x + tile, y + tile + 0.04, number, color=GRAY, fontsize=7.5, ha="right")
        sheet.finish()


class Tile(NamedTuple):
    """An image and what is below it: words at the left, a number at the right.

    Args:
        pixels: uint8 (H, W, 3).
        colour: of its frame and its words.
    """

    pixels: np.ndarray
    words: str
    number: str = ""
    colour: str = INK


def image_rows(title: str, rows: list[list[Tile]], path: Path, columns: int = NEIGHBOURS + 1) -> None:
    """Rows of images, each with its words.

    Args:
        columns: images that a row has space for, at least as many as the longest has.
    """
    gap, top = 0.1, 0.34
    tile = (WIDTH - gap) / columns - gap
    height = tile + 0.28
    with figure(path, top + 0.08 + height * len(rows)) as fig:
        sheet = Sheet(fig)
        sheet.text(gap, 0.1, title, weight="bold")
        for i, row in enumerate(rows):
            y = top + i * height
            for j, (pixels, words, number, colour) in enumerate(row):
                x, strong = gap + j * (tile + gap), colour != INK
                sheet.image(pixels, x, y, tile, tile, colour if strong else PALE, 2 if strong else 0.8)
                space_of_words = tile - text_width(number, 7) / POINTS - 0.05
                sheet.text(x, y + tile + 0.04, _cut(visible(words), 12), space_of_words, color=colour, fontsize=7)
                sheet.text(x + tile, y + tile + 0.04, number, color=GRAY, fontsize=7, ha="right")
        sheet.finish()


def _pixels(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def short_names(class_names: list[str], length: int) -> list[str]:
    """What classes are called in a figure, each otherwise: the first of several synonyms, as ImageNet has them, if it can be.

    ImageNet has "maillot" beside "maillot, tank suit", and "crane" twice. Where the first synonyms are the same, it is all of
    them, cut in the middle; and where these are, the number of the class is added.
    """
    names = [_cut(visible(name.split(",")[0]), length) for name in class_names]
    whole = [_cut(visible(name), length, length // 2) for name in class_names]
    numbered = [f"{_cut(name, length - len(f' {i}'))} {i}" for i, name in enumerate(names)]
    for others in (whole, numbered):
        times = Counter(names)
        names = [name if times[name] == 1 else other for name, other in zip(names, others, strict=True)]
    return names


def _cut(name: str, length: int, end: int = 0) -> str:
    """At most `length` signs of a name, `end` of them its last ones."""
    return name if len(name) <= length else f"{name[: length - 1 - end]}…{name[len(name) - end :]}"


class DrawnImage(NamedTuple):
    """An image, the parameters of its views, and the views as training would get them: uint8 (3, S, S)."""

    image: Image.Image
    params: list[ViewParams]
    views: list[torch.Tensor]


def view_pairs(images: list[DrawnImage], path: Path) -> None:
    """Images with their crops drawn on them, and beside each the query view and the key view with their parameters.

    A memory bank has one view, which has no key beside it.
    """
    tile, row, gap = 1.25, 1.42, 0.12
    columns = ((1.6, BLUE, "query view"), (4.85, VERMILION, "key view"))[: len(images[0].views)]
    with figure(path, 0.34 + row * len(images)) as fig:
        sheet = Sheet(fig)
        sheet.text(gap, 0.1, "image and crops" if len(columns) > 1 else "image and crop", weight="bold")
        for x, colour, words in columns:
            sheet.text(x, 0.1, words if len(columns) > 1 else "view", weight="bold", color=colour)
        for i, (image, drawn, views) in enumerate(images):
            y = 0.34 + i * row
            scale = tile / max(image.size)
            width, height = scale * image.width, scale * image.height
            left, top = gap + (tile - width) / 2, y + (tile - height) / 2
            sheet.image(np.asarray(image), left, top, width, height, PALE, 0.8)
            for (x, colour, _), params, view in zip(columns, drawn, views, strict=True):
                down, right, h, w = (scale * pixels for pixels in params.box)
                sheet.frame(left + right, top + down, w, h, colour, 2)
                sheet.image(_pixels(view), x, y, tile, tile, colour, 2)
                sheet.text(x + tile + 0.1, y - 0.02, describe_view(params, *image.size), fontsize=8, linespacing=1.3)
        sheet.finish()


def describe_view(params: ViewParams, width: int, height: int) -> str:
    """The parameters of a view in a few short lines, for an image of that size in pixels; the jitter keeps its order."""
    top, left, h, w = params.box
    lines = [f"crop {100 * h * w / (height * width):.0f} %: {w} × {h} px", f"at {left}, {top}"]
    for name, factor in params.jitter:
        change = f"{factor:+.2f} turns".replace("-", "−") if name == "hue" else f"× {factor:.2f}"
        lines.append(f"{name} {change}")
    others = ["gray"] * params.gray + [f"blur σ {params.blur:.1f} px"] * (params.blur > 0)
    others += ["solarized"] * params.solarize + ["flipped"] * params.flip
    return "\n".join(lines + wrap(", ".join(others), 30))


def embedding(features: torch.Tensor, labels: torch.Tensor, class_names: list[str], path: Path) -> None:
    """A t-SNE of features, coloured by class; up to 20 classes are named.

    Args:
        features: unit length (n, D).
        labels: (n,); what they are does not matter where there are no `class_names`.
    """
    places = _tsne(features.double().numpy())
    present = labels.unique().tolist() if class_names else []
    names = short_names(class_names, 16)
    title = f"t-SNE of the features of {len(places):,} images" + (f", {len(present)} classes" if present else "")
    with figure(path, 5.6, layout="constrained") as fig:
        axis = fig.add_subplot()
        axis.set(title=title, xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color=PALE)
        dots: dict[str, Any] = {"s": 14 if len(places) > 500 else 22, "linewidth": 0.2, "edgecolor": "white"}
        if not present:
            axis.scatter(places[:, 0], places[:, 1], color=BLUE, **dots)
        elif len(present) > MOST_NAMED_CLASSES:
            axis.scatter(places[:, 0], places[:, 1], c=labels.numpy(), cmap="viridis", **dots)
        else:
            for i, label in enumerate(present):
                x, y = places[labels.numpy() == label].T
                colour, marker = COLOURS[i % len(COLOURS)], "o^"[i // len(COLOURS)]
                axis.scatter(x, y, color=colour, marker=marker, label=names[label], **dots)
                axis.annotate(
                    names[label],
                    (np.median(x), np.median(y)),
                    ha="center",
                    va="center",
                    path_effects=[HALO],
                    weight="bold",
                )
            fig.legend(loc="outside right center", markerscale=1.6, handletextpad=0.1)


def _tsne(x: np.ndarray) -> np.ndarray:
    if len(x) < 2:
        return np.zeros((len(x), 2))
    from sklearn.manifold import TSNE  # here, for it takes a tenth of the time that a command needs to begin

    alike = x.std(axis=0).max() < 1e-6  # collapsed: there are no principal components to begin with
    tsne = TSNE(init="random" if alike else "pca", perplexity=min(PERPLEXITY, (len(x) - 1) / 3), random_state=0)
    with threadpool_limits(1):  # its threads spin: with two on two busy cores it takes four times as long
        return tsne.fit_transform(x)


def confusion(counts: torch.Tensor, class_names: list[str], path: Path) -> None:
    """Which classes a classifier calls which: a matrix of up to 40 classes, of more the pairs that are confused most.

    Args:
        counts: class, what it is called, and how many images, for all pairs that occur: int64 (pairs, 3).
    """
    if len(class_names) <= MOST_CLASSES_OF_MATRIX:
        rows, columns, images = counts.unbind(dim=1)
        matrix = counts.new_zeros(len(class_names), len(class_names))
        matrix[rows, columns] = images
        _confusion_matrix(matrix, class_names, path)
    else:
        _confused_pairs(counts, class_names, path)


def _confusion_matrix(counts: torch.Tensor, class_names: list[str], path: Path) -> None:
    # Images of each class (rows) by the class that they are called (columns), coloured by their share of the row.
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    names = short_names(class_names, 16)
    with figure(path, WIDTH - 1.4, layout="constrained") as fig:
        axis = fig.add_subplot()
        axis.grid(False)
        image = axis.imshow((100 * shares).numpy(), cmap="Blues", vmin=0, vmax=100)
        fig.colorbar(image, ax=axis, shrink=0.8, label="% of the class")
        axis.set(xlabel="called", ylabel="class")
        axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axis.set_yticks(range(len(names)), names)
        if len(names) <= MOST_NAMED_CLASSES:
            for i, j in counts.nonzero().tolist():
                colour = "white" if shares[i, j] > 0.5 else INK
                axis.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=8, color=colour)


def _confused_pairs(counts: torch.Tensor, class_names: list[str], path: Path) -> None:
    mistakes = counts[counts[:, 0] != counts[:, 1]]
    most = mistakes[mistakes[:, 2].argsort(descending=True, stable=True)[:SHOWN_PAIRS]].tolist()
    names = short_names(class_names, 22)
    pairs, shown = [(names[i], names[j]) for i, j, _ in most], [n for _, _, n in most]
    with figure(path, 0.8 + 0.2 * max(1, len(pairs)), layout="constrained") as fig:
        axis = fig.add_subplot()
        axis.barh(range(len(pairs)), shown, color=BLUE, height=0.7)
        axis.set_yticks(range(len(pairs)), [f"{name} is called {called}" for name, called in pairs])
        axis.set(ylim=(len(pairs) - 0.4, -0.6), xlabel="images")
        axis.margins(x=0.08)
        axis.set_title(
            f"{sum(shown):,} of {int(mistakes[:, 2].sum()):,} mistakes, the most frequent; {len(class_names):,} classes"
        )
        axis.grid(False, axis="y")
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for i, number in enumerate(shown):
            axis.annotate(f"{number:,}", (number, i), (3, 0), textcoords="offset points", va="center", fontsize=8)
