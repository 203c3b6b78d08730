"""The model card: `model_card.md` filled with what is known of a model, and with nothing that was not measured.

Names of files on this machine do not appear: a local dataset is called by the name of its folder.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_moco import (
    MoCoConfig,
    MoCoDetectionImageProcessor,
    MoCoForImageClassification,
    MoCoForObjectDetection,
    MoCoImageProcessor,
    MoCoSegmentationImageProcessor,
)
from modeling_moco.dictionary_moco import BUILT_IN

from ..engine.results import OF_PIXELS, has_interval, spread
from ..model_folder import bare_name
from ..optimization.schedules import recorded_rate
from .exports import Model, encoder_and_classifier, output_name
from .kinds import Processor, Published, Transferred, kind_of
from .methods import CITATIONS, method_of, papers_of
from .origin import Origin

# Beside this file in an installation, at the top of a checkout.
PLACES = (Path(__file__).with_name("model_card.md"), Path(__file__).parents[2] / "model_card.md")
TEMPLATE = next(path for path in PLACES if path.is_file())
SHOWN_SECTIONS = ("data", "model", "training")  # of a recipe; what it was expected to reach is no result
# Settings of training whose values are shown though they are words: others may say where on this machine something is.
WORDS = (
    *("optim", "optim_args", "learning_rate_scaling", "lr_scheduler_type", "eval_strategy", "save_strategy"),
    *("knn_features", "queue_start", "bank_start", "key_momentum_schedule", "mode", "lr_scheduler_kwargs"),
)


def escape(text: object) -> str:
    """Words of others in Markdown: shown as they are, and neither HTML, a link, code nor the end of a cell."""
    return re.sub(r"([\\`*\[\]<>|~$&#]|(?<!\w)_|_(?!\w))", r"\\\1", str(text))


def public_name(dataset: str, local: bool | None = None) -> str:
    """A dataset's name on the Hub, or of its folder.

    Args:
        local: whether it was a folder when it was read; None where nobody wrote it down.
    """
    path = Path(dataset).expanduser()
    if local is None:
        local = path.exists() or path.is_absolute() or dataset.startswith(".") or dataset.count("/") > 1
    return path.resolve().name if local else dataset


def _dataset(origin: Origin) -> str | None:
    """What the encoder was pretrained on."""
    name = origin.recipe.get("data", {}).get("dataset_name")
    local = None if origin.transfer else origin.metrics.get("data", {}).get("local")
    return None if name is None else public_name(name, local)


def _transfer_dataset(origin: Origin) -> str | None:
    name = origin.transfer.get("data", {}).get("dataset_name")
    return None if name is None else public_name(name, origin.metrics.get("data", {}).get("local"))


def _labelled_dataset(origin: Origin) -> str | None:
    """What a probe or a fine-tuned model had its labels of."""
    name = origin.labelled.get("dataset_name")
    return None if name is None else public_name(name)


def render_card(
    repo_id: str,
    model: Published,
    processor: Processor,
    origin: Origin,
    files: list[str],
    *,
    license: str,
    training_state: bool,
    branch: str | None = None,
) -> ModelCard:
    """The card of a model that is published as these files.

    Args:
        branch: of the repository, that they are committed to; None for main, which is loaded where none is named.
    """
    kind, results = kind_of(model), _newest(origin.results)
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=kind.task,
        tags=["moco", "contrastive-learning", "self-supervised-learning", bare_name(model.config.architecture)],
        datasets=_hub_datasets(origin),
        base_model=_base_model(origin),
        metrics=sorted({_measured(entry)[1] for entry in results}) or None,
        model_name=name,
        eval_results=[_eval_result(entry) for entry in results] or None,
    )
    own = _of_transfer(model, origin) if isinstance(model, Transferred) else _of_encoder(model, origin, files)
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        at_revision=f", revision={json.dumps(branch)}" if branch else "",
        at_branch=f"@{branch}" if branch else "",
        name=name,
        task=kind.task,
        auto_class=kind.auto_class,
        moco_class=type(model).__name__,
        training_state=_state_of_training(model.config) if training_state else None,
        without_labels=_without_labels(model, origin),
        began=_start(origin) is not None,
        size=processor.crop_size["height"] if isinstance(processor, MoCoImageProcessor) else None,
        preparation=_preparation(processor),
        training=_training(origin),
        settings=yaml.safe_dump(settings, sort_keys=False) if (settings := _settings(origin)) else "",
        figures=[(path.name, *kind.figures[path.stem]) for path in origin.figures],
        results=[list(map(escape, _row(entry))) for entry in results],
        citations="\n".join(CITATIONS[paper] for paper in _cited(model, origin)),
        **own,
    )
    return card


def _of_encoder(model: Model, origin: Origin, files: list[str]) -> dict[str, Any]:
    """What the card of an encoder or a classifier says."""
    encoder, classifier = encoder_and_classifier(model)
    resnet = "ResNetModel" if classifier is None else "ResNetForImageClassification"
    features = f"pooler_output (1, {encoder.head_hidden_size}), last_hidden_state"
    return {
        "summary": _summary(model, origin),
        "everywhere": "moco.safetensors" in files,
        "resnet": resnet if "resnet/config.json" in files else None,
        "classes": None if classifier is None else classifier.out_features,
        "width": encoder.head_hidden_size,
        "outputs": features if classifier is None else "logits",
        "onnx": "onnx/model.onnx" in files,
        "torch_export": "torch_export/model.pt2" in files,
        "output": output_name(model),
    }


def _of_transfer(model: Transferred, origin: Origin) -> dict[str, Any]:
    """What the card of a detector or a segmentation model says."""
    summary = f"{_summary_of_transfer(model, origin)} {_began(model, origin)}"
    of_both = {"summary": summary, "classes": model.config.num_labels}
    if not isinstance(model, MoCoForObjectDetection):
        return of_both | {"segments": True, "outputs": "logits"}
    masks = model.config.masks
    return of_both | {
        "detects": True,
        "masks": masks,
        "outputs": "scores, labels, pred_boxes" + ", pred_masks" * masks,
    }


def _preparation(processor: Processor) -> str:
    """How images are made for the model."""
    mean, std = _listed(processor.image_mean), _listed(processor.image_std)
    standard = f"scaled to [0, 1] and standardised with mean {mean} and standard deviation {std}."
    if isinstance(processor, MoCoSegmentationImageProcessor):
        return f"Images are RGB of their own size, {standard}"
    if isinstance(processor, MoCoDetectionImageProcessor):
        short, long = processor.size["shortest_edge"], processor.size["longest_edge"]
        how = f", but their long side to no more than {long} px (bilinear, antialiased)"
    else:
        short, size = processor.size["shortest_edge"], processor.crop_size["height"]
        how = f" (bilinear, antialiased), the central {size} x {size} px are cut out"
    return f"Images are RGB, their short side is resized to {short} px{how}, {standard}"


def _summary(model: Model, origin: Origin) -> str:
    architecture = bare_name(model.config.architecture)
    if isinstance(model, MoCoForImageClassification):
        return _summary_of_classifier(model, origin)
    features = "it turns an image into features for kNN, linear classifiers, fine-tuning and detection."
    if origin.recipe or origin.conversion:
        return f"A {architecture} {_pretrained(model.config.to_dict(), origin, told=True)}: {features}"
    method, paper = method_of(model.config.to_dict())
    return f"A {architecture} for {escape(method)}{_arxiv(paper)}), of whose training nothing is recorded: {features}"


def _summary_of_classifier(model: MoCoForImageClassification, origin: Origin) -> str:
    architecture, classes = bare_name(model.config.architecture), f"{model.config.num_labels} classes"
    if not origin.encoder and not origin.conversion:
        return f"A {architecture} with a classifier of {classes}; nothing is recorded of how they were trained."
    baseline, then = "", "was trained"
    if origin.encoder.get("random_encoder"):
        before, baseline = "that began with random weights", ": a baseline, nothing was pretrained"
    elif origin.recipe or origin.conversion:
        before, then = _pretrained(model.config.to_dict(), origin, told=bool(origin.recipe)), "then"
        before += ", fine-tuned with labels" * origin.fine_tuned_before
    else:
        before = f"that began with the weights of {_began_with(origin)}"
        before += ", which had been fine-tuned with labels" * origin.fine_tuned_before
    labels = f"labels of {escape(dataset)}" if (dataset := _labelled_dataset(origin)) else "labels"
    if origin.fine_tuned:
        return (
            f"A {architecture} {before}, and {then} as a whole, with {labels}, as a classifier of {classes}{baseline}."
        )
    return f"A {architecture} {before}, and a classifier of {classes} that was trained on it with {labels}{baseline}."


def _cited(model: Published, origin: Origin) -> list[str]:
    """Papers of what the encoder went through; the configuration of a detector has nothing of that."""
    settings = origin.recipe.get("model", {}) if isinstance(model, Transferred) else model.config.to_dict()
    return papers_of(settings)


def _without_labels(model: Published, origin: Origin) -> bool:
    """Whether the encoder was trained without labels, as far as is known."""
    known = bool(origin.recipe or origin.conversion)
    return known and not isinstance(model, Transferred) and not origin.fine_tuned and not origin.fine_tuned_before


def _pretrained(settings: dict[str, Any], origin: Origin, told: bool) -> str:
    """What an encoder has gone through, as an attribute of it."""
    (method, paper), dataset, start = method_of(settings, told), _dataset(origin), _start(origin)
    images = f" on {escape(dataset)}" if dataset else ""
    began = f", beginning with the weights of {escape(start)}" if start else ""
    return f"trained by {escape(method)}{_arxiv(paper)}){images} without labels{began}"


def _arxiv(paper: str) -> str:
    return f"[arXiv:{paper}](https://arxiv.org/abs/{paper})"


def _began_with(origin: Origin) -> str:
    return escape(public_name(str(origin.encoder.get("model"))))


def _summary_of_transfer(model: Transferred, origin: Origin) -> str:
    config, dataset = model.config, _transfer_dataset(origin)
    of_dataset = f" of {escape(dataset)}" if dataset else ""
    if not isinstance(model, MoCoForObjectDetection):
        return f"An FCN-16s that names the class of every pixel, of {config.num_labels}, trained with the masks{of_dataset}."
    kind = "Mask R-CNN" if config.masks else "Faster R-CNN"
    variant = "C4" if config.rcnn_variant == "c4" else "dilated C5"
    return (
        f"A {kind} ({variant}) that finds objects of {config.num_labels} classes, trained with the boxes"
        f"{' and masks' * config.masks}{of_dataset}."
    )


def _began(model: Transferred, origin: Origin) -> str:
    """What the encoder had seen before it was trained as a part of the model."""
    encoder, architecture = origin.encoder, bare_name(model.config.architecture)
    if encoder.get("random_encoder"):
        return f"Its {architecture} began with random weights: it is a baseline, and nothing was pretrained."
    if not encoder:
        return f"Around a {architecture}; nothing is recorded of what that was pretrained on."
    if not origin.recipe:
        tuned = ", which had been fine-tuned with labels" * origin.fine_tuned_before
        return f"Its {architecture} began with the weights of {_began_with(origin)}{tuned}."
    tuned = " and fine-tuned with labels" * origin.fine_tuned_before
    return f"Its {architecture} was {_pretrained(origin.recipe.get('model', {}), origin, told=True)}{tuned} before."


def _state_of_training(config: MoCoConfig) -> str:
    parts = ["Key encoder"] * (config.key_encoder == "momentum") + ["projector"]
    parts += ["predictor"] * (config.prediction_head != "none") + ["queue"] * (config.dictionary == "queue")
    words = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else ["The projector"])
    there = f"{words} {'are' if len(parts) > 1 else 'is'} there"
    if config.dictionary not in BUILT_IN:
        return (
            f"{there}, and what the dictionary {escape(config.dictionary)} holds, whose class is not: register it before you "
            "load the model, and training can go on from here. For features alone pass `momentum_encoder=False`."
        )
    lacks = ", the bank of the training images is not" * (config.dictionary == "bank")
    return f"{there}{lacks}: training can go on from here."


def _training(origin: Origin) -> str:
    about, metrics = (origin.transfer or origin.recipe).get("about", {}), origin.metrics
    source = f" (source: {escape(about['source'])})" if "source" in about else ""
    sentences = [f"Recipe: {escape(about['title'])}{source}." if "title" in about else "", *_ran(metrics)]
    if origin.reached:
        sentences.append("These are the weights after step {:,} of {:,}.".format(*origin.reached))
    if origin.pretrained_to:
        sentences.append("The pretraining was at step {:,} of {:,} then.".format(*origin.pretrained_to))
    if (began := _start(origin)) is not None:
        sentences.append(f"The pretraining began with the weights of {escape(began)}.")
    if converted := origin.conversion:
        epoch = f", epoch {converted['epoch']:g}" if "epoch" in converted else ""
        sentences.append(f"Converted from {escape(converted['file'])} ({escape(converted['format'])}{epoch}).")
    if (rate := recorded_rate((origin.transfer or origin.recipe).get("training", {}))) is not None:
        sentences.append(f"Learning rate: {rate}.")
    pretrained = not (origin.transfer or origin.encoder.get("random_encoder"))
    if origin.encoder and pretrained and not (origin.recipe or origin.conversion):
        sentences.append("Nothing is recorded of how the weights that this began with were trained.")
    if _settings(origin):
        sentences.append("These are the settings that were given; all else has its default.")
    elif origin.encoder:
        sentences.append("All settings had their defaults.")
    return " ".join(filter(None, sentences)) or "Nothing is recorded of how these weights were trained."


def _ran(metrics: dict[str, Any]) -> list[str]:
    sentences = []
    if {"steps", "images_per_second"} <= metrics.keys():
        sentences.append(f"{metrics['steps']:,} steps, {metrics['images_per_second']:.4g} images/s.")
    if {"hardware", "versions", "processes"} <= metrics.keys():
        versions = ", ".join(f"{name} {metrics['versions'].get(name)}" for name in ("torch", "transformers", "timm"))
        commit = f", commit {metrics['commit']}" if metrics.get("commit") else ""
        sentences.append(escape(f"{metrics['processes']} x {metrics['hardware']}; {versions}{commit}."))
    return sentences


def _settings(origin: Origin) -> dict[str, dict[str, Any]]:
    pretraining = _settings_of_encoder(origin)
    if not origin.transfer:
        return pretraining
    sections = {name: dict(origin.transfer.get(name, {})) for name in SHOWN_SECTIONS}
    if dataset := _transfer_dataset(origin):
        sections["data"]["dataset_name"] = dataset
    sections["training"] = _public(sections["training"])
    return {name: values for name, values in (sections | {"pretraining": pretraining}).items() if values}


def _settings_of_encoder(origin: Origin) -> dict[str, dict[str, Any]]:
    sections = {name: dict(origin.recipe.get(name, {})) for name in SHOWN_SECTIONS}
    if dataset := _dataset(origin):
        sections["data"]["dataset_name"] = dataset
    if (began := _start(origin)) is not None:
        sections["model"]["init_from"] = began
    sections["training"] = _public(sections["training"])
    sections["fine-tuning" if origin.fine_tuned else "probe"] = _other_images(origin) | _public(origin.evaluation)
    return {name: values for name, values in sections.items() if values}


def _other_images(origin: Origin) -> dict[str, Any]:
    """Settings of the images of a probe or a fine-tuning that are not those of the pretraining."""
    before, now = origin.recipe.get("data", {}), origin.labelled
    other = {name: value for name, value in now.items() if name not in before or value != before[name]}
    return other | ({"dataset_name": _labelled_dataset(origin)} if "dataset_name" in other else {})


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    def tells_no_place(value: Any) -> bool:
        return (
            value is None
            or isinstance(value, int | float)
            or (isinstance(value, list) and all(map(tells_no_place, value)))
        )

    return {name: value for name, value in settings.items() if name in WORDS or tells_no_place(value)}


def _hub_datasets(origin: Origin) -> list[str] | None:
    named = (
        (origin.recipe.get("data", {}).get("dataset_name"), _dataset(origin)),
        (origin.transfer.get("data", {}).get("dataset_name"), _transfer_dataset(origin)),
        (origin.labelled.get("dataset_name"), _labelled_dataset(origin)),
    )
    return sorted({given for given, name in named if given is not None and name == given and "/" in given}) or None


def _start(origin: Origin) -> str | None:
    """The weights that the run began with: a name on the Hub, or of a file or folder; None for random ones."""
    source = origin.recipe.get("model", {}).get("init_from")
    return None if source is None else public_name(source)


def _base_model(origin: Origin) -> str | None:
    source, name = origin.recipe.get("model", {}).get("init_from"), _start(origin)
    if origin.encoder and not origin.recipe and not origin.encoder.get("random_encoder"):
        source = str(origin.encoder.get("model", ""))
        name = public_name(source)
    return name if name is not None and name == source and "/" in name else None


def _newest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result of each protocol, with its settings, and split, with its view and labels.

    It is the newest of those on the most images, so that no trial on a few hides them.
    """
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in results:
        data = entry["data"]
        key: tuple[Any, ...] = (entry["protocol"], entry["feature"], entry["metric"], yaml.safe_dump(entry["settings"]))
        key += tuple(data.get(name) for name in ("dataset", "config", "split", "view", "label_column", "train_split"))
        if key not in kept or entry["n"] >= kept[key]["n"]:
            kept[key] = entry
    return list(kept.values())


