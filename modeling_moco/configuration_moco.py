"""MoCoConfig, MoCoRCNNConfig and MoCoFCNConfig: all settings that change the weights or the loss."""

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

STEMS = ("default", "no_max_pool", "small", "moco_v3")
PROJECTION_HEADS = ("linear", "mlp", "mlp_bn", "simclr")
PREDICTION_HEADS = ("none", "mlp", "mlp_bn")
KEY_ENCODERS = ("momentum", "shared", "none")
BATCH_NORMS = ("shuffle", "split", "sync", "plain")
VARIANTS = ("c4", "dilated_c5")
FINE_TUNED_NORMS = ("sync", "plain", "frozen")  # BatchNorm of detectors and of segmentation models
ROI_SIZES = {"c4": 14, "dilated_c5": 7}  # of the papers
MOST = 2**40  # of what a setting counts
MOST_LAYERS = 16  # of a head
MOST_ROI_SIZE = 64  # pixels of a pooled map
MOST_ANCHORS = 64  # sizes or ratios
MOST_IN_ARGUMENT = 10_000  # layers, channels or pixels that an argument of a timm model asks for, all together

if TYPE_CHECKING:
    PerChannel = Any
else:  # one number is stored as three: readers have a sequence, which a type checker could not tell
    PerChannel = list[float] | tuple[float, ...] | float | int


def _asked_for(value: Any) -> int:
    if isinstance(value, dict | list | tuple):
        return sum(map(_asked_for, value.values() if isinstance(value, dict) else value))
    return abs(value) if isinstance(value, int) else 0


def is_of_wrapper(config: dict[str, Any]) -> bool:
    """Whether a published model was loaded and saved without this code, as transformers' TimmWrapper: it has timm's names."""
    return "moco" in config and "transformers_version" in config


def _section_of_wrapper(config: dict[str, Any]) -> dict[str, Any]:
    """The section of this configuration, with what may have changed: classes, their kind, the dtype, and where the code is."""
    old = ("transformers_weights", "id2label", "label2id")
    section = {name: value for name, value in config["moco"].items() if name not in old}
    classes, names = config["num_classes"], config.get("label_names") or []
    if classes and len(names) == classes:
        section |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    elif classes:
        section["num_labels"] = classes
    section["architectures"] = [name.replace("TimmWrapper", "MoCo") for name in config["architectures"]]
    since = {name: config.get(name) for name in ("problem_type", "dtype", "auto_map")}
    return section | since


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
        image_mean (`list`): Mean per channel, in [0, 1], with which the model normalises uint8 images. One number is that of
            all three.
        image_std (`list`): Standard deviation per channel, in (0, 1], with which the model normalises uint8 images. One number
            is that of all three.
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
    image_mean: PerChannel = (0.485, 0.456, 0.406)
    image_std: PerChannel = (0.229, 0.224, 0.225)

    def __setattr__(self, name, value):
        if name in ("image_mean", "image_std") and isinstance(value, float | int):  # once the type has been checked
            value = [float(value)] * 3
        super().__setattr__(name, value)

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
        config = _section_of_wrapper(config) if is_of_wrapper(config) else config.get("moco", config)
        if not cls.is_remote_code():  # saved again, the model would name code that is not copied with it
            config = {name: value for name, value in config.items() if name != "auto_map"}
        return config, kwargs

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
                f"image_mean ({self.image_mean}) and image_std ({self.image_std}) must be one number or three each, those of "
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


