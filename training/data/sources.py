"""Open a dataset by its name as rows `{"image": {"bytes", "path"}, "label"}`, which `images.py` turns into views.

No other module uses the dataset's own column names.
"""

import re
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np

from modeling_moco import MoCoConfig, MoCoImageProcessor
from modeling_moco.distributed_moco import rank

from ..engine.run_folder import DIGITS
from ..errors import shown
from ..views.pil import EvaluationView
from .decode import MAX_PIXELS, Decoder, Unreadable, name_of
from .folders import HOW
from .formats import COMMIT, Opened, absolute_name, image_columns, open_dataset
from .images import MapImages
from .labels import SplitLabels, find_label_problem, find_renamed_class, number_classes, read_labels, subset_warnings
from .shards import ShardedRows, are_parquet, count_rows

MAX_IN_MEMORY_PX = 64  # largest side of images that the view backend `device` keeps in memory
EVAL_SPLITS = ("validation", "test", "valid", "val")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
LOOKED_AT = 16  # images of a split that are decoded before anything is trained
FLAT = 17  # grey levels; less in every channel is no picture: what 12 bits in 16 have at most


@dataclass
class SourceArguments:
    """Flags of every command that reads a dataset: where the images and their labels are."""

    _argument_group_name = "data"
    streaming = False  # images are read by index, unless pretraining sets its own field

    # What identified the rows of each split when the run began that this data is of; None for any data.
    content: dict[str, str] | None = field(default=None, init=False, repr=False)

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "A folder (of images as in FOLDER/train/CLASS, of parquet files, of webdataset tars); one parquet or tar "
            "file; the name of a Hub dataset; or 'digits', which scikit-learn contains."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": f"Split to evaluate on. By default the first of {', '.join(EVAL_SPLITS)} that is not trained on."
        },
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images. By default the only image column."}
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column of the classes. By default 'label', else the only class column, if there is one."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Number of first images to train on. By default all."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Number of first images to evaluate on. By default all."}
    )
    max_image_pixels: int = field(
        default=MAX_PIXELS,
        metadata={"help": "Images with more pixels are skipped like unreadable ones, before they take memory."},
    )

    def __post_init__(self):
        self.dataset_name = absolute_name(self.dataset_name)  # a run is continued and evaluated from anywhere
        for name in ("max_train_samples", "max_eval_samples"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name} ({count}) must be at least 1: leave it out for all images")
        if self.max_image_pixels < 1:
            raise ValueError(
                f"max_image_pixels ({self.max_image_pixels}) must be at least 1: leave it out for {MAX_PIXELS:,}"
            )

    @property
    def local(self) -> bool:
        """Whether the images are files of this machine, and so may be somebody's own."""
        return Path(self.dataset_name).is_absolute()

    @property
    def commit(self) -> str | None:
        """The commit on the Hub that the run of this data was begun with; None for another source, or any commit."""
        found = [re.search(rf"\b{COMMIT}([0-9a-f]{{40}})$", text) for text in (self.content or {}).values()]
        return next((commit[1] for commit in found if commit), None)


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

    @property
    def view_in_words(self) -> str:
        """That view, as results name it."""
        return f"short side {self.evaluation_view().resize} px, centre {self.image_size} px"

    def image_processor(self, config: MoCoConfig) -> MoCoImageProcessor:
        """The evaluation view as an image processor of transformers, which is saved beside the model."""
        return MoCoImageProcessor(
            size={"shortest_edge": self.evaluation_view().resize},
            crop_size={"height": self.image_size, "width": self.image_size},
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
        )


