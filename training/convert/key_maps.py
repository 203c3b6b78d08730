"""How other MoCo code names the tensors of a checkpoint, and by which names each kind is known.

Sources: facebookresearch/moco (main_moco.py, moco/builder.py, main_lincls.py, detection/convert-pretrain-to-detectron2.py),
lightly (examples/pytorch*/moco.py, benchmarks/imagenet/resnet50/mocov2.py), solo-learn (solo/methods/mocov2plus.py). A table
serves both directions.
"""

from typing import NamedTuple

import torch

State = dict[str, torch.Tensor]
Names = dict[str, str]  # how a name begins there: how it begins here. Of several that fit, the first counts

WRAPPED = "module."  # before every name of what DistributedDataParallel wraps

# torchvision's ResNets, which timm has under the same names, and whose shapes tell all of them apart.
RESNETS = (
    *("resnet50", "resnet18", "resnet34", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
OFFICIAL = {
    "queue": "dictionary.queue",  # and queue_ptr
    "encoder_q.fc.": "projector_q.",
    "encoder_q.": "encoder_q.",
    "encoder_k.fc.": "projector_k.",
    "encoder_k.": "encoder_k.",
}
CLASSIFIER = {"fc.": "classifier.", "": "moco.encoder_q."}
WITHOUT_HEAD = {"": "encoder_q."}
WITH_HEAD = {"fc.": "projector_q.", "": "encoder_q."}
CHILDREN = {"0.": "conv1.", "1.": "bn1.", "4.": "layer1.", "5.": "layer2.", "6.": "layer3.", "7.": "layer4."}
DETECTRON2 = {  # parts of torchvision's names; what lies outside `res` has `stem.` before it
    **{f"layer{i}.": f"res{i + 1}." for i in (1, 2, 3, 4)},
    **{f"bn{i}.": f"conv{i}.norm." for i in (1, 2, 3)},
    "downsample.0.": "shortcut.",
    "downsample.1.": "shortcut.norm.",
}


def _children(there: str, here: str) -> Names:
    """Of an encoder that is `nn.Sequential(*resnet.children())`, or the ResNet itself."""
    return {f"{there}{index}": f"{here}{name}" for index, name in CHILDREN.items()} | {there: here}


class Layout(NamedTuple):
    """A kind of checkpoint.

    Args:
        title: for messages.
        marks: beginnings of names that no other kind has all of.
        names: of its tensors, a leading `WRAPPED` apart.
        left_out: beginnings of names that have no place in a MoCo model.
    """

    title: str
    marks: tuple[str, ...]
    names: Names
    left_out: tuple[str, ...] = ()


LAYOUTS = (
    Layout("official MoCo", ("encoder_q.conv1.",), OFFICIAL),
    Layout("official linear classifier", ("conv1.", "fc.", "arch"), CLASSIFIER),
    Layout(
        "lightly MoCo",
        ("backbone_momentum.", "projection_head_momentum."),
        {
            **_children("backbone.", "encoder_q."),
            "projection_head.layers.": "projector_q.",
            **_children("backbone_momentum.", "encoder_k."),
            "projection_head_momentum.layers.": "projector_k.",
        },
        ("criterion.",),
    ),
    Layout(  # here the plain names are the key encoder's
        "lightly benchmark MoCo",
        ("query_backbone.", "query_projection_head."),
        {
            **_children("query_backbone.", "encoder_q."),
            "query_projection_head.layers.": "projector_q.",
            **_children("backbone.", "encoder_k."),
            "projection_head.layers.": "projector_k.",
        },
        ("criterion.", "online_classifier."),
    ),
    Layout(
        "solo-learn MoCo",
        ("momentum_backbone.", "momentum_projector.", "queue"),
        {
            "queue": "dictionary.queue",
            "projector.": "projector_q.",
            "backbone.": "encoder_q.",
            "momentum_projector.": "projector_k.",
            "momentum_backbone.": "encoder_k.",
        },
        ("classifier.", "momentum_classifier."),
    ),
)
FOREIGN = (
    (("student", "teacher"), "a DINO checkpoint (student and teacher)"),
    (("base_encoder.", "momentum_encoder."), "a MoCo v3 checkpoint (no queue)"),
    (("encoder_q.net.",), "a checkpoint of the official CIFAR-10 notebook"),
    (("momentum_backbone.",), "a checkpoint of another solo-learn method"),
    (("conv1.", "layer1."), "the weights of a ResNet alone, which timm and torchvision load themselves"),
)


def rename(name: str, names: Names) -> str | None:
    return next((new + name[len(old) :] for old, new in names.items() if name.startswith(old)), None)


def rename_back(state: State, names: Names) -> State:
    """The tensors that `names` speaks of, under their names there."""
    back = {here: there for there, here in names.items()}
    renamed = {rename(name, back): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in renamed.items() if name is not None}
