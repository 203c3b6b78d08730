"""Momentum Contrast (arXiv:1911.05722, 2003.04297, 2104.02057) and what it is compared with, for any timm encoder.

Shapes: `N` local batch, `R` processes, `V` views that are queries (1, or 2 with `symmetric_loss`), `C` projection_dim,
`K` negatives of a query, `D` feature width, `H`, `W` pixels.
"""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedConfig, PreTrainedModel
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

from .configuration_moco import MoCoConfig, is_of_wrapper
from .dictionary_moco import build_dictionary
from .distributed_moco import convert_batch_norm, exchange, gather, to_device, world_size
from .encoder_moco import (
    TimmEncoder,
    build_encoder,
    build_predictor,
    build_projector,
    freeze_stem,
    is_new,
    mark_initialised,
    named_tensors,
    spare_statistics,
    tensors,
)
from .image_processing_moco import MoCoImageProcessor, normalize  # noqa: F401  (remote code must import the processor)

logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that say where a file is.
OF_THE_HUB = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}
# Tensors for contrastive training alone.
STATE_OF_TRAINING = [r"encoder_k\.", r"projector_[qk]\.", r"predictor_q\.", r"dictionary\."]


@dataclass
class MoCoOutput(ModelOutput):
    """Output of a contrastive step.

    Args:
        loss: InfoNCE, the mean over the local batch, natural logarithm, times `loss_scale` (scalar).
        logits: similarities divided by the temperature, the positive first, float32, without gradient (V·N, 1+K). Where the
            dictionary is the batch, the image's own keys among the others are -inf.
        query_embeds: queries of this process, unit length, float32 (V·N, C).
        key_embeds: keys of all processes in rank order, unit length, float32, without gradient (V·R·N, C).
        key_index: numbers of the images of the keys, where a bank was told those of the queries (R·N,).
        hidden_states: with `output_hidden_states` the maps (N, channels, H/stride, W/stride) of all stages of the query
            encoder, those of the first view.

    With `symmetric_loss` the loss is the sum of the losses of both views. Logits and queries begin with the queries of the
    first view. Keys begin with the keys of the first view, which are the positives of the second view's queries.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    query_embeds: torch.Tensor | None = None
    key_embeds: torch.Tensor | None = None
    key_index: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class MoCoPreTrainedModel(PreTrainedModel):
    config: MoCoConfig
    config_class = MoCoConfig
    base_model_prefix = "moco"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True  # what timm's attention calls; `attn_implementation="eager"` writes it out
    _no_split_modules: list[str] = []

    encoder_q: TimmEncoder
    _gradient_checkpointing = False
    _statistics_hooks: Any = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, key_mapping=None, **kwargs):
        """As in every transformers model. It also loads what was published, fine-tuned and saved without this code."""
        own = key_mapping is None and pretrained_model_name_or_path is not None
        if own:
            key_mapping = names_of_wrapper(pretrained_model_name_or_path, kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, key_mapping=key_mapping, **kwargs)
        if own and key_mapping:  # or transformers would save timm's names again
            (loaded[0] if isinstance(loaded, tuple) else loaded)._weight_conversions = None
        return loaded

    @torch.no_grad()
    def _init_weights(self, module):
        if not is_new(module):
            return
        if isinstance(module, nn.Conv2d) and isinstance(self.encoder_q, timm.models.ResNet):  # torchvision's
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif module in self.encoder_q.modules():
            self._init_encoder()
        elif isinstance(module, nn.Linear):  # torch's own, as in the official code
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.SyncBatchNorm):  # of a head: transformers does not know it
            for name, tensor in named_tensors(module).items():
                (init.ones_ if name in ("weight", "running_var") else init.zeros_)(tensor)
        else:
            super()._init_weights(module)

    def _init_encoder(self) -> None:
        # Every architecture has tensors of its own (tokens, scales, tables, buffers that no checkpoint has), which only timm
        # can initialise. So what was not loaded is copied from a new encoder.
        # By name: a detector may have frozen BatchNorm, which makes buffers of its parameters and counts no batches.
        values = named_tensors(build_encoder(self.config))
        for name, tensor in named_tensors(self.encoder_q).items():
            init.copy_(tensor, values[name])
        mark_initialised(self.encoder_q)

    def _finish_encoder(self) -> None:
        # Settings of transformers that timm has under other names.
        self.supports_gradient_checkpointing = True
        for module in self.encoder_q.modules():
            if "fused_attn" in vars(module):
                module.fused_attn = self.config._attn_implementation != "eager"

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward pass computes activations again instead of keeping them. transformers sets it."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        try:
            self.encoder_q.set_grad_checkpointing(enable)
        except AssertionError as error:
            raise ValueError(
                f"gradient_checkpointing ({enable}) is not for {self.config.architecture}, which timm cannot checkpoint: "
                "leave it out"
            ) from error
        self._gradient_checkpointing = enable
        for hook in self._statistics_hooks:
            hook.remove()
        self._statistics_hooks = spare_statistics(self.encoder_q) if enable else []

    def normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in the model's dtype. Those of dtype uint8 are normalised, floats are normalised already.

        Raises:
            ValueError: they have another dtype, whose levels nobody could tell from normalised ones.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize(pixel_values, self.config.image_mean, self.config.image_std)
        elif not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values ({pixel_values.dtype}) must be uint8 levels, or normalised floats: convert them"
            )
        return pixel_values.to(self.dtype)

    def _wants_hidden_states(self, output_hidden_states: bool | None, output_attentions: bool | None) -> bool:
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions (True) is not possible: timm's attention does not return its weights")
        return self.config.output_hidden_states if output_hidden_states is None else output_hidden_states


def names_of_wrapper(source: Any, given: dict[str, Any]) -> dict[str, str] | None:
    """Patterns of timm's names and what they are here, for a published model that transformers' TimmWrapper has saved.

    Args:
        given: the arguments of `from_pretrained`.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(
            source, **{name: given[name] for name in OF_THE_HUB & given.keys()}
        )
    except OSError:  # what is wrong with it is said where the model is loaded
        return None
    if not is_of_wrapper(config):
        return None
    classifier = re.escape(config["pretrained_cfg"]["classifier"])
    return {rf"^(timm_model\.)?{classifier}\.": "classifier.", r"^(timm_model\.)?(?!classifier\.)": "encoder_q."}


