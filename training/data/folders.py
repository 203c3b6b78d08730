"""Walk a local folder of images: the split is the first folder below it, the class the first folder below the split.

`datasets` guesses splits and classes from words anywhere in a path, takes the last folder as the class, and follows no
links. Here a name means something at its own place only, deeper folders belong to their class, and every file is counted.
"""

import hashlib
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from errno import ELOOP, ENOENT, ENOTDIR
from functools import partial
from os.path import splitext
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile, ZipFile

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from datasets.utils.file_utils import xopen
from tqdm import tqdm

from ..errors import one_line, shown
from .decode import EXTENSIONS, is_an_image

SPLITS = {"training": "train", "testing": "test"} | {
    name: name for name in ("train", "test", "validation", "valid", "val", "dev", "eval", "unlabeled", "unlabelled")
}
LIKE_A_SPLIT = re.compile(rf"({'|'.join(sorted(SPLITS, key=len, reverse=True))})([^a-z].*)?")  # train2017, test_images
WORD_OF_A_SPLIT = re.compile("|".join(sorted(SPLITS, key=len, reverse=True)))
HUB_LAYOUT = re.compile(r"(\w+)-\d{5}-of-\d{5}\.parquet")  # in a folder `data`, as `datasets` writes and reads splits
# Of several files that say how many they are; older ones of the Hub end in a digest.
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})(-[0-9a-f]{16})?\.(parquet|tar)")
DATA_FILES = (".parquet", ".tar", ".arrow")  # whole datasets
TEXT_FILES = (".csv", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".npy", ".py", ".txt", ".xml", ".yaml", ".yml")
NEEDS = {".heic": "pip install pillow-heif", ".heif": "pip install pillow-heif"}
NEEDS |= dict.fromkeys((".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"), "unpack it and pass the folder")
NEEDS |= {".npz": "write its images to files of their own, or to parquet with `datasets`"}
NEEDS |= dict.fromkeys(
    # TIFF files within, of which PIL would take the thumbnail.
    (".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw"),
    "raw files of cameras: develop them to JPEG or TIFF",
)
SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}
# Thumbnails, deleted files and what else a system keeps beside those of its users.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"  # path of an image, relative to the metadata's own folder
NAMES_AS_TEXT = pyarrow.csv.ConvertOptions(column_types={FILE_NAME: pa.string()})  # 000123 is a name and no number
READERS = {
    ".csv": partial(pyarrow.csv.read_csv, convert_options=NAMES_AS_TEXT),
    ".jsonl": pyarrow.json.read_json,
    ".parquet": pq.read_table,
}
OF_IMAGES = {"image", "images", "img", "imgs", "jpegimages"}
OF_MASKS = {"annotations", "ground_truth", "gt", "labels", "mask", "masks", "segmentation", "segmentations", "trimaps"}
OF_MASKS |= {"segmentationclass", "segmentationobject"}
# What begins the name of a folder of masks, or of pictures of annotations: SegmentationClassPNG
BEGINS_MASKS = ("segmentationclass", "segmentationobject", "annotations", "visualization")
MASK_BESIDE = re.compile(  # its image, without extension: cat_mask.png, cat_mask_1.png
    r"(.+?)[ _-](masks?|seg|segmentation|gt|ground_?truth|superpixels)([ _-]?\d+)?", re.IGNORECASE
)
SCANNERS = 16  # threads that list folders: a network file system answers each request after a while
NO_FILE = -2  # as a size
NOWHERE = (ENOENT, ENOTDIR, ELOOP)  # what a link is answered with that leads to no file
MOST_UNPACKED = 10  # times the size of a file of images, which are compressed already: what unpacks to more is a trap
FOOTER_END = 8  # bytes behind a footer of parquet
PIECE = 2**20  # bytes that are read at once
LITTLE = 2**28  # bytes that any file may unpack to
LOOKED_INTO = 512  # images of a split
OF_AN_IMAGE, OF_A_DATA_FILE = 2**16, 2**20  # bytes that are looked at
PARTS = 16  # of a file with more
FEW_ROWS = 100_000  # that any file may have
LEAST_ROW = 16  # bytes of a file for each of more rows: no image takes less
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".npz", ".pth")  # members of a tar that `datasets` unpacks, to any size
HOW = "FOLDER/train/CLASS and FOLDER/test/CLASS"


