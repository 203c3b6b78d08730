"""Health of a pretraining run: numbers that show a collapse or a leak long before a probe would, and what to do then.

Shapes: `N` queries, `C` their width, `n` images, `D` feature width, `K` keys in the queue.
"""

import math

import torch
import torch.distributed as dist

from modeling_moco import MoCoModel
from modeling_moco.distributed_moco import gather, local_slice, world_size

Views = list[tuple[torch.Tensor, torch.Tensor]]  # batches of query views and key views of the same images
COLLAPSED_RANKME, COLLAPSED_UNIFORMITY = 1.5, -1e-4  # a random encoder has 5 or more, and -0.02 or less


def uniformity_kernel(x: torch.Tensor) -> torch.Tensor:
    """Mean of exp(-2 |x_i - x_j|²) over all pairs of unit-length rows (N, C): scalar, 1 where all are equal.

    Its logarithm is the uniformity of Wang and Isola (arXiv:2005.10242, equation 4, t = 2): 0 for a collapsed encoder, about
    -4 for directions spread evenly.
    """
    n = len(x)
    return ((4 * (x @ x.T - 1)).exp().sum() - n) / (n * (n - 1))


def rankme(features: torch.Tensor) -> float:
    """RankMe (arXiv:2210.02885, equation 1): how many dimensions features fill, from 1 (collapsed) to D.

    The exponential of the entropy of the singular values of all processes' features together.

    Args:
        features: those of this process (n, D).
    """
    x = features.double()
    gram = x.T @ x  # its eigenvalues are the squared singular values
    if world_size() > 1:
        dist.all_reduce(gram)
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + 1e-7
    return max(1.0, math.exp(-(p * p.log()).sum().item()))


@torch.no_grad()
def key_drift(model: MoCoModel) -> float:
    """How far the key encoder lags behind: |θ_k - θ_q| / |θ_q|, in per cent."""
    q = [*model.encoder_q.parameters(), *model.projector_q.parameters()]
    k = [*model.encoder_k.parameters(), *model.projector_k.parameters()]
    distance, size = (torch.stack(torch._foreach_norm(tensors)).norm() for tensors in (torch._foreach_sub(k, q), q))
    return 100 * (distance / size).item()


def queue_age(queue_size: int, keys_per_step: int, steps: int) -> int:
    """Steps since the oldest key was encoded, as the next step finds it. A random key of the start is as old as the run."""
    return min(steps, math.ceil(queue_size / keys_per_step))


@torch.no_grad()
def leak(model: MoCoModel, views: Views) -> tuple[float, float, bool]:
    """Whether BatchNorm tells keys apart by the images that they were encoded with (v1 paper, section 3.3).

    Queries look for their keys twice. First the keys are encoded as in training. Then their images are dealt out anew over
    all batches, so that a query and its key were no longer normalised with the same images: who recognises content loses
    nothing by that. The model and its statistics are left as they were.

    Args:
        views: at least two batches of equal size, of images whose keys are not in the queue.

    Returns:
        queries that beat all negatives, in per cent of all processes' queries, in both cases; and whether the loss is more
        than chance: above 10 points, and above three standard errors over batches.
    """
    buffers = [*model.encoder_q.buffers(), *model.encoder_k.buffers()]
    before = [buffer.clone() for buffer in buffers]
    training = model.training
    model.train()
    batches, batch = len(views), len(views[0][0])
    q = [model.encode_queries(x_q) for x_q, _ in views]
    x_k = torch.cat([x_k for _, x_k in views])
    as_trained = torch.arange(batches * batch)
    dealt = as_trained.view(batches, batch).T.flatten()  # every batch gets an equal part of each
    accuracy = []
    for order in (as_trained, dealt):
        keys = [model.encode_keys(x_k[rows.to(x_k.device)])[local_slice(batch)] for rows in order.split(batch)]
        k = torch.cat(keys)[order.argsort().to(x_k.device)].split(batch)
        accuracy.append(torch.stack([_share_found(model, *pair) for pair in zip(q, k, strict=True)]))
    model.train(training)
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    trained, other = (100 * gather(share).double() for share in accuracy)  # one number for each batch of each process
    loss = trained - other
    error = loss.std() / math.sqrt(len(loss))
    return trained.mean().item(), other.mean().item(), bool(loss.mean() > max(10.0, 3 * error.item()))


def _share_found(model: MoCoModel, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    _, logits = model.dictionary(q, k, model.config.temperature)
    return (logits[:, 1:] < logits[:, :1]).all(dim=1).float().mean()


def diagnose(metrics: dict[str, float], batch_norm: str) -> dict[str, str]:
    """A sentence for everything that is wrong with a run and what to do, by the name of the illness.

    Args:
        metrics: rankme, uniformity, contrast_top1, contrast_top1_shuffled, leaks of `MoCoTrainer`; whichever there are.
        batch_norm: of the model's configuration.
    """
    found = {}
    if (
        metrics.get("rankme", math.inf) < COLLAPSED_RANKME
        or metrics.get("uniformity", -math.inf) > COLLAPSED_UNIFORMITY
    ):
        measured = [f"{name} {metrics[name]:.3f}" for name in ("rankme", "uniformity") if name in metrics]
        found["collapse"] = (
            f"the encoder has collapsed: all images get the same feature ({', '.join(measured)}). Train again into another "
            "--output_dir with a lower --learning_rate, or a --key_momentum nearer to 1"
        )
    if metrics.get("leaks"):
        remedies = {
            "plain": "pass --batch_norm split (or, with several processes, shuffle)",
            "shuffle": "use several processes, or pass --batch_norm split",
            "sync": "pass --batch_norm shuffle",
            "split": "raise --batch_norm_splits",
        }
        found["leak"] = (
            f"BatchNorm leaks: {metrics['contrast_top1']:.0f} % of the queries find their key when it is normalised with the "
            f"images of its batch, {metrics['contrast_top1_shuffled']:.0f} % in other company: the encoder learns batches, not "
            f"images. Train again into another --output_dir: {remedies[batch_norm]}"
        )
    return found
