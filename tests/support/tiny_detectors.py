"""Tiny detectors, images with coloured rectangles, and naive loops over boxes in plain Python."""

import math

import torch

from modeling_moco import MoCoForObjectDetection, MoCoRCNNConfig

CLASSES = 3


def rcnn_config(**kwargs) -> MoCoRCNNConfig:
    defaults = {
        "architecture": "test_resnet",
        "num_labels": CLASSES,
        "anchor_sizes": (16, 32, 64),
        "rpn_post_nms_train": 60,
        "rpn_post_nms_test": 60,
        "roi_samples": 32,
        "roi_size": 2 if kwargs.get("rcnn_variant") == "dilated_c5" else 4,
        "max_detections": 10,
    }
    return MoCoRCNNConfig(**{**defaults, **kwargs})


def detector(**kwargs) -> MoCoForObjectDetection:
    torch.manual_seed(0)
    return MoCoForObjectDetection(rcnn_config(**kwargs))


def batch(masks=False, sizes=((64, 96), (80, 64)), objects=(2, 1)):
    """Images padded to the largest, their mask, and labels."""
    generator = torch.Generator().manual_seed(1)
    height, width = (max(side) for side in zip(*sizes, strict=True))
    pixels, mask = torch.zeros(len(sizes), 3, height, width), torch.zeros(len(sizes), height, width, dtype=torch.long)
    labels = []
    for i, ((h, w), count) in enumerate(zip(sizes, objects, strict=True)):
        pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[i, :h, :w] = 1
        boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.3
        label = {"class_labels": torch.arange(count) % CLASSES, "boxes": boxes}
        if masks:
            label["masks"] = torch.rand(count, h, w, generator=generator) < 0.7
        labels.append(label)
    return {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}


def corners(label, size) -> list[list[float]]:
    """Boxes of a label in pixels."""
    height, width = size
    return [
        [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
        for x, y, w, h in label["boxes"].tolist()
    ]


def iou(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def deltas(box, origin, weights) -> list[float]:
    """From `origin` to `box`."""
    (x, y, w, h), (x0, y0, w0, h0) = (
        ((c[0] + c[2]) / 2, (c[1] + c[3]) / 2, c[2] - c[0], c[3] - c[1]) for c in (box, origin)
    )
    moves = [(x - x0) / w0, (y - y0) / h0, math.log(w / w0), math.log(h / h0)]
    return [weight * move for weight, move in zip(weights, moves, strict=True)]


def absolute(a, b) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))
