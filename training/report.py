"""What a pretraining run leaves to look at: its figures, and a `report.html` that needs no other file.

Also of a run that is under way or was killed: then it shows the newest complete checkpoint.
"""

import base64
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers.trainer import TRAINER_STATE_NAME

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.distributed_moco import rank

from . import plots
from .data.images import MapImages
from .data.labels import read_labels
from .data.sources import DataArguments, ImageSplits, load_images
from .engine.checkpoints import newest_complete
from .engine.results import PACKAGES, read_results
from .engine.run_folder import CURVES, METRICS, OF_FEATURES, REPORT, SAVED_RECIPE, read_json, read_sections, write_whole
from .evaluation.features import extract_features, unit
from .evaluation.knn import nearest

GRID_QUERIES, GRID_BANK = 8, 10_000  # rows of the grid of neighbours, and images among which they are searched
EMBEDDED = 2_000  # images of the t-SNE
STREAMED = "the images were streamed, and these figures need them by index"
CSS = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5f6b7a; --line: #d5dae1; --page: #ffffff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #39424e; --page: #14181d; --card: #1d232a; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .4rem 0; }
.soft, figcaption { color: var(--soft); }
figure { margin: 1.5rem 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
figcaption { margin-top: .4rem; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.results { font-size: .85rem; }
.results th, .results td { overflow-wrap: normal; white-space: nowrap; }
.pairs th { width: 14rem; font-weight: 400; color: var(--soft); }
.missing { background: var(--card); border-radius: 6px; padding: .6rem .9rem; overflow-wrap: anywhere; }
details { margin: .4rem 0; font-size: .9rem; }
@media (max-width: 36rem) { .pairs th { width: 9rem; } }
"""


@dataclass(frozen=True)
class Run:
    """A pretraining run on disk.

    Args:
        folder: its output directory.
        source: where its newest model is, the folder itself or a checkpoint.
        recipe: sections of its `recipe.yaml`.
        state: of the trainer, with the history.
        results: of all evaluations so far.
    """

    folder: Path
    source: Path
    recipe: dict[str, dict[str, Any]]
    state: dict[str, Any]
    results: list[dict[str, Any]]

    @property
    def data(self) -> DataArguments:
        return DataArguments(**self.recipe["data"])


def read_run(folder: Path) -> Run:
    """The run that wrote to a folder, which may have ended or not.

    Raises:
        ValueError: there is no pretraining run, it has no complete checkpoint yet, or its results cannot be read.
    """
    saved = folder / SAVED_RECIPE
    recipe = read_sections(saved, "correct it, or pass another run") if saved.is_file() else {}
    if not {"data", "model"} <= recipe.keys():
        raise ValueError(
            f"{folder} is not the folder of a pretraining run (it has no {SAVED_RECIPE} of one): pass what --output_dir "
            "was, e.g. runs/quickstart"
        )
    source: Path | None = folder
    if not (folder / TRAINER_STATE_NAME).is_file():
        source, _ = newest_complete(folder)
    if source is None:
        raise ValueError(f"{folder} has no complete checkpoint yet: wait for the first one")
    state = read_json(source / TRAINER_STATE_NAME, "delete it, and the newest complete checkpoint is reported")
    return Run(folder, source, recipe, state, read_results(folder))


def chance_loss(config: MoCoConfig) -> float:
    """The loss of a model for which all keys are equally similar to every query."""
    return (2 if config.symmetric_loss else 1) * math.log(1 + config.queue_size)


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
    shown = splits.train if splits.eval is None else splits.eval
    labels, names = read_labels(shown), _names(splits.class_names, shown, splits.train)
    chosen = spread_over_classes(labels.tolist(), min(GRID_QUERIES, -(-len(shown) // 2)))
    bank = MapImages(splits.train, view).evenly_spaced(GRID_BANK)
    if splits.eval is None:  # a query is not its own neighbour
        bank = MapImages(shown.select([i for i in range(len(shown)) if i not in chosen]), view).evenly_spaced(GRID_BANK)
    queries, embedded = MapImages(shown.select(chosen), view), MapImages(shown, view).evenly_spaced(EMBEDDED)
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
        chance = chance_loss(MoCoConfig(**run.recipe["model"]))
        knn_k = run.recipe.get("training", {}).get("knn_k")
        plots.training_curves(run.state["log_history"], chance, run.folder / "training_curves", knn_k)


def write_report(run: Run, missing: str | None = None) -> Path:
    """`report.html`, with the figures that are in the folder.

    Args:
        missing: why those of features have not been drawn now, if they have not.
    """
    path = run.folder / REPORT
    write_whole(path, _page(run, missing))
    return path


def _page(run: Run, missing: str | None) -> str:
    about = run.recipe.get("about", {})
    title = about.get("title", run.folder.name)
    step, steps = run.state["global_step"], run.state["max_steps"]
    ended = (
        "Ended" if run.source == run.folder else f"Not ended: this is {run.source.name}, the newest complete checkpoint"
    )
    metrics = run.folder / METRICS
    unlogged = None if run.state["log_history"] else "nothing has been logged yet"
    figures = [_figure(run, name, *words, unlogged) for name, words in CURVES.items()]
    figures += [_figure(run, name, *words, missing) for name, words in OF_FEATURES.items()]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">Source: {escape(str(about.get("source", "not stated")))}</p>',
        f"<p>{escape(ended)}. Step {step:,} of {steps:,}, epoch {run.state['epoch'] or 0:.4g} of "
        f"{run.state['num_train_epochs']:,}. Folder: {escape(str(run.folder))}</p>",
        "<h2>Results</h2>",
        *_results(run.results),
        *figures,
    ]
    if metrics.is_file():
        parts += ["<h2>Numbers of the run</h2>", _pairs(read_json(metrics, "delete it"))]
    parts += [
        "<h2>Settings</h2>",
        '<p class="soft">What the recipe or the command line gave; all else has its default.</p>',
    ]
    for section, values in run.recipe.items():
        parts += [f"<h3>{escape(section)}</h3>", _pairs(values)]
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    parts += ["<h2>Versions</h2>", '<p class="soft">Of this report.</p>', _pairs(versions)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _figure(run: Run, name: str, title: str, reading: str, missing: str | None) -> str:
    path = run.folder / f"{name}.svg"
    heading = f"<h2>{title}</h2>"
    if not path.is_file():
        return f'{heading}\n<p class="missing">{name} is missing: {escape(str(missing))}</p>'
    note = f" Drawn earlier; not drawn again, because {missing}" if missing else ""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'{heading}\n<figure><img alt="{title}" src="data:image/svg+xml;base64,{data}">\n'
        f"<figcaption>{escape(reading + note)}</figcaption></figure>"
    )


def _results(results: list[dict[str, Any]]) -> Iterable[str]:
    if not results:
        yield "<p>None yet: <code>scripts/knn.py</code> and <code>scripts/linear_probe.py</code> measure some.</p>"
        return
    columns = ("protocol", "feature", "metric", "value", "95 % interval", "images", "data", "date")
    rows = []
    for entry in results:
        low, high = entry["interval"]
        data = " ".join(str(entry["data"][key]) for key in ("dataset", "split") if entry["data"].get(key))
        value, interval = f"{entry['value']:.2f} %", f"{low:.2f} to {high:.2f}"
        cells = (
            entry["protocol"],
            entry["feature"],
            entry["metric"],
            value,
            interval,
            f"{entry['n']:,}",
            data,
            entry["date"],
        )
        rows.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{column}</th>" for column in columns)
    yield f'<div class="wide"><table class="results"><tr>{head}</tr>\n' + "\n".join(rows) + "</table></div>"
    for entry in results:
        conditions = {
            key: entry[key] for key in entry if key not in ("protocol", "feature", "metric", "value", "interval")
        }
        name = f"{entry['protocol']}, {entry['feature']}, {entry['metric']}"
        yield f"<details><summary>Conditions: {escape(name)}</summary>{_pairs(conditions)}</details>"


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(_words(value))}</td></tr>" for key, value in values.items()
    )
    return f'<table class="pairs">{rows}</table>'


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
