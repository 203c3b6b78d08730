"""MoCoConfig: all settings that change the weights or the loss."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

STEMS = ("default", "no_max_pool", "small", "moco_v3")
PROJECTION_HEADS = ("linear", "mlp", "mlp_bn", "simclr")
PREDICTION_HEADS = ("none", "mlp", "mlp_bn")
KEY_ENCODERS = ("momentum", "shared", "none")
BATCH_NORMS = ("shuffle", "split", "sync", "plain")
MOST = 2**40  # of what a setting counts
MOST_LAYERS = 16  # of a head
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
            ViTs also have `"moco_v3"`: fixed sine and cosine positions and a fixed random patch projection, which
            contrastive training leaves as they are.
        zero_init_residual (`bool`): Start the last BatchNorm of every residual block at 0 (v3's ResNet) instead of 1.
        projection_head (`str`): `"linear"` (v1), `"mlp"` (v2: hidden layers with ReLU), `"mlp_bn"` (v3: BatchNorm after every
            layer, the last one without scale and shift; no biases), or `"simclr"` (the same, the last one with a scale).
        projection_layers (`int`): Layers of the projection head, where it is no linear one.
        projection_hidden_dim (`int`, *optional*): Width of the hidden layers of the heads; by default that of the feature.
        projection_dim (`int`): C, the width of queries and keys. v1 and v2 use 128, v3 uses 256.
        prediction_head (`str`): What follows the projection of queries alone: `"none"`, or two layers with BatchNorm between
            them (`"mlp"`: v3's ResNet) and after them (`"mlp_bn"`: v3's ViTs).
        dictionary (`str`): Where negatives come from: `"queue"` (the K newest keys), `"batch"` (the keys of the global batch:
            end-to-end and v3), `"batch_both_views"` (both views of it: SimCLR), `"bank"` (K keys drawn from one for each
            image of the dataset), or a name that `register_dictionary` was given.
        key_encoder (`str`): Who encodes keys: `"momentum"` (a moving average of the query encoder: MoCo), `"shared"` (the
            query encoder, with gradients: end-to-end), or `"none"` (queries are keys: SimCLR and the memory bank).
        queue_size (`int`): K, the number of keys in the queue, or of those that are drawn from a bank. v1 and v2 use 65536.
        bank_size (`int`): Number of images in a bank; a run sets it.
        bank_momentum (`float`): Weight of the old key in an update of a bank, in [0, 1). The original code uses 0.5.
        key_momentum (`float`): m in [0, 1], the weight of the old key encoder in an update. v1 and v2 use 0.999.
        temperature (`float`): T > 0, which divides the similarities. v1 uses 0.07, v2 uses 0.2.
        loss_scale (`float`): Factor of the loss, above 0. v3 uses 2T.
        batch_norm (`str`): How to prevent BatchNorm statistics from leaking which key belongs to a query (v1 paper, section
            3.3). `"shuffle"` encodes keys in an order that is shuffled over all processes. `"split"` normalises consecutive
            parts of the batch of each process separately and shuffles its keys, which imitates several GPUs on one.
            `"sync"` shares statistics between all processes. `"plain"` prevents nothing. All modes have the same state dict.
            Where no keys are encoded, it is one of the last two.
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
    zero_init_residual: bool = False
    projection_head: str = "mlp"
    projection_layers: int = 2
    projection_hidden_dim: int | None = None
    projection_dim: int = 128
    prediction_head: str = "none"
    dictionary: str = "queue"
    key_encoder: str = "momentum"
    queue_size: int = 65536
    bank_size: int = 0
    bank_momentum: float | int = 0.5
    key_momentum: float | int = 0.999
    temperature: float | int = 0.2
    loss_scale: float | int = 1.0
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
            ("prediction_head", self.prediction_head, PREDICTION_HEADS),
            ("key_encoder", self.key_encoder, KEY_ENCODERS),
            ("batch_norm", self.batch_norm, BATCH_NORMS),
        ):
            if value not in choices:
                raise ValueError(f"{name} ({value!r}) is unknown: choose one of {', '.join(choices)}")
        for name in ("projection_dim", "projection_hidden_dim", "queue_size", "batch_norm_splits"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < MOST:
                raise ValueError(f"{name} ({value}) must be at least 1, and below {MOST:,}")
        if not 1 <= self.projection_layers <= MOST_LAYERS:
            raise ValueError(f"projection_layers ({self.projection_layers}) must lie between 1 and {MOST_LAYERS}")
        if not 0 <= self.bank_size < MOST:
            raise ValueError(f"bank_size ({self.bank_size}) must be a number of images, below {MOST:,}")
        for name, value in (self.model_args or {}).items():
            if _asked_for(value) > MOST_IN_ARGUMENT:
                raise ValueError(f"model_args ({name!r}) must not ask for more than {MOST_IN_ARGUMENT:,}: lower it")
        if not 0 <= self.key_momentum <= 1:
            raise ValueError(f"key_momentum ({self.key_momentum}) must lie in [0, 1]: the papers use 0.999")
        if not 0 <= self.bank_momentum < 1:
            raise ValueError(f"bank_momentum ({self.bank_momentum}) must lie in [0, 1): the original code uses 0.5")
        if self.loss_scale <= 0:
            raise ValueError(f"loss_scale ({self.loss_scale}) must be above 0: v1 and v2 use 1, v3 uses 2T")
        self._check_method()
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"image_mean ({self.image_mean}) and image_std ({self.image_std}) must have three numbers each, those of "
                "image_std above 0: leave both out for ImageNet's"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature ({self.temperature}) must be above 0: v1 uses 0.07, v2 0.2")

    def _check_method(self) -> None:
        """
        Raises:
            ValueError: the settings of the method mean nothing together.
        """
        kind, keys = self.dictionary, self.key_encoder
        for meaningless, reason in (
            (
                kind == "queue" and keys == "shared",
                "keys in a queue have no gradient: pass key_encoder='momentum', key_momentum=0",
            ),
            (kind == "queue" and keys == "none", "each key would be the query itself: pass key_encoder='momentum'"),
            (kind == "bank" and keys != "none", "a bank keeps the queries themselves: pass key_encoder='none'"),
            (kind == "bank" and self.symmetric_loss, "a bank has one view of an image: pass symmetric_loss=False"),
            (
                not self.symmetric_loss and (kind == "batch_both_views" or (kind == "batch" and keys == "none")),
                "each view has the keys of the other: pass symmetric_loss=True",
            ),
            (
                keys == "none" and self.batch_norm in ("shuffle", "split"),
                f"batch_norm={self.batch_norm!r} shuffles keys, and none are encoded: pass batch_norm='sync' or 'plain'",
            ),
            (
                self.batch_norm == "split"
                and (self.projection_head in ("mlp_bn", "simclr") or self.prediction_head != "none"),
                "batch_norm='split' is for BatchNorm2d, and the heads have BatchNorm1d: pass batch_norm='shuffle' or 'sync'",
            ),
            (
                self.prediction_head != "none" and keys != "momentum",
                f"prediction_head={self.prediction_head!r} predicts the key of another encoder: pass key_encoder='momentum'",
            ),
        ):
            if meaningless:
                raise ValueError(f"dictionary={kind!r} with key_encoder={keys!r}: {reason}")
