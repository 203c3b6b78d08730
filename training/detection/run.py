"""A detector from its command line: parse, build, train, evaluate, leave results behind."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from modeling_moco import MoCoDetectionImageProcessor, MoCoForObjectDetection, MoCoRCNNConfig

from ..cli import build_parser, check_names, default_values, how_to_run, nearest_name, parse_flags, section_of_file
from ..engine.files import below, check_model_files, write_json
from ..engine.page import read_run, refresh_report, write_report
from ..engine.record import record
from ..engine.results import Result, model_digest, read_results, table
from ..engine.run_folder import (
    CLASS_AP,
    DETECTIONS,
    FREE_TO_CHANGE,
    METRICS,
    OF_DETECTOR,
    SAVED_RECIPE,
    TRAINING,
    drawn,
    mark_ended,
    read_metrics,
    read_sections,
)
from ..errors import shown
from ..evaluation.encoder import Encoder, check_exists
from ..model_folder import load_model, read_config
from .average_precision import AveragePrecision
from .dataset.masks import coco_library
from .dataset.opening import DetectionDataArguments, DetectionSplits
from .dataset.views import DetectionImages, DetectionView
from .evaluate import METRICS as METRIC_NAMES
from .evaluate import Metric, detect, measure
from .figures import draw_classes, draw_detections, draw_training
from .trainer import DetectionTrainer, DetectionTrainingArguments, rate_rule

RECIPES = Path(__file__).parent.parent / "recipes" / "detection"
DEFAULT_RECIPE = "voc_r50_c4_24k"
ABOUT = ("title", "source", "command", "hardware", "expected")
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
    longest_side: int = field(default=1333, metadata={"help": "Greatest length of the long side."})

    def __post_init__(self):
        for name in ("train_sizes", "test_size", "longest_side"):
            value = getattr(self, name)
            if not value or min(value if isinstance(value, list) else [value]) < 1:
                raise ValueError(f"{name} ({value}) must be at least 1 pixel: the papers use 480 to 800, 800 and 1333")

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the model."""
        sizes = ("train_sizes", "test_size", "longest_side")
        return {name: value for name, value in asdict(self).items() if name not in sizes}


PARTS: dict[str, Any] = {
    "data": DetectionDataArguments,
    "model": DetectorArguments,
    "training": DetectionTrainingArguments,
}


@dataclass(frozen=True)
class DetectRecipe:
    """One YAML file: what it reproduces, and values for the flags of `scripts/detect.py`."""

    name: str
    about: dict[str, str]
    values: dict[str, Any]


@dataclass
class DetectRun:
    """A recipe with the command line applied."""

    encoder: Encoder
    recipe: DetectRecipe
    data: DetectionDataArguments
    model: DetectorArguments
    training: DetectionTrainingArguments
    metric: Metric | None
    eval_only: bool
    settings: dict[str, dict[str, Any]]

    @property
    def changed(self) -> list[str]:
        """Settings of this run that are not the recipe's and change what comes out of it."""
        given = {name: value for section in PARTS for name, value in self.settings[section].items()}
        given["dataset_name"] = Path(self.data.dataset_name).name
        there = {
            name: value for section in self.defaults.values() for name, value in section.items()
        } | self.recipe.values
        return [name for name, value in given.items() if name not in FREE_TO_CHANGE and value != there[name]]

    @property
    def about(self) -> dict[str, str]:
        """Title, source and expected result of the recipe if this run is its; else what it is based on and what differs."""
        if not self.changed and not self.encoder.random:
            return self.recipe.about
        changed = self.changed + ["random_encoder"] * self.encoder.random
        return {"title": f"Based on recipe {self.recipe.name}, changed: {', '.join(changed)}"}

    @property
    def defaults(self) -> dict[str, dict[str, Any]]:
        """Values of the flags that neither gave."""
        return default_values(PARTS)

    def metric_of(self, splits: DetectionSplits) -> Metric:
        """The metric that was asked for; by default VOC's where objects are marked difficult, as VOC's are, else COCO's."""
        return self.metric or ("voc07" if splits.difficult else "coco")

    def protocol(self, metric: Metric) -> str:
        """The words that stand for this evaluation in results."""
        masks = "Mask R-CNN" if self.data.masks else "Faster R-CNN"
        args, variant = self.training, self.model.rcnn_variant.upper().replace("_", "-")
        return (
            f"{masks} {variant}, {args.max_steps:,} steps of {args.global_batch_size}, "
            f"learning rate {args.learning_rate:g}, short side {self.model.test_size} px, {METRIC_NAMES[metric]}"
        )


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str) -> DetectRecipe:
    """Read a recipe of a detector by its name or from a file.

    Raises:
        ValueError: no such recipe, a key that no flag has, or a value of another kind than its flag's.
    """
    path = RECIPES / f"{name_or_path}.yaml" if name_or_path in recipe_names() else Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"recipe ({name_or_path!r}) is neither a file nor one of {', '.join(recipe_names())}"
            + nearest_name(name_or_path, recipe_names())
        )
    known = ["about", *PARTS, "encoder"]  # the last is in the recipe.yaml of a run
    content = read_sections(path, f"write the sections about, {', '.join(PARTS)}")
    for section in content:
        if section not in known:
            raise ValueError(f"section {shown(section)!r} in {path} is unknown{nearest_name(section, known)}")
    check_names(path, "about", content.get("about", {}), ABOUT)
    values: dict[str, Any] = {}
    for section, kind in PARTS.items():
        values |= section_of_file(path, section, content.get(section, {}), kind)
    return DetectRecipe(path.stem, {key: str(value) for key, value in content.get("about", {}).items()}, values)


