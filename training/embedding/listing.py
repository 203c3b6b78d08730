"""What was found in an embedded set, as a table and a picture: the nearest images to others, and groups of near-duplicates."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..data.images import MapImages
from ..data.sources import AllSplits, SplitDataArguments
from ..engine.files import whole_file
from ..plots import BLUE, INK, NEIGHBOURS, VERMILION, Tile, image_rows
from .duplicates import Duplicates
from .shards import SPLIT

SHOWN_ROWS = 12  # of a picture
SEARCH, DUPLICATES = "search", "duplicates"  # beginnings of the names of files
Pixels = Callable[
    [str, int], np.ndarray | None
]  # of an image by its split and row: uint8 (S, S, 3), None if unreadable


def pixels_of(images: AllSplits, data: SplitDataArguments) -> Pixels:
    """The images of a dataset in the view that was embedded."""
    view = data.evaluation_view()
    splits = {name: MapImages(rows, view, decode=images.decoder.image) for name, rows in images.rows.items()}

    def read(split: str, row: int) -> np.ndarray | None:
        views = splits[split].read(row)
        return None if views is None else to_pixels(views["pixel_values"])

    return read


def to_pixels(view: torch.Tensor) -> np.ndarray:
    """A view (3, S, S) as pixels (S, S, 3)."""
    pixels: np.ndarray = view.permute(1, 2, 0).numpy()
    return pixels


def _rows(places: pa.Table, index: np.ndarray, class_names: list[str]) -> list[dict[str, Any]]:
    """Split, row, path and label of rows of a set."""
    rows: list[dict[str, Any]] = places.take(pa.array(index)).to_pylist()
    for row in rows:
        label = row.setdefault("label", None)
        if label is not None and 0 <= label < len(class_names):
            row["label"] = class_names[label]
    return rows


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


# The nearest images


def list_nearest(
    folder: Path,
    places: pa.Table,
    class_names: list[str],
    queries: list[tuple[str, np.ndarray]],
    similarity: torch.Tensor,
    index: torch.Tensor,
    pixels: Pixels,
) -> Path:
    """Print the neighbours of each query, write them to a new table in a set's folder, and draw the first ones.

    Args:
        places: of the set's rows.
        queries: name and pixels of each, Q.
        similarity, index: of the neighbours (Q, k).

    Returns:
        the table; the picture lies beside it.
    """
    lines, drawn = [], []
    for number, (name, own) in enumerate(queries):
        found = _rows(places, index[number].numpy(), class_names)
        close = similarity[number].tolist()
        print(f"{name}: nearest of {len(places):,} images")
        for rank, (cosine, row) in enumerate(zip(close, found, strict=True), 1):
            lines.append({"query": name, "rank": rank, "similarity": f"{cosine:.6f}"} | row)
            print(
                f"{rank:>4}  {cosine:.4f}  {row[SPLIT]} row {row['row']}  {row['path'] or ''}  {_label(row)}".rstrip()
            )
        tiles = [Tile(own, "query", colour=BLUE)]
        for cosine, row in zip(close[:NEIGHBOURS], found, strict=False):
            if (image := pixels(row[SPLIT], row["row"])) is not None:
                tiles.append(Tile(image, _label(row) or f"{row[SPLIT]} {row['row']}", f"{cosine:.3f}"))
        drawn.append(tiles)
    path = _new(folder)
    _write(path, lines)
    title = f"Nearest of {len(places):,} images, with cosine similarity"
    image_rows(title, drawn[:SHOWN_ROWS], path.with_suffix(""))
    return path


def _label(row: dict[str, Any]) -> str:
    return "" if row["label"] is None else str(row["label"])


def _new(folder: Path) -> Path:
    """A table that is not there yet: another search is not lost."""
    number, path = 1, folder / f"{SEARCH}.csv"
    while path.exists() or path.is_symlink():
        number += 1
        path = folder / f"{SEARCH}_{number}.csv"
    return path


# Near-duplicates


def list_duplicates(
    folder: Path,
    places: pa.Table,
    class_names: list[str],
    found: Duplicates,
    threshold: float,
    splits: list[str],
    pixels: Pixels,
) -> Path | None:
    """Print how many near-duplicates there are, and write and draw their groups, those between splits first.

    Args:
        places: of the set's rows.
        splits: their names, in order.

    Returns:
        the table, a row an image, and beside it the picture; None where there are no duplicates.
    """
    groups = found.groups
    print("\n".join(summary(found, groups, threshold, splits)))
    if not groups:
        return None
    lines = []
    for number, group in enumerate(groups, 1):
        of = {"group": number, "images": len(group), "between_splits": found.between(group)}
        nearest = _others("nearest", places, found.nearest[group], found.similarity[group])
        across = _others("across", places, found.across[group], found.across_similarity[group])
        rows = _rows(places, group, class_names)
        lines += [of | row | near | far for row, near, far in zip(rows, nearest, across, strict=True)]
    path = folder / f"{DUPLICATES}_{threshold:g}.csv"
    _write(path, lines)
    drawn = [_tiles(group, places, found, pixels) for group in groups[:SHOWN_ROWS]]
    title = f"Near-duplicates, cosine similarity of {threshold:g} and more: {_counted(groups)}"
    image_rows(title, drawn, path.with_name(path.name.removesuffix(".csv")))
    return path


def _others(name: str, places: pa.Table, index: np.ndarray, similarity: np.ndarray) -> list[dict[str, Any]]:
    """Columns about another image of each row; empty where it has none."""
    keys, columns = [f"{name}_{key}" for key in (SPLIT, "row", "similarity")], []
    for other, row, cosine in zip(index, _rows(places, np.maximum(index, 0), []), similarity, strict=True):
        values = (row[SPLIT], row["row"], f"{cosine:.6f}") if other >= 0 else ("", "", "")
        columns.append(dict(zip(keys, values, strict=True)))
    return columns


def _tiles(group: np.ndarray, places: pa.Table, found: Duplicates, pixels: Pixels) -> list[Tile]:
    """The closest images of a group, and first the closest pair between splits, if there is one; its second split is marked."""
    order, pair = group[np.argsort(-found.similarity[group], kind="stable")], []
    if found.between(group):
        one = group[found.across_similarity[group].argmax()]
        pair = sorted((one, found.across[one]))
        order = np.array([*pair, *(row for row in order if row not in pair)])
    order, tiles = order[: NEIGHBOURS + 1], []
    for number, row in zip(order, _rows(places, order, []), strict=True):
        if (image := pixels(row[SPLIT], row["row"])) is not None:
            cosine = (found.across_similarity if number in pair else found.similarity)[number]
            colour = INK if found.split[number] == found.split[order[0]] else VERMILION
            tiles.append(Tile(image, f"{row[SPLIT]} {row['row']}", f"{cosine:.3f}", colour))
    return tiles


def _counted(groups: list[np.ndarray]) -> str:
    return f"{len(groups):,} group{'' if len(groups) == 1 else 's'}"


def summary(found: Duplicates, groups: list[np.ndarray], threshold: float, splits: list[str]) -> list[str]:
    """How many near-duplicates there are in each split, between each two, and whether the threshold tells images apart."""
    if not groups:
        return [f"No near-duplicates: no two images have a cosine similarity of {threshold:g}."]
    images, between = sum(map(len, groups)), sum(map(found.between, groups))
    lines = [f"{_counted(groups)} of {images:,} images, {between:,} of them between splits"]
    for here, split in enumerate(splits):
        for there, other in enumerate(splits):
            of = found.split == here
            if count := int(found.meets[of, there].sum()):
                where = "within it" if here == there else f"in {other}"
                lines.append(f"{split}: {count:,} of {int(of.sum()):,} images have a near-duplicate {where}")
    if (largest := max(map(len, groups))) > max(100, len(found.group) // 100):
        lines.append(
            f"warning: one group has {largest:,} images: this encoder tells them apart by less than the threshold allows. "
            "Raise --duplicates"
        )
    return lines
