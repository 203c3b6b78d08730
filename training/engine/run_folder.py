"""The folder of a run: the names of all its files, whose run it is, and files that are whole or not there.

Only this module names these files, so that writers, evaluations, the report and the Hub agree on them.
"""

import json
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..errors import one_line

SAVED_RECIPE = "recipe.yaml"  # the settings of a run, in its output directory
MANIFEST = "manifest.json"  # of a checkpoint, written last
METRICS = "metrics.json"  # what a run, a probe or a fine-tuning came to
RESULTS = "results.json"  # what every evaluation of a model has measured
SPLIT = "split.json"  # which images a fine-tuning was trained on
CONVERSION = "conversion.json"  # where a converted model came from, beside it
UNREADABLE = "unreadable_images.txt"  # training images that were left out because they cannot be read
DATASET = "dataset.json"  # what a run was trained on: name, number and digest of its files
REPORT = "report.html"
FEATURES = "features"  # folder of features that were extracted once
# Name of a figure's files: its title, and how to read it.
CURVES = {
    "training_curves": (
        "Training",
        "The loss falls below the dashed line once queries find their keys; contrast accuracy says how often, kNN accuracy "
        "what the features are worth.",
    )
}
OF_FEATURES = {
    "neighbours": (
        "Nearest neighbours",
        "Each row is a query and the training images nearest to it; a vermilion frame with ≠ marks another class.",
    ),
    "tsne": (
        "The space of features",
        "Images with similar features lie close together: good features give each class a place of its own. Distances "
        "between far groups mean nothing.",
    ),
}
FIGURES = (*CURVES, *OF_FEATURES)
# What may differ between a run and its continuation.
FREE_TO_CHANGE = {
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "logging_steps",
    "report_to",
    "project",
    "run_name",
    "disable_tqdm",
    "save_total_limit",
}


# PyYAML raises these of Python for a value that its tag does not fit, as `!!int ''`, and for very deep nesting.
UNCAUGHT_BY_YAML = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end: readers see the old file or the new one."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)  # after an error


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


def read_json(path: Path, remedy: str, what: str = "JSON") -> Any:
    """The content of a JSON file.

    Args:
        remedy: what to do about a file that is none.
        what: the file is to be.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not {what} ({one_line(error)}): {remedy}") from error


def read_sections(path: Path, remedy: str) -> dict[str, dict[str, Any]]:
    """The sections of a recipe, of a run's settings or of a probe's, by name.

    Args:
        remedy: what to do about a file that has none.

    Raises:
        ValueError: it is not YAML, or not made of sections of keys.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, *UNCAUGHT_BY_YAML) as error:
        raise ValueError(f"{path} is not YAML ({one_line(error)}): {remedy}") from error
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise ValueError(f"{path} is not made of sections of keys: {remedy}")
    names = [name for part in (content, *content.values()) for name in part]
    if odd := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"{path} has the name {shown(odd[0])}, which is no text: {remedy}")
    return content


def shown(value: Any) -> str:
    """A value of a file in a message: short, in one line."""
    return one_line(reprlib.repr(value) if isinstance(value, list | dict | tuple) else str(value)[:200])


def only_begun(folder: Path) -> bool:
    """Whether a folder is empty, or has nothing but what a run writes first: a crash at its start left no more."""
    return all(path.name.startswith((SAVED_RECIPE, DATASET)) for path in folder.iterdir())


def write_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Begin a run in a folder that is empty or not there.

    Raises:
        ValueError: the folder holds something else, or cannot be written to.
    """
    saved = folder / SAVED_RECIPE
    if folder.exists() and not (folder.is_dir() and only_begun(folder)):
        raise ValueError(f"output_dir ({folder}) holds files of something else: pass another --output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(saved, yaml.safe_dump(recipe, sort_keys=False))
    except OSError as error:
        raise ValueError(f"output_dir ({folder}) cannot be written ({error}): pass another --output_dir") from error


def check_same_run(folder: Path, settings: dict[str, dict[str, Any]]) -> None:
    """
    Raises:
        ValueError: the run in the folder has other settings, or they cannot be read.
    """
    saved = read_sections(folder / SAVED_RECIPE, "bring it back, or pass another --output_dir")
    for section, now in settings.items():
        then = saved.get(section, {})
        for key in sorted((set(then) | set(now)) - FREE_TO_CHANGE):
            if then.get(key) != now.get(key):
                raise ValueError(
                    f"output_dir ({folder}) already holds another run: {shown(key)} is {shown(then.get(key))} there and "
                    f"{shown(now.get(key))} here. Pass another --output_dir, or the same settings to continue it"
                )


def check_same_data(folder: Path, place: dict[str, Any]) -> None:
    """
    Args:
        place: "dataset", its name or absolute path, and "content", which identifies the rows of each split.

    Raises:
        ValueError: the folder's run has seen other rows of the same dataset.
    """
    for split, then in recorded_content(folder, place["dataset"]).items():
        now = place["content"].get(split, then)
        if now != then:
            raise ValueError(
                f"{place['dataset']} is not what the run in {folder} was begun with: split {split!r} was {then} and is {now}. "
                "Bring its files back, or begin another run"
            )


def recorded_content(folder: Path, dataset: str) -> dict[str, str]:
    """What identified the rows of each split of a dataset when a run was begun with it; empty where that is not known.

    Raises:
        ValueError: the record of it is damaged.
    """
    path = folder / DATASET
    if not path.is_file():
        return {}
    remedy = "bring it back, or delete it, and the data is no longer compared with what the run has seen"
    place = read_json(path, remedy)
    content = place.get("content") if isinstance(place, dict) else None
    if not isinstance(content, dict) or not all(
        isinstance(text, str) for text in (place.get("dataset"), *content.values())
    ):
        raise ValueError(f"{path} has no dataset with the content of its splits: {remedy}")
    return content if place["dataset"] == dataset else {}
