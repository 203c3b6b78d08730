"""Several runs in one table and one figure: what differs between their settings, what was measured, and their curves.

Runs that differ in their seed alone are one row, with the mean and the sample standard deviation over them. Two numbers share
a column only if they were measured in the same way on the same images.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from string import ascii_uppercase
from typing import Any, NamedTuple

from tqdm import tqdm

from modeling_moco import MoCoModel

from .. import plots
from ..cli import DESTINATIONS, names_in_files
from ..data.sources import EvaluationDataArguments
from ..engine.files import whole_files
from ..engine.page import Run, document, embedded, escape, read_run, words
from ..engine.results import encoder_digest
from ..engine.run_folder import FREE_TO_CHANGE, METRICS, OF_MONITOR, START, WEIGHTS, read_metrics
from ..errors import visible
from ..evaluation.encoder import Encoder
from ..evaluation.knn import by_newest_k, newest_k
from ..hub.model_card import escape as escape_markdown
from ..hub.model_card import public_name

NAME = "comparison"  # of the Markdown and HTML files
CURVES = "curves"  # of the figure
COLUMNS_OF_A_PAGE = 4  # so that their numbers are whole on a phone too
RUNS = ["row", "seed", "state", "commit", "folder"]
Defaults = Mapping[str, dict[str, Any]]
SECTIONS = ("data", "model", "training")  # of a recipe, whose settings a result depends on
PROCESSES = "processes"  # not a setting, but the groups of BatchNorm are theirs; unknown until a run has ended
TRAINED_ON = "trained on"  # not a setting either: the images that were there under the name of the dataset
EMPTY = "–"
# What the loss and the contrast accuracy depend on by their definition: how many negatives there are, and what is summed up.
OF_LOSS = ("dictionary", "queue_size", "temperature", "symmetric_loss", "loss_scale")
READING = (
    "Per cent of the images: mean ± sample standard deviation over the runs of a row, which differ in their seed alone; a "
    "single run has no deviation."
)
NO_KNN_CURVES = "The kNN curves are left out: the monitors of these runs have other neighbours, features or images."
NOT_MEASURED = "Not measured by"
OF_CURVES = "A line for every run, in the colour of its row."


IN_WORDS = {  # the fields of a column that do not speak for themselves
    "split_revision": "evaluated images {}",
    "train_split": "train split {}",
    "train_images": "{} train images",
    "revision": "train images {}",
    "label_column": "labels {}",
    "classes": "{} classes",
    "bank": "bank {}",
}


def in_words(value: Any) -> str:
    """A value of a result in a column; empty where it has none."""
    return "" if value is None else str(value)


class Column(NamedTuple):
    """What decides whether two results can be compared: the protocol, and all that says which images and labels were used.

    The fields between `feature` and `bank` are those of `ImageSplits.about` in words, empty where a result does not have them.
    A bank of some of the train images is evenly spaced in them, so that its images depend on `train_images` too.
    """

    protocol: str
    metric: str
    feature: str
    dataset: str
    config: str
    split: str
    split_revision: str
    view: str
    train_split: str
    train_images: str
    revision: str
    label_column: str
    classes: str
    bank: str
    n: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Column":
        data = cls.of_data(entry["data"])
        bank = in_words(entry["settings"].get("bank"))
        return cls(entry["protocol"], entry["metric"], entry["feature"], **data, bank=bank, n=entry["n"])

    @staticmethod
    def of_data(about: Mapping[str, Any]) -> dict[str, str]:
        """What `ImageSplits.about` says of the images, in words."""
        return {name: in_words(about.get(name)) for name in OF_DATA}

    def describe(self, others: Iterable["Column"]) -> str:
        """The protocol in words, with as much of the rest as tells it from others."""
        others = list(others)
        differ = {name for name in self._fields if len({getattr(other, name) for other in others}) > 1}
        feature = self.feature if "feature" in differ else ""
        rest = [self._words(name) for name in (*OF_DATA[1:], "bank") if name in differ | {"split"}]
        measured = [self.protocol, self.metric.replace("top", "top-"), feature, self._images(others), *rest]
        return ", ".join([*filter(None, measured), f"n {self.n:,}"])

    def _images(self, others: Iterable["Column"]) -> str:
        """The dataset in words: its whole path only where another folder has the same name."""
        if not self.dataset:
            return "unknown images"
        name = public_name(self.dataset)
        alike = {x.dataset for x in others if x.dataset and public_name(x.dataset) == name}
        return self.dataset if len(alike) > 1 else name

    @property
    def learned_from(self) -> str:
        """The labelled images in words, as far as they are known."""
        return ", ".join(filter(None, map(self._words, ("train_images", "label_column", "classes"))))

    def _words(self, name: str) -> str:
        value = getattr(self, name)
        return IN_WORDS.get(name, "{}").format(value) if value else ""


OF_DATA = Column._fields[Column._fields.index("dataset") : Column._fields.index("bank")]  # from `ImageSplits.about`


@dataclass(frozen=True)
class Measured:
    """A run with what it is compared by.

    Args:
        settings: those that change its weights, defaults included, without the seed.
        state: "ended", or how far its weights have come.
        results: of these weights, per cent.
        older: number of results that are of other weights.
        data: the images that it has recorded (`ImageSplits.about`); empty where it has not.
        commit: of the code that it was trained with; None where it is not recorded.
        monitor: how its kNN is measured while it trains: neighbours, feature and view, and where the images are.
    """

    run: Run
    settings: dict[str, Any]
    seed: Any
    state: str
    results: dict[Column, float]
    older: int
    data: dict[str, Any]
    commit: str | None
    monitor: dict[str, Any]

    @property
    def trained_on(self) -> str:
        """The images in words; empty where they are not recorded."""
        data = Column.of_data(self.data)
        return ", ".join(
            filter(None, [f"{data['train_images']} images" * bool(data["train_images"]), data["revision"]])
        )

    @property
    def history(self) -> list[dict[str, Any]]:
        logged = self.run.state.get("log_history")
        return by_newest_k([entry for entry in logged if isinstance(entry, dict)] if isinstance(logged, list) else [])


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone."""

    name: str
    runs: list[Measured]

    def value(self, setting: str) -> str:
        run = self.runs[0]
        return run.trained_on or EMPTY if setting == TRAINED_ON else words(run.settings.get(setting))

    def result(self, column: Column) -> str:
        found = [run.results[column] for run in self.runs if column in run.results]
        if not found:
            return EMPTY
        of = f" ({len(found)} of {len(self.runs)})" if len(found) < len(self.runs) else ""
        spread = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
        return f"{mean(found):.2f}{spread}{of}"


