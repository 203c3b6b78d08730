"""Groups of near-duplicate images, within and between the splits of an embedded set.

Two images are near-duplicates where the cosine similarity of their embeddings reaches a threshold; a group is all that such
pairs join. All pairs are compared, block by block. Shapes: `n` rows of the set, `S` splits, `D` width of an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ..evaluation.features import unit
from .shards import Shard, count_rows, read_embeddings

BLOCK = (
    16_384  # rows that are compared with all rows behind them while these are read once: 134 MB of float32 (n, 2048)
)
CHUNK = 1_024  # of those, at once: 67 MB of similarities
ROUNDING = 1e-6  # of float32: the similarity of equal rows may come out this much below 1


@dataclass(frozen=True)
class Duplicates:
    """Near-duplicates of a set, as arrays with an entry for each of its rows.

    Args:
        split: number of the row's split (n,).
        group: number of the first row of its group (n,); its own for a row without duplicates.
        nearest: the most similar duplicate (n,), -1 for a row without any.
        similarity: to that row, float32 (n,).
        across: the most similar duplicate of another split (n,), -1 for a row without any.
        across_similarity: to that row, float32 (n,).
        meets: whether the row has a duplicate in each split (n, S).
    """

    split: np.ndarray
    group: np.ndarray
    nearest: np.ndarray
    similarity: np.ndarray
    across: np.ndarray
    across_similarity: np.ndarray
    meets: np.ndarray

    @property
    def groups(self) -> list[np.ndarray]:
        """The rows of each group: first those between splits, the closest pair across splits first, then the others so."""
        rows = np.flatnonzero(self.nearest >= 0)
        rows = rows[np.argsort(self.group[rows], kind="stable")]
        groups = np.split(rows, np.flatnonzero(np.diff(self.group[rows])) + 1) if len(rows) else []
        return sorted(groups, key=lambda group: (-self.across_similarity[group].max(), -self.similarity[group].max()))

    def between(self, group: np.ndarray) -> bool:
        """Whether rows of a group are of several splits."""
        return bool((self.across[group] >= 0).any())


@torch.no_grad()
def find_duplicates(shards: Sequence[Shard], threshold: float, device: torch.device | str = "cpu") -> Duplicates:
    """Compare all pairs of rows. Memory grows with a block, and by some bytes with each row.

    Args:
        threshold: least cosine similarity of near-duplicates.
    """
    counts = count_rows(shards)
    n, split = sum(counts.values()), np.repeat(np.arange(len(counts)), list(counts.values()))
    found = Duplicates(
        split=split,
        group=np.arange(n),
        nearest=np.full(n, -1),
        similarity=np.full(n, -np.inf, np.float32),
        across=np.full(n, -1),
        across_similarity=np.full(n, -np.inf, np.float32),
        meets=np.zeros((n, len(counts)), bool),
    )
    steps = sum(n - start for start in range(0, n, BLOCK))
    with tqdm(total=steps, desc="comparing", unit=" rows", disable=None) as bar:
        for start in range(0, n, BLOCK):
            block = _read_block(shards, start, device)
            for first, embeddings in read_embeddings(shards, start):
                rows = unit(torch.tensor(embeddings, device=device).float())
                for offset in range(0, len(rows), CHUNK):
                    _add(found, *_close_pairs(block, rows[offset : offset + CHUNK], start, first + offset, threshold))
                bar.update(len(rows))
    found.group[:] = _roots(found.group, found.group)
    return found


def _add(found: Duplicates, a: np.ndarray, b: np.ndarray, close: np.ndarray) -> None:
    """Pairs of duplicates and their similarities, in place."""
    _join(found.group, a, b)
    apart = found.split[a] != found.split[b]
    for one, other in ((a, b), (b, a)):
        _keep_nearest(one, other, close, found.nearest, found.similarity)
        _keep_nearest(one[apart], other[apart], close[apart], found.across, found.across_similarity)
        found.meets[one, found.split[other]] = True


def _read_block(shards: Sequence[Shard], start: int, device: torch.device | str) -> torch.Tensor:
    parts, rows = [], 0
    for _, embeddings in read_embeddings(shards, start):
        parts.append(unit(torch.tensor(embeddings[: BLOCK - rows], device=device).float()))
        rows += len(parts[-1])
        if rows == BLOCK:
            break
    return torch.cat(parts)


def _close_pairs(
    block: torch.Tensor, rows: torch.Tensor, start: int, first: int, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers a < b of the rows that are close, and their similarities."""
    products = rows @ block.T
    later, earlier = (products >= threshold - ROUNDING).nonzero(as_tuple=True)
    close = products[later, earlier].cpu().numpy()
    a, b = earlier.cpu().numpy() + start, later.cpu().numpy() + first
    each = a < b  # a block meets its own rows too
    return a[each], b[each], close[each]


def _join(group: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Make one group of the groups of each pair, in place. A group is a tree whose root is its first row."""
    while len(a):
        for rows in (a, b):
            group[rows] = _roots(group, rows)  # or the paths to it would grow with every block
        a, b = group[a], group[b]
        apart = a != b
        a, b = a[apart], b[apart]
        np.minimum.at(group, np.maximum(a, b), np.minimum(a, b))


def _roots(group: np.ndarray, rows: np.ndarray) -> np.ndarray:
    while (above := group[rows]).tobytes() != rows.tobytes():
        rows = above
    return rows


def _keep_nearest(
    rows: np.ndarray, others: np.ndarray, close: np.ndarray, nearest: np.ndarray, similarity: np.ndarray
) -> None:
    order = np.lexsort((-others, close))  # the last one that is written to a place stays: the closest, then the first
    rows, others, close = rows[order], others[order], close[order]
    better = close > similarity[rows]
    nearest[rows[better]], similarity[rows[better]] = others[better], close[better]
