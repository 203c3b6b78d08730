"""Convert a checkpoint of other MoCo code, or back: `python scripts/convert.py moco_v2_800ep_pretrain.pth.tar moco-v2-r50`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "convert")

if __name__ == "__main__":
    main(sys.argv[1:])
