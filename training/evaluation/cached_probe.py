"""The linear probe on features that were extracted once: SGD at many learning rates, and L-BFGS over regularisation strengths.

The classifiers see one fixed view of every image, so that their accuracies are other protocols' than the official one's.
Shapes: `n` images, `D` feature width, `C` classes, `H` heads.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from modeling_moco import MoCoForImageClassification
from modeling_moco.distributed_moco import rank

from ..data.images import MapImages
from ..data.sources import EvaluationDataArguments, ImageSplits
from ..optimization.schedules import epoch_schedule
from .features import cached_features
from .probe_arguments import LinearProbeArguments
from .probe_results import HeadReport, Probe, choose, hold_out
from .scores import Scores, in_parts, score_parts

STRENGTHS = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]  # C of L-BFGS
MAX_ITER, TOLERANCE = 1_000, 1e-5  # of L-BFGS; the tolerance is the largest entry of the mean loss's gradient


class Heads:
    """Linear classifiers side by side in one matrix, all from the same start: std 0.01, no bias (main_lincls.py)."""

    def __init__(self, width: int, classes: int, count: int, seed: int, device: torch.device | str = "cpu"):
        start = 0.01 * torch.randn(width, classes, generator=torch.Generator().manual_seed(seed))
        self.shape = (count, classes)
        self.weight = start.repeat(1, count).to(device).requires_grad_()  # (D, H·C)
        self.bias = torch.zeros(count * classes, device=device, requires_grad=True)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Class logits of every head (n, H, C)."""
        return torch.addmm(self.bias, features, self.weight).unflatten(1, self.shape)

    @torch.no_grad()
    def scores(self, features: torch.Tensor, labels: torch.Tensor, head: int) -> Scores:
        """Scores of one head."""
        parts = in_parts(features, labels, math.prod(self.shape))
        return score_parts(((self(rows)[:, head], truth) for rows, truth in parts), self.shape[1])

    @torch.no_grad()
    def top1(self, features: torch.Tensor, labels: torch.Tensor) -> list[float]:
        """Accuracy of every head in per cent."""
        parts = in_parts(features, labels, math.prod(self.shape))
        hits = sum((self(rows).argmax(dim=2) == truth[:, None]).sum(dim=0) for rows, truth in parts)
        return (100 * torch.as_tensor(hits).cpu().double() / len(labels)).tolist()


