"""Fine-tuning: all labels or a few train the encoder and a new classifier, each at its own learning rate.

Sources of the defaults:

- 1 % and 10 % of the labels: VICReg (arXiv:2105.04906, README and evaluate.py of facebookresearch/vicreg): SGD with momentum
  0.9, no weight decay, batch 256, 20 epochs, a cosine in whole epochs, crops and flips. Its peers have other learning
  rates for the same, e.g. SwAV (arXiv:2006.09882) 0.02 and 5 with 1 %, 0.01 and 0.2 with 10 %: learning rates belong to an
  encoder, and none of these is MoCo's.
- All labels: 0.05 for 256 images is SimCLR's (arXiv:2002.05709, appendix B.5), 30 epochs are SimCLRv2's (arXiv:2006.10029).
  The rest is this project's choice and as above, one learning rate for both parts included.

The peers take their few images from the lists that SimCLR published for ImageNet. Here they are drawn from a seed, and saved.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from transformers import EvalPrediction

from modeling_moco import MoCoForImageClassification
from modeling_moco.distributed_moco import world_size

from .. import plots
from ..cli import default_values
from ..data.images import MapImages
from ..data.labels import read_labels
from ..data.sources import CropDataArguments, ImageSplits
from ..engine.files import below, read_object, write_json
from ..engine.record import record
from ..engine.results import encoder_digest
from ..engine.run_folder import METRICS, SPLIT, mark_ended
from ..engine.sgd_trainer import SGDTrainer, SGDTrainingArguments
from ..views.pil import Views
from ..views.policy import build_policies
from .encoder import Encoder, parse_evaluation
from .probe_arguments import check_choice, optimizer, schedule
from .scores import Scores, likeliest, score

SAME_SHARE = 0.05  # a share of the labels that is nearer than this part of it is called by what was asked for
PUBLISHED_BATCH = 256  # images per step that the learning rates are for


class Published(NamedTuple):
    """Settings for a share of the labels: learning rate of the encoder, learning rate of the classifier, epochs."""

    learning_rate: float
    head_learning_rate: float
    epochs: int
    source: str


PUBLISHED = {
    0.01: Published(0.03, 0.08, 20, "VICReg (arXiv:2105.04906)"),
    0.1: Published(0.01, 0.1, 20, "VICReg (arXiv:2105.04906)"),
    1.0: Published(0.05, 0.05, 30, "SimCLR (arXiv:2002.05709)"),
}


def nearest_published(label_fraction: float) -> tuple[float, Published]:
    """The published fraction that is nearest in proportion, and its settings."""
    nearest = min(PUBLISHED, key=lambda fraction: abs(math.log(fraction / label_fraction)))
    return nearest, PUBLISHED[nearest]


def _per_fraction(name: str) -> str:
    values = [f"{getattr(published, name):g} with {share:.0%}" for share, published in PUBLISHED.items()]
    return f"By default {', '.join(values)} of the labels.".replace("%", "%%")


@dataclass
class FinetuneArguments(SGDTrainingArguments):
    """The published settings; learning rates and epochs depend on the share of the labels."""

    label_fraction: float = field(
        default=1.0, metadata={"help": "Share of the labelled images of every class to train on, at least one of each."}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": f"Passes over these images. {_per_fraction('epochs')}"}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": f"Learning rate of the encoder. {_per_fraction('learning_rate')}"}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": f"Learning rate of the classifier. {_per_fraction('head_learning_rate')}"}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the encoder and the classifier."})
    global_batch_size: int = field(
        default=PUBLISHED_BATCH, metadata={"help": "Images per optimizer step over all devices."}
    )
    eval_strategy: Literal["no", "epoch"] = field(default="epoch", metadata={"help": "When to evaluate: no, epoch."})

    def __post_init__(self):
        if not 0 < self.label_fraction <= 1:
            raise ValueError(
                f"label_fraction ({self.label_fraction:g}) must lie in (0, 1]: 0.01 for 1 % of the labels, 1 for all of them"
            )
        _, published = nearest_published(self.label_fraction)
        if self.num_train_epochs is None:
            self.num_train_epochs = published.epochs
        if self.learning_rate is None:
            self.learning_rate = published.learning_rate
        if self.head_learning_rate is None:
            self.head_learning_rate = published.head_learning_rate
        for name, rate in self.rates.items():
            if rate < 0:
                raise ValueError(f"{name} ({rate:g}) must be at least 0, which freezes the weights")
        check_choice(self)
        super().__post_init__()

    @property
    def rates(self) -> dict[str, float]:
        """Of the encoder and of the classifier as they were given, by the names of their flags."""
        return {name: getattr(self, name) for name in ("learning_rate", "head_learning_rate")}


PARTS: dict[str, Any] = {"data": CropDataArguments, "training": FinetuneArguments}


class FinetuneTrainer(SGDTrainer):
    """Trains a whole [`MoCoForImageClassification`], its BatchNorm included.

    Args:
        available: labelled images of the train split, of which `train_dataset` has a share.

    Attributes: `encoder`, the digest of the encoder that it began with, and `scores`, those of the last evaluation.
    """

    args: FinetuneArguments
    optimizer: Any
    scores: Scores

    def __init__(self, model: MoCoForImageClassification, args: FinetuneArguments, available: int, **kwargs):
        self.available = available
        self.encoder = encoder_digest(model.moco)
        # transformers gathers what is left of the logits, of all images before it computes anything.
        super().__init__(
            model=model,
            args=args,
            compute_metrics=self._accuracies,
            preprocess_logits_for_metrics=lambda logits, labels: likeliest(logits),
            **kwargs,
        )

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            parts = (self.model.moco, self.model.classifier)  # the learning rate of the first is logged
            groups = [
                {"params": list(part.parameters()), "lr": self.args.scaled(rate)}
                for part, rate in zip(parts, self.args.rates.values(), strict=True)
            ]
            self.optimizer = kind(groups, **settings | {"weight_decay": self.args.weight_decay})
        return self.optimizer

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        if world_size() > 1:  # the last step left every process its own statistics; those of the first are saved
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)
        return super().evaluate(*args, **kwargs)

    def _accuracies(self, prediction: EvalPrediction) -> dict[str, float]:
        answers, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        self.scores = score(answers, labels, self.model.config.num_labels)
        return self.scores.accuracies


def draw_split(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a random share of every class, rounded, at least one image of each.

    The same seed draws more of the same: 10 % hold the images of the 1 %.

    Args:
        labels: class numbers (n,).
        fraction: in (0, 1].
    """
    generator = np.random.default_rng(seed)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    shuffled = [generator.permutation(images) for images in by_class if len(images)]
    return np.sort(np.concatenate([images[: max(1, round(fraction * len(images)))] for images in shuffled]))