@dataclass(frozen=True)
class Comparison:
    """The rows of a table, and its columns: settings that differ between rows, and what was measured."""

    rows: list[Row]
    settings: list[str]
    columns: list[Column]

    @property
    def head(self) -> list[str]:
        measured = [column.describe(self.columns) for column in self.columns]
        return ["", *self.settings, *(["state"] if self.states else []), "n", *measured]

    @property
    def body(self) -> list[list[str]]:
        return [
            [
                row.name,
                *map(row.value, self.settings),
                *([row.runs[0].state] if self.states else []),
                str(len(row.runs)),
                *map(row.result, self.columns),
            ]
            for row in self.rows
        ]

    @property
    def measured(self) -> list[Measured]:
        return [x for row in self.rows for x in row.runs]

    @property
    def states(self) -> bool:
        """Whether some runs have not ended."""
        return len({row.runs[0].state for row in self.rows}) > 1

    @property
    def runs(self) -> list[list[str]]:
        """Of every run what `RUNS` names."""
        return [
            [row.name, str(x.seed), x.state, x.commit or EMPTY, str(x.run.folder)]
            for row in self.rows
            for x in row.runs
        ]

    def notes(self) -> Iterator[str]:
        """What a reader of the table must know, in sentences."""
        for column in self.columns:
            lacking = [str(x.run.folder) for row in self.rows for x in row.runs if column not in x.results]
            if lacking:
                yield f"{NOT_MEASURED} {column.describe(self.columns)}: {', '.join(lacking)}."
        if not self.columns:
            yield "No result was recorded yet for the weights of these runs."
        for row in self.rows:
            for x in row.runs:
                if x.older:
                    yield f"Left out: {x.older} results of {x.run.folder}, which are of other weights than it has now."
            for seed, times in Counter(str(x.seed) for x in row.runs).items():
                if times > 1:
                    yield f"Row {row.name} has {times} runs of seed {seed}, which are not independent."
            if len(commits := sorted({x.commit for x in row.runs if x.commit})) > 1:
                yield f"Row {row.name} has runs of different commits of the code: {', '.join(commits)}."
        if other := [name for name in OF_LOSS if name in self.settings]:
            yield (
                f"The loss and the contrast accuracy depend on {', '.join(other)} itself: which of two such curves is higher "
                "does not say which row is better."
            )
        if not same_monitor(self.measured):
            yield NO_KNN_CURVES