def parse_detect(argv: list[str]) -> DetectRun:
    """The recipe named in `argv`, overridden by the other flags in it.

    Raises:
        ValueError: no model or dataset named, an unknown recipe or flag, or a value out of its range.
    """
    parser = build_parser(
        PARTS.values(),
        usage=f"{how_to_run('detect')} MODEL [--recipe NAME_OR_PATH] [--flag value ...]",
        description="Train a detector around a pretrained encoder, and measure its average precision.",
    )
    parser.add_argument(
        "model", nargs="?", help="Folder or Hub repository of a MoCo model; with --eval_only of a detector."
    )
    parser.add_argument(
        "--recipe", default=DEFAULT_RECIPE, help=f"A YAML file, or one of: {', '.join(recipe_names())}."
    )
    parser.add_argument(
        "--metric", choices=list(METRIC_NAMES), help="By default voc07 where objects are difficult, else coco."
    )
    parser.add_argument("--eval_only", action="store_true", help="Measure a trained detector, and train nothing.")
    parser.add_argument(
        "--random_encoder",
        action="store_true",
        help="Begin with random weights instead: the baseline of any evaluation.",
    )
    known = parser.parse_args(argv)
    if known.model is None:
        raise ValueError("no model given: pass the folder that a run saved to, e.g. runs/quickstart")
    if not known.eval_only:
        check_exists(known.model)
    encoder = Encoder(known.model, known.random_encoder)
    own = Path(known.model) / SAVED_RECIPE  # of a trained detector: what it is called is what it was trained by
    of_detector = known.eval_only and "recipe" not in parser.given(argv) and own.is_file()
    recipe = load_recipe(str(own) if of_detector else known.recipe)
    if "dataset_name" not in recipe.values and "dataset_name" not in parser.given(argv):
        raise ValueError(f"recipe {recipe.name} names no dataset: pass --dataset_name")
    folder = known.model if known.eval_only else str(below(encoder.results_dir, recipe.name))
    _, (data, model, training), settings = parse_flags(parser, PARTS, argv, {"output_dir": folder} | recipe.values)
    settings["data"]["dataset_name"] = data.dataset_name
    settings["encoder"] = {"model": encoder.source, "random_encoder": encoder.random}
    read_results(Path(str(training.output_dir)))
    return DetectRun(encoder, recipe, data, model, training, known.metric, known.eval_only, settings)


