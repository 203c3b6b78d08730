"""LARS (arXiv:1708.03888) as SimCLR and as MoCo v3 train with it.

timm's `Lars` is neither: it divides by |gradient| + weight_decay * |weight|, where both divide by the norm of the sum, adapts
biases too, and has the rate outside the buffer alone. So one short class has both forms.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Lars(Optimizer):
    """SGD with momentum whose step for a weight is in proportion to the norm of the weight.

    With g = gradient + weight_decay * weight, the trust ratio is trust_coefficient * |weight| / |g|, and 1 where either norm is
    0. Parameters of at most one dimension, which are biases and those of normalisation, have neither weight decay nor a trust
    ratio. Norms and ratios stay on the device: no step waits for them.

    Args:
        params: parameters or groups of them, as torch's optimizers take.
        lr: learning rate.
        momentum: of the buffer.
        weight_decay: of parameters of more than one dimension.
        trust_coefficient: eta, with which the trust ratio begins.
        classic: where the rate belongs. False is MoCo v3's (moco-v3 optimizer.py) and torch's: the buffer sums g, and the
            weight moves by lr * buffer. True is SimCLR's (google-research/simclr lars_optimizer.py): the buffer sums lr * g, so
            that a step keeps the rate that it was made with. They are the same as long as the rate is.

    Raises:
        ValueError: a number is below 0.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        classic: bool = False,
    ):
        numbers = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        for name, value in numbers.items():
            if not value >= 0:
                raise ValueError(f"{name} ({value}) must be at least 0")
        super().__init__(params, numbers | {"classic": classic})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step(params, group)
        return loss

    def _step(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        updates = _updates(params, group["weight_decay"], group["trust_coefficient"])
        inside, outside = (group["lr"], 1.0) if group["classic"] else (1.0, group["lr"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates, alpha=inside)
        torch._foreach_add_(params, buffers, alpha=-outside)


def _updates(params: list[torch.Tensor], weight_decay: float, trust_coefficient: float) -> list[torch.Tensor]:
    """The gradients, those of more than one dimension with weight decay and times their trust ratio."""
    updates: list[Any] = [p.grad for p in params]
    places = [i for i, p in enumerate(params) if p.ndim > 1]
    if not places:
        return updates
    weights = [params[i] for i in places]
    decayed = torch._foreach_add([updates[i] for i in places], weights, alpha=weight_decay)
    ratios = [
        torch.where((w > 0) & (g > 0), trust_coefficient * w / g, 1.0)
        for w, g in zip(torch._foreach_norm(weights), torch._foreach_norm(decayed), strict=True)
    ]
    torch._foreach_mul_(decayed, ratios)
    for i, update in zip(places, decayed, strict=True):
        updates[i] = update
    return updates
