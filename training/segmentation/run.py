"""A segmentation model from its command line: parse, build, train, evaluate, leave results behind."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_moco import MoCoForSemanticSegmentation, MoCoSegmentationImageProcessor

from ..engine.files import write_json
from ..engine.page import read_run, refresh_report, write_report
from ..engine.record import record
from ..engine.results import Result, model_digest, table
from ..engine.run_folder import (
    CLASS_IOU,
    METRICS,
    OF_SEGMENTATION,
    SEGMENTATIONS,
    TRAINING,
    mark_ended,
    read_metrics,
)
from ..transfer.evaluated import figures_of, make_folder, shown_instead
from ..transfer.figures import draw_bars, draw_training
from ..transfer.models import build_around, load_trained
from ..transfer.recipe import RECIPES, Task, TransferRun
from .dataset.opening import SegmentationDataArguments, SegmentationSplits
from .dataset.views import SegmentationImages, SegmentationView
from .evaluate import evaluate
from .figures import draw_segmentations
from .mean_iou import SegmentationScores, scores
from .trainer import SegmentationTrainer, SegmentationTrainingArguments

NEW = re.compile(r"^(moco\.)?(context|pixel_classifier)\.")  # parts that no encoder has


@dataclass
class SegmenterArguments:
    """Flags of the model and of the views that it is trained on."""

    _argument_group_name = "model (MoCoFCNConfig)"

    fcn_norm: str = field(
        default="sync", metadata={"help": "BatchNorm in training: sync over the processes, plain, or frozen."}
    )
    crop_size: int = field(default=513, metadata={"help": "Side in pixels of the crops that are trained on."})
    scales: list[float] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata={"help": "Least and greatest factor by which an image is scaled before the crop, in training."},
    )

    def __post_init__(self):
        if len(self.scales) != 2:
            raise ValueError(
                f"scales ({self.scales}) must be the least and the greatest factor: the paper uses 0.5 and 2"
            )
        self.view()

    def view(self) -> SegmentationView:
        return SegmentationView(self.crop_size, (self.scales[0], self.scales[1]))


TASK = Task(
    command="segment",
    noun="segmentation model",
    recipes=RECIPES / "segmentation",
    default_recipe="voc_fcn16s_r50_30k",
    parts={"data": SegmentationDataArguments, "model": SegmenterArguments, "training": SegmentationTrainingArguments},
)


@dataclass
class SegmentRun(TransferRun):
    """A recipe with the command line applied."""

    data: SegmentationDataArguments
    model: SegmenterArguments
    training: SegmentationTrainingArguments

    @property
    def protocol(self) -> str:
        """The words that stand for this evaluation in results."""
        crop = f", crop {self.trained['crop_size']} px" if self.trained else ""
        return f"FCN-16s, {self.training_in_words}{crop}, whole images"


def parse_segment(argv: list[str]) -> SegmentRun:
    """The recipe named in `argv`, overridden by the other flags in it.

    Raises:
        ValueError: no model or dataset named, an unknown recipe or flag, or a value out of its range.
    """
    parser = TASK.build_parser("Train a segmentation model around a pretrained encoder, and measure its mean IoU.")
    _, fields = TASK.parse(parser, argv)
    return SegmentRun(**fields)


def build_model(run: SegmentRun, class_names: list[str]) -> MoCoForSemanticSegmentation:
    """The encoder in a new segmentation model of these classes.

    Raises:
        ValueError: there is no such encoder, or it cannot segment.
    """
    settings = {"fcn_norm": run.model.fcn_norm}
    return build_around(run.encoder, MoCoForSemanticSegmentation, class_names, settings, NEW, run.training.seed)


def load_segmenter(run: SegmentRun) -> tuple[MoCoForSemanticSegmentation, MoCoSegmentationImageProcessor]:
    """The trained model that is to be evaluated, and its image processor.

    Raises:
        ValueError: there is none.
    """
    if "class_names" not in run.given and run.data.dataset_name != run.recipe.values.get("dataset_name"):
        run.data.class_names = None  # of the dataset that it was trained on: another may have names of its own
    return load_trained(run.encoder.source, TASK, MoCoForSemanticSegmentation, MoCoSegmentationImageProcessor)


def build_trainer(run: SegmentRun, splits: SegmentationSplits) -> SegmentationTrainer:
    """The model with the views of its training images.

    Raises:
        ValueError: there is no such encoder, or fewer images than a batch has.
    """
    assert splits.train is not None
    model = build_model(run, splits.class_names)
    mean, std = list(model.config.image_mean), list(model.config.image_std)
    processor = MoCoSegmentationImageProcessor(image_mean=mean, image_std=std)
    images = SegmentationImages(splits.train, run.model.view(), run.training.seed)
    return SegmentationTrainer(model, run.training, images, processor)


def announce(run: SegmentRun, splits: SegmentationSplits) -> None:
    """Say what is about to run."""
    assert splits.train is not None
    args, model = run.training, run.model
    if run.about.get("title"):
        print(f"    title: {run.about['title']}")
    print(
        f"      run: FCN-16s around {run.encoder}; {len(splits.train):,} images of {len(splits.class_names)} classes, scaled "
        f"by {model.scales[0]:g} to {model.scales[1]:g}, crops of {model.crop_size} px, {args.max_steps:,} steps of "
        f"{args.global_batch_size}, learning rate {args.learning_rate:g}, BatchNorm {model.fcn_norm}, to {args.output_dir}"
    )
    if rule := run.rate_rule:
        print(f"     rule: {rule}")
    if splits.eval is None:
        print("The evaluation is left out: the dataset has no split for it (see --eval_split).")


def evaluated(run: SegmentRun, splits: SegmentationSplits) -> dict[str, Any]:
    """What an evaluation is of: protocol, number of images and data."""
    data = splits.place | {"split": splits.eval.name if splits.eval else None, "local": run.data.local}
    return {"protocol": run.protocol, "n": 0 if splits.eval is None else len(splits.eval), "data": data}


def results_of(run: SegmentRun, splits: SegmentationSplits, model: Any, processor: Any) -> SegmentationScores:
    """What is measured on the split to evaluate on. All processes take part.

    The main one draws, unless the figures that are there show another evaluation.

    Raises:
        ValueError: the folder of the results cannot be made.
    """
    assert splits.eval is not None
    folder, shown = make_folder(run), shown_instead(run, evaluated(run, splits))
    counts = evaluate(model, splits.eval, processor, run.training.dataloader_num_workers)
    measured = scores(counts, splits.class_names)
    if run.training.process_index == 0 and shown is None:
        draw_segmentations(splits.eval, model.eval(), processor, splits.class_names, folder / SEGMENTATIONS)
        per_class = {name: 100 * value for name, value in measured.per_class.items()}
        draw_bars({"": per_class}, "IoU", folder / CLASS_IOU)
    return measured


def finish(run: SegmentRun, splits: SegmentationSplits, trainer: SegmentationTrainer) -> None:
    """Save the model, and evaluate it."""
    folder = Path(str(run.training.output_dir))
    trainer.save_model(str(folder))
    trainer.save_state()
    measured = (
        None if splits.eval is None else results_of(run, splits, trainer.trained_model(), trainer.processing_class)
    )
    if trainer.is_world_process_zero():
        draw_training(trainer.state.log_history, folder / TRAINING)
        leave_results(run, splits, trainer.model, measured, trainer.state.global_step)
        mark_ended(folder)
        write_report(read_run(folder))
        refresh_report(run.encoder.results_dir)


def show_recorded(run: SegmentRun) -> None:
    """Print, on the main process, what the model in the output directory has measured."""
    if run.training.process_index != 0:
        return
    metrics = read_metrics(Path(str(run.training.output_dir)) / METRICS, "correct it, or move it away")
    if "miou" in metrics:
        print(
            f"{metrics['protocol']}: mIoU {metrics['miou']:.2f} %, pixel accuracy {metrics['pixel_accuracy']:.2f} %, "
            f"n {metrics['n']:,}"
        )


def leave_results(
    run: SegmentRun, splits: SegmentationSplits, model: Any, measured: SegmentationScores | None, step: int | None
) -> None:
    """Print the scores, and write them to `results.json` in the folder of the model; after training to `metrics.json` too."""
    folder, content = Path(str(run.training.output_dir)), evaluated(run, splits)
    n, seed = content["n"], (run.trained or {}).get("seed")
    results = []
    if measured is not None:
        percents = {"mIoU": 100 * measured.miou, "pixel accuracy": 100 * measured.pixel_accuracy}
        results = [
            Result(run.protocol, metric, value, n, "segmentation model", {}, seed) for metric, value in percents.items()
        ]
        content |= {"miou": percents["mIoU"], "pixel_accuracy": percents["pixel accuracy"]}
        content["iou_per_class"] = {
            name: 100 * value
            for name, value in measured.per_class.items()
            if value == value  # not NaN
        }
    print(table(results) if results else "Nothing was measured.")
    figures = figures_of(run, content, OF_SEGMENTATION)
    if not run.eval_only:
        write_json(folder / METRICS, content)
    record(
        folder,
        results,
        model=model_digest(model),
        data=content["data"],
        trackers=run.training.trackers,
        figures=figures,
        step=step,
    )
