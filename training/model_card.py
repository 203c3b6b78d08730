"""The model card: `model_card.md` filled with what is known of a model, and with nothing that was not measured.

Names of files on this machine do not appear: a local dataset is called by the name of its folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_moco import MoCoForImageClassification, MoCoImageProcessor

from .exports import Model, encoder_and_classifier, output_name
from .report import CURVES, OF_FEATURES

TEMPLATE = Path(__file__).parents[1] / "model_card.md"
SHOWN_SECTIONS = ("data", "model", "training", "probe")  # of a recipe; what it was expected to reach is no result
PRIVATE = ("project", "run_name", "logging_dir", "output_dir")  # settings that say where, not what


@dataclass(frozen=True)
class Origin:
    """What a run left beside its model. Each may be empty.

    Args:
        recipe: sections of its settings, of the pretraining and of the probe that followed.
        metrics: of its `metrics.json`.
        conversion: of the `conversion.json` of a converted checkpoint.
        results: entries of `results.json` that were measured on these weights, oldest first.
        pictures: PNG files.
    """

    recipe: dict[str, dict[str, Any]]
    metrics: dict[str, Any]
    conversion: dict[str, Any]
    results: list[dict[str, Any]]
    pictures: list[Path]


def public_name(dataset: str) -> str:
    """A dataset's name on the Hub, or of its folder."""
    path = Path(dataset).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() or dataset.startswith(".") else dataset


def render_card(
    repo_id: str,
    model: Model,
    processor: MoCoImageProcessor,
    origin: Origin,
    files: list[str],
    *,
    license: str,
    training_state: bool,
) -> ModelCard:
    """The card of a model that is published as these files."""
    classifies = isinstance(model, MoCoForImageClassification)
    encoder, classifier = encoder_and_classifier(model)
    results = _newest(origin.results)
    name = repo_id.split("/")[-1]
    task = "image-classification" if classifies else "image-feature-extraction"
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=task,
        tags=["moco", "contrastive-learning", "self-supervised-learning", model.config.architecture],
        datasets=_hub_datasets(origin),
        metrics=["accuracy"] if results else None,
        model_name=name,
        eval_results=[_eval_result(entry) for entry in results] or None,
    )
    titles = CURVES | OF_FEATURES
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        name=name,
        summary=_summary(model, origin),
        task=task,
        everywhere="moco.safetensors" in files,
        resnet=("ResNetForImageClassification" if classifies else "ResNetModel")
        if "resnet/config.json" in files
        else None,
        classes=classifier.out_features if classifier is not None else None,
        width=encoder.head_hidden_size,
        auto_class="AutoModelForImageClassification" if classifies else "AutoModel",
        moco_class=type(model).__name__,
        outputs="logits" if classifies else f"pooler_output (1, {encoder.head_hidden_size}), last_hidden_state",
        training_state=training_state,
        onnx="onnx/model.onnx" in files,
        torch_export="torch_export/model.pt2" in files,
        output=output_name(model),
        size=processor.crop_size["height"],
        resize=processor.size["shortest_edge"],
        mean=_listed(processor.image_mean),
        std=_listed(processor.image_std),
        training=_training(origin),
        settings=yaml.safe_dump(_settings(origin), sort_keys=False) if origin.recipe else "",
        pictures=[(path.name, *titles[path.stem]) for path in origin.pictures],
        results=[_row(entry) for entry in results],
    )
    return card


def _summary(model: Model, origin: Origin) -> str:
    config = model.config
    version, paper = ("v2", "2003.04297") if config.projection_head == "mlp" else ("v1", "1911.05722")
    dataset = origin.recipe.get("data", {}).get("dataset_name")
    images = f" on {public_name(dataset)}" if dataset else ""
    sentence = (
        f"A {config.architecture} trained by Momentum Contrast (MoCo {version}, "
        f"[arXiv:{paper}](https://arxiv.org/abs/{paper})){images} without labels"
    )
    if isinstance(model, MoCoForImageClassification):
        return f"{sentence}, and a classifier of {config.num_labels} classes that was trained on it with labels."
    return f"{sentence}: it turns an image into features for kNN, linear classifiers, fine-tuning and detection."


def _training(origin: Origin) -> str:
    about, metrics = origin.recipe.get("about", {}), origin.metrics
    source = f" (source: {about['source']})" if "source" in about else ""
    sentences = [f"{about['title']}{source}." if "title" in about else "", *_ran(metrics)]
    if converted := origin.conversion:
        epoch = f", epoch {converted['epoch']:g}" if "epoch" in converted else ""
        sentences.append(f"Converted from `{converted['file']}` ({converted['format']}{epoch}).")
    if origin.recipe:
        sentences.append("These are the settings that were given; all else has its default.")
    return " ".join(filter(None, sentences)) or "Nothing is recorded of how these weights were trained."


def _ran(metrics: dict[str, Any]) -> list[str]:
    sentences = []
    if "steps" in metrics:
        sentences.append(f"{metrics['steps']:,} steps, {metrics['images_per_second']:.4g} images/s.")
    if "hardware" in metrics:
        versions = ", ".join(f"{name} {metrics['versions'][name]}" for name in ("torch", "transformers", "timm"))
        commit = f", commit {metrics['commit']}" if metrics["commit"] else ""
        sentences.append(f"{metrics['processes']} x {metrics['hardware']}; {versions}{commit}.")
    return sentences


def _settings(origin: Origin) -> dict[str, dict[str, Any]]:
    shown = {}
    for section in SHOWN_SECTIONS:
        values = {key: value for key, value in origin.recipe.get(section, {}).items() if key not in PRIVATE}
        if "dataset_name" in values:
            values["dataset_name"] = public_name(values["dataset_name"])
        if values:
            shown[section] = values
    return shown


def _hub_datasets(origin: Origin) -> list[str] | None:
    name = origin.recipe.get("data", {}).get("dataset_name", "")
    return [name] if "/" in name and public_name(name) == name else None


def _newest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = {}
    for entry in results:
        key = (entry["protocol"], entry["feature"], entry["metric"], entry["data"]["dataset"], entry["data"]["split"])
        kept[(*key, yaml.safe_dump(entry["settings"]))] = entry
    return list(kept.values())


def _eval_result(entry: dict[str, Any]) -> EvalResult:
    data, (low, high) = entry["data"], entry["interval"]
    dataset = public_name(data["dataset"])
    revision = str(data.get("split_revision") or "")
    return EvalResult(
        task_type="image-classification",
        task_name="Image classification",
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_config=data.get("config"),
        dataset_split=data["split"],
        dataset_revision=revision if revision and " " not in revision else None,  # a commit, and no fingerprint
        metric_type="accuracy",
        metric_name=f"{entry['metric']} in per cent: {entry['protocol']} ({entry['feature']})",
        metric_value=round(entry["value"], 2),
        metric_args={
            "images": entry["n"],
            "interval_95": [round(low, 2), round(high, 2)],
            "seed": entry["seed"],
            **entry["settings"],
        },
    )


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    low, high = entry["interval"]
    data = f"{public_name(entry['data']['dataset'])}, {entry['data']['split']}"
    value, spread = f"{entry['value']:.2f} %", f"{low:.2f} to {high:.2f}"
    return (
        entry["protocol"],
        entry["feature"],
        entry["metric"],
        value,
        spread,
        f"{entry['n']:,}",
        data,
        entry["hardware"],
    )


def _listed(numbers: Any) -> str:
    return "(" + ", ".join(f"{number:g}" for number in numbers) + ")"
