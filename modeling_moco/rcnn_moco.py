"""Faster and Mask R-CNN around a pretrained ResNet, as the MoCo papers detect objects (arXiv:1911.05722, appendix A.1).

A step and the detections equal those of detectron2 with the settings of the official `detection/` folder.

Shapes: `N` images, `H`, `W` pixels of the padded batch, `G` objects of an image, `R` boxes of all images, `L` num_labels,
`D` width of the head, `M` max_detections, `S` side of a predicted mask.
"""

from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, roi_align
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_moco import MoCoRCNNConfig
from .distributed_moco import set_fine_tuned_norm
from .encoder_moco import TimmEncoder
from .image_processing_moco import MoCoDetectionImageProcessor  # noqa: F401  (remote code must import the processor)
from .modeling_moco import STATE_OF_TRAINING, MoCoModel, MoCoPreTrainedModel, build_resnet
from .rpn_moco import Objects, RegionProposals, decode_boxes, encode_boxes, has_area, sample

STRIDE = 16  # of the map that boxes are pooled from
FOREGROUND_IOU, FOREGROUND_SHARE = 0.5, 0.25  # of the sampled boxes
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the deltas x, y, width, height
C5_CHANNELS, C5_HIDDEN, MASK_CHANNELS = 512, 1024, 256
Detections = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of an image: scores (B,), classes (B,), boxes (B, 4)


