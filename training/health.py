"""Health of a pretraining run: numbers that show a collapse or a leak long before a probe would, and the remedies.

Shapes: `N` queries, `C` their width, `n` images, `D` feature width, `K` keys in the queue.
"""

import math
from statistics import median

import torch

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.distributed_moco import gather, local_slice

Views = list[tuple[torch.Tensor, torch.Tensor]]  # batches of query views and key views of the same images
MUCH_LONGER = 0.2  # of the time that one process waits for images more than the others
COLLAPSED_RANKME, COLLAPSED_UNIFORMITY = 1.5, -1e-4  # a random encoder has 5 or more, and -0.02 or less


def uniformity_kernel(x: torch.Tensor) -> torch.Tensor:
    """Mean of exp(-2 |x_i - x_j|²) over all pairs of rows `x` of unit length (N, C): scalar, 1 if all rows are equal.

    Its logarithm is the uniformity of Wang and Isola (arXiv:2005.10242, equation 4, t = 2): 0 for a collapsed encoder, about
    -4 for a uniform distribution on the sphere.
    """
    n = len(x)
    return ((4 * (x @ x.T - 1)).exp().sum() - n) / (n * (n - 1))


def rankme(features: torch.Tensor, device: torch.device | None = None) -> float:
    """RankMe (arXiv:2210.02885, equation 1): the effective number of dimensions of features, from 1 (collapsed) to D.

    It is the exponential of the entropy of the singular values of the features of all processes, in float64 on the CPU: with
    float32 a collapsed encoder would not be seen, and Apple's GPUs have no float64.

    Args:
        features: of the images of this process (n, D).
        device: where the processes exchange tensors; by default the features' own.

    Returns:
        the number; NaN where a feature is not finite.
    """
    x = features.cpu().double()
    gram = x.T @ x  # its eigenvalues are the squared singular values
    # (R, D, D), which travel as integers of the same bits
    every = gather(gram.view(torch.int64)[None].to(device or features.device)).cpu().view(torch.float64)
    gram = every.sum(dim=0)
    if not gram.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + 1e-7
    return max(1.0, math.exp(-(p * p.log()).sum().item()))


@torch.no_grad()
def key_drift(model: MoCoModel) -> float:
    """Distance of a key encoder from the query encoder: |θ_k - θ_q| / |θ_q|, in per cent."""
    q = [*model.encoder_q.parameters(), *model.projector_q.parameters()]
    k = [*model.encoder_k.parameters(), *model.projector_k.parameters()]
    distance, size = (torch.stack(torch._foreach_norm(tensors)).norm() for tensors in (torch._foreach_sub(k, q), q))
    return 100 * (distance / size).item()


def queue_age(queue_size: int, keys_per_step: int, steps: int) -> int:
    """Age of the oldest key in the queue in steps, at the next step. Initial random keys are as old as the run.

    Args:
        queue_size: K.
        keys_per_step: keys of all processes that a step enqueues.
        steps: steps since the start of the run.
    """
    return min(steps, math.ceil(queue_size / keys_per_step))


