"""Detectors under detectron2's names: R50-C4 as the `detection/` folder of the official code trains it, and back.

A checkpoint of detectron2 has the weights alone. What it was trained with is in its configuration, which stays with the user.
Sources: facebookresearch/detectron2 (checkpoint/, modeling/), facebookresearch/moco (detection/train_net.py and configs).
"""

from pathlib import Path
from typing import Any

import torch

from modeling_moco import MoCoConfig, MoCoDetectionImageProcessor, MoCoRCNNConfig
from modeling_moco.rpn_moco import make_anchors

from ..errors import shown
from .key_maps import BLOCKS, DETECTOR, State, rename_back
from .shapes import Recognised, length, part, recognise_resnet

SUFFIX = ".pth"  # detectron2 reads other files by other rules
COUNTERS = "num_batches_tracked"  # which BatchNorm has, and detectron2's frozen one has not
MOST_CHANNELS = 2048
# DEPTH, NUM_GROUPS and WIDTH_PER_GROUP of MODEL.RESNETS. The others have no stage of three bottlenecks, as its C4 has.
RESNETS = {
    "resnet50": (50, 1, 64),
    "resnet101": (101, 1, 64),
    "resnet152": (152, 1, 64),
    "wide_resnet50_2": (50, 1, 128),
    "wide_resnet101_2": (101, 1, 128),
    "resnext50_32x4d": (50, 32, 4),
    "resnext101_32x8d": (101, 32, 8),
    "resnext101_64x4d": (101, 64, 4),
}
SETTINGS = {  # ours, and the key of detectron2's configuration
    "masks": "MODEL.MASK_ON",
    "anchor_sizes": "MODEL.ANCHOR_GENERATOR.SIZES",
    "anchor_ratios": "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
    "rpn_pre_nms_train": "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
    "rpn_pre_nms_test": "MODEL.RPN.PRE_NMS_TOPK_TEST",
    "rpn_post_nms_train": "MODEL.RPN.POST_NMS_TOPK_TRAIN",
    "rpn_post_nms_test": "MODEL.RPN.POST_NMS_TOPK_TEST",
    "rpn_samples": "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
    "roi_samples": "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "roi_side": "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
    "score_threshold": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "nms_threshold": "MODEL.ROI_HEADS.NMS_THRESH_TEST",
    "max_detections": "TEST.DETECTIONS_PER_IMAGE",
}
SIDES = {"shortest_edge": "INPUT.MIN_SIZE_TEST", "longest_edge": "INPUT.MAX_SIZE_TEST"}  # of an image processor
LISTS_OF_LISTS = ("anchor_sizes", "anchor_ratios")  # one list for each map of features
NORMS = {"sync": "naiveSyncBN", "plain": "BN", "frozen": "FrozenBN"}
NOT_IN_THE_FILE = (
    "the file has no names of classes, anchors, thresholds and sizes of images: classes are LABEL_0 and on, and the rest is "
    "that of MoCo's configurations",
    "nor has it the order of colours and the place of the stride: RGB, and the 3x3 convolution (STRIDE_IN_1X1 False), as in "
    "*_moco.yaml; a file of the supervised baselines (BGR, True) looks the same, and would detect badly",
)


