"""A card names the method that trained an encoder, and the papers of that method, whatever was made of the encoder."""

import json
from pathlib import Path

import pytest
import yaml
from published_runs import card_of

from modeling_moco import (
    MoCoConfig,
    MoCoDetectionImageProcessor,
    MoCoForImageClassification,
    MoCoForObjectDetection,
    MoCoImageProcessorPil,
    MoCoModel,
    MoCoRCNNConfig,
    QueueDictionary,
)
from modeling_moco.dictionary_moco import DICTIONARIES
from training.hub.publish import PublishArguments, load_published, publish

METHODS = {  # settings, words, papers
    "MoCo v2": ({}, "Momentum Contrast (MoCo v2, [arXiv:2003.04297]", ["1911.05722", "2003.04297"]),
    "MoCo v3": (
        {"dictionary": "batch", "projection_head": "mlp_bn", "prediction_head": "mlp_bn", "symmetric_loss": True},
        "MoCo v3 ([arXiv:2104.02057]",
        ["2104.02057"],
    ),
    "SimCLR": (
        {"dictionary": "batch_both_views", "key_encoder": "none", "symmetric_loss": True, "batch_norm": "sync"},
        "SimCLR ([arXiv:2002.05709]",
        ["2002.05709"],
    ),
    "bank": (
        {"dictionary": "bank", "bank_size": 8, "key_encoder": "none", "batch_norm": "plain"},
        "a memory bank (",
        ["1805.01978"],
    ),
}
TITLES = {
    "1911.05722": "Momentum Contrast for Unsupervised",
    "2003.04297": "Improved Baselines",
    "2104.02057": "Training Self-Supervised Vision Transformers",
    "2002.05709": "A Simple Framework",
    "1805.01978": "Non-Parametric Instance Discrimination",
}


def save(folder: Path, settings: dict) -> None:
    """A run, and in it a probe and a detector, none of which has been trained."""
    settings = {"architecture": "test_resnet", "queue_size": 64} | settings
    recipe = {"data": {"dataset_name": "org/birds"}, "model": settings}
    MoCoModel(MoCoConfig(**settings)).save_pretrained(folder)
    MoCoForImageClassification.from_pretrained(folder).save_pretrained(folder / "probe")
    detector = MoCoForObjectDetection(MoCoRCNNConfig(architecture="test_resnet"))
    detector.save_pretrained(folder / "detector")
    for name in (".", "probe"):
        MoCoImageProcessorPil().save_pretrained(folder / name)
    MoCoDetectionImageProcessor().save_pretrained(folder / "detector")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("probe", "detector"):
        (folder / name / "recipe.yaml").write_text(yaml.safe_dump({"encoder": {"model": folder.name}}))


@pytest.mark.parametrize("method", METHODS)
def test_the_method_and_its_papers_are_named(method, tmp_path):
    settings, words, papers = METHODS[method]
    save(tmp_path / "run", settings)
    for name in (".", "probe", "detector"):
        text, _ = card_of(tmp_path / "run" / name, tmp_path / "published" / name)
        assert f"trained by {words}" in text, name
        assert {paper for paper, title in TITLES.items() if title in text} == set(papers), name
        if name != "detector":
            config = json.loads((tmp_path / "published" / name / "config.json").read_text())
            assert config["pretrained_cfg"]["paper_ids"] == [f"arXiv:{paper}" for paper in papers], name


@pytest.mark.parametrize("stem", ["default", "small"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_dictionary_of_ones_own_is_not_called_a_version_of_moco(recorded, stem, tmp_path, monkeypatch):
    architecture = {"default": "test_resnet", "small": "resnet18"}[stem]
    settings = {"dictionary": "every_2nd*", "stem": stem, "architecture": architecture}
    monkeypatch.setitem(DICTIONARIES, "every_2nd*", QueueDictionary)
    save(tmp_path / "run", settings)
    with monkeypatch.context() as patch:  # whoever publishes features need not have registered it
        patch.delitem(DICTIONARIES, "every_2nd*")
        for name in (".", "probe", "detector")[: 3 if recorded else 1]:
            if not recorded:
                (tmp_path / "run" / "recipe.yaml").unlink()
            text, _ = card_of(tmp_path / "run" / name, tmp_path / "published" / name)
            words = r"contrastive learning with a dictionary of its author's own, every_2nd\* (after MoCo, [arXiv:1911.05722]"
            assert words in text, name
            assert "MoCo v2" not in text, name
        folder = tmp_path / "published"
        assert MoCoModel.from_pretrained(folder).config.dictionary == "queue"
        assert MoCoForImageClassification.from_pretrained(folder).config.architecture == architecture
    if recorded:
        model, processor = load_published(str(tmp_path / "run"), training_state=True)
        args = PublishArguments(include_training_state=True)
        publish(str(tmp_path / "run"), model, processor, "org/name", args, tmp_path / "whole")
        card = (tmp_path / "whole" / "README.md").read_text()
        assert r"what the dictionary every_2nd\* holds, whose class is not: register it before you load" in card
        assert MoCoModel.from_pretrained(tmp_path / "whole").config.dictionary == "every_2nd*"
