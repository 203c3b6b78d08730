"""Pretrain an encoder with MoCo: `python scripts/pretrain.py --recipe quickstart`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "pretrain")

if __name__ == "__main__":
    main(sys.argv[1:])
