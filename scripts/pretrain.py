"""Pretrain an encoder with MoCo: `python scripts/pretrain.py --recipe quickstart`."""

import sys

from training.commands.pretrain import main

if __name__ == "__main__":
    main(sys.argv[1:])
