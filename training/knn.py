"""Weighted kNN on frozen features (arXiv:1805.01978, section 3.4), the monitor of a pretraining run.

Shapes: `B` bank, `Q` queries, `D` feature width.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from modeling_moco import MoCoModel
from modeling_moco.distributed_moco import gather, local_slice, world_size

from .checkpoints import outlive_sigterm
from .images import MapImages


@torch.no_grad()
def extract_features(
    model: MoCoModel, images: MapImages, *, batch_size: int = 256, num_workers: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backbone features of all images, in their order on every process; the processes share the work.

    The model runs in evaluation mode and is left in the mode it was in.

    Returns:
        unit-length features, float32 (len(images), D), and labels (len(images),), both on the model's device.
    """
    ranks = world_size()
    share = -(-len(images) // ranks)  # the last process repeats the last image to keep the shares equal
    mine = [min(i, len(images) - 1) for i in range(ranks * share)][local_slice(share)]
    loader = DataLoader(
        Subset(images, mine), batch_size=batch_size, num_workers=num_workers, worker_init_fn=outlive_sigterm
    )
    if ranks > 1:  # every rank has seen other images: evaluate the model that rank 0 saves
        for buffer in model.encoder_q.buffers():
            dist.broadcast(buffer, src=0)
    training = model.training
    model.eval()
    features, labels = [], []
    for batch in tqdm(loader, desc="features", leave=False, disable=len(loader) < 20, dynamic_ncols=True):
        pixels = batch["pixel_values"].to(model.device)
        features.append(F.normalize(model.features(pixels).pooler_output.float(), dim=1))
        labels.append(batch["labels"].to(model.device))
    model.train(training)
    return gather(torch.cat(features))[: len(images)], gather(torch.cat(labels))[: len(images)]


@torch.no_grad()
def nearest(
    queries: torch.Tensor, bank: torch.Tensor, k: int, chunk: int = 1024
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cosine similarity and bank index of the k nearest neighbours, in no order, for `chunk` queries at a time.

    Raises:
        ValueError: k is larger than the bank.
    """
    if k > len(bank):
        raise ValueError(f"k ({k}) is larger than the bank ({len(bank)} images): lower it")
    for rows in queries.split(chunk):
        yield torch.topk(rows @ bank.T, k, dim=1, sorted=False)


@torch.no_grad()
def knn_predict(
    queries: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    *,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.07,
) -> torch.Tensor:
    """Class of each query (Q,): the k nearest neighbours vote with weight exp(similarity / temperature).

    Args:
        queries, bank: unit-length features (Q, D), (B, D).
        bank_labels: classes from 0 to num_classes - 1 (B,).
    """
    predictions = []
    for similarity, index in nearest(queries, bank, k):
        votes = similarity.new_zeros(len(index), num_classes)
        votes.scatter_add_(1, bank_labels[index], (similarity / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def evaluate_knn(
    model: MoCoModel,
    bank: MapImages,
    queries: MapImages,
    *,
    k: int = 200,
    temperature: float = 0.07,
    batch_size: int = 256,
    num_workers: int = 0,
) -> dict[str, float]:
    """Share of the queries that kNN on backbone features classifies correctly, in per cent: `{"knn_top1": ...}`."""
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    bank_features, bank_labels = extract_features(model, bank, **loading)
    features, labels = extract_features(model, queries, **loading)
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    predicted = knn_predict(features, bank_features, bank_labels, num_classes=num_classes, k=k, temperature=temperature)
    return {"knn_top1": 100 * (predicted == labels).float().mean().item()}
