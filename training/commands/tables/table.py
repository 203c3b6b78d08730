"""Run a table of a paper and show ours beside theirs: `python scripts/table.py v1_key_momentum --seeds 0 1 2`."""

import os
import sys

from transformers.utils import logging

from ...engine.run_folder import ended
from ...engine.sgd_trainer import REQUEUE
from ...errors import one_line, one_line_errors
from ...process import command
from ...reports.children import Children, in_words
from ...reports.table import TABLES, Cell, claim, load_table, table_names
from ...reports.table_results import (
    NAME,
    to_text,
    write,
)
from .plan import Plan, parse_table

FAILED = 1  # exit status where a cell has failed


@command
def main(argv: list[str]) -> None:
    logging.disable_progress_bar()
    with one_line_errors():
        if "--tables" in argv:
            show_tables()
            return
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "a table starts the processes of its cells itself: start it by python, and pass --launcher 'accelerate "
                "launch ...'"
            )
        plan = parse_table(argv)
        if not plan.write_only:
            plan.check()
        if plan.list_only:
            show_cells(plan)
            return
        claim(plan.table, plan.folder)
    failed = [] if plan.write_only else run_cells(plan)
    with one_line_errors():
        filled = plan.fill()
        write(filled, plan.folder)
        print(f"\n{to_text(filled)}\nWrote {plan.folder / NAME}.html and .md")
    for sentence in failed:
        print(f"error: {sentence}", file=sys.stderr)
    if failed:
        raise SystemExit(FAILED)


# Running


def run_cells(plan: Plan) -> list[str]:
    """Run what is missing, one cell after the other, and write the table after each that has got its result.

    Returns:
        a sentence for each cell that has failed.
    """
    children, cells, failed = Children(), plan.chosen, []
    with children.receiving():
        for i, cell in enumerate(cells, 1):
            head = f"[{i}/{len(cells)}] {describe(cell)}"
            try:
                if plan.is_done(plan.find(cell)):
                    print(f"{head}, is done")
                    continue
                problem = run_cell(plan, cell, head, children)
            except ValueError as error:  # of a damaged file
                problem = one_line(error)
            if problem is None:
                write(plan.fill(), plan.folder)
            else:
                failed.append(f"{describe(cell)}: {problem}")
    return failed


def run_cell(plan: Plan, cell: Cell, head: str, children: Children) -> str | None:
    """Train and evaluate a cell, or what is left of it.

    Returns:
        what went wrong, if anything.
    """
    for script, words in plan.steps(cell).items():
        if script == "pretrain" and ended(cell.folder):
            continue
        print(f"{head}\n  {in_words(words)}")
        status = children.run(words)
        if children.stopped_by is not None or status == REQUEUE:
            stop(children)
        if status:
            return f"status {status} of {in_words(words)}"
    if not plan.is_done(plan.find(cell)):
        return f"it has ended without a {plan.table.measure}: look at what it has printed"
    return None


def stop(children: Children) -> None:
    name = "a signal" if children.stopped_by is None else children.stopped_by.name
    print(f"Stopped by {name}. What is complete is kept; the same command continues.")
    raise SystemExit(REQUEUE)


def describe(cell: Cell) -> str:
    return f"cell {cell.number}, {cell.row.title}, seed {cell.seed}"


def show_cells(plan: Plan) -> None:
    for cell in plan.chosen:
        found = plan.find(cell)
        print(f"{describe(cell)}: {'done' if plan.is_done(found) else found.state}")
        for words in plan.steps(cell).values():
            print(f"  {in_words(words)}")


def show_tables() -> None:
    tables = {name: load_table(name) for name in table_names()}
    for name, table in tables.items():
        print(
            f"{name:<{max(map(len, tables))}}  {table.about['title']} ({table.about['paper']}), {len(table.rows)} rows"
        )
    print(f"Write one of your own as those in {TABLES}, and name the file.")


if __name__ == "__main__":
    main(sys.argv[1:])
