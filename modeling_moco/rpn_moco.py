"""Where objects may be: anchors, the region proposal network with its two losses, and the arithmetic of boxes.

As in detectron2, with which the papers detect objects (https://github.com/facebookresearch/detectron2, 02b5c4e).

Boxes are corners `x0 y0 x1 y1` in pixels of the padded batch, float32. Shapes: `N` images, `A` anchors of a place, `H`, `W`
places of the feature map, `B` boxes, `G` objects of an image.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_iou, clip_boxes_to_image, nms

from .configuration_moco import MoCoRCNNConfig

FOREGROUND_IOU, BACKGROUND_IOU = 0.7, 0.3  # of anchors with objects; those between count neither way
FOREGROUND_SHARE = 0.5  # of the sampled anchors, at most
NMS_IOU = 0.7  # of proposals
MOST_GROWTH = math.log(1000 / 16)  # of a box by its deltas, as a logarithm
RPN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the deltas x, y, width, height


@dataclass
class Objects:
    """The objects of an image: boxes (G, 4), classes (G,), and masks (G, height, width) where these are predicted too."""

    boxes: torch.Tensor
    classes: torch.Tensor
    masks: torch.Tensor | None = None


def encode_boxes(boxes: torch.Tensor, origins: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Deltas (B, 4) that move `origins` (B, 4) to `boxes` (B, 4): centre by the size, size by its logarithm."""
    centre, size = _centre_and_size(boxes)
    origin, origin_size = _centre_and_size(origins)
    factors = boxes.new_tensor(weights)
    return torch.cat(
        [factors[:2] * (centre - origin) / origin_size, factors[2:] * torch.log(size / origin_size)], dim=1
    )


