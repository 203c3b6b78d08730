"""The encoder of a configuration, any timm model with the configured first layers and first values, and the heads after it.

With gradient checkpointing its BatchNorm counts a batch once, though the batch is encoded again.
Shapes: `D` feature width, `C` projection_dim.
"""

import difflib
import inspect
import math
from itertools import pairwise
from typing import Any

import timm
import torch
from torch import nn

from .configuration_moco import MoCoConfig

OF_TIMM = inspect.signature(timm.create_model).parameters.keys()  # where weights come from, and the like
TimmEncoder = Any  # timm has no type for "a model with forward_features, forward_head and feature_info"
# Of a projection: whether it has BatchNorm, and what its last one trains.
WITH_BATCH_NORM = {"mlp_bn": "nothing", "simclr": "scale"}


def build_encoder(config: MoCoConfig) -> TimmEncoder:
    """Build the timm model of a configuration, without classifier and with the configured stem.

    Its BatchNorm is torch's: what `config.batch_norm` names is for contrastive training alone.

    Raises:
        ValueError: timm has no such model, it refuses `model_args`, or it cannot have this stem.
    """
    if not timm.is_model(config.architecture):
        close = difflib.get_close_matches(config.architecture, timm.list_models()) or timm.list_models("resnet*")[:3]
        raise ValueError(f"architecture ({config.architecture!r}) is not a timm model: try {', '.join(close)}")
    if refused := (config.model_args or {}).keys() & OF_TIMM:
        raise ValueError(
            f"model_args ({config.model_args}) may not have {min(refused)}, which is no argument of {config.architecture}: "
            "weights come from a model's own folder"
        )
    try:
        encoder = timm.create_model(config.architecture, pretrained=False, num_classes=0, **(config.model_args or {}))
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"model_args ({config.model_args}) do not fit {config.architecture}: {error}") from error
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()  # timm starts the last one of a residual block at 0, the official code at 1
    if config.zero_init_residual:
        _zero_residuals(encoder, config)
    if config.stem == "moco_v3":
        _set_stem_of_vit(encoder, config)
    mark_initialised(encoder)
    if config.stem in ("no_max_pool", "small"):
        _check_is(timm.models.ResNet, encoder, f"stem={config.stem!r} is for ResNets", config)
        encoder.maxpool = nn.Identity()
        if config.stem == "small":
            encoder.conv1 = nn.Conv2d(3, encoder.bn1.num_features, kernel_size=3, stride=1, padding=1, bias=False)
    return encoder


def _check_is(kind: type, encoder: TimmEncoder, rule: str, config: MoCoConfig) -> None:
    if not isinstance(encoder, kind):
        raise ValueError(f"{rule}, not for {config.architecture}: leave it at its default")


def _zero_residuals(encoder: TimmEncoder, config: MoCoConfig) -> None:
    _check_is(timm.models.ResNet, encoder, "zero_init_residual=True is for ResNets", config)
    for module in encoder.modules():
        if hasattr(module, "zero_init_last"):  # timm's blocks
            module.zero_init_last()


@torch.no_grad()
def _set_stem_of_vit(encoder: TimmEncoder, config: MoCoConfig) -> None:
    # The initialisation of MoCo v3 (arXiv:2104.02057, vits.py): xavier everywhere, q, k and v apart, which timm has too.
    _check_is(timm.models.VisionTransformer, encoder, f"stem={config.stem!r} is for ViTs", config)
    encoder.init_weights("moco")
    patches = encoder.patch_embed.proj
    if encoder.pos_embed is None or not isinstance(patches, nn.Conv2d):
        raise ValueError(f"stem={config.stem!r} needs positions and patches of a ViT: choose another architecture")
    bound = math.sqrt(6 / (patches.weight[0].numel() + encoder.embed_dim))
    nn.init.uniform_(patches.weight, -bound, bound)
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)
    height, width = encoder.patch_embed.grid_size
    positions = fixed_positions(height, width, encoder.embed_dim)
    encoder.pos_embed.zero_()  # of the class token too
    encoder.pos_embed[0, -len(positions) :] = positions


def fixed_positions(height: int, width: int, dim: int) -> torch.Tensor:
    """Sine and cosine of the row and of the column of every patch, as MoCo v3 has them: (height·width, dim).

    A quarter of the numbers each: sine and cosine of the row, then of the column, with `dim / 4` wavelengths.

    Raises:
        ValueError: `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"the width of the ViT ({dim}) must be a multiple of 4 for stem='moco_v3'")
    frequencies = 10_000 ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (row, column)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def freeze_stem(encoder: TimmEncoder, config: MoCoConfig) -> None:
    """Keep the patch projection and the positions of a ViT as they are, where contrastive training has this trick."""
    if config.stem == "moco_v3":
        encoder.patch_embed.requires_grad_(False)
        encoder.pos_embed.requires_grad_(False)


def build_projector(config: MoCoConfig, dim: int) -> nn.Module:
    """The head from features (N, D) to vectors (N, C), which a query and its key are after normalisation."""
    if config.projection_head == "linear":
        return nn.Linear(dim, config.projection_dim)
    hidden = [config.projection_hidden_dim or dim] * (config.projection_layers - 1)
    widths = [dim, *hidden, config.projection_dim]
    return _mlp(widths, WITH_BATCH_NORM.get(config.projection_head))


def build_predictor(config: MoCoConfig, dim: int) -> nn.Module:
    """The head from the projection of a query to its key's (N, C), without a moving average; or nothing."""
    if config.prediction_head == "none":
        return nn.Identity()
    c = config.projection_dim
    widths = [c, config.projection_hidden_dim or dim, c]
    return _mlp(widths, "nothing", last_norm=config.prediction_head == "mlp_bn")


def _mlp(widths: list[int], batch_norm: str | None, last_norm: bool = True) -> nn.Module:
    # BatchNorm makes the biases before it void: the published heads with it have none.
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers.append(nn.Linear(before, after, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(after))
        layers.append(nn.ReLU())
    layers.append(nn.Linear(widths[-2], widths[-1], bias=not batch_norm))
    if batch_norm and last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=batch_norm == "scale"))
        layers[-1].register_parameter("bias", None)
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def tensors(module: nn.Module, recurse: bool = True) -> list[torch.Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def mark_initialised(module: nn.Module) -> None:
    # transformers marks tensors that it has loaded, and its initialisation leaves tensors with the mark alone. Tensors on the
    # meta device have no values to keep.
    for tensor in tensors(module):
        setattr(tensor, "_is_hf_initialized", not tensor.is_meta)  # noqa: B010


def is_new(module: nn.Module) -> bool:
    """Whether the module itself has a tensor without a value: neither loaded nor made by timm."""
    return not all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors(module, recurse=False))


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
