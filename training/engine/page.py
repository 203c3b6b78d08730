"""`report.html` of a run, a page that needs no other file: numbers first, then figures and settings.

It shows what lies in the folder of the run, and is written anew whenever a result is recorded there.
"""

import base64
import html
import json
import platform
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..cli import how_to_run
from ..errors import visible
from ..optimization.schedules import recorded_rate
from .checkpoints import newest_complete
from .files import leads_out, read_object, write_whole
from .results import PACKAGES, read_results, spread
from .run_folder import (
    CURVES,
    METRICS,
    OF_FEATURES,
    OF_TASKS,
    REPORT,
    SAVED_RECIPE,
    TRAINING,
    read_metrics,
    read_sections,
)

STREAMED = "the images were streamed, and these figures need them by index"
# The figure of a classifier's mistakes, by the name of the probe. That of a fine-tuning is called as the first.
CONFUSIONS = {"official": "confusion", "cached SGD": "confusion_sgd", "cached L-BFGS": "confusion_lbfgs"}
UNMEASURED = (
    "of the evaluation that was drawn last in this folder, which has no metrics.json"  # as --eval_only leaves it
)
PER_CLASS = "_per_class"  # end of the names of numbers of a detector, by class
# Numbers of `metrics.json` that are shown, and in which words.
NUMBERS: dict[str, tuple[str, str | None]] = {
    "knn_top1_before": ("kNN top-1 before training", "{:.2f} %"),
    "knn_top1_after": ("kNN top-1 of the saved weights", "{:.2f} %"),
    "knn": ("how that kNN is measured", None),
    "miou": ("mean IoU", "{:.2f} %"),
    "pixel_accuracy": ("pixel accuracy", "{:.2f} %"),
    "loss": ("loss, last logged", "{:.4g}"),
    "contrast_top1": ("contrast top-1, last logged", "{:.2f} %"),
    "images_per_second": ("images per second, median", "{:.4g}"),
    "peak_memory": ("memory of the main process, greatest", "{:.3g} GB"),
    "waiting_for_data": ("time spent waiting for images, median", "{:.3g} %"),
    "steps": ("steps behind the saved weights", "{:,}"),
    "skipped_images": ("images skipped", "{:,}"),
}
CSS = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5f6b7a; --line: #d5dae1; --page: #ffffff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #39424e; --page: #14181d; --card: #1d232a; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .4rem 0; }
.soft, figcaption, small { color: var(--soft); }
small { display: block; }
figure { margin: 1.5rem 0; }
figure div { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; background: #fff; }
figure img { display: block; width: 100%; min-width: 40rem; height: auto; }
figcaption { margin-top: .4rem; font-size: .9rem; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td { font-variant-numeric: tabular-nums; }
.results th + th, .results td + td { text-align: right; white-space: nowrap; padding-right: 0; padding-left: .8rem; }
.compared th, .compared td { padding-right: .6rem; }
.compared td:first-child { font-weight: 600; }
.columns { table-layout: fixed; margin-bottom: 1rem; }
.columns th:first-child { width: 40%; }
.columns td:first-child { font-weight: 400; }
.pairs { table-layout: fixed; }
.pairs th { width: 14rem; font-weight: 400; color: var(--soft); }
.missing { background: var(--card); border-radius: 6px; padding: .6rem .9rem; }
details { margin: .4rem 0; font-size: .9rem; }
@media (max-width: 36rem) {
  .pairs th { width: 9rem; }
  .results, .columns { font-size: .8rem; }
  .columns :is(th, td) { padding-right: .3rem; }
  .results th + th, .results td + td { padding-left: .5rem; }
  .results :is(th, td):nth-child(3) { white-space: normal; overflow-wrap: normal; }
}
"""


@dataclass(frozen=True)
class Run:
    """A run on disk: a pretraining, or the training of a detector or a segmentation model around an encoder.

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
    def task(self) -> str | None:
        """The command that transferred an encoder, of `OF_TASKS`; None for a pretraining run."""
        task = self.recipe.get("encoder", {}).get("task")
        return task if task in OF_TASKS else None


def read_run(folder: Path) -> Run:
    """The run that wrote to a folder, which may have ended or not.

    Raises:
        ValueError: there is no run, it has no complete checkpoint yet, or its results cannot be read.
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
    state = read_object(source / TRAINER_STATE_NAME, "delete it, and the newest complete checkpoint is reported")
    return Run(folder, source, recipe, state, read_results(folder))


def write_report(run: Run, missing: str | None = None) -> Path:
    """`report.html`, with the figures that are in the folder.

    Args:
        missing: why those of features have not been drawn now, if they have not.
    """
    path = run.folder / REPORT
    write_whole(path, _page(run, missing))
    return path


def refresh_report(folder: Path) -> None:
    """Write a report that is there anew, after something has been added to its folder; its figures stay.

    One that is a link becomes a file, as by the command: what the link points to is not written to, and would soon be old.

    Raises:
        ValueError: the run beside it cannot be read.
    """
    if (folder / REPORT).is_file():
        write_report(read_run(folder))


def _page(run: Run, missing: str | None) -> str:
    about = run.recipe.get("about", {})
    title = str(about.get("title", run.folder.name))
    check_state(run)
    step, steps = run.state["global_step"], run.state["max_steps"]
    ended = (
        "Ended" if run.source == run.folder else f"Not ended: this is {run.source.name}, the newest complete checkpoint"
    )
    source = [f'<p class="soft">Source: {escape(str(about["source"]))}</p>'] if "source" in about else []
    parts = [
        f"<h1>{escape(title)}</h1>",
        *source,
        f"<p>{escape(ended)}. Step {step:,} of {steps:,}, epoch {run.state['epoch'] or 0:.4g} of "
        f"{run.state['num_train_epochs']:,}. Folder: {escape(str(run.folder))}</p>",
        "<h2>Results</h2>",
        *_results(run),
        *_numbers(run.folder / METRICS),
        *_figures(run, missing),
        "<h2>Settings</h2>",
        '<p class="soft">What the recipe or the command line gave; all else has its default.</p>',
    ]
    for section, values in run.recipe.items():
        if not values:
            continue
        rate = recorded_rate(values)
        parts += [f"<h3>{escape(section)}</h3>", _pairs(values if rate is None else values | {"learning_rate": rate})]
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    parts += ["<h2>Versions</h2>", '<p class="soft">Of this report.</p>', _pairs(versions)]
    return document(title, parts)


def check_state(run: Run) -> None:
    """
    Raises:
        ValueError: the state of the trainer lacks something that a report shows.
    """
    number, path = int | float, run.source / TRAINER_STATE_NAME
    kinds = {
        "global_step": int,
        "max_steps": int,
        "num_train_epochs": number,
        "epoch": number | None,
        "log_history": list,
    }
    for name, kind in kinds.items():
        if name not in run.state or not isinstance(run.state[name], kind):
            raise ValueError(
                f"{path} has no {name} that can be shown: delete it, and the newest complete checkpoint is reported"
            )


def document(title: str, parts: Iterable[str]) -> str:
    """A page of HTML that needs no other file.

    Args:
        parts: HTML, in which words of others are escaped.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """Words of others in HTML, without signs that turn what stands around them."""
    return html.escape(visible(text))


# Numbers


def _results(run: Run) -> Iterator[str]:
    if not run.results:
        yield f"<p>{_how_to_measure(run)}</p>"
        return
    models: dict[str, set[str]] = {}
    for entry in run.results:
        models.setdefault(entry["feature"], set()).add(entry["model"])
    rows = []
    for entry in _once(run.results):
        data = ", ".join(str(entry["data"][key]) for key in ("dataset", "split") if entry["data"].get(key))
        several = [f"weights {entry['model']}"] if len(models[entry["feature"]]) > 1 else []
        measured = " · ".join((_metric(entry), entry["feature"], *several, data, entry["date"][:10]))
        numbers = (f"{entry['value']:.2f} %", spread(entry), f"{entry['n']:,}")
        protocol = f"<td>{escape(str(entry['protocol']))}<small>{escape(measured)}</small></td>"
        rows.append(f"<tr>{protocol}" + "".join(f"<td>{escape(number)}</td>" for number in numbers) + "</tr>")
    head = "".join(f"<th>{column}</th>" for column in ("protocol", "value", "95 % interval", "n"))
    yield f'<table class="results"><tr>{head}</tr>\n' + "\n".join(rows) + "</table>"
    yield "<details><summary>Conditions of every measurement</summary>"
    for entry in run.results:
        conditions = {
            key: entry[key] for key in entry if key not in ("protocol", "feature", "metric", "value", "interval")
        }
        yield f"<h3>{escape(', '.join((entry['protocol'], entry['feature'], _metric(entry))))}</h3>{_pairs(conditions)}"
    yield "</details>"


def _how_to_measure(run: Run) -> str:
    if run.source != run.folder:
        return "None yet: they are measured of the weights that the run ends with."
    commands = (
        [_command(run.task, run.folder, "--eval_only")]
        if run.task
        else [_command(name, run.folder) for name in ("knn", "probe")]
    )
    return f"None yet. Measure some by {' or '.join(f'<code>{escape(command)}</code>' for command in commands)}."


def _once(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same number of the same weights and images once, as it was measured last."""
    apart = ("protocol", "feature", "metric", "value", "n", "settings", "seed", "model", "data")
    return list({json.dumps([entry.get(key) for key in apart]): entry for entry in results}.values())


def _metric(entry: dict[str, Any]) -> str:
    return str(entry["metric"]).replace("top", "top-")


def _numbers(path: Path) -> Iterator[str]:
    metrics = read_metrics(path, "correct it, or move it away")
    if not metrics:
        return
    shown = {}
    for key, value in metrics.items():
        if key.endswith(PER_CLASS):
            continue  # a figure shows them
        name, form = NUMBERS.get(key, (key, None))
        shown[name] = value if form is None else "not measured" if value is None else form.format(value)
    yield "<h2>Numbers of the run</h2>"
    yield _pairs(shown)


# Figures


def _figures(run: Run, missing: str | None) -> Iterator[str]:
    if run.task:
        yield from _figures_of_task(run.folder, run.task)
    else:
        yield from _figures_of_pretraining(run, missing)


def _figures_of_task(folder: Path, task: str) -> Iterator[str]:
    measured = read_metrics(folder / METRICS, "correct it, or move it away")
    metric = (
        ("--metric", str(measured["metric"])) if "metric" in measured else ()
    )  # another draws no figure of these numbers
    again = _command(task, folder, "--eval_only", *metric)
    for name, (title, reading) in OF_TASKS[task].items():
        drawn_by = None if name == TRAINING else again
        yield f"<h2>{title}</h2>\n" + _figure(folder / f"{name}.svg", title, reading, None, drawn_by)


def _figures_of_pretraining(run: Run, missing: str | None) -> Iterator[str]:
    if missing is None and run.recipe["data"].get("streaming"):
        missing = STREAMED
    unlogged = None if run.state["log_history"] else "nothing has been logged yet"
    for name, (title, reading) in CURVES.items():
        yield f"<h2>{title}</h2>\n" + _figure(run.folder / f"{name}.svg", title, reading, unlogged)
    confusions = list(_confusions(run.folder))
    if confusions:
        yield "<h2>Which classes are confused</h2>"
        yield from confusions
    transfers = list(_transfers(run.folder))
    if transfers:
        yield "<h2>What is built around its encoder</h2>"
        yield from transfers
    for name, (title, reading) in OF_FEATURES.items():
        yield f"<h2>{title}</h2>\n" + _figure(run.folder / f"{name}.svg", title, reading, missing)


def _folders(run: Path) -> list[Path]:
    """Folders of a run, in which later commands have trained something on its model."""
    return sorted(path for path in run.iterdir() if path.is_dir() and not path.is_symlink())


def _transfers(run: Path) -> Iterator[str]:
    """What every detector and segmentation model makes of images that was trained on the run's model, with its numbers."""
    for folder in _folders(run):
        figures = [
            (name, title) for known in OF_TASKS.values() for name, (title, _) in known.items() if name != TRAINING
        ]
        there = [(name, f"{title}, {folder.name}") for name, title in figures if (folder / f"{name}.svg").is_file()]
        measured = read_metrics(folder / METRICS, "correct it, or move it away") if there else {}
        values = [f"{key} {words(measured[key])}" for key in ("box", "mask") if key in measured]
        values += [f"mIoU {measured['miou']:.2f} %"] if "miou" in measured else []
        numbers = "; ".join([measured.get("protocol", UNMEASURED), *values])
        for name, title in there:
            yield _figure(folder / f"{name}.svg", title, f"{title}: {numbers}.", None)


def _confusions(run: Path) -> Iterator[str]:
    """The mistakes of every classifier that was trained on the run's model, in folders of the run."""
    for folder in _folders(run):
        figures = {stem: folder / f"{stem}.svg" for stem in CONFUSIONS.values() if (folder / f"{stem}.svg").is_file()}
        measured = read_metrics(folder / METRICS, "correct it, or move it away") if figures else {}
        protocols = {CONFUSIONS.get(probe["name"]): probe["protocol"] for probe in measured.get("probes", [])}
        for stem, path in figures.items():
            protocol = protocols.get(stem, measured.get("protocol", stem))
            title = f"Mistakes of {folder.name}, {protocol}"
            yield _figure(path, title, f"{folder.name}: {protocol}.", None)


def _figure(path: Path, title: str, reading: str, missing: str | None, drawn_by: str | None = None) -> str:
    if not path.is_file() or leads_out(path):  # the report may be shown to anybody
        why = missing or f"draw it by {drawn_by or _command('report', path.parent)}"
        return f'<p class="missing">{path.stem} is missing: {escape(why)}</p>'
    note = f" Drawn earlier; not drawn again, because {missing}" if missing else ""
    return embedded(path, title, reading + note)


def _command(name: str, folder: Path, *flags: str) -> str:
    """A command of this project about a folder, for a shell."""
    return f"{how_to_run(name)} {shlex.join([str(folder), *flags])}"


def embedded(path: Path, title: str, reading: str) -> str:
    """The figure of an SVG file, with a line on how to read it."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><div><img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}"></div>\n'
        f"<figcaption>{escape(reading)}</figcaption></figure>"
    )


# Settings


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(words(value))}</td></tr>" for key, value in values.items()
    )
    return f'<table class="pairs">{rows}</table>'


def words(value: Any) -> str:
    """The value of a setting as one reads it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(words, value))
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
