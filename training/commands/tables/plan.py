"""The cells of a table as they are to be run: its command line, and the commands of every cell."""

import dataclasses
import functools
import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from ...cli import build_parser, default_values, how_to_run, refuse_secrets
from ...engine.run_folder import check_same_run, has_begun, numbered, write_recipe
from ...evaluation.knn import protocol as knn_protocol
from ...evaluation.linear_probe import ProbeRun, parse_linear_probe
from ...recipe import PARTS, PretrainArguments, parse_pretrain
from ...reports.children import program
from ...reports.compare import canonical, settings_of
from ...reports.table import Cell, Row, Table, load_table, table_names
from ...reports.table_results import (
    Filled,
    Found,
    Measurement,
    Published,
    changes,
    find,
    of_measure,
)

DESCRIPTION = (
    "Run a table of a paper and show ours beside theirs: `python scripts/table.py v1_key_momentum --seeds 0 1 2`."
)
LINEAR_PROBE = "linear probe"
ON_THE_CPU = ["--use_cpu"]  # for what is parsed here: this process takes no memory of a GPU, which the cells need
OF_A_CELL = {  # flags of pretraining that the table gives itself, or that mean nothing for all cells alike
    "seed": "pass --seeds",
    "recipe": "the rows of a table name theirs",
    "preview_views": "show the views of one run by pretrain",
    "run_name": "every cell is called after its folder",
    "push_to_hub": "publish the run that you choose",
}
# Flags that mean the same in the evaluation, which gets them too.
SHARED = ("use_cpu", "per_device_eval_batch_size", "dataloader_num_workers", "report_to", "project")


@dataclasses.dataclass
class RowPlan:
    """A row as it is to be run.

    Args:
        words: of `pretrain`, without seed and folder.
        args: what they mean.
        published: the row without the overrides of the command line.
        planned: how it will be measured.
    """

    row: Row
    words: list[str]
    args: PretrainArguments
    published: Published
    planned: Measurement


@dataclasses.dataclass
class Plan:
    """A parsed command line.

    Args:
        rows: by the names of their folders.
        cells: of all rows and seeds.
        only: numbers of the cells that are to run; None for all.
        launcher: words before the script, in place of python.
        evaluation: flags of the evaluation.
        write_only, list_only: run nothing.
    """

    table: Table
    rows: dict[str, RowPlan]
    seeds: list[int]
    folder: Path
    only: list[int] | None
    launcher: list[str]
    evaluation: list[str]
    write_only: bool
    list_only: bool

    @property
    def cells(self) -> list[Cell]:
        return self.table.cells(self.folder, self.seeds)

    @property
    def chosen(self) -> list[Cell]:
        """The cells that are to run.

        Raises:
            ValueError: there is no cell of a number.
        """
        cells = self.cells
        for number in self.only or []:
            if not 0 <= number < len(cells):
                raise ValueError(
                    f"there is no cell {number}: {self.table.name} with {len(self.seeds)} seeds has cells 0 to {len(cells) - 1}"
                )
        return cells if self.only is None else [cells[number] for number in dict.fromkeys(self.only)]

    def steps(self, cell: Cell) -> dict[str, list[str]]:
        """The commands of a cell by the script that they start."""
        pretrain = [*self.rows[cell.row.folder].words, "--seed", str(cell.seed), "--output_dir", str(cell.folder)]
        steps = {"pretrain": [*self.launcher, *program("pretrain"), *pretrain]}
        if self.table.measure == LINEAR_PROBE:
            steps["linear_probe"] = [
                *self.launcher,
                *program("evaluations.linear_probe"),
                str(cell.folder),
                *self.evaluation,
                *self._beside_other_probes(cell),
            ]
        return steps

    def _beside_other_probes(self, cell: Cell) -> list[str]:
        """Words that give a probe a folder of its own where its default one holds a probe of other settings."""
        if not any(cell.folder.glob("linear_probe*")):
            return []
        probe = parse_linear_probe([str(cell.folder), *self.evaluation, *ON_THE_CPU])
        usual = str(probe.training.output_dir)
        folder = next(name for name in numbered(usual) if _may_hold(Path(name), probe))
        return [] if folder == usual else ["--output_dir", folder]

    def check(self) -> None:
        """
        Raises:
            ValueError: the launcher is not there, or a folder holds the run of another command.
        """
        if shutil.which(self.launcher[0]) is None:
            raise ValueError(f"launcher ({self.launcher[0]}) is no program here: is its environment activated?")
        for cell in self.cells:
            if has_begun(cell.folder):
                args = self.rows[cell.row.folder].args
                training = args.settings["training"] | {"seed": cell.seed}
                check_same_run(cell.folder, args.settings | {"training": training}, args.defaults)

    def find(self, cell: Cell) -> Found:
        return find(cell, self.rows[cell.row.folder].published, default_values(PARTS))

    def is_done(self, found: Found) -> bool:
        """Whether a cell has its result."""
        if found.measured is None or found.state != "ended":
            return False
        planned = self.rows[found.cell.row.folder].planned
        return any(of_measure(c, self.table.measure) and found.has(c, planned) for c in found.results)

    def fill(self) -> Filled:
        """The table with all that is there now: of the seeds that were asked for, and of others."""
        there = self._runs_there()
        seeds_there = {int(run.name.removeprefix("seed")) for run in there if run.parent.name in self.rows}
        seeds = [*self.seeds, *sorted(seeds_there - {*self.seeds})]
        cells = self.table.cells(self.folder, seeds)
        found = [self.find(cell) for cell in tqdm(cells, "reading cells", disable=None, leave=False)]
        overrides: dict[str, Any] = {}
        for row in self.rows.values():
            to_come = settings(row.args, None)
            overrides |= {name: to_come[name] for name in changes(to_come, row.published.settings)}
        published = {name: row.published for name, row in self.rows.items()}
        planned = {name: row.planned for name, row in self.rows.items()}
        outside = [run for run in there if run.parent.name not in self.rows]
        return Filled(self.table, found, published, planned, overrides, outside)

    def _runs_there(self) -> list[Path]:
        """Folders of cells, also of rows that the table does not have any more."""
        return sorted(path for path in self.folder.glob("*/seed*") if path.name.removeprefix("seed").isdecimal())


