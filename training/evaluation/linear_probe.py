"""The linear probe of a frozen encoder: its command line, and the official protocol.

`official` is facebookresearch/moco, main_lincls.py (arXiv:1911.05722, section 4.1): a linear classifier on augmented crops,
the encoder in evaluation mode; SGD, learning rate 30, no weight decay, 100 epochs, a tenth of it at 60 and 80, batch 256.
With several learning rates as many classifiers share one forward pass. `cached` is in `cached_probe.py`, what either leaves
in `probe_results.py`. Shapes: `N` batch, `C` classes, `H` heads.
"""

import copy
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerControl

from modeling_moco import MoCoForImageClassification, MoCoModel
from modeling_moco.modeling_moco import MoCoPreTrainedModel

from .. import plots
from ..cli import default_values, offered
from ..data.images import MapImages
from ..data.sources import CropDataArguments, ImageSplits
from ..engine.files import below, whole_files, write_json
from ..engine.page import CONFUSIONS
from ..engine.record import record
from ..engine.results import encoder_digest
from ..engine.run_folder import METRICS, read_metrics
from ..engine.sgd_trainer import SGDTrainer
from ..views.pil import Views
from ..views.policy import build_policies
from .encoder import Encoder, parse_evaluation
from .features import extract_features
from .probe_arguments import READ_BY_CACHED, LinearProbeArguments, _listed
from .probe_results import HeadReport, Probe, choose, hold_out, middle_of_best
from .scores import Scores, in_parts, score_parts

PARTS: dict[str, Any] = {"data": CropDataArguments, "training": LinearProbeArguments}

# The command line


@dataclass
class ProbeRun:
    """A parsed command line. `settings` are the values that it, or the pretraining run, gave."""

    encoder: Encoder
    data: CropDataArguments
    training: LinearProbeArguments
    settings: dict[str, dict[str, Any]]

    @property
    def defaults(self) -> dict[str, dict[str, Any]]:
        """Values of the flags that were not given."""
        return default_values(PARTS)

    @property
    def title(self) -> str:
        return f"linear probe of {self.encoder}, {self.training.mode}: {self.training.protocol}"


def parse_linear_probe(argv: list[str]) -> ProbeRun:
    """Flags over the data and probe settings of the pretraining run (`recipe.yaml` beside the model), if there is one.

    Raises:
        ValueError: no model there, no dataset named, an unknown flag, one that the mode has no use for, or a value out of
            its range.
    """
    encoder, (data, training), settings, given = parse_evaluation(
        argv,
        PARTS,
        command="probe",
        description="Train a linear classifier on a frozen encoder, as the papers evaluate.",
        defaults=lambda recipe: {"probe": recipe.get("probe", {})},
        output="linear_probe",
    )
    if training.mode == "cached":
        flags = {f.name for f in offered(LinearProbeArguments)} - {"output_dir"}
        if unused := given & flags - READ_BY_CACHED:
            raise ValueError(
                f"{', '.join(sorted(unused))} means nothing in the cached mode, which reads "
                f"{', '.join(sorted(READ_BY_CACHED))}: leave it out"
            )
        settings["training"] = {key: value for key, value in settings["training"].items() if key in READ_BY_CACHED}
    elif training.learning_rates is not None and "learning_rate" in given:
        raise ValueError(
            f"learning_rate ({training.learning_rate:g}) and learning_rates ({_listed(training.given_rates)}) were both given: "
            "pass one of them"
        )
    elif training.lr_milestones and "lr_scheduler_type" in given and "lr_milestones" not in given:
        raise ValueError(
            f"lr_scheduler_type has no effect beside lr_milestones ({_listed(training.lr_milestones)}), the default or the "
            "recipe's: pass --lr_milestones without a value too"
        )
    settings["training"]["mode"] = training.mode
    if "output_dir" not in given:  # a folder for each kind of probe
        kind = "_cached" if training.mode == "cached" else "" if training.learning_rates is None else "_rates"
        training.output_dir = str(below(encoder.results_dir, f"linear_probe{kind}"))
    return ProbeRun(encoder, data, training, settings)