class FoundFile(NamedTuple):
    """A file below a folder.

    Args:
        path: relative to the folder, with `/`.
        size: bytes; -1 where a link leads nowhere; `NO_FILE` for a pipe, a socket or a device, which may have no end.
        inode: one number for all names of one file.
        stamp: nanoseconds; the last change of content or name.
    """

    path: str
    size: int
    inode: int
    stamp: int

    @property
    def parts(self) -> list[str]:
        """The names of the folders on the way, then the file's own."""
        return self.path.split("/")

    @property
    def extension(self) -> str:
        return splitext(self.path)[1].lower()


@dataclass
class FolderOfImages:
    """The images of a folder.

    Args:
        root: absolute path.
        splits: images by split, in the order of their paths.
        class_level: 1 where the first folder is the split, 0 where it is the class and there is one split.
        left_out: number of other files, by reason.
        metadata: paths of metadata files below the root, in the order in which they are read.
    """

    root: Path
    splits: dict[str, list[FoundFile]]
    class_level: int
    left_out: Counter[str]
    metadata: list[str]

    def class_of(self, file: FoundFile) -> str | None:
        """The first folder below the split; None for an image that lies beside the class folders."""
        parts = file.parts
        return parts[self.class_level] if len(parts) > self.class_level + 1 else None

    def account(self) -> str:
        """How many of the files are images, and why the others are not."""
        images = sum(map(len, self.splits.values()))
        total = images + self.left_out.total()
        text = f"{images:,} images of {total:,} files"
        if self.left_out:
            text += ": " + ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())
        if self.class_level == 1:
            text += "; splits " + ", ".join(f"{name} ({len(files):,})" for name, files in self.splits.items())
        if any(len(file.parts) > self.class_level + 2 for files in self.splits.values() for file in files):
            text += "; deeper folders belong to their class"
        return text


def list_files(root: Path, quiet: bool = True) -> list[FoundFile]:
    """All files below a folder, sorted by path. Links are followed.

    Raises:
        ValueError: a link leads back to a folder that contains it, or a folder cannot be listed.
    """
    found: list[FoundFile] = []
    level: list[tuple[str, tuple[int, ...]]] = [("", (_inode(root.stat()),))]
    bar = tqdm(desc="files", unit="", delay=2, disable=quiet or None, dynamic_ncols=True)
    with bar, ThreadPoolExecutor(SCANNERS) as pool:
        while level:
            below = []
            for files, folders in pool.map(partial(_list, root), level):
                found += files
                below += folders
                bar.update(len(files))
            level = below
    return sorted(found)


def _list(root: Path, folder: tuple[str, tuple[int, ...]]) -> tuple[list[FoundFile], list[tuple[str, tuple[int, ...]]]]:
    relative, above = folder  # the inodes of the folders on the way, to which no link may lead back
    files, folders = [], []
    try:
        with os.scandir(root / relative) as entries:
            for entry in entries:
                path = f"{relative}/{entry.name}".removeprefix("/")
                try:
                    stat = entry.stat()
                except OSError as error:
                    if error.errno not in NOWHERE:
                        raise
                    files.append(FoundFile(path, -1, 0, 0))
                    continue
                if not entry.is_dir():
                    stamp = max(stat.st_mtime_ns, stat.st_ctime_ns)
                    size = stat.st_size if S_ISREG(stat.st_mode) else NO_FILE
                    files.append(FoundFile(path, size, _inode(stat), stamp))
                elif _inode(stat) in above:
                    raise ValueError(f"{root / path} leads back to a folder that contains it: remove this link")
                else:
                    folders.append((path, (*above, _inode(stat))))
    except OSError as error:
        if not any(map(_is_aside, relative.split("/"))):  # of which nothing is read anyway
            raise ValueError(
                f"{root / relative} cannot be listed ({error}): check its permissions and links"
            ) from error
    return files, folders


def _inode(stat) -> int:
    number: int = stat.st_dev << 64 | stat.st_ino
    return number


