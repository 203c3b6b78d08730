"""From a dataset's name to rows `{"image": {"bytes", "path"}, "label"}`, which `images.py` turns into views.

This module alone knows what a dataset calls its columns.
"""

import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from modeling_moco import MoCoConfig, MoCoImageProcessor

from .augment import EvaluationView

EVAL_SPLITS = ("validation", "test", "valid", "val")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")


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
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on the first so many images (streaming: so many images make an epoch)"}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on the first so many images"})
    image_size: int = field(default=224, metadata={"help": "side of a view in pixels"})
    eval_resize: int | None = field(
        default=None, metadata={"help": "short side before the evaluation crop; by default image_size * 256 / 224"}
    )
    augmentation: Literal["v1", "v2", "cifar"] = field(default="v2", metadata={"help": "random views of pretraining"})
    horizontal_flip: bool = field(
        default=True, metadata={"help": "switch off where a mirror image means another thing"}
    )
    crop_min_scale: float | None = field(
        default=None, metadata={"help": "smallest crop as a share of the image; by default that of the augmentation"}
    )

    def __post_init__(self):
        if self.image_size < 1:
            raise ValueError(f"image_size ({self.image_size}) must be at least 1 pixel")
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
        train, eval: a `datasets.Dataset`, or with `--streaming` an IterableDataset; `eval` is None without such a split.
    """

    train: Any
    eval: Any
    class_names: list[str]


def load_images(args: DataArguments, labelled: bool = False) -> ImageSplits:
    """Open a dataset and give its columns their names.

    Args:
        labelled: insist on labels and on a split to evaluate on.

    Raises:
        ValueError: no such dataset, split or column; a column that holds no images; an empty split.
    """
    splits = _open(args)
    if args.train_split not in splits:
        raise ValueError(
            f"train_split ({args.train_split!r}) is not in {args.dataset_name}: it has {', '.join(splits)}"
        )
    if args.eval_split is not None and args.eval_split not in splits:
        raise ValueError(f"eval_split ({args.eval_split!r}) is not in {args.dataset_name}: it has {', '.join(splits)}")
    eval_split = args.eval_split or next((name for name in EVAL_SPLITS if name in splits), None)
    image_column, label_column = _find_columns(splits[args.train_split].features, args)
    train, class_names = _rename(splits[args.train_split], image_column, label_column)
    evaluation = None
    if eval_split is not None and eval_split != args.train_split:
        evaluation, _ = _rename(splits[eval_split], image_column, label_column)
    if not args.streaming:
        train = _first(train, args.max_train_samples, args.train_split)
        if evaluation is not None:
            evaluation = _first(evaluation, args.max_eval_samples, str(eval_split))
    if labelled and not class_names:
        raise ValueError(
            f"{args.dataset_name} has no label column: name it with --label_column or choose another dataset"
        )
    if labelled and evaluation is None:
        raise ValueError(
            f"{args.dataset_name} has no split to evaluate on beside {', '.join(splits)}: name one with --eval_split; a "
            "folder of images has splits as FOLDER/train/CLASS and FOLDER/test/CLASS"
        )
    return ImageSplits(train, evaluation, class_names)


def _open(args: DataArguments) -> dict[str, Any]:
    name, path = args.dataset_name, Path(args.dataset_name)
    if name == "digits":
        digits = load_digits()
        return {k: v.to_iterable_dataset(num_shards=4) for k, v in digits.items()} if args.streaming else digits
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
            files = {args.train_split: str(path)}
            return datasets.load_dataset(builders[path.suffix], data_files=files, streaming=args.streaming)
        return datasets.load_dataset(name, args.dataset_config_name, streaming=args.streaming)
    except (OSError, ValueError, DatasetGenerationError, tarfile.ReadError) as error:
        raise ValueError(
            f"dataset_name ({name}) could not be opened as a folder, a file of images or a Hub dataset ({error}): check "
            "the name and its splits"
        ) from error


def _find_columns(features: datasets.Features, args: DataArguments) -> tuple[str, str | None]:
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
    return args.image_column or images[0], args.label_column or (labels[0] if labels else None)


def _holds_integers(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and "int" in feature.dtype


def _rename(split, image_column: str, label_column: str | None):
    names: list[str] = []
    columns = {image_column: "image"}
    if label_column is not None:
        columns[label_column] = "label"
        feature = split.features[label_column]
        if isinstance(feature, datasets.ClassLabel):
            names = feature.names
        elif isinstance(split, datasets.Dataset):
            names = [str(i) for i in range(max(split.unique(label_column)) + 1)]
    # First the cast: a stream whose columns are selected or renamed before it decodes and encodes every image again.
    split = split.cast_column(image_column, datasets.Image(decode=False)).select_columns(list(columns))
    return split.rename_columns({old: new for old, new in columns.items() if old != new}), names


def _first(split: datasets.Dataset, count: int | None, name: str) -> datasets.Dataset:
    if len(split) == 0:
        raise ValueError(f"split {name!r} is empty: choose another")
    return split if count is None else split.select(range(min(count, len(split))))


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


def images_per_epoch(source: datasets.IterableDataset, args: DataArguments) -> int:
    """Length of an epoch of a stream, which the learning-rate schedule needs.

    Raises:
        ValueError: neither the dataset nor the user says.
    """
    if args.max_train_samples is not None:
        return args.max_train_samples
    splits = source.info.splits or {}
    if args.train_split in splits and splits[args.train_split].num_examples:
        return splits[args.train_split].num_examples
    raise ValueError(
        f"{args.dataset_name} does not say how many images it has: pass --max_train_samples, the images of one epoch"
    )