def save_probe(probe: Probe, run: ProbeRun, splits: ImageSplits, encoder: MoCoModel) -> None:
    """Write a probe to `metrics.json` and a figure in the output directory, and to the encoder's `results.json`."""
    folder = Path(str(run.training.output_dir))
    path = folder / METRICS
    written = read_metrics(path, "move it away, and a new one is written").get("probes", [])
    probes = [entry for entry in written if entry["name"] != probe.name] + [probe.about(splits.class_names)]
    metrics = {"mode": run.training.mode, "encoder": str(run.encoder), "probes": probes}
    write_json(path, metrics)
    name = CONFUSIONS[probe.name]
    plots.confusion(probe.scores.confusion, splits.class_names, folder / name)
    record(
        run.encoder.results_dir,
        probe.results(run.training.seed),
        model=encoder_digest(encoder),
        data=splits.about,
        trackers=run.training.trackers,
        figures=[folder / f"{name}.png"],
    )


# Official


class LinearHeads(MoCoPreTrainedModel):
    """A frozen encoder and several linear classifiers on its features, all with the weights of the given one."""

    def __init__(self, classifier: MoCoForImageClassification, heads: int):
        super().__init__(classifier.config)
        self.post_init()
        self.moco = classifier.moco.requires_grad_(False)
        self.heads = nn.ModuleList(copy.deepcopy(classifier.classifier) for _ in range(heads))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Class logits of every head (H, N, C)."""
        features = self.moco(pixel_values).pooler_output
        return torch.stack([head(features) for head in self.heads])


class LinearProbeTrainer(SGDTrainer):
    """Trains the heads of [`LinearHeads`], each at its learning rate, and nothing else.

    A head gets the gradient that it would get alone. The encoder is frozen and the view of evaluation fixed, so that an
    evaluation is a matrix product with features that are extracted before training.

    Args:
        held_out: images in the evaluation view that choose between heads; None for a single one.
        protocol: what is done, in the words of results.

    Raises:
        RuntimeError: after training, if any weight or statistic of the encoder has changed.
    """

    control: TrainerControl
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, model: LinearHeads, args: LinearProbeArguments, held_out: MapImages | None, protocol: str, **kwargs
    ):
        super().__init__(model=model, args=args, **kwargs)
        self.held_out, self.protocol = held_out, protocol

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            heads = zip(self.model.heads, self.args.rates, strict=True)
            groups = [{"params": list(head.parameters()), "lr": rate} for head, rate in heads]
            self.optimizer = kind(groups, **settings, weight_decay=self.args.weight_decay)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model.eval()  # in training mode BatchNorm would adapt to the labelled images
        logits = model(inputs["pixel_values"])
        loss = torch.stack([F.cross_entropy(x.float(), inputs["labels"]) for x in logits]).sum()
        return (loss, logits) if return_outputs else loss

    def train(self, *args, **kwargs):
        before = {name: tensor.clone() for name, tensor in self._encoder_tensors().items()}
        _ = self._features  # now, so that a resumed run finds the random state of its checkpoint undisturbed
        result = super().train(*args, **kwargs)
        after = self._encoder_tensors()
        changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
        if changed:
            raise RuntimeError(f"the linear probe changed the encoder: {', '.join(changed[:5])}")
        return result

    def _encoder_tensors(self) -> dict[str, torch.Tensor]:
        encoder = self.model.moco
        return dict(encoder.named_parameters()) | dict(encoder.named_buffers())

    @cached_property
    def _features(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        images = {"eval": self.eval_dataset} | ({} if self.held_out is None else {"held_out": self.held_out})
        loading: dict[str, Any] = {
            "batch_size": self.args.per_device_eval_batch_size,
            "num_workers": self.args.dataloader_num_workers,
        }
        rows = {part: extract_features(self.model.moco, x, **loading) for part, x in images.items()}
        return {part: (x.to(self.args.device), y.to(self.args.device)) for part, (x, y) in rows.items()}

    @torch.no_grad()
    def scores(self, part: Literal["eval", "held_out"] = "eval") -> list[Scores]:
        """Scores of every head as it is now."""
        features, labels = self._features[part]
        classes = self.model.config.num_labels
        parts = list(in_parts(features, labels, classes))
        return [score_parts(((head(x), y) for x, y in parts), classes) for head in self.model.heads]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Top-1 and top-5 accuracy in per cent of the head chosen as of now, and the top-1 of all by their learning rates."""
        scores = self.scores()
        names = [f"{rate:g}" for rate in self.args.rates]
        metrics = {f"top1_rate_{name}": s.top1 for name, s in zip(names, scores, strict=True)}
        chosen = 0
        if self.held_out is not None:
            held_out = [s.top1 for s in self.scores("held_out")]
            metrics |= {f"held_out_top1_rate_{name}": top1 for name, top1 in zip(names, held_out, strict=True)}
            chosen = middle_of_best(held_out)
        metrics = scores[chosen].accuracies | metrics
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["loss"] /= len(self.args.rates)  # the mean of the heads
        super().log(logs, start_time)

    def probe(self) -> tuple[Probe, int]:
        """The probe after training, and the index of the chosen head."""
        scores = self.scores()
        held_out = [None] * len(scores) if self.held_out is None else [s.top1 for s in self.scores("held_out")]
        heads = []
        for rate, s, held in zip(self.args.rates, scores, held_out, strict=True):
            key = f"eval_top1_rate_{rate:g}"
            epochs = {entry["epoch"]: entry[key] for entry in self.state.log_history if key in entry}
            epochs[self.state.epoch] = s.top1
            report = HeadReport(f"learning rate {rate:g}", held, s.top1)
            if len(epochs) >= math.ceil(self.state.epoch or 0):  # or nobody has looked at all of them
                best = max(epochs, key=lambda epoch: epochs[epoch])
                report = replace(report, best=epochs[best], best_epoch=best)
            heads.append(report)
        chosen = choose(heads)
        return Probe("official", self.protocol, len(self.train_dataset), heads[chosen], scores[chosen], heads), chosen


