"""Open a dataset by its name: the built-in digits, a local folder or file, or a dataset on the Hub."""

import glob
import hashlib
import os
import re
import shlex
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilderConfig
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.table import MemoryMappedTable
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from tqdm import tqdm

from modeling_moco.distributed_moco import rank

from ..cli import how_to_run
from ..engine.checkpoints import decided_by_main
from ..engine.files import read_json, whole_file, write_json
from ..engine.run_folder import DIGITS, PREPARED
from ..errors import DataError, one_line, shown
from .folders import (
    HOW,
    NEEDS,
    FolderOfImages,
    FoundFile,
    arrange,
    check_data_file,
    digests_of_some,
    divide_data_files,
    has_rows,
    list_files,
    metadata_of,
    refuse_missing_shards,
    use_metadata,
    visible,
)
from .hub import commit_on_the_hub, wait_for_the_hub

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
FILES_AT_A_TIME = 16  # to check
ROWS_PER_SHARD = 1000  # of a folder of images that is read as a stream
ODD_BYTES = ("fixed_size_binary", "binary_view")  # types of Arrow
OF_SAVED = ("dataset_dict.json", "state.json")  # files of `save_to_disk`, of several splits and of one
TABLES = (".csv", ".jsonl", ".json")
SOME_CLASSES = 5  # that are named
STREAMED_SHARDS = 4  # of a dataset that has no files
ON_THE_HUB = re.compile(r"hf://datasets/(?P<repo_id>[^@]+)@(?P<revision>[0-9a-f]{40})/(?P<filename>.+)")
COMMIT = "commit "  # and its digest: what identifies the rows of a dataset on the Hub


@dataclass
class Opened:
    """Splits of a dataset with its own column names.

    Args:
        splits: a `datasets.Dataset`, or with `--streaming` an `IterableDataset`, by name.
        files: data files of each split, where it has some.
        lengths: rows of each shard of a split that is streamed, where they are known.
        content: what identifies the rows of each split: number and digest of local files, with their labels, or the commit on
            the Hub.
        from_folders: whether the classes are names of folders.
        account: of the files of a folder, or of the commit on the Hub, in words.
        places: see `Decoder`.
    """

    splits: dict[str, Any]
    files: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)
    from_folders: bool = False
    account: str | None = None
    places: tuple[str, ...] = ()


def absolute_name(name: str) -> str:
    """The absolute path of a folder or file here; other names, which are built in or on the Hub, as they are.

    Raises:
        ValueError: the name is empty.
    """
    if not name:
        raise ValueError(
            "dataset_name ('') is empty: pass a folder, a file, or the name of a Hub dataset; this folder is ."
        )
    path = Path(os.path.expanduser(name))  # a shell leaves the ~ of --dataset_name=~/photos as it is
    return str(path.resolve()) if name != DIGITS and path.exists() else name


def open_dataset(
    name: str,
    config: str | None = None,
    *,
    streaming: bool,
    train_split: str,
    asked: set[str],
    label_column: str,
    commit: str | None = None,
) -> Opened:
    """Open a dataset.

    Args:
        name: `digits`, the absolute path of a folder or file, or a dataset on the Hub.
        config: configuration of a Hub dataset.
        streaming: whether to read shards in sequence.
        train_split: name of the split that a single file becomes.
        asked: names of splits that the user gave.
        label_column: of the metadata of a folder of images.
        commit: of a dataset on the Hub, the one to read; by default the newest.

    Raises:
        ValueError: it does not exist, or cannot be read, with the reason and a remedy.
    """
    if name == DIGITS:
        digits: dict[str, Any] = dict(load_digits())
        if streaming:
            digits = {split: _as_stream(rows) for split, rows in digits.items()}
        return Opened(digits)
    path = Path(name)
    if path.is_dir() and config is None:
        return _open_folder(path, streaming, asked, label_column)
    if path.is_file():
        return _open_file(path, streaming, train_split)
    if not path.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise ValueError(
            f"dataset_name ({name}) does not exist: pass a folder, a parquet or tar file, or a Hub dataset"
        )
    return _open_on_the_hub(name, config, streaming, commit)


# A dataset on the Hub


