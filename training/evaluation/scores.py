"""What a classifier's answers are worth: accuracies in per cent, per class, and which classes it confuses.

Memory grows with images and with classes, never with their product or with pairs of classes. Shapes: `n` images, `C` classes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.results import Result, interval

ANSWERS = 5  # classes that count as an answer in top-5
LOGITS_AT_ONCE = 2**25  # 128 MiB in float32


@dataclass(frozen=True)
class Scores:
    """Accuracy of a classifier.

    Args:
        top1: per cent of `n` images whose class is first.
        top5: per cent whose class is among the first five; None with five classes or fewer, where every answer is.
        confusion: class, what it is called, and how many images, for all pairs that occur, in order: int64 (pairs, 3).
        classes: C.
    """

    top1: float
    top5: float | None
    confusion: torch.Tensor
    classes: int

    @property
    def n(self) -> int:
        return int(self.confusion[:, 2].sum())

    @property
    def per_class(self) -> list[float | None]:
        """Top-1 accuracy of every class in per cent; None for one without images."""
        rows, columns, images = self.confusion.unbind(dim=1)
        counts = images.new_zeros(self.classes).index_add(0, rows, images).tolist()
        right = images.new_zeros(self.classes).index_add(0, rows, images * (rows == columns)).tolist()
        return [100 * hits / count if count else None for hits, count in zip(right, counts, strict=True)]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the top-1 accuracy."""
        return interval(self.top1, self.n)

    @property
    def accuracies(self) -> dict[str, float]:
        """Per cent by metric: "top1" and, where it says something, "top5"."""
        return {"top1": self.top1} | ({} if self.top5 is None else {"top5": self.top5})

    def results(self, protocol: str, **kwargs: Any) -> list[Result]:
        """The accuracies as results of that protocol."""
        return [Result(protocol, name, value, self.n, **kwargs) for name, value in self.accuracies.items()]

    def __str__(self) -> str:
        low, high = self.interval
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.1f} %"
        return f"top-1 {self.top1:.1f} % ({low:.1f} to {high:.1f}){top5}, {self.n:,} images"


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The classes that an image is most likely of, at most five (n, 5), from logits or anything in the same order (n, C)."""
    return logits.topk(min(ANSWERS, logits.shape[1]), dim=1).indices


def score(answers: torch.Tensor, labels: torch.Tensor, classes: int) -> Scores:
    """Scores of the likeliest classes of every image (n, at most 5) against labels (n,), which are below `classes`."""
    answers, labels = answers.cpu(), labels.cpu()
    hits = answers == labels[:, None]
    pairs, images = (labels * classes + answers[:, 0]).unique(return_counts=True)
    confusion = torch.stack([pairs // classes, pairs % classes, images], dim=1)
    top1, any_of = (100 * part.double().mean().item() for part in (hits[:, 0], hits.any(dim=1)))
    return Scores(top1, any_of if classes > ANSWERS else None, confusion, classes)


def score_parts(parts: Iterable[tuple[torch.Tensor, torch.Tensor]], classes: int) -> Scores:
    """Scores of logits (n, C) against labels (n,) that come in parts, one of which is kept at a time."""
    answers, labels = zip(*((likeliest(logits).cpu(), truth.cpu()) for logits, truth in parts), strict=True)
    return score(torch.cat(answers), torch.cat(labels), classes)


def in_parts(features: torch.Tensor, labels: torch.Tensor, classes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of features (n, D) and labels (n,), so many at once that their logits for that many classes stay small."""
    rows = max(1, LOGITS_AT_ONCE // classes)
    return zip(features.split(rows), labels.split(rows), strict=True)
