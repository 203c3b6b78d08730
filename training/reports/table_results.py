"""A table of a paper, filled: ours beside the paper's.

All that is shown of ours is read from what the runs have left, which may have ended or not.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from transformers.trainer import TRAINER_STATE_NAME

from ..cli import names_in_files
from ..data.sources import EvaluationDataArguments
from ..engine.files import whole_files
from ..engine.page import document, embedded, escape, words
from ..engine.results import interval
from ..engine.run_folder import SAVED_RECIPE
from ..errors import one_line, visible
from ..hub.model_card import escape as escape_markdown
from ..hub.model_card import public_name
from .compare import (
    EMPTY,
    NO_KNN_CURVES,
    OF_CURVES,
    OF_DATA,
    PROCESSES,
    Column,
    Defaults,
    Measured,
    canonical,
    draw_curves,
    html_table,
    in_words,
    markdown_table,
    read_measured,
    same_monitor,
    text_table,
)
from .table import EPOCH, MEASURES, Cell, Row, Table
from .table_figure import Line, draw_lines

NAME = "table"  # of the files that are written
READING = (
    "Per cent of the images: mean ± sample standard deviation over the seeds; a single seed has no deviation. The 95 % "
    "interval is Wilson's of that mean: what other images of the same kind would give."
)
OF_DOTS = "Filled: ours, with the standard deviation of the seeds. Open circles: the paper's."
APART = "The paper's numbers were measured under other conditions, and are not compared with ours."


UNLIKE = "Rows that the table measures alike were measured in different ways, and are not compared with each other."
SOURCE = (
    *("dataset_name", "dataset_config_name", "train_split", "eval_split", "image_column", "label_column"),
    "max_image_pixels",
)  # flags that say where images and labels are


@dataclass(frozen=True)
class Measurement:
    """How a row is measured.

    Args:
        protocol: in the words of results.
        data, of_run: the images that its evaluation reads, and those that its run was given.
        feature: "backbone" or "head".
        bank_size: most images of the bank of a kNN; None for all.
    """

    protocol: str
    data: EvaluationDataArguments
    of_run: EvaluationDataArguments
    feature: str = "backbone"
    bank_size: int | None = None

    def is_of(self, column: Column, seen: Mapping[str, Any]) -> bool:
        """Whether a result in this column was measured so.

        Args:
            seen: the images that the run has recorded (`ImageSplits.about`). What it does not say is not compared.
        """
        data, of_run, same_source = self.data, self.of_run, self._same_source
        counts = {"train_images": None, "split_images": None} | (dict(seen) if same_source else {})
        return (
            (column.protocol, column.feature) == (self.protocol, self.feature)
            and all(getattr(column, name) == in_words(value) for name, value in self._expected(seen).items())
            and _fits(column.train_images, data.max_train_samples, of_run.max_train_samples, counts["train_images"])
            and _fits(str(column.n), data.max_eval_samples, of_run.max_eval_samples, counts["split_images"])
            and _fits(column.bank, self.bank_size, None, _number(column.train_images))
        )

    @property
    def kind(self) -> str:
        """The same text for measurements whose numbers can be compared."""
        view = [getattr(self.data, name) for name in names_in_files(EvaluationDataArguments)]
        return canonical([self.protocol, self.feature, self.bank_size, view])

    @property
    def _same_source(self) -> bool:
        return all(getattr(self.data, name) == getattr(self.of_run, name) for name in SOURCE)

    def _expected(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        data = self.data
        asked = {"dataset": data.dataset_name, "split": data.eval_split, "label_column": data.label_column}
        known: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        known |= {"config": data.dataset_config_name, "train_split": data.train_split, "view": data.view_in_words}
        if not self._same_source:
            return known
        return known | {name: seen[name] for name in OF_DATA if name in seen and name not in ("train_images", "view")}


def _fits(count: str, limit: int | None, of_run: int | None, seen: Any) -> bool:
    """Whether so many images are what this limit leaves, where a run under a limit of its own has seen so many."""
    number = _number(count)
    if number is None or not isinstance(seen, int):
        return number is None or limit is None or number <= limit
    if limit == of_run:
        return number == seen
    if limit is not None and (of_run is None or limit <= seen):
        return number == min(limit, seen)
    return seen <= number and (limit is None or number <= limit)


def _number(words: str) -> int | None:
    return int(words) if words.isdecimal() else None


class Published(NamedTuple):
    """A row as the paper has it: settings of its run with all defaults, and how it was measured."""

    settings: dict[str, Any]
    measurement: Measurement


@dataclass(frozen=True)
class Found:
    """A cell, with what its run has left.

    Args:
        state: "not begun", how far it is, "ended", or what is wrong with it.
        changed: names of the settings in which the run is not as published.
    """

    cell: Cell
    state: str
    measured: Measured | None = None
    changed: frozenset[str] = frozenset()

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.measured is None else self.measured.settings

    @property
    def results(self) -> dict[Column, float]:
        return {} if self.measured is None else self.measured.results

    def has(self, column: Column, measurement: Measurement) -> bool:
        """Whether it has a result in this column, which was measured so."""
        return self.measured is not None and column in self.results and measurement.is_of(column, self.measured.data)


def find(cell: Cell, published: Published, defaults: Defaults) -> Found:
    """Read a cell's run, or say why there is nothing to read."""
    if not (cell.folder / SAVED_RECIPE).is_file():
        return Found(cell, "not begun")
    if not any((path / TRAINER_STATE_NAME).is_file() for path in (cell.folder, *cell.folder.glob("checkpoint-*"))):
        return Found(cell, "begun")
    try:
        measured = read_measured(cell.folder, defaults)
    except ValueError as error:
        return Found(cell, f"cannot be read: {one_line(error)}")
    return Found(cell, measured.state, measured, changes(measured.settings, published.settings))


