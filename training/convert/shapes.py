"""What the names and shapes of a model's tensors tell: its encoder, its heads, K and dimension."""

import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modeling_moco import MoCoConfig
from modeling_moco.configuration_moco import MOST, MOST_IN_ARGUMENT, MOST_LAYERS
from modeling_moco.encoder_moco import build_encoder, build_predictor, build_projector

from .key_maps import HEADS_OF_V3, OFFICIAL_ARCH, RESNETS, VITS, State

PUBLISHED = {"linear": ("v1", 0.07), "mlp": ("v2", 0.2)}  # version and temperature of each projection head
Recognised = tuple[MoCoConfig, State, list[str]]  # the part of the state that is kept, and notes


class Shape(NamedTuple):
    """An encoder: settings of [`MoCoConfig`], and sentences about what its tensors do not show."""

    settings: dict[str, Any]
    notes: list[str]


def recognise_moco(encoder: Shape, state: State) -> Recognised:
    """The configuration of v1 or v2 from the projection head and the queue."""
    head = part(state, "projector_q.")
    for kind, (_, temperature) in PUBLISHED.items():
        config = MoCoConfig(**encoder.settings, projection_head=kind, temperature=temperature)
        last = head.get("weight" if kind == "linear" else "2.weight")
        config.projection_dim = config.projection_dim if last is None else length(last)
        with torch.device("meta"):
            projector = build_projector(config, build_encoder(config).head_hidden_size)
        if not differences(head, projector.state_dict()):
            break
    else:
        return _encoder_alone(encoder, state, head)
    version = PUBLISHED[config.projection_head][0]
    remarks = [
        f"the checkpoint has no T and m: T {config.temperature:g} and m {config.key_momentum:g} are the published values of "
        f"{version}"
    ]
    if "dictionary.queue" in state:
        config.queue_size = length(state["dictionary.queue"], axis=-1)
    else:
        remarks.append("it has no queue: loading the model starts a random queue")
    return config, state, remarks + _without_keys(state)


def recognise_v3(encoder: Shape, state: State) -> Recognised:
    """The configuration of v3 from the projection and the prediction head. T and m are the published ones of its encoder."""
    projector, predictor = part(state, "projector_q."), part(state, "predictor_q.")
    is_vit = encoder.settings["architecture"] in VITS
    layers = min(max(1, sum(x.dim() == 2 for x in projector.values())), MOST_LAYERS)
    first, last = (
        projector.get(f"{3 * index}.weight", torch.empty(0)) for index in (0, layers - 1)
    )  # BatchNorm and ReLU
    last_norm = is_vit if not predictor else "4.running_mean" in predictor
    temperature = 0.2 if is_vit else 1.0
    config = MoCoConfig(
        **encoder.settings,
        zero_init_residual=not is_vit,
        projection_head="mlp_bn",
        projection_layers=layers,
        projection_hidden_dim=length(first),
        projection_dim=length(last),
        prediction_head="mlp_bn" if last_norm else "mlp",
        dictionary="batch",
        symmetric_loss=True,
        loss_scale=2 * temperature,
        key_momentum=0.99,
        temperature=temperature,
        batch_norm="sync",
    )
    with torch.device("meta"):
        heads = build_projector(config, length(first, axis=-1)), build_predictor(config, 1)
    if differences(projector, heads[0].state_dict()) or (predictor and differences(predictor, heads[1].state_dict())):
        return _encoder_alone(encoder, state, projector | {f"predictor.{name}": x for name, x in predictor.items()})
    longer = "" if is_vit else "; m is 0.996 for those of 1,000 epochs"
    remarks = [
        f"the checkpoint has no T and m: T {temperature:g} and m 0.99, which rises to 1, are the published values of v3 for "
        f"{'ViTs' if is_vit else 'ResNets'}{longer}",
        *encoder.notes,
    ]
    if not predictor:
        remarks.append("it has no predictor: loading the model starts a new one")
    return config, state, remarks + _without_keys(state)


def _encoder_alone(encoder: Shape, state: State, head: State) -> Recognised:
    # Without the head that made the keys, the queue and the key encoder are useless.
    kept = {name: tensor for name, tensor in state.items() if name.startswith("encoder_q.")}
    shapes = few([f"{name} {tuple(tensor.shape)}" for name, tensor in head.items()]) or "none at all"
    remark = f"only the encoder is kept: the projection head ({shapes}) is not MoCo's, and the keys depend on it"
    return MoCoConfig(**encoder.settings), kept, [remark, *encoder.notes]


def _without_keys(state: State) -> list[str]:
    return [] if part(state, "encoder_k.") else ["it has no key encoder: loading the model copies the query encoder"]


