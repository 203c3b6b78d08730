"""Classify by nearest neighbours on frozen features: `python scripts/knn.py runs/quickstart --knn_k 10 20 200`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "knn")

if __name__ == "__main__":
    main(sys.argv[1:])
