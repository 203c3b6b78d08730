"""The folder of a run: the names of all its files, and whose run it is.

Only this module names these files, so that writers, evaluations, the report and the Hub agree on them.
"""

import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import dataset_info
from huggingface_hub.utils import httpx  # the library that the client speaks HTTP with

from ..errors import one_line, shown
from .files import UNFINISHED, below, inside, leads_out, read_object, write_json, write_whole

DIGITS = "digits"  # name of the dataset that is built in
SAVED_RECIPE = "recipe.yaml"  # the settings of a run, in its output directory
MANIFEST = "manifest.json"  # of a checkpoint, written last
METRICS = "metrics.json"  # what a run, a probe or a fine-tuning came to
RESULTS = "results.json"  # what every evaluation of a model has measured
SPLIT = "split.json"  # which images a fine-tuning was trained on
LOCK = ".lock"  # held by the process that writes to the folder, and says which that is
CONVERSION = "conversion.json"  # where a converted model came from, beside it
UNREADABLE = "unreadable_images.txt"  # images that were left out because they cannot be read
DATASET = "dataset.json"  # what a run was trained on: name, number and digest of its files
FIRST_FILES = (SAVED_RECIPE, DATASET, LOCK, UNFINISHED)  # what a crash at the start of a run leaves
REPORT = "report.html"
FEATURES = "features"  # folder of features that were extracted once
EMBEDDINGS = "embeddings"  # folder of a set of embeddings, a row an image
EMBEDDED = "embedding.json"  # there, what the set is of: the encoder, the images, their view
PREPARED = "prepared.json"  # of a prepared dataset: what it was made of and how, and what each of its files holds
# Name of a figure's files: its title, and how to read it.
CURVES = {
    "training_curves": (
        "Training",
        "The loss falls below the dashed line once queries find their keys; contrast accuracy says how often, kNN accuracy "
        "what the features are worth.",
    )
}
OF_FEATURES = {
    "neighbours": (
        "Nearest neighbours",
        "Each row is a query and the training images nearest to it; a vermilion frame with ≠ marks another class.",
    ),
    "tsne": (
        "The space of features",
        "Images with similar features lie close together: good features give each class a place of its own. Distances "
        "between far groups mean nothing.",
    ),
}
TRAINING, DETECTIONS, CLASS_AP = "training_curves", "detections", "ap_by_class"
OF_DETECTOR = {
    TRAINING: (
        "Training",
        "Where the learning rate drops, the losses fall once more. The loss of masks is there for a detector that has them.",
    ),
    DETECTIONS: (
        "What it finds",
        "Each row is an image of the evaluated split: on the left the annotated objects, on the right what is found with a "
        "score above 0.5.",
    ),
    CLASS_AP: (
        "AP by class",
        "The average precision of each class, the best first; their mean is the AP of the evaluation.",
    ),
}
SEGMENTATIONS, CLASS_IOU = "segmentations", "iou_by_class"
OF_SEGMENTATION = {
    TRAINING: ("Training", "Where the learning rate drops, the loss falls once more."),
    SEGMENTATIONS: (
        "What it predicts",
        "Each row is an image of the evaluated split, the classes that are annotated, and those predicted.",
    ),
    CLASS_IOU: (
        "IoU by class",
        "The intersection over union of each class, the best first; their mean is the mIoU of the evaluation.",
    ),
}
FIGURES = (*CURVES, *OF_FEATURES)  # of a pretraining run
OF_TASKS = {"detect": OF_DETECTOR, "segment": OF_SEGMENTATION}  # of what an encoder was transferred to, by its command
WITH_IMAGES = ("neighbours", DETECTIONS, SEGMENTATIONS)  # figures that show images
# How the kNN of a run is measured. It changes no weight, and makes no other row of a comparison. A continuation keeps all but
# the number of neighbours, which stands beside each number: the curve and the numbers before and after are one measurement.
OF_MONITOR = {"knn_k", "knn_temperature", "knn_bank_size", "knn_features"}
# What may differ between a run and its continuation, because it changes no weight and no number: how fast images come, on what
# the run computes, what is printed, sent and saved, and how often it is measured.
FREE_TO_CHANGE = {
    *("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("use_cpu", "local_rank", "ddp_timeout", "disable_tqdm", "log_level", "log_level_replica"),
    *("logging_strategy", "logging_steps", "logging_first_step", "report_to", "project", "run_name"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("save_strategy", "save_steps", "save_total_limit"),
    *("eval_strategy", "eval_every_n_epochs", "per_device_eval_batch_size"),
}
NOT_OF_THE_RUN = ("probe",)  # section of a recipe for later commands
START = "start"  # section of a recipe.yaml about the weights that a pretraining run began with
SEEN_LABELS = (
    "seen_labels"  # in the section "encoder" of an evaluation: the encoder had been trained with labels before
)
WEIGHTS = "weights"  # there, and in the section "encoder" of an evaluation: digest of the weights that it began with
PATHS = ("dataset_name", "model", "init_from")  # settings that may be folders


# PyYAML raises these of Python for a value that its tag does not fit, as `!!int ''`, and for very deep nesting.
UNCAUGHT_BY_YAML = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def check_free(folder: Path) -> None:
    """
    Raises:
        ValueError: there is something at this path, and it is not the folder of a run.
    """
    if (folder / SAVED_RECIPE).is_file() or not folder.exists():
        return
    if not folder.is_dir() or any(not path.name.startswith(FIRST_FILES) for path in folder.iterdir()):
        raise ValueError(f"output_dir ({folder}) holds files of something else: pass another --output_dir")


def refuse_inside(folder: Path, dataset: str) -> None:
    """
    Args:
        folder: to write to.
        dataset: its name, or absolute path.

    Raises:
        ValueError: the folder lies in that of the dataset, whose images or data files those of a run would become.
    """
    if Path(dataset).is_dir() and folder.resolve().is_relative_to(Path(dataset).resolve()):
        raise ValueError(f"{folder} lies in {dataset}, and would be read as part of it: name another folder")


NUMBER = int | float | None  # None is what was not measured
METRICS_KINDS: dict[str, Any] = {  # of the values in `metrics.json`
    **{"ended": str, "protocol": str, "data": dict, "probes": list, "knn": dict},
    **dict.fromkeys(("knn_top1_before", "knn_top1_after", "loss", "contrast_top1"), NUMBER),
    **dict.fromkeys(("waiting_for_data", "peak_memory", "top1", "top5", "n"), NUMBER),
    **{
        "steps": int,
        "skipped_images": int,
        "images_per_second": int | float,
        "processes": int,
        "hardware": str,
        "versions": dict,
        "commit": str | None,
    },
}


def read_metrics(path: Path, remedy: str) -> dict[str, Any]:
    """What a run, a probe or a fine-tuning came to, by name; nothing without the file.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return {}
    metrics = read_object(path, remedy)
    probes = metrics["probes"] if isinstance(metrics.get("probes"), list) else []
    for entry in (metrics, *probes):
        if not isinstance(entry, dict):
            raise ValueError(f"{path} has {shown(entry)} for a probe: {remedy}")
        if wrong := [
            name for name, kind in METRICS_KINDS.items() if name in entry and not isinstance(entry[name], kind)
        ]:
            raise ValueError(f"{path} has a {wrong[0]} of another kind ({shown(entry[wrong[0]])}): {remedy}")
    if lacking := [name for probe in probes for name in ("name", "protocol") if not isinstance(probe.get(name), str)]:
        raise ValueError(f"{path} has a probe without {lacking[0]}: {remedy}")
    return metrics


def read_sections(path: Path, remedy: str) -> dict[str, dict[str, Any]]:
    """The sections of a recipe, of a run's settings or of a probe's, by name.

    Args:
        remedy: what to do about a file that has none.

    Raises:
        ValueError: it is not YAML, not made of sections of keys, or leads out of its folder.
    """
    inside(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, *UNCAUGHT_BY_YAML) as error:
        raise ValueError(f"{path} is not YAML ({one_line(error)}): {remedy}") from error
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise ValueError(f"{path} is not made of sections of keys: {remedy}")
    names = [name for part in (content, *content.values()) for name in part]
    if odd := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"{path} has the name {shown(odd[0])}, which is no text: {remedy}")
    return content


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint that was saved whole, wherever it lies and whatever it is called."""
    return (folder / MANIFEST).is_file()


def home_of(folder: Path) -> Path:
    """The folder of the training that saved a model."""
    return folder.parent if holds_checkpoint(folder) else folder


def results_folder(source: str, random: bool) -> Path:
    """Where the evaluations of a model write: its own folder, `runs/OWNER--NAME` of one on the Hub; `random_encoder/` in it.

    Args:
        source: folder, checkpoint or Hub repository of a model.
        random: whether only the architecture is that model's, and its weights are random.

    Raises:
        ValueError: `random_encoder/` is a link.
    """
    # With its owner: `runs/NAME` may be a run of this machine, or of another owner's model.
    folder = Path(source) if Path(source).is_dir() else Path("runs") / source.replace("/", "--")
    return below(folder, "random_encoder") if random else folder


def begin_with(source: str, random: bool) -> dict[str, Any]:
    """What a training records of the encoder that it begins with.

    Args:
        source: folder, checkpoint or Hub repository of a model.
        random: whether only the architecture is that model's.

    Raises:
        ValueError: what lies beside the model is damaged.
    """
    place = Path(source)
    about: dict[str, Any] = {
        "model": os.path.abspath(source) if place.is_dir() else source,  # known from anywhere, and no name on the Hub
        "random_encoder": random,
    }
    home = home_of(place)
    if not random and (home / SAVED_RECIPE).is_file():
        began = read_sections(home / SAVED_RECIPE, "correct it, or move it away").get("encoder", {})
        if began.get("fine_tuned") or began.get(SEEN_LABELS):
            about[SEEN_LABELS] = True
    return about


def write_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Begin a run in its folder."""
    write_whole(folder / SAVED_RECIPE, yaml.safe_dump(recipe, sort_keys=False))


def has_begun(folder: Path) -> bool:
    """Whether a run has left more in its folder than a crash at the start does."""
    return (folder / SAVED_RECIPE).is_file() and any(not path.name.startswith(FIRST_FILES) for path in folder.iterdir())


def check_same_run(folder: Path, settings: dict[str, dict[str, Any]], defaults: dict[str, dict[str, Any]]) -> None:
    """
    Args:
        settings: what the recipe and the command line gave, by section.
        defaults: values of the flags that neither gave.

    Raises:
        ValueError: the run in the folder has other settings or evaluates other weights, or they cannot be read.
    """
    saved = read_sections(folder / SAVED_RECIPE, "bring it back, or pass another --output_dir")
    for section in (name for name in settings if name not in NOT_OF_THE_RUN):
        usual = defaults.get(section, {})
        then, now = usual | saved.get(section, {}), usual | settings[section]
        free = FREE_TO_CHANGE | {WEIGHTS, SEEN_LABELS}
        if not now.get("load_best_model_at_end"):  # which compares the accuracies of the whole run
            free |= {"knn_k"}
        for key in sorted((set(then) | set(now)) - free):
            if not _are_same(key, then.get(key), now.get(key)):
                raise ValueError(
                    f"output_dir ({folder}) already holds another run: {shown(key)} is {shown(then.get(key))} there and "
                    f"{shown(now.get(key))} here. Pass another --output_dir, or the same settings to continue it"
                    f"{_if_moved(key, then.get(key))}"
                )
    for section in ("encoder", START):
        _check_same_encoder(folder, saved.get(section, {}), settings.get(section, {}))


def _if_moved(key: str, then: Any) -> str:
    """What else to do where a dataset is no longer at its place."""
    gone = key == "dataset_name" and isinstance(then, str) and Path(then).is_absolute() and not Path(then).exists()
    return f"; if its images were moved, leave a link to them at {shown(then)}" if gone else ""


def _check_same_encoder(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    if WEIGHTS in then and WEIGHTS in now and then[WEIGHTS] != now[WEIGHTS]:
        raise ValueError(
            f"{now['model']} is not the encoder that the run in {folder} was begun with: the digest of its weights was "
            f"{shown(then[WEIGHTS])} and is {now[WEIGHTS]}. Pass another --output_dir, or remove {folder}"
        )


def check_same_data(folder: Path, place: dict[str, Any]) -> None:
    """
    Args:
        place: "dataset", its name or absolute path, and "content", which identifies the rows of each split.

    Raises:
        ValueError: the folder's run has seen other rows of the same dataset.
    """
    for split, then in recorded_content(folder, place["dataset"]).items():
        now = place["content"].get(split, then)
        if now != then:
            raise ValueError(
                f"{place['dataset']} is not what the run in {folder} was begun with: split {split!r} was {shown(then)} and is "
                f"{now}. Bring its files back, or begin another run"
            )


def content_to_continue(folder: Path, dataset: str) -> dict[str, str]:
    """What identified the rows of a run that has begun in this folder with this dataset; else empty.

    Raises:
        ValueError: the record of it is damaged.
    """
    return recorded_content(folder, dataset) if has_begun(folder) else {}


def recorded_content(folder: Path, dataset: str) -> dict[str, str]:
    """What identified the rows of each split of a dataset when a run was begun with it; empty where that is not known.

    Raises:
        ValueError: the record of it is damaged.
    """
    path = folder / DATASET
    if not path.is_file():
        return {}
    remedy = "bring it back, or delete it, and the data is no longer compared with what the run has seen"
    place = read_object(path, remedy)
    content = place.get("content")
    if not isinstance(content, dict) or not all(
        isinstance(text, str) for text in (place.get("dataset"), *content.values())
    ):
        raise ValueError(f"{path} has no dataset with the content of its splits: {remedy}")
    return content if _are_same("dataset_name", place["dataset"], dataset) else {}


def refuse_namesake(recorded: Any, now: str) -> None:
    """
    Args:
        recorded: the name of a run's dataset, which is an absolute path if that was a folder.
        now: what that name is here.

    Raises:
        ValueError: it is a folder here, and was none.
    """
    if isinstance(recorded, str) and Path(now).is_absolute() and not Path(recorded).is_absolute():
        raise ValueError(
            f"{recorded} was no folder where the run was trained on it, and here is one of that name: give the command from "
            f"another folder, or pass --dataset_name {now} if it is meant"
        )


def _are_same(key: str, then: Any, now: Any) -> bool:
    if then == now or key not in PATHS or not (isinstance(then, str) and isinstance(now, str)):
        return bool(then == now)
    # A run keeps the absolute path of a folder, which may be gone when the same command names it from here. Another name of a
    # dataset is that of one on the Hub, or built in, whatever folder has it here.
    if key == "dataset_name" and (DIGITS in (then, now) or not Path(then).is_absolute()):
        return False
    return Path(then).resolve() == Path(now).resolve()


def drawn(folder: Path, names: Iterable[str] = FIGURES) -> list[Path]:
    """The figures of a run that are there, as PNG files. A link may show what lies elsewhere, and is none."""
    paths = [folder / f"{name}.png" for name in names]
    return [path for path in paths if path.is_file() and not leads_out(path)]


def may_leave(figure: Path, data: dict[str, Any], include_pictures: bool) -> bool:
    """Whether a figure may leave this machine: one with images that not everybody may see, only if that was asked for.

    Args:
        data: `ImageSplits.about`. Where it does not say where the images were, they may be somebody's own.
    """
    if include_pictures or figure.stem not in WITH_IMAGES:
        return True
    return data.get("local") is False and is_public(str(data.get("dataset")))


@cache
def is_public(dataset: str) -> bool:
    """Whether everybody may see the images of a dataset: the digits, or one that the Hub gives without a token or an agreement.

    Where the Hub cannot be asked, the answer is no.
    """
    if dataset == DIGITS:
        return True
    try:
        about = dataset_info(dataset, token=False)
    except (OSError, ValueError, httpx.HTTPError):
        return False
    return not (about.private or about.gated)


def unused(name: str) -> str:
    """A path for a new run: this one, or with the first number behind it that makes it free."""
    return next(path for path in numbered(name) if not Path(path).exists())


def numbered(name: str) -> Iterator[str]:
    """A name, and the same with numbers behind it."""
    return chain([name], (f"{name}_{number}" for number in count(2)))


def mark_ended(folder: Path) -> None:
    """Write to `metrics.json` when the run ended. All else in its folder must have been written."""
    metrics = read_metrics(folder / METRICS, "give the same command again")
    write_json(folder / METRICS, metrics | {"ended": datetime.now(UTC).isoformat(timespec="seconds")})


def ended(folder: Path) -> str | None:
    """When the run of a folder ended; None for one that has not."""
    remedy = "delete it, and the run goes on from its newest checkpoint"
    when: str | None = read_metrics(folder / METRICS, remedy).get("ended")
    return when