def _may_hold(folder: Path, probe: ProbeRun) -> bool:
    """Whether a folder is free, or holds this very probe."""
    if not has_begun(folder):
        return True
    try:
        check_same_run(folder, probe.settings, probe.defaults)
    except ValueError:
        return False
    return True


def parse_table(argv: list[str]) -> Plan:
    """A table with the rows as they are to be run. Every command line of its cells is parsed.

    Raises:
        ValueError: an unknown table or flag, or a value out of its range.
    """
    argv = _joined(argv)
    parser = _parser(PARTS.values())
    parser.parse_args(argv)  # says what is unknown, and --help
    if not argv or argv[0].startswith("-"):
        raise ValueError(f"no table named: begin with one of {', '.join(table_names())}, or with a file of that form")
    own, overrides = _parser([]).parse_known_args(argv)
    refuse_secrets(shlex.split(own.launcher) + shlex.split(own.evaluation))
    table, given = load_table(own.table), parser.given(argv) - {"table", *OWN}
    for name in sorted(given):
        if name in OF_A_CELL or name.startswith("hub_"):
            raise ValueError(f"{name} is not for all cells alike: {OF_A_CELL.get(name, OF_A_CELL['push_to_hub'])}")
    if sorted(set(own.seeds)) != sorted(own.seeds) or min(own.seeds) < 0:
        raise ValueError(f"seeds ({' '.join(map(str, own.seeds))}) must be different numbers from 0 on")
    namespace = parser.parse_args(argv)
    shared = {name: getattr(namespace, name) for name in SHARED if name in given}
    evaluation = [*flags(shared), *shlex.split(own.evaluation)]
    folder = Path(own.output_dir or f"runs/tables/{table.name}")
    rows = {row.folder: plan_row(table, row, overrides, evaluation) for row in table.rows}
    plan = Plan(
        table,
        rows,
        own.seeds,
        folder,
        own.cell,
        shlex.split(own.launcher) or [sys.executable],
        evaluation,
        own.write_only,
        own.list,
    )
    _check_rows_differ(plan)
    return plan


def _joined(argv: list[str]) -> list[str]:
    # Or what follows, which is made of flags, would be taken for flags of ours.
    words = list(argv)
    for i in reversed(range(len(words) - 1)):
        if words[i] in ("--launcher", "--evaluation"):
            words[i : i + 2] = [f"{words[i]}={words[i + 1]}"]
    return words


OWN = ("seeds", "cell", "launcher", "evaluation", "output_dir", "list", "write_only", "tables")


