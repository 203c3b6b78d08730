"""Train a detector around an encoder: `python scripts/detect.py runs/mine --dataset_name VOCdevkit`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "detect")

if __name__ == "__main__":
    main(sys.argv[1:])
