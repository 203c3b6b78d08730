"""Draw the figures of a pretraining run and write its report.html: `python scripts/report.py runs/quickstart`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "report")

if __name__ == "__main__":
    main(sys.argv[1:])
