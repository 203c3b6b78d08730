"""The figures that a pretraining run leaves, which `report.html` shows (`engine/page.py`).

Also of a run that is under way or was killed: then they are of the newest complete checkpoint.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import torch

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.distributed_moco import rank

from .. import plots
from ..data.images import MapImages
from ..data.labels import read_labels
from ..data.sources import DataArguments, ImageSplits, load_images
from ..engine.page import STREAMED, Run
from ..evaluation.features import extract_features, unit
from ..evaluation.knn import by_newest_k, nearest, newest_k

GRID_QUERIES, GRID_BANK = 8, 10_000  # rows of the grid of neighbours, and images among which they are searched
EMBEDDED = 2_000  # images of the t-SNE


def chance_loss(config: MoCoConfig, negatives: int) -> float:
    """The loss of a model for which all keys are equally similar to every query, which has so many negatives."""
    return config.loss_scale * (2 if config.symmetric_loss else 1) * math.log(1 + negatives)


def open_images(data: DataArguments) -> ImageSplits:
    """The images of a run by index.

    Raises:
        ValueError: they were streamed, or cannot be opened.
    """
    if data.streaming:
        raise ValueError(STREAMED)
    return load_images(data)


def draw_features(model: MoCoModel, splits: ImageSplits, data: DataArguments, folder: Path) -> None:
    """The figures of a model's features. The processes share the work, and the first one draws.

    Without a split to evaluate on, they show images that were trained on; without labels, no classes.

    Raises:
        ValueError: the images cannot be read.
    """
    view = data.evaluation_view()
    bank = splits.train_in(view)
    shown = bank if splits.eval is None else splits.eval_in(view)
    labels, names = read_labels(shown.source), _names(splits.class_names, shown.source, splits.train)
    chosen = spread_over_classes(labels.tolist(), min(GRID_QUERIES, -(-len(shown) // 2)))
    if splits.eval is None:  # a query is not its own neighbour
        bank = bank.select([i for i in range(len(shown)) if i not in chosen])
    bank, queries, embedded = bank.evenly_spaced(GRID_BANK), shown.select(chosen), shown.evenly_spaced(EMBEDDED)
    query_features, _ = extract_features(model, queries)
    bank_features, _ = extract_features(model, bank)
    features, classes = extract_features(model, embedded)
    if rank() == 0:
        _draw_neighbours(queries, bank, query_features, bank_features, names, folder / "neighbours")
        plots.embedding(unit(features), classes, names, folder / "tsne")


def _draw_neighbours(
    queries: MapImages,
    bank: MapImages,
    query_features: torch.Tensor,
    bank_features: torch.Tensor,
    class_names: list[str],
    path: Path,
) -> None:
    similarities, index = nearest(query_features, bank_features, min(plots.NEIGHBOURS, len(bank)))
    pixels, labels = _load(queries, range(len(queries)))
    found, found_labels = _load(bank, index.flatten().tolist())
    plots.neighbour_grid(
        pixels,
        found.reshape(*index.shape, *found.shape[1:]),
        similarities.numpy(),
        labels,
        found_labels.reshape(index.shape),
        class_names,
        len(bank),
        path,
    )


def _load(images: MapImages, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    # Pixels (n, H, W, 3) and labels (n,), -1 for an image without one.
    samples = [images[i] for i in indices]
    pixels = np.stack([sample["pixel_values"].permute(1, 2, 0).numpy() for sample in samples])
    return pixels, np.array([sample.get("labels", -1) for sample in samples])


def _names(class_names: list[str], *parts: datasets.Dataset) -> list[str]:
    labels = np.concatenate([read_labels(part) for part in parts])
    return class_names if labels.min() >= 0 and labels.max() < len(class_names) else []


def spread_over_classes(labels: list[int], count: int) -> list[int]:
    """Indices of `count` images, or of all if there are fewer, evenly spaced in the order of their classes."""
    order = sorted(range(len(labels)), key=lambda i: labels[i])
    count = min(count, len(order))
    return [order[i * len(order) // count] for i in range(count)]


def draw_curves(run: Run) -> None:
    """The figure of what the run has logged; none if that is nothing."""
    if run.state["log_history"]:
        history, config = by_newest_k(run.state["log_history"]), MoCoConfig(**run.recipe["model"])
        logged = [entry["negatives"] for entry in history if "negatives" in entry]  # where they depend on the batch
        chance = chance_loss(config, logged[-1] if logged else config.queue_size)
        plots.training_curves(history, chance, run.folder / "training_curves", newest_k(history))
