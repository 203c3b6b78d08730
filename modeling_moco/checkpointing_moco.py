"""Gradient checkpointing of encoders with BatchNorm."""

from typing import Any

import torch
from torch import nn


def spare_statistics(encoder: nn.Module) -> list[Any]:
    """Let BatchNorm count every batch once, though checkpointing encodes it again. Returns handles, whose `remove` ends it."""
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(_spare_statistics) for norm in norms]
    # Always: torch ends the second pass by an exception, once it has all that it needs.
    return hooks + [norm.register_forward_hook(_restore_statistics, always_call=True) for norm in norms]


def _spare_statistics(norm: Any, args: Any) -> None:
    # Gradient checkpointing encodes the images again within the backward pass. BatchNorm would count them twice, so that it
    # gets copies of its statistics to change.
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return
    if "spared" not in vars(norm):  # a classifier and the encoder in it both ask for this
        norm.spared = dict(norm.named_buffers(recurse=False))
        for name, buffer in norm.spared.items():
            setattr(norm, name, buffer.clone())


def _restore_statistics(norm: nn.Module, args: Any, output: Any) -> None:
    for name, buffer in vars(norm).pop("spared", {}).items():
        setattr(norm, name, buffer)
