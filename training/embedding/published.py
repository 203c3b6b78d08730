"""An embedded set as a dataset on the Hub: its card, and the folder that is published.

Names of files on this machine do not appear: a local dataset or model is called by the name of its folder.
"""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub import DatasetCardData

from ..engine.files import inside, write_json, write_whole
from ..engine.run_folder import EMBEDDED, is_public
from ..evaluation.encoder import Encoder
from ..hub.model_card import escape, public_name
from .listing import DUPLICATES, SEARCH
from .shards import DATA, EMBEDDING, Shard, count_rows

CARD = "README.md"


def render_card(title: str, encoder: Encoder, record: dict[str, Any], shards: list[Shard], license: str) -> str:
    """The card of a set.

    Args:
        title: of the page.
        record: of the set.
        shards: all of them, written.
    """
    rows = count_rows(shards)
    dataset, name = public_name(record["dataset"], _is_local(record)), public_name(encoder.source)
    size = next((name for top, name in SIZES if sum(rows.values()) < top), SIZES[-1][1])
    files = [{"split": split, "path": f"{DATA}/{split}-*"} for split in rows]
    data = DatasetCardData(
        license=license,
        task_categories=["image-feature-extraction"],
        tags=["embeddings", "moco", record["architecture"]],
        size_categories=[size],
        configs=[{"config_name": "default", "data_files": files}],
    )
    table = [
        f"| {escape(split)} | {count:,} | {record['splits'][split]['images'] - count:,} |"
        for split, count in rows.items()
    ]
    text = [
        f"# {escape(title)}",
        "",
        f"Embeddings of the images of {escape(dataset)}, a row an image and without the images, by",
        f"{'a random encoder like ' * encoder.random}{escape(name)}.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'rows = load_dataset("{title}", split="{next(iter(rows))}").with_format("torch")',
        f'rows[0]["{EMBEDDING}"]',
        "```",
        "",
        "| split | rows | images that could not be read |",
        "|---|---|---|",
        *table,
        "",
        "| | |",
        "|---|---|",
        f"| architecture | {escape(record['architecture'])} |",
        f"| digest of the weights | `{record['model']}` |",
        f"| feature | {escape(record['features'])} |",
        f"| view | {record['view']}, as the encoder was evaluated |",
        f"| numbers | {record['dtype']}, {'of unit length' if record['features'] == 'head' else 'not normalised'} |",
        "",
        "`row` is the number of the image in its split, `path` its file there, if it has one.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text) + "\n"


SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
SIZES += [(10**8, "10M<n<100M")]


def write_card(folder: Path, encoder: Encoder, record: dict[str, Any], shards: list[Shard]) -> None:
    """Write the card into the set's own folder, by which `datasets` knows its splits. One that is there stays."""
    if not (folder / CARD).exists():
        write_whole(folder / CARD, render_card(folder.resolve().name, encoder, record, shards, "unknown"))


def stage_publication(
    folder: Path, card: str, record: dict[str, Any], shards: list[Shard], include_pictures: bool
) -> None:
    """Fill an empty folder with what is published: links to the shards and the pictures, the card, the record without paths."""
    (folder / DATA).mkdir()
    for shard in shards:
        os.symlink(inside(shard.path).resolve(), folder / DATA / shard.path.name)
    for path in drawn(shards[0].folder):
        if may_leave(path, record, include_pictures):
            os.symlink(path.resolve(), folder / path.name)
    write_json(folder / EMBEDDED, record | {"dataset": public_name(record["dataset"], _is_local(record))})
    write_whole(folder / CARD, card)


def drawn(folder: Path) -> list[Path]:
    """The pictures of a set. A link may show what lies elsewhere, and is none."""
    found = [path for name in (SEARCH, DUPLICATES) for path in sorted(folder.glob(f"{name}*.png"))]
    return [path for path in found if not path.is_symlink()]


def may_leave(picture: Path, record: dict[str, Any], include_pictures: bool) -> bool:
    """Whether a picture may leave this machine unasked: one of the user's queries, or of images not for everybody, may not."""
    if include_pictures:
        return True
    return not (picture.name.startswith(SEARCH) or _is_local(record)) and is_public(record["dataset"])


def describe_shown(
    folder: Path, places: pa.Table, class_names: list[str], record: dict[str, Any], include_pictures: bool
) -> list[str]:
    """What is shown of the data, in lines.

    Args:
        folder: of the set.
        places: of its rows.
    """
    paths = places["path"].drop_null()
    names = f"names of files, such as {paths[0]}" if len(paths) else "numbers of rows, and no names of files"
    classes = f", and the names of {len(class_names)} classes" if class_names else ""
    lines = [f"{DATA}/ has the embeddings, {names}{classes}"]
    for path in drawn(folder):
        left_out = not may_leave(path, record, include_pictures)
        lines.append(f"{path.name} shows images{', and is left out: --include_pictures publishes it' * left_out}")
    return lines


def _is_local(record: dict[str, Any]) -> bool:
    return Path(record["dataset"]).is_absolute()
