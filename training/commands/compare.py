"""Compare pretraining runs in a table and a figure: `python scripts/compare.py runs/a runs/b runs/c`."""

import os
import sys
from pathlib import Path

from accelerate import PartialState
from transformers.utils import logging

from ..cli import build_parser, default_values, how_to_run
from ..engine.run_folder import SAVED_RECIPE, unused
from ..errors import first_line, one_line_errors
from ..evaluation.encoder import not_there
from ..process import command
from ..recipe import PARTS
from ..reports.compare import NAME, compare, to_text, write


@command
def main(argv: list[str]) -> None:
    logging.disable_progress_bar()
    parser = build_parser(
        [], usage=f"{how_to_run('compare')} RUN RUN ... [--output_dir FOLDER]", description=str(__doc__)
    )
    parser.add_argument("runs", nargs="+", type=Path, help="Output directories of pretraining runs, ended or not.")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help=f"Where to write Markdown, HTML and PNG; not there yet, or empty. By default {NAME} beside the first run.",
    )
    with one_line_errors():
        args = parser.parse_args(argv)
        if not PartialState(cpu=True).is_main_process:  # one of them writes
            return
        runs = [folder for folder in args.runs if not is_comparison(folder)]  # `runs/sweep/*` names an earlier one too
        check_runs(runs)
        folder = args.output_dir or Path(unused(str(runs[0].absolute().parent / NAME)))
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise ValueError(f"output_dir ({folder}) is there already, and is not overwritten: name another folder")
        comparison = compare(runs, default_values(PARTS))
        try:
            write(comparison, folder)
        except OSError as error:
            raise ValueError(
                f"output_dir ({folder}) cannot be written ({first_line(error)}): name another folder"
            ) from error
        print(to_text(comparison))
        print(f"Wrote {folder / NAME}.html and .md")


def is_comparison(folder: Path) -> bool:
    """Whether this command has written a folder."""
    return (folder / f"{NAME}.md").is_file() and not (folder / SAVED_RECIPE).exists()


def check_runs(folders: list[Path]) -> None:
    """
    Raises:
        ValueError: there is one run alone, one is named twice, or is not there.
    """
    if len(folders) < 2:
        raise ValueError(
            f"{' '.join(map(str, folders)) or 'no run'} is compared with nothing: name several runs, or see "
            f"{how_to_run('report')} for one"
        )
    for i, folder in enumerate(folders):
        if not folder.exists():
            raise not_there(str(folder), " as a folder here")
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise ValueError(f"{folder} is named twice: name each run once")


if __name__ == "__main__":
    main(sys.argv[1:])
