"""Publish a run or a model on the Hub: `python scripts/push_to_hub.py runs/mine org/moco-v2-r50`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "publish")

if __name__ == "__main__":
    main(sys.argv[1:])
