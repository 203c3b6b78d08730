"""Names of the official checkpoints and ours.

Official: `encoder_q` is a torchvision ResNet whose `fc` is the projection head. Ours keeps encoder and projector apart.
"""

import re

import torch


def from_official(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of [`MoCoModel`] from the official names (`[module.]encoder_q.*`, `encoder_k.*`, `queue`, `queue_ptr`)."""
    return {_our_name(name.removeprefix("module.")): tensor for name, tensor in state_dict.items()}


def _our_name(name: str) -> str:
    name = re.sub(r"^encoder_([qk])\.fc\.", r"projector_\1.", name)
    return re.sub(r"^(queue|queue_ptr)$", r"dictionary.\1", name)
