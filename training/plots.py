"""Pictures of a run. Every function writes a PNG and returns its path."""

from pathlib import Path
from typing import Any

import matplotlib
import torch

from .images import MapImages
from .knn import nearest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, GRAY = "#2563eb", "#d97706", "#059669", "#6b7280"


def _series(history: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    rows = [(entry["epoch"], entry[key]) for entry in history if key in entry]
    return [epoch for epoch, _ in rows], [value for _, value in rows]


def training_curve(history: list[dict[str, Any]], chance: float, path: Path) -> Path:
    """Loss against its chance level, contrast accuracy with kNN accuracy, and the learning rate, by epoch."""
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    loss.plot(*_series(history, "loss"), color=BLUE)
    loss.axhline(chance, color=GRAY, linestyle=":", label=f"all keys alike: {chance:.2f}")
    loss.set(title="InfoNCE loss", xlabel="epoch", ylim=(0, None))
    loss.legend(frameon=False)
    accuracy.plot(*_series(history, "contrast_top1"), color=ORANGE, label="contrast top-1")
    accuracy.plot(*_series(history, "eval_knn_top1"), color=GREEN, marker="o", markersize=4, label="kNN top-1")
    accuracy.set(title="accuracy, %", xlabel="epoch", ylim=(0, 100))
    accuracy.legend(frameon=False)
    rate.plot(*_series(history, "learning_rate"), color=BLUE)
    rate.set(title="learning rate", xlabel="epoch", ylim=(0, None))
    for axis in (loss, accuracy, rate):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def neighbour_grid(
    queries: MapImages,
    bank: MapImages,
    query_features: torch.Tensor,
    bank_features: torch.Tensor,
    class_names: list[str],
    path: Path,
    neighbours: int = 5,
) -> Path:
    """Queries in the first column and their nearest bank images beside them, by cosine similarity.

    A neighbour of another class has an orange frame.

    Args:
        query_features, bank_features: unit length, one row per image of `queries` and `bank`.
    """
    similarity, index = nearest(query_features, bank_features, neighbours)
    figure, axes = plt.subplots(
        len(queries), neighbours + 1, figsize=(1.1 * (neighbours + 1), 1.25 * len(queries)), layout="constrained"
    )
    for i, row in enumerate(axes):
        query = queries[i]
        _show(row[0], query, f"query: {class_names[query['labels']]}", BLUE)
        for j, axis in enumerate(row[1:]):
            found = bank[int(index[i, j])]
            colour = GRAY if found["labels"] == query["labels"] else ORANGE
            _show(axis, found, f"{class_names[found['labels']]}  {similarity[i, j]:.2f}", colour)
    figure.suptitle("first column: query; others: nearest neighbours, orange where the class differs", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _show(axis, sample: dict[str, Any], title: str, colour: str) -> None:
    axis.imshow(sample["pixel_values"].permute(1, 2, 0).numpy())
    axis.set_title(title, fontsize=8, color=colour)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2)


def confusion_matrix(confusion: torch.Tensor, class_names: list[str], path: Path) -> Path:
    """Images of each class (rows) by the class that they are called (columns), as shares of the row; also as SVG.

    Names are shown for up to 40 classes and numbers for up to 20.

    Args:
        confusion: images of class i that are called j (C, C).
    """
    classes = len(class_names)
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    size = min(max(4.0, 0.5 * classes), 12.0)
    figure, axis = plt.subplots(figsize=(size + 1.2, size), layout="constrained")
    image = axis.imshow((100 * shares).numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axis, shrink=0.8, label="% of the class")
    axis.set(xlabel="called", ylabel="class")
    if classes <= 40:
        axis.set_xticks(range(classes), class_names, rotation=90 if max(map(len, class_names)) > 2 else 0)
        axis.set_yticks(range(classes), class_names)
    if classes <= 20:
        for i, j in confusion.nonzero().tolist():
            colour = "white" if shares[i, j] > 0.5 else "black"
            axis.text(j, i, f"{confusion[i, j]:,}", ha="center", va="center", fontsize=8, color=colour)
    for kind in (".png", ".svg"):
        figure.savefig(path.with_suffix(kind), dpi=120)
    plt.close(figure)
    return path
