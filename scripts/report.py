"""Draw the figures of a pretraining run and write its report.html: `python scripts/report.py runs/quickstart`."""

import sys

from training.commands.report import main

if __name__ == "__main__":
    main(sys.argv[1:])
