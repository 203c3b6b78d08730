"""Files in folders that others may have made: written under fresh names, and read where they lie alone.

Such a folder may have links with the names of our files, so that what is written would land elsewhere, or what lies elsewhere
would be shown and published. A folder that the user names may be a link itself.
"""

import json
import os
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from ..errors import one_line

UNFINISHED = ".unfinished."  # begins the names of folders that are left by a process that was killed
PACKED = 2**26  # bytes that an archive may unpack to beyond its size: torch packs nothing but the code of TorchScript
# torch.load raises these for truncated or changed files, and for files of another kind.
UNREADABLE = (
    *(pickle.UnpicklingError, struct.error, EOFError, RuntimeError, LookupError, ValueError, TypeError),
    *(AttributeError, AssertionError, MemoryError, OverflowError, SafetensorError),
)
OF_MODELS = ("*.json", "*.safetensors")  # files of a folder that a model is loaded from


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A fresh folder in `folder`, whose files take their places in `folder` at the end; after an error none does.

    A reader sees an old file or the new one. A link with the name of one is replaced, and what it points to stays.
    """
    with TemporaryDirectory(prefix=UNFINISHED, dir=folder) as name:
        yield Path(name)
        for path in Path(name).iterdir():
            path.replace(folder / path.name)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end, as by `whole_files`."""
    try:
        with whole_files(path.parent) as fresh:
            yield fresh / path.name
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error  # which names the file


def write_whole(path: Path, text: str, durable: bool = False) -> None:
    """Write a text file that is there with all its content, or as it was before.

    Args:
        durable: wait until the disk has it, so that it outlives a loss of power.
    """
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, content: Any, durable: bool = False) -> None:
    """`write_whole` for content that JSON knows."""
    write_whole(path, json.dumps(content, indent=2) + "\n", durable)


def below(folder: Path, name: str) -> Path:
    """The path of a folder of ours in another one, which may not be there yet.

    Raises:
        ValueError: it is a link.
    """
    path = folder / name
    if path.is_symlink():
        raise ValueError(f"{one_line(path)} is a link, and is not written to: move it away, or name another output")
    return path


def leads_out(path: Path, folder: Path | None = None) -> bool:
    """Whether what has a name in a folder lies elsewhere, by links or by `..`.

    In a snapshot of the Hub's cache files are links into the rest of their repository, which do not lead out.

    Args:
        folder: by default the one that `path` is directly in.
    """
    home = Path(os.path.realpath(folder or path.parent))
    snapshots = [place for place in (home, *home.parents) if place.parent.name == "snapshots"]
    ours = ("models--", "datasets--")
    home = next((place.parents[1] for place in snapshots if place.parents[1].name.startswith(ours)), home)
    try:
        return not Path(os.path.realpath(path)).is_relative_to(home)
    except ValueError:  # no file can have this name
        return True


def inside(path: Path, folder: Path | None = None) -> Path:
    """The same path.

    Args:
        folder: as of `leads_out`.

    Raises:
        ValueError: it leads out.
    """
    if leads_out(path, folder):
        raise ValueError(f"{one_line(path)} leads out of {one_line(folder or path.parent)}: put the file itself there")
    return path


def check_model_files(folder: Path) -> None:
    """
    Args:
        folder: nothing is looked at where there is none, as for the name of a repository on the Hub, whose client keeps a
            repository's files in its own folder.

    Raises:
        ValueError: a file that a model in this folder would be loaded from is not in it, or cannot be read.
    """
    if not os.path.isdir(folder):  # a Path of too long a name would raise
        return
    for path in (path for pattern in OF_MODELS for path in folder.glob(pattern)):
        inside(path)
    for index in folder.glob("*.index.json"):
        weights = read_object(index, "bring it back, or pass another model").get("weight_map")
        for name in set(weights.values()) if isinstance(weights, dict) else ():
            inside(folder / str(name), folder)
    if (config := folder / CONFIG_NAME).is_file():
        content = read_object(config, "bring it back, or pass another model")
        for section in (content, content.get("moco")):  # of our own format, and of a published one
            if isinstance(section, dict) and section.get("transformers_weights"):
                inside(folder / str(section["transformers_weights"]), folder)


def read_json(path: Path, remedy: str, what: str = "JSON") -> Any:
    """The content of a JSON file.

    Args:
        remedy: what to do about a file that is none.
        what: the file is to be.

    Raises:
        ValueError: it is none, or leads out of its folder.
    """
    inside(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not {what} ({one_line(error)}): {remedy}") from error


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The names and values of a JSON file.

    Raises:
        ValueError: it has none.
    """
    content = read_json(path, remedy)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not JSON of names and values: {remedy}")
    return content


def check_archive(path: Path) -> None:
    """Look at what an archive of torch unpacks to, before memory is taken. Files of other kinds are passed over.

    Raises:
        ValueError: it is damaged, or unpacks to far more than its own size.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    size = path.stat().st_size
    try:
        with ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (BadZipFile, *UNREADABLE) as error:
        raise ValueError(
            f"{path} ({size:,} bytes) is not a torch checkpoint, or is damaged: download or copy it again"
        ) from error
    if unpacked > size + PACKED:
        raise ValueError(
            f"{path} ({size:,} bytes) is damaged: it unpacks to {unpacked:,} bytes, which no checkpoint does. Get it from "
            "another place"
        )