def _open_on_the_hub(name: str, config: str | None, streaming: bool, pinned: str | None) -> Opened:
    # All processes read one commit, also where another one is pushed meanwhile.
    commit = pinned or decided_by_main(lambda: commit_on_the_hub(name))
    with _one_line_of(name if pinned is None else f"{name}, {COMMIT}{pinned} that the run was begun with"):
        builder = datasets.load_dataset_builder(name, config, revision=commit)
    files = builder.config.data_files or {}  # empty where it comes from the cache
    if streaming:
        wait_for_the_hub()
    decided_by_main(lambda: _check_files_on_the_hub(builder, name, streaming))
    opened = _read(builder, name, streaming)
    if not streaming:
        opened = replace(opened, files={split: _in_the_cache(urls) for split, urls in opened.files.items()})
    read = f"{COMMIT}{builder.hash}"  # of the cache, where the Hub is not reached
    places = _places_on_the_hub(files) if isinstance(builder, ImageFolder) else ()
    account = f"{read}, {'with which the run was begun' if pinned else 'the newest'}"
    return replace(opened, content=dict.fromkeys(opened.splits, read), places=places, account=account)


def _read(builder: datasets.DatasetBuilder, name: str, streaming: bool) -> Opened:
    if isinstance(builder.config, FolderBasedBuilderConfig):
        # Or a folder on the Hub streams decoded images, by another decoder than ours.
        builder.config.decode_num_threads = 0
    with _one_line_of(name):
        if not streaming:
            builder.download_and_prepare()
        splits = builder.as_streaming_dataset() if streaming else builder.as_dataset()
    return Opened(splits, builder.config.data_files or {})


@contextmanager
def _one_line_of(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, DatasetGenerationError, tarfile.ReadError, DataError) as error:
        reason = error.__cause__ or error  # `datasets` wraps what went wrong in a sentence that does not say it
        raise ValueError(
            f"dataset_name ({name}) cannot be opened as a folder, a file of images or a Hub dataset ({reason}): check the "
            "name, its files and its splits"
        ) from error


def _check_files_on_the_hub(builder: datasets.DatasetBuilder, name: str, streaming: bool) -> None:
    """Look at the data files of a repository before `datasets` reads them.

    Raises:
        ValueError: one is damaged, or unpacks to far more than images do.
    """
    addresses = [address for split in (builder.config.data_files or {}).values() for address in split]
    if not streaming and Path(builder.cache_dir).is_dir():
        return  # read before
    if not streaming:  # to where `download_and_prepare` finds them
        with _one_line_of(name):
            addresses = datasets.DownloadManager(record_checksums=False).download(addresses)
    _look_once(_digest(addresses), addresses, identify=False)  # its commit identifies it


def _in_the_cache(urls: list[str]) -> list[str]:
    """Where files of the Hub lie that were downloaded. Their rows may be kept elsewhere without them."""
    places = [ON_THE_HUB.fullmatch(url) for url in urls]
    found = [try_to_load_from_cache(**place.groupdict(), repo_type="dataset") for place in places if place]
    return [path for path in found if isinstance(path, str)]


def _places_on_the_hub(files: dict[str, list[str]]) -> tuple[str, ...]:
    """Where the files of a folder of images on the Hub lie: in its repository, or in the caches."""
    repositories = {f"{url.split('@')[0]}@" for urls in files.values() for url in urls if url.startswith("hf://")}
    return (*repositories, f"{HF_HUB_CACHE}/", f"{datasets.config.HF_DATASETS_CACHE}/")


# A folder of images, or of data files


