"""The kinds of models that are published: what each is for, and the classes by which others load it."""

from typing import Any, NamedTuple

from transformers import PreTrainedModel

from modeling_moco import (
    MoCoConfig,
    MoCoDetectionImageProcessor,
    MoCoFCNConfig,
    MoCoForImageClassification,
    MoCoForObjectDetection,
    MoCoForSemanticSegmentation,
    MoCoImageProcessor,
    MoCoModel,
    MoCoRCNNConfig,
    MoCoSegmentationImageProcessor,
)

from ..engine.run_folder import CURVES, OF_DETECTOR, OF_FEATURES, OF_SEGMENTATION
from ..model_folder import read_config
from .exports import Model

Transferred = MoCoForObjectDetection | MoCoForSemanticSegmentation  # models around an encoder that only our code has
Published = Model | Transferred
Processor = MoCoImageProcessor | MoCoDetectionImageProcessor | MoCoSegmentationImageProcessor

MAP_OF_ENCODER = {
    "AutoConfig": "configuration_moco.MoCoConfig",
    "AutoModel": "modeling_moco.MoCoModel",
    "AutoModelForImageClassification": "modeling_moco.MoCoForImageClassification",
    "AutoBackbone": "modeling_moco.MoCoBackbone",
    "AutoImageProcessor": "image_processing_moco.MoCoImageProcessorPil",  # the exact one
}
MAP_OF_DETECTOR = {
    "AutoConfig": "configuration_moco.MoCoRCNNConfig",
    "AutoModelForObjectDetection": "rcnn_moco.MoCoForObjectDetection",
    "AutoImageProcessor": "image_processing_moco.MoCoDetectionImageProcessor",
}
MAP_OF_SEGMENTATION = {
    "AutoConfig": "configuration_moco.MoCoFCNConfig",
    "AutoModelForSemanticSegmentation": "fcn_moco.MoCoForSemanticSegmentation",
    "AutoImageProcessor": "image_processing_moco.MoCoSegmentationImageProcessor",
}


class Kind(NamedTuple):
    """A kind of models.

    Args:
        task: what it is for, as pipelines and the Hub call it.
        auto_class: the class of transformers that loads it.
        auto_map: files and classes of our code, for `trust_remote_code=True`.
        figures: titles, and how to read them, of the figures that its training leaves, by name.
    """

    name: str
    model: type[PreTrainedModel]
    config: type[MoCoConfig]
    processor: type[Any]
    task: str
    auto_class: str
    auto_map: dict[str, str]
    figures: dict[str, tuple[str, str]]


ENCODER = Kind(
    "encoder",
    MoCoModel,
    MoCoConfig,
    MoCoImageProcessor,
    "image-feature-extraction",
    "AutoModel",
    MAP_OF_ENCODER,
    CURVES | OF_FEATURES,
)
CLASSIFIER = Kind(
    "classifier",
    MoCoForImageClassification,
    MoCoConfig,
    MoCoImageProcessor,
    "image-classification",
    "AutoModelForImageClassification",
    MAP_OF_ENCODER,
    CURVES | OF_FEATURES,
)
DETECTOR = Kind(
    "detector",
    MoCoForObjectDetection,
    MoCoRCNNConfig,
    MoCoDetectionImageProcessor,
    "object-detection",
    "AutoModelForObjectDetection",
    MAP_OF_DETECTOR,
    OF_DETECTOR,
)
SEGMENTATION = Kind(
    "segmentation model",
    MoCoForSemanticSegmentation,
    MoCoFCNConfig,
    MoCoSegmentationImageProcessor,
    "image-segmentation",
    "AutoModelForSemanticSegmentation",
    MAP_OF_SEGMENTATION,
    OF_SEGMENTATION,
)
HEADS_OF_PROBE = "LinearHeads"  # the class that the official probe trains
KINDS = (ENCODER, CLASSIFIER, DETECTOR, SEGMENTATION)


def read_kind(source: str) -> tuple[Kind, MoCoConfig]:
    """The kind of the model in a folder or repository, and its configuration.

    Raises:
        OSError: there is none of these kinds.
        ValueError: its configuration is damaged, or it is a checkpoint of a linear probe.
    """
    config = read_config(source, [kind.config for kind in KINDS])
    if config.architectures == [HEADS_OF_PROBE]:
        raise ValueError(
            f"{source} is a checkpoint of a linear probe, with classifiers that were still compared: give the same command "
            "again to end the probe, and pass its folder"
        )
    if config.architectures == [CLASSIFIER.model.__name__]:
        return CLASSIFIER, config
    return next(kind for kind in KINDS if kind.config is type(config)), config


def kind_of(model: PreTrainedModel) -> Kind:
    return next(kind for kind in KINDS if isinstance(model, kind.model))