@torch.no_grad()
def leak(model: MoCoModel, views: Views) -> tuple[float, float, bool]:
    """Measure whether BatchNorm statistics leak which key belongs to a query (v1 paper, section 3.3).

    Queries search their keys twice. First the keys are encoded in the batches of training. Then their images are regrouped
    over all batches, so that query and key no longer share BatchNorm statistics; an encoder that recognises content is
    unaffected. The model and its statistics do not change.

    Args:
        model: with its dictionary, and an encoder of keys.
        views: at least two batches of equal size, of images whose keys are not in the queue.

    Returns:
        the contrast accuracy (queries more similar to their key than to all negatives, of all processes) in per cent with
        the batches of training; the same with regrouped batches; and whether the difference shows a leak: whether it exceeds
        10 points and three standard errors over batches.
    """
    buffers = [*model.buffers()]
    before = [buffer.clone() for buffer in buffers]
    training = model.training
    model.train()
    batches, batch = len(views), len(views[0][0])
    q = [model.encode_queries(x_q) for x_q, _ in views]
    x_k = torch.cat([x_k for _, x_k in views])
    as_trained = torch.arange(batches * batch)
    regrouped = as_trained.view(batches, batch).T.flatten()  # each new batch takes an equal part of each old batch
    accuracy = []
    for order in (as_trained, regrouped):
        keys = [model.encode_keys(x_k[rows.to(x_k.device)])[local_slice(batch)] for rows in order.split(batch)]
        k = torch.cat(keys)[order.argsort().to(x_k.device)].split(batch)
        accuracy.append(torch.stack([_share_found(model, *pair) for pair in zip(q, k, strict=True)]))
    model.train(training)
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    trained, other = (
        100 * gather(share).cpu().double() for share in accuracy
    )  # one number for each batch of each process
    difference = trained - other
    error = difference.std() / math.sqrt(len(difference))
    return trained.mean().item(), other.mean().item(), bool(difference.mean() > max(10.0, 3 * error.item()))


def _share_found(model: MoCoModel, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    _, logits = model.dictionary(q[None], gather(k)[None], model.config.temperature)
    return (logits[:, 1:] < logits[:, :1]).all(dim=1).float().mean()


def slow_process(waited: list[float], seconds: float) -> str | None:
    """A sentence about the process that keeps all others waiting, if there is one.

    Args:
        waited: seconds that each process has waited for its images.
        seconds: in which they did.
    """
    slowest = max(range(len(waited)), key=waited.__getitem__)
    others = waited[:slowest] + waited[slowest + 1 :]
    if not others or waited[slowest] - median(others) < MUCH_LONGER * seconds:
        return None
    shares = 100 * waited[slowest] / seconds, 100 * median(others) / seconds
    return (
        f"process {slowest} has waited {shares[0]:.0f} % of the time for its images, the others {shares[1]:.0f} %, and all "
        "wait for it: look at its disk, its network, and --dataloader_num_workers"
    )


def diagnose(metrics: dict[str, float], config: MoCoConfig) -> dict[str, str]:
    """Find the problems of a run.

    Args:
        metrics: those of rankme, uniformity, contrast_top1, contrast_top1_shuffled and leaks that `MoCoTrainer` has measured.
        config: of the model.

    Returns:
        a sentence with a remedy for each problem, keyed by problem ("overflow", "collapse", "leak").
    """
    found = {}
    if math.isnan(metrics.get("rankme", 1.0)):
        found["overflow"] = (
            "features of images are not finite, though the weights are: BatchNorm normalises too few values. Train again into "
            "another --output_dir with larger images or groups, or with a lower --learning_rate"
        )
    if (
        metrics.get("rankme", math.inf) < COLLAPSED_RANKME
        or metrics.get("uniformity", -math.inf) > COLLAPSED_UNIFORMITY
    ):
        measured = [f"{name} {metrics[name]:.3f}" for name in ("rankme", "uniformity") if name in metrics]
        found["collapse"] = (
            f"the encoder has collapsed: all images get the same feature ({', '.join(measured)}). Train again into another "
            "--output_dir with a lower --learning_rate"
            + (", or a --key_momentum nearer to 1" if config.key_encoder == "momentum" else "")
        )
    if metrics.get("leaks"):
        remedies = {
            "plain": "pass --batch_norm split (or, with several processes, shuffle)",
            "shuffle": "use several processes, or pass --batch_norm split",
            "sync": "pass --batch_norm shuffle",
            "split": "raise --batch_norm_splits",
        }
        found["leak"] = (
            f"BatchNorm leaks: {metrics['contrast_top1']:.0f} % of the queries find their key if it is normalised with the "
            f"images of its batch, {metrics['contrast_top1_shuffled']:.0f} % in a regrouped batch: the encoder learns batches, "
            f"not images. Train again into another --output_dir: {remedies[config.batch_norm]}"
        )
    return found
