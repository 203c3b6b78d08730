"""The fully convolutional network with which MoCo v1 segments images (arXiv:1911.05722, appendix A.5): FCN-16s without skips.

Shapes: `N` images, `H`, `W` pixels, `L` num_labels.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils.generic import can_return_tuple

from .configuration_moco import MoCoFCNConfig
from .distributed_moco import set_fine_tuned_norm
from .encoder_moco import TimmEncoder
from .image_processing_moco import MoCoSegmentationImageProcessor, enlarge  # noqa: F401  (remote code must import it)
from .modeling_moco import STATE_OF_TRAINING, MoCoModel, MoCoPreTrainedModel, build_resnet

CHANNELS, DILATION = 256, 6  # of the two convolutions after the encoder


class MoCoForSemanticSegmentation(MoCoPreTrainedModel):
    """A class for every pixel, from a ResNet that MoCo has pretrained.

    layer4 has stride 1 and dilation 2; two 3x3 convolutions with BatchNorm, ReLU and dilation 6, and a 1x1 convolution follow.
    The paper does not say how these begin: here the first two as the encoder's do, by He's normal distribution, and the last
    one by N(0, 0.01) with bias 0.

    ```python
    model = MoCoForSemanticSegmentation.from_pretrained("runs/mine", num_labels=21)
    outputs = model(pixel_values, labels=labels)  # the loss, and logits at a sixteenth of the size
    ```

    Of an encoder's folder it takes all the encoder has; transformers reports the heads as new.

    Raises:
        ValueError: the encoder is no ResNet, is one for images with even sides, or `model_args` change its strides.
    """

    config: MoCoFCNConfig
    config_class = MoCoFCNConfig
    _keys_to_ignore_on_load_unexpected = [*STATE_OF_TRAINING, r"^classifier\."]

    moco: MoCoModel

    def __init__(self, config: MoCoFCNConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.moco = build_resnet(config, dilated=True)
        if any(map(_halves_even_sides_alone, self.encoder_q.modules())):
            raise ValueError(
                f"architecture ({config.architecture!r}) halves even sides alone, and images have any: choose another "
                "ResNet, e.g. 'resnet50'"
            )
        self.context = nn.Sequential(*_convolution(self.encoder_q.num_features), *_convolution(CHANNELS))
        self.pixel_classifier = nn.Conv2d(CHANNELS, config.num_labels, kernel_size=1)
        set_fine_tuned_norm(self, config, "fcn_norm")
        self._finish_encoder()
        self.post_init()

    @property
    def encoder_q(self) -> TimmEncoder:
        return self.moco.encoder_q

    @torch.no_grad()
    def _init_weights(self, module):
        if module is self.pixel_classifier:
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> SemanticSegmenterOutput:
        """The scores of all classes, and with `labels` the loss.

        Args:
            pixel_values: images (N, 3, H, W), normalised or of dtype uint8.
            labels: the class of each pixel (N, H, W), int64; `semantic_loss_ignore_index` where it does not count.
            output_hidden_states: return the maps of all stages of the encoder too.

        Returns:
            `logits` (N, L, H/16, W/16), rounded up; and `loss`, the mean cross-entropy of the pixels that count, of logits
            that `enlarge` brings to the size of the labels.

        Raises:
            ValueError: labels that are not of these images or classes, or of which no pixel counts, or a request for attention
                weights.
        """
        loss = None
        hidden = self._wants_hidden_states(output_hidden_states, output_attentions)
        if labels is not None:
            self._check(labels, pixel_values)
        encoded = self.moco.features(pixel_values, hidden)
        logits = self.pixel_classifier(self.context(encoded.last_hidden_state))
        if labels is not None:
            height, width = labels.shape[1:]
            ignored = self.config.semantic_loss_ignore_index
            loss = F.cross_entropy(enlarge(logits, (height, width)), labels, ignore_index=ignored)
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)

    def _check(self, labels: torch.Tensor, pixel_values: torch.Tensor) -> None:
        n, _, height, width = pixel_values.shape
        if labels.shape != (n, height, width) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels ({tuple(labels.shape)}, {labels.dtype}) must be ({n}, {height}, {width}), int64: a class of each pixel"
            )
        ignored = self.config.semantic_loss_ignore_index
        counted = labels[labels != ignored]
        if counted.numel() == 0:
            raise ValueError(f"labels are {ignored} at every pixel, which no loss counts: leave such images out")
        low, high = (int(end) for end in counted.aminmax())
        if low < 0 or high >= self.num_labels:
            raise ValueError(
                f"labels ({low} to {high}) must lie between 0 and {self.num_labels - 1}, or be {ignored}: number classes from "
                "0, or load the model with more num_labels"
            )


def _halves_even_sides_alone(module: nn.Module) -> bool:
    return isinstance(module, nn.AvgPool2d) and not module.ceil_mode and module.padding in (0, (0, 0))


def _convolution(channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, CHANNELS, kernel_size=3, padding=DILATION, dilation=DILATION, bias=False),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
    ]