def read_measured(folder: Path, defaults: Defaults) -> Measured:
    """
    Args:
        defaults: values of the settings that a run does not name, by section.

    Raises:
        ValueError: there is no pretraining run, it has no complete checkpoint, or something of it is damaged.
    """
    run = read_run(folder)
    if run.task:
        raise ValueError(
            f"{folder} is of {run.task}, and pretraining runs are compared: pass what --output_dir of one was"
        )
    metrics = read_metrics(folder / METRICS, "correct it, or move it away")
    settings, seed = settings_of(run.recipe, defaults, metrics.get(PROCESSES))
    state = "ended" if run.source == folder else f"step {run.state.get('global_step')} of {run.state.get('max_steps')}"
    results, older = _results(run)
    given = _given(run.recipe, defaults)
    monitor = {name: given.get(name) for name in (*sorted(OF_MONITOR), *names_in_files(EvaluationDataArguments))}
    data, commit = metrics.get("data", {}), metrics.get("commit")
    measured = Measured(run, settings, seed, state, results, older, data, commit, monitor)
    if (k := newest_k(measured.history)) is not None:  # of the curves, whatever the run began with
        monitor["knn_k"] = k
    return measured


def settings_of(
    recipe: Mapping[str, dict[str, Any]], defaults: Defaults, processes: int | None
) -> tuple[dict[str, Any], Any]:
    """The settings that a run's weights depend on, defaults included, and its seed.

    Args:
        recipe: what the run was given, by section.
        processes: None where it is not known.
    """
    given = _given(recipe, defaults)
    if START in recipe:
        given["weights to begin with"] = recipe[START].get(WEIGHTS)
    given[PROCESSES] = processes
    free = {"seed", *FREE_TO_CHANGE, *OF_MONITOR}
    settings = {key: x for key, x in given.items() if key not in free and not DESTINATIONS.fullmatch(key)}
    return settings, given.get("seed")


def _given(recipe: Mapping[str, dict[str, Any]], defaults: Defaults) -> dict[str, Any]:
    """The values of all flags of a run, by name."""
    return {key: value for name in SECTIONS for key, value in (defaults[name] | recipe.get(name, {})).items()}


def _results(run: Run) -> tuple[dict[Column, float], int]:
    """The last result in each column of the weights that a run has now, and the number of those of others."""
    if not run.results:
        return {}, 0
    head = any(entry["feature"] == "head" for entry in run.results)
    model = Encoder(str(run.source)).load(MoCoModel, seed=0, head=head)
    digests = {"backbone": encoder_digest(model)} | ({"head": encoder_digest(model, "head")} if head else {})
    own = [entry for entry in run.results if digests.get(entry["feature"]) == entry["model"]]
    return {Column.of(entry): entry["value"] for entry in own}, len(run.results) - len(own)


def compare(folders: list[Path], defaults: Defaults) -> Comparison:
    """Read runs, and put those together that differ in their seed alone.

    Raises:
        ValueError: as `read_measured`.
    """
    groups: dict[str, list[Measured]] = {}
    for folder in tqdm(folders, "reading runs", disable=None):
        measured = read_measured(folder, defaults)
        groups.setdefault(canonical([measured.settings, measured.state, measured.trained_on]), []).append(measured)
    rows = [Row(_letter(i), runs) for i, runs in enumerate(groups.values())]
    names = list(dict.fromkeys(name for row in rows for name in row.runs[0].settings))
    values = {name: [row.runs[0].settings.get(name) for row in rows] for name in names}
    values[PROCESSES] = [value for value in values[PROCESSES] if value is not None]
    differ = [name for name in names if len(set(map(canonical, values[name]))) > 1]
    if len({row.runs[0].trained_on for row in rows} - {""}) > 1:
        differ.append(TRAINED_ON)
    columns = list(dict.fromkeys(column for row in rows for x in row.runs for column in x.results))
    return Comparison(rows, differ, columns)


def canonical(value: Any) -> str:
    """A text that is the same for equal settings."""
    return json.dumps(value, sort_keys=True, default=str)


