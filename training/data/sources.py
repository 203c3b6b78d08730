"""From a dataset's name to rows `{"image": {"bytes", "path"}, "label"}`, which `images.py` turns into views.

This module alone knows what a dataset calls its columns.
"""

import tarfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from modeling_moco import MoCoConfig, MoCoImageProcessor
from modeling_moco.distributed_moco import rank

from ..views.pil import EvaluationView
from .decode import decode_image
from .labels import SplitLabels, find_label_problem, find_renamed_class, number_classes, read_labels, subset_warnings
from .shards import ShardedRows, are_parquet, count_rows

MAX_IN_MEMORY_PX = 64  # pixels a side: images of one such size are kept in memory, where their views are made in batches
EVAL_SPLITS = ("validation", "test", "valid", "val")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
TRIED_IMAGES = 8  # first images of a split, one of which must be readable


@dataclass
class DataArguments:
    """Where the images come from and how they are seen."""

    _argument_group_name = "data"

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "Hub dataset, folder (of images in one folder per class, of parquet files, of webdataset tars), one "
            "parquet or tar file, or 'digits' (ships with scikit-learn)"
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str | None = field(
        default=None, metadata={"help": "split to evaluate on; by default the first of " + ", ".join(EVAL_SPLITS)}
    )
    image_column: str | None = field(default=None, metadata={"help": "by default the only image column"})
    label_column: str | None = field(default=None, metadata={"help": "by default the only class column, if any"})
    streaming: bool = field(default=False, metadata={"help": "read shards in sequence instead of indexing the dataset"})
    shuffle_buffer: int = field(default=10_000, metadata={"help": "streaming: images among which the next is drawn"})
    max_train_samples: int | None = field(default=None, metadata={"help": "train on the first so many images"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on the first so many images"})
    image_size: int = field(default=224, metadata={"help": "side of a view in pixels"})
    eval_resize: int | None = field(
        default=None, metadata={"help": "short side before the evaluation crop; by default image_size * 256 / 224"}
    )
    augmentation: Literal["v1", "v2", "cifar"] = field(default="v2", metadata={"help": "random views of pretraining"})
    view_backend: Literal["pil", "cv2", "device"] = field(
        default="pil",
        metadata={
            "help": "what makes the views: pil, the reference; cv2, the same three times as fast; device, in batches on the "
            f"GPU, and images of up to {MAX_IN_MEMORY_PX} px from memory"
        },
    )
    horizontal_flip: bool = field(
        default=True, metadata={"help": "switch off where a mirror image means another thing"}
    )
    crop_min_scale: float | None = field(
        default=None, metadata={"help": "smallest crop as a share of the image; by default that of the augmentation"}
    )

    def __post_init__(self):
        if self.image_size < 1:
            raise ValueError(f"image_size ({self.image_size}) must be at least 1 pixel")
        for name in ("max_train_samples", "max_eval_samples"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name} ({count}) must be at least 1: leave it out for all images")
        if self.crop_min_scale is not None and not 0 < self.crop_min_scale <= 1:
            raise ValueError(
                f"crop_min_scale ({self.crop_min_scale}) must lie in (0, 1]: it is a share of the image's area"
            )
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(
                f"eval_resize ({self.eval_resize}) is smaller than image_size ({self.image_size}): raise it, or the "
                "evaluation crop would be padded"
            )

    def evaluation_view(self) -> EvaluationView:
        """The fixed view of kNN, probes and pipelines."""
        return EvaluationView(self.eval_resize or round(self.image_size * 256 / 224), self.image_size)

    def image_processor(self, config: MoCoConfig) -> MoCoImageProcessor:
        """The evaluation view of a model in transformers' terms; it is saved beside it."""
        return MoCoImageProcessor(
            size={"shortest_edge": self.evaluation_view().resize},
            crop_size={"height": self.image_size, "width": self.image_size},
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
        )


@dataclass
class ImageSplits:
    """Rows `{"image": {"bytes", "path"}, "label"}`; without labels the second column and `class_names` are empty.

    Args:
        train: a `datasets.Dataset`, or with `--streaming` a [`ShardedRows`].
        eval: a `datasets.Dataset`, or with `--streaming` an IterableDataset; None without such a split.
        about: what results say of their data: names and revisions of dataset and splits, classes, evaluation view.
        label_problem: why no evaluation can use the labels; None if it can.
    """

    train: Any
    eval: Any
    class_names: list[str]
    about: dict[str, Any] = field(default_factory=dict)
    label_problem: str | None = None


def load_images(args: DataArguments, labelled: bool = False) -> ImageSplits:
    """Open a dataset and give its columns their names.

    Args:
        labelled: insist on labels that an evaluation can use, and warn where only a part of the classes is used.

    Raises:
        ValueError: no such dataset, split or column; a column that holds no images; an empty split; unusable labels.
    """
    splits, files = _open(args)
    eval_split = _find_eval_split(splits, args)
    features = splits[args.train_split].features
    columns = _find_columns(features, args)
    class_names = _class_names(features, columns)
    flaw = _missing_for_evaluation(splits, eval_split, columns, args)
    evaluation: Any = None
    if args.streaming:
        train = _by_shard(splits[args.train_split], columns, files.get(args.train_split, []), args)
        if eval_split is not None:
            evaluation = _rename(_undecoded(splits[eval_split], columns), columns)
    else:
        train, labels = _by_index(splits[args.train_split], args.train_split, columns, args.max_train_samples)
        class_names = class_names or number_classes(labels.whole)
        if eval_split is not None:
            evaluation, eval_labels = _by_index(splits[eval_split], eval_split, columns, args.max_eval_samples)
        if flaw is None:
            read = [*files.get(args.train_split, []), *files.get(str(eval_split), [])]
            column, from_folders = _label_column(columns), splits[args.train_split].info.builder_name == "imagefolder"
            flaw = find_renamed_class(features[column], column, read)
            flaw = flaw or find_label_problem(class_names, labels, eval_labels, from_folders)
        if labelled and flaw is None and rank() == 0:
            for warning in subset_warnings(class_names, labels, eval_labels):
                print(f"warning: {warning}")
    if labelled and flaw is not None:
        raise ValueError(flaw)
    about = {
        "dataset": args.dataset_name,
        "local": Path(str(args.dataset_name)).exists(),
        "config": args.dataset_config_name,
        "revision": _revision(splits[args.train_split]),
        "train_split": args.train_split,
        "train_images": len(train),
        "split": eval_split,
        "split_revision": None if eval_split is None else _revision(splits[eval_split]),
        "label_column": next((column for column, name in columns.items() if name == "label"), None),
        "classes": len(class_names),
        "view": f"short side {args.evaluation_view().resize} px, centre {args.image_size} px",
    }
    return ImageSplits(train, evaluation, class_names, about, flaw)


def _find_eval_split(splits: dict[str, Any], args: DataArguments) -> str | None:
    for name, split in (("train_split", args.train_split), ("eval_split", args.eval_split)):
        if split is not None and split not in splits:
            raise ValueError(f"{name} ({split!r}) is not in {args.dataset_name}: it has {', '.join(splits)}")
    eval_split = args.eval_split or next((name for name in EVAL_SPLITS if name in splits), None)
    return None if eval_split == args.train_split else eval_split


def _missing_for_evaluation(
    splits: dict[str, Any], eval_split: str | None, columns: dict[str, str], args: DataArguments
) -> str | None:
    if "label" not in columns.values():
        features = splits[args.train_split].features
        others = [f"{name!r} holds {features[name]}" for name in LABEL_COLUMNS if name in features]
        if others:
            return (
                f"{args.dataset_name} has no column of class numbers: {others[0]}. Turn it into a ClassLabel with `datasets`' "
                "class_encode_column, or name another with --label_column"
            )
        return f"{args.dataset_name} has no label column: name it with --label_column or choose another dataset"
    if eval_split is None:
        return (
            f"{args.dataset_name} has no split to evaluate on beside {', '.join(splits)}: name one with --eval_split; a "
            "folder of images has splits as FOLDER/train/CLASS and FOLDER/test/CLASS"
        )
    return None


def _revision(split) -> str:
    """Commit of a Hub dataset; else the fingerprint that `datasets` gives to a local one."""
    for url in split.info.download_checksums or {}:  # hf://datasets/NAME@COMMIT/FILE
        if url.startswith("hf://") and "@" in url:
            return url.split("@", 1)[1].split("/", 1)[0]
    return f"fingerprint {split._fingerprint}" if isinstance(split, datasets.Dataset) else "unknown (streamed)"


def _open(args: DataArguments) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The splits, and the files that each was read from."""
    name, path = args.dataset_name, Path(args.dataset_name)
    if name == "digits":
        digits = load_digits()
        return {k: v.to_iterable_dataset(num_shards=4) for k, v in digits.items()} if args.streaming else digits, {}
    if path.is_file():
        builders = {".parquet": "parquet", ".tar": "webdataset"}
        if path.suffix not in builders:
            raise ValueError(
                f"dataset_name ({name}) is a file that is neither .parquet nor .tar: pass the folder it is in"
            )
    elif not path.is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise ValueError(
            f"dataset_name ({name}) does not exist: pass a folder, a parquet or tar file, or a Hub dataset"
        )
    try:
        if path.is_file():
            builder = datasets.load_dataset_builder(builders[path.suffix], data_files={args.train_split: str(path)})
        else:
            builder = datasets.load_dataset_builder(name, args.dataset_config_name)
        files = builder.config.data_files or {}  # none where a Hub dataset comes from the cache
        if args.streaming:
            return builder.as_streaming_dataset(), files
        builder.download_and_prepare()
        return builder.as_dataset(), files
    except (OSError, ValueError, DatasetGenerationError, tarfile.ReadError) as error:
        raise ValueError(
            f"dataset_name ({name}) could not be opened as a folder, a file of images or a Hub dataset ({error}): check "
            "the name and its splits"
        ) from error


def _find_columns(features: datasets.Features, args: DataArguments) -> dict[str, str]:
    """The image column and, if there is one, the label column, with the names that they get."""
    for name, column in (("image_column", args.image_column), ("label_column", args.label_column)):
        if column is not None and column not in features:
            raise ValueError(f"{name} ({column!r}) is not in {args.dataset_name}: it has {', '.join(features)}")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if args.image_column is not None and args.image_column not in images:
        raise ValueError(
            f"image_column ({args.image_column!r}) of {args.dataset_name} holds no images but "
            f"{features[args.image_column]}: image columns are {', '.join(images) or 'absent'}"
        )
    if args.image_column is None and len(images) != 1:
        raise ValueError(
            f"{args.dataset_name} has {len(images)} image columns ({', '.join(images) or 'none'}) among "
            f"{', '.join(features)}: name one with --image_column"
        )
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels += [name for name in LABEL_COLUMNS if _holds_integers(features.get(name))]
    if (
        args.label_column is not None
        and args.label_column not in labels
        and not _holds_integers(features[args.label_column])
    ):
        raise ValueError(
            f"label_column ({args.label_column!r}) of {args.dataset_name} holds {features[args.label_column]}, not classes: "
            f"name another, or turn it into a ClassLabel with `datasets`' class_encode_column"
        )
    columns = {args.image_column or images[0]: "image"}
    if args.label_column or labels:
        columns[args.label_column or labels[0]] = "label"
    return columns


def _holds_integers(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and "int" in feature.dtype


def _undecoded(split, columns: dict[str, str]):
    # First the cast: a stream whose columns are selected or renamed before it decodes and encodes every image again.
    return split.cast_column(next(iter(columns)), datasets.Image(decode=False)).select_columns(list(columns))


def _rename(split, columns: dict[str, str]):
    return split.rename_columns({old: new for old, new in columns.items() if old != new})


def _by_shard(
    split: datasets.IterableDataset, columns: dict[str, str], files: list[str], args: DataArguments
) -> ShardedRows:
    split = _undecoded(split, columns)
    # `datasets` would take 0.1 ms per row to rename columns, and 10 ms per shard to copy the names of 1,000 classes,
    # which only sources other than parquet need to make numbers of them.
    for column, name in columns.items():
        if name == "label" and are_parquet(files):
            split = split.cast_column(column, datasets.Value("int64"))
    rows = ShardedRows(split, columns, count_rows(split, files, args.max_train_samples))
    _check_size(rows, args.train_split)
    return rows if args.max_train_samples is None else rows.first(args.max_train_samples)


def _by_index(
    split: datasets.Dataset, name: str, columns: dict[str, str], limit: int | None
) -> tuple[datasets.Dataset, SplitLabels]:
    """The rows that are used, and the labels of all."""
    _check_size(split, name)
    whole = _rename(_undecoded(split, columns), columns)
    rows = whole if limit is None else whole.select(range(min(limit, len(whole))))
    _check_images(rows, name, columns)
    return rows, SplitLabels(name, read_labels(whole), len(rows))


def _check_size(split: datasets.Dataset | ShardedRows, name: str) -> None:
    if len(split) == 0:
        raise ValueError(f"split {name!r} is empty: choose another")


def _check_images(rows: datasets.Dataset, name: str, columns: dict[str, str]) -> None:
    tried = min(TRIED_IMAGES, len(rows))
    for row in rows.select(range(tried)):
        with suppress(OSError):
            if row["image"] is not None:
                decode_image(row["image"])
                return
    raise ValueError(
        f"none of the first {tried} images of split {name!r}, column {next(iter(columns))!r}, can be read: check the files, "
        "or name another column with --image_column"
    )


def _class_names(features: datasets.Features, columns: dict[str, str]) -> list[str]:
    label = features[_label_column(columns)] if "label" in columns.values() else None
    return label.names if isinstance(label, datasets.ClassLabel) else []


def _label_column(columns: dict[str, str]) -> str:
    return next(column for column, name in columns.items() if name == "label")


def load_digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits at 32 px: 1,437 to train on and 360 to test, classes balanced."""
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