def build_model(run: DetectRun, class_names: list[str]) -> MoCoForObjectDetection:
    """The encoder in a new detector of these classes.

    Raises:
        ValueError: there is no such encoder, or it cannot be in a detector.
    """
    source = run.encoder.source
    id2label = dict(enumerate(class_names))
    names = {"id2label": id2label, "label2id": {name: number for number, name in id2label.items()}}
    set_seed(run.training.seed)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # transformers warns that the detector is new, which is the point
    try:
        check_model_files(Path(source))
        read_config(source)
        config = MoCoRCNNConfig.from_pretrained(source, **names, **run.model.config, masks=run.data.masks)
        if run.encoder.random:
            return MoCoForObjectDetection(config)
        model, report = load_model(source, config, MoCoForObjectDetection, {})
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{source} holds no MoCo model ({error}): pass the folder that a run saved to, e.g. runs/quickstart"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(key for key in report["missing_keys"] if not NEW.match(key))
    if missing:
        raise ValueError(
            f"{source} holds a model without {missing[0]}: pass the folder that a pretraining run saved to"
        )
    return model


def load_detector(run: DetectRun) -> tuple[MoCoForObjectDetection, MoCoDetectionImageProcessor]:
    """The trained detector that is to be evaluated, and its image processor.

    Raises:
        ValueError: there is none.
    """
    source = run.encoder.source
    try:
        check_model_files(Path(source))
        config = read_config(source, [MoCoRCNNConfig])
        model, report = load_model(source, config, MoCoForObjectDetection, {})
        if report["missing_keys"]:
            raise OSError(f"it lacks {min(report['missing_keys'])}")
        return model.eval(), MoCoDetectionImageProcessor.from_pretrained(source)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{source} holds no detector ({error}): pass the folder that scripts/detect.py saved to"
        ) from error


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
    if (rule := rate_rule(args)) and "learning_rate" not in run.settings["training"]:
        print(f"     rule: {rule}")
    if splits.eval is None:
        print("The evaluation is left out: the dataset has no split for it (see --eval_split).")


def results_of(run: DetectRun, splits: DetectionSplits, model: Any, processor: Any) -> dict[str, AveragePrecision]:
    """What is measured on the split to evaluate on: APs by "box" and "mask". All processes take part; the main one draws."""
    assert splits.eval is not None
    found = detect(model, splits.eval, processor, run.training.dataloader_num_workers)
    if run.training.process_index != 0:
        return {}
    masks = model.config.masks
    measured = dict(measure(splits.eval, found, splits.class_names, run.metric_of(splits), masks))
    folder = Path(str(run.training.output_dir))
    draw_detections(splits.eval, found, splits.class_names, folder / DETECTIONS)
    draw_classes(measured, folder / CLASS_AP)
    return measured


def finish(run: DetectRun, splits: DetectionSplits, trainer: DetectionTrainer) -> None:
    """Evaluate after precise BatchNorm, and save the detector with what was measured."""
    folder = Path(str(run.training.output_dir))
    trainer.set_precise_statistics()
    trainer.save_model(str(folder))
    trainer.save_state()
    measured = {} if splits.eval is None else results_of(run, splits, trainer.model, trainer.processing_class)
    if trainer.is_world_process_zero():
        draw_training(trainer.state.log_history, folder / TRAINING)
        leave_results(run, splits, trainer.model, measured, trainer.state.global_step)
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
    run: DetectRun, splits: DetectionSplits, model: Any, measured: dict[str, AveragePrecision], step: int | None
) -> None:
    """Print the APs, and write them to `results.json` in the folder of the detector; after training to `metrics.json` too."""
    folder, metric = Path(str(run.training.output_dir)), run.metric_of(splits)
    n = 0 if splits.eval is None else len(splits.eval)
    protocol = run.protocol(metric)
    results = [
        Result(protocol, f"{kind} {name}", 100 * ap.values[name], n, "detector", {}, run.training.seed)
        for kind, ap in measured.items()
        for name in ("AP", "AP50", "AP75")
        if ap.values[name] == ap.values[name]  # not NaN
    ]
    print(table(results) if results else "Nothing was measured.")
    data = splits.place | {"split": splits.eval.name if splits.eval is not None else None, "local": run.data.local}
    content: dict[str, Any] = {"protocol": protocol, "n": n, "metric": metric, "data": data}
    for kind, ap in measured.items():
        content[kind] = {name: 100 * value for name, value in ap.values.items()}
        content[f"{kind}_per_class"] = {name: 100 * value for name, value in ap.per_class.items()}
    if not run.eval_only:
        write_json(folder / METRICS, content)
    figures = drawn(folder, OF_DETECTOR)
    record(
        folder,
        results,
        model=model_digest(model),
        data=data,
        trackers=run.training.trackers,
        figures=figures,
        step=step,
    )
