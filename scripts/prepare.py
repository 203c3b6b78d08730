"""Write a dataset as smaller images, once for many runs: `python scripts/prepare.py FOLDER prepared --short_side 256`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "prepare")

if __name__ == "__main__":
    main(sys.argv[1:])