def _open_folder(root: Path, streaming: bool, asked: set[str], label_column: str) -> Opened:
    if any((root / name).is_file() for name in OF_SAVED):
        return _open_saved(root, streaming)
    found = decided_by_main(lambda: _look_into(root, asked, label_column))
    if not isinstance(found, _Index):
        return _open_data_files(root, found, streaming)
    if not all(Path(file).is_file() for file in found.rows.values()):  # written on another machine
        found = _look_into(root, asked, label_column)
        assert isinstance(found, _Index)
    splits: dict[str, Any] = {}
    lengths = {}
    for split, file in found.rows.items():
        table = MemoryMappedTable.from_file(file)
        rows = datasets.Dataset(table, fingerprint=Path(file).stem)
        if streaming:
            shards = max(1, len(rows) // ROWS_PER_SHARD)
            lengths[split] = [len(rows) // shards + (shard < len(rows) % shards) for shard in range(shards)]
            rows = rows.to_iterable_dataset(num_shards=shards)
        splits[split] = rows
    return Opened(
        splits,
        lengths=lengths,
        content=found.content,
        from_folders=True,
        account=found.account,
        places=(f"{root}/".replace("//", "/"),),
    )


@dataclass
class _Index:
    """Where the rows of a folder's splits are kept.

    Args:
        rows: Arrow file of each split.
        content: of each split number of the images, digest of their names, sizes and parts of some, and that of their metadata.
        account: of the folder's files, in words.
    """

    rows: dict[str, str]
    content: dict[str, str]
    account: str


def _look_into(root: Path, asked: set[str], label_column: str) -> _Index | dict[str, list[FoundFile]]:
    """The index of a folder of images, or the data files of each split of another folder."""
    _refuse_unfinished(root)
    files = list_files(root, quiet=rank() > 0)
    folder = arrange(root, files, asked)
    data_files = [
        file for file in visible(files) if file.extension in BUILDERS and not file.path.endswith("metadata.parquet")
    ]
    images = sum(file.size for split in folder.splits.values() for file in split)
    if sum(file.size for file in data_files) > images:  # a README's pictures beside them are no dataset
        splits = divide_data_files(root, data_files)
        refuse_missing_shards(root, data_files)
        return splits
    if images == 0:
        raise ValueError(_no_images(root, folder))
    return _write_index(folder, *_labels(folder, label_column))


def _refuse_unfinished(root: Path) -> None:
    """
    Raises:
        ValueError: the folder is that of a prepared dataset, some files of which are still to be written; or the one of its
            files, which does not say whether they are all there.
    """
    if root.name == "data" and _prepared(root.parent) is not None:
        raise ValueError(f"{root} has the files of a prepared dataset, without their record: pass {root.parent}")
    record = _prepared(root)
    if record is None:
        return
    files = record.get("files")  # which are written last
    if not isinstance(files, dict) or not all((root / "data" / name).is_file() for name in files):
        raise ValueError(
            f"{root} is a prepared dataset that is not finished: give the command again that began it "
            f"({how_to_run('prepare')} SOURCE {shlex.quote(str(root))}, with its flags)"
        )


def _prepared(folder: Path) -> dict[str, Any] | None:
    """The record of a prepared dataset; None for another folder."""
    if not (folder / PREPARED).is_file():
        return None
    record = read_json(folder / PREPARED, "bring it back")
    return record if isinstance(record, dict) and "images_per_shard" in record else None


def _no_images(root: Path, folder: FolderOfImages) -> str:
    if not folder.left_out:
        return f"dataset_name ({root}) is an empty folder: pass one with images as in {HOW}"
    saved = [path.parent for name in OF_SAVED for path in sorted(root.rglob(name))]
    if saved:
        return f"dataset_name ({root}) has a dataset of `save_to_disk` inside it: pass {saved[0]}"
    tables = [extension for extension in TABLES if any(root.rglob(f"*{extension}"))]
    remedy = f"pass a folder as in {HOW}, or one with parquet or tar files"
    if tables:
        remedy += f"; {_as_metadata(tables[0])}"
    return f"dataset_name ({root}) has {folder.account()}: {remedy}"


def _as_metadata(extension: str) -> str:
    name = "metadata.csv" if extension == ".csv" else "metadata.jsonl"
    return (
        f"a list of images must be called {name}, lie beside them in the folder that is passed, and have the columns "
        "file_name and label"
    )


def _write_index(folder: FolderOfImages, column: str, feature: Any, labels: dict[str, list[Any]]) -> _Index:
    """Write the rows of all splits to files in the cache of `datasets`, which processes and workers share."""
    features = datasets.Features({"image": datasets.Image(decode=False)} | ({column: feature} if feature else {}))
    place = Path(datasets.config.HF_DATASETS_CACHE) / "folders_of_images" / _digest([folder.root])
    place.mkdir(parents=True, exist_ok=True)
    rows, content = {}, {}
    for split, files in folder.splits.items():
        state = _digest(
            [column, feature, *((f.path, f.size, f.stamp, y) for f, y in zip(files, labels[split], strict=True))]
        )
        parts = _once(place / f"{state}.json", partial(digests_of_some, folder.root, files))
        content[split] = (
            f"{len(files):,} images {_digest([*((f.path, f.size) for f in files), *parts])}{_metadata(folder, files)}"
        )
        rows[split] = str(place / f"{state}.arrow")
        if not Path(rows[split]).is_file():
            _write_rows(Path(rows[split]), folder.root, files, labels[split], features)
    return _Index(rows, content, folder.account() + _classes_in_words(feature))


def _classes_in_words(feature: Any) -> str:
    """So that somebody sees what is no class, such as images_001; empty for numbers, or without labels."""
    if not isinstance(feature, datasets.ClassLabel):
        return ""
    few = ", ".join(shown(name) for name in feature.names[:SOME_CLASSES])
    more = ", ..." if len(feature.names) > SOME_CLASSES else ""
    return f"; {len(feature.names):,} class{'es' if len(feature.names) > 1 else ''}: {few}{more}"


def _metadata(folder: FolderOfImages, files: list[FoundFile]) -> str:
    """The digest of the metadata files of these images, in words; empty without any."""
    found = []
    for place, path in metadata_of(folder, files):
        with path.open("rb") as file:
            found.append((place, path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return f" with metadata {_digest(found)}" if found else ""


def _labels(folder: FolderOfImages, asked: str) -> tuple[str, Any, dict[str, list[Any]]]:
    """The column of the labels, its feature, None without any, and the labels of each split.

    Args:
        asked: the column of the metadata. Where it has none of this name, folders are classes, in the column `label`.
    """
    listed = use_metadata(folder, asked)
    column = "label" if listed is None else asked
    labels: dict[str, list[Any]] = {}
    for split, files in folder.splits.items():
        labels[split] = [folder.class_of(file) if listed is None else listed.get(file.path) for file in files]
    kinds = {type(label) for values in labels.values() for label in values} - {type(None)}
    if not kinds:
        return column, None, labels
    if kinds == {int}:
        return column, datasets.Value("int64"), labels
    if kinds != {str}:
        held = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"column {column!r} of {folder.root}'s metadata holds {held}: write class names, or class numbers from 0"
        )
    names = sorted({label for values in labels.values() for label in values if label is not None})
    _refuse_twins(folder.root, names)
    numbers = {name: number for number, name in enumerate(names)}
    numbered = {split: [None if y is None else numbers[y] for y in values] for split, values in labels.items()}
    return column, datasets.ClassLabel(names=names), numbered


def _refuse_twins(root: Path, names: list[str]) -> None:
    # A name with an accent has other letters on a Mac than elsewhere, which look the same.
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(normalize("NFC", name).strip(), name)
        if other != name:
            raise ValueError(f"{root} has classes {other!a} and {name!a}, which look alike: give them one name")


def _write_rows(
    path: Path, root: Path, files: list[FoundFile], labels: list[int | None], features: datasets.Features
) -> None:
    schema = features.arrow_schema
    paths = pa.array([f"{root}/{file.path}" for file in files], pa.string())
    images = pa.StructArray.from_arrays([pa.nulls(len(files), pa.binary()), paths], names=["bytes", "path"])
    columns: list[pa.Array] = [images]
    if len(features) > 1:
        columns.append(pa.array(labels, pa.int64()))
    table = pa.table([column.cast(kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema)
    with (
        whole_file(path) as unfinished,
        pa.OSFile(str(unfinished), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        writer.write_table(table, max_chunksize=ROWS_PER_SHARD)


def _digest(items: Iterable[Any]) -> str:
    state = hashlib.sha256()
    for item in items:
        state.update(f"{item}\n".encode(errors="surrogateescape"))
    return state.hexdigest()[:16]


def _open_data_files(root: Path, splits: dict[str, list[FoundFile]], streaming: bool) -> Opened:
    kinds = {file.extension for files in splits.values() for file in files}
    if len(kinds) > 1:
        raise ValueError(f"dataset_name ({root}) has {' and '.join(sorted(kinds))} files: pass a folder with one kind")
    state = _digest((f.path, f.size, f.stamp) for files in splits.values() for f in files)
    paths = [root / file.path for files in splits.values() for file in files]
    digests = dict(zip(paths, decided_by_main(lambda: _look_once(_digest([root, state]), paths)), strict=True))
    # `datasets` fails at a file without rows.
    splits = {split: [f for f in files if digests[root / f.path]] or files for split, files in splits.items()}
    content = {
        split: f"{len(files):,} files {_digest((f.path, f.size, digests[root / f.path]) for f in files)}"
        for split, files in splits.items()
    }
    # The paths are patterns to `datasets`, and its cache goes by a file's time alone: names are escaped, and the name of the
    # configuration has what else may change.
    names = {split: [glob.escape(f"{root}/{file.path}") for file in files] for split, files in splits.items()}
    (kind,) = kinds
    with _one_line_of(str(root)):
        features = _with_plain_bytes(root / next(iter(splits.values()))[0].path) if kind == ".parquet" else None
        builder = datasets.load_dataset_builder(
            BUILDERS[kind], name=f"state_{state}", data_files=names, features=features
        )
    return replace(_read(builder, str(root), streaming), content=content)


def image_columns(features: datasets.Features) -> list[str]:
    """The columns of images; without any, those of bytes, {bytes} or {bytes, path}, as pandas and polars write images."""
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return images or [name for name, feature in features.items() if _holds_bytes(feature, ("binary", "large_binary"))]


def _holds_bytes(feature: Any, kinds: tuple[str, ...]) -> bool:
    if isinstance(feature, dict):
        return {"bytes"} <= set(feature) <= {"bytes", "path"} and _holds_bytes(feature["bytes"], (*kinds, *ODD_BYTES))
    return isinstance(feature, datasets.Value) and feature.dtype.split("[")[0] in kinds


def _with_plain_bytes(file: Path) -> datasets.Features | None:
    """The columns of a parquet file, where its only bytes are of a kind that `datasets` makes no images of."""
    features = datasets.Features.from_arrow_schema(pq.read_schema(file))
    odd = [] if image_columns(features) else [name for name, x in features.items() if _holds_bytes(x, ODD_BYTES)]
    return datasets.Features(features | dict.fromkeys(odd, datasets.Value("binary"))) if odd else None


def _look_once(state: str, files: Sequence[str | Path], identify: bool = True) -> list[str]:
    """Check data files (`check_data_file`), and what tells each from others of its size; nothing for one without rows.

    Args:
        state: identifies the files and when they were changed.
    """
    # The members of large tars take a minute, and each request to the Hub a while.
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "files_looked_at" / f"{state}.json"
    return _once(kept, partial(_look, files, identify))


def _once(kept: Path, make: Callable[[], list[str]]) -> list[str]:
    """What was made before and kept in this file, or is made and kept now."""
    if kept.is_file():
        found: list[str] = read_json(kept, "delete it")
        return found
    made = make()
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, made)
    return made


def _look(files: Sequence[str | Path], identify: bool) -> list[str]:
    with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        looked_at = pool.map(partial(_look_at_data_file, identify=identify), files)
        return list(
            tqdm(looked_at, "checking", len(files), unit=" files", disable=None, leave=False, dynamic_ncols=True)
        )


def _look_at_data_file(file: str | Path, identify: bool) -> str:
    digest = hashlib.sha256()
    check_data_file(file, digest if identify else None)
    return digest.hexdigest() if not identify or has_rows(file) else ""


def _open_file(path: Path, streaming: bool, split: str) -> Opened:
    if path.suffix.lower() not in BUILDERS:
        remedy = NEEDS.get(path.suffix.lower(), "pass the folder that contains it")
        if path.suffix.lower() in TABLES:
            remedy = _as_metadata(path.suffix.lower())
        raise ValueError(f"dataset_name ({path}) is a file, but neither .parquet nor .tar: {remedy}")
    stat = path.stat()
    file = FoundFile(path.name, stat.st_size, stat.st_ino, max(stat.st_mtime_ns, stat.st_ctime_ns))
    return _open_data_files(path.parent, {split: [file]}, streaming)


def _open_saved(root: Path, streaming: bool) -> Opened:
    """A folder that `save_to_disk` of `datasets` has written."""
    try:
        saved = datasets.load_from_disk(str(root))
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(
            f"dataset_name ({root}) is not what `save_to_disk` of `datasets` writes ({one_line(error)}): save it again, or "
            "remove its dataset_dict.json and state.json where they are of something else"
        ) from error
    splits: dict[str, Any] = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    content = {split: f"{len(rows):,} rows {rows._fingerprint}" for split, rows in splits.items()}
    # A format that was saved with the rows would make other things of them, or hide columns.
    splits = {split: rows.with_format(None) for split, rows in splits.items()}
    if streaming:
        splits = {split: _as_stream(rows) for split, rows in splits.items()}
    return Opened(splits, content=content)


def _as_stream(rows: datasets.Dataset) -> datasets.IterableDataset:
    return rows.to_iterable_dataset(num_shards=min(STREAMED_SHARDS, max(1, len(rows))))


def load_digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits at 32 px: 1,437 for training and 360 for testing, stratified by class."""
    from sklearn.datasets import load_digits as load_sklearn_digits
    from sklearn.model_selection import train_test_split

    source = load_sklearn_digits()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    rows = train_test_split(
        np.arange(len(source.target)), test_size=360, random_state=0, stratify=source.target, shuffle=True
    )
    splits = {}
    for name, indices in zip(("train", "test"), rows, strict=True):
        images = [
            Image.fromarray((source.images[i] * (255 / 16)).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
            for i in indices
        ]
        labels = source.target[indices].tolist()
        splits[name] = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    return datasets.DatasetDict(splits)
