"""What a run left beside a model: the settings, numbers, results and figures that its card is made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_moco import MoCoForImageClassification

from ..engine.files import read_object
from ..engine.results import encoder_digest, model_digest, read_results
from ..engine.run_folder import (
    CONVERSION,
    FINE_TUNED_BEFORE,
    MANIFEST,
    METRICS,
    SAVED_RECIPE,
    drawn,
    may_leave,
    read_metrics,
    read_sections,
)
from ..errors import visible
from .kinds import Published, Transferred, kind_of

REMEDY = "correct it, or move it away"


@dataclass(frozen=True)
class Origin:
    """What a run left beside its model. Each may be empty.

    Args:
        recipe: sections of the settings of the pretraining.
        evaluation: settings of the probe or the fine-tuning that followed.
        transfer: sections of the settings of a detector or segmentation model that was trained around the encoder.
        fine_tuned: whether this model's own training changed the encoder by labels.
        fine_tuned_before: whether the encoder with which that training began had been fine-tuned with labels.
        metrics: of the pretraining's `metrics.json`, if the weights are the run's final ones or were trained from them; of a
            detector its own.
        conversion: of the `conversion.json` of a converted checkpoint.
        results: entries of `results.json` that were measured on these weights, oldest first.
        figures: PNG files.
        pictured: `ImageSplits.about` of the images that figures may show.
    """

    recipe: dict[str, dict[str, Any]]
    evaluation: dict[str, Any]
    transfer: dict[str, dict[str, Any]]
    fine_tuned: bool
    fine_tuned_before: bool
    metrics: dict[str, Any]
    conversion: dict[str, Any]
    results: list[dict[str, Any]]
    figures: list[Path]
    pictured: dict[str, Any]


# What a figure shows of the data.
SHOWN = {
    "neighbours": "images of the train split and of the evaluated one, and names of their classes",
    "tsne": "a point for each image and the names of the classes, no image",
    "training_curves": "numbers of the training, nothing of the data",
    "detections": "images of the evaluated split with their objects, and names of classes",
    "ap_by_class": "names of the classes, no image",
    "segmentations": "images of the evaluated split with their classes, and names of these",
    "iou_by_class": "names of the classes, no image",
}


def published_figures(origin: Origin, include_pictures: bool) -> list[Path]:
    """The figures to publish: those that show images of a local dataset only if asked for."""
    return [path for path in origin.figures if may_leave(path, origin.pictured, include_pictures)]


def describe_shown(origin: Origin, model: Published, include_pictures: bool) -> list[str]:
    """What is shown of the data, in lines: names of classes, and what each figure shows, or why it is left out."""
    classes = model.config.num_labels if isinstance(model, MoCoForImageClassification | Transferred) else 0
    named = [f"config.json has the names of the {classes} classes"] if classes else []
    published = published_figures(origin, include_pictures)
    remedy = ", and is left out, for the dataset is local: --include_pictures publishes it"
    return named + [
        f"{path.name} shows {SHOWN[path.stem]}{'' if path in published else remedy}" for path in origin.figures
    ]


def read_origin(source: Path, model: Published) -> Origin:
    """What a run left beside a model: in its folder or, for a checkpoint, a probe or a fine-tuned model, in those above.

    Raises:
        ValueError: a file there is damaged.
    """
    if isinstance(model, Transferred):
        return _read_origin_of_transfer(source, model)
    home = _home(source)
    settings = _read_yaml(home / SAVED_RECIPE)
    evaluated = settings.get("encoder", {})  # of a probe or a fine-tuning, which began with that model
    run, final = _find_run(source)
    recipe = {} if run is None else _plain(_read_yaml(run / SAVED_RECIPE))
    encoder = model.moco if isinstance(model, MoCoForImageClassification) else model
    metrics = {} if run is None else _plain(_read_metrics(run))
    fine_tuned, before = bool(evaluated.get("fine_tuned")), _fine_tuned_before(home)
    if not final:  # of later weights: what was read is all that is the same
        metrics = {key: metrics[key] for key in ("data",) if key in metrics}
    return Origin(
        recipe={key: value for key, value in recipe.items() if key != "probe"},  # what a probe would begin with
        evaluation=_plain(settings.get("training", {})) if evaluated else {},
        transfer={},
        fine_tuned=fine_tuned,
        fine_tuned_before=before,
        metrics=metrics,
        conversion=_read_conversion((run or source) / CONVERSION),
        results=_plain(_read_own_results(home, run, encoder_digest(encoder), about_encoder=encoder is model)),
        figures=drawn(run) if run and final and not fine_tuned and not before else [],
        pictured=metrics.get("data", {}),
    )


def _read_origin_of_transfer(source: Path, model: Transferred) -> Origin:
    home = _home(source)
    run, _ = _find_run(home)
    digest = model_digest(model)
    measured = read_results(home) if home.is_dir() else []
    results = [entry for entry in measured if entry.get("model") == digest]
    # Any of the evaluations may have drawn the figures.
    public = bool(measured) and all(entry["data"].get("local") is False for entry in measured)
    return Origin(
        recipe={} if run is None else _plain(_read_yaml(run / SAVED_RECIPE)),
        evaluation={},
        transfer=_plain(_read_yaml(home / SAVED_RECIPE)),
        fine_tuned=True,
        fine_tuned_before=_fine_tuned_before(home),
        metrics=_plain(_read_metrics(home)),
        conversion=_read_conversion(home / CONVERSION),
        results=_plain(results),
        figures=drawn(source, kind_of(model).figures) if home == source else [],
        pictured={"local": not public},
    )


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _home(source: Path) -> Path:
    return source.parent if _is_checkpoint(source) else source


def _find_run(folder: Path) -> tuple[Path | None, bool]:
    """The folder of the pretraining run that a model came from, if it is known, and whether from its final weights."""
    if not folder.is_dir():
        return None, False
    folder = folder.resolve()
    if _is_checkpoint(folder):
        return _find_run(folder.parent)[0], False
    began = _read_yaml(folder / SAVED_RECIPE).get("encoder")
    if began is None:
        return folder, True
    return _find_run(folder.parent) if _began_above(folder, began) else (None, False)


def _fine_tuned_before(home: Path) -> bool:
    """Whether the encoder that the training of a folder began with had been fine-tuned, as it recorded or those above did."""
    home = home.resolve()
    began = _read_yaml(home / SAVED_RECIPE).get("encoder")
    if began and began.get(FINE_TUNED_BEFORE):
        return True
    if not began or not _began_above(home, began):
        return False
    above = _home(home.parent)
    return bool(_read_yaml(above / SAVED_RECIPE).get("encoder", {}).get("fine_tuned")) or _fine_tuned_before(above)


def _began_above(folder: Path, encoder: dict[str, Any]) -> bool:
    """Whether a training, of which this is the section "encoder", began with the model in the folder around its own."""
    return not encoder.get("random_encoder") and Path(str(encoder.get("model"))).name == folder.parent.name


def _read_own_results(home: Path, run: Path | None, digest: str, about_encoder: bool) -> list[dict[str, Any]]:
    """Results that were measured on the weights with this digest.

    Args:
        about_encoder: whether classifiers that were trained on it tell of it. Of a classifier, they are other classifiers.
    """
    folders = {folder.resolve(): None for folder in (run, home) if folder is not None and folder.is_dir()}
    results = [entry for folder in folders for entry in read_results(folder) if entry.get("model") == digest]
    if about_encoder:
        return results
    metrics = _read_metrics(home)  # of a fine-tuning, or of probes
    protocols = [entry["protocol"] for entry in (metrics, *metrics.get("probes", [])) if "protocol" in entry]
    return [entry for entry in results if entry["protocol"].startswith(("weighted kNN", *protocols))]


def _read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """Sections of a file beside a model; none if it is not there."""
    return read_sections(path, REMEDY) if path.is_file() else {}


def _read_conversion(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    about = _plain(read_object(path, REMEDY))
    for name, kind in (("file", str), ("format", str), ("epoch", int | float)):
        if not isinstance(about.get(name, 0 if name == "epoch" else None), kind):
            raise ValueError(f"{path} has no {name}, or one of another kind: {REMEDY}")
    return about


def _plain(value: Any) -> Any:
    """What a file holds, with each text in one line of signs that show something."""
    if isinstance(value, dict):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return list(map(_plain, value))
    return visible(" ".join(value.split())) if isinstance(value, str) else value


def _read_metrics(folder: Path) -> dict[str, Any]:
    return read_metrics(folder / METRICS, REMEDY)
