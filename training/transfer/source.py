"""Where annotated images are: files of a folder, columns of images, the split to evaluate on, and whether data has changed."""

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import datasets
import torch.distributed as dist
from tqdm import tqdm

from modeling_moco.distributed_moco import rank, world_size

from ..data.decode import EXTENSIONS
from ..data.folders import NO_FILE, FoundFile, list_files, visible
from ..data.formats import COMMIT, open_dataset
from ..data.sources import EVAL_SPLITS, SourceArguments
from ..errors import one_line, shown

IMAGES = datasets.Features({"image": datasets.Image(decode=False)})
READERS = 4  # threads that look at images
Seen = TypeVar("Seen")


class Files:
    """The files below a folder, by their paths. Nothing is read that the walk has not found."""

    def __init__(self, root: Path):
        self.root = root
        self.found = {file.path: file for file in list_files(root)}

    def places(self) -> tuple[str, ...]:
        """See `Decoder`."""
        return (f"{self.root}/".replace("//", "/"),)

    def below(self, folder: str) -> list[FoundFile]:
        """The visible files whose path begins with `folder`, which ends in a slash."""
        return [file for file in visible(self.found.values()) if file.path.startswith(folder)]

    def read(self, path: str, most: int) -> str:
        """The text of a file.

        Raises:
            ValueError: it is not there, is no regular file, has more than `most` bytes, or is not UTF-8.
        """
        file = self.found.get(path)
        if file is None:
            raise ValueError(f"{self.root / path} does not exist: add it, or choose another split")
        if file.size == NO_FILE or file.size > most:
            raise ValueError(f"{self.root / path} is no file of at most {most:,} bytes: check what it is")
        try:
            return (self.root / path).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.root / path} cannot be read ({one_line(error)}): bring it back") from error

    def image(self, candidates: Iterable[str], owner: str) -> FoundFile:
        """The first of these paths that is a file.

        Raises:
            ValueError: none is.
        """
        paths = list(candidates)
        for path in paths:
            file = self.found.get(path)
            if file is not None and file.size != NO_FILE:
                return file
        raise ValueError(f"image {shown(paths[0])} of {owner} is not in {self.root}: add it, or remove its annotations")


def voc_image(files: Files, line: str, owner: str) -> tuple[FoundFile, str]:
    """The image that a line of a VOCdevkit's list names, and that name, by which its annotations are called too.

    A name may have spaces and dots. Lists of SBD name the files of an image and its mask; others have a number behind the name.

    Raises:
        ValueError: it is not there.
    """
    names = [line.strip()]
    if more := re.fullmatch(r"(\S+)\s+(?:-?\d+|\S+\.png)", names[0]):
        names.append(more[1])
    last = Path(names[-1])
    if last.suffix.lower() in EXTENSIONS:
        names.append(last.stem)
    paths = (f"JPEGImages/{name}{end}" for name in names for end in (".jpg", *sorted(EXTENSIONS)))
    image = files.image(paths, owner)
    return image, image.path.removeprefix("JPEGImages/").rpartition(".")[0]


def image_rows(root: Path, files: Sequence[FoundFile]) -> datasets.Dataset:
    """Rows `{"image": {"bytes": None, "path"}}` of files."""
    rows = [{"bytes": None, "path": f"{root}/{file.path}"} for file in files]
    return datasets.Dataset.from_dict({"image": rows}, features=IMAGES)


def look_at_all(look: Callable[[int], Seen], count: int, what: str) -> list[Seen]:
    """What `look` finds of each image, by its number. Of several processes each looks at its share, and has all.

    Args:
        count: of the images.
        what: is looked at, beside the bar.
    """
    numbers = range(rank(), count, world_size())
    with ThreadPoolExecutor(READERS) as pool:
        bar = tqdm(pool.map(look, numbers), what, len(numbers), delay=2, leave=False, disable=rank() > 0 or None)
        here = dict(zip(numbers, bar, strict=True))
    shares: list[Any] = [here]
    if world_size() > 1:
        shares = [None] * world_size()
        dist.all_gather_object(shares, here)
    together = {number: seen for share in shares for number, seen in share.items()}
    return [together[number] for number in range(count)]


def find_image_column(name: str, features: datasets.Features, asked: str | None) -> str:
    """The column of the images of a split: the one that is asked for, `image`, or the only one.

    Raises:
        ValueError: there is no such column, or several.
    """
    found = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if asked is not None:
        if asked not in found:
            raise ValueError(
                f"image_column ({asked!r}) is no column of images of split {name!r}: there are {', '.join(found) or 'none'}"
            )
        return asked
    if "image" in found:  # others may hold masks
        return "image"
    if len(found) != 1:
        raise ValueError(
            f"split {name!r} has {len(found)} image columns ({', '.join(found) or 'none'}): name one with --image_column"
        )
    return found[0]


