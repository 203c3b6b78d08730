"""Measure what this project claims: `python scripts/benchmark.py step --json step.json --figure step.png`.

Every benchmark times its variants in turns in the same run, and compares them with a limit or with the way others do it.
"""

import argparse
import sys
from pathlib import Path

from ..benchmarks import data, detect, embed, exchange, folder, gpu, knn, step, stream, train
from ..benchmarks.measure import draw_timings, write_numbers
from ..cli import refuse_secrets
from ..errors import one_line_errors
from ..process import command, keep_freed_memory

BENCHMARKS = {
    **{"data": data, "step": step, "train": train, "stream": stream},
    **{"exchange": exchange, "knn": knn, "folder": folder, "embed": embed, "detect": detect},
}

WRITE_AS_THEY_GO = {"gpu": gpu}  # to a folder of their own, row by row


@command
def main(argv: list[str]) -> None:
    keep_freed_memory()
    with one_line_errors():
        refuse_secrets(argv)
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, benchmark in (BENCHMARKS | WRITE_AS_THEY_GO).items():
        about = str(benchmark.__doc__)
        command = commands.add_parser(
            name, help=about.split("\n")[0], description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        benchmark.add_arguments(command)
        command.set_defaults(run=benchmark.run, json=None, figure=None)
        if name in BENCHMARKS:
            command.add_argument("--json", type=Path, help="File for all numbers and what they were measured with.")
            command.add_argument("--figure", type=Path, help="File for a figure, which is written as PNG and SVG.")
    args = parser.parse_args(argv)
    with one_line_errors():
        check_values(args)
        results = args.run(args)
    for result in results:
        print(result.table())
    if args.json:
        write_numbers(results, args.json)
    if args.figure:
        draw_timings(results, args.figure.with_suffix(""))


def check_values(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a number is not above 0, or a file would lie in a folder that does not exist.
    """
    for name, value in vars(args).items():
        least = 0 if name == "dataloader_num_workers" else 1
        if type(value) is int and value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}")
        if isinstance(value, float) and not value > 0:
            raise ValueError(f"{name} ({value:g}) must be above 0")
    for path in (args.json, args.figure):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: the folder does not exist; make it, or name another file")


if __name__ == "__main__":
    main(sys.argv[1:])
