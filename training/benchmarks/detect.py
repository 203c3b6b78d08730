"""A training step of a detector, and the convolutions that no step of it can leave out.

Both have the same weights and the same images, of random pixels with eight objects each:

- convolutions only is the limit: forward and backward of the ResNet up to the map that boxes are pooled from and, for c4, of
  its last stage on as many random maps as boxes are sampled.
- this project is a whole step, with proposals, targets, five losses and SGD, as `scripts/detect.py` makes it.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from modeling_moco import MoCoForObjectDetection, MoCoRCNNConfig
from modeling_moco.configuration_moco import VARIANTS

from .measure import Benchmark, in_own_process, peak_memory, time_rounds

OBJECTS = 8  # of an image
LIMIT, OURS = "convolutions only", "this project"
PUBLISHED = (
    "detectron2 publishes .537 s an iteration of 16 images on 8 V100 for this model on VOC, with frozen BatchNorm and sides of "
    "480 to 800 px (its model zoo): 3.7 images/s a GPU"
)
Step = Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architecture", default="resnet50", help="Name of a timm ResNet.")
    parser.add_argument("--rcnn_variant", choices=VARIANTS, default="c4", help="Detector: c4, or dilated_c5.")
    parser.add_argument("--masks", action="store_true", help="Predict masks too.")
    parser.add_argument("--num_labels", type=int, default=20, help="Classes.")
    parser.add_argument("--height", type=int, default=480, help="Pixels of the images.")
    parser.add_argument("--width", type=int, default=640, help="Pixels of the images.")
    parser.add_argument("--batch", type=int, default=1, help="Images of a step.")
    parser.add_argument("--roi_samples", type=int, default=512, help="Boxes of an image that are learned from.")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="Precision of the convolutions.")
    parser.add_argument("--rounds", type=int, default=5, help="Number of measured steps of each variant.")


def run(args: argparse.Namespace) -> list[Benchmark]:
    return [measure(args, partial(in_own_process, memory, args, torch.get_num_threads()))]


def measure(args: argparse.Namespace, peak: Callable[[str], dict[str, float]]) -> Benchmark:
    """
    Args:
        peak: the memory of a variant, measured where nothing else is.
    """
    steps = build(args)
    seconds = time_rounds(steps, args.rounds)
    columns: dict[str, dict[str, float]] = {}
    for name in steps:
        for column, value in peak(name).items():
            columns.setdefault(column, {})[name] = value
    kind = f"{'Mask' if args.masks else 'Faster'} R-CNN {args.rcnn_variant} of a {args.architecture}"
    title = (
        f"a training step, {kind}, {args.batch} x {args.height} x {args.width} px, {args.roi_samples} boxes an image, "
        f"{args.num_labels} classes, {args.precision}"
    )
    return Benchmark(title, seconds, (LIMIT,), args.batch, columns, [PUBLISHED])


def memory(args: argparse.Namespace, threads: int, name: str) -> dict[str, float]:
    """Gigabytes of a variant at its peak."""
    torch.set_num_threads(threads)
    return peak_memory(lambda: build(args)[name])


def build(args: argparse.Namespace) -> dict[str, Step]:
    """A step of each variant."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = MoCoRCNNConfig(
        architecture=args.architecture,
        rcnn_variant=args.rcnn_variant,
        masks=args.masks,
        num_labels=args.num_labels,
        roi_samples=args.roi_samples,
        detector_norm="plain",
    )
    model = MoCoForObjectDetection(config).to(device, memory_format=torch.channels_last).train()
    images = torch.randint(256, (args.batch, 3, args.height, args.width), dtype=torch.uint8, device=device)
    return {LIMIT: _convolutions(model, images, args), OURS: _step(model, images, args)}


def _convolutions(model: MoCoForObjectDetection, images: torch.Tensor, args: argparse.Namespace) -> Step:
    encoder, config = model.encoder_q, model.config
    boxes = args.batch * args.roi_samples
    pooled = torch.randn(boxes, encoder.feature_info[-2]["num_chs"], config.roi_side, config.roi_side)
    pooled = pooled.to(images.device, memory_format=torch.channels_last).requires_grad_()

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            features, _ = model._features(model.normalize(images), hidden=False)
            total = features.float().mean()
            if config.rcnn_variant == "c4":
                total = total + encoder.layer4(pooled).float().mean()
        total.backward()
        model.zero_grad()

    return step


def _step(model: MoCoForObjectDetection, images: torch.Tensor, args: argparse.Namespace) -> Step:
    labels = [_objects(args, images.device) for _ in images]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)  # the same step again

    def step() -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = model(images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _objects(args: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    centre, size = torch.rand(OBJECTS, 2) * 0.5 + 0.25, torch.rand(OBJECTS, 2) * 0.3 + 0.1
    label = {"boxes": torch.cat([centre, size], dim=1), "class_labels": torch.randint(args.num_labels, (OBJECTS,))}
    if args.masks:
        label["masks"] = torch.rand(OBJECTS, args.height, args.width) < 0.5
    return {name: tensor.to(device) for name, tensor in label.items()}
