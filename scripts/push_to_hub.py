"""Publish a run or a model on the Hub: `python scripts/push_to_hub.py runs/mine org/moco-v2-r50`."""

import sys

from training.commands.push_to_hub import main

if __name__ == "__main__":
    main(sys.argv[1:])
