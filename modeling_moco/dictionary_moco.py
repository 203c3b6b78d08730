"""The dictionaries that queries are contrasted with: a queue, the batch, or a bank of all images.

Shapes: `N` local batch, `R` processes, `V` views that are queries, `C` projection_dim, `K` negatives of a query.

To add one, derive a class from `Dictionary` and register it: its name is a value of the setting `dictionary` of a model.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init

from .configuration_moco import MoCoConfig
from .distributed_moco import local_slice, to_device

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


class Dictionary(nn.Module):
    """The interface of a dictionary: what a step asks of it, and what it leaves to those that need it.

    `generator` samples what is random in a step. It must have the same state on all processes; a run seeds it by the step.
    """

    generator: torch.Generator | None = None

    @classmethod
    def from_config(cls, config: MoCoConfig) -> Self:
        """Build it for a model with this configuration."""
        return cls()

    def forward(
        self, q: torch.Tensor, keys: torch.Tensor, temperature: float, index: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of queries against their keys and those of the dictionary.

        Args:
            q: queries of this process, unit length, float32 (V, N, C).
            keys: keys of all processes in rank order, unit length, float32 (V, R·N, C).
            temperature: T > 0, which divides the similarities.
            index: numbers of the images of the queries in the dataset (N,), for a dictionary that asks for them.

        Returns:
            the mean over the queries, natural logarithm (scalar); and similarities divided by T, the positive first, without
            gradient (V·N, 1+K).
        """
        raise NotImplementedError

    @staticmethod
    def negatives(config: MoCoConfig, images: int) -> int:
        """K, the number of keys that a query is contrasted with beside its own, for a global batch of `images`."""
        return config.queue_size

    def enqueue(self, keys: torch.Tensor, index: torch.Tensor | None = None) -> None:
        """Take the keys of all processes (V·R·N, C), of the images `index` (R·N,). Called after backward."""

    def reset(self) -> None:
        """Give the tensors that no checkpoint has filled their first values."""

    def after_loading(self) -> None:
        """Called after every load."""


def fill_with_random_directions(buffer: torch.Tensor, dim: int) -> None:
    """Give a dictionary vectors along `dim` of unit length, if no checkpoint has filled it.

    They depend on torch's seed alone, and not on how many numbers were drawn since: a model that is made on the meta device and
    filled later begins as one that is made at once, and a run begins alike with every encoder.
    """
    if not buffer.is_meta:
        # Another stream than that of the weights, which are drawn from the seed itself.
        generator = torch.Generator().manual_seed(torch.initial_seed() ^ 0x5DEECE66D)
        init.copy_(buffer, F.normalize(torch.randn(buffer.shape, generator=generator, device="cpu"), dim=dim))


