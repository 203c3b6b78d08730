"""Fine-tune an encoder with few labels or all: `python scripts/finetune.py runs/mine --label_fraction 0.1`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "finetune")

if __name__ == "__main__":
    main(sys.argv[1:])
