"""Compare pretraining runs in a table and a figure: `python scripts/compare.py runs/a runs/b runs/c`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "compare")

if __name__ == "__main__":
    main(sys.argv[1:])
