"""Convert a checkpoint of other MoCo code, or back: `python scripts/convert.py moco_v2_800ep_pretrain.pth.tar moco-v2-r50`."""

import sys

from transformers.utils import logging

from ...convert.files import FORMATS, parse_convert, read, write
from ...errors import one_line_errors
from ...process import command


@command
def main(argv: list[str]) -> None:
    logging.disable_progress_bar()
    with one_line_errors():
        source, out, to = parse_convert(argv)
        checkpoint = read(source)
        print(f"{source}: {checkpoint}")
        for note in checkpoint.notes:
            print(f"  {note}")
        needs = write(checkpoint, out, to)
    print(f"Wrote {out}: {FORMATS[to].use}")
    for need in needs:
        print(f"  {need}")


if __name__ == "__main__":
    main(sys.argv[1:])