def _letter(i: int) -> str:
    return ascii_uppercase[i % 26] + (str(i // 26 + 1) if i >= 26 else "")


# Files


def write(comparison: Comparison, folder: Path) -> None:
    """Markdown, HTML and the figure of the curves, in a folder that is empty or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_files(folder) as fresh:
        drawn = draw(comparison, fresh / CURVES)
        (fresh / f"{NAME}.md").write_text(to_markdown(comparison, drawn), encoding="utf-8")
        (fresh / f"{NAME}.html").write_text(
            to_html(comparison, fresh / f"{CURVES}.svg" if drawn else None), encoding="utf-8"
        )


def draw(comparison: Comparison, path: Path) -> bool:
    """The curves of all runs; none if nothing has been logged.

    Returns:
        whether a figure was drawn.
    """
    names = [", ".join([row.name, *(f"{x} {row.value(x)}" for x in comparison.settings)]) for row in comparison.rows]
    return draw_curves(names, [row.runs for row in comparison.rows], path)


def draw_curves(names: list[str], rows: list[list[Measured]], path: Path) -> bool:
    """The curves of rows of runs, those of kNN only where all monitors measure the same.

    Returns:
        whether there was any.
    """
    hidden = () if same_monitor(x for runs in rows for x in runs) else ("eval_knn_top1",)
    groups = [
        plots.Overlaid(
            name, [[{k: v for k, v in entry.items() if k not in hidden} for entry in x.history] for x in runs]
        )
        for name, runs in zip(names, rows, strict=True)
    ]
    return plots.compared_curves(groups, path)


def same_monitor(runs: Iterable[Measured]) -> bool:
    """Whether the kNN of all monitors is the same measurement."""
    runs = list(runs)
    asked = {canonical(x.monitor) for x in runs}
    seen = {canonical(Column.of_data(x.data)) for x in runs if x.data}
    return len(asked) <= 1 and len(seen) <= 1


def title(comparison: Comparison) -> str:
    return f"{len(comparison.runs)} runs compared"


def to_markdown(comparison: Comparison, drawn: bool) -> str:
    lines = [f"# {title(comparison)}"]
    for head, body in in_columns(comparison):
        lines += ["", *markdown_table(head, body)]
    lines += ["", READING]
    lines += [line for note in comparison.notes() for line in ("", escape_markdown(visible(note)))]
    if drawn:
        lines += ["", f"![Curves of all runs]({CURVES}.png)", "", OF_CURVES]
    lines += ["", "## Runs", "", *markdown_table(RUNS, comparison.runs)]
    return "\n".join(lines) + "\n"


def markdown_table(head: list[str], body: list[list[str]]) -> list[str]:
    """The lines of a table, whose words may be anybody's."""
    head, *rows = [[escape_markdown(visible(cell)) for cell in row] for row in [head, *body]]
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def to_html(comparison: Comparison, figure: Path | None) -> str:
    parts = [
        f"<h1>{title(comparison)}</h1>",
        *(html_table(head, body, "compared columns") for head, body in in_columns(comparison)),
        f'<p class="soft">{READING}</p>',
    ]
    parts += [f'<p class="missing">{escape(note)}</p>' for note in comparison.notes()]
    if figure is not None:
        parts += ["<h2>Curves</h2>", embedded(figure, "Curves of all runs", OF_CURVES)]
    parts += ["<h2>Runs</h2>", html_table(RUNS, comparison.runs)]
    return document(title(comparison), parts)


def in_columns(comparison: Comparison) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Heads and bodies of tables that have the rows as columns: there may be any number of measurements."""
    head, body = comparison.head, comparison.body
    for i in range(0, len(body), COLUMNS_OF_A_PAGE):
        first, *lines = map(list, zip(head, *body[i : i + COLUMNS_OF_A_PAGE], strict=True))
        yield first, lines


def html_table(head: Sequence[str], body: Sequence[Sequence[str]], kind: str = "compared") -> str:
    """A table, whose words may be anybody's."""
    names = "".join(f"<th>{escape(cell).replace('_', '_<wbr>')}</th>" for cell in head)
    rows = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f'<table class="{kind}">' + "\n".join([f"<tr>{names}</tr>", *rows]) + "</table>"


def to_text(comparison: Comparison) -> str:
    """The table for a terminal, with its notes. What was measured stands below it, for lines would not hold the heads."""
    first = len(comparison.head) - len(comparison.columns)
    heads = {f"({i})": head for i, head in enumerate(comparison.head[first:], 1)}
    notes = [*comparison.notes()]
    for number, head in heads.items():
        notes = [note.replace(f"{NOT_MEASURED} {head}:", f"{NOT_MEASURED} {number}:") for note in notes]
    table = text_table([*comparison.head[:first], *heads], comparison.body)
    return "\n".join([*table, *(f"{number} {head}" for number, head in heads.items()), READING, *notes])


def text_table(head: list[str], body: list[list[str]]) -> list[str]:
    """The lines of a table for a terminal."""
    rows = [head, *body]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