def arrange(root: Path, files: Iterable[FoundFile], asked: Iterable[str] = ()) -> FolderOfImages:
    """Divide the images of a folder into splits.

    Args:
        root: absolute path of the folder.
        files: all files below it.
        asked: names of splits that the user gave, which are folders whatever their names are.

    Raises:
        ValueError: the folders may mean two things, an image is in two places, or a name is not UTF-8.
    """
    images, left_out, metadata = [], Counter[str](), []
    for file in files:
        if file.parts[-1] in METADATA and file.size >= 0 and not any(map(_is_aside, file.parts)):
            metadata.append(file.path)
        reason = _why_not(root, file)
        if reason is None:
            images.append(file)
        else:
            left_out[reason] += 1
    _refuse_unencodable(root, images)
    splits = _divide(root, images, set(asked))
    if splits is not None and (loose := len(images) - sum(map(len, splits.values()))):
        left_out["beside the folders of the splits"] = loose
    level = 0 if splits is None else 1
    metadata.sort(key=lambda path: (_folder_of(path), METADATA.index(path.rpartition("/")[2])))
    folder = FolderOfImages(root, {"train": images} if splits is None else splits, level, left_out, metadata)
    _refuse_masks(root, [file for files in folder.splits.values() for file in files])
    if splits is None:
        _refuse_splits_in_classes(root, images)
    else:
        _refuse_splits_in_splits(root, splits)
    _refuse_doubled_folders(folder)
    _refuse_two_names_of_one_file(folder)
    return folder


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def _is_aside(name: str) -> bool:
    """Whether a folder is hidden, or the system's own."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _why_not(root: Path, file: FoundFile) -> str | None:
    """Why a file is no image of the dataset; None for an image."""
    *folders, name = file.parts
    if any(map(_is_aside, folders)):
        return "in hidden folders"
    if name.startswith(".") or name in SYSTEM_FILES:
        return "hidden"
    if file.size == NO_FILE:
        return "pipes, sockets or devices"
    if file.size < 0:
        return "links to nowhere"
    if file.size == 0:
        return "empty"
    extension = file.extension
    if extension in EXTENSIONS:
        return None
    if extension in NEEDS:
        return f"{extension} ({NEEDS[extension]})"
    if name in METADATA:
        return "metadata"
    if extension in DATA_FILES:
        return extension
    return "not images" if extension in TEXT_FILES or not is_an_image(root / file.path) else None


def _divide(root: Path, images: list[FoundFile], asked: set[str]) -> dict[str, list[FoundFile]] | None:
    """The images by split; None where the first folders are classes."""
    tops: dict[str, list[FoundFile]] = defaultdict(list)
    for file in images:
        if len(file.parts) > 1:
            tops[file.parts[0]].append(file)
    names = {top: SPLITS.get(top.lower()) for top in tops}
    if not asked & set(tops) and not _are_splits(root, tops, names):
        return None
    splits: dict[str, list[FoundFile]] = {}
    for top, files in tops.items():
        if top.lower() in OF_MASKS and top not in asked:
            continue
        name = names[top] or top
        if name in splits:
            twins = [other for other in tops if (names[other] or other) == name]
            raise ValueError(f"{root} has folders {' and '.join(twins)} for one split: merge them, or remove a copy")
        splits[name] = files
    return _train_first(splits)


def _are_splits(root: Path, tops: dict[str, list[FoundFile]], names: dict[str, str | None]) -> bool:
    words = {name for name in names.values() if name is not None}
    others = sorted(top for top, name in names.items() if name is None)
    if not others or {"train"} < words:  # splits alone, or a training split, one to evaluate on, and others
        return bool(words)
    alike = [top for top in sorted(tops) if LIKE_A_SPLIT.fullmatch(top.lower())]
    alike = alike if len(alike) == len(tops) > 1 else _differ_in_split(tops)
    for top in alike:
        if (match := MASK_BESIDE.fullmatch(top)) and match[1] in alike:
            raise ValueError(f"{root} has {match[1]} and {top}, pictures and their masks: pass {root / match[1]}")
    if alike:
        other = next(top for top in alike if top != "train")
        flag = f"{other} with --eval_split" if "train" in alike else "the one to train on with --train_split"
        raise ValueError(
            f"folders {', '.join(alike)} of {root} may be splits or classes: for splits name {flag} (to embed or prepare, all "
            "with --splits), for classes move them into FOLDER/train"
        )
    if words and any(len(file.parts) > 2 for files in tops.values() for file in files):
        raise ValueError(
            f"{root} has {', '.join(sorted(words))} beside {', '.join(others[:3])}, which may be splits or classes: for "
            f"splits name them all as in {HOW}, for classes move them into FOLDER/train"
        )
    return False


def _differ_in_split(tops: Iterable[str]) -> list[str]:
    """Folders of a training split and others whose names differ in this word alone, as seg_train and seg_test do."""
    alike: dict[str, dict[str, str]] = defaultdict(dict)
    for top in sorted(tops):
        if word := WORD_OF_A_SPLIT.search(top.lower()):
            rest = f"{top[: word.start()]}/{top[word.end() :]}".lower()
            alike[rest].setdefault(SPLITS[word[0]], top)
    return next((sorted(found.values()) for found in alike.values() if {"train"} < found.keys()), [])


def _refuse_unencodable(root: Path, files: Iterable[FoundFile]) -> None:
    # Labels and paths are kept as UTF-8.
    for file in files:
        if (path := f"{root}/{file.path}") != path.encode(errors="replace").decode():
            raise ValueError(f"{path!r} has a name that is not UTF-8: rename it")


def _inside(files: Iterable[FoundFile]) -> dict[str, set[str]]:
    """The folders on the way to files: the names in each folder, by its path below the root, in the order of the files."""
    inside: dict[str, set[str]] = defaultdict(set)
    for folder in dict.fromkeys(file.path.rpartition("/")[0] for file in files):
        while folder:
            above, _, name = folder.rpartition("/")
            inside[above].add(name)
            folder = above
    return inside


def _refuse_splits_in_classes(root: Path, images: list[FoundFile]) -> None:
    for folder, names in _inside(images).items():
        words = {SPLITS[name.lower()] for name in names if name.lower() in SPLITS}
        if folder and len(words) > 1:
            only = all(file.path.startswith(f"{folder}/") for file in images)
            remedy = f"pass {root / folder}" if only else f"arrange the folders as {HOW}"
            raise ValueError(f"{root / folder} has the splits {', '.join(sorted(words))} inside it: {remedy}")


def _refuse_splits_in_splits(root: Path, splits: dict[str, list[FoundFile]]) -> None:
    # As an archive is unpacked into a folder of its own name. A class may be called train, but not all of them.
    for files in splits.values():
        inside = {file.parts[1] for file in files if len(file.parts) > 2}
        deep = {file.parts[1] for file in files if len(file.parts) > 3}
        if len(inside) > 1 and inside == deep and all(name.lower() in SPLITS for name in inside):
            place = root / files[0].parts[0]
            raise ValueError(f"{place} has the splits {', '.join(sorted(inside))} inside it: pass {place}")


def _refuse_doubled_folders(folder: FolderOfImages) -> None:
    # As an archive is unpacked twice, or into a folder of its own name inside that of its split.
    for files in folder.splits.values():
        inside = _inside(files)
        place = files[0].parts[0] if folder.class_level == 1 else ""
        classes = inside[place]
        if [place.lower()] == [name.lower() for name in classes] and all(len(file.parts) > 2 for file in files):
            whole = folder.root / place / min(classes)
            raise ValueError(f"{whole} has the name of its split and is no class: move what is in it to {whole.parent}")
        for name in sorted(classes):
            path = f"{place}/{name}".removeprefix("/")
            if len(twice := sorted(inside[path] & classes)) > 1:
                raise ValueError(
                    f"{folder.root / path} has folders {', '.join(twice[:3])}, and so has the folder around it: classes are "
                    "there once, so remove or move away one or the other"
                )


def _refuse_masks(root: Path, images: list[FoundFile]) -> None:
    for folder, names in _inside(images).items():
        pictures, masks = ([name for name in sorted(names) if is_one(name)] for is_one in (_is_of_images, _is_of_masks))
        if pictures and masks:
            raise ValueError(
                f"{root / folder} has {pictures[0]} and {masks[0]}, which are pictures and their masks and no classes: pass "
                f"{root / folder / pictures[0]}, or move every folder {masks[0]} out of {root}"
            )
    beside = [(match, file) for file in images if (match := MASK_BESIDE.fullmatch(splitext(file.parts[-1])[0]))]
    if not beside:
        return
    pictures_by_name = {splitext(file.path)[0]: file for file in images}
    pairs = [
        (picture, file)
        for match, file in beside
        if (picture := pictures_by_name.get("/".join([*file.parts[:-1], match[1]]))) is not None
    ]
    if pairs:
        picture, mask = pairs[0]
        raise ValueError(
            f"{picture.path} and {mask.path} in {root} are a picture and its mask ({len(pairs):,} in all): move the masks out "
            "of this folder, or rename them if they are pictures like others"
        )


def _is_of_images(name: str) -> bool:
    return re.split("[^a-z]", name.lower())[0] in OF_IMAGES  # images, images_png, image_2


def _is_of_masks(name: str) -> bool:
    lower = name.lower()
    return lower in OF_MASKS or re.split("[^a-z]", lower)[0] in OF_MASKS or lower.startswith(BEGINS_MASKS)


def _refuse_two_names_of_one_file(folder: FolderOfImages) -> None:
    # Also across splits: an image of the test split that is trained on makes every number too good.
    seen: dict[int, FoundFile] = {}
    for file in (file for files in folder.splits.values() for file in files):
        other = seen.setdefault(file.inode, file)
        if other is not file:
            raise ValueError(
                f"{other.path} and {file.path} in {folder.root} are one file: remove one of these links, so that every "
                "image is there once"
            )


def digests_of_some(root: Path, files: list[FoundFile]) -> list[str]:
    """Digests of parts of some files, spread over all: an image may be exchanged for another of the same size."""
    some = [files[i * len(files) // LOOKED_INTO] for i in range(LOOKED_INTO)] if len(files) > LOOKED_INTO else files
    with ThreadPoolExecutor(SCANNERS) as pool:
        return list(pool.map(lambda file: _digest_of_parts(root / file.path, file.size), some))


def _digest_of_parts(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with suppress(OSError), path.open("rb") as file:  # the run leaves an image out that cannot be read
        _update_by_parts(digest, file, size, OF_AN_IMAGE)
    return digest.hexdigest()


def _update_by_parts(digest: Any, file: BinaryIO, size: int, most: int) -> None:
    """Give a digest a file of up to `most` bytes, and as many bytes of a larger one, from places that are spread over it."""
    if size <= most:
        _update(digest, file, 0, size)
        return
    for place in range(PARTS):
        _update(digest, file, place * (size - most // PARTS) // (PARTS - 1), most // PARTS)


def check_data_file(address: str | Path, digest: Any = None) -> None:
    """Look at what a data file unpacks to, by its footer or the headers of its members, before memory is taken.

    Args:
        address: path of a parquet, tar or zip file, or where one lies on the Hub; files of other formats pass.
        digest: of hashlib. It takes what tells a parquet or tar file from others of its size: labels and all else beside the
            images, how large these are, and parts of the file.

    Raises:
        ValueError: it is damaged, or unpacks to far more than images do.
    """
    why_not = WHY_NOT.get(Path(address).suffix.lower())
    if why_not is None:
        return
    try:
        with xopen(str(address), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            reason = why_not(file, size, digest)
            if digest is not None:
                _update_by_parts(digest, file, size, OF_A_DATA_FILE)
    except (OSError, tarfile.TarError, BadZipFile, pa.ArrowException) as error:
        raise ValueError(
            f"{address} cannot be read ({one_line(error)}): see that it is whole, and a tar without compression"
        ) from error
    if reason is not None:
        raise ValueError(f"{address} ({size:,} bytes) {reason}: it is not read, because it would fill the memory")


def has_rows(path: str | Path) -> bool:
    """Whether a parquet or tar file that was checked has any: writers that share the work leave some without."""
    if Path(path).suffix.lower() == ".parquet":
        return bool(pq.read_metadata(path).num_rows)
    with open(path, "rb") as file:
        return any(file.read(tarfile.BLOCKSIZE))  # the header of the first member


def _why_not_this_parquet(file: BinaryIO, size: int, digest: Any) -> str | None:
    footer = pq.read_metadata(file)
    if footer.num_rows > max(FEW_ROWS, size // LEAST_ROW):
        return f"claims {footer.num_rows:,} rows, more than it can have images"
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    reason = _why_not_so_many(max((group.total_byte_size for group in groups), default=0), size)
    if reason is None and digest is not None:
        length = footer.serialized_size + FOOTER_END
        _update(digest, file, size - length, length)
        others = [i for i in range(footer.num_columns) if not _has_bytes(footer.schema.column(i))]
        for column in (group.column(i) for group in groups for i in others):
            starts = [column.data_page_offset, column.dictionary_page_offset]
            _update(digest, file, min(start for start in starts if start is not None), column.total_compressed_size)
    return reason


def _has_bytes(column: Any) -> bool:
    """Whether a column of a parquet file may have images: bytes that are no text."""
    return column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY") and column.logical_type.type == "NONE"


def _update(digest: Any, file: BinaryIO, start: int, count: int) -> None:
    """Give a digest `count` bytes of a file, or as many as there are, whatever the file claims."""
    file.seek(max(0, start))
    while count > 0 and (piece := file.read(min(count, PIECE))):
        digest.update(piece)
        count -= len(piece)


def _why_not_this_tar(file: BinaryIO, size: int, digest: Any) -> str | None:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
            if member.issparse() or member.name.lower().endswith(PACKED):
                return f"has a packed member, {one_line(member.name)}"
            if digest is not None:
                digest.update(f"{member.name}\n{member.size}\n".encode(errors="surrogateescape"))
                if splitext(member.name)[1].lower() not in EXTENSIONS:
                    _update(digest, file, member.offset_data, member.size)
    return None


def _why_not_this_zip(file: BinaryIO, size: int, digest: Any) -> str | None:
    with ZipFile(file) as archive:
        return _why_not_so_many(sum(member.file_size for member in archive.infolist()), size)


def _why_not_so_many(unpacked: int, size: int) -> str | None:
    return f"unpacks to {unpacked:,} bytes" if unpacked > max(LITTLE, MOST_UNPACKED * size) else None


WHY_NOT = {".parquet": _why_not_this_parquet, ".tar": _why_not_this_tar, ".zip": _why_not_this_zip}


def refuse_missing_shards(root: Path, files: Iterable[FoundFile]) -> None:
    """
    Raises:
        ValueError: of files that say how many they are, as in train-00000-of-00004.parquet, some are not there.
    """
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for file in files:
        if shard := SHARD.fullmatch(file.path):
            numbers[shard["name"], shard["count"]].add(int(shard["number"]))
    for (name, count), found in numbers.items():
        first = next((number for number in range(int(count)) if number not in found), None)
        if first is not None:
            raise ValueError(
                f"{root} has no {name}-{first:0{len(count)}}-of-{count}, and {len(found):,} of these {int(count):,} files: "
                "copy the others, or rename those that are there if they are all that is meant"
            )


def split_of_data_file(file: FoundFile) -> str | None:
    """The split that the first word of a parquet or tar file names, else a folder, else a later word; None without one."""
    *folders, name = file.parts
    if folders[-1:] == ["data"] and (named := HUB_LAYOUT.fullmatch(name)):
        return SPLITS.get(named[1].lower(), named[1])
    first, *others = re.split(r"[^A-Za-z]+", splitext(name)[0])
    for word in (first, *reversed(folders), *others):  # imagenet1k-validation-00.tar
        if word.lower() in SPLITS:
            return SPLITS[word.lower()]
    return None


def divide_data_files(root: Path, files: Iterable[FoundFile]) -> dict[str, list[FoundFile]]:
    """Parquet or tar files by split; all are `train` where none names a split.

    Raises:
        ValueError: some files name a split and others do not, or a name is not UTF-8.
    """
    splits: dict[str | None, list[FoundFile]] = defaultdict(list)
    files = list(files)
    _refuse_unencodable(root, files)
    for file in files:
        splits[split_of_data_file(file)].append(file)
    unnamed = splits.pop(None, [])
    if unnamed and splits:
        raise ValueError(
            f"{root / unnamed[0].path} names no split, but other files are of {', '.join(map(str, splits))}: begin the "
            "names of all files with their split, as in train-00000.parquet"
        )
    return _train_first({str(name): files for name, files in splits.items()} or {"train": unnamed})


def _train_first(splits: dict[str, list[FoundFile]]) -> dict[str, list[FoundFile]]:
    return dict(sorted(splits.items(), key=lambda split: (split[0] != "train", split[0])))


def visible(files: Iterable[FoundFile]) -> Iterator[FoundFile]:
    """The regular files that are not hidden and lie in no hidden folder."""
    for file in files:
        if file.size != NO_FILE and not any(map(_is_aside, file.parts)):
            yield file


# Labels of a folder of images from its `metadata.csv`, `metadata.jsonl` or `metadata.parquet`, as on the Hub


def use_metadata(folder: FolderOfImages, column: str) -> dict[str, Any] | None:
    """Labels by the path of an image. Images that are not listed leave splits of which others are, and are counted.

    Args:
        folder: changed in place.
        column: of the labels.

    Returns:
        strings or integers by path; None where no metadata has that column.

    Raises:
        ValueError: the metadata cannot be read, lists no image, one that is not there, or one with two labels.
    """
    labels: dict[str, Any] = {}
    found = False
    for place, path in metadata_of(folder, [file for files in folder.splits.values() for file in files]):
        if (columns := _read_metadata(path, column)) is not None:
            found = True
            names = (f"{place}/{name}".removeprefix("/") for name in columns[FILE_NAME])
            for name, label in zip(names, columns[column], strict=True):
                if labels.setdefault(name, label) != label:
                    raise ValueError(
                        f"metadata of {folder.root} lists {name} twice, with {shown(labels[name])} and {shown(label)}: leave "
                        "one line for each image"
                    )
    if not found:
        return None
    if not labels:
        raise ValueError(
            f"metadata of {folder.root} lists no image: add a line for each, or remove it to take the classes from folders"
        )
    there = {file.path for files in folder.splits.values() for file in files}
    if missing := labels.keys() - there:
        raise ValueError(
            f"metadata of {folder.root} lists {min(missing)}, which is no image there ({len(missing):,} in all): remove these "
            f"lines, add the images, or write the paths as those of the images are, such as {min(there)}"
        )
    for split, files in folder.splits.items():
        listed = [file for file in files if file.path in labels]
        if listed and len(listed) < len(files):  # else it has no labels, as the test split of a competition
            folder.splits[split] = listed
            folder.left_out["not listed in the metadata"] += len(files) - len(listed)
    return labels


def metadata_of(folder: FolderOfImages, files: Iterable[FoundFile]) -> Iterator[tuple[str, Path]]:
    """The metadata files that may list some of these images, each with its own folder below the root."""
    around = {""}
    for place in {_folder_of(file.path) for file in files}:
        while place not in around:
            around.add(place)
            place = _folder_of(place)
    for path in folder.metadata:
        if (place := _folder_of(path)) in around:
            yield place, folder.root / path


def _read_metadata(path: Path, column: str) -> dict[str, list[Any]] | None:
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
    for name in columns:
        spaced = name != name.strip() in (FILE_NAME, column)
        if spaced or (FILE_NAME in name and FILE_NAME not in used):
            remedy = "separate its columns by commas, without spaces"
            if re.fullmatch(r"\w+", name):
                remedy = f"rename it to {FILE_NAME}, and remove the others of this kind"
            raise ValueError(f"{path} has the column {name[:200]!r}: {remedy}")
    if column not in used:
        return None
    if path.suffix == ".csv":  # a cell without text is no label, and no class of that name
        used[column] = [None if label == "" else label for label in used[column]]
    if FILE_NAME not in used:
        raise ValueError(f"{path} has no column {FILE_NAME!r}, only {', '.join(columns)}: rename the one with paths")
    return used