class MoCoModel(MoCoPreTrainedModel):
    """Query encoder, who encodes keys, and dictionary. A training step is algorithm 1 of the paper:

    ```python
    for x_q, x_k in loader:                      # two views of the same images
        model.update_key_encoder()               # before the forward pass, as in the official code
        outputs = model(x_q, x_k)
        outputs.loss.backward()
        optimizer.step(), optimizer.zero_grad()
        model.dictionary.enqueue(outputs.key_embeds, outputs.key_index)
    ```

    Three settings make it another method: `key_encoder`, `dictionary` and `symmetric_loss`, see [`MoCoConfig`].

    Args:
        config: see [`MoCoConfig`].
        momentum_encoder: whether to build heads, key encoder and dictionary. Without them the model is the query encoder alone,
            for features.

    Loading: where a checkpoint has no key encoder, the key encoder is a copy of the query encoder; where it has no queue, the
    queue is random. Another `queue_size` needs `ignore_mismatched_sizes=True` and starts a random queue; another stem, image
    size or `projection_dim` needs it too, and makes the key encoder a copy again. The key encoder never requires gradients.
    `absent_keys` has the names of the tensors that the checkpoint lacked; what a checkpoint of an encoder alone lacks is not
    reported as missing.

    `shuffle_generator` samples the order in which keys are encoded. It must have the same state on all processes, which is so
    if all processes have made the same steps. So must `dictionary.generator`, which samples the keys of a bank. Where
    `given_orders` is an iterator of orders, they are taken from there instead.
    """

    _keys_to_ignore_on_load_missing = [r"^encoder_k\.", r"^projector_[qk]\.", r"^predictor_q\.", r"^dictionary\."]
    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    encoder_k: TimmEncoder
    dictionary: Any  # dictionary_moco.py describes its interface

    def __init__(self, config: MoCoConfig, momentum_encoder: bool = True):
        super().__init__(config)
        self.encoder_q = build_encoder(config)
        self.momentum_encoder = momentum_encoder
        self.absent_keys: frozenset[str] = frozenset()
        self.shuffle_generator = torch.Generator()
        self.given_orders: Iterator[torch.Tensor] | None = None
        self._key_encoder_is_new = False
        if momentum_encoder:
            dim = self.encoder_q.head_hidden_size
            self.encoder_q = convert_batch_norm(self.encoder_q, config)
            self.projector_q = convert_batch_norm(build_projector(config, dim), config)
            self.predictor_q = convert_batch_norm(build_predictor(config, dim), config)
            if self.has_key_encoder:
                self.encoder_k = convert_batch_norm(build_encoder(config), config)
                self.projector_k = convert_batch_norm(build_projector(config, dim), config)
            self.dictionary = build_dictionary(config)
        else:
            self._keys_to_ignore_on_load_unexpected = [
                *type(self)._keys_to_ignore_on_load_unexpected,
                *STATE_OF_TRAINING,
            ]
        self._finish_encoder()
        self.post_init()

    @property
    def has_key_encoder(self) -> bool:
        """Whether keys have an encoder of their own, the moving average of the query encoder."""
        return self.momentum_encoder and self.config.key_encoder == "momentum"

    @torch.no_grad()
    def _init_weights(self, module):
        if self.momentum_encoder and is_new(module):
            if module is self.dictionary:
                module.reset()
                return
            if self.has_key_encoder:  # tie_weights looks at it
                self._key_encoder_is_new |= module in self._query_and_key_parts[1].modules()
        super()._init_weights(module)

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs):
        # transformers calls this after the weights are initialised, at the end of __init__ and of from_pretrained, which passes
        # the missing keys and makes every parameter require gradients. A call at another time must not change the key encoder.
        super().tie_weights(missing_keys=missing_keys, **kwargs)
        if missing_keys is not None:
            self.absent_keys = frozenset(missing_keys)
            of_training = "encoder_k." if self.has_key_encoder else "projector_q."
            if not {key for key in self.state_dict() if key.startswith(of_training)} <= missing_keys:
                self._keys_to_ignore_on_load_missing = []  # the checkpoint is not of an encoder alone
        if self.has_key_encoder:
            if self._key_encoder_is_new:  # in part, which is no encoder
                self.reset_key_encoder()
            self._query_and_key_parts[1].requires_grad_(False)
        if self.momentum_encoder:
            freeze_stem(self.encoder_q, self.config)
            self.dictionary.after_loading()

    @property
    def _query_and_key_parts(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        return nn.ModuleList([self.encoder_q, self.projector_q]), nn.ModuleList([self.encoder_k, self.projector_k])

    @torch.no_grad()
    def reset_key_encoder(self) -> None:
        """Copy the query encoder and projector, with their BatchNorm statistics, to the key encoder and projector."""
        queries, keys = self._query_and_key_parts
        for q, k in zip(tensors(queries), tensors(keys), strict=True):
            k.copy_(q)
        self._key_encoder_is_new = False

    @torch.no_grad()
    def update_key_encoder(self, momentum: float | None = None) -> None:
        """Momentum update `k = m * k + (1 - m) * q` of the parameters (v1 paper, equation 2), not of BatchNorm statistics.

        Where keys have no encoder of their own there is nothing to update.

        Args:
            momentum: m of this step; by default the configuration's.
        """
        if self.has_key_encoder:
            queries, keys = self._query_and_key_parts
            update = get_ema_multi_avg_fn(self.config.key_momentum if momentum is None else momentum)
            update([*keys.parameters()], [*queries.parameters()], None)

    def features(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Feature map (in timm's layout) and pooled feature (N, D) of the query encoder, for images (N, 3, H, W).

        With `output_hidden_states` also the maps (N, channels, H/stride, W/stride) of all stages.
        """
        x, stages = self.normalize(pixel_values), None
        if output_hidden_states:
            feature_map, stages = self.encoder_q.forward_intermediates(x)
        else:
            feature_map = self.encoder_q.forward_features(x)
        pooled = self.encoder_q.forward_head(feature_map, pre_logits=True)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=feature_map, pooler_output=pooled, hidden_states=None if stages is None else tuple(stages)
        )

    def encode_queries(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Queries of images (N, 3, H, W): unit length, float32 (N, C)."""
        return self._queries(self.features(pixel_values).pooler_output)

    def _queries(self, pooled: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.predictor_q(self.projector_q(pooled)).float(), dim=1)  # (N, C)

    def encode_keys(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Keys of all processes in rank order, unit length, float32 (R·N, C), each encoded in another batch than its query.

        Those of a key encoder have no gradient; those of the query encoder (`key_encoder="shared"`) have.

        Args:
            pixel_values: images of this process (N, 3, H, W).
        """
        x, restore = self.shuffle(pixel_values)
        if not self.has_key_encoder:
            return gather(F.normalize(self._project(self.encoder_q, self.projector_q, x).float(), dim=1))[restore]
        with torch.no_grad():
            return gather(F.normalize(self._project(self.encoder_k, self.projector_k, x).float(), dim=1))[restore]

    def _project(self, encoder: TimmEncoder, projector: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.normalize(pixel_values)  # keys normalise after the exchange: uint8 is a quarter of the bytes
        return projector(encoder.forward_head(encoder.forward_features(x), pre_logits=True))  # (N, C)

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
            parts = self.random_order(ranks * n).view(ranks, n).sort(dim=1).values
            return exchange(x, parts), to_device(x.device, parts.flatten().argsort())
        if mode == "split":
            order = self.random_order(n)
            restore = torch.cat([order.argsort() + rank * n for rank in range(ranks)])
            return x[to_device(x.device, order)], to_device(x.device, restore)
        return x, slice(None)

    def random_order(self, n: int) -> torch.Tensor:
        """The next order (n,) that keys are encoded in."""
        if self.given_orders is not None:
            return next(self.given_orders)
        return torch.randperm(n, generator=self.shuffle_generator, device="cpu")

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        key_pixel_values: torch.FloatTensor | None = None,
        index: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndNoAttention | MoCoOutput:
        """Compute features of images, or the contrastive loss of two views of them (for a bank, of one).

        Args:
            pixel_values: images (N, 3, H, W), normalised or of dtype uint8; in training the query view.
            key_pixel_values: the key view of the same images (N, 3, H, W).
            index: for a bank the numbers of the images (N,), int64; there is no key view.
            output_hidden_states: return the maps of all stages too, those of `pixel_values`.

        Returns:
            the feature map and the pooled feature without `key_pixel_values` and `index`, a [`MoCoOutput`] with one of them.

        Raises:
            ValueError: a key view or an index for a model without dictionary, the one of both that the dictionary does not
                take, or a request for attention weights.
        """
        hidden = self._wants_hidden_states(output_hidden_states, output_attentions)
        if key_pixel_values is None and index is None:
            return self.features(pixel_values, hidden)
        self._check_contrastive(key_pixel_values, index)
        views = 2 if self.config.symmetric_loss else 1
        both: list[Any] = [pixel_values, key_pixel_values]
        x_q, x_k = both[:views], both[::-1][:views]
        if self.config.key_encoder == "none":
            x_q = [torch.cat(x_q)]  # queries of one view are keys of the other; of one view they are keys to come
        encoded = [self.features(x, hidden) for x in x_q]
        q = torch.cat([self._queries(some.pooler_output) for some in encoded]).unflatten(0, (views, -1))  # (V, N, C)
        if self.config.key_encoder == "none":
            keys = torch.stack([gather(some) for some in q.flip(0)])  # (V, R·N, C)
        else:
            keys = torch.stack([self.encode_keys(x) for x in x_k])  # (V, R·N, C)
        with torch.autocast(q.device.type, enabled=False):  # 16 bits would lose small differences
            loss, logits = self.dictionary(q, keys, self.config.temperature, index)
        return MoCoOutput(
            loss=self.config.loss_scale * views * loss,  # the official notebook adds the means of both views
            logits=logits,
            query_embeds=q.flatten(0, 1),
            key_embeds=keys.detach().flip(0).flatten(0, 1),  # the notebook enqueues the keys of the first view first
            key_index=None if index is None else gather(index),
            hidden_states=_of_first_view(encoded[0].hidden_states, len(pixel_values)),
        )

    def _check_contrastive(self, key_view: Any, index: Any) -> None:
        if not self.momentum_encoder:
            raise ValueError("key_pixel_values needs a key encoder: build or load the model with momentum_encoder=True")
        if (self.config.dictionary == "bank") != (key_view is None):
            takes = "index, of one view" if self.config.dictionary == "bank" else "key_pixel_values, the second view"
            raise ValueError(f"dictionary ({self.config.dictionary!r}) takes {takes}: pass that and not the other")


def _of_first_view(stages: tuple[torch.Tensor, ...] | None, n: int) -> tuple[torch.Tensor, ...] | None:
    # A map of n images stays itself, so that `retain_grad` finds the gradient of the loss: a slice would have none.
    return stages and tuple(maps if len(maps) == n else maps[:n] for maps in stages)


def build_resnet(config: MoCoConfig, dilated: bool) -> MoCoModel:
    """The encoder of a detector or a segmentation model, on whose maps it works.

    Args:
        dilated: whether layer4 has stride 1 and dilation 2, all its 3x3 convolutions, so that its maps have stride 16.

    Raises:
        ValueError: it is no ResNet, or `model_args` change its strides.
    """
    with torch.device("meta"):
        encoder = build_encoder(config)
    if not isinstance(encoder, timm.models.ResNet):
        raise ValueError(
            f"architecture ({config.architecture!r}) must be a ResNet, whose layers detection and segmentation work on: e.g. "
            "'resnet50'"
        )
    if "output_stride" in (config.model_args or {}):
        raise ValueError(
            f"model_args ({config.model_args}) may not have output_stride: leave it out; rcnn_variant='dilated_c5' and "
            "segmentation dilate layer4 by themselves"
        )
    if not dilated:
        return MoCoModel(config, momentum_encoder=False)
    changed = copy.deepcopy(config)
    changed.model_args = {**(config.model_args or {}), "output_stride": 16}
    backbone = MoCoModel(changed, momentum_encoder=False)
    for module in backbone.encoder_q.layer4[0].modules():  # timm dilates from the second block on
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (2, 2)
    backbone.config = config  # saved alone it is the encoder that it is, which a model around it dilates again
    return backbone


class MoCoForImageClassification(MoCoPreTrainedModel):
    """The query encoder with a linear classifier, for the linear protocol, fine-tuning and pipelines."""

    _keys_to_ignore_on_load_unexpected = STATE_OF_TRAINING

    moco: MoCoModel

    def __init__(self, config: MoCoConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.moco = MoCoModel(config, momentum_encoder=False)
        self.classifier = nn.Linear(self.encoder_q.head_hidden_size, config.num_labels)
        self._finish_encoder()
        self.post_init()

    @property
    def encoder_q(self) -> TimmEncoder:
        return self.moco.encoder_q

    @torch.no_grad()
    def _init_weights(self, module):
        if module is self.classifier:  # as in the official linear protocol
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:
        """Class logits (N, num_labels) of images (N, 3, H, W), and with `labels` the mean loss (scalar).

        Args:
            labels: class numbers (N,) for cross-entropy; numbers (N,) or (N, num_labels) for the mean squared error, which
                is for one label or `problem_type="regression"`; 0 and 1 as floats (N, num_labels) for binary cross-entropy,
                which is for `problem_type="multi_label_classification"`.
            output_hidden_states: return the maps of all stages too.

        Raises:
            ValueError: a request for attention weights.
        """
        outputs = self.moco(
            pixel_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits.float(), self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class MoCoBackbone(BackboneMixin, MoCoPreTrainedModel):
    """Feature maps of the query encoder at chosen stages, for transformers' detectors and segmenters.

    Stages have timm's names (for a ResNet `out_features=["layer2", "layer3"]`); the default is the last stage.
    """

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [*STATE_OF_TRAINING, r"^classifier\."]

    def __init__(self, config: MoCoConfig):
        encoder = build_encoder(config)
        config.stage_names = [stage["module"] for stage in encoder.feature_info]
        config.set_output_features_output_indices(config.out_features, config.out_indices)
        super().__init__(config)
        self.num_features = [stage["num_chs"] for stage in encoder.feature_info]
        self.encoder_q = encoder
        self._finish_encoder()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BackboneOutput:
        """Feature maps (N, channels, H/stride, W/stride) of the stages in `out_features`, in order.

        Args:
            output_hidden_states: return the maps of all stages too.

        Raises:
            ValueError: a request for attention weights.
        """
        hidden = self._wants_hidden_states(output_hidden_states, output_attentions)
        stages = self.encoder_q.forward_intermediates(self.normalize(pixel_values), intermediates_only=True)
        maps = tuple(stages[i] for i in self.out_indices)
        return BackboneOutput(feature_maps=maps, hidden_states=tuple(stages) if hidden else None)