def recognise_encoder(path: Path, encoder: State, arch: str | None = None) -> Shape:
    """The encoder whose tensors have these names and shapes.

    Args:
        path: for messages.
        arch: the name that the checkpoint gives it.

    Raises:
        ValueError: it is neither a ResNet of torchvision nor a plain ViT.
    """
    if "cls_token" in encoder:
        return _recognise_vit(path, encoder, arch)
    return Shape({"architecture": recognise_resnet(path, encoder)}, [])


def recognise_resnet(
    path: Path, encoder: State, names: tuple[str, ...] = RESNETS, channels: tuple[int, ...] | None = None
) -> str:
    """The name of the ResNet whose tensors have these names and shapes.

    Args:
        path: for messages.
        names: those that it may be.
        channels: of its stages before they are multiplied, where they are not the usual ones.

    Raises:
        ValueError: torchvision has no such ResNet.
    """
    if "conv1.weight" in encoder and encoder["conv1.weight"].shape[2:] == (3, 3):
        raise ValueError(
            f"{path} begins with a 3x3 convolution of unknown padding (solo-learn pads by 2, the official notebook by 1): "
            "convert a checkpoint of a ResNet with torchvision's stem"
        )
    wrong = {}
    for name in names:
        wrong[name] = differences(encoder, _resnet_state(name, channels))
        if not wrong[name]:
            return name
    nearest = min(wrong, key=lambda name: len(wrong[name]))
    raise ValueError(
        f"{path} does not contain a ResNet of torchvision; compared with {nearest}, {few(wrong[nearest])}. It is damaged or "
        "another model: download or copy it again"
    )


@cache
def _resnet_state(architecture: str, channels: tuple[int, ...] | None) -> State:
    with torch.device("meta"):
        arguments = None if channels is None else {"channels": list(channels)}
        return build_encoder(MoCoConfig(architecture=architecture, model_args=arguments)).state_dict()


def _recognise_vit(path: Path, encoder: State, arch: str | None) -> Shape:
    if "patch_embed.proj.0.weight" in encoder:
        raise ValueError(
            f"{path} contains a ViT with a convolutional stem (vit_conv_small or vit_conv_base), which timm does not have: "
            "convert one of vit_small or vit_base"
        )
    tokens, patches = (encoder.get(name, torch.empty(0)) for name in ("pos_embed", "patch_embed.proj.weight"))
    size = length(tokens, axis=-1), length(patches, axis=-1)
    name = next((name for name in VITS if VITS[name] == size), None)
    if name is None:
        raise ValueError(
            f"{path} contains a ViT of width {size[0]} with patches of {size[1]} px, and those that are read are "
            f"{', '.join(VITS)}: convert one of them"
        )
    image = min(MOST_IN_ARGUMENT, size[1] * math.isqrt(max(1, length(tokens, axis=-2) - 1)))
    arguments = {} if image == 224 else {"img_size": image}
    if arch != name and name in HEADS_OF_V3:
        arguments["num_heads"] = HEADS_OF_V3[name]
    settings = {"architecture": name, "model_args": arguments or None}
    with torch.device("meta"):
        vit = build_encoder(MoCoConfig(**settings))
    if wrong := differences(encoder, vit.state_dict()):
        raise ValueError(
            f"{path} does not contain a plain ViT; compared with {name} of {image} px, {few(wrong)}. It is damaged or another "
            "model: download or copy it again"
        )
    whose = f"{OFFICIAL_ARCH[name]} of MoCo v3" if arch != name and name in OFFICIAL_ARCH else f"timm's {name}"
    notes = [f"tensors do not show the heads of attention: {vit.blocks[0].attn.num_heads}, as {whose} has"]
    return Shape(settings | {"stem": "moco_v3"}, notes)


# Comparing tensors


def part(state: State, prefix: str) -> State:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def length(tensor: torch.Tensor, axis: int = 0) -> int:
    """The size of an axis as a setting, which is at least 1; 1 where there is no such axis."""
    return min(max(1, tensor.shape[axis]), MOST - 1) if -tensor.dim() <= axis < tensor.dim() else 1


def differences(state: State, expected: State) -> list[str]:
    """A phrase for each tensor that is missing, unexpected or of another shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    return [
        *(f"{name} is missing" for name in wanted if name not in shapes),
        *(f"{name} is unexpected" for name in shapes if name not in wanted),
        *(
            f"{name} is {shapes[name]}, not {wanted[name]}"
            for name in wanted
            if shapes.get(name, wanted[name]) != wanted[name]
        ),
    ]


def few(phrases: list[str]) -> str:
    """The first three phrases, and how many more there are."""
    printable = [repr(phrase)[1:-1] for phrase in phrases[:3]]  # names from files are printed on the terminal
    return ", ".join(printable) + (f" and {len(phrases) - 3:,} more" if len(phrases) > 3 else "")
