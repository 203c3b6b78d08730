"""Detect the objects of a split, shared over the processes, and measure how well they are found."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from modeling_moco import MoCoDetectionImageProcessor, MoCoForObjectDetection
from modeling_moco.distributed_moco import rank, world_size

from ..engine.preemption import outlive_signals
from .average_precision import AveragePrecision, Found, coco_average_precision, voc_average_precision
from .dataset.batches import DetectionCollator
from .dataset.masks import encode
from .dataset.opening import DetectionSplit
from .dataset.views import DetectionEvaluationImages

Metric = Literal["voc07", "voc12", "coco"]
METRICS: dict[str, str] = {
    "voc07": "VOC AP of ten overlaps, 11 points (2007)",
    "voc12": "VOC AP of ten overlaps, area under the curve (2012)",
    "coco": "COCO AP",
}


@torch.no_grad()
def detect(
    model: MoCoForObjectDetection, split: DetectionSplit, processor: MoCoDetectionImageProcessor, workers: int = 0
) -> list[Found]:
    """What a model finds in each image of a split, the same on all processes. Each image is seen once, by itself.

    The model is left in the mode it was in.
    """
    training = model.training
    model.eval()
    images = DetectionEvaluationImages(split, processor.size["shortest_edge"], processor.size["longest_edge"])
    loader = DataLoader(
        images,
        sampler=range(rank(), len(split), world_size()),
        collate_fn=DetectionCollator(processor.image_mean, processor.image_std),
        num_workers=workers,
        worker_init_fn=outlive_signals,
    )
    found = {}
    for batch in tqdm(loader, "detecting", leave=False, disable=rank() > 0 or None):
        place = int(batch["image_id"])
        outputs = model(batch["pixel_values"].to(model.device), batch["pixel_mask"].to(model.device))
        found[place] = _of_image(outputs, processor, *split.sizes[place].tolist())
    model.train(training)
    return _in_order(found, len(split))


def _of_image(outputs: Any, processor: Any, width: int, height: int) -> Found:
    masks = None
    if outputs.pred_masks is not None:
        (best,) = processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=[(height, width)])
        masks = encode(best["masks"].cpu().numpy())
    else:
        (best,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(height, width)])
    boxes, scores, labels = (best[name].cpu().numpy() for name in ("boxes", "scores", "labels"))
    return Found(boxes.astype(np.float64), scores.astype(np.float64), labels, masks)


def _in_order(found: dict[int, Found], count: int) -> list[Found]:
    shares: list[Any] = [found]
    if world_size() > 1:
        shares = [None] * world_size()
        dist.all_gather_object(shares, found)
    together = {place: one for share in shares for place, one in share.items()}
    assert len(together) == count
    return [together[place] for place in range(count)]


def measure(
    split: DetectionSplit, found: list[Found], class_names: list[str], metric: Metric, masks: bool = False
) -> Iterator[tuple[str, AveragePrecision]]:
    """The APs of detections by a metric, in [0, 1]: of boxes, and for COCO with `masks` of masks too. Each with its kind."""
    truth = [split.objects[place] for place in range(len(split))]
    if metric == "coco":
        sizes = [tuple(size) for size in split.sizes.tolist()]
        yield "box", coco_average_precision(truth, found, class_names, sizes)
        if masks:
            yield "mask", coco_average_precision(truth, found, class_names, sizes, masks=True)
        return
    yield "box", voc_average_precision(truth, found, class_names, eleven_points=metric == "voc07")
