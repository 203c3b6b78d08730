"""Weighted kNN on frozen features (arXiv:1805.01978, section 3.4), the monitor of a pretraining run.

The bank stays divided over the processes: each finds the nearest neighbours of all queries in its own part, chunk by
chunk on its device, and the best of all parts vote. Shapes: `B` bank, `Q` queries, `D` feature width, `k` neighbours.
"""

import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modeling_moco import MoCoModel
from modeling_moco.distributed_moco import gather, world_size

from ..data.images import MapImages
from ..engine.record import TRACKERS
from ..engine.results import Feature, Result
from .features import cached_features, extract_features, unit

BANK_CHUNK, QUERY_CHUNK = 65_536, 1_024  # rows at once: a quarter of a gigabyte of similarities


@dataclass
class KNNArguments:
    """How neighbours vote."""

    _argument_group_name = "kNN"

    knn_k: list[int] = field(
        default_factory=lambda: [200], metadata={"help": "Neighbours that vote. Several numbers are compared."}
    )
    knn_temperature: float = field(
        default=0.07, metadata={"help": "Temperature T of the votes: one weighs exp(cosine similarity / T)."}
    )
    knn_features: Feature = field(
        default="backbone",
        metadata={
            "help": "What is compared: the pooled output of the backbone, or its projection by the head, without a predictor."
        },
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images per device at once."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read images, per device."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights of --random_encoder."})
    use_cpu: bool = field(default=False, metadata={"help": "Compute on the CPU, even where there is a GPU."})
    report_to: list[str] = field(
        default_factory=list, metadata={"help": f"Trackers that get the results: {', '.join(TRACKERS)}."}
    )
    project: str = field(
        default="moco", metadata={"help": "Project of the pretraining run in the trackers; MODEL names the run."}
    )

    def __post_init__(self):
        if unknown := set(self.report_to) - set(TRACKERS):
            raise ValueError(f"report_to ({', '.join(unknown)}) must be of {', '.join(TRACKERS)}")
        if not self.knn_k or min(self.knn_k) < 1:
            raise ValueError(f"knn_k ({self.knn_k}) must be at least 1: the papers' protocol has 200")
        for name, least in (("per_device_eval_batch_size", 1), ("dataloader_num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}")
        if len(set(self.knn_k)) < len(self.knn_k):
            raise ValueError(f"knn_k ({self.knn_k}) has a number twice: name each once")
        if not 0 < self.knn_temperature < math.inf:
            raise ValueError(f"knn_temperature ({self.knn_temperature}) must be above 0: the papers' protocol has 0.07")


@torch.no_grad()
def nearest(
    queries: torch.Tensor, bank: torch.Tensor, k: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarity and bank index of the k nearest neighbours, nearest first: (Q, k), (Q, k) on `device`.

    Where the bank has fewer, similarity -inf fills up. Working memory grows with the queries and their neighbours, and not
    with the bank.

    Args:
        queries, bank: features of any length (Q, D), (B, D).
        device: where to compute; chunks are moved there.
    """
    queries = unit(queries.to(device))
    similarity = torch.full((len(queries), k), -torch.inf, device=device)
    index = torch.zeros((len(queries), k), dtype=torch.long, device=device)
    for start in range(0, len(bank), BANK_CHUNK):
        keys = unit(bank[start : start + BANK_CHUNK].to(device))
        for first in range(0, len(queries), QUERY_CHUNK):
            part = slice(first, first + QUERY_CHUNK)
            found, where = torch.topk(queries[part] @ keys.T, min(k, len(keys)), dim=1, sorted=False)
            candidates = torch.cat([index[part], where + start], dim=1)
            similarity[part], kept = torch.topk(torch.cat([similarity[part], found], dim=1), k, dim=1)
            index[part] = candidates.gather(1, kept)
    return similarity, index


@torch.no_grad()
def knn_predict(
    queries: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    *,
    knn_k: list[int],
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> dict[int, torch.Tensor]:
    """Class of each query (Q,) for every k in `knn_k`: the k nearest neighbours vote with weight exp(similarity / temperature).

    Args:
        queries: features, the same on all processes (Q, D).
        bank, bank_labels: features and classes of this process's part of the bank (B, D), (B,).

    Raises:
        ValueError: k is larger than the bank.
    """
    size = torch.tensor([len(bank)], device=device)
    if max(knn_k) > (total := int(gather(size).sum())):
        raise ValueError(f"knn_k ({max(knn_k)}) is larger than the bank ({total} images): lower it")
    all_similarities, all_indices = nearest(queries, bank, max(knn_k), device)
    predictions: dict[int, list[torch.Tensor]] = {k: [] for k in knn_k}
    for similarity, index in zip(all_similarities.split(QUERY_CHUNK), all_indices.split(QUERY_CHUNK), strict=True):
        labels = bank_labels.to(device)[index]
        if world_size() > 1:  # the best of all parts
            parts, owners = (gather(x).unflatten(0, (world_size(), -1)) for x in (similarity, labels))
            similarity, kept = torch.topk(torch.cat(list(parts), dim=1), max(knn_k), dim=1)
            labels = torch.cat(list(owners), dim=1).gather(1, kept)
        votes = ((similarity - similarity[:, :1]) / temperature).exp()  # of the nearest 1: a small T does not overflow
        for k in knn_k:
            ballot = votes.new_zeros(len(labels), int(labels.max()) + 1)
            predictions[k].append(ballot.scatter_add_(1, labels[:, :k], votes[:, :k]).argmax(dim=1))
    return {k: torch.cat(parts).cpu() for k, parts in predictions.items()}


def knn_accuracy(
    queries: torch.Tensor, labels: torch.Tensor, bank: torch.Tensor, bank_labels: torch.Tensor, **voting
) -> dict[int, float]:
    """Share of the queries with labels (Q,) that `knn_predict` classifies correctly, in per cent, for every k."""
    predictions = knn_predict(queries, bank, bank_labels, **voting)
    return {k: 100 * (predicted == labels).double().mean().item() for k, predicted in predictions.items()}


def protocol(k: int, temperature: float) -> str:
    """The words that stand for this evaluation in results."""
    return f"weighted kNN, k {k}, T {temperature:g}"


def evaluate_knn(
    model: MoCoModel, bank: MapImages, queries: MapImages, args: KNNArguments, cache: Path | None = None
) -> list[Result]:
    """kNN of a frozen encoder, one result for every k.

    Args:
        cache: a folder to keep features in, or to find them.
    """
    loading: dict[str, Any] = {
        "feature": args.knn_features,
        "batch_size": args.per_device_eval_batch_size,
        "num_workers": args.dataloader_num_workers,
    }
    extract = extract_features if cache is None else partial(cached_features, folder=cache)
    bank_features, bank_labels = extract(model, bank, gather=False, **loading)
    features, labels = extract(model, queries, **loading)
    voting: dict[str, Any] = {"knn_k": args.knn_k, "temperature": args.knn_temperature, "device": model.device}
    found = knn_accuracy(features, labels, bank_features, bank_labels, **voting)
    return [
        Result(
            protocol(k, args.knn_temperature),
            "top1",
            top1,
            len(queries),
            args.knn_features,
            settings={"bank": len(bank)},
            seed=args.seed,
        )
        for k, top1 in found.items()
    ]


def accuracies(entry: dict[str, Any]) -> dict[int, float]:
    """kNN accuracy in per cent by number of neighbours, of an entry in the log of a run; first that of `eval_knn_top1`."""
    found = {}
    if {"eval_knn_k", "eval_knn_top1"} <= entry.keys():
        found[int(entry["eval_knn_k"])] = entry["eval_knn_top1"]
    others = {match[1]: value for key, value in entry.items() if (match := re.fullmatch(r"eval_knn_top1_k(\d+)", key))}
    return found | {int(k): value for k, value in others.items()}


def newest_k(history: list[dict[str, Any]]) -> int | None:
    """The number of neighbours of the last `eval_knn_top1` in the log of a run, if there is one."""
    return next((int(entry["eval_knn_k"]) for entry in reversed(history) if "eval_knn_k" in entry), None)


def by_newest_k(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log of a run with one number of neighbours behind every name: `eval_knn_top1` is that of `newest_k`.

    A continued run may have another number than it began with.
    """
    k = newest_k(history)
    named = []
    for entry in history:
        if "eval_knn_k" in entry:
            of_k = {"eval_knn_top1" if n == k else f"eval_knn_top1_k{n}": x for n, x in accuracies(entry).items()}
            entry = {key: x for key, x in entry.items() if not key.startswith("eval_knn_top1")} | of_k
        named.append(entry)
    return named
