"""The monitor of a pretraining run: what its features are worth between two epochs, and what is wrong with it."""

import logging
from typing import Any

import torch

from modeling_moco import MoCoModel
from modeling_moco.distributed_moco import rank, world_size

from .data.images import MapImages
from .evaluation.features import Batch, extract_features
from .evaluation.knn import KNNArguments, knn_accuracy
from .health import Views, diagnose, leak, rankme

logger = logging.getLogger(__name__)

RANKME_IMAGES = 25_600  # as in arXiv:2210.02885
KEPT_BYTES = 2**29  # of images of a split that the device keeps from one evaluation to the next


class Monitor:
    """Looks at a model that is being trained.

    Args:
        settings: how neighbours vote, and how images are loaded.
        bank: images in the evaluation view whose features are looked at; None for a stream.
        queries: the same of another split; with labels in both there is kNN.
    """

    def __init__(
        self, model: MoCoModel, settings: KNNArguments, bank: MapImages | None = None, queries: MapImages | None = None
    ):
        self.model = model
        self.settings = settings
        self.bank = bank
        self.queries = queries
        self._reported: set[str] = set()
        self._batches: dict[str, list[Batch]] = {}

    def look_at_features(self) -> dict[str, float]:
        """RankMe of the bank, and with queries the kNN accuracy in per cent for every k."""
        if self.bank is None:
            return {}
        settings, device = self.settings, self.model.device
        loading: dict[str, Any] = {
            "feature": settings.knn_features,
            "batch_size": settings.per_device_eval_batch_size,
            "num_workers": settings.dataloader_num_workers,
        }
        kept = self._kept(self.bank, "bank")
        bank, bank_labels = extract_features(self.model, self.bank, gather=False, kept=kept, **loading)
        # Evenly spaced, because folders are sorted by class; the same ones for any number of processes.
        every = max(1, len(self.bank) // RANKME_IMAGES)
        chosen = torch.arange(rank(), len(self.bank), world_size()) % every == 0
        metrics = {"rankme": rankme(bank[chosen], device)}
        if self.queries is not None:
            kept = self._kept(self.queries, "queries")
            queries, labels = extract_features(self.model, self.queries, kept=kept, **loading)
            voting: dict[str, Any] = {
                "knn_k": settings.knn_k,
                "temperature": settings.knn_temperature,
                "device": device,
            }
            metrics["knn_k"] = settings.knn_k[0]  # a continued run may have another
            for k, top1 in knn_accuracy(queries, labels, bank, bank_labels, **voting).items():
                metrics["knn_top1" if k == settings.knn_k[0] else f"knn_top1_k{k}"] = top1
        return metrics

    def _kept(self, images: MapImages, name: str) -> list[Batch] | None:
        """The batches that the device keeps of small images; None for larger ones, which are decoded every time."""
        size = images.transform.size
        small = len(images) * 3 * size * size <= KEPT_BYTES
        return self._batches.setdefault(name, []) if small else None

    def look_for_leak(self, views: Views) -> dict[str, float]:
        """Contrast accuracy in per cent as trained and with regrouped keys, and whether the difference is a leak (0 or 1)."""
        trained, regrouped, leaks = leak(self.model, views)
        return {"contrast_top1": trained, "contrast_top1_shuffled": regrouped, "leaks": float(leaks)}

    def report(self, metrics: dict[str, float], step: int) -> None:
        """Log a warning for every problem that these metrics show for the first time."""
        if step == 0:  # a randomly initialised encoder can look collapsed
            return
        for problem, sentence in diagnose(metrics, self.model.config).items():
            if problem not in self._reported and rank() == 0:
                logger.warning("step %d: %s", step, sentence)
            self._reported.add(problem)