def find_eval_split(
    names: Sequence[str], args: SourceArguments, training: bool, also: Sequence[str] = ()
) -> str | None:
    """The split to evaluate on: the one that is asked for, or the first that is there; None without one.

    Args:
        names: of all splits.
        training: whether the train split is trained on.
        also: names that are looked for beside the usual ones.

    Raises:
        ValueError: it is the split that is trained on.
    """
    if training and args.eval_split == args.train_split:
        raise ValueError(
            f"eval_split ({args.eval_split!r}) is the split that is trained on: name another, or leave it out"
        )
    found = [name for name in (*EVAL_SPLITS, *also) if name in names and not (training and name == args.train_split)]
    return args.eval_split or next(iter(found), None)


def identify(image: dict[str, Any] | None, file: FoundFile | None) -> int:
    """What tells an image from others of its name and pixels: the bytes of its file, or a digest of those in a column.

    One of a column that has a path alone is 0: it is on the Hub, where the commit tells.
    """
    return file.size if file is not None else zlib.crc32((image or {}).get("bytes") or b"")


class Source:
    """A dataset whose form is found out, and whose splits are read one by one. Who inherits from it knows the forms.

    Args:
        FORMS: those of folders, in a message.
        columns: the splits of a dataset that is a table; empty for files of a folder.
        places: see `Decoder`.
        commit: of a dataset on the Hub.
    """

    FORMS: ClassVar[str]

    def __init__(self, args: SourceArguments):
        self.args, self.root = args, Path(args.dataset_name)
        self.columns: dict[str, datasets.Dataset] = {}
        self.places: tuple[str, ...] = ()
        self.commit: str | None = None
        self.names: list[str] = []
        self._files: dict[Path, Files] = {}

    @property
    def local(self) -> bool:
        """Whether it may have the files of a known layout."""
        return self.root.is_dir() and self.args.dataset_config_name is None

    @property
    def asked(self) -> set[str]:
        """The splits that the command line names."""
        args = self.args
        return {part for split in (args.train_split, args.eval_split) if split for part in split.split("+")} - {"train"}

    def open_columns(self) -> None:
        args = self.args
        try:
            opened = open_dataset(
                args.dataset_name,
                args.dataset_config_name,
                streaming=False,
                train_split=args.train_split,
                asked=self.asked,
                label_column="label",
                commit=args.commit,
            )
        except ValueError as error:
            if not self.local:
                raise
            raise ValueError(f"{args.dataset_name} has none of the forms {self.FORMS}; without one: {error}") from error
        self.columns, self.places = opened.splits, opened.places
        self.commit = next((text for text in opened.content.values() if text.startswith(COMMIT)), None)
        if self.commit and rank() == 0:
            print(f"{args.dataset_name}: {opened.account}")

    def files_of(self, root: Path) -> Files:
        if root not in self._files:
            self._files[root] = Files(root)
        return self._files[root]

    def parts(self, name: str) -> list[str]:
        """The splits that are joined by + in a name.

        Raises:
            ValueError: one is not there, or is there twice.
        """
        parts = name.split("+")
        for part in parts:
            if part not in self.names:
                raise ValueError(
                    f"split {part!r} is not in {self.args.dataset_name}: it has {', '.join(self.names)}; name them with "
                    "--train_split and --eval_split"
                )
        if len(set(parts)) < len(parts):
            raise ValueError(f"split {name!r} names one split twice: name each once")
        return parts

    def same_content(self, splits: dict[str, tuple[str, bool]]) -> dict[str, str]:
        """What identifies the images of each split, with their annotations.

        Args:
            splits: number of images and digest of each, and whether they are the first of more.

        Raises:
            ValueError: a split is not what the run was begun with.
        """
        content = {}
        for name, (digest, limited) in splits.items():
            now = f"{'first ' if limited else ''}{digest}{f' of {self.commit}' if self.commit else ''}"
            then = (self.args.content or {}).get(name, now)
            if then != now and _extent(then) == _extent(now):
                raise ValueError(
                    f"{self.args.dataset_name} is not what the run was begun with: split {name!r} was {shown(then)} and is "
                    f"{now}. Bring its files back, or name other data with --dataset_name"
                )
            content[name] = now
        return content


def _extent(text: str) -> str:
    """How many first images are meant: others are no other content; empty for all of them."""
    first = re.match(r"first [\d,]+ images", text)
    return first[0] if first else ""