class QueueDictionary(Dictionary):
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

    @classmethod
    def from_config(cls, config: MoCoConfig) -> Self:
        return cls(config.projection_dim, config.queue_size)

    @torch.no_grad()
    def reset(self) -> None:
        """Fill the queue with random directions. Tensors that a checkpoint has just filled are left alone."""
        fill_with_random_directions(self.queue, dim=0)
        init.zeros_(self.queue_ptr)

    @torch.no_grad()
    def after_loading(self) -> None:
        """A queue of another size than the checkpoint's is fresh, but has the checkpoint's pointer."""
        self.queue_ptr.remainder_(self.queue.shape[1])

    def forward(self, q, keys, temperature, index=None):
        k = keys[:, local_slice(q.shape[1])]
        queue = self.queue.to(q.dtype)  # `model.half()` casts the queue too
        return info_nce(q.flatten(0, 1), k.flatten(0, 1), queue, temperature)

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor, index: torch.Tensor | None = None) -> None:
        """Overwrite the oldest keys, wrapping around at the end. Call it after backward: the queue is needed there.

        Args:
            keys: keys of all processes in rank order (V·R·N, C), at most K.

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


class BatchDictionary(Dictionary):
    """The keys of the global batch and nothing else (v1 paper, figure 2a; arXiv:2104.02057).

    A gradient reaches the keys too, where they have one.
    """

    def forward(self, q, keys, temperature, index=None):
        mine = local_slice(q.shape[1])
        own = torch.arange(mine.start, mine.stop, device=q.device)[:, None].expand(len(q), -1, -1)  # (V, N, 1)
        l_pos = (q * keys[:, mine]).sum(dim=2, keepdim=True)  # (V, N, 1)
        l_neg = [(q @ some.mT).scatter(2, own, -torch.inf) for some in self.contrasted(keys)]  # (V, N, R·N) each
        logits = torch.cat([l_pos, *l_neg], dim=2).flatten(0, 1) / temperature
        return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long)), logits.detach()

    def contrasted(self, keys: torch.Tensor) -> list[torch.Tensor]:
        """The keys (V, R·N, C) that queries of each view are contrasted with."""
        return [keys]

    @staticmethod
    def negatives(config: MoCoConfig, images: int) -> int:
        return images - 1


class BothViewsDictionary(BatchDictionary):
    """Both views of all other images of the global batch: the loss is NT-Xent (arXiv:2002.05709, equation 1)."""

    def contrasted(self, keys: torch.Tensor) -> list[torch.Tensor]:
        return [keys, keys.flip(0)]

    @staticmethod
    def negatives(config: MoCoConfig, images: int) -> int:
        return 2 * (images - 1)


class BankDictionary(Dictionary):
    """One key for every image of the dataset, the moving average of what it was encoded to (arXiv:1805.01978).

    The positive of a query is the key of its image. Its negatives are K keys that are drawn once for the batch, with
    replacement, the image's own not excluded. Buffer: `bank` (images, C), float32, rows of unit length.
    """

    bank: torch.Tensor

    def __init__(self, dim: int, images: int, size: int, momentum: float):
        super().__init__()
        if images < 1:
            raise ValueError(f"bank_size ({images}) must be the number of images of the dataset")
        self.size, self.momentum = size, momentum
        self.register_buffer("bank", torch.empty(images, dim, dtype=torch.float32))
        self.reset()

    @classmethod
    def from_config(cls, config: MoCoConfig) -> Self:
        return cls(config.projection_dim, config.bank_size, config.queue_size, config.bank_momentum)

    @torch.no_grad()
    def reset(self) -> None:
        """Fill the bank with random directions. Tensors that a checkpoint has just filled are left alone."""
        fill_with_random_directions(self.bank, dim=1)

    def forward(self, q, keys, temperature, index=None):
        # On the CPU, so that all processes draw the same ones.
        drawn = torch.randint(len(self.bank), (self.size,), generator=self.generator, device="cpu")
        negatives = self.bank[to_device(q.device, drawn)].T
        return info_nce(q[0], self.bank[index].to(q.dtype), negatives.to(q.dtype), temperature)

    def enqueue(self, keys: torch.Tensor, index: torch.Tensor | None = None) -> None:
        """Move the keys of the images `index` (R·N,) towards `keys` (R·N, C)."""
        self.store(keys, index, self.momentum)

    @torch.no_grad()
    def store(self, keys: torch.Tensor, index: torch.Tensor | None, momentum: float) -> None:
        """Of an image that is there more than once, the last key counts: so all processes keep the same bank."""
        assert index is not None
        last = len(index) - 1 - (index[:, None] == index.flip(0)).int().argmax(dim=1)
        averaged = torch.lerp(keys[last].to(self.bank.dtype), self.bank[index], momentum)
        self.bank.index_copy_(0, index, F.normalize(averaged, dim=1))


DICTIONARIES: dict[str, type[Dictionary]] = {
    "queue": QueueDictionary,
    "batch": BatchDictionary,
    "batch_both_views": BothViewsDictionary,
    "bank": BankDictionary,
}
BUILT_IN = frozenset(DICTIONARIES)


def register_dictionary(name: str, kind: type[Dictionary]) -> None:
    """Make a class of dictionaries known as a value of `MoCoConfig.dictionary`, in this process.

    Args:
        kind: a [`Dictionary`].

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


def negatives(config: MoCoConfig, images: int) -> int:
    """K, the number of keys that a query is contrasted with beside its own, for a global batch of `images`."""
    check_dictionary(config.dictionary)
    return DICTIONARIES[config.dictionary].negatives(config, images)


def build_dictionary(config: MoCoConfig) -> Dictionary:
    check_dictionary(config.dictionary)
    return DICTIONARIES[config.dictionary].from_config(config)
