"""The dictionary that queries are contrasted with.

Shapes: `N` local batch, `R` processes, `C` projection_dim, `K` queue_size.

A dictionary is a module with three methods: `forward(q, k)` returns the similarities and the place of the positive among
them, `enqueue(keys)` is told the keys of all processes after the backward pass, and `after_loading()` follows every
load. To add one, write the class and return it from `build_dictionary`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_moco import MoCoConfig


class QueueDictionary(nn.Module):
    """First in, first out: the K newest keys of all processes (arXiv:1911.05722, section 3.2).

    Buffers, named as in the official checkpoints: `queue` (C, K) in float32 whatever the model's dtype, columns of unit
    length; `queue_ptr` (1,), the column that the next key overwrites.
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

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarity of every query to its own key and to the whole queue.

        Args:
            q: queries of this process, unit length, float32 (N, C).
            k: keys of this process, unit length, float32 (N, C).

        Returns:
            similarities in [-1, 1] (N, 1+K), the positive first; and the index of the positive, all zeros (N,).
        """
        l_pos = (q * k).sum(dim=1, keepdim=True)  # (N, 1)
        l_neg = q @ self.queue  # (N, K)
        labels = torch.zeros(len(q), dtype=torch.long, device=q.device)
        return torch.cat([l_pos, l_neg], dim=1), labels

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


def build_dictionary(config: MoCoConfig) -> nn.Module:
    return QueueDictionary(config.projection_dim, config.queue_size)