class _AroundEncoder:
    """Of a model around an encoder, whose configuration may stand for the model's."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]  # MoCoConfig's
        if (
            config.get("model_type") == MoCoConfig.model_type
        ):  # an encoder: its code and class are not those of a model around it
            config = {name: value for name, value in config.items() if name not in ("auto_map", "architectures")}
            config["model_type"] = cls.model_type  # type: ignore[attr-defined]
        return config, kwargs


@strict
class MoCoRCNNConfig(_AroundEncoder, MoCoConfig):
    """Configuration of [`MoCoForObjectDetection`]. The defaults are Faster R-CNN R50-C4 as in appendix A.1 of MoCo v1.

    It has the settings of [`MoCoConfig`] too: those of the encoder and of its images count here. That of a pretrained encoder
    may stand for it, as in `MoCoForObjectDetection.from_pretrained("runs/mine", num_labels=20)`.

    Args:
        rcnn_variant (`str`): `"c4"` finds and classifies objects on the maps of layer3, and layer4 is the head of each of them.
            `"dilated_c5"` does so on the maps of layer4, dilated and reduced to 512 channels, with two hidden layers as head.
        masks (`bool`): Predict a mask for each box too (Mask R-CNN), for `rcnn_variant="c4"`.
        detector_norm (`str`): BatchNorm in training. `"sync"` shares statistics between the processes as the papers do,
            `"plain"` uses those of each process, and `"frozen"` leaves the pretrained statistics, scales and shifts alone.
        anchor_sizes (`list`): Square roots of the areas of anchors, in pixels.
        anchor_ratios (`list`): Heights of anchors divided by their widths.
        rpn_pre_nms_train, rpn_pre_nms_test (`int`): Proposals of an image before non-maximum suppression, the best ones.
        rpn_post_nms_train, rpn_post_nms_test (`int`): Proposals of an image after it.
        rpn_samples (`int`): Anchors of an image that the losses of proposals are computed on.
        roi_samples (`int`): Proposals of an image that the losses of boxes are computed on.
        roi_size (`int`, *optional*): Side of the map that is pooled from a box; by default 14 for `"c4"`, 7 for `"dilated_c5"`.
        score_threshold (`float`): Detections have a higher score, in [0, 1].
        nms_threshold (`float`): Of two boxes of a class with a larger intersection over union, the better one is kept.
        max_detections (`int`): Detections of an image at most.

    Raises:
        ValueError: a value is out of its range, or two mean nothing together.
    """

    model_type = "moco_rcnn"

    rcnn_variant: str = "c4"
    masks: bool = False
    detector_norm: str = "sync"
    anchor_sizes: list[float | int] | tuple[float | int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: list[float | int] | tuple[float | int, ...] = (0.5, 1.0, 2.0)
    rpn_pre_nms_train: int = 12000
    rpn_pre_nms_test: int = 6000
    rpn_post_nms_train: int = 2000
    rpn_post_nms_test: int = 1000
    rpn_samples: int = 256
    roi_samples: int = 512
    roi_size: int | None = None
    score_threshold: float | int = 0.05
    nms_threshold: float | int = 0.5
    max_detections: int = 100

    @property
    def roi_side(self) -> int:
        """Side of the map that is pooled from a box."""
        return ROI_SIZES[self.rcnn_variant] if self.roi_size is None else self.roi_size

    def validate_rcnn(self):
        for name, value, choices in (
            ("rcnn_variant", self.rcnn_variant, VARIANTS),
            ("detector_norm", self.detector_norm, FINE_TUNED_NORMS),
        ):
            if value not in choices:
                raise ValueError(f"{name} ({value!r}) is unknown: choose one of {', '.join(choices)}")
        for name in (
            *("rpn_pre_nms_train", "rpn_pre_nms_test", "rpn_post_nms_train", "rpn_post_nms_test"),
            *("rpn_samples", "roi_samples", "max_detections"),
        ):
            if not 1 <= getattr(self, name) < MOST:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1, and below {MOST:,}")
        if not 2 <= self.roi_side <= MOST_ROI_SIZE:
            raise ValueError(
                f"roi_size ({self.roi_size}) must lie between 2 and {MOST_ROI_SIZE}: leave it out for the papers'"
            )
        for name in ("anchor_sizes", "anchor_ratios"):
            values = getattr(self, name)
            if not 1 <= len(values) <= MOST_ANCHORS or not all(0 < value < MOST for value in values):
                raise ValueError(
                    f"{name} ({values}) must have 1 to {MOST_ANCHORS} numbers above 0: leave it out for the papers'"
                )
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must lie in [0, 1]: leave it out for the papers'")
        if self.masks and self.rcnn_variant != "c4":
            raise ValueError(
                f"masks (True) are for rcnn_variant='c4', not for {self.rcnn_variant!r}: change one of the two"
            )
        if self.stem != "default":
            raise ValueError(
                f"stem ({self.stem!r}) is for small images, and its maps have another stride than 16: pretrain with "
                "stem='default' to detect objects"
            )


@strict
class MoCoFCNConfig(_AroundEncoder, MoCoConfig):
    """Configuration of [`MoCoForSemanticSegmentation`]: the FCN-16s of appendix A.5 of MoCo v1.

    It has the settings of [`MoCoConfig`] too: those of the encoder and of its images count here. That of a pretrained encoder
    may stand for it, as in `MoCoForSemanticSegmentation.from_pretrained("runs/mine", num_labels=21)`.

    Args:
        fcn_norm (`str`): BatchNorm in training. `"sync"` shares statistics between the processes as the papers do when they
            fine-tune, `"plain"` uses those of each process, and `"frozen"` leaves statistics, scales and shifts alone.
        semantic_loss_ignore_index (`int`): Label of the pixels that no loss and no measure count.

    Raises:
        ValueError: a value is out of its range.
    """

    model_type = "moco_fcn"

    fcn_norm: str = "sync"
    semantic_loss_ignore_index: int = 255

    def validate_fcn(self):
        if self.fcn_norm not in FINE_TUNED_NORMS:
            raise ValueError(f"fcn_norm ({self.fcn_norm!r}) is unknown: choose one of {', '.join(FINE_TUNED_NORMS)}")
        if 0 <= self.semantic_loss_ignore_index < self.num_labels:
            raise ValueError(
                f"semantic_loss_ignore_index ({self.semantic_loss_ignore_index}) must not be one of the {self.num_labels} "
                "classes: leave it at 255, which allows 255 classes"
            )
        if self.stem != "default":
            raise ValueError(
                f"stem ({self.stem!r}) is for small images, and its maps have another stride than 16: pretrain with "
                "stem='default' to segment images"
            )
