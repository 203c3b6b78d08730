"""Labels of a folder of images from its `metadata.csv`, `metadata.jsonl` or `metadata.parquet`, as on the Hub."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from ..errors import one_line
from .folders import METADATA, FolderOfImages, check_data_file

READERS = {".csv": pyarrow.csv.read_csv, ".jsonl": pyarrow.json.read_json, ".parquet": pq.read_table}
FILE_NAME = "file_name"  # path of an image, relative to the metadata's own folder


def use_metadata(folder: FolderOfImages, column: str) -> dict[str, Any] | None:
    """Labels by the path of an image. Images that are not listed leave the folder's splits and are counted.

    Args:
        folder: changed in place.
        column: of the labels.

    Returns:
        strings or integers by path; None where no metadata has that column.

    Raises:
        ValueError: the metadata cannot be read, lists no image, or one that is not there.
    """
    labels: dict[str, Any] = {}
    found = False
    for place in (
        "",
        *sorted({file.parts[0] for files in folder.splits.values() for file in files if len(file.parts) > 1}),
    ):
        for path in (folder.root / place / name for name in METADATA):
            if path.is_file() and (columns := _read(path, column)) is not None:
                found = True
                names = (f"{place}/{name}".removeprefix("/") for name in columns[FILE_NAME])
                labels |= dict(zip(names, columns[column], strict=True))
    if not found:
        return None
    if not labels:
        raise ValueError(
            f"metadata of {folder.root} lists no image: add a line for each, or remove it to take the classes from folders"
        )
    missing = labels.keys() - {file.path for files in folder.splits.values() for file in files}
    if missing:
        raise ValueError(
            f"metadata of {folder.root} lists {min(missing)}, which is no image there ({len(missing):,} in all): remove these "
            "lines, or add the images"
        )
    for split, files in folder.splits.items():
        folder.splits[split] = [file for file in files if file.path in labels]
        folder.left_out["not listed in the metadata"] += len(files) - len(folder.splits[split])
    return labels


def _read(path: Path, column: str) -> dict[str, list[Any]] | None:
    """The columns of a metadata file that are used; None where it has no labels."""
    try:
        if path.suffix == ".parquet":
            check_data_file(path)
        table = READERS[path.suffix](path)
        columns = table.column_names
        used = {name: table[name].to_pylist() for name in (FILE_NAME, column) if name in columns}
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} cannot be read ({one_line(error)}): mend it, or remove it to take the classes from folders"
        ) from error
    if column not in used:
        return None
    if FILE_NAME not in used:
        raise ValueError(f"{path} has no column {FILE_NAME!r}, only {', '.join(columns)}: rename the one with paths")
    return used
