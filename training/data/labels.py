"""Check whether an evaluation can use the labels of two splits. A problem is one line with a remedy.

Labels are class numbers from 0, one for each of `n` images; -1 means no label, as in the Hub's ImageNet test split.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class SplitLabels:
    """Labels of a split.

    Args:
        split: its name.
        whole: labels of all its images (n,).
        kept: number of first images that are used.
    """

    split: str
    whole: np.ndarray
    kept: int

    @property
    def used(self) -> np.ndarray:
        """Labels of the images that are used (kept,)."""
        return self.whole[: self.kept]


def read_labels(rows: datasets.Dataset) -> np.ndarray:
    """Labels (n,) of all rows; -1 where a row has none."""
    if "label" not in rows.column_names:
        return np.full(len(rows), -1)
    column = rows.with_format("arrow")["label"][:]
    labels: np.ndarray = column.cast(pa.int64()).fill_null(-1).to_numpy()  # small unsigned types have no -1
    return labels


def number_classes(labels: np.ndarray) -> list[str]:
    """Names for classes that have only numbers: "0", "1", ... Empty where the labels (n,) are not class numbers from 0."""
    largest = int(labels.max())
    return [str(number) for number in range(largest + 1)] if largest < len(labels) else []


def find_label_problem(
    names: list[str], train: SplitLabels, test: SplitLabels, from_folders: bool = False
) -> str | None:
    """Find why a classifier cannot be trained on one split and evaluated on the other.

    Args:
        names: of the classes.
        train, test: labels of the two splits.
        from_folders: whether the classes are folders, which must have the same names in both splits. Elsewhere a class
            without training images is allowed, because a small sample of a large dataset has such classes.

    Returns:
        the problem with a remedy; None without one.
    """
    for labels, flag in ((train, "--train_split"), (test, "--eval_split")):
        unlabelled = int((labels.used < 0).sum())
        if unlabelled:
            return (
                f"{unlabelled:,} of {labels.kept:,} images of split {labels.split!r} have no label (null or -1): choose "
                f"another split with {flag}, or remove them from the dataset"
            )
    if not names:
        return (
            f"split {train.split!r} has {len(train.whole):,} images and labels up to {train.whole.max():,}, which are not "
            "class numbers from 0: convert them to a ClassLabel with `datasets`' class_encode_column, or name another column "
            "with --label_column"
        )
    for labels, flag in ((train, "--train_split"), (test, "--eval_split")):
        if labels.used.max() >= len(names):
            return (
                f"label {labels.used.max():,} of split {labels.split!r} is not one of the {len(names):,} classes of "
                f"{train.split!r}, 0 to {len(names) - 1:,}: remove its images, or choose another split with {flag}"
            )
    classes = np.unique(train.used)
    if len(classes) < 2:
        some = train.kept < len(train.whole)
        return (
            f"{f'the first {train.kept:,}' if some else 'all'} images of split {train.split!r} belong to one class, "
            f"{names[classes[0]]!r}: "
            + ("raise --max_train_samples" if some else "use images of two classes, or another --label_column")
        )
    unseen = np.setdiff1d(test.used, train.whole)
    if len(unseen) and (from_folders or len(unseen) == len(np.unique(test.used))):
        return (
            f"class {names[unseen[0]]!r} of split {test.split!r} has no image in split {train.split!r}: use the same class "
            "names in both, or remove it"
        )
    return None


def find_renamed_class(columns: dict[str, tuple[str, datasets.Features]], files: dict[str, list[str]]) -> str | None:
    """Find a split whose class names differ from those of another one, or a parquet file among others.

    The splits of a dictionary may have been encoded one by one, and `datasets` reads all files with the features of the first
    file. A class with number 0 in one and number 2 in another would silently be confused. (Files are compared with one another
    only: the card of a dataset on the Hub may give all its classes other names.)

    Args:
        columns: of each split that is used, by its name: its label column, and the features of all its columns.
        files: of each split, those of them that are here.

    Returns:
        the problem with a remedy; None without one.
    """
    splits = [(f"split {split!r}", features.get(column)) for split, (column, features) in columns.items()]
    return _find_renamed(splits) or _find_renamed(_labels_of_files(columns, files))


def _labels_of_files(
    columns: dict[str, tuple[str, datasets.Features]], files: dict[str, list[str]]
) -> Iterator[tuple[str, Any]]:
    for split, (column, _) in columns.items():
        for file in files.get(split, []):
            if file.endswith(".parquet") and os.path.isfile(file):
                yield file, datasets.Features.from_arrow_schema(pq.read_schema(file)).get(column)


def _find_renamed(labels: Iterable[tuple[str, Any]]) -> str | None:
    """Compare the features of a label column with the first one that has names; bare numbers have none."""
    named = ((place, label.names) for place, label in labels if isinstance(label, datasets.ClassLabel) and label.names)
    first, names = next(named, ("", []))
    for place, theirs in named:
        for number, (name, other) in enumerate(zip_longest(names, theirs)):
            if name != other:
                return (
                    f"class {number} is {_quoted(name)} in {first} and {_quoted(other)} in {place}: write all splits and files "
                    "with the same class names in the same order"
                )
    return None


def _quoted(name: str | None) -> str:
    return "absent" if name is None else repr(name)


def subset_warnings(names: list[str], train: SplitLabels, test: SplitLabels) -> Iterator[str]:
    """Warn where a split lacks some of the classes.

    Args:
        names: of the classes.
        train, test: labels of the two splits.
    """
    for labels, flag in ((train, "--max_train_samples"), (test, "--max_eval_samples")):
        there, used = len(np.unique(labels.whole)), len(np.unique(labels.used))
        if used < there:
            yield (
                f"the first {labels.kept:,} images of split {labels.split!r} cover {used:,} of its {there:,} classes: raise "
                f"{flag}, or shuffle the dataset"
            )
    unseen = np.setdiff1d(test.used, train.whole)
    if len(unseen):
        yield (
            f"{len(unseen):,} of the {len(np.unique(test.used)):,} classes of split {test.split!r} have no image in split "
            f"{train.split!r}, for example {names[unseen[0]]!r}: a classifier cannot predict them"
        )
