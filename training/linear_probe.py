"""The official linear protocol: a frozen encoder in evaluation mode, and a linear classifier trained on augmented crops.

Source: facebookresearch/moco, main_lincls.py (arXiv:1911.05722, section 4.1): SGD, rate 30, no weight decay, 100 epochs,
a tenth of the rate at 60 and 80, batch 256.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from transformers import EvalPrediction

from modeling_moco import MoCoForImageClassification

from .augment import EvaluationView, OneView, build_policy
from .data import DataArguments, ImageSplits
from .evaluation import Encoder, parse_evaluation
from .features import extract_features, unit
from .images import MapImages
from .scores import score
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
    logistic: bool = field(default=False, metadata={"help": "also fit a logistic regression to the features"})


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
    scores = score(torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids))
    return {"top1": scores.top1, "top5": scores.top5}


def logistic_top1(trainer: LinearProbeTrainer, view: EvaluationView) -> float:
    """Accuracy in per cent of scikit-learn's logistic regression on unit-length features of the evaluation view.

    It takes one pass over the images and seconds, but its number is another protocol's.
    """
    encoder = trainer.model.moco
    train, test = MapImages(trainer.train_dataset.source, view), trainer.eval_dataset
    features, labels = extract_features(encoder, train)
    test_features, test_labels = extract_features(encoder, test)
    classifier = LogisticRegression(C=100, max_iter=3000)  # C 1 would all but ignore features of unit length
    classifier.fit(unit(features).numpy(), labels.numpy())
    return 100 * classifier.score(unit(test_features).numpy(), test_labels.numpy())


@dataclass
class ProbeRun:
    """A parsed command line. `settings` are the values that it, or the pretraining run, gave."""

    encoder: Encoder
    data: DataArguments
    training: LinearProbeArguments
    settings: dict[str, dict[str, Any]]

    @property
    def title(self) -> str:
        return f"linear protocol on {self.encoder}, {self.training.num_train_epochs:g} epochs"


def parse_linear_probe(argv: list[str]) -> ProbeRun:
    """Flags over the data and probe settings of the pretraining run (`recipe.yaml` beside the model), if there is one.

    Raises:
        ValueError: no model there, no dataset named, an unknown flag, or a value out of its range.
    """
    encoder, (data, training), settings = parse_evaluation(
        argv,
        {"data": DataArguments, "training": LinearProbeArguments},
        script="linear_probe.py",
        description="Train a linear classifier on a frozen encoder, as the papers evaluate.",
        defaults=lambda recipe: recipe.get("probe", {}),
        output="linear_probe",
    )
    return ProbeRun(encoder, data, training, settings)


def load_classifier(encoder: Encoder, splits: ImageSplits, seed: int) -> MoCoForImageClassification:
    """The encoder with a new classifier for the classes of the data."""
    names = dict(enumerate(splits.class_names))
    return encoder.load(
        MoCoForImageClassification, seed, id2label=names, label2id={name: i for i, name in names.items()}
    )


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
