"""Time and memory of the kNN classifier."""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from ..cli import cores
from ..evaluation.knn import knn_predict
from .measure import Benchmark, PeakMemory, in_own_process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bank", type=int, default=50_000, help="Number of images in the bank.")
    parser.add_argument("--queries", type=int, default=10_000, help="Number of images to classify.")
    parser.add_argument("--dim", type=int, default=512, help="Width of a feature.")
    parser.add_argument("--classes", type=int, default=10, help="Number of classes.")
    parser.add_argument("--knn_k", type=int, default=200, help="Number of neighbours that vote.")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=KNN,
        default=list(KNN),
        help="Variants to run. The predictions of the last one are the reference.",
    )
    parser.add_argument("--rounds", type=int, default=3, help="Number of rounds, each of which runs all variants.")


def knn_inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, bank and labels of the bank: features of unit length in overlapping clusters."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(args.classes, (args.queries + args.bank,), generator=generator)
    centres = torch.randn(args.classes, args.dim, generator=generator)
    features = torch.randn(len(labels), args.dim, generator=generator)
    for rows, classes in zip(features.split(4096), labels.split(4096), strict=True):  # in place: it may be gigabytes
        rows.mul_(5).add_(centres[classes])
        rows.div_(rows.norm(dim=1, keepdim=True))
    return features[: args.queries], features[args.queries :], labels[args.queries :]


def knn_ours(queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    return knn_predict(queries, bank, labels, knn_k=[args.knn_k])[args.knn_k]


def knn_one_hot(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace
) -> torch.Tensor:
    """Vote as other libraries do: one one-hot row per neighbour, in chunks of 256 queries."""
    predictions = []
    for rows in queries.split(256):
        similarity, index = (rows @ bank.T).topk(args.knn_k, dim=1)
        votes = F.one_hot(labels[index], args.classes) * (similarity / 0.07).exp()[:, :, None]
        predictions.append(votes.sum(dim=1).argmax(dim=1))
    return torch.cat(predictions)


def knn_scikit_learn(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace
) -> torch.Tensor:
    classifier = KNeighborsClassifier(
        args.knn_k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    return torch.from_numpy(classifier.fit(bank.numpy(), labels.numpy()).predict(queries.numpy()))


KNN: dict[str, Callable] = {"ours": knn_ours, "one-hot vote": knn_one_hot, "scikit-learn": knn_scikit_learn}


def knn_process(name: str, args: argparse.Namespace) -> tuple[float, int, list[int]]:
    """Seconds, peak memory in bytes beside the features, and predictions of one variant."""
    queries, bank, labels = knn_inputs(args)
    small = argparse.Namespace(**vars(args) | {"knn_k": min(10, args.knn_k)})
    KNN[name](queries[:64], bank[:1000], labels[:1000], small)  # warm up
    with PeakMemory() as memory:
        start = time.perf_counter()
        predictions = KNN[name](queries, bank, labels, args)
        seconds = time.perf_counter() - start
    return seconds, memory.bytes, predictions.tolist()


def run(args: argparse.Namespace) -> list[Benchmark]:
    measured: dict[str, list[tuple[float, int, list[int]]]] = {name: [] for name in args.variants}
    for _ in range(args.rounds):
        for name in args.variants:  # one process each, so that its peak memory is the variant's
            measured[name].append(in_own_process(knn_process, name, args))
    reference = args.variants[-1]
    expected = np.array(measured[reference][0][2])
    title = (
        f"kNN, k {args.knn_k}: {args.queries:,} queries in a bank of {args.bank:,} x {args.dim}, {args.classes} classes, "
        f"{cores()} cores, {args.rounds} interleaved rounds"
    )
    columns = {
        "GB beside the features": {n: max(peak for _, peak, _ in rounds) / 1e9 for n, rounds in measured.items()},
        f"% as {reference}": {
            n: 100 * float(np.mean(np.array(rounds[0][2]) == expected)) for n, rounds in measured.items()
        },
    }
    seconds = {name: [s for s, _, _ in rounds] for name, rounds in measured.items()}
    return [Benchmark(title, seconds, (args.variants[0],), args.queries, columns)]
