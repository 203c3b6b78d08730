"""MoCo models for transformers. Importing this package registers them with the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
)

from .configuration_moco import MoCoConfig
from .dictionary_moco import Dictionary, QueueDictionary, register_dictionary
from .image_processing_moco import MoCoImageProcessor, MoCoImageProcessorPil
from .modeling_moco import MoCoBackbone, MoCoForImageClassification, MoCoModel, MoCoOutput

__version__ = "0.1.0"

AutoConfig.register(MoCoConfig.model_type, MoCoConfig, exist_ok=True)
AutoModel.register(MoCoConfig, MoCoModel, exist_ok=True)
AutoModelForImageClassification.register(MoCoConfig, MoCoForImageClassification, exist_ok=True)
AutoBackbone.register(MoCoConfig, MoCoBackbone, exist_ok=True)
AutoImageProcessor.register(
    MoCoConfig,
    image_processor_classes={"torchvision": MoCoImageProcessor, "pil": MoCoImageProcessorPil},
    exist_ok=True,
)

__all__ = [
    "Dictionary",
    "MoCoBackbone",
    "MoCoConfig",
    "MoCoForImageClassification",
    "MoCoImageProcessor",
    "MoCoImageProcessorPil",
    "MoCoModel",
    "MoCoOutput",
    "QueueDictionary",
    "register_dictionary",
]