def changes(settings: Mapping[str, Any], published: Mapping[str, Any]) -> frozenset[str]:
    """Names of the settings that are not the published ones. A number of processes that is not known is as published."""
    both = {name: (settings.get(name), published.get(name)) for name in {**settings, **published}}
    if None in both[PROCESSES]:
        del both[PROCESSES]
    return frozenset(name for name, (ours, theirs) in both.items() if canonical(ours) != canonical(theirs))


def _changed_alike(one: Found, other: Found) -> bool:
    names = (one.changed | other.changed) - {PROCESSES}
    return all(canonical(one.settings.get(name)) == canonical(other.settings.get(name)) for name in names)


def of_measure(column: Column, measure: str) -> bool:
    """Whether this is a number of a table's measure: the last epoch's, for the best one is chosen by the evaluated images."""
    chosen = column.protocol.endswith("best epoch on the evaluated images")
    return column.protocol.startswith(MEASURES[measure]) and column.metric == "top1" and not chosen


@dataclass(frozen=True)
class Score:
    """Ours in a row.

    Args:
        values: per cent, one a seed.
        column: how they were measured; None without any.
    """

    row: Row
    values: list[float]
    column: Column | None

    @property
    def mean(self) -> float | None:
        return mean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean, from the number of images."""
        return interval(mean(self.values), self.column.n) if self.column is not None else None

    @property
    def words(self) -> str:
        if self.mean is None:
            return EMPTY
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.std is not None else "")


@dataclass(frozen=True)
class Filled:
    """A table with what is there of ours.

    Args:
        planned: how a row is to be measured, by its folder.
        published: of every row, by its folder.
        overrides: what the cells to come have instead of published settings.
        outside: runs in the table's folder that are of none of its rows.
    """

    table: Table
    found: list[Found]
    published: Mapping[str, Published]
    planned: Mapping[str, Measurement]
    overrides: Mapping[str, Any]
    outside: list[Path]

    @cached_property
    def counted(self) -> list[Found]:
        """Runs that are part of the table: what differs from the published settings in one of them is the same in all.

        Where runs are changed in several ways, those of the way that most of the ended ones have, then most of all.
        """
        read = [x for x in self.found if x.measured is not None]
        read.sort(key=lambda x: x.state != "ended")
        ways = ([x for x in read if _changed_alike(x, one)] for one in read)
        return max(ways, key=lambda runs: (sum(x.state == "ended" for x in runs), len(runs)), default=[])

    @property
    def changed(self) -> Mapping[str, Any]:
        """What ours have instead of published settings: the runs that are there or, without any, those to come."""
        runs = {name: x.settings[name] for x in reversed(self.counted) for name in x.changed}
        return dict(sorted(runs.items())) if self.counted else self.overrides

    @cached_property
    def scores(self) -> dict[str, Score]:
        """Of every row, by its folder."""
        return {row.folder: self._score(row) for row in self.table.rows}

    def _score(self, row: Row) -> Score:
        runs = [x for x in self.found if x.cell.row == row and x in self.counted]
        columns = [column for x in runs for column in x.results if of_measure(column, self.table.measure)]
        if not columns:
            return Score(row, [], None)
        times, planned = Counter(columns), self.planned[row.folder]
        column = max(columns, key=lambda column: (any(x.has(column, planned) for x in runs), times[column]))
        return Score(row, [x.results[column] for x in runs if column in x.results], column)

    @property
    def done(self) -> int:
        """Cells with their result."""
        return sum(len(score.values) for score in self.scores.values())

    @property
    def reproduced(self) -> bool:
        """Whether ours were measured under the paper's conditions, so that the numbers may be compared."""
        return not self.changed and all(
            x.has(column, self.published[x.cell.row.folder].measurement)
            for x in self.counted
            if (column := self.scores[x.cell.row.folder].column) is not None and column in x.results
        )

    @property
    def head(self) -> list[str]:
        paper = f"paper: {self.table.about['conditions']}"
        return ["", "ours", "seeds", "95 % interval", paper, *(["ours - paper"] if self.reproduced else [])]

    @property
    def body(self) -> list[list[str]]:
        return [self._line(score) for score in self.scores.values()]

    def _line(self, score: Score) -> list[str]:
        asked = sum(x.cell.row == score.row for x in self.found)
        low_high = score.interval
        between = EMPTY if low_high is None else f"{low_high[0]:.2f} to {low_high[1]:.2f}"
        paper = score.row.paper
        theirs = EMPTY if paper is None else paper if isinstance(paper, str) else f"{paper:.1f}"
        line = [score.row.title, score.words, f"{len(score.values)} of {asked}", between, theirs]
        if self.reproduced:
            known = score.mean is not None and isinstance(paper, float | int)
            line.append(f"{score.mean - paper:+.2f}" if known else EMPTY)  # type: ignore[operator]
        return line

    @property
    def progress(self) -> str:
        return f"{self.done} of {len(self.found)} cells are done (a cell is a row with a seed)."

    @property
    def cells(self) -> list[list[str]]:
        """Of every cell what `CELLS` names."""
        return [
            [
                *(str(x.cell.number), x.cell.row.title, str(x.cell.seed), x.state),
                *self._measured_with(x),
                f"{x.cell.folder.parent.name}/{x.cell.folder.name}",
            ]
            for x in self.found
        ]

    def _measured_with(self, found: Found) -> tuple[str, str, str]:
        """Value and hardware of a cell's result, and the commits of its training and its measurement."""
        column = self.scores[found.cell.row.folder].column
        if found.measured is None or column not in found.results or found not in self.counted:
            return EMPTY, EMPTY, EMPTY
        entry = next(x for x in reversed(found.measured.run.results) if Column.of(x) == column)
        commits = dict.fromkeys(filter(None, (found.measured.commit, entry.get("commit"))))
        return f"{found.results[column]:.2f}", entry["hardware"], ", ".join(map(str, commits)) or EMPTY

    def notes(self) -> Iterator[str]:
        """What a reader of the table must know, in sentences."""
        yield f"The paper: {self.table.about['paper']}. Source of its numbers: {self.table.about['source']}."
        for score in self.scores.values():
            if score.row.source is not None:
                yield f"Of another source, {score.row.title}: {score.row.source}."
        yield from self._how_ours_were_measured()
        if self.changed:
            yield f"Changed in ours: {', '.join(map(self._change, *zip(*self.changed.items(), strict=True)))}."
        if not self.reproduced:
            yield APART
        if self.table.x == EPOCH and not same_monitor(x.measured for x in self.counted if x.measured):
            yield NO_KNN_CURVES
        if len(processes := {x.settings[PROCESSES] for x in self.counted} - {None}) > 1:
            yield f"Ours were trained by different numbers of processes: {', '.join(map(str, sorted(processes)))}."
        if len(commits := sorted({x.measured.commit for x in self.counted if x.measured and x.measured.commit})) > 1:
            yield f"Ours were trained by different commits of the code: {', '.join(commits)}."
        for x in self.found:
            if x.measured is not None and x not in self.counted:
                yield f"Left out: {x.cell.folder}, whose settings are changed in another way than those of most runs."
            elif (otherwise := self._measured_otherwise(x)) is not None:
                yield f"Left out: {x.cell.folder}, which was measured otherwise: {otherwise}."
            if x.measured is not None and x.measured.older:
                yield f"Left out: {x.measured.older} results of {x.cell.folder}, which are of other weights than it has now."

        for folder in self.outside:
            yield f"Left out: {folder}, which is of no row of this table."

    def _measured_otherwise(self, found: Found) -> str | None:
        """How a cell that has a result of this measure, and none in the column of its row, was measured."""
        column = self.scores[found.cell.row.folder].column
        others = [c for c in found.results if of_measure(c, self.table.measure)]
        if column is None or column in found.results or not others:
            return None
        return others[-1].describe([others[-1], column])

    def _change(self, name: str, value: Any) -> str:
        published = {canonical(x := row.settings.get(name)): _value(name, x) for row in self.published.values()}
        return f"{name} {_value(name, value)} (published: {', '.join(published.values())})"

    def _how_ours_were_measured(self) -> Iterator[str]:
        rows: dict[Column, list[str]] = {}
        for score in self.scores.values():
            if score.column is not None:
                rows.setdefault(score.column, []).append(score.row.title)
        kinds: dict[str, set[Column]] = {}
        for score in self.scores.values():
            if score.column is not None:
                kinds.setdefault(self.planned[score.row.folder].kind, set()).add(score.column)
        for column, titles in rows.items():
            of = f" of {', '.join(titles)}" if len(rows) > 1 else ""
            learned = f", {column.learned_from}" if column.learned_from else ""
            yield f"Ours{of}: {column.describe([column])}, {column.feature} feature{learned}."
        if any(len(columns) > 1 for columns in kinds.values()):
            yield UNLIKE


