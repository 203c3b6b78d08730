"""A recorded training step and inference of detectron2, and our detector with its first weights.

tests/records/detectron2_r50c4_tiny_step.safetensors and detectron2_mask_r50c4_tiny_step.safetensors were recorded with
facebookresearch/detectron2 (Apache-2.0) at 02b5c4e and the settings of facebookresearch/moco's detection/configs, on a CPU in
float32, in one process, so with plain BatchNorm. R50-C4 with the extra norm, widths divided by 16, 3 classes, two images of
150 x 203 and 190 x 160, 64 boxes and 200 proposals an image in training, and the 12 best detections above 0.3.
"""

import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch.overrides import TorchFunctionMode

from modeling_moco import MoCoForObjectDetection, MoCoRCNNConfig

RECORDS = Path(__file__).parents[1] / "records"
NAMES = (  # detectron2's, and ours
    (r"^backbone\.(stem\.)?", "moco.encoder_q."),
    (r"^roi_heads\.res5\.norm\.", "norm."),
    (r"^roi_heads\.res5\.", "moco.encoder_q.res5."),
    (r"^roi_heads\.box_predictor\.", ""),
    (r"^roi_heads\.mask_head\.", "mask_"),
    (r"^proposal_generator\.rpn_head\.", "proposals."),
    ("objectness_logits", "objectness"),
    ("anchor_deltas", "deltas"),
    (r"shortcut\.norm", "downsample.1"),
    (r"shortcut\.", "downsample.0."),
    (r"conv(\d)\.norm", r"bn\1"),
    *((f"res{i + 1}", f"layer{i}") for i in range(1, 5)),
)


def our_name(name: str) -> str:
    for theirs, ours in NAMES:
        name = re.sub(theirs, ours, name)
    return name


class Step:
    """The record of one step, with or without masks."""

    def __init__(self, masks: bool):
        path = RECORDS / f"detectron2_{'mask_' if masks else ''}r50c4_tiny_step.safetensors"
        with safe_open(path, "pt") as file:
            self.seed = int(file.metadata()["seed"])
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
        self.masks = masks
        self.images = [self.tensors[f"image_{i}"] for i in range(2)]
        self.sizes = [tuple(image.shape[1:]) for image in self.images]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Recorded tensors of this prefix under our names."""
        return {our_name(n.removeprefix(prefix)): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def model(self) -> MoCoForObjectDetection:
        config = MoCoRCNNConfig(
            architecture="resnet50",
            model_args={"channels": (4, 8, 16, 32)},
            masks=self.masks,
            num_labels=3,
            rpn_post_nms_train=200,
            roi_samples=64,
            score_threshold=0.3,
            max_detections=12,
        )
        model = MoCoForObjectDetection(config)
        model.load_state_dict(self.part("weights."))
        return model

    def pixel_values(self) -> torch.Tensor:
        """The images as detectron2 normalises and pads them."""
        mean, std = (torch.tensor(x)[:, None, None] for x in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
        pixels = torch.zeros(2, 3, *(max(sides) for sides in zip(*self.sizes, strict=True)))
        for image, padded in zip(self.images, pixels, strict=True):
            padded[:, : image.shape[1], : image.shape[2]] = (image.float() - mean) / std
        return pixels

    def annotations(self) -> list[dict]:
        """The objects as COCO has them."""
        annotations = []
        for i in range(2):
            corners = self.tensors[f"gt_{i}"].double()
            boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
            objects = {"bbox": boxes, "category": self.tensors[f"class_{i}"].tolist()}
            if self.masks:
                objects["segmentation"] = list(self.tensors[f"gtmask_{i}"].numpy())
            annotations.append({"objects": objects})
        return annotations


class ExactSums(TorchFunctionMode):
    """Convolutions and linear layers in float64, rounded to float32: the same on every machine."""

    SUMS = frozenset({torch.conv2d, torch.conv_transpose2d, torch.nn.functional.linear})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in self.SUMS:
            return function(*args, **(kwargs or {}))
        args = [x.double() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x for x in args]
        return function(*args, **(kwargs or {})).float()
