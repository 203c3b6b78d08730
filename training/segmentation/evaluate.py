"""Segment the images of a split at their own size, shared over the processes, and count how well."""

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from modeling_moco import MoCoForSemanticSegmentation, MoCoSegmentationImageProcessor
from modeling_moco.distributed_moco import rank, world_size

from ..engine.preemption import outlive_signals
from .dataset.opening import SegmentationSplit
from .dataset.views import SegmentationEvaluationImages
from .mean_iou import confusion


@torch.no_grad()
def evaluate(
    model: MoCoForSemanticSegmentation,
    split: SegmentationSplit,
    processor: MoCoSegmentationImageProcessor,
    workers: int = 0,
) -> torch.Tensor:
    """The confusion (L, L) of all images of a split, int64 on the CPU, the same on all processes.

    Each image is seen once, by itself. The model is left in the mode it was in.
    """
    training = model.training
    model.eval()
    loader = DataLoader(
        SegmentationEvaluationImages(split),
        batch_size=None,
        sampler=range(rank(), len(split), world_size()),
        num_workers=workers,
        worker_init_fn=outlive_signals,
    )
    classes = model.num_labels
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=model.device)
    for image in tqdm(loader, "segmenting", leave=False, disable=rank() > 0 or None):
        counts += confusion(image["labels"].to(model.device), segment(model, image["pixel_values"], processor), classes)
    if world_size() > 1:
        dist.all_reduce(counts)
    model.train(training)
    return counts.cpu()


@torch.no_grad()
def segment(
    model: MoCoForSemanticSegmentation, pixels: torch.Tensor, processor: MoCoSegmentationImageProcessor
) -> torch.Tensor:
    """The class of each pixel (H, W) of an image, uint8 (3, H, W), as a pipeline finds it."""
    inputs = processor(pixels, return_tensors="pt").to(model.device)
    (classes,) = processor.post_process_semantic_segmentation(model(**inputs), [pixels.shape[1:]])
    return classes
