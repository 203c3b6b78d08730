"""A detector from its command line: parse, build, train, evaluate, leave results behind."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modeling_moco import MoCoDetectionImageProcessor, MoCoForObjectDetection, MoCoRCNNConfig

from ..engine.files import write_json
from ..engine.page import read_run, refresh_report, write_report
from ..engine.record import record
from ..engine.results import Result, model_digest, table
from ..engine.run_folder import (
    CLASS_AP,
    DETECTIONS,
    METRICS,
    OF_DETECTOR,
    TRAINING,
    mark_ended,
    read_metrics,
)
from ..transfer.evaluated import figures_of, make_folder, shown_instead
from ..transfer.figures import draw_training
from ..transfer.models import build_around, load_trained
from ..transfer.recipe import RECIPES, Task, TransferRun
from .average_precision import AveragePrecision
from .dataset.masks import coco_library
from .dataset.opening import DetectionDataArguments, DetectionSplits
from .dataset.views import DetectionImages, DetectionView
from .evaluate import METRICS as METRIC_NAMES
from .evaluate import Metric, detect, measure
from .figures import draw_classes, draw_detections
from .trainer import DetectionTrainer, DetectionTrainingArguments

AREA_SINCE = 2010  # year from which on VOC's AP is the area under the curve
LONGEST_SIDE = 1333  # pixels, of the papers: a protocol names another
NEW = re.compile(r"^(moco\.)?(proposals|norm|reduce|hidden|cls_score|bbox_pred|mask_)")  # parts that no encoder has


@dataclass
class DetectorArguments:
    """Flags of the detector and of the sizes that it sees."""

    _argument_group_name = "model (MoCoRCNNConfig)"

    rcnn_variant: str = field(default="c4", metadata={"help": "Detector: c4, or dilated_c5 (v1, appendix A.1)."})
    detector_norm: str = field(
        default="sync", metadata={"help": "BatchNorm in training: sync over the processes, plain, or frozen."}
    )
    anchor_sizes: list[int] = field(
        default_factory=lambda: [32, 64, 128, 256, 512], metadata={"help": "Sizes of the anchors in pixels."}
    )
    rpn_pre_nms_train: int = field(
        default=12_000, metadata={"help": "Proposals of an image before suppression, in training."}
    )
    rpn_pre_nms_test: int = field(default=6000, metadata={"help": "The same in evaluation."})
    rpn_post_nms_train: int = field(
        default=2000, metadata={"help": "Proposals of an image after suppression, in training."}
    )
    rpn_post_nms_test: int = field(default=1000, metadata={"help": "The same in evaluation."})
    roi_samples: int = field(default=512, metadata={"help": "Proposals of an image that are learned from."})
    roi_size: int | None = field(
        default=None,
        metadata={"help": "Side of the map that is pooled from a box. By default 14 for c4, 7 for dilated_c5."},
    )
    train_sizes: list[int] = field(
        default_factory=lambda: list(range(480, 801, 32)),
        metadata={"help": "Lengths in pixels, of which the short side of an image has a random one in training."},
    )
    test_size: int = field(default=800, metadata={"help": "Length of the short side in evaluation."})
    longest_side: int = field(default=LONGEST_SIDE, metadata={"help": "Greatest length of the long side."})
    metric: Metric | None = field(
        default=None,
        metadata={
            "help": "By default coco; where objects of the evaluated split are difficult voc07, or voc12 for one since 2010."
        },
    )

    def __post_init__(self):
        for name in ("train_sizes", "test_size", "longest_side"):
            value = getattr(self, name)
            if not value or min(value if isinstance(value, list) else [value]) < 1:
                raise ValueError(f"{name} ({value}) must be at least 1 pixel: the papers use 480 to 800, 800 and 1333")

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the model."""
        others = ("train_sizes", "test_size", "longest_side", "metric")
        return {name: value for name, value in asdict(self).items() if name not in others}


TASK = Task(
    command="detect",
    noun="detector",
    recipes=RECIPES / "detection",
    default_recipe="voc_r50_c4_24k",
    parts={"data": DetectionDataArguments, "model": DetectorArguments, "training": DetectionTrainingArguments},
    of_evaluation=frozenset({"test_size", "longest_side", "metric"}),
)


