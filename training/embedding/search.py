"""The images of an embedded set that are nearest to others: exact, a row group at a time.

Shapes: `Q` queries, `k` neighbours, `D` width of an embedding.
"""

from collections.abc import Sequence

import torch

from ..evaluation.features import unit
from .shards import Shard, read_embeddings


@torch.no_grad()
def search(
    shards: Sequence[Shard], queries: torch.Tensor, k: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarity in float32, and number in the set, of the k nearest rows to each query: (Q, k), (Q, k), nearest first.

    Memory grows with the queries and their neighbours, and not with the set.

    Args:
        queries: embeddings of any length (Q, D).
    """
    queries = unit(queries.float().to(device))
    similarity = torch.full((len(queries), 0), -torch.inf, device=device)
    index = torch.zeros((len(queries), 0), dtype=torch.long, device=device)
    for start, embeddings in read_embeddings(shards, doing="searching"):
        keys = unit(torch.tensor(embeddings, device=device).float())
        found, where = torch.topk(queries @ keys.T, min(k, len(keys)), dim=1)
        similarity, index = torch.cat([similarity, found], dim=1), torch.cat([index, where + start], dim=1)
        similarity, kept = torch.topk(similarity, min(k, similarity.shape[1]), dim=1)
        index = index.gather(1, kept)
    return similarity.cpu(), index.cpu()