def train_heads(
    heads: Heads,
    features: torch.Tensor,
    labels: torch.Tensor,
    rates: list[float],
    *,
    epochs: int,
    milestones: list[int] | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> Iterator[int]:
    """Train head i at `rates[i]` by SGD with momentum 0.9, all on the same batches. Yields after every epoch (from 1).

    Args:
        features, labels: (n, D), (n,), on the device of the heads.
        milestones: epochs at which the learning rate drops to a tenth; none for the cosine.
    """
    # The step of SGD is linear in the gradient, so that a learning rate may weigh the head's loss instead.
    weights = torch.tensor(rates, device=features.device)
    optimizer = torch.optim.SGD([heads.weight, heads.bias], lr=1.0, momentum=0.9)
    schedule = epoch_schedule(optimizer, math.ceil(len(features) / batch_size), epochs, milestones)
    order = torch.Generator().manual_seed(seed)
    for epoch in tqdm(range(epochs), desc="SGD", leave=False, dynamic_ncols=True, disable=None):
        for rows in torch.randperm(len(features), generator=order).to(features.device).split(batch_size):
            logits = heads(features[rows]).transpose(1, 2)  # (n, C, H)
            losses = F.cross_entropy(logits, labels[rows, None].expand(-1, len(rates)), reduction="none").mean(dim=0)
            optimizer.zero_grad()
            (losses @ weights).backward()
            optimizer.step()
            schedule.step()
        yield epoch + 1


def regularisation_path(features: Any, labels: Any, strengths: Iterable[float]) -> Iterator[Pipeline]:
    """scikit-learn's multinomial logistic regression (L-BFGS) on standardised features, for one strength after the other.

    Each fit starts from the one before. Mean and deviation are those of `features`.

    Args:
        features, labels: arrays (n, D), (n,).
        strengths: C of scikit-learn, the inverse of the L2 penalty; ascending is fastest.

    Yields:
        the same pipeline every time, fitted again; `converged` says whether it got there.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(warm_start=True, max_iter=MAX_ITER, tol=TOLERANCE))
    for strength in strengths:
        yield model.set_params(logisticregression__C=strength).fit(features, labels)


def converged(model: Pipeline) -> bool:
    """Whether L-BFGS reached its tolerance."""
    return bool(model[-1].n_iter_.max() < MAX_ITER)


def class_logits(model: Pipeline, features: Any, classes: int) -> torch.Tensor:
    """Decision values (n, C); -inf for a class that the model has not seen."""
    values = torch.as_tensor(model.decision_function(features))
    if values.ndim == 1:  # two classes share one value
        values = torch.stack([-values, values], dim=1)
    logits = values.new_full((len(values), classes), -torch.inf)
    logits[:, torch.as_tensor(model.classes_)] = values
    return logits


# The probe


def build_cached(
    model: MoCoForImageClassification,
    args: LinearProbeArguments,
    data: EvaluationDataArguments,
    splits: ImageSplits,
    cache: Path,
) -> Iterator[Probe]:
    """SGD at every learning rate, then L-BFGS at every regularisation, on features kept in `cache`.

    Nothing runs before the first probe is asked for. The processes share the extraction, and only rank 0 fits and yields.
    Settings are compared on the held-out part, and the best one is fitted again to the whole train split.

    Raises:
        ValueError: there are too few images to hold some out.
    """
    kept, held = hold_out(torch.tensor(splits.train["label"][:]), args.seed)

    def probes() -> Iterator[Probe]:
        view, decode = data.evaluation_view(), splits.decoder.image
        parts = [MapImages(split, view, decode=decode) for split in (splits.train, splits.eval)]
        loading: dict[str, Any] = {
            "batch_size": args.per_device_eval_batch_size,
            "num_workers": args.dataloader_num_workers,
        }
        encoder = model.moco.to(args.device)
        loading["gather"] = rank() == 0  # the others only take part in the extraction
        train, evaluated = (cached_features(encoder, images, cache, **loading) for images in parts)
        if rank() > 0:
            return
        fitted, held_out = ((train[0][rows], train[1][rows]) for rows in (kept, held))
        yield _probe_sgd(args, len(splits.class_names), train, fitted, held_out, evaluated)
        yield _probe_lbfgs(len(splits.class_names), train, fitted, held_out, evaluated)

    return probes()


Rows = tuple[torch.Tensor, torch.Tensor]  # features and labels


def _probe_sgd(
    args: LinearProbeArguments, classes: int, train: Rows, fitted: Rows, held_out: Rows, evaluated: Rows
) -> Probe:
    train, fitted, held_out, evaluated = (
        (x.to(args.device), y.to(args.device)) for x, y in (train, fitted, held_out, evaluated)
    )

    def fit(rows: Rows, rates: list[float]) -> tuple[Heads, list[HeadReport]]:
        heads = Heads(rows[0].shape[1], classes, len(rates), args.seed, args.device)
        schedule: dict[str, Any] = {"epochs": math.ceil(args.num_train_epochs), "milestones": args.lr_milestones}
        epochs = train_heads(heads, *rows, rates, **schedule, batch_size=args.global_batch_size, seed=args.seed)
        top1 = {epoch: heads.top1(*evaluated) for epoch in epochs}
        reports = []
        for i, rate in enumerate(rates):
            best = max(top1, key=lambda epoch: top1[epoch][i])
            last = top1[max(top1)][i]
            reports.append(HeadReport(f"learning rate {rate:g}", None, last, top1[best][i], best))
        return heads, reports

    compared, chosen = [], 0
    if len(args.rates) > 1:
        heads, reports = fit(fitted, args.rates)
        held = heads.top1(*held_out)
        compared = [replace(report, held_out=top1) for report, top1 in zip(reports, held, strict=True)]
        chosen = choose(compared)
    heads, (final,) = fit(train, [args.rates[chosen]])
    scores = heads.scores(*evaluated, head=0)
    protocol = f"linear probe, cached features, SGD, {args.protocol}"
    return Probe("cached SGD", protocol, len(train[1]), final, scores, compared)


def _probe_lbfgs(classes: int, train: Rows, fitted: Rows, held_out: Rows, evaluated: Rows) -> Probe:
    def scores(fit: Pipeline, rows: Rows) -> Scores:
        parts = in_parts(*rows, classes)
        return score_parts(((class_logits(fit, x.numpy(), classes), y) for x, y in parts), classes)

    def report(fit: Pipeline, held: float | None) -> HeadReport:
        setting = f"C {fit[-1].C:g}" + ("" if converged(fit) else " (not converged)")
        return HeadReport(setting, held, scores(fit, evaluated).top1)

    path = regularisation_path(fitted[0].numpy(), fitted[1].numpy(), STRENGTHS)
    heads = [
        report(fit, scores(fit, held_out).top1)
        for fit in tqdm(path, desc="L-BFGS", total=len(STRENGTHS), leave=False, disable=None)
    ]
    best = STRENGTHS[choose(heads)]
    (fit,) = regularisation_path(train[0].numpy(), train[1].numpy(), [best])
    strengths = " ".join(f"{strength:g}" for strength in STRENGTHS)
    protocol = f"linear probe, cached features, L-BFGS, standardised, C {strengths} by a held-out tenth"
    return Probe("cached L-BFGS", protocol, len(train[1]), report(fit, None), scores(fit, evaluated), heads)
