"""The dictionary that queries are contrasted with.

Shapes: `N` local batch, `R` processes, `C` projection_dim, `K` queue_size.

A dictionary is a module with three methods: `forward(q, k, temperature)` returns the loss and the logits,
`enqueue(keys)` is told the keys of all processes after the backward pass, and `after_loading()` follows every load. A fourth,
`reset()`, gives the tensors that no checkpoint has their first values. To add one, write the class and register it: its name is
a value of the setting `dictionary` of a model.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init

from .configuration_moco import MoCoConfig

COLUMNS = 8192  # columns of the queue to process at once: 1 MB for 32 queries, which fits into a CPU cache


class InfoNCE(torch.autograd.Function):
    """`F.cross_entropy(torch.cat([l_pos, l_neg], dim=1) / T, zeros)`, with the logits as its only matrix of N x (1+K).

    With torch's own operations three are held at once.
    """

    @staticmethod
    def forward(ctx, q, k, queue, temperature):
        logits = q.new_empty(len(q), 1 + queue.shape[1])
        torch.sum(q * k / temperature, dim=1, out=logits[:, 0])
        torch.mm(q / temperature, queue, out=logits[:, 1:])
        columns = logits.split(COLUMNS, dim=1)
        parts = logits.new_empty(len(columns), len(q))
        for part, some in zip(parts, columns, strict=True):
            torch.logsumexp(some, dim=1, out=part)
        normaliser = parts.logsumexp(dim=0)  # (N,)
        ctx.save_for_backward(k, queue, logits, normaliser)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(logits)
        ctx.set_materialize_grads(False)  # backward needs no matrix of zeros as gradient of the logits
        return (normaliser - logits[:, 0]).mean(), logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return None, None, None, None
        k, queue, logits, normaliser = ctx.saved_tensors
        # The expected key under the softmax minus the positive, over T: (softmax(logits) @ [k; queue] - k) / T
        grad = ((logits[:, 0] - normaliser).exp() - 1)[:, None] * k
        for l_neg, keys in zip(logits[:, 1:].split(COLUMNS, dim=1), queue.split(COLUMNS, dim=1), strict=True):
            grad.addmm_((l_neg - normaliser[:, None]).exp_(), keys.T)
        return grad * (grad_loss / (ctx.temperature * len(logits))), None, None, None


def info_nce(
    q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE (v1 paper, equation 1) of queries against their own key and a queue. Only `q` gets a gradient.

    Args:
        q: queries, unit length (N, C).
        k: the positive of each, unit length (N, C).
        queue: negatives of all, columns of unit length (C, K).
        temperature: T > 0.

    Returns:
        the mean over the queries, natural logarithm (scalar); and similarities divided by T, the positive first, without
        gradient (N, 1+K). Backward reads them, and raises a RuntimeError if they were changed.
    """
    if torch.compiler.is_compiling():  # torch.compile and torch.export cannot follow `out=` into parts of a tensor
        l_pos = (q * k / temperature).sum(dim=1, keepdim=True)
        logits = torch.cat([l_pos, q / temperature @ queue], dim=1)
        return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long)), logits.detach()
    return InfoNCE.apply(q, k, queue, temperature)


class QueueDictionary(nn.Module):
    """First in, first out: the K newest keys of all processes (arXiv:1911.05722, section 3.2).

    Buffers, named as in the official checkpoints: `queue` (C, K) in float32 whatever the dtype that a model is loaded in,
    columns of unit length; `queue_ptr` (1,), the column that the next key overwrites.
    """

    queue: torch.Tensor
    queue_ptr: torch.Tensor

    def __init__(self, dim: int, size: int):
        super().__init__()
        # An explicit dtype survives `from_pretrained(dtype=torch.bfloat16)`, where a default one is cast.
        self.register_buffer("queue", torch.empty(dim, size, dtype=torch.float32))
        self.register_buffer("queue_ptr", torch.empty(1, dtype=torch.long))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Fill the queue with random directions. Tensors that a checkpoint has just filled are left alone."""
        init.copy_(self.queue, F.normalize(torch.randn_like(self.queue), dim=0))
        init.zeros_(self.queue_ptr)

    @torch.no_grad()
    def after_loading(self) -> None:
        """A queue of another size than the checkpoint's is fresh, but has the checkpoint's pointer."""
        self.queue_ptr.remainder_(self.queue.shape[1])

    def forward(self, q: torch.Tensor, k: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss (scalar) and logits (N, 1+K) of queries and their own keys, both float32 (N, C). See `info_nce`."""
        return info_nce(q, k, self.queue.to(q.dtype), temperature)  # `model.half()` casts the queue too

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Overwrite the oldest keys, wrapping around at the end. Call it after backward: the queue is needed there.

        Args:
            keys: keys of all processes in rank order (R·N, C), R·N <= K.

        Raises:
            ValueError: more keys than the queue holds.
        """
        size = self.queue.shape[1]
        if len(keys) > size:
            raise ValueError(
                f"queue_size ({size}) is smaller than the keys of a global batch ({len(keys)}): raise it or lower the batch"
            )
        # Index arithmetic stays on the device: reading the pointer would make the host wait for the GPU.
        columns = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % size
        self.queue.index_copy_(1, columns, keys.T.to(self.queue.dtype))
        self.queue_ptr.add_(len(keys)).remainder_(size)


# Of each, the class that is built from projection_dim and queue_size.
DICTIONARIES: dict[str, Callable[[int, int], nn.Module]] = {"queue": QueueDictionary}


def register_dictionary(name: str, kind: Callable[[int, int], nn.Module]) -> None:
    """Make a class of dictionaries known as a value of `MoCoConfig.dictionary`, in this process.

    Args:
        kind: has the methods of [`QueueDictionary`] and is built in the same way, from C and K.

    Raises:
        ValueError: the name has another class.
    """
    if DICTIONARIES.setdefault(name, kind) is not kind:
        raise ValueError(f"dictionary ({name!r}) is registered already, for {DICTIONARIES[name]}: choose another name")


def check_dictionary(name: str) -> None:
    """
    Raises:
        ValueError: no class is registered under this name.
    """
    if name not in DICTIONARIES:
        raise ValueError(
            f"dictionary ({name!r}) is none of {', '.join(DICTIONARIES)}: call register_dictionary first, or pass "
            "momentum_encoder=False for features alone"
        )


def build_dictionary(config: MoCoConfig) -> nn.Module:
    check_dictionary(config.dictionary)
    return DICTIONARIES[config.dictionary](config.projection_dim, config.queue_size)
