"""Embed a dataset, search it, find near-duplicates: `python scripts/embed.py runs/quickstart --duplicates 0.98`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "embed")

if __name__ == "__main__":
    main(sys.argv[1:])
