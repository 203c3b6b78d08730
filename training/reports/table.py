"""The tables of the papers: YAML files of `training/tables/`, or any of that form.

A cell is a row of a table with a seed. Its run lies in the folder ROW/seedS of the table's folder.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..cli import check_names, nearest_name
from ..engine.files import UNFINISHED, below, write_whole
from ..engine.run_folder import read_sections
from ..errors import one_line, shown

TABLES = Path(__file__).parents[1] / "tables"
DEFINITION = "table.yaml"  # in the folder of a table, which one it is
BEGUN = (DEFINITION, UNFINISHED)  # what other jobs of an array, which begin together, may be writing
EPOCH = "epoch"  # as the x axis: curves of what the runs have logged
MEASURES = {"linear probe": "linear probe", "kNN": "weighted kNN"}  # and how the protocols of their results begin
ABOUT = ("title", "paper", "conditions", "source")
KEYS = ("base", "measure", "x", "set", "rows")
ROW_KEYS = ("group", "label", "base", "set", "paper", "source")


@dataclass(frozen=True)
class Row:
    """
    Args:
        title: its words, those of its x axis included.
        label, group: with an x axis its place there, and its line.
        base: the recipe that `settings` are changed of.
        paper: per cent, or what the paper says in words; None where no text that can be read gives a number.
        source: where `paper` is from, if it is not the table's own paper.
    """

    title: str
    label: str
    group: str
    base: str
    settings: dict[str, Any]
    paper: float | str | None
    source: str | None

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.+-]+", "_", self.title).strip("_.").lower()


class Cell(NamedTuple):
    """A row with a seed.

    Args:
        number: by which it is called; more seeds do not change those of the first ones.
        folder: of its run.
    """

    number: int
    row: Row
    seed: int
    folder: Path


@dataclass(frozen=True)
class Table:
    """
    Args:
        about: title, paper, the conditions of its numbers, and their source.
        measure: of `MEASURES`.
        x: what the x axis is called; None for a table that is no curve.
    """

    name: str
    about: dict[str, str]
    measure: str
    x: str | None
    rows: list[Row]

    def cells(self, folder: Path, seeds: Iterable[int]) -> list[Cell]:
        """All rows with the first seed, then with the next.

        Raises:
            ValueError: a folder of a row is a link.
        """
        pairs = [(seed, row) for seed in seeds for row in self.rows]
        return [Cell(i, row, seed, below(folder, row.folder) / f"seed{seed}") for i, (seed, row) in enumerate(pairs)]


def table_names() -> list[str]:
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


def load_table(name_or_path: str) -> Table:
    """Read a table by its name or from a file.

    Raises:
        ValueError: there is none, or it is not of the form of those in `TABLES`.
    """
    known = table_names()
    path = TABLES / f"{name_or_path}.yaml" if name_or_path in known else Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"table ({name_or_path!r}) is neither a file nor one of {', '.join(known)}{nearest_name(name_or_path, known)}"
        )
    content = read_sections(path, f"write it as those in {TABLES}")
    if content.keys() != {"about", "table"}:
        raise ValueError(f"{path} has the sections {', '.join(content) or 'none'}: a table has about and table")
    about, table = content["about"], content["table"]
    check_names(path, "about", about, ABOUT)
    check_names(path, "table", table, KEYS)
    if lacking := [key for key in ABOUT if key not in about] or [
        key for key in ("measure", "rows") if key not in table
    ]:
        raise ValueError(f"{path} has no {lacking[0]}: write it as those in {TABLES}")
    if table["measure"] not in MEASURES:
        raise ValueError(f"measure ({shown(table['measure'])}) of {path} must be one of {', '.join(MEASURES)}")
    if not isinstance(table["rows"], list) or not table["rows"]:
        raise ValueError(f"rows of {path} must be a list of at least one: write it as those in {TABLES}")
    x = None if table.get("x") is None else str(table["x"])
    rows = [_row(path, entry, table, x) for entry in table["rows"]]
    for title, times in Counter(row.folder for row in rows).items():
        if times > 1 or not title:
            raise ValueError(
                f"{path} has {times} rows that are called {title!r}: give each a label of its own, with letters"
            )
    return Table(path.stem, {key: str(value) for key, value in about.items()}, table["measure"], x, rows)


def _row(path: Path, entry: Any, table: Mapping[str, Any], x: str | None) -> Row:
    if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
        raise ValueError(f"{path} has the row {shown(entry)}, which has no names: it may have {', '.join(ROW_KEYS)}")
    check_names(path, "rows", entry, ROW_KEYS)
    base, settings = entry.get("base", table.get("base")), [table.get("set") or {}, entry.get("set") or {}]
    if not isinstance(base, str) or not all(isinstance(part, dict) for part in settings):
        raise ValueError(
            f"{path} has the row {shown(entry)} without a base recipe, or with a set that is no names and values"
        )
    paper = entry.get("paper")
    if isinstance(paper, bool) or not isinstance(paper, float | int | str | None):
        raise ValueError(f"{path} has paper {shown(paper)}, which is neither per cent nor words")
    source = None if entry.get("source") is None else str(entry["source"])
    label, group = (str(entry.get(name, "")) for name in ("label", "group"))
    place = label if x in (None, EPOCH) else f"{x} {label}"
    return Row(", ".join(filter(None, [group, place])), label, group, base, settings[0] | settings[1], paper, source)


def claim(table: Table, folder: Path) -> None:
    """Make a folder that of a table.

    Raises:
        ValueError: it holds another table, or something else.
    """
    definition = folder / DEFINITION
    if definition.is_file():
        other = read_sections(definition, "bring it back, or pass another --output_dir").get("about", {}).get("title")
        if other != table.about["title"]:
            raise ValueError(
                f"output_dir ({folder}) holds the table {shown(other)!r}, and this is {table.about['title']!r}: pass another"
            )
    elif folder.exists() and (not folder.is_dir() or any(not x.name.startswith(BEGUN) for x in folder.iterdir())):
        raise ValueError(f"output_dir ({folder}) holds files of something else: pass another --output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(definition, yaml.safe_dump(definition_of(table), sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise ValueError(f"output_dir ({folder}) cannot be written ({one_line(error)}): pass another") from error


def definition_of(table: Table) -> dict[str, Any]:
    """The content of a file that `load_table` reads as this table."""
    rows = [
        {
            "group": row.group,
            "label": row.label,
            "base": row.base,
            "set": row.settings,
            "paper": row.paper,
            "source": row.source,
        }
        for row in table.rows
    ]
    return {"about": table.about, "table": {"measure": table.measure, "x": table.x, "rows": rows}}
