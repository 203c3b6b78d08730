"""Train a linear classifier on a frozen encoder: `python scripts/linear_probe.py runs/quickstart`."""

import sys

from training.commands.linear_probe import main

if __name__ == "__main__":
    main(sys.argv[1:])
