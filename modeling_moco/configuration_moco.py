"""MoCoConfig: all settings that change the weights or the loss."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

STEMS = ("default", "no_max_pool", "small")
PROJECTION_HEADS = ("linear", "mlp")
BATCH_NORMS = ("shuffle", "split", "sync", "plain")
MOST = 2**40  # of what a setting counts
MOST_IN_ARGUMENT = 10_000  # layers, channels or pixels that an argument of a timm model asks for, all together


def _asked_for(value: Any) -> int:
    if isinstance(value, dict | list | tuple):
        return sum(map(_asked_for, value.values() if isinstance(value, dict) else value))
    return abs(value) if isinstance(value, int) else 0


@strict
class MoCoConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of [`MoCoModel`] and its siblings. The defaults are MoCo v2 (arXiv:2003.04297).

    Args:
        architecture (`str`): Name of a timm model: ResNet, ConvNeXt, ViT, ...
        model_args (`dict`, *optional*): Keyword arguments for `timm.create_model`, e.g. `{"img_size": 32}` for a ViT.
        stem (`str`): First layers of the encoder. `"default"` keeps timm's. ResNets also have `"no_max_pool"`, and
            `"small"`: a 3x3 convolution of stride 1 without max-pool, for images of about 32 px (official CIFAR-10 notebook).
        projection_head (`str`): `"linear"` (v1) or `"mlp"` (v2: one hidden layer as wide as the feature, ReLU).
        projection_dim (`int`): C, the width of queries and keys. Both papers use 128.
        dictionary (`str`): Where negatives come from: `"queue"`, or a name that `register_dictionary` was given.
        queue_size (`int`): K, the number of keys in the dictionary. Both papers use 65536.
        key_momentum (`float`): m in [0, 1], the weight of the old key encoder in an update. Both papers use 0.999.
        temperature (`float`): T > 0, which divides the similarities. v1 uses 0.07, v2 uses 0.2.
        batch_norm (`str`): How to prevent BatchNorm statistics from leaking which key belongs to a query (v1 paper, section
            3.3). `"shuffle"` encodes keys in an order that is shuffled over all processes. `"split"` normalises consecutive
            parts of the batch of each process separately and shuffles its keys, which imitates several GPUs on one.
            `"sync"` shares statistics between all processes. `"plain"` prevents nothing. All modes have the same state dict.
        batch_norm_splits (`int`): Groups per process for `"split"`. The official notebook uses 8.
        symmetric_loss (`bool`): Use each view once as query and once as key, and add both losses (official CIFAR-10
            notebook). A step then has twice the computation and twice the keys.
        image_mean (`list`): Mean per channel, in [0, 1], with which the model normalises uint8 images.
        image_std (`list`): Standard deviation per channel, in (0, 1], with which the model normalises uint8 images.
        out_features, out_indices (*optional*): Stages that [`MoCoBackbone`] returns, as in every transformers backbone.

    Raises:
        ValueError: a value is out of its range.
    """

    model_type = "moco"

    architecture: str = "resnet50"
    model_args: dict[str, Any] | None = None
    stem: str = "default"
    projection_head: str = "mlp"
    projection_dim: int = 128
    dictionary: str = "queue"
    queue_size: int = 65536
    key_momentum: float | int = 0.999
    temperature: float | int = 0.2
    batch_norm: str = "shuffle"
    batch_norm_splits: int = 8
    symmetric_loss: bool = False
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self, **kwargs):
        self.stage_names = kwargs.pop("stage_names", None)
        self.set_output_features_output_indices(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)

    def set_output_features_output_indices(self, out_features, out_indices):
        # The stages are known after timm has built the encoder. MoCoBackbone then sets their names and calls this again.
        if self.stage_names is None:
            self._out_features = out_features
            self._out_indices = None if out_indices is None else list(out_indices)
        else:
            super().set_output_features_output_indices(out_features, out_indices)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        # The config.json of a published model is timm's, with this configuration as a section: see training/hub.
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "moco" in config and "transformers_version" in config:
            raise ValueError(
                f"{pretrained_model_name_or_path} was loaded and saved without this code, as transformers' TimmWrapper: "
                "load it with AutoModel or AutoModelForImageClassification, without trust_remote_code"
            )
        return config.get("moco", config), kwargs

    def validate_moco(self):
        for name, value, choices in (
            ("stem", self.stem, STEMS),
            ("projection_head", self.projection_head, PROJECTION_HEADS),
            ("batch_norm", self.batch_norm, BATCH_NORMS),
        ):
            if value not in choices:
                raise ValueError(f"{name} ({value!r}) is unknown: choose one of {', '.join(choices)}")
        for name in ("projection_dim", "queue_size", "batch_norm_splits"):
            if not 1 <= getattr(self, name) < MOST:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1, and below {MOST:,}")
        for name, value in (self.model_args or {}).items():
            if _asked_for(value) > MOST_IN_ARGUMENT:
                raise ValueError(f"model_args ({name!r}) must not ask for more than {MOST_IN_ARGUMENT:,}: lower it")
        if not 0 <= self.key_momentum <= 1:
            raise ValueError(f"key_momentum ({self.key_momentum}) must lie in [0, 1]: the papers use 0.999")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"image_mean ({self.image_mean}) and image_std ({self.image_std}) must have three numbers each, those of "
                "image_std above 0: leave both out for ImageNet's"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature ({self.temperature}) must be above 0: v1 uses 0.07, v2 0.2")
