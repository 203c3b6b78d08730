"""Measure what this project claims: `python scripts/benchmark.py step --json step.json --figure step.png`.

Every benchmark times its variants in turns in the same run, and compares them with a limit or with the way others do it."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "benchmark")

if __name__ == "__main__":
    main(sys.argv[1:])