@dataclass
class DetectRun(TransferRun):
    """A recipe with the command line applied."""

    data: DetectionDataArguments
    model: DetectorArguments
    training: DetectionTrainingArguments

    def metric_of(self, splits: DetectionSplits) -> Metric:
        """The metric that was asked for; by default VOC's where objects are marked difficult, as VOC's are, else COCO's.

        VOC's is that of the year in the name of the split, and 2007's where there is none.
        """
        if self.model.metric or not splits.difficult:
            return self.model.metric or "coco"
        assert splits.eval is not None
        years = [int(year) for year in re.findall(r"(?<!\w)(\d{4})_", splits.eval.name)]
        return "voc12" if years and min(years) >= AREA_SINCE else "voc07"

    def protocol(self, metric: Metric, config: MoCoRCNNConfig, size: Mapping[str, int]) -> str:
        """The words that stand for this evaluation in results.

        Args:
            size: of an image processor, "shortest_edge" and "longest_edge" in pixels.
        """
        kind = "Mask R-CNN" if config.masks else "Faster R-CNN"
        variant = config.rcnn_variant.upper().replace("_", "-")
        short, long = size["shortest_edge"], size["longest_edge"]
        sides = f"short side {short} px" + (f", long side to {long} px" if long != LONGEST_SIDE else "")
        return f"{kind} {variant}, {self.training_in_words}, {sides}, {METRIC_NAMES[metric]}"


def parse_detect(argv: list[str]) -> DetectRun:
    """The recipe named in `argv`, overridden by the other flags in it.

    Raises:
        ValueError: no model or dataset named, an unknown recipe or flag, or a value out of its range.
    """
    parser = TASK.build_parser("Train a detector around a pretrained encoder, and measure its average precision.")
    _, fields = TASK.parse(parser, argv)
    run = DetectRun(**fields)
    if not run.eval_only:  # or the sizes beside the detector count
        _check_sizes(run.model.test_size, run.model.longest_side)
    return run


def _check_sizes(test_size: int, longest_side: int) -> None:
    if test_size > longest_side:
        raise ValueError(
            f"test_size ({test_size}) is longer than longest_side ({longest_side}): lower it, or raise the other"
        )


def build_model(run: DetectRun, class_names: list[str]) -> MoCoForObjectDetection:
    """The encoder in a new detector of these classes.

    Raises:
        ValueError: there is no such encoder, or it cannot be in a detector.
    """
    settings = run.model.config | {"masks": run.data.masks}
    return build_around(run.encoder, MoCoForObjectDetection, class_names, settings, NEW, run.training.seed)


def load_detector(run: DetectRun) -> tuple[MoCoForObjectDetection, MoCoDetectionImageProcessor]:
    """The trained detector that is to be evaluated, and its image processor.

    Raises:
        ValueError: there is none, or the sizes of its evaluation contradict each other.
    """
    model, processor = load_trained(run.encoder.source, TASK, MoCoForObjectDetection, MoCoDetectionImageProcessor)
    sides = {"test_size": "shortest_edge", "longest_side": "longest_edge"}
    given = {side: getattr(run.model, flag) for flag, side in sides.items() if flag in run.given}
    processor.size = dict(processor.size) | given
    if "masks" in run.given and run.data.masks != model.config.masks:
        raise ValueError(
            f"masks ({run.data.masks}) is not what {run.encoder.source} was trained with: leave --masks out"
        )
    _check_sizes(*(processor.size[side] for side in sides.values()))
    run.data.masks = model.config.masks
    return model, processor


def check_metric(run: DetectRun, splits: DetectionSplits) -> None:
    """
    Raises:
        ValueError: what measures the split to evaluate on is not installed, or has nothing to measure.
    """
    if splits.eval is not None and run.metric_of(splits) == "coco":
        coco_library()
    elif splits.eval is not None and run.data.masks:
        raise ValueError(f"metric ({run.metric_of(splits)}) has boxes alone: pass --metric coco for masks")


def image_processor(run: DetectRun, config: MoCoRCNNConfig) -> MoCoDetectionImageProcessor:
    """The evaluation's transform, which is saved beside the detector."""
    size = {"shortest_edge": run.model.test_size, "longest_edge": run.model.longest_side}
    mean, std = list(config.image_mean), list(config.image_std)
    return MoCoDetectionImageProcessor(size=size, image_mean=mean, image_std=std)


def build_trainer(run: DetectRun, splits: DetectionSplits) -> DetectionTrainer:
    """The detector with the views of its training images.

    Raises:
        ValueError: there is no such encoder, or fewer images than a batch has.
    """
    assert splits.train is not None
    model = build_model(run, splits.class_names)
    view = DetectionView(run.model.train_sizes, run.model.longest_side)
    images = DetectionImages(splits.train, view, run.training.seed)
    return DetectionTrainer(model, run.training, images, image_processor(run, model.config))


