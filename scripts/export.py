"""Write a model in formats of other libraries: `python scripts/export.py runs/mine exported --timm --onnx`."""

import sys
from functools import partial

from training.commands import run

main = partial(run, "export")

if __name__ == "__main__":
    main(sys.argv[1:])
