"""What a run left beside a model: the settings, numbers, results and figures that its card is made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_moco import MoCoForImageClassification

from ..engine.files import read_object
from ..engine.results import encoder_digest, model_digest, read_results
from ..engine.run_folder import CONVERSION, METRICS, SAVED_RECIPE, drawn, home_of, may_leave, read_metrics
from ..errors import visible
from .kinds import Published, Transferred, kind_of
from .lineage import REMEDY, Steps, read_yaml, trace


@dataclass(frozen=True)
class Origin:
    """What a run left beside its model. Each may be empty.

    Args:
        recipe: sections of the settings of the pretraining.
        encoder: what a probe, a fine-tuning or a training around the encoder has recorded of the model that it began with.
        evaluation: settings of the probe or the fine-tuning that followed.
        labelled: those of the images that it was trained on, with labels.
        transfer: sections of the settings of a detector or segmentation model that was trained around the encoder.
        fine_tuned: whether this model's own training changed the encoder by labels.
        fine_tuned_before: whether the encoder with which that training began had been fine-tuned with labels.
        reached: steps that this model's own training had made when it saved a checkpoint, and those that it was to make.
        pretrained_to: those of the pretraining, with a checkpoint of which the next training began.
        metrics: of the pretraining's `metrics.json`, if the weights are the run's final ones or were trained from them; of a
            detector its own.
        conversion: of the `conversion.json` of a converted checkpoint.
        results: entries of `results.json` that were measured on these weights, oldest first.
        figures: PNG files.
        pictured: `ImageSplits.about` of all images that figures may show.
    """

    recipe: dict[str, dict[str, Any]]
    encoder: dict[str, Any]
    evaluation: dict[str, Any]
    labelled: dict[str, Any]
    transfer: dict[str, dict[str, Any]]
    fine_tuned: bool
    fine_tuned_before: bool
    reached: Steps | None
    pretrained_to: Steps | None
    metrics: dict[str, Any]
    conversion: dict[str, Any]
    results: list[dict[str, Any]]
    figures: list[Path]
    pictured: list[dict[str, Any]]


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
    """The figures to publish: those with images that not everybody may see, only if that was asked for."""
    data = origin.pictured or [{}]
    return [path for path in origin.figures if all(may_leave(path, one, include_pictures) for one in data)]


def describe_shown(origin: Origin, model: Published, include_pictures: bool) -> list[str]:
    """What is shown of the data, in lines: names of classes, and what each figure shows, or why it is left out."""
    classes = model.config.num_labels if isinstance(model, MoCoForImageClassification | Transferred) else 0
    named = [f"config.json has the names of the {classes} classes"] if classes else []
    published = published_figures(origin, include_pictures)
    remedy = ", and is left out, for not everybody may see the dataset: --include_pictures publishes it"
    return named + [
        f"{path.name} shows {SHOWN[path.stem]}{'' if path in published else remedy}" for path in origin.figures
    ]


def usual_license(origin: Origin) -> str:
    """The licence where none is named: MIT of weights that began as random ones; unknown of others, which may have one."""
    if origin.conversion or not origin.recipe:
        began = bool(origin.encoder.get("random_encoder"))
    else:
        began = origin.recipe.get("model", {}).get("init_from") is None
    return "mit" if began else "unknown"


def read_origin(source: Path, model: Published) -> Origin:
    """What a run left beside a model: in its folder or, for a checkpoint, a probe or a fine-tuned model, in those above.

    Raises:
        ValueError: a file there is damaged.
    """
    if isinstance(model, Transferred):
        return _read_origin_of_transfer(source, model)
    home, lineage = home_of(source), trace(source)
    settings, run = read_yaml(home / SAVED_RECIPE), lineage.run
    began = settings.get("encoder", {})  # of a probe or a fine-tuning
    recipe = {} if run is None else _plain(read_yaml(run / SAVED_RECIPE))
    encoder = model.moco if isinstance(model, MoCoForImageClassification) else model
    metrics = {} if run is None else _plain(_read_metrics(run))
    fine_tuned, before = bool(began.get("fine_tuned")), lineage.fine_tuned
    if not lineage.final:  # of later weights: what was read is all that is the same
        metrics = {key: metrics[key] for key in ("data",) if key in metrics}
    results = _on(encoder_digest(encoder), [entry for folder in lineage.folders for entry in read_results(folder)])
    return Origin(
        recipe={key: value for key, value in recipe.items() if key != "probe"},  # what a probe would begin with
        encoder=_plain(began),
        evaluation=_plain(settings.get("training", {})) if began else {},
        labelled=_plain(settings.get("data", {})) if began else {},
        transfer={},
        fine_tuned=fine_tuned,
        fine_tuned_before=before,
        reached=lineage.reached,
        pretrained_to=lineage.pretrained_to,
        metrics=metrics,
        conversion=_read_conversion((run or source) / CONVERSION),
        results=_plain(
            _of_this_classifier(results, _read_metrics(home), settings.get("data", {})) if began else results
        ),
        figures=drawn(run) if run and lineage.final and not fine_tuned and not before else [],
        pictured=[metrics.get("data", {})],
    )


def _read_origin_of_transfer(source: Path, model: Transferred) -> Origin:
    home, lineage = home_of(source), trace(source)
    transfer, run, digest = _plain(read_yaml(home / SAVED_RECIPE)), lineage.run, model_digest(model)
    measured = [entry for folder in {home, source} if folder.is_dir() for entry in read_results(folder)]
    return Origin(
        recipe={} if run is None else _plain(read_yaml(run / SAVED_RECIPE)),
        encoder=transfer.get("encoder", {}),
        evaluation={},
        labelled={},
        transfer=transfer,
        fine_tuned=True,
        fine_tuned_before=lineage.fine_tuned,
        reached=lineage.reached,
        pretrained_to=lineage.pretrained_to,
        metrics=_plain(_read_metrics(home)),
        conversion=_read_conversion(home / CONVERSION),
        results=_plain(_on(digest, measured)),
        figures=drawn(source, kind_of(model).figures) if home == source else [],
        pictured=[entry["data"] for entry in measured],  # any of the evaluations may have drawn the figures
    )


def _on(digest: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results that were measured on the weights with this digest, the oldest first."""
    return sorted((entry for entry in results if entry["model"] == digest), key=lambda entry: str(entry["date"]))


def _of_this_classifier(
    results: list[dict[str, Any]], metrics: dict[str, Any], data: dict[str, Any]
) -> list[dict[str, Any]]:
    """Those of the features, and those that a probe or a fine-tuning has in its own `metrics.json`.

    Other probes of the same encoder, though by the same protocol, are of another classifier.

    Args:
        data: settings of the images that it was trained and measured on.
    """
    measured = [metrics, *metrics.get("probes", [])]
    dataset = data.get("dataset_name")
    return [
        entry
        for entry in results
        if entry["protocol"].startswith("weighted kNN")
        or (dataset in (None, entry["data"]["dataset"]) and any(_is_in(entry, numbers) for numbers in measured))
    ]


def _is_in(entry: dict[str, Any], numbers: dict[str, Any]) -> bool:
    final = numbers.get("final")
    best = final.get("best") if isinstance(final, dict) else None
    same = (
        "protocol" in numbers and entry["protocol"].startswith(numbers["protocol"]) and entry["n"] == numbers.get("n")
    )
    return same and entry["value"] in (numbers.get("top1"), numbers.get("top5"), best)


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
