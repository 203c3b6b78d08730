"""Where annotated images are: files of a folder, columns of images, the split to evaluate on, and whether data has changed."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets

from ..data.folders import NO_FILE, FoundFile, list_files, visible
from ..data.sources import EVAL_SPLITS, SourceArguments
from ..errors import one_line, shown

IMAGES = datasets.Features({"image": datasets.Image(decode=False)})


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


def image_rows(root: Path, files: Sequence[FoundFile]) -> datasets.Dataset:
    """Rows `{"image": {"bytes": None, "path"}}` of files."""
    rows = [{"bytes": None, "path": f"{root}/{file.path}"} for file in files]
    return datasets.Dataset.from_dict({"image": rows}, features=IMAGES)


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


def find_eval_split(names: Sequence[str], args: SourceArguments, also: Sequence[str] = ()) -> str | None:
    """The split to evaluate on: the one that is asked for, or the first that is there; None without one.

    Args:
        names: of all splits.
        also: names that are looked for beside the usual ones.
    """
    found = args.eval_split or next((name for name in (*EVAL_SPLITS, *also) if name in names), None)
    return None if found == args.train_split else found


def refuse_other_content(content: dict[str, str], args: SourceArguments) -> None:
    """
    Args:
        content: what identifies each split.

    Raises:
        ValueError: a split is not what the run was begun with.
    """
    for name, now in content.items():
        then = (args.content or {}).get(name)
        if then is not None and then != now:
            raise ValueError(
                f"{args.dataset_name} is not what the run was begun with: split {name!r} was {shown(then)} and is {now}. Bring "
                "its files back, or name other data with --dataset_name"
            )
