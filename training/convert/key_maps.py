"""Tables of the tensor names in checkpoints of other MoCo code, and the names by which a checkpoint is recognised.

Sources: facebookresearch/moco (main_moco.py, moco/builder.py, main_lincls.py, detection/convert-pretrain-to-detectron2.py),
facebookresearch/moco-v3 (main_moco.py, moco/builder.py, vits.py, main_lincls.py),
lightly (examples/pytorch*/moco.py, benchmarks/imagenet/resnet50/mocov2.py), solo-learn (solo/methods/mocov2plus.py),
facebookresearch/detectron2 (modeling/). Each table is used in both directions.
"""

from typing import NamedTuple

import torch

State = dict[str, torch.Tensor]
Names = dict[str, str]  # prefix in the other code to prefix in this project; the first prefix that fits is used

WRAPPED = "module."  # prefix of every name in a model that DistributedDataParallel wraps

# torchvision's ResNets. timm uses the same names, and their tensor shapes identify them.
RESNETS = (
    *("resnet50", "resnet18", "resnet34", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
# Plain ViTs of timm, and what identifies them: width, and pixels of a patch. moco-v3's have the same names of tensors.
VITS = {
    "vit_small_patch16_224": (384, 16),
    "vit_base_patch16_224": (768, 16),
    "vit_large_patch16_224": (1024, 16),
    "vit_tiny_patch16_224": (192, 16),
    "vit_small_patch32_224": (384, 32),
    "vit_base_patch32_224": (768, 32),
}
OFFICIAL_ARCH = {"vit_small_patch16_224": "vit_small", "vit_base_patch16_224": "vit_base"}  # as moco-v3 calls them
HEADS_OF_V3 = {"vit_small_patch16_224": 12}  # of attention, where timm's ViT has others: no tensor shows them
OFFICIAL = {
    "queue": "dictionary.queue",  # and queue_ptr
    "encoder_q.fc.": "projector_q.",
    "encoder_q.": "encoder_q.",
    "encoder_k.fc.": "projector_k.",
    "encoder_k.": "encoder_k.",
}
CLASSIFIER = {"fc.": "classifier.", "": "moco.encoder_q."}
CLASSIFIER_VIT = {"head.": "classifier.", "": "moco.encoder_q."}


def _official_v3(head: str) -> Names:
    return {
        f"base_encoder.{head}": "projector_q.",
        "base_encoder.": "encoder_q.",
        f"momentum_encoder.{head}": "projector_k.",
        "momentum_encoder.": "encoder_k.",
        "predictor.": "predictor_q.",
    }


OFFICIAL_V3, OFFICIAL_V3_VIT = _official_v3("fc."), _official_v3("head.")
OF_THE_OFFICIAL_CODE = (OFFICIAL, OFFICIAL_V3, OFFICIAL_V3_VIT, CLASSIFIER, CLASSIFIER_VIT)
WITHOUT_HEAD = {"": "encoder_q."}
WITH_HEAD = {"fc.": "projector_q.", "": "encoder_q."}
CHILDREN = {"0.": "conv1.", "1.": "bn1.", "4.": "layer1.", "5.": "layer2.", "6.": "layer3.", "7.": "layer4."}
BLOCKS = {  # parts of torchvision's names, and of detectron2's
    **{f"bn{i}.": f"conv{i}.norm." for i in (1, 2, 3)},
    "downsample.0.": "shortcut.",
    "downsample.1.": "shortcut.norm.",
}
DETECTRON2 = {f"layer{i}.": f"res{i + 1}." for i in (1, 2, 3, 4)} | BLOCKS  # names outside `res` get the prefix `stem.`
DETECTOR = {  # detectron2's C4 with MoCo's extra norm; in the blocks, `BLOCKS` too
    **{f"backbone.res{i + 1}.": f"moco.encoder_q.layer{i}." for i in (1, 2, 3)},
    "roi_heads.res5.norm.": "norm.",
    "roi_heads.res5.": "moco.encoder_q.layer4.",
    "backbone.stem.": "moco.encoder_q.",
    "proposal_generator.rpn_head.conv.": "proposals.conv.",
    "proposal_generator.rpn_head.objectness_logits.": "proposals.objectness.",
    "proposal_generator.rpn_head.anchor_deltas.": "proposals.deltas.",
    "roi_heads.box_predictor.cls_score.": "cls_score.",
    "roi_heads.box_predictor.bbox_pred.": "bbox_pred.",
    "roi_heads.mask_head.deconv.": "mask_deconv.",
    "roi_heads.mask_head.predictor.": "mask_predictor.",
}
BUFFERS = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.")  # in old checkpoints of detectron2


def _children(there: str, here: str) -> Names:
    """Prefixes of an encoder that is `nn.Sequential(*resnet.children())` or a ResNet."""
    return {f"{there}{index}": f"{here}{name}" for index, name in CHILDREN.items()} | {there: here}


class Layout(NamedTuple):
    """A kind of checkpoint.

    Args:
        title: its name in messages.
        signature: prefixes of names; no other kind contains all of them.
        names: prefixes of its tensors, after a leading `WRAPPED` is removed.
        left_out: prefixes of tensors that a MoCo model does not have.
    """

    title: str
    signature: tuple[str, ...]
    names: Names
    left_out: tuple[str, ...] = ()


LAYOUTS = (
    Layout("official MoCo", ("encoder_q.conv1.",), OFFICIAL),
    Layout("official MoCo", ("base_encoder.conv1.",), OFFICIAL_V3),
    Layout("official MoCo", ("base_encoder.cls_token",), OFFICIAL_V3_VIT),
    Layout("official linear classifier", ("conv1.", "fc.", "arch"), CLASSIFIER),
    Layout("official linear classifier", ("cls_token", "head.", "arch"), CLASSIFIER_VIT),
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
    Layout(  # in this layout the plain names belong to the key encoder
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
    Layout("detectron2 detector of MoCo", ("backbone.stem.", "roi_heads.res5.norm."), DETECTOR, BUFFERS),
)
FOREIGN = (
    (("student", "teacher"), "a DINO checkpoint (student and teacher)"),
    (
        ("proposal_generator.", "roi_heads.res5."),
        "a detector of detectron2 without the norm behind res5 that MoCo's detection code adds (no BatchNorm stands for none)",
    ),
    (("proposal_generator.",), "a detector of detectron2 that is not R50-C4"),
    (("encoder_q.net.",), "a checkpoint of the official CIFAR-10 notebook"),
    (("momentum_backbone.",), "a checkpoint of another solo-learn method"),
    (
        ("conv1.", "layer1."),
        "the weights of a ResNet alone, which timm and torchvision load themselves (a run begins with a folder that "
        "timm.models.save_for_hf writes)",
    ),
)


def rename(name: str, names: Names) -> str | None:
    """`name` with its prefix in `names` replaced; None if it has none of them."""
    return next((new + name[len(old) :] for old, new in names.items() if name.startswith(old)), None)


def rename_back(state: State, names: Names) -> State:
    """The tensors that `names` covers, under their names in the other code."""
    back = {here: there for there, here in names.items()}
    renamed = {rename(name, back): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in renamed.items() if name is not None}