@dataclass
class SplitDataArguments(EvaluationDataArguments):
    """Flags of a command that reads every split of a dataset in the fixed view, labelled or not."""

    NOT_OFFERED: ClassVar[tuple[str, ...]] = ("train_split", "eval_split", "max_train_samples", "max_eval_samples")

    splits: list[str] = field(default_factory=list, metadata={"help": "Splits to read. By default all."})
    max_samples: int | None = field(
        default=None, metadata={"help": "Number of first images of each split. By default all."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples ({self.max_samples}) must be at least 1: leave it out for all images")


@dataclass
class CropDataArguments(EvaluationDataArguments):
    """Flags of the linear probe and of fine-tuning, which train on random crops and flips."""

    horizontal_flip: bool = field(
        default=True,
        metadata={"help": "Mirror random views. Turn it off where a mirror image has another meaning."},
    )

    @property
    def flips_in_words(self) -> str:
        """What results say of them after other words; nothing of the protocols' own."""
        return "" if self.horizontal_flip else ", no flips"


@dataclass
class DataArguments(CropDataArguments):
    """Flags of pretraining: also the random views, and streaming.

    Raises:
        ValueError: a value is out of its range.
    """

    augmentation: str = field(
        default="v2",
        metadata={
            "help": "Distribution of the random views: v1, v2 or v3, those of MoCo; cifar, that of the official CIFAR-10 "
            "notebook; simclr or simclr_cifar, those of SimCLR; crop, without changes of colour; or a name that "
            "register_policy was given."
        },
    )
    view_backend: Literal["pil", "cv2", "device"] = field(
        default="pil",
        metadata={
            "help": "Renderer of the views. pil is the reference; cv2 makes nearly the same views three times as fast; device "
            f"makes them in batches on the GPU, and keeps images of up to {MAX_IN_MEMORY_PX} px in memory."
        },
    )
    decode: Literal["exact", "scaled"] = field(
        default="exact",
        metadata={
            "help": "scaled: JPEG files are decoded at 1/2, 1/4 or 1/8 of their sides where the crops are larger than the "
            "views; large photographs take half the time, and views differ by about a grey level on average."
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
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer ({self.shuffle_buffer}) must be at least 1 image, which shuffles nothing")
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
        place: "dataset", its name or absolute path, and "content", which identifies the rows of both splits: number and
            digest of local files, or the commit on the Hub.
        decoder: of the images of both splits.
    """

    train: Any
    eval: Any
    class_names: list[str]
    about: dict[str, Any] = field(default_factory=dict)
    label_problem: str | None = None
    place: dict[str, Any] = field(default_factory=dict)
    decoder: Decoder = field(default_factory=Decoder)

    def __post_init__(self):
        # Here, because a run looks at the same rows in several views.
        if self.train is not None:
            self.broken = Unreadable(len(self.train))
        if isinstance(self.eval, datasets.Dataset):
            self.broken_eval = Unreadable(len(self.eval), self.about.get("split") or "the evaluated split")

    def train_in(self, view: EvaluationView) -> MapImages:
        """The images of the train split in the view of evaluation, by index."""
        return MapImages(self.train, view, decode=self.decoder.image, broken=self.broken)

    def eval_in(self, view: EvaluationView) -> MapImages:
        """Those of the split to evaluate on."""
        return MapImages(self.eval, view, decode=self.decoder.image, broken=self.broken_eval)


def load_images(args: EvaluationDataArguments, labelled: bool = False) -> ImageSplits:
    """Open a dataset and rename its columns to `image` and `label`.

    Args:
        args: source of the images, and the evaluation view, which `about` names.
        labelled: whether to require labels that an evaluation can use, and to warn where classes are missing.

    Raises:
        ValueError: the dataset, a split or a column does not exist; the image column contains no images; a split is empty; or
            `labelled` is set and an evaluation cannot use the labels.
    """
    asked = {args.eval_split} if args.train_split == "train" else {args.train_split, args.eval_split}
    opened = _open(args, {split for split in asked if split is not None})
    splits = opened.splits
    eval_split = _find_eval_split(splits, args)
    _check_same_content(opened, args, [args.train_split, str(eval_split)])
    features = splits[args.train_split].features
    columns = _find_columns(features, args)
    decoder = Decoder(args.max_image_pixels, opened.places)
    class_names = _class_names(features, columns)
    problem = _missing_for_evaluation(splits, eval_split, columns, args, opened.from_folders)
    problem = problem or _find_renamed_class(opened, {args.train_split: columns, str(eval_split): columns})
    evaluation: Any = None
    if args.streaming:
        train = _by_shard(opened, columns, args, decoder)
        if eval_split is not None:
            evaluation = _rename(_undecoded(splits[eval_split], columns), columns)
    else:
        train, labels = _by_index(splits[args.train_split], args.train_split, columns, args.max_train_samples, decoder)
        class_names = class_names or number_classes(labels.whole)
        if eval_split is not None:
            evaluation, eval_labels = _by_index(splits[eval_split], eval_split, columns, args.max_eval_samples, decoder)
        if problem is None:
            problem = find_label_problem(class_names, labels, eval_labels, opened.from_folders)
        if labelled and problem is None and rank() == 0:
            for warning in subset_warnings(class_names, labels, eval_labels):
                print(f"warning: {warning}")
    if labelled and problem is not None:
        raise ValueError(problem)
    used = {split: opened.content[split] for split in (args.train_split, eval_split) if split in opened.content}
    about = {
        "dataset": args.dataset_name,
        "local": args.local,
        "config": args.dataset_config_name,
        "revision": opened.content.get(args.train_split),
        "train_split": args.train_split,
        "train_images": len(train),
        "split": eval_split,
        "split_images": len(evaluation) if isinstance(evaluation, datasets.Dataset) else None,
        "split_revision": opened.content.get(str(eval_split)),
        "label_column": next((column for column, name in columns.items() if name == "label"), None),
        "classes": len(class_names),
        "view": args.view_in_words,
    }
    place = {"dataset": args.dataset_name, "content": used}
    return ImageSplits(train, evaluation, class_names, about, problem, place, decoder)


@dataclass
class AllSplits:
    """Rows `{"image": {"bytes", "path"}, "label"}` of several splits of a dataset.

    Args:
        rows: of each split, by its name; without labels they have no second column.
        class_names: by class number; empty where the dataset has no names, or no labels.
        content: what identifies the rows of each split: number and digest of local files, the commit on the Hub, or a
            fingerprint.
        decoder: of the images of all splits.
    """

    rows: dict[str, datasets.Dataset]
    class_names: list[str]
    content: dict[str, str]
    decoder: Decoder


def load_splits(args: SplitDataArguments) -> AllSplits:
    """Open a dataset and rename its columns to `image` and `label`, for all its splits or those that `args` names.

    Raises:
        ValueError: the dataset, a split or a column does not exist; the image column contains no images; a split is empty; or
            a class number has two names.
    """
    opened = _open(args, set(args.splits))
    if missing := [split for split in args.splits if split not in opened.splits]:
        raise ValueError(f"splits ({missing[0]!r}) is not in {args.dataset_name}: it has {', '.join(opened.splits)}")
    names = list(dict.fromkeys(args.splits or opened.splits))
    _check_same_content(opened, args, names)
    decoder = Decoder(args.max_image_pixels, opened.places)
    columns = {name: _find_columns(opened.splits[name].features, args) for name in names}
    if (problem := _find_renamed_class(opened, columns)) is not None:
        raise ValueError(problem)
    rows, content = {}, {}
    class_names: list[str] = []
    for name in names:
        split = opened.splits[name]
        rows[name], _ = _by_index(split, name, columns[name], args.max_samples, decoder)
        class_names = class_names or _class_names(split.features, columns[name])
        content[name] = opened.content.get(name) or f"{len(split):,} images {split._fingerprint}"
    return AllSplits(rows, class_names, content, decoder)


class NotOpenedError(ValueError):
    """A dataset does not exist, no longer or not yet, or it cannot be reached or read."""


def _open(args: SourceArguments, asked: set[str]) -> Opened:
    try:
        opened = open_dataset(
            args.dataset_name,
            args.dataset_config_name,
            streaming=args.streaming,
            train_split=args.train_split,
            asked=asked,
            label_column=args.label_column or "label",
            commit=args.commit,
        )
    except ValueError as error:
        raise NotOpenedError(str(error)) from error
    if rank() == 0 and opened.account is not None:
        print(f"{args.dataset_name}: {opened.account}")
    if rank() == 0 and args.dataset_name == DIGITS and Path(DIGITS).exists():
        print(f"{DIGITS}: scikit-learn's; the folder of that name here is ./{DIGITS}")
    return opened


def _check_same_content(opened: Opened, args: SourceArguments, names: list[str]) -> None:
    for split in names:
        now, then = opened.content.get(split), (args.content or {}).get(split)
        if then is not None and now != then:
            raise ValueError(
                f"{args.dataset_name} is not what the run was begun with: split {split!r} was {shown(then)} and is {now}. "
                "Bring its files back, or name other data with --dataset_name"
            )


def _find_eval_split(splits: dict[str, Any], args: SourceArguments) -> str | None:
    for name, split in (("train_split", args.train_split), ("eval_split", args.eval_split)):
        if split is not None and split not in splits:
            raise ValueError(f"{name} ({split!r}) is not in {args.dataset_name}: it has {', '.join(splits)}")
    if args.eval_split == args.train_split:
        raise ValueError(
            f"eval_split ({args.eval_split!r}) is the split that is trained on: name another of {args.dataset_name}, which "
            f"has {', '.join(splits)}"
        )
    return args.eval_split or next((name for name in EVAL_SPLITS if name in splits and name != args.train_split), None)


def _missing_for_evaluation(
    splits: dict[str, Any], eval_split: str | None, columns: dict[str, str], args: SourceArguments, from_folders: bool
) -> str | None:
    if "label" not in columns.values():
        features = splits[args.train_split].features
        others = [f"{name!r} holds {features[name]}" for name in LABEL_COLUMNS if name in features]
        if others:
            return (
                f"{args.dataset_name} has no column of class numbers: {others[0]}. Convert it to a ClassLabel with `datasets`' "
                "class_encode_column, or name another column with --label_column"
            )
        remedy = "name it with --label_column or choose another dataset"
        if from_folders:
            remedy = f"write {HOW}, list them in a metadata.csv with the columns file_name and label, or {remedy}"
        return f"{args.dataset_name} has no label column: {remedy}"
    if eval_split is None:
        return (
            f"{args.dataset_name} has no split to evaluate on, only {', '.join(splits)}: name one with --eval_split; the "
            "splits of a folder of images are FOLDER/train/CLASS and FOLDER/test/CLASS"
        )
    return None


def _find_columns(features: datasets.Features, args: SourceArguments) -> dict[str, str]:
    """Map the image column to `image` and the label column, if there is one, to `label`."""
    for name, column in (("image_column", args.image_column), ("label_column", args.label_column)):
        if column is not None and column not in features:
            raise ValueError(f"{name} ({column!r}) is not in {args.dataset_name}: it has {', '.join(features)}")
    images = image_columns(features)
    if args.image_column is not None and args.image_column not in images:
        raise ValueError(
            f"image_column ({args.image_column!r}) of {args.dataset_name} contains {features[args.image_column]}, not images: "
            f"its image columns are {', '.join(images) or 'absent'}"
        )
    if args.image_column is None and len(images) != 1:
        raise ValueError(
            f"{args.dataset_name} has {len(images)} image columns ({', '.join(images) or 'none'}) among "
            f"{', '.join(features)}: {_remedy(images)}"
        )
    if (
        args.label_column is not None
        and not isinstance(features[args.label_column], datasets.ClassLabel)
        and not _holds_integers(features[args.label_column])
    ):
        raise ValueError(
            f"label_column ({args.label_column!r}) of {args.dataset_name} contains {features[args.label_column]}, not "
            "classes: name another, or convert it to a ClassLabel with `datasets`' class_encode_column"
        )
    columns = {args.image_column or images[0]: "image"}
    label = args.label_column or _find_label_column(features, args)
    if label is not None:
        columns[label] = "label"
    return columns


def _remedy(images: list[str]) -> str:
    if images and all("." in name for name in images):  # of the members of a tar
        return (
            "a webdataset tar takes what follows the first dot of a name as its column: write names such as 000123.jpg"
        )
    return (
        "name one with --image_column"
        if images
        else "store the bytes of the images' files in one; paths, lists and arrays are not read"
    )


def _find_label_column(features: datasets.Features, args: SourceArguments) -> str | None:
    """The column called label, else the only column of classes.

    Raises:
        ValueError: there are several.
    """
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    found += [name for name in LABEL_COLUMNS if _holds_integers(features.get(name))]
    if "label" in features:
        return "label" if "label" in found else None  # then it holds no classes, and another would hold other ones
    if len(found) > 1:
        raise ValueError(
            f"{args.dataset_name} has {len(found)} class columns ({', '.join(found)}): name one with --label_column"
        )
    return next(iter(found), None)


def _holds_integers(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and "int" in feature.dtype


def _undecoded(split, columns: dict[str, str]):
    # The cast comes first: after a selection or a renaming, a stream would decode and encode every image again.
    return split.cast_column(next(iter(columns)), datasets.Image(decode=False)).select_columns(list(columns))


def _rename(split, columns: dict[str, str]):
    return split.rename_columns({old: new for old, new in columns.items() if old != new})


def _by_shard(opened: Opened, columns: dict[str, str], args: SourceArguments, decoder: Decoder) -> ShardedRows:
    split, files = _undecoded(opened.splits[args.train_split], columns), opened.files.get(args.train_split, [])
    # ShardedRows renames the columns, because `datasets` takes 0.1 ms per row. Parquet files hold class numbers, so their
    # class names are dropped: copying 1,000 names takes 10 ms per shard.
    for column, name in columns.items():
        if name == "label" and are_parquet(files):
            split = split.cast_column(column, datasets.Value("int64"))
    lengths = opened.lengths.get(args.train_split) or count_rows(split, files, args.max_train_samples)
    rows = ShardedRows(split, columns, lengths, files)
    _check_size(rows, args.train_split)
    _look_at_images(list(islice(rows, LOOKED_AT)), args.train_split, columns, decoder)  # others would take more shards
    return rows if args.max_train_samples is None else rows.first(args.max_train_samples)


def _by_index(
    split: datasets.Dataset, name: str, columns: dict[str, str], limit: int | None, decoder: Decoder
) -> tuple[datasets.Dataset, SplitLabels]:
    """The rows that are used, and the labels of all rows."""
    _check_size(split, name)
    whole = _rename(_undecoded(split, columns), columns)
    rows = whole if limit is None else whole.select(range(min(limit, len(whole))))
    _look_at_images(rows, name, columns, decoder)
    return rows, SplitLabels(name, read_labels(whole), len(rows))


def _check_size(split: datasets.Dataset | ShardedRows, name: str) -> None:
    if len(split) == 0:
        raise ValueError(f"split {name!r} is empty: choose another")


def _look_at_images(rows: Any, name: str, columns: dict[str, str], decoder: Decoder) -> None:
    """Decode some images: a decoder succeeds with pictures without content, which nothing could be learnt from.

    Raises:
        ValueError: none can be read; all are of one colour, or nearly; or all are alike.
    """
    rows = [rows[i * len(rows) // LOOKED_AT] for i in range(LOOKED_AT)] if len(rows) > LOOKED_AT else list(rows)
    flat, seen, reason = [], set(), ""
    for index, row in enumerate(rows):
        try:
            image = decoder.image(row["image"])
        except OSError as error:
            reason = reason or str(error)
            continue
        seen.add(sha256(image.tobytes()).digest())
        if np.ptp(image.getextrema(), axis=1).max() < FLAT:  # the least and the greatest level of each channel
            flat.append(name_of(row, f"row {index}"))
    where = f"of the {len(rows)} images looked at in split {name!r}"
    if not seen:
        raise ValueError(
            f"none {where}, column {next(iter(columns))!r}, can be read ({reason}): check the files, or name another column "
            "with --image_column"
        )
    if len(flat) == len(rows):
        raise ValueError(
            f"each {where} is of one colour, or nearly ({flat[0]}): if the files have 12 bits in 16, scale their levels to 16"
        )
    if len(seen) == 1 and len(rows) > 1:
        raise ValueError(f"all {where} are alike ({name_of(rows[0], 'row 0')}): check how they were written")
    if flat and rank() == 0:
        print(f"warning: {len(flat)} {where} are of one colour, or nearly, for example {flat[0]}")


def _class_names(features: datasets.Features, columns: dict[str, str]) -> list[str]:
    label = features[_label_column(columns)] if "label" in columns.values() else None
    return label.names if isinstance(label, datasets.ClassLabel) else []


def _find_renamed_class(opened: Opened, columns: dict[str, dict[str, str]]) -> str | None:
    labelled = {
        split: (_label_column(found), opened.splits[split].features)
        for split, found in columns.items()
        if "label" in found.values()
    }
    return find_renamed_class(labelled, opened.files)


def _label_column(columns: dict[str, str]) -> str:
    return next(column for column, name in columns.items() if name == "label")