def _measured(entry: dict[str, Any]) -> tuple[str, str]:
    """The task that a result is of, and its kind of metric, as the Hub calls them."""
    metric = entry["metric"]
    if metric in OF_PIXELS:
        return "image-segmentation", "mean_iou" if metric == "mIoU" else "accuracy"
    return ("image-classification", "accuracy") if has_interval(metric) else ("object-detection", "mAP")


def _eval_result(entry: dict[str, Any]) -> EvalResult:
    data, (task, metric) = entry["data"], _measured(entry)
    spread_of_it = {"interval_95": [round(end, 2) for end in entry["interval"]]} if entry["interval"] else {}
    dataset = public_name(data["dataset"], data.get("local"))
    revision = str(data.get("split_revision") or "")
    return EvalResult(
        task_type=task,
        task_name=task.replace("-", " ").capitalize(),
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_config=data.get("config"),
        dataset_split=data["split"],
        dataset_revision=revision if revision and " " not in revision else None,  # a commit, and no fingerprint
        metric_type=metric,
        metric_name=f"{entry['metric']} in per cent: {entry['protocol']} ({entry['feature']})",
        metric_value=round(entry["value"], 2),
        metric_args={
            "images": entry["n"],
            **spread_of_it,
            "seed": entry["seed"],
            **_conditions(entry),
        },
    )


def _conditions(entry: dict[str, Any]) -> dict[str, Any]:
    """What the protocol of a result leaves open, by which two of its numbers differ."""
    data = entry["data"]
    usual = {"train_split": "train", "label_column": "label"}
    of_images = {name: data.get(name) for name in ("view", "train_split", "label_column")}
    return entry["settings"] | {
        name: value for name, value in of_images.items() if value not in (None, usual.get(name))
    }


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    about = entry["data"]
    data = ", ".join(
        filter(None, (public_name(about["dataset"], about.get("local")), about.get("config"), about["split"]))
    )
    conditions = [
        f"{name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in _conditions(entry).items()
    ]
    return (
        entry["protocol"],
        "; ".join(conditions) or "–",
        entry["feature"],
        entry["metric"],
        f"{entry['value']:.2f} %",
        spread(entry),
        f"{entry['n']:,}",
        data,
        entry["hardware"],
    )


def _listed(numbers: Any) -> str:
    return "(" + ", ".join(f"{number:g}" for number in numbers) + ")"