def build_trainer(
    model: MoCoForImageClassification, args: LinearProbeArguments, data: CropDataArguments, splits: ImageSplits
) -> LinearProbeTrainer:
    """The official protocol on the given images. With several learning rates a part of the train split is held out.

    Raises:
        ValueError: there are several learning rates, and too few images to hold some out.
    """
    view, train, decode, held_out = data.evaluation_view(), splits.train, splits.decoder.image, None
    if len(args.rates) > 1:
        kept, held = hold_out(torch.tensor(train["label"][:]), args.seed)
        train, held_out = train.select(kept.tolist()), MapImages(train.select(held.tolist()), view, decode=decode)
    crop = Views(build_policies("crop", data.horizontal_flip)[:1], data.image_size)
    return LinearProbeTrainer(
        LinearHeads(model, len(args.rates)),
        args,
        held_out,
        f"linear probe, official, {args.protocol}{data.flips_in_words}",
        train_dataset=MapImages(train, crop, args.seed, decode),
        eval_dataset=MapImages(splits.eval, view, decode=decode),
        processing_class=data.image_processor(model.config),
    )


def finish(trainer: LinearProbeTrainer, model: MoCoForImageClassification) -> Probe:
    """Save the chosen classifier as a model to the output directory.

    Args:
        model: what `build_trainer` was given.
    """
    probe, chosen = trainer.probe()
    model.classifier = trainer.model.heads[chosen]
    if trainer.is_world_process_zero():
        with whole_files(Path(str(trainer.args.output_dir))) as fresh:
            model.save_pretrained(fresh)
            trainer.processing_class.save_pretrained(fresh)
    return probe
