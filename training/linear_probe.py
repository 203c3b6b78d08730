"""The official linear protocol: a frozen encoder in evaluation mode, and a linear classifier trained on augmented crops.

Source: facebookresearch/moco, main_lincls.py (arXiv:1911.05722, section 4.1): SGD, rate 30, no weight decay, 100 epochs,
a tenth of the rate at 60 and 80, batch 256.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from sklearn.linear_model import LogisticRegression
from transformers import EvalPrediction
from transformers.utils import logging

from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoImageProcessor

from .augment import EvaluationView, OneView, build_policy
from .cli import SAVED_RECIPE, build_parser, parse_flags
from .data import DataArguments, ImageSplits
from .images import MapImages
from .knn import extract_features
from .sgd_trainer import SGDTrainer, SGDTrainingArguments


@dataclass
class LinearProbeArguments(SGDTrainingArguments):
    """The published settings."""

    num_train_epochs: float = field(default=100, metadata={"help": "passes over the images"})
    learning_rate: float = field(default=30.0, metadata={"help": "the features are small, hence the size"})
    weight_decay: float = field(default=0.0, metadata={"help": "of the classifier"})
    lr_milestones: list[int] | None = field(
        default_factory=lambda: [60, 80], metadata={"help": "epochs at which the rate drops to a tenth"}
    )
    global_batch_size: int | None = field(default=256, metadata={"help": "images per optimizer step over all devices"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: no, epoch"})


class LinearProbeTrainer(SGDTrainer):
    """Trains the classifier of a [`MoCoForImageClassification`] and nothing else.

    Raises:
        RuntimeError: after training, if any weight or statistic of the encoder has changed.
    """

    def __init__(self, model: MoCoForImageClassification, args: LinearProbeArguments, **kwargs):
        model.moco.requires_grad_(False)
        super().__init__(model=model, args=args, compute_metrics=top_accuracies, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model.eval()  # in training mode BatchNorm would adapt to the labelled images
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def train(self, *args, **kwargs):
        before = {name: tensor.clone() for name, tensor in self.model.moco.state_dict().items()}
        result = super().train(*args, **kwargs)
        after = self.model.moco.state_dict()
        changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
        if changed:
            raise RuntimeError(f"the linear protocol changed the encoder: {', '.join(changed[:5])}")
        return result


def top_accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 accuracy in per cent."""
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {"top1": 100 * hits[:, 0].float().mean().item(), "top5": 100 * hits.any(dim=1).float().mean().item()}


def logistic_top1(trainer: LinearProbeTrainer, view: EvaluationView) -> float:
    """Accuracy in per cent of scikit-learn's logistic regression on unit-length features of the evaluation view.

    It takes one pass over the images and seconds, but its number is another protocol's.
    """
    encoder = trainer.model.moco
    train, test = MapImages(trainer.train_dataset.source, view), trainer.eval_dataset
    features, labels = extract_features(encoder, train)
    test_features, test_labels = extract_features(encoder, test)
    classifier = LogisticRegression(C=100, max_iter=3000)  # C 1 would all but ignore features of unit length
    classifier.fit(features.cpu().numpy(), labels.cpu().numpy())
    return 100 * classifier.score(test_features.cpu().numpy(), test_labels.cpu().numpy())


@dataclass
class ProbeRun:
    """A parsed command line. `settings` are the values that it, or the pretraining run, gave."""

    model: str
    random_encoder: bool
    logistic: bool
    data: DataArguments
    training: LinearProbeArguments
    settings: dict[str, dict[str, Any]]

    @property
    def title(self) -> str:
        encoder = "a random encoder" if self.random_encoder else self.model
        return f"linear protocol on {encoder}, {self.training.num_train_epochs:g} epochs"


