"""Train a linear classifier on a frozen encoder: `python scripts/linear_probe.py runs/quickstart`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "probe")

if __name__ == "__main__":
    main(sys.argv[1:])
