"""The heads after the encoder: projections to queries and keys, and the prediction of MoCo v3.

Shapes: `D` feature width, `C` projection_dim.
"""

from itertools import pairwise

from torch import nn

from .configuration_moco import MoCoConfig

# Of a projection: whether it has BatchNorm, and what its last one trains.
WITH_BATCH_NORM = {"mlp_bn": "nothing", "simclr": "scale"}


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
