"""What a linear probe found, and how it chooses between settings: on a held-out part of the train split."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..engine.results import Result
from .scores import Scores

HELD_OUT = 10  # one of this many training images is held out


@dataclass(frozen=True)
class HeadReport:
    """Top-1 accuracies of one classifier in per cent.

    Args:
        setting: what it was trained with.
        held_out: of the held-out images, which choose; None where nothing is to be chosen.
        last: of the evaluated images, after training.
        best, best_epoch: of the evaluated images after the epoch at which that was highest; None without epochs.
    """

    setting: str
    held_out: float | None
    last: float
    best: float | None = None
    best_epoch: float | None = None


@dataclass(frozen=True)
class Probe:
    """What one probe found.

    Args:
        name: "official", "cached SGD" or "cached L-BFGS".
        protocol: what was done, for results.
        trained_on: images that `final` was trained on. Where they are all of the train split and several settings were
            compared, `final` was trained again, the held-out images included.
        final: the classifier that the result is about.
        scores: its scores after training, on the evaluated images.
        heads: all that were compared.
    """

    name: str
    protocol: str
    trained_on: int
    final: HeadReport
    scores: Scores
    heads: list[HeadReport]

    def results(self, seed: int) -> list[Result]:
        """Top-1 and top-5 after training, and the best epoch's top-1, which the official code reports."""
        settings: dict[str, Any] = {"chosen": self.final.setting, "trained_on": self.trained_on}
        results = self.scores.results(self.protocol, settings=settings, seed=seed)
        if self.final.best is not None:
            settings = settings | {"epoch": self.final.best_epoch}
            protocol = f"{self.protocol}, best epoch on the evaluated images"
            results.append(Result(protocol, "top1", self.final.best, self.scores.n, settings=settings, seed=seed))
        return results

    def about(self, class_names: list[str]) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "name": self.name,
            "protocol": self.protocol,
            **self.scores.accuracies,
            "interval": self.scores.interval,
            "n": self.scores.n,
            "trained_on": self.trained_on,
            "final": asdict(self.final),
            "heads": [asdict(head) for head in self.heads],
            "per_class": [
                {"class": name, "top1": top1} for name, top1 in zip(class_names, self.scores.per_class, strict=True)
            ],
            "confusion": self.scores.confusion.tolist(),
        }

    def table(self) -> str:
        """Lines of text: every head, and the one that the result is about with its 95 % interval."""
        low, high = self.scores.interval
        rows: list[tuple[str, ...]] = [("", "held out", "last", "best", "at epoch", "95 % of last")]
        compared = self.heads if len(self.heads) > 1 else []
        rows += [_cells(head) for head in compared]
        rows.append((*_cells(self.final, chosen=bool(compared))[:-1], f"{low:.2f} to {high:.2f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.protocol, *lines])


def _cells(head: HeadReport, chosen: bool = False) -> tuple[str, ...]:
    numbers = ("" if value is None else f"{value:.2f} %" for value in (head.held_out, head.last, head.best))
    epoch = "" if head.best_epoch is None else f"{head.best_epoch:g}"
    return (f"chosen: {head.setting}" if chosen else head.setting, *numbers, epoch, "")


def choose(heads: list[HeadReport]) -> int:
    """Index of the head that is best on the held-out images, the middle one of equals.

    Where few images are held out many are equal, and the outer ones may be so by luck alone: with an L2 penalty of 1e5 the
    intercepts decide, which is right as long as all classes have the same number of images.
    """
    return middle_of_best([head.held_out or 0.0 for head in heads])


def middle_of_best(values: list[float]) -> int:
    """Index of the highest value; of equals the middle one, the lower of two."""
    equals = [i for i, value in enumerate(values) if value == max(values)]
    return equals[(len(equals) - 1) // 2]


def hold_out(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the images to train on and of those to choose by: a tenth of every class, at least one of two or more.

    Raises:
        ValueError: no class has two images, or all are of one class.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # class by class, shuffled within
    counts = labels.bincount()
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]  # within its class
    share = torch.where(counts > 1, (counts // HELD_OUT).clamp(min=1), 0)
    held = place < share[labels[order]]
    if not held.any() or counts.count_nonzero() < 2:
        raise ValueError(
            f"the train split ({len(labels)} images of {counts.count_nonzero()} classes) has no two classes or no class of "
            "two images, so that there is nothing to choose by: use more images, or in official mode a single --learning_rate"
        )
    return order[~held].sort().values, order[held].sort().values
