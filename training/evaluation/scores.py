"""What a classifier's answers are worth: accuracies in per cent, per class, and which classes it confuses.

Shapes: `n` images, `C` classes.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..engine.results import Result, interval


@dataclass(frozen=True)
class Scores:
    """Accuracy of a classifier.

    Args:
        top1, top5: per cent of `n` images whose class is first, or among the first five.
        confusion: images of class i that are called j (C, C).
    """

    top1: float
    top5: float
    confusion: torch.Tensor

    @property
    def n(self) -> int:
        return int(self.confusion.sum())

    @property
    def per_class(self) -> list[float | None]:
        """Top-1 accuracy of every class in per cent; None for one without images."""
        counts = self.confusion.sum(dim=1).tolist()
        right = self.confusion.diagonal().tolist()
        return [100 * hits / count if count else None for hits, count in zip(right, counts, strict=True)]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the top-1 accuracy."""
        return interval(self.top1, self.n)

    def results(self, protocol: str, **kwargs: Any) -> list[Result]:
        """Top-1 and top-5 as results of that protocol."""
        return [Result(protocol, name, getattr(self, name), self.n, **kwargs) for name in ("top1", "top5")]


def score(logits: torch.Tensor, labels: torch.Tensor) -> Scores:
    """Scores of class logits (n, C), or of anything in the same order, against labels (n,)."""
    hits = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).cpu()
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(dim=1)
    confusion = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
    return Scores(
        100 * hits[:, 0].double().mean().item(), 100 * hits.any(dim=1).double().mean().item(), confusion.cpu()
    )