def announce(run: DetectRun, splits: DetectionSplits, trainer: DetectionTrainer) -> None:
    """Say what is about to run."""
    assert splits.train is not None
    kind = "Mask R-CNN" if run.data.masks else "Faster R-CNN"
    args, sizes = run.training, run.model.train_sizes
    if run.about.get("title"):
        print(f"    title: {run.about['title']}")
    print(
        f"      run: {kind} {run.model.rcnn_variant} around {run.encoder}; {len(splits.train):,} images of "
        f"{len(splits.class_names)} classes, short side {min(sizes)} to {max(sizes)} px, {args.max_steps:,} steps of "
        f"{args.global_batch_size}, learning rate {args.learning_rate:g}, BatchNorm {run.model.detector_norm}, to "
        f"{args.output_dir}"
    )
    if rule := run.rate_rule:
        print(f"     rule: {rule}")
    if splits.eval is None:
        print("The evaluation is left out: the dataset has no split for it (see --eval_split).")


def evaluated(run: DetectRun, splits: DetectionSplits, model: Any, processor: Any) -> dict[str, Any]:
    """What an evaluation is of: protocol, number of images, metric and data."""
    metric = run.metric_of(splits)
    data = splits.place | {"split": splits.eval.name if splits.eval is not None else None, "local": run.data.local}
    protocol = run.protocol(metric, model.config, processor.size)
    return {"protocol": protocol, "n": 0 if splits.eval is None else len(splits.eval), "metric": metric, "data": data}


def results_of(run: DetectRun, splits: DetectionSplits, model: Any, processor: Any) -> dict[str, AveragePrecision]:
    """What is measured on the split to evaluate on: APs by "box" and "mask". All processes take part.

    The main one draws, unless the figures that are there show another evaluation.

    Raises:
        ValueError: the folder of the results cannot be made.
    """
    assert splits.eval is not None
    folder, shown = make_folder(run), shown_instead(run, evaluated(run, splits, model, processor))
    found = detect(model, splits.eval, processor, run.training.dataloader_num_workers)
    if run.training.process_index != 0:
        return {}
    masks = model.config.masks
    measured = dict(measure(splits.eval, found, splits.class_names, run.metric_of(splits), masks))
    if shown is None:
        draw_detections(splits.eval, found, splits.class_names, folder / DETECTIONS)
        draw_classes(measured, folder / CLASS_AP)
    return measured


def finish(run: DetectRun, splits: DetectionSplits, trainer: DetectionTrainer) -> None:
    """Evaluate after precise BatchNorm, and save the detector with what was measured."""
    folder = Path(str(run.training.output_dir))
    trainer.set_precise_statistics()
    trainer.save_model(str(folder))
    trainer.save_state()
    measured = {} if splits.eval is None else results_of(run, splits, trainer.trained_model(), trainer.processing_class)
    if trainer.is_world_process_zero():
        draw_training(trainer.state.log_history, folder / TRAINING)
        leave_results(run, splits, trainer.model, trainer.processing_class, measured, step=trainer.state.global_step)
        mark_ended(folder)
        write_report(read_run(folder))
        refresh_report(run.encoder.results_dir)


def show_recorded(run: DetectRun) -> None:
    """Print, on the main process, what the detector in the output directory has measured."""
    if run.training.process_index != 0:
        return
    metrics = read_metrics(Path(str(run.training.output_dir)) / METRICS, "correct it, or move it away")
    for kind in ("box", "mask"):
        values = metrics.get(kind, {})
        shown_values = ", ".join(f"{name} {values[name]:.2f} %" for name in ("AP", "AP50", "AP75") if name in values)
        if shown_values:
            print(f"{metrics['protocol']}: {kind} {shown_values}, n {metrics['n']:,}")


def leave_results(
    run: DetectRun,
    splits: DetectionSplits,
    model: Any,
    processor: Any,
    measured: dict[str, AveragePrecision],
    step: int | None = None,
) -> None:
    """Print the APs, and write them to `results.json` in the folder of the detector; after training to `metrics.json` too."""
    folder, content = Path(str(run.training.output_dir)), evaluated(run, splits, model, processor)
    protocol, n, seed = content["protocol"], content["n"], (run.trained or {}).get("seed")
    results = [
        Result(protocol, f"{kind} {name}", 100 * ap.values[name], n, "detector", {}, seed)
        for kind, ap in measured.items()
        for name in ("AP", "AP50", "AP75")
        if ap.values[name] == ap.values[name]  # not NaN
    ]
    print(table(results) if results else "Nothing was measured.")
    figures = figures_of(run, content, OF_DETECTOR)
    for kind, ap in measured.items():
        content[kind] = {name: 100 * value for name, value in ap.values.items()}
        content[f"{kind}_per_class"] = {name: 100 * value for name, value in ap.per_class.items()}
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