def choose_labelled(splits: ImageSplits, args: FinetuneArguments) -> np.ndarray:
    """Indices of the images to train on: those that the output directory names, if they are there; else newly drawn."""
    labels, path = read_labels(splits.train), _split_path(args)
    if path.is_file():
        saved = read_split(path)
        indices = np.sort(np.concatenate(list(saved.values())).astype(int))
        if indices[-1] < len(labels) and _by_name(splits, labels, indices) == saved:
            return indices
    return draw_split(labels, args.label_fraction, args.seed)


def save_split(splits: ImageSplits, args: FinetuneArguments, indices: np.ndarray) -> None:
    """Write which images of which class are trained on to `split.json` in the output directory. For all processes.

    Raises:
        ValueError: it is there and names others, which the dataset no longer has under these classes.
    """
    names, path = _by_name(splits, read_labels(splits.train), indices), _split_path(args)
    if path.is_file() and read_split(path) != names:
        raise ValueError(
            f"{path} names images that {splits.about['dataset']} does not have now under these classes: the data has changed. "
            "Pass another --output_dir"
        )
    if args.process_index == 0:
        content = splits.about | {"seed": args.seed, "label_fraction": args.label_fraction, "indices": names}
        write_json(path, content)


def read_split(path: Path) -> dict[str, list[int]]:
    """The images of every class that a fine-tuning is trained on.

    Raises:
        ValueError: the file is damaged.
    """
    remedy = "bring it back, or delete it, and images are drawn from the seed again"
    split = read_object(path, remedy).get("indices")
    lists = list(split.values()) if isinstance(split, dict) else [None]
    if not all(isinstance(images, list) and all(type(i) is int and i >= 0 for i in images) for images in lists):
        raise ValueError(f"{path} has no indices of images by the name of their class: {remedy}")
    if not any(lists):
        raise ValueError(f"{path} names no image: {remedy}")
    return dict(split or {})


def _split_path(args: FinetuneArguments) -> Path:
    return Path(str(args.output_dir)) / SPLIT


def _by_name(splits: ImageSplits, labels: np.ndarray, indices: np.ndarray) -> dict[str, list[int]]:
    return {name: indices[labels[indices] == number].tolist() for number, name in enumerate(splits.class_names)}


@dataclass
class FinetuneRun:
    """A parsed command line. `settings` are the values that it, or the pretraining run, gave."""

    encoder: Encoder
    data: CropDataArguments
    training: FinetuneArguments
    settings: dict[str, dict[str, Any]]

    @property
    def defaults(self) -> dict[str, dict[str, Any]]:
        """Values of the flags that were not given."""
        return default_values(PARTS)

    def protocol(self, trainer: FinetuneTrainer) -> str:
        """The words that stand for this evaluation in results."""
        args, images = self.training, len(trainer.train_dataset)
        share = images / trainer.available
        if abs(share - args.label_fraction) < SAME_SHARE * args.label_fraction and share < 1:
            share = args.label_fraction  # but for the rounding in each class
        length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        return (
            f"fine-tuning on {100 * share:.3g} % of the labels ({images:,} images), {length}, "
            f"learning rates {' and '.join(args.in_words([rate]) for rate in args.rates.values())}"
            + f", batch {args.global_batch_size}"
            + ("" if schedule(args) == "cosine" else f", {schedule(args)}")
            + optimizer(args)
            + self.data.flips_in_words
        )


