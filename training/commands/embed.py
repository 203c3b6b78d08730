"""Embed a dataset, search it, find near-duplicates: `python scripts/embed.py runs/quickstart --duplicates 0.98`."""

import json
import sys
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers.utils import logging

from modeling_moco import MoCoModel

from ..data.decode import MAX_BYTES
from ..data.images import MapImages
from ..data.sources import AllSplits, SplitDataArguments, load_splits
from ..embedding.duplicates import find_duplicates
from ..embedding.embed import EmbedArguments, check_place, claim, describe, embed, stage_number
from ..embedding.listing import list_duplicates, list_nearest, pixels_of, to_pixels
from ..embedding.published import CARD, describe_shown, render_card, stage_publication, write_card
from ..embedding.search import search
from ..embedding.shards import Shard, count_rows, read_places
from ..engine.checkpoints import decided_by_main
from ..engine.run_folder import EMBEDDINGS, UNREADABLE
from ..errors import one_line_errors
from ..evaluation.encoder import Encoder, check_image_size, parse_evaluation
from ..evaluation.features import encode_in_order
from ..hub.publish import check_private, make_folder
from ..hub.repository import Repository
from ..process import command, keep_freed_memory
from .models.push_to_hub import show_files


@command
def main(argv: list[str]) -> None:
    keep_freed_memory()
    logging.disable_progress_bar()
    with one_line_errors():
        encoder, data, args = parse_embed(argv)
        state = PartialState(cpu=args.use_cpu or not torch.cuda.is_available())  # unasked it forms no group on CPUs
        repository = None
        if args.push_to_hub is not None:
            repository = Repository(args.push_to_hub, args.private, kind="dataset")
        images = load_splits(data)
        queries = read_queries(args.search, images, data)
        model = encoder.load(MoCoModel, args.seed, head=args.features == "head").to(state.device)
        check_image_size(model, data.image_size)
        stage_number(model, args.stage)
        folder, record = Path(args.output_dir), describe(model, data, images, args)
        if repository is not None and not args.dry_run:
            decided_by_main(lambda: check_place(folder, record))  # before a repository is made
            repository = decided_by_main(partial(prepare, repository, args.license))
        claim(folder, record)
        if state.is_main_process:
            print(f"Embeddings of {encoder}: {record['features']}, {record['dtype']}, in {folder}")
        shards = embed(model, images, folder, args, data)
        found = None if queries is None else embed_queries(model, queries, args)
        if state.is_main_process:
            write_card(folder, encoder, record, shards)
            show_set(folder, shards)
            look(shards, images, data, args, queries, found, model.device)
            if repository is not None:
                publish(repository, encoder, record, shards, images, args)


def prepare(repository: Repository, license: str) -> Repository:
    """Make sure that one may write to the repository, under a licence that the Hub knows.

    Raises:
        ValueError: as `Repository.check_card` and `Repository.prepare`.
    """
    repository.check_card(f"---\nlicense: {json.dumps(license)}\n---\n")
    return repository.prepare()


def parse_embed(argv: list[str]) -> tuple[Encoder, SplitDataArguments, EmbedArguments]:
    """Flags over the data settings of the pretraining run that the model came from.

    Raises:
        ValueError: no model there, no dataset named, an unknown flag, or a value out of its range.
    """
    encoder, (data, args), _, _ = parse_evaluation(
        argv,
        {"data": SplitDataArguments, "embed": EmbedArguments},
        command="embed",
        description="Embed every image of a dataset, search the set, find near-duplicates in it, and publish it.",
        output=EMBEDDINGS,
    )
    return encoder, data, args


def read_queries(paths: list[str], images: AllSplits, data: SplitDataArguments) -> MapImages | None:
    """The images to search with, in the view that is embedded; None without any.

    Raises:
        ValueError: one is no file of an image.
    """
    rows = []
    for path in paths:
        try:
            with Path(path).open("rb") as file:
                row = {"image": {"bytes": file.read(MAX_BYTES), "path": path}}
            images.decoder.image(row["image"])
        except OSError as error:
            raise ValueError(f"search ({path}) is no image that can be read ({error}): pass files of images") from error
        rows.append(row)
    if not rows:
        return None
    return MapImages(datasets.Dataset.from_list(rows), data.evaluation_view(), decode=images.decoder.image)


def embed_queries(model: MoCoModel, queries: MapImages, args: EmbedArguments) -> torch.Tensor:
    """Embeddings of the images to search with, float32 (Q, D)."""
    stage = stage_number(model, args.stage)
    batches = encode_in_order(
        model, queries, feature=args.features, stage=stage, batch_size=args.per_device_eval_batch_size
    )
    return torch.cat([x for x, _ in batches])


def show_set(folder: Path, shards: list[Shard]) -> None:
    rows = count_rows(shards)
    counts = ", ".join(f"{split} {count:,}" for split, count in rows.items())
    use = f"datasets.load_dataset({str(folder)!r})"
    if escape(place := str(folder.resolve())) != place:
        use = "`datasets` takes *, ? and [ in the name of a folder for a pattern, so that only another name opens it"
    print(f"{sum(rows.values()):,} rows ({counts}): {use}")
    if left_out := sum(map(len, shards)) - sum(rows.values()):
        are = "image cannot be read and is" if left_out == 1 else "images cannot be read and are"
        print(f"warning: {left_out:,} {are} left out: {folder / UNREADABLE}", file=sys.stderr)


def look(
    shards: list[Shard],
    images: AllSplits,
    data: SplitDataArguments,
    args: EmbedArguments,
    queries: MapImages | None,
    found: torch.Tensor | None,
    device: torch.device,
) -> None:
    """Search the set and look for near-duplicates, as far as that was asked for, and show what is found."""
    folder, pixels = shards[0].folder, pixels_of(images, data)
    if queries is not None and found is not None:
        similarity, index = search(shards, found, args.neighbours, device)
        shown = [(path, to_pixels(queries[i]["pixel_values"])) for i, path in enumerate(args.search)]
        path = list_nearest(folder, read_places(shards), images.class_names, shown, similarity, index, pixels)
        print(f"Wrote {path} and {path.with_suffix('.png').name}")
    if args.duplicates is not None:
        duplicates = find_duplicates(shards, args.duplicates, device)
        splits = list(images.rows)
        table = list_duplicates(
            folder, read_places(shards), images.class_names, duplicates, args.duplicates, splits, pixels
        )
        if table is not None:
            print(f"Wrote {table} and its picture")


def publish(
    repository: Repository,
    encoder: Encoder,
    record: dict[str, Any],
    shards: list[Shard],
    images: AllSplits,
    args: EmbedArguments,
) -> None:
    """Show what is published, and publish it unless `args` asks for a dry run.

    Raises:
        ValueError: the card has what belongs to this machine, or the Hub refuses.
    """
    card = render_card(repository.name, encoder, record, shards, args.license)
    with make_folder() as name:
        folder = Path(name)
        stage_publication(folder, card, record, shards, args.include_pictures)
        check_private(encoder.source, repository.name, folder)
        show_files(folder)
        places = read_places(shards)
        print("\n".join(describe_shown(shards[0].folder, places, images.class_names, record, args.include_pictures)))
        if args.dry_run:
            print(f"\n{(folder / CARD).read_text(encoding='utf-8')}\nNothing was uploaded (--dry_run).")
            return
        print(f"Published: {repository.upload(folder, 'Publish embeddings')}")


if __name__ == "__main__":
    main(sys.argv[1:])
