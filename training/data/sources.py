"""Open a dataset by its name as rows `{"image": {"bytes", "path"}, "label"}`, which `images.py` turns into views.

No other module uses the dataset's own column names.
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

MAX_IN_MEMORY_PX = 64  # largest side of images that the view backend `device` keeps in memory
EVAL_SPLITS = ("validation", "test", "valid", "val")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
TRIED_IMAGES = 8  # number of first images of a split, of which one must be readable


@dataclass
class SourceArguments:
    """Flags of every command that reads a dataset: where the images and their labels are."""

    _argument_group_name = "data"
    streaming = False  # images are read by index, unless pretraining sets its own field

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "Name of a Hub dataset; a folder (of images in one folder per class, of parquet files, of webdataset "
            "tars); one parquet or tar file; or 'digits', which scikit-learn contains."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": f"Split to evaluate on. By default the first of {', '.join(EVAL_SPLITS)}."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images. By default the only image column."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the classes. By default the only class column, if there is one."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Number of first images to train on. By default all."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Number of first images to evaluate on. By default all."}
    )

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name} ({count}) must be at least 1: leave it out for all images")


@dataclass
class EvaluationDataArguments(SourceArguments):
    """Flags of an evaluation on frozen features: the source and the fixed view."""

    image_size: int = field(default=224, metadata={"help": "Side of a view in pixels."})
    eval_resize: int | None = field(
        default=None,
        metadata={
            "help": "Length in pixels to which an evaluation resizes the short side before the centre crop. By default "
            "image_size * 256 / 224."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.image_size < 1:
            raise ValueError(f"image_size ({self.image_size}) must be at least 1 pixel: ImageNet recipes use 224")
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(
                f"eval_resize ({self.eval_resize}) is smaller than image_size ({self.image_size}): raise it, or the "
                "evaluation crop would be padded"
            )

    def evaluation_view(self) -> EvaluationView:
        """The fixed view of kNN, probes and pipelines."""
        return EvaluationView(self.eval_resize or round(self.image_size * 256 / 224), self.image_size)

    def image_processor(self, config: MoCoConfig) -> MoCoImageProcessor:
        """The evaluation view as an image processor of transformers, which is saved beside the model."""
        return MoCoImageProcessor(
            size={"shortest_edge": self.evaluation_view().resize},
            crop_size={"height": self.image_size, "width": self.image_size},
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
        )


@dataclass
class CropDataArguments(EvaluationDataArguments):
    """Flags of the linear probe and of fine-tuning, which train on random crops and flips."""

    horizontal_flip: bool = field(
        default=True,
        metadata={"help": "Mirror random views. Turn it off where a mirror image has another meaning."},
    )


@dataclass
class DataArguments(CropDataArguments):
    """Flags of pretraining: also the random views, and streaming.

    Raises:
        ValueError: a value is out of its range.
    """

    augmentation: Literal["v1", "v2", "cifar"] = field(
        default="v2",
        metadata={
            "help": "Distribution of the random views: of MoCo v1, of MoCo v2, or of the official CIFAR-10 notebook."
        },
    )
    view_backend: Literal["pil", "cv2", "device"] = field(
        default="pil",
        metadata={
            "help": "Renderer of the views. pil is the reference; cv2 makes nearly the same views three times as fast; device "
            f"makes them in batches on the GPU, and keeps images of up to {MAX_IN_MEMORY_PX} px in memory."
        },
    )
    crop_min_scale: float | None = field(
        default=None,
        metadata={"help": "Smallest area of a crop, as a fraction of the image. By default that of the augmentation."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read shards in sequence. By default images are read by index."}
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Number of images in the shuffle buffer of each process, with --streaming."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.crop_min_scale is not None and not 0 < self.crop_min_scale <= 1:
            raise ValueError(
                f"crop_min_scale ({self.crop_min_scale}) must lie in (0, 1]: it is a fraction of the image's area"
            )


@dataclass
class ImageSplits:
    """Rows `{"image": {"bytes", "path"}, "label"}` of two splits. Datasets without labels have no second column.

    Args:
        train: a `datasets.Dataset`, or with `--streaming` a [`ShardedRows`].
        eval: a `datasets.Dataset`, or with `--streaming` an IterableDataset; None without such a split.
        class_names: by class number; empty without labels.
        about: description of the data for results: names and revisions of dataset and splits, classes, evaluation view.
        label_problem: why an evaluation cannot use the labels; None if it can.
    """

    train: Any
    eval: Any
    class_names: list[str]
    about: dict[str, Any] = field(default_factory=dict)
    label_problem: str | None = None


def load_images(args: EvaluationDataArguments, labelled: bool = False) -> ImageSplits:
    """Open a dataset and rename its columns to `image` and `label`.

    Args:
        args: source of the images, and the evaluation view, which `about` names.
        labelled: whether to require labels that an evaluation can use, and to warn where classes are missing.

    Raises:
        ValueError: the dataset, a split or a column does not exist; the image column contains no images; a split is empty; or
            `labelled` is set and an evaluation cannot use the labels.
    """
    splits, files = _open(args)
    eval_split = _find_eval_split(splits, args)
    features = splits[args.train_split].features
    columns = _find_columns(features, args)
    class_names = _class_names(features, columns)
    problem = _missing_for_evaluation(splits, eval_split, columns, args)
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
        if problem is None:
            read = [*files.get(args.train_split, []), *files.get(str(eval_split), [])]
            column, from_folders = _label_column(columns), splits[args.train_split].info.builder_name == "imagefolder"
            problem = find_renamed_class(features[column], column, read)
            problem = problem or find_label_problem(class_names, labels, eval_labels, from_folders)
        if labelled and problem is None and rank() == 0:
            for warning in subset_warnings(class_names, labels, eval_labels):
                print(f"warning: {warning}")
    if labelled and problem is not None:
        raise ValueError(problem)
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
    return ImageSplits(train, evaluation, class_names, about, problem)


def _find_eval_split(splits: dict[str, Any], args: SourceArguments) -> str | None:
    for name, split in (("train_split", args.train_split), ("eval_split", args.eval_split)):
        if split is not None and split not in splits:
            raise ValueError(f"{name} ({split!r}) is not in {args.dataset_name}: it has {', '.join(splits)}")
    eval_split = args.eval_split or next((name for name in EVAL_SPLITS if name in splits), None)
    return None if eval_split == args.train_split else eval_split


def _missing_for_evaluation(
    splits: dict[str, Any], eval_split: str | None, columns: dict[str, str], args: SourceArguments
) -> str | None:
    if "label" not in columns.values():
        features = splits[args.train_split].features
        others = [f"{name!r} holds {features[name]}" for name in LABEL_COLUMNS if name in features]
        if others:
            return (
                f"{args.dataset_name} has no column of class numbers: {others[0]}. Convert it to a ClassLabel with `datasets`' "
                "class_encode_column, or name another column with --label_column"
            )
        return f"{args.dataset_name} has no label column: name it with --label_column or choose another dataset"
    if eval_split is None:
        return (
            f"{args.dataset_name} has no split to evaluate on, only {', '.join(splits)}: name one with --eval_split; the "
            "splits of a folder of images are FOLDER/train/CLASS and FOLDER/test/CLASS"
        )
    return None


def _revision(split) -> str:
    """The commit of a Hub dataset, or the fingerprint that `datasets` computes of a local one."""
    for url in split.info.download_checksums or {}:  # hf://datasets/NAME@COMMIT/FILE
        if url.startswith("hf://") and "@" in url:
            return url.split("@", 1)[1].split("/", 1)[0]
    return f"fingerprint {split._fingerprint}" if isinstance(split, datasets.Dataset) else "unknown (streamed)"


def _open(args: SourceArguments) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The splits by name, and the files of each split."""
    name, path = args.dataset_name, Path(args.dataset_name)
    if name == "digits":
        digits = load_digits()
        return {k: v.to_iterable_dataset(num_shards=4) for k, v in digits.items()} if args.streaming else digits, {}
    if path.is_file():
        builders = {".parquet": "parquet", ".tar": "webdataset"}
        if path.suffix not in builders:
            raise ValueError(
                f"dataset_name ({name}) is a file, but neither .parquet nor .tar: pass the folder that contains it"
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
        files = builder.config.data_files or {}  # empty where a Hub dataset comes from the cache
        if args.streaming:
            return builder.as_streaming_dataset(), files
        builder.download_and_prepare()
        return builder.as_dataset(), files
    except (OSError, ValueError, DatasetGenerationError, tarfile.ReadError) as error:
        raise ValueError(
            f"dataset_name ({name}) cannot be opened as a folder, a file of images or a Hub dataset ({error}): check the "
            "name and its splits"
        ) from error


def _find_columns(features: datasets.Features, args: SourceArguments) -> dict[str, str]:
    """Map the image column to `image` and the label column, if there is one, to `label`."""
    for name, column in (("image_column", args.image_column), ("label_column", args.label_column)):
        if column is not None and column not in features:
            raise ValueError(f"{name} ({column!r}) is not in {args.dataset_name}: it has {', '.join(features)}")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if args.image_column is not None and args.image_column not in images:
        raise ValueError(
            f"image_column ({args.image_column!r}) of {args.dataset_name} contains {features[args.image_column]}, not images: "
            f"its image columns are {', '.join(images) or 'absent'}"
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
            f"label_column ({args.label_column!r}) of {args.dataset_name} contains {features[args.label_column]}, not "
            "classes: name another, or convert it to a ClassLabel with `datasets`' class_encode_column"
        )
    columns = {args.image_column or images[0]: "image"}
    if args.label_column or labels:
        columns[args.label_column or labels[0]] = "label"
    return columns


def _holds_integers(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and "int" in feature.dtype


def _undecoded(split, columns: dict[str, str]):
    # The cast comes first: after a selection or a renaming, a stream would decode and encode every image again.
    return split.cast_column(next(iter(columns)), datasets.Image(decode=False)).select_columns(list(columns))


def _rename(split, columns: dict[str, str]):
    return split.rename_columns({old: new for old, new in columns.items() if old != new})


def _by_shard(
    split: datasets.IterableDataset, columns: dict[str, str], files: list[str], args: SourceArguments
) -> ShardedRows:
    split = _undecoded(split, columns)
    # ShardedRows renames the columns, because `datasets` takes 0.1 ms per row. Parquet files hold class numbers, so their
    # class names are dropped: copying 1,000 names takes 10 ms per shard.
    for column, name in columns.items():
        if name == "label" and are_parquet(files):
            split = split.cast_column(column, datasets.Value("int64"))
    rows = ShardedRows(split, columns, count_rows(split, files, args.max_train_samples))
    _check_size(rows, args.train_split)
    return rows if args.max_train_samples is None else rows.first(args.max_train_samples)


def _by_index(
    split: datasets.Dataset, name: str, columns: dict[str, str], limit: int | None
) -> tuple[datasets.Dataset, SplitLabels]:
    """The rows that are used, and the labels of all rows."""
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
