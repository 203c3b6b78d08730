"""Write a dataset as smaller images, once for many runs: `python scripts/prepare.py FOLDER prepared --short_side 256`."""

import sys
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from ..cli import build_parser, how_to_run, parse_flags
from ..data.formats import absolute_name
from ..data.sources import load_splits
from ..errors import one_line_errors
from ..preparation.card import write_card
from ..preparation.prepare import (
    PrepareArguments,
    PrepareDataArguments,
    claim,
    describe,
    finish,
    prepare,
    refuse_launchers,
    shards_of,
    show,
)
from ..preparation.resize import Resizer
from ..process import command


@command
def main(argv: list[str]) -> None:
    logging.disable_progress_bar()
    with one_line_errors():
        data, folder, args = parse_prepare(argv)
        refuse_launchers()
        images = load_splits(data)
        resizer = Resizer(images.decoder, args.short_side, args.quality)
        record = claim(folder, data.dataset_name, describe(data, images, args), images, resizer)
        shards = shards_of(folder, record)
        print(f"{data.dataset_name}: {sum(map(len, shards)):,} images to {len(shards):,} files in {folder}")
        prepare(images, shards, resizer, data, args.workers)
        totals = finish(folder, record, shards)
        write_card(folder, record, shards, labelled="label" in next(iter(images.rows.values())).column_names)
        show(folder, totals)


def parse_prepare(argv: list[str]) -> tuple[PrepareDataArguments, Path, PrepareArguments]:
    """The source, the folder to write and how.

    Raises:
        ValueError: one is missing, an unknown flag, or a value out of its range.
    """
    parts = {"data": PrepareDataArguments, "preparation": PrepareArguments}
    usage = f"{how_to_run('prepare')} SOURCE FOLDER [--flag value ...]"
    parser = build_parser(
        parts.values(),
        usage=usage,
        description="Write every image of a dataset with a short side of 256 px to Parquet files, to train on them.",
    )
    parser.add_argument("source", nargs="?", help="A dataset as --dataset_name of pretraining takes it.")
    parser.add_argument("folder", nargs="?", help="Folder to write, new or of the same command.")
    words, (data, args), _ = parse_flags(parser, parts, argv, {})
    if words.folder is None:
        raise ValueError(f"two names are needed: {usage}")
    return replace(data, dataset_name=absolute_name(words.source)), Path(words.folder), args


if __name__ == "__main__":
    main(sys.argv[1:])
