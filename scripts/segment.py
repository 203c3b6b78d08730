"""Train a segmentation model around an encoder: `python scripts/segment.py runs/mine --dataset_name VOCdevkit`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "segment")

if __name__ == "__main__":
    main(sys.argv[1:])
