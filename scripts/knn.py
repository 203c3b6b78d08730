"""Classify by nearest neighbours on frozen features: `python scripts/knn.py runs/quickstart --knn_k 10 20 200`."""

import sys

from training.commands.knn import main

if __name__ == "__main__":
    main(sys.argv[1:])