def parse_linear_probe(argv: list[str]) -> ProbeRun:
    """Flags over the data and probe settings of the pretraining run (`recipe.yaml` beside the model), if there is one.

    Raises:
        ValueError: no model there, no dataset named, an unknown flag, or a value out of its range.
    """
    parts: dict[str, Any] = {"data": DataArguments, "training": LinearProbeArguments}
    parser = build_parser(
        parts.values(),
        usage="accelerate launch scripts/linear_probe.py MODEL [--random_encoder] [--flag value ...]",
        description="Train a linear classifier on a frozen encoder, as the papers evaluate.",
    )
    parser.add_argument("model", nargs="?", help="folder or Hub repository of a MoCo model")
    parser.add_argument("--random_encoder", action="store_true", help="forget the weights: the baseline of any probe")
    parser.add_argument(
        "--logistic", action="store_true", help="also fit a logistic regression to the features: for small datasets"
    )
    known = parser.parse_args(argv)
    if known.model is None:
        raise ValueError("no model given: pass the folder that a run saved to, e.g. runs/quickstart")
    defaults = _settings_of_pretraining(known.model)
    if "dataset_name" not in defaults and not any(word.startswith("--dataset") for word in argv):
        raise ValueError(f"{known.model} does not say what it was trained on: pass --dataset_name")
    home = Path(known.model) if Path(known.model).is_dir() else Path("runs") / Path(known.model).name
    output_dir = home / ("linear_probe_random" if known.random_encoder else "linear_probe")
    namespace, (data, training), settings = parse_flags(parser, parts, argv, {"output_dir": str(output_dir)} | defaults)
    if data.streaming:
        raise ValueError("streaming (True) is for pretraining: the linear protocol reads its images in random order")
    settings["encoder"] = {"model": namespace.model, "random_encoder": namespace.random_encoder}
    return ProbeRun(namespace.model, namespace.random_encoder, namespace.logistic, data, training, settings)


def _settings_of_pretraining(model: str) -> dict[str, Any]:
    for folder in (Path(model), Path(model).parent):  # a run, or one of its checkpoints
        if (folder / SAVED_RECIPE).is_file():
            recipe = yaml.safe_load((folder / SAVED_RECIPE).read_text(encoding="utf-8"))
            # The views of pretraining are not the probe's, and its images may be a stream.
            of_pretraining = ("augmentation", "crop_min_scale", "streaming", "shuffle_buffer")
            data = {key: value for key, value in recipe["data"].items() if key not in of_pretraining}
            return data | recipe.get("probe", {})
    try:
        processor = MoCoImageProcessor.from_pretrained(model)
    except OSError:
        return {}  # `load_encoder` will say that there is no model
    return {"image_size": processor.crop_size["height"], "eval_resize": processor.size["shortest_edge"]}


def load_encoder(run: ProbeRun, splits: ImageSplits) -> MoCoForImageClassification:
    """The model with a new classifier for the classes of the data.

    Raises:
        ValueError: there is no model.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers warns that the classifier is new, which is the point
    try:
        config = MoCoConfig.from_pretrained(run.model)
        config.id2label = dict(enumerate(splits.class_names))
        config.label2id = {name: i for i, name in config.id2label.items()}
        if run.random_encoder:
            return MoCoForImageClassification(config)
        model, report = MoCoForImageClassification.from_pretrained(
            run.model, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
        if any(not key.startswith("classifier.") for key in report["missing_keys"]):
            raise OSError("its weights are those of another model")
        return model
    except OSError as error:
        raise ValueError(
            f"{run.model} holds no MoCo model ({error}): pass the folder that a run saved to, e.g. runs/quickstart"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def build_trainer(
    model: MoCoForImageClassification, args: LinearProbeArguments, data: DataArguments, splits: ImageSplits
) -> LinearProbeTrainer:
    """The protocol on the given images."""
    crop = OneView(build_policy("crop", data.horizontal_flip), data.image_size)
    return LinearProbeTrainer(
        model,
        args,
        train_dataset=MapImages(splits.train, crop, args.seed),
        eval_dataset=MapImages(splits.eval, data.evaluation_view()),
        processing_class=data.image_processor(model.config),
    )