def recognise_detector(path: Path, state: State, buffers: State) -> Recognised:
    """The configuration of a detector.

    Args:
        path: for messages.
        state: tensors by `DETECTOR`'s prefixes of this project.
        buffers: tensors that a model of this project computes itself, under detectron2's names; old checkpoints have them.

    Raises:
        ValueError: it has another encoder, number of anchors or normalisation of images than MoCo's.
    """
    state = {_translated(name, {new: old for old, new in reversed(BLOCKS.items())}): x for name, x in state.items()}
    counters = {
        name.replace("running_var", COUNTERS): torch.zeros((), dtype=torch.long)
        for name in state
        if name.endswith("running_var")
    }
    frozen = not any(name in state for name in counters)
    encoder = part(state | counters if frozen else state, "moco.encoder_q.")
    outputs = [encoder.get(f"layer{i}.0.conv3.weight", torch.empty(0)) for i in (1, 2, 3, 4)]
    channels = tuple(min(max(1, length(tensor) // 4), MOST_CHANNELS) for tensor in outputs)
    standard = channels == (64, 128, 256, 512)
    names = tuple(RESNETS) if standard else ("resnet50", "resnet101", "resnet152")
    config = MoCoRCNNConfig(
        architecture=recognise_resnet(path, encoder, names, channels),
        model_args=None if standard else {"channels": list(channels)},
        num_labels=max(1, state.get("cls_score.bias", torch.empty(0)).numel() - 1),  # the background has one too
        masks="mask_predictor.weight" in state,
        detector_norm="frozen" if frozen else "sync",
    )
    _check_anchors(path, config, state)
    _check_buffers(path, config, buffers)
    notes = ["its BatchNorm is frozen"] if frozen else []
    return config, state | counters if frozen else state, [*NOT_IN_THE_FILE, *notes]


def _check_anchors(path: Path, config: MoCoRCNNConfig, state: State) -> None:
    ours = len(config.anchor_sizes) * len(config.anchor_ratios)
    theirs = length(state.get("proposals.objectness.weight", torch.empty(ours)))
    if theirs != ours:
        raise ValueError(
            f"{path} has {theirs:,} anchors at a place, of unknown sizes, and MoCo's configurations have {ours}: convert a "
            "checkpoint that was trained with those"
        )


def _check_buffers(path: Path, config: MoCoRCNNConfig, buffers: State) -> None:
    expected = {
        "pixel_mean": 255 * torch.tensor(config.image_mean)[:, None, None],
        "pixel_std": 255 * torch.tensor(config.image_std)[:, None, None],
        "proposal_generator.anchor_generator.cell_anchors.0": make_anchors(config, 1, 1, 16, torch.device("cpu")),
    }
    for name, tensor in buffers.items():
        ours = expected.get(name)
        if ours is None or tensor.shape != ours.shape or not torch.allclose(tensor.to(ours.dtype), ours, atol=0.01):
            raise ValueError(
                f"{path} was trained with another {name!r} than MoCo's configurations have (RGB, anchors of 32 to 512 px): "
                "convert a checkpoint of one of them"
            )


def check_detector(source: str, config: MoCoConfig, out: Path) -> None:
    """
    Raises:
        ValueError: detectron2 has no such detector, or would not read a file of this name as one.
    """
    assert isinstance(config, MoCoRCNNConfig)
    first, *others = (config.model_args or {}).get("channels") or (64, 128, 256, 512)
    if config.rcnn_variant != "c4":
        raise ValueError(
            f"{source} has rcnn_variant={config.rcnn_variant!r}, whose convolution to 512 channels detectron2 does not have: "
            "convert a detector with rcnn_variant='c4', or keep it as it is"
        )
    if (
        config.architecture not in RESNETS
        or (config.model_args or {}).keys() - {"channels"}
        or others != [2 * first, 4 * first, 8 * first]
    ):
        raise ValueError(
            f"{source} is around a {config.architecture} with model_args={config.model_args}, and detectron2's C4 has the "
            f"ResNets {', '.join(RESNETS)}, whose channels may be scaled alone: keep it as it is"
        )
    if out.suffix != SUFFIX:
        raise ValueError(f"{out} must end in {SUFFIX}, or detectron2 reads it as another kind of file: rename it")


def detectron2_state(config: MoCoConfig, state: State) -> State:
    """All tensors of a detector in single precision, under detectron2's names."""
    assert isinstance(config, MoCoRCNNConfig)
    return {
        _translated(name, BLOCKS): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in rename_back(state, DETECTOR).items()
        if config.detector_norm != "frozen" or not name.endswith(COUNTERS)
    }


def detectron2_settings(source: str, config: MoCoConfig, size: Any) -> str:
    """What detectron2's configuration must have beside the official `*_moco.yaml`, in one line.

    Args:
        source: for messages.
        size: of its image processor, "shortest_edge" and "longest_edge" in pixels.

    Raises:
        ValueError: detectron2 resizes no images in this way.
    """
    assert isinstance(config, MoCoRCNNConfig)
    usual = MoCoRCNNConfig()
    depth, groups, width = RESNETS[config.architecture]
    channels = (config.model_args or {}).get("channels") or (64,)
    sides = [size[side] if size else None for side in SIDES]
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(
            f"{source} has an image processor of size {shown(size)}, and detectron2 resizes by a shortest_edge and a "
            "longest_edge: give it both"
        )
    settings: dict[str, Any] = {"MODEL.ROI_HEADS.NUM_CLASSES": config.num_labels}
    for key, value, official in (
        ("MODEL.RESNETS.DEPTH", depth, 50),
        ("MODEL.RESNETS.NUM_GROUPS", groups, 1),
        ("MODEL.RESNETS.WIDTH_PER_GROUP", width * channels[0] // 64, 64),
        ("MODEL.RESNETS.RES2_OUT_CHANNELS", 4 * channels[0], 256),
        ("MODEL.RESNETS.NORM", NORMS[config.detector_norm], NORMS["sync"]),
        *zip(SIDES.values(), sides, MoCoDetectionImageProcessor.size.values(), strict=True),
        ("MODEL.PIXEL_MEAN", _levels(config.image_mean), _levels(usual.image_mean)),
        ("MODEL.PIXEL_STD", _levels(config.image_std), _levels(usual.image_std)),
    ):
        settings |= {key: value} if value != official else {}
    for name, key in SETTINGS.items():
        value, official = (_value(name, each) for each in (config, usual))
        settings |= {key: value} if value != official else {}
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _value(name: str, config: MoCoRCNNConfig) -> Any:
    value = getattr(config, name)
    return [list(value)] if name in LISTS_OF_LISTS else value


def _levels(shares: Any) -> list[float]:
    return [round(255 * share, 3) for share in shares]


def _translated(name: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        name = name.replace(old, new)
    return name