def decode_boxes(deltas: torch.Tensor, origins: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Boxes (B, ..., 4) to which deltas (B, ..., 4) move `origins` (B, 4). None grows by more than 1000/16."""
    deltas = deltas / deltas.new_tensor(weights)
    between = (slice(None), *(None,) * (deltas.dim() - 2))
    origin, origin_size = (x[between] for x in _centre_and_size(origins))
    centre = deltas[..., :2] * origin_size + origin
    size = deltas[..., 2:].clamp(max=MOST_GROWTH).exp() * origin_size
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def _centre_and_size(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes[:, :2] + 0.5 * size, size


def has_area(boxes: torch.Tensor) -> torch.Tensor:
    """Which boxes (B, 4) are not empty: (B,)."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def sample(
    positive: torch.Tensor, negative: torch.Tensor, count: int, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows among the positive and the negative ones, `count` in all where there are as many.

    Args:
        positive, negative: booleans (B,).
        share: of the positive ones in `count`, at most; negative ones take the places of those that are missing.

    Returns:
        the chosen positive and negative rows, as numbers.
    """
    chosen = _some(positive, int(count * share))
    return chosen, _some(negative, count - len(chosen))


def _some(rows: torch.Tensor, most: int) -> torch.Tensor:
    numbers = rows.nonzero()[:, 0]
    # All are shuffled, though few are wanted: these are detectron2's random numbers.
    return numbers[torch.randperm(len(numbers), device=numbers.device)[:most]]


def make_anchors(config: MoCoRCNNConfig, height: int, width: int, stride: int, device: torch.device) -> torch.Tensor:
    """Anchors (H·W·A, 4) of a map: place by place, at each by size and then by ratio.

    They have their centre on the upper left corner of the place, and their sides are not rounded.
    """
    sides = []
    for size in config.anchor_sizes:
        for ratio in config.anchor_ratios:
            width_of = math.sqrt(size**2 / ratio)
            sides.append([width_of, ratio * width_of])
    half = torch.tensor(sides, device=device) / 2  # (A, 2)
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32) * stride,
        torch.arange(width, device=device, dtype=torch.float32) * stride,
        indexing="ij",
    )
    centres = torch.stack([x, y], dim=-1).view(-1, 1, 2)
    return torch.cat([centres - half, centres + half], dim=-1).view(-1, 4)


class RegionProposals(nn.Module):
    """A score and four deltas for every anchor, the proposals that follow, and the losses in training.

    Args:
        channels: of the feature map; the hidden layer is as wide.
        stride: pixels between two places of the map.
    """

    def __init__(self, config: MoCoRCNNConfig, channels: int, stride: int):
        super().__init__()
        self.config, self.stride = config, stride
        anchors = len(config.anchor_sizes) * len(config.anchor_ratios)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.objectness = nn.Conv2d(channels, anchors, kernel_size=1)
        self.deltas = nn.Conv2d(channels, 4 * anchors, kernel_size=1)

    def forward(
        self, features: torch.Tensor, sizes: list[tuple[int, int]], objects: list[Objects] | None = None
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Proposals (B, 4) of each image, the best first, and with `objects` the losses by name.

        Args:
            features: maps (N, channels, H, W).
            sizes: height and width of each image, in pixels, without padding.
        """
        anchors = make_anchors(self.config, features.shape[-2], features.shape[-1], self.stride, features.device)
        hidden = F.relu(self.conv(features))
        logits = self.objectness(hidden).permute(0, 2, 3, 1).flatten(1).float()  # (N, H·W·A)
        deltas = self.deltas(hidden).permute(0, 2, 3, 1).reshape(*logits.shape, 4).float()  # (N, H·W·A, 4)
        losses = {} if objects is None else self._losses(logits, deltas, anchors, objects)
        return self._propose(logits.detach(), deltas.detach(), anchors, sizes), losses

    def _propose(
        self, logits: torch.Tensor, deltas: torch.Tensor, anchors: torch.Tensor, sizes: list[tuple[int, int]]
    ) -> list[torch.Tensor]:
        config = self.config
        before = config.rpn_pre_nms_train if self.training else config.rpn_pre_nms_test
        after = config.rpn_post_nms_train if self.training else config.rpn_post_nms_test
        scores, best = logits.topk(min(before, logits.shape[1]), dim=1)
        proposals = []
        for score, some, of_image, size in zip(scores, best, deltas, sizes, strict=True):
            boxes = clip_boxes_to_image(decode_boxes(of_image[some], anchors[some], RPN_WEIGHTS), size)
            kept = has_area(boxes)
            boxes, score = boxes[kept], score[kept]
            proposals.append(boxes[nms(boxes, score, NMS_IOU)[:after]])
        return proposals

    def _losses(
        self, logits: torch.Tensor, deltas: torch.Tensor, anchors: torch.Tensor, objects: list[Objects]
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy of the sampled scores and L1 of the deltas of positive ones; sums divided by `rpn_samples` N."""
        objectness, distance = [], []
        for score, delta, target in zip(logits, deltas, objects, strict=True):
            object_of, positive, negative = match_anchors(anchors, target.boxes)
            positive, negative = sample(positive, negative, self.config.rpn_samples, FOREGROUND_SHARE)
            wanted = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]).to(score.dtype)
            chosen = score[torch.cat([positive, negative])]
            objectness.append(F.binary_cross_entropy_with_logits(chosen, wanted, reduction="sum"))
            boxes = target.boxes[object_of[positive]]
            distance.append(
                F.l1_loss(delta[positive], encode_boxes(boxes, anchors[positive], RPN_WEIGHTS), reduction="sum")
            )
        count = self.config.rpn_samples * len(objects)
        return {
            "loss_rpn_cls": torch.stack(objectness).sum() / count,
            "loss_rpn_loc": torch.stack(distance).sum() / count,
        }


def match_anchors(anchors: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The object with which each anchor (B, 4) overlaps most, and which anchors are positive and negative: (B,) each.

    Positive are those with an intersection over union of at least 0.7, and for each object (G, 4) the best ones, however bad
    they are. Negative are those below 0.3.
    """
    if len(boxes) == 0:
        none = torch.zeros(len(anchors), dtype=torch.long, device=anchors.device)
        return none, none > 0, none == 0
    iou = box_iou(boxes, anchors)  # (G, B)
    best, object_of = iou.max(dim=0)
    of_an_object = (iou == iou.max(dim=1, keepdim=True).values).any(dim=0)
    return object_of, (best >= FOREGROUND_IOU) | of_an_object, (best < BACKGROUND_IOU) & ~of_an_object
