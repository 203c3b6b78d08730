"""Fine-tune an encoder with few labels or all: `python scripts/finetune.py runs/mine --label_fraction 0.1`."""

import sys

from training.commands.finetune import main

if __name__ == "__main__":
    main(sys.argv[1:])