def _parser(kinds: Any) -> Any:
    parser = build_parser(
        kinds,
        usage=f"{how_to_run('table')} NAME [--seeds 0 1 2] [--flag value ...]",
        description=f"{DESCRIPTION} The flags of pretraining change all cells alike.",
    )
    parser.add_argument("table", nargs="?", help=f"One of {', '.join(table_names())}, or a file of that form.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds that every row is trained with.")
    parser.add_argument("--cell", type=int, nargs="+", help="Run these cells alone, by the numbers of --list.")
    parser.add_argument(
        "--launcher",
        default="",
        help="What starts a command in several processes, e.g. 'accelerate launch --multi_gpu --num_processes 8'.",
    )
    parser.add_argument(
        "--evaluation", default="", help="Flags of the linear probe, e.g. --evaluation='--mode cached'."
    )
    parser.add_argument("--list", action="store_true", help="Show the cells and their commands, and run nothing.")
    parser.add_argument("--write_only", action="store_true", help="Write the table of what is there, and run nothing.")
    parser.add_argument("--tables", action="store_true", help="Show the names of all tables.")
    if "output_dir" not in parser.names:
        parser.add_argument("--output_dir", help="Folder of the table; by default runs/tables/NAME.")
    return parser


def plan_row(table: Table, row: Row, overrides: list[str], evaluation: list[str]) -> RowPlan:
    """
    Raises:
        ValueError: a flag of the row, of the overrides or of the evaluation has a wrong name or value.
    """
    words = ["--recipe", row.base, *flags(row.settings)]
    try:
        as_published = parse_pretrain([*words, *ON_THE_CPU])
    except ValueError as error:
        raise ValueError(f"row {row.title!r} of {table.name}: {error}") from error
    args = parse_pretrain([*words, *overrides, *ON_THE_CPU]) if overrides else as_published
    if table.measure == LINEAR_PROBE:
        planned, published = by_probe(args, evaluation), by_probe(as_published, [])
    else:
        planned, published = by_monitor(args), by_monitor(as_published)
    processes = None if as_published.config.batch_norm == "sync" else as_published.recipe.processes
    return RowPlan(row, [*words, *overrides], args, Published(settings(as_published, processes), published), planned)


def settings(args: PretrainArguments, processes: int | None) -> dict[str, Any]:
    """The settings that a run's weights depend on, defaults included."""
    return settings_of(args.settings, default_values(PARTS), processes)[0]


def by_monitor(args: PretrainArguments) -> Measurement:
    """What the monitor of a run measures when it ends."""
    knn = args.training.knn
    protocol = knn_protocol(knn.knn_k[0], knn.knn_temperature)
    return Measurement(protocol, args.data, args.data, knn.knn_features, args.training.knn_bank_size)


def by_probe(args: PretrainArguments, words: list[str]) -> Measurement:
    """What the linear probe of a run measures.

    Raises:
        ValueError: a flag is unknown, or a value out of its range.
    """
    if any(word.split("=")[0] in ("--output_dir", "--random_encoder") for word in words):
        raise ValueError(
            "evaluation is of the cell's own weights, in its own folder: leave --random_encoder and --output_dir out"
        )
    sections = json.dumps({name: args.settings[name] for name in ("data", "probe")})
    probe = _parse_probe(sections, tuple(words))
    kind = "official" if probe.training.mode == "official" else "cached features, SGD"
    return Measurement(f"linear probe, {kind}, {probe.training.protocol}", probe.data, args.data)


@functools.cache  # rows have much in common
def _parse_probe(sections: str, words: tuple[str, ...]) -> ProbeRun:
    with TemporaryDirectory() as stand_in:  # of the run, which may not be there yet
        write_recipe(Path(stand_in), json.loads(sections))
        return parse_linear_probe([stand_in, *words, *ON_THE_CPU])


def flags(values: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line.

    Raises:
        ValueError: a value is none.
    """
    words: list[str] = []
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name} has no value: take a recipe as the base that does not set it")
        many = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{name}", *map(str, many)]
    return words


def _check_rows_differ(plan: Plan) -> None:
    """
    Raises:
        ValueError: rows whose cells are to run have become one by the overrides.
    """
    rows: dict[str, str] = {}
    for name in dict.fromkeys(cell.row.folder for cell in plan.chosen):
        row = plan.rows[name]
        same = rows.setdefault(canonical(settings(row.args, None)), row.row.title)
        if same != row.row.title:
            raise ValueError(
                f"rows {same!r} and {row.row.title!r} of {plan.table.name} are the same with these flags: leave out the "
                "flag that they differ in, or name the cells that you want by --cell"
            )
