"""Momentum Contrast (arXiv:1911.05722, arXiv:2003.04297) on any timm encoder.

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
from .image_processing_moco import MoCoImageProcessor, normalize  # noqa: F401  (the first travels as remote code)

logger = logging.get_logger(__name__)

TimmEncoder = Any  # timm has no type for "a model with forward_features, forward_head and feature_info"


@dataclass
class MoCoOutput(ModelOutput):
    """What a contrastive step returns.

    Args:
        loss: InfoNCE, the mean over the local batch, natural logarithm (scalar).
        logits: similarities divided by the temperature, the positive first, float32, without gradient (N, 1+K).
        query_embeds: queries of this process, unit length, float32 (N, C).
        key_embeds: keys of all processes in rank order, unit length, float32, without gradient (R·N, C).

    With `symmetric_loss` the loss is a sum of two, and all first dimensions are twice as long: logits and queries have the
    first view's queries first, the keys the first view's keys, which are the positives of the second's queries.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    query_embeds: torch.Tensor | None = None
    key_embeds: torch.Tensor | None = None


def build_encoder(config: MoCoConfig) -> TimmEncoder:
    """The timm model without its classifier, with the stem and the BatchNorm that the config names.

    Raises:
        ValueError: timm has no such model, or the stem is not made for it.
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
    # `_init_weights` passes over tensors marked like this. BatchNorm is not marked: timm starts the last one of a
    # residual block at 0, the official code at 1. On the meta device there is nothing to keep.
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
        # torchvision's and torch's own initialisation, which the official code uses.
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
        elif module._non_persistent_buffers_set:  # no checkpoint has them; timm computes them: blur pool, swin, rope
            module.init_non_persistent_buffers()

    def normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images of dtype uint8 as the encoder wants them. Others are taken as normalised."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        return normalize(pixel_values, self.config.image_mean, self.config.image_std).to(self.dtype)


class MoCoModel(MoCoPreTrainedModel):
    """Query encoder, key encoder and dictionary. One training step is Algorithm 1 of the paper:

    ```python
    for x_q, x_k in loader:                      # two views of the same images
        model.update_key_encoder()               # official order: before the forward, with the last step's weights
        outputs = model(x_q, x_k)
        outputs.loss.backward()
        optimizer.step(), optimizer.zero_grad()
        model.dictionary.enqueue(outputs.key_embeds)
    ```

    Args:
        config: see [`MoCoConfig`].
        momentum_encoder: without it the model is the query encoder alone, for features.

    Loading: a checkpoint without the key encoder gets a copy of the query encoder, one without a queue a fresh queue.
    Another `queue_size` needs `ignore_mismatched_sizes=True` and starts a fresh queue. The key encoder never requires
    gradients, however the model came to be.

    `shuffle_generator` draws the order in which keys are encoded. It must be in the same state on all processes, as it is
    where every process has made the same steps.
    """

    _keys_to_ignore_on_load_missing = [r"^encoder_k\.", r"^projector_[qk]\.", r"^dictionary\."]
    _keys_to_ignore_on_load_unexpected = [r"^encoder_k\.", r"^projector_[qk]\.", r"^dictionary\.", r"^classifier\."]

    encoder_q: TimmEncoder
    encoder_k: TimmEncoder
    dictionary: Any  # see dictionary_moco.py for what it must do

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
        # transformers ends both __init__ and from_pretrained here. from_pretrained names the missing keys, and has made
        # every parameter require gradients. A bare call (FSDP makes one) must not touch the key encoder's values.
        super().tie_weights(missing_keys=missing_keys, **kwargs)
        if self.momentum_encoder:
            if missing_keys and any(key.startswith(("encoder_k.", "projector_k.")) for key in missing_keys):
                self.reset_key_encoder()
            self.encoder_k.requires_grad_(False)
            self.projector_k.requires_grad_(False)
            self.dictionary.after_loading()

    @torch.no_grad()
    def reset_key_encoder(self) -> None:
        """Copy the query encoder and projector, statistics included, into the key ones."""
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.projector_k.load_state_dict(self.projector_q.state_dict())

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """`k = m * k + (1 - m) * q` over parameters (v1 paper, equation 2). BatchNorm statistics are the key's own."""
        q: list[torch.Tensor] = [*self.encoder_q.parameters(), *self.projector_q.parameters()]
        k: list[torch.Tensor] = [*self.encoder_k.parameters(), *self.projector_k.parameters()]
        torch._foreach_lerp_(k, q, 1 - self.config.key_momentum)

    def features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPoolingAndNoAttention:
        """Feature map (the layout is timm's) and pooled feature (N, D) of the query encoder."""
        feature_map = self.encoder_q.forward_features(self.normalize(pixel_values))
        pooled = self.encoder_q.forward_head(feature_map, pre_logits=True)
        return BaseModelOutputWithPoolingAndNoAttention(last_hidden_state=feature_map, pooler_output=pooled)

    def encode_queries(self, pixel_values: torch.Tensor) -> torch.Tensor:
        q = self.projector_q(self.features(pixel_values).pooler_output)
        return F.normalize(q.float(), dim=1)  # (N, C)

    @torch.no_grad()
    def encode_keys(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Keys of all processes in rank order (R·N, C), each encoded in company that its query did not have."""
        x, restore = self.shuffle(pixel_values)
        x = self.normalize(x)  # after the exchange, which so moves a quarter of the bytes
        k = self.projector_k(self.encoder_k.forward_head(self.encoder_k.forward_features(x), pre_logits=True))
        return gather(F.normalize(k.float(), dim=1))[restore]

    @torch.no_grad()
    def shuffle(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | slice]:
        """The images whose keys this process is to encode (N, ...), and the index that restores the gathered keys' order."""
        n, ranks = len(x), world_size()
        mode = self.config.batch_norm
        if mode == "shuffle" and ranks == 1:
            logger.warning_once(
                "batch_norm='shuffle' needs several processes: in one, BatchNorm tells keys apart by their batch. "
                "Set batch_norm='split' to imitate several GPUs, or 'plain' to accept it."
            )
        if mode == "shuffle" and ranks > 1:
            # Drawn on the CPU, where every rank draws the same. BatchNorm does not see the order within a part.
            parts = self._draw_order(ranks * n).view(ranks, n).sort(dim=1).values
            return exchange(x, parts), parts.flatten().argsort().to(x.device, non_blocking=True)
        if mode == "split":
            order = self._draw_order(n)
            restore = torch.cat([order.argsort() + rank * n for rank in range(ranks)])
            return x[order.to(x.device, non_blocking=True)], restore.to(x.device, non_blocking=True)
        return x, slice(None)

    def _draw_order(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.shuffle_generator, device="cpu")

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        key_pixel_values: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndNoAttention | MoCoOutput:
        """Features of one batch of images, or the contrastive loss of two views of them.

        Args:
            pixel_values: images (N, 3, H, W), normalised or of dtype uint8; in training the query view.
            key_pixel_values: the key view of the same images (N, 3, H, W).

        Returns:
            without `key_pixel_values` the feature map and the pooled feature, with it a [`MoCoOutput`].
        """
        x_q, x_k = pixel_values, key_pixel_values
        if x_k is None:
            return self.features(x_q)
        q = self.encode_queries(x_q)  # (N, C)
        keys = self.encode_keys(x_k)  # (R·N, C)
        k = keys[local_slice(len(x_q))]  # (N, C)
        if self.config.symmetric_loss:
            swapped_q, swapped_keys = self.encode_queries(x_k), self.encode_keys(x_q)
            q, k = torch.cat([q, swapped_q]), torch.cat([k, swapped_keys[local_slice(len(x_q))]])
            keys = torch.cat([swapped_keys, keys])  # the official notebook enqueues the keys of the first view first
        with torch.autocast(q.device.type, enabled=False):  # 16 bits would round away small differences
            loss, logits = self.dictionary(q, k, self.config.temperature)
        if self.config.symmetric_loss:
            loss = 2 * loss  # the mean over both views' queries, and the notebook adds the two means
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
        if module is self.classifier:  # as the official linear protocol starts it
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self, pixel_values: torch.FloatTensor, labels: torch.LongTensor | None = None, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        """Class logits (N, num_labels) of images (N, 3, H, W); with `labels` (N,) the cross-entropy too."""
        logits = self.classifier(self.moco(pixel_values).pooler_output)
        loss = F.cross_entropy(logits.float(), labels) if labels is not None else None
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


class MoCoBackbone(BackboneMixin, MoCoPreTrainedModel):
    """Feature maps of the query encoder at chosen stages, for transformers' detectors and segmenters.

    Stages carry timm's names (`out_features=["layer2", "layer3"]` for a ResNet); the last one is the default.
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