@dataclass
class MoCoDetectionOutput(ModelOutput):
    """Losses of a training step, or the detections of images.

    Args:
        loss: sum of the losses (scalar).
        loss_dict: each of them by detectron2's name, without gradient: `loss_rpn_cls`, `loss_rpn_loc`, `loss_cls`,
            `loss_box_reg`, `loss_mask`.
        scores: probabilities of the classes, the best first, 0 where there is no further detection (N, M).
        labels: classes of the detections, -1 where there is none (N, M).
        pred_boxes: corners `x0 y0 x1 y1` as shares of the width and height of the image without padding (N, M, 4).
        pred_masks: probabilities in the box, with `masks` in the configuration (N, M, S, S).
        hidden_states: with `output_hidden_states` the maps (N, channels, H/stride, W/stride) of the stages that encode whole
            images: those of layer4 are among them for `"dilated_c5"`; for `"c4"` it encodes boxes.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    scores: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class _Sampled:
    """Boxes on which the second losses of an image are computed: (B, 4), their objects (B,) and classes (B,)."""

    boxes: torch.Tensor
    object_of: torch.Tensor
    classes: torch.Tensor  # L is the background


class MoCoForObjectDetection(MoCoPreTrainedModel):
    """A detector on a ResNet that MoCo has pretrained: Faster R-CNN, or Mask R-CNN with `masks=True`.

    ```python
    model = MoCoForObjectDetection.from_pretrained("runs/mine", num_labels=20)
    outputs = model(**processor(images, annotations, return_tensors="pt"))  # the loss; detections after model.eval()
    ```

    It trains in training mode, and detects in evaluation mode. Of an encoder's folder it takes all the encoder has;
    transformers reports the heads as new.

    Raises:
        ValueError: the encoder is no ResNet, or `model_args` change its strides.
    """

    config: MoCoRCNNConfig
    config_class = MoCoRCNNConfig
    _keys_to_ignore_on_load_unexpected = [*STATE_OF_TRAINING, r"^classifier\."]

    moco: MoCoModel

    def __init__(self, config: MoCoRCNNConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.moco = build_resnet(config, dilated=config.rcnn_variant == "dilated_c5")
        layer3, layer4 = (stage["num_chs"] for stage in self.encoder_q.feature_info[-2:])
        if config.rcnn_variant == "c4":
            self.proposals = RegionProposals(config, layer3, STRIDE)
            self.norm = nn.BatchNorm2d(
                layer4
            )  # the papers': the pretrained features end in one that fine-tuning may change
            width = layer4
        else:
            self.reduce = nn.Sequential(
                nn.Conv2d(layer4, C5_CHANNELS, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(C5_CHANNELS),
                nn.ReLU(),
            )
            self.proposals = RegionProposals(config, C5_CHANNELS, STRIDE)
            self.hidden = nn.Sequential(
                nn.Linear(C5_CHANNELS * config.roi_side**2, C5_HIDDEN),
                nn.ReLU(),
                nn.Linear(C5_HIDDEN, C5_HIDDEN),
                nn.ReLU(),
            )
            width = C5_HIDDEN
        self.cls_score = nn.Linear(width, config.num_labels + 1)  # the background is the last
        self.bbox_pred = nn.Linear(width, 4 * config.num_labels)
        if config.masks:
            self.mask_deconv = nn.ConvTranspose2d(layer4, MASK_CHANNELS, kernel_size=2, stride=2)
            self.mask_predictor = nn.Conv2d(MASK_CHANNELS, config.num_labels, kernel_size=1)
        set_fine_tuned_norm(self, config, "detector_norm")
        self._finish_encoder()
        self.post_init()

    @property
    def encoder_q(self) -> TimmEncoder:
        return self.moco.encoder_q

    @torch.no_grad()
    def _init_weights(self, module):
        # detectron2's: the deviation of a normal distribution, or Caffe2's fillings.
        of_proposals = (self.proposals.conv, self.proposals.objectness, self.proposals.deltas)
        deviations: dict[nn.Module, float] = {
            self.cls_score: 0.01,
            self.bbox_pred: 0.001,
            **dict.fromkeys(of_proposals, 0.01),
        }
        if self.config.masks:
            deviations[self.mask_predictor] = 0.001
        if module in deviations:
            init.normal_(module.weight, std=deviations[module])
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=1)  # c2_xavier_fill
        elif isinstance(module, nn.ConvTranspose2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # c2_msra_fill
        else:
            super()._init_weights(module)
            return
        init.zeros_(module.bias)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> MoCoDetectionOutput:
        """The losses of images in training mode, and what is detected on them in evaluation mode.

        Args:
            pixel_values: images (N, 3, H, W), normalised or of dtype uint8, padded on the right and below.
            pixel_mask: 1 on the image and 0 on the padding (N, H, W); without it no image has padding.
            labels: of each image a dictionary with `class_labels` (G,) of dtype int64, `boxes` (G, 4), which are centre x,
                centre y, width and height as shares of the image without padding, and for a model with masks `masks`
                (G, H', W'), 0 and 1, where H' and W' are at least the image's. Evaluation mode does not look at them.
            output_hidden_states: return the maps of the stages too.

        Raises:
            ValueError: training mode without labels, labels that are not of these images, or a request for attention weights.
        """
        hidden = self._wants_hidden_states(output_hidden_states, output_attentions)
        sizes = _sizes(pixel_values, pixel_mask)
        images = self.normalize(pixel_values)
        if pixel_mask is not None and pixel_values.dtype == torch.uint8:
            images = images * pixel_mask[:, None].to(images.dtype)  # padding is 0 after the normalisation
        objects = self._objects(labels, sizes) if self.training else None
        features, stages = self._features(images, hidden)
        outputs = self._detect(features, sizes) if objects is None else self._train(features, sizes, objects)
        outputs.hidden_states = stages
        return outputs

    def _objects(self, labels: list[dict[str, torch.Tensor]] | None, sizes: list[tuple[int, int]]) -> list[Objects]:
        if labels is None:
            raise ValueError(
                "labels (None) are needed in training mode: pass them, or call model.eval() to detect objects"
            )
        if len(labels) != len(sizes):
            raise ValueError(f"labels (of {len(labels)} images) must be of all {len(sizes)} images: pass one for each")
        objects = []
        for label, (height, width) in zip(labels, sizes, strict=True):
            classes, masks = label["class_labels"], label.get("masks") if self.config.masks else None
            if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_labels:
                raise ValueError(
                    f"class_labels ({classes.tolist()}) must lie between 0 and {self.num_labels - 1}: number classes from 0, "
                    "or load the model with more num_labels"
                )
            if len(label["boxes"]) != len(classes):
                raise ValueError(
                    f"boxes ({len(label['boxes'])}) must be as many as class_labels ({len(classes)}): pass one for each object"
                )
            if self.config.masks and len(classes) and (masks is None or len(masks) != len(classes)):
                raise ValueError(
                    f"labels ({', '.join(label)}) must have masks, one for each object: pass them, or load with masks=False"
                )
            centre, size = label["boxes"].float().reshape(-1, 4).split(2, dim=1)
            boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
            objects.append(Objects(boxes * boxes.new_tensor([width, height, width, height]), classes, masks))
        return objects

    # Features

    def _features(self, images: torch.Tensor, hidden: bool) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """The map (N, channels, H/16, W/16) that proposals come from and boxes are pooled from, and those of all stages."""
        dilated = self.config.rcnn_variant == "dilated_c5"
        last = 4 if dilated else 3  # layer4 or layer3: the stem is 0
        stages = self.encoder_q.forward_intermediates(
            images, indices=[*range(last + 1)] if hidden else [last], stop_early=True, intermediates_only=True
        )
        return self.reduce(stages[-1]) if dilated else stages[-1], tuple(stages) if hidden else None

    def _run(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and self.training:
            return timm.models.checkpoint_seq(layer, x)
        return layer(x)

    def _pool(self, features: torch.Tensor, boxes: list[torch.Tensor]) -> torch.Tensor:
        """The part of the map that each box covers: (R, D, h, w) after layer4, or (R, channels, h, w) of the map itself."""
        side = self.config.roi_side
        # In float32: 16 bits have no kernel on CPUs, and few positions.
        pooled = roi_align(features.float(), boxes, side, 1 / STRIDE, sampling_ratio=0, aligned=True).to(features.dtype)
        return self.norm(self._run(self.encoder_q.layer4, pooled)) if self.config.rcnn_variant == "c4" else pooled

    def _scores_and_deltas(self, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the classes and of the background (R, L+1), and deltas for each class (R, L, 4), float32."""
        x = pooled.mean(dim=(2, 3)) if self.config.rcnn_variant == "c4" else self.hidden(pooled.flatten(1))
        return self.cls_score(x).float(), self.bbox_pred(x).unflatten(1, (-1, 4)).float()

    def _masks(self, pooled: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Scores of the mask of a class in each box (R, S, S), float32."""
        logits = self.mask_predictor(F.relu(self.mask_deconv(pooled)))
        return logits[torch.arange(len(classes), device=classes.device), classes].float()

    # Training

    def _train(
        self, features: torch.Tensor, sizes: list[tuple[int, int]], objects: list[Objects]
    ) -> MoCoDetectionOutput:
        proposals, losses = self.proposals(features, sizes, objects)
        sampled = [self._sample(*pair) for pair in zip(proposals, objects, strict=True)]
        pooled = self._pool(features, [some.boxes for some in sampled])
        scores, deltas = self._scores_and_deltas(pooled)
        classes = torch.cat([some.classes for some in sampled])
        foreground = classes < self.num_labels
        losses["loss_cls"] = F.cross_entropy(scores, classes)
        wanted = torch.cat([_box_targets(*pair, self.num_labels) for pair in zip(sampled, objects, strict=True)])
        moved = deltas[foreground, classes[foreground]]
        losses["loss_box_reg"] = F.l1_loss(moved, wanted, reduction="sum") / len(classes)
        if self.config.masks:
            logits = self._masks(pooled[foreground], classes[foreground])
            losses["loss_mask"] = self._mask_loss(logits, sampled, objects)
        # A new sum: the losses without gradient are for a log.
        loss = torch.stack([*losses.values()]).sum()
        return MoCoDetectionOutput(loss=loss, loss_dict={name: value.detach() for name, value in losses.items()})

    @torch.no_grad()
    def _sample(self, proposals: torch.Tensor, objects: Objects) -> _Sampled:
        """Boxes for the second losses: of the proposals, and of the objects themselves."""
        boxes = torch.cat([proposals, objects.boxes])
        object_of = torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
        classes = object_of + self.num_labels
        if len(objects.boxes):
            best, object_of = box_iou(objects.boxes, boxes).max(dim=0)
            classes = torch.where(best >= FOREGROUND_IOU, objects.classes[object_of], classes)
        foreground = classes < self.num_labels
        rows = torch.cat(sample(foreground, ~foreground, self.config.roi_samples, FOREGROUND_SHARE))
        return _Sampled(boxes[rows], object_of[rows], classes[rows])

    def _mask_loss(self, logits: torch.Tensor, sampled: list[_Sampled], objects: list[Objects]) -> torch.Tensor:
        if len(logits) == 0:
            return logits.sum()  # 0, of which every parameter has a gradient: other processes wait for it
        wanted = [
            _mask_targets(some, target, self.num_labels, logits.shape[-1])
            for some, target in zip(sampled, objects, strict=True)
        ]
        return F.binary_cross_entropy_with_logits(logits, torch.cat(wanted))

    # Inference

    @torch.no_grad()
    def _detect(self, features: torch.Tensor, sizes: list[tuple[int, int]]) -> MoCoDetectionOutput:
        proposals, _ = self.proposals(features, sizes)
        scores, deltas = self._scores_and_deltas(self._pool(features, proposals))
        counts = [len(boxes) for boxes in proposals]
        probabilities = scores.softmax(dim=1)[:, :-1].split(counts)
        boxes = decode_boxes(deltas, torch.cat(proposals), BOX_WEIGHTS).split(counts)
        found = [self._best(*of_image) for of_image in zip(probabilities, boxes, sizes, strict=True)]
        scores, labels, corners = _padded(found, sizes, self.config.max_detections)
        masks = self._masks_of(features, found, labels) if self.config.masks else None
        return MoCoDetectionOutput(scores=scores, labels=labels, pred_boxes=corners, pred_masks=masks)

    def _masks_of(self, features: torch.Tensor, found: list[Detections], labels: torch.Tensor) -> torch.Tensor:
        """Probabilities of the masks of all detections (N, M, S, S)."""
        classes = torch.cat([label for _, label, _ in found])
        masks = self._masks(self._pool(features, [boxes for _, _, boxes in found]), classes).sigmoid()
        padded = masks.new_zeros(*labels.shape, *masks.shape[1:])
        padded[labels >= 0] = masks
        return padded

    def _best(self, probabilities: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> Detections:
        """The detections of an image, from probabilities (B, L) and boxes (B, L, 4)."""
        rows, classes = (probabilities > self.config.score_threshold).nonzero(as_tuple=True)
        scores, boxes = probabilities[rows, classes], clip_boxes_to_image(boxes[rows, classes], size)
        kept = batched_nms(boxes, scores, classes, self.config.nms_threshold)[: self.config.max_detections]
        # Empty boxes last, as detectron2: until then they take the places of others.
        kept = kept[has_area(boxes[kept])]
        return scores[kept], classes[kept], boxes[kept]


def _sizes(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> list[tuple[int, int]]:
    """Height and width of each image without its padding."""
    if pixel_mask is None:
        return [(pixel_values.shape[2], pixel_values.shape[3])] * len(pixel_values)
    sides: Any = torch.stack([pixel_mask[:, :, 0].sum(dim=1), pixel_mask[:, 0].sum(dim=1)], dim=1).tolist()
    return [(int(height), int(width)) for height, width in sides]


def _box_targets(sampled: _Sampled, objects: Objects, background: int) -> torch.Tensor:
    foreground = sampled.classes < background
    boxes = objects.boxes[sampled.object_of[foreground]]
    return encode_boxes(boxes, sampled.boxes[foreground], BOX_WEIGHTS)


def _mask_targets(sampled: _Sampled, objects: Objects, background: int, side: int) -> torch.Tensor:
    """What the masks of an image's boxes are to be: 0 or 1 (B, S, S)."""
    foreground = sampled.classes < background
    boxes = sampled.boxes[foreground]
    if objects.masks is None or len(boxes) == 0:
        return boxes.new_zeros(0, side, side)
    regions = torch.cat([sampled.object_of[foreground, None].to(boxes.dtype), boxes], dim=1)
    masks = objects.masks[:, None].to(boxes.dtype)
    return (roi_align(masks, regions, side, 1.0, sampling_ratio=0, aligned=True)[:, 0] >= 0.5).to(boxes.dtype)


def _padded(
    found: list[Detections], sizes: list[tuple[int, int]], most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Detections of all images in tensors of one shape, which processes can gather."""
    n, like = len(found), found[0][0]
    scores, boxes = like.new_zeros(n, most), like.new_zeros(n, most, 4)
    labels = torch.full((n, most), -1, device=like.device)
    for i, ((score, label, box), (height, width)) in enumerate(zip(found, sizes, strict=True)):
        count = len(score)
        scores[i, :count], labels[i, :count] = score, label
        boxes[i, :count] = box / box.new_tensor([width, height, width, height])
    return scores, labels, boxes
