"""The README.md of a prepared dataset, by which `datasets` and the Hub know its splits."""

from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from ..embedding.published import CARD, SIZES
from ..embedding.shards import DATA, Shard
from ..engine.files import write_whole
from ..hub.model_card import escape
from .shards import counts_of


def render_card(title: str, record: dict[str, Any], shards: list[Shard], labelled: bool) -> str:
    """The card.

    Args:
        title: of the page.
        record: of the dataset.
        shards: all of them, written.
    """
    counts = [(shard.split, counts_of(shard.path)) for shard in shards]
    total = sum(count["images"] for _, count in counts)
    size = next((name for top, name in SIZES if total < top), SIZES[-1][1])
    files = [{"split": split, "path": f"{DATA}/{split}-*"} for split in record["splits"]]
    data = DatasetCardData(
        license="unknown",
        task_categories=["image-classification"] if labelled else ["image-feature-extraction"],
        size_categories=[size],
        configs=[{"config_name": "default", "data_files": files}],
    )
    table = [
        f"| {escape(split)} | {_sum(counts, split, 'images'):,} | {_sum(counts, split, 'resized'):,} | "
        f"{_sum(counts, split, 'left_out'):,} |"
        for split in record["splits"]
    ]
    text = [
        f"# {escape(title)}",
        "",
        f"The images of {escape(record['dataset'])}. Those whose short side is longer than {record['short_side']} px were "
        "turned upright",
        f"and resized to it, and are JPEG files of quality {record['quality']}; the others are the files that they were.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'load_dataset("{title}")',
        "```",
        "",
        "| split | images | resized | could not be read |",
        "|---|---|---|---|",
        *table,
        "",
        "The images of a split are shuffled. `row` is the number of an image in its split of the source, `file_name` its file",
        "there, if it has one.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text) + "\n"


def _sum(counts: list[tuple[str, dict[str, int]]], split: str, key: str) -> int:
    return sum(count[key] for name, count in counts if name == split)


def write_card(folder: Path, record: dict[str, Any], shards: list[Shard], labelled: bool) -> None:
    """Write the card. One that is there stays."""
    if not (folder / CARD).exists():
        write_whole(folder / CARD, render_card(folder.resolve().name, record, shards, labelled))
