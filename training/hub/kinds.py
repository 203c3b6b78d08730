"""The kinds of models that are published: what each is for, and the classes by which others load it."""

from typing import Any, NamedTuple

from transformers import PreTrainedModel

from modeling_moco import (
    MoCoConfig,
    MoCoDetectionImageProcessor,
    MoCoForImageClassification,
    MoCoForObjectDetection,
    MoCoImageProcessor,
    MoCoModel,
    MoCoRCNNConfig,
)

from ..model_folder import read_config

OF_ENCODER = {
    "AutoConfig": "configuration_moco.MoCoConfig",
    "AutoModel": "modeling_moco.MoCoModel",
    "AutoModelForImageClassification": "modeling_moco.MoCoForImageClassification",
    "AutoBackbone": "modeling_moco.MoCoBackbone",
    "AutoImageProcessor": "image_processing_moco.MoCoImageProcessorPil",  # the exact one
}
OF_DETECTOR = {
    "AutoConfig": "configuration_moco.MoCoRCNNConfig",
    "AutoModelForObjectDetection": "rcnn_moco.MoCoForObjectDetection",
    "AutoImageProcessor": "image_processing_moco.MoCoDetectionImageProcessor",
}


class Kind(NamedTuple):
    """A kind of models.

    Args:
        task: what it is for, as pipelines and the Hub call it.
        auto_class: the class of transformers that loads it.
        auto_map: files and classes of our code, for `trust_remote_code=True`.
    """

    name: str
    model: type[PreTrainedModel]
    config: type[MoCoConfig]
    processor: type[Any]
    task: str
    auto_class: str
    auto_map: dict[str, str]


ENCODER = Kind(
    "encoder", MoCoModel, MoCoConfig, MoCoImageProcessor, "image-feature-extraction", "AutoModel", OF_ENCODER
)
CLASSIFIER = Kind(
    "classifier",
    MoCoForImageClassification,
    MoCoConfig,
    MoCoImageProcessor,
    "image-classification",
    "AutoModelForImageClassification",
    OF_ENCODER,
)
DETECTOR = Kind(
    "detector",
    MoCoForObjectDetection,
    MoCoRCNNConfig,
    MoCoDetectionImageProcessor,
    "object-detection",
    "AutoModelForObjectDetection",
    OF_DETECTOR,
)
KINDS = (ENCODER, CLASSIFIER, DETECTOR)


def read_kind(source: str) -> tuple[Kind, MoCoConfig]:
    """The kind of the model in a folder or repository, and its configuration.

    Raises:
        OSError: there is none of these kinds.
        ValueError: its configuration is damaged.
    """
    config = read_config(source, [kind.config for kind in KINDS])
    if config.model_type == MoCoRCNNConfig.model_type:
        return DETECTOR, config
    return (CLASSIFIER if config.architectures == [CLASSIFIER.model.__name__] else ENCODER), config


def kind_of(model: PreTrainedModel) -> Kind:
    return next(kind for kind in KINDS if isinstance(model, kind.model))