def parse_finetune(argv: list[str]) -> FinetuneRun:
    """Flags over the data settings of the pretraining run (`recipe.yaml` beside the model), if there is one.

    Raises:
        ValueError: no model there, no dataset named, an unknown flag, or a value out of its range.
    """
    encoder, (data, training), settings, given = parse_evaluation(
        argv,
        PARTS,
        command="finetune",
        description="Train an encoder and a new classifier with a share of the labels, or all.",
        output="finetune",
    )
    if "output_dir" not in given:
        training.output_dir = str(below(encoder.results_dir, f"finetune_{100 * training.label_fraction:g}pct"))
    settings["encoder"]["fine_tuned"] = True
    return FinetuneRun(encoder, data, training, settings)


def build_trainer(run: FinetuneRun, splits: ImageSplits, indices: np.ndarray) -> FinetuneTrainer:
    """The encoder with a new classifier, and the images of `indices` in random crops.

    Raises:
        ValueError: there is no such model.
    """
    args, data = run.training, run.data
    batch = args.per_device_train_batch_size
    if args.world_size == 1 and len(indices) > batch and len(indices) % batch == 1:
        args.dataloader_drop_last = True  # BatchNorm has nothing to normalise one image by
    model = run.encoder.load_classifier(splits.class_names, args.seed)
    crop = Views(build_policies("crop", data.horizontal_flip)[:1], data.image_size)
    return FinetuneTrainer(
        model,
        args,
        available=len(splits.train),
        train_dataset=MapImages(splits.train.select(indices), crop, args.seed, splits.decoder.image),
        eval_dataset=MapImages(splits.eval, data.evaluation_view(), decode=splits.decoder.image),
        processing_class=data.image_processor(model.config),
    )


def announce(run: FinetuneRun, trainer: FinetuneTrainer) -> None:
    """Say what is about to run, and where its settings come from."""
    args, images = run.training, len(trainer.train_dataset)
    print(f"{run.encoder}: {run.protocol(trainer)}, to {args.output_dir}")
    if args.late_milestones:
        print(f"warning: {args.late_milestones}")
    by_default = {name: rate for name, rate in args.rates.items() if name not in run.settings["training"]}
    share, published = nearest_published(args.label_fraction)
    if by_default:
        print(f"Learning rates of {published.source}, for {share:.0%} of the labels.")
    if by_default and args.global_batch_size != PUBLISHED_BATCH:
        ruled = [f"--{name} {rate * args.global_batch_size / PUBLISHED_BATCH:g}" for name, rate in by_default.items()]
        print(
            f"warning: they are for a global batch of {PUBLISHED_BATCH}; for {args.global_batch_size} the linear rule gives "
            + " ".join(ruled)
        )
    if images < args.global_batch_size:
        print(
            f"warning: {images:,} images are fewer than the global batch, which leaves one step to an epoch: lower "
            "--global_batch_size, or raise --num_train_epochs"
        )


def finish(run: FinetuneRun, trainer: FinetuneTrainer, splits: ImageSplits) -> Scores:
    """Save the classifier and `metrics.json` to the output directory; append to the results there and beside the encoder."""
    args, folder = run.training, Path(str(run.training.output_dir))
    trainer.trained_model()  # from here on in single precision, also after a training in another
    trainer.evaluate()
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        scores, images = trainer.scores, len(trainer.train_dataset)
        protocol = run.protocol(trainer)
        metrics = {
            "protocol": protocol,
            **scores.accuracies,
            "top1_interval": scores.interval,
            "n": scores.n,
            "labelled_images": images,
            "per_class": dict(zip(splits.class_names, scores.per_class, strict=True)),
        }
        write_json(folder / METRICS, metrics)
        settings = args.rates | {
            "label_fraction": args.label_fraction,
            "labelled_images": images,
            **({"steps": args.max_steps} if args.max_steps > 0 else {"epochs": args.num_train_epochs}),
            "global_batch": args.global_batch_size,
            "weight_decay": args.weight_decay,
        }
        plots.confusion(scores.confusion, splits.class_names, folder / "confusion")
        results = scores.results(protocol, settings=settings, seed=args.seed)
        record(run.encoder.results_dir, results, model=trainer.encoder, data=splits.about, trackers=None)
        record(
            folder,
            results,
            model=encoder_digest(trainer.model.moco),
            data=splits.about,
            trackers=args.trackers,
            figures=[folder / "confusion.png"],
            step=trainer.state.global_step,
        )
        mark_ended(folder)
    return trainer.scores
