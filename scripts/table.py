"""Run a table of a paper and show ours beside theirs: `python scripts/table.py v1_key_momentum --seeds 0 1 2`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "table")

if __name__ == "__main__":
    main(sys.argv[1:])