def _value(name: str, value: Any) -> str:
    return public_name(value) if name == "dataset_name" and isinstance(value, str) else words(value)


# Files


def write(filled: Filled, folder: Path) -> None:
    """Markdown, HTML and the picture, as PNG and SVG. Those that are there are replaced."""
    with whole_files(folder) as fresh:
        drawn = draw(filled, fresh / NAME)
        (fresh / f"{NAME}.md").write_text(to_markdown(filled, drawn), encoding="utf-8")
        page = to_html(filled, fresh / f"{NAME}.svg" if drawn else None)
        (fresh / f"{NAME}.html").write_text(page, encoding="utf-8")


def draw(filled: Filled, path: Path) -> bool:
    """The picture; none where there is nothing to show.

    Returns:
        whether it was drawn.
    """
    if filled.table.x == EPOCH:
        rows = {
            row.title: [x.measured for x in filled.counted if x.measured and x.cell.row == row]
            for row in filled.table.rows
        }
        there = {title: runs for title, runs in rows.items() if any(run.history for run in runs)}
        return draw_curves(list(there), list(there.values()), path)
    lines = [
        Line(s.row.group, s.row.label, s.values, s.row.paper if isinstance(s.row.paper, float | int) else None)
        for s in filled.scores.values()
    ]
    return draw_lines(lines, filled.table.x, path, f"paper: {filled.table.about['conditions']}", filled.reproduced)


