"""MoCo models for transformers. Importing this package registers them with the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
)

from .configuration_moco import MoCoConfig, MoCoFCNConfig, MoCoRCNNConfig
from .dictionary_moco import Dictionary, QueueDictionary, register_dictionary
from .fcn_moco import MoCoForSemanticSegmentation
from .image_processing_moco import (
    MoCoDetectionImageProcessor,
    MoCoImageProcessor,
    MoCoImageProcessorPil,
    MoCoSegmentationImageProcessor,
)
from .modeling_moco import MoCoBackbone, MoCoForImageClassification, MoCoModel, MoCoOutput
from .rcnn_moco import MoCoDetectionOutput, MoCoForObjectDetection

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
AutoConfig.register(MoCoRCNNConfig.model_type, MoCoRCNNConfig, exist_ok=True)
AutoModelForObjectDetection.register(MoCoRCNNConfig, MoCoForObjectDetection, exist_ok=True)
AutoImageProcessor.register(
    MoCoRCNNConfig,  # the same for both: detectors of the papers have seen images resized by PIL
    image_processor_classes={"torchvision": MoCoDetectionImageProcessor, "pil": MoCoDetectionImageProcessor},
    exist_ok=True,
)
AutoConfig.register(MoCoFCNConfig.model_type, MoCoFCNConfig, exist_ok=True)
AutoModelForSemanticSegmentation.register(MoCoFCNConfig, MoCoForSemanticSegmentation, exist_ok=True)
AutoImageProcessor.register(
    MoCoFCNConfig,  # the same for both: images keep their size, so that nothing depends on what resizes
    image_processor_classes={"torchvision": MoCoSegmentationImageProcessor, "pil": MoCoSegmentationImageProcessor},
    exist_ok=True,
)

__all__ = [
    "Dictionary",
    "MoCoBackbone",
    "MoCoConfig",
    "MoCoDetectionImageProcessor",
    "MoCoDetectionOutput",
    "MoCoFCNConfig",
    "MoCoForImageClassification",
    "MoCoForObjectDetection",
    "MoCoForSemanticSegmentation",
    "MoCoImageProcessor",
    "MoCoImageProcessorPil",
    "MoCoModel",
    "MoCoOutput",
    "MoCoRCNNConfig",
    "MoCoSegmentationImageProcessor",
    "QueueDictionary",
    "register_dictionary",
]
