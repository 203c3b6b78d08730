"""Measure what this project claims: `python scripts/benchmark.py step --json step.json --figure step.png`.

Every benchmark times its variants in turns in the same run, and compares them with a limit or with the way others do it."""

import sys

from training.commands.benchmark import main

if __name__ == "__main__":
    main(sys.argv[1:])