CELLS = ["cell", "row", "seed", "state", "ours", "hardware", "commit", "folder"]


def to_markdown(filled: Filled, drawn: bool) -> str:
    title = escape_markdown(visible(filled.table.about["title"]))
    lines = [f"# {title}", "", filled.progress, "", *markdown_table(filled.head, filled.body), "", READING]
    lines += [line for note in filled.notes() for line in ("", escape_markdown(visible(note)))]
    if drawn:
        lines += ["", f"![{title}]({NAME}.png)"]
    lines += ["", "## Cells", "", *markdown_table(CELLS, filled.cells)]
    return "\n".join(lines) + "\n"


def to_html(filled: Filled, figure: Path | None) -> str:
    title = filled.table.about["title"]
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(filled.progress)}</p>", html_table(filled.head, filled.body)]
    parts += [f'<p class="soft">{escape(note)}</p>' for note in (READING, *filled.notes())]
    if figure is not None:
        parts += ["<h2>Picture</h2>", embedded(figure, title, OF_CURVES if filled.table.x == EPOCH else OF_DOTS)]
    parts += ["<h2>Cells</h2>", html_table(CELLS, filled.cells)]
    return document(title, parts)


def to_text(filled: Filled) -> str:
    """The table for a terminal, with its notes."""
    return "\n".join([*text_table(filled.head, filled.body), filled.progress, READING, *filled.notes()])
