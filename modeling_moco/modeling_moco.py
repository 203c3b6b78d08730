"""Momentum Contrast (arXiv:1911.05722, arXiv:2003.04297) with any timm encoder.

Shapes: `N` local batch, `R` processes, `C` projection_dim, `K` queue_size, `D` feature width, `H`, `W` pixels.
"""

import difflib
import math
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
    ModelOutput,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_moco import MoCoConfig
from .dictionary_moco import QueueDictionary, build_dictionary
from .distributed_moco import convert_batch_norm, exchange, gather, local_slice, world_size
from .image_processing_moco import MoCoImageProcessor, normalize  # noqa: F401  (remote code must import the processor)

logger = logging.get_logger(__name__)

TimmEncoder = Any  # timm has no type for "a model with forward_features, forward_head and feature_info"


@dataclass
class MoCoOutput(ModelOutput):
    """Output of a contrastive step.

    Args:
        loss: InfoNCE, the mean over the local batch, natural logarithm (scalar).
        logits: similarities divided by the temperature, the positive first, float32, without gradient (N, 1+K).
        query_embeds: queries of this process, unit length, float32 (N, C).
        key_embeds: keys of all processes in rank order, unit length, float32, without gradient (R·N, C).

    With `symmetric_loss` the loss is the sum of the losses of both views, and all first dimensions are twice as long. Logits
    and queries begin with the queries of the first view. Keys begin with the keys of the first view, which are the positives
    of the second view's queries.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    query_embeds: torch.Tensor | None = None
    key_embeds: torch.Tensor | None = None


def build_encoder(config: MoCoConfig) -> TimmEncoder:
    """Build the timm model of a configuration, without classifier and with the configured stem and BatchNorm.

    Raises:
        ValueError: timm has no such model, it refuses `model_args`, or it cannot have this stem or this BatchNorm.
    """
    if not timm.is_model(config.architecture):
        close = difflib.get_close_matches(config.architecture, timm.list_models()) or timm.list_models("resnet*")[:3]
        raise ValueError(f"architecture ({config.architecture!r}) is not a timm model: try {', '.join(close)}")
    try:
        encoder = timm.create_model(config.architecture, pretrained=False, num_classes=0, **(config.model_args or {}))
    except TypeError as error:
        raise ValueError(f"model_args ({config.model_args}) do not fit {config.architecture}: {error}") from error
    _keep_timm_initialisation(encoder)
    if config.stem != "default":
        if not isinstance(encoder, timm.models.ResNet):
            raise ValueError(f"stem={config.stem!r} is for ResNets, not for {config.architecture}: use stem='default'")
        encoder.maxpool = nn.Identity()
        if config.stem == "small":
            encoder.conv1 = nn.Conv2d(3, encoder.bn1.num_features, kernel_size=3, stride=1, padding=1, bias=False)
    return convert_batch_norm(encoder, config)


def _keep_timm_initialisation(encoder: nn.Module) -> None:
    # transformers does not initialise tensors with this mark. BatchNorm gets no mark: timm initialises the last BatchNorm of
    # a residual block with 0, the official code with 1. Tensors on the meta device have no values to keep.
    for module in encoder.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            for parameter in module.parameters(recurse=False):
                setattr(parameter, "_is_hf_initialized", not parameter.is_meta)  # noqa: B010


def build_projector(config: MoCoConfig, dim: int) -> nn.Module:
    if config.projection_head == "linear":
        return nn.Linear(dim, config.projection_dim)
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, config.projection_dim))


class MoCoPreTrainedModel(PreTrainedModel):
    config: MoCoConfig
    config_class = MoCoConfig
    base_model_prefix = "moco"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _no_split_modules: list[str] = []

    @torch.no_grad()
    def _init_weights(self, module):
        # The official code uses the default initialisation of torchvision and torch.
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, QueueDictionary):
            module.reset()
        elif module._non_persistent_buffers_set:  # timm computes them, no checkpoint has them: blur pool, swin, rope
            module.init_non_persistent_buffers()

    def normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 images (N, 3, H, W) to the model's dtype. Images of another dtype are normalised already."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        return normalize(pixel_values, self.config.image_mean, self.config.image_std).to(self.dtype)


class MoCoModel(MoCoPreTrainedModel):
    """Query encoder, key encoder and dictionary. A training step is algorithm 1 of the paper:

    ```python
    for x_q, x_k in loader:                      # two views of the same images
        model.update_key_encoder()               # before the forward pass, as in the official code
        outputs = model(x_q, x_k)
        outputs.loss.backward()
        optimizer.step(), optimizer.zero_grad()
        model.dictionary.enqueue(outputs.key_embeds)
    ```

    Args:
        config: see [`MoCoConfig`].
        momentum_encoder: whether to build projectors, key encoder and dictionary. Without them the model is the query encoder
            alone, for features.

    Loading: where a checkpoint has no key encoder, the key encoder is a copy of the query encoder; where it has no queue, the
    queue is random. Another `queue_size` needs `ignore_mismatched_sizes=True` and starts a random queue. The key encoder
    never requires gradients.

    `shuffle_generator` samples the order in which keys are encoded. It must have the same state on all processes, which is so
    if all processes have made the same steps.
    """

    _keys_to_ignore_on_load_missing = [r"^encoder_k\.", r"^projector_[qk]\.", r"^dictionary\."]
    _keys_to_ignore_on_load_unexpected = [r"^encoder_k\.", r"^projector_[qk]\.", r"^dictionary\.", r"^classifier\."]

    encoder_q: TimmEncoder
    encoder_k: TimmEncoder
    dictionary: Any  # dictionary_moco.py describes its interface

    def __init__(self, config: MoCoConfig, momentum_encoder: bool = True):
        super().__init__(config)
        self.encoder_q = build_encoder(config)
        self.momentum_encoder = momentum_encoder
        self.shuffle_generator = torch.Generator()
        if momentum_encoder:
            dim = self.encoder_q.head_hidden_size
            self.projector_q = build_projector(config, dim)
            self.encoder_k = build_encoder(config)
            self.projector_k = build_projector(config, dim)
            self.dictionary = build_dictionary(config)
        self.post_init()
        if momentum_encoder and self.device.type != "meta":
            self.reset_key_encoder()

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs):
        # transformers calls this at the end of __init__ and of from_pretrained. from_pretrained passes the missing keys and
        # makes every parameter require gradients. A call without them (as by FSDP) must not change the key encoder.
        super().tie_weights(missing_keys=missing_keys, **kwargs)
        if self.momentum_encoder:
            if missing_keys and any(key.startswith(("encoder_k.", "projector_k.")) for key in missing_keys):
                self.reset_key_encoder()
            self.encoder_k.requires_grad_(False)
            self.projector_k.requires_grad_(False)
            self.dictionary.after_loading()

    @torch.no_grad()
    def reset_key_encoder(self) -> None:
        """Copy the query encoder and projector, with their BatchNorm statistics, to the key encoder and projector."""
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.projector_k.load_state_dict(self.projector_q.state_dict())

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Momentum update `k = m * k + (1 - m) * q` of the parameters (v1 paper, equation 2), not of BatchNorm statistics."""
        q: list[torch.Tensor] = [*self.encoder_q.parameters(), *self.projector_q.parameters()]
        k: list[torch.Tensor] = [*self.encoder_k.parameters(), *self.projector_k.parameters()]
        torch._foreach_lerp_(k, q, 1 - self.config.key_momentum)

    def features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPoolingAndNoAttention:
        """Feature map (in timm's layout) and pooled feature (N, D) of the query encoder, for images (N, 3, H, W)."""
        feature_map = self.encoder_q.forward_features(self.normalize(pixel_values))
        pooled = self.encoder_q.forward_head(feature_map, pre_logits=True)
        return BaseModelOutputWithPoolingAndNoAttention(last_hidden_state=feature_map, pooler_output=pooled)

    def encode_queries(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Queries of images (N, 3, H, W): unit length, float32 (N, C)."""
        return self._encode(self.encoder_q, self.projector_q, pixel_values)

    @torch.no_grad()
    def encode_keys(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Keys of all processes in rank order, unit length, float32 (R·N, C), each encoded in another batch than its query.

        Args:
            pixel_values: images of this process (N, 3, H, W).
        """
        x, restore = self.shuffle(pixel_values)
        return gather(self._encode(self.encoder_k, self.projector_k, x))[restore]

    def _encode(self, encoder: TimmEncoder, projector: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.normalize(pixel_values)  # keys normalise after the exchange: uint8 is a quarter of the bytes
        pooled = encoder.forward_head(encoder.forward_features(x), pre_logits=True)
        return F.normalize(projector(pooled).float(), dim=1)  # (N, C)

    @torch.no_grad()
    def shuffle(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | slice]:
        """Exchange images between processes, so that BatchNorm statistics do not tell which key belongs to a query.

        Args:
            x: images of this process (N, ...).

        Returns:
            the images whose keys this process encodes (N, ...), and the index that restores the order of the gathered keys.
        """
        n, ranks = len(x), world_size()
        mode = self.config.batch_norm
        if mode == "shuffle" and ranks == 1:
            logger.warning_once(
                "batch_norm='shuffle' needs several processes: in one process, BatchNorm statistics leak which key belongs to "
                "a query. Set batch_norm='split' to imitate several GPUs, or 'plain' to accept the leak."
            )
        if mode == "shuffle" and ranks > 1:
            # Every rank samples the same order, on the CPU. The order within a part does not matter to BatchNorm.
            parts = self._random_order(ranks * n).view(ranks, n).sort(dim=1).values
            return exchange(x, parts), parts.flatten().argsort().to(x.device, non_blocking=True)
        if mode == "split":
            order = self._random_order(n)
            restore = torch.cat([order.argsort() + rank * n for rank in range(ranks)])
            return x[order.to(x.device, non_blocking=True)], restore.to(x.device, non_blocking=True)
        return x, slice(None)

    def _random_order(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.shuffle_generator, device="cpu")

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        key_pixel_values: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndNoAttention | MoCoOutput:
        """Compute features of images, or the contrastive loss of two views of them.

        Args:
            pixel_values: images (N, 3, H, W), normalised or of dtype uint8; in training the query view.
            key_pixel_values: the key view of the same images (N, 3, H, W).

        Returns:
            the feature map and the pooled feature without `key_pixel_values`, a [`MoCoOutput`] with it.
        """
        x_q, x_k = pixel_values, key_pixel_values
        if x_k is None:
            return self.features(x_q)
        own = local_slice(len(x_q))
        q = self.encode_queries(x_q)  # (N, C)
        keys = self.encode_keys(x_k)  # (R·N, C)
        k = keys[own]  # (N, C)
        if self.config.symmetric_loss:  # the views swap their roles
            swapped_q = self.encode_queries(x_k)
            swapped_keys = self.encode_keys(x_q)
            q, k = torch.cat([q, swapped_q]), torch.cat([k, swapped_keys[own]])
            keys = torch.cat([swapped_keys, keys])  # the official notebook enqueues the keys of the first view first
        with torch.autocast(q.device.type, enabled=False):  # 16 bits would lose small differences
            loss, logits = self.dictionary(q, k, self.config.temperature)
        if self.config.symmetric_loss:
            loss = 2 * loss  # the official notebook adds the means of both views; this is the mean over both
        return MoCoOutput(loss=loss, logits=logits, query_embeds=q, key_embeds=keys)


class MoCoForImageClassification(MoCoPreTrainedModel):
    """The query encoder with a linear classifier, for the linear protocol, fine-tuning and pipelines."""

    _keys_to_ignore_on_load_unexpected = [r"encoder_k\.", r"projector_[qk]\.", r"dictionary\."]

    moco: MoCoModel

    def __init__(self, config: MoCoConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.moco = MoCoModel(config, momentum_encoder=False)
        self.classifier = nn.Linear(self.moco.encoder_q.head_hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if module is self.classifier:  # as in the official linear protocol
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self, pixel_values: torch.FloatTensor, labels: torch.LongTensor | None = None, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        """Class logits (N, num_labels) of images (N, 3, H, W), and with `labels` (N,) the mean cross-entropy (scalar)."""
        logits = self.classifier(self.moco(pixel_values).pooler_output)
        loss = F.cross_entropy(logits.float(), labels) if labels is not None else None
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


class MoCoBackbone(BackboneMixin, MoCoPreTrainedModel):
    """Feature maps of the query encoder at chosen stages, for transformers' detectors and segmenters.

    Stages have timm's names (for a ResNet `out_features=["layer2", "layer3"]`); the default is the last stage.
    """

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [r"encoder_k\.", r"projector_[qk]\.", r"dictionary\.", r"^classifier\."]

    encoder_q: TimmEncoder

    def __init__(self, config: MoCoConfig):
        encoder = build_encoder(config)
        config.stage_names = [stage["module"] for stage in encoder.feature_info]
        config.set_output_features_output_indices(config.out_features, config.out_indices)
        super().__init__(config)
        self.num_features = [stage["num_chs"] for stage in encoder.feature_info]
        self.encoder_q = encoder
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.FloatTensor, **kwargs) -> BackboneOutput:
        """Feature maps (N, channels, H/stride, W/stride) of the stages in `out_features`, in order."""
        stages = self.encoder_q.forward_intermediates(self.normalize(pixel_values), intermediates_only=True)
        return BackboneOutput(feature_maps=tuple(stages[i] for i in self.out_indices))
