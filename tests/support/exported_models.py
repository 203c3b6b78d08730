"""Models with random statistics, their published folders, and images of many sizes."""

import numpy as np
import torch
from PIL import Image
from tiny_models import moco_config
from torch import nn

from modeling_moco import MoCoForImageClassification, MoCoImageProcessor, MoCoModel
from training.hub.publish import PublishArguments, load_published, publish

LABELS = [f"class {i}" for i in range(7)]
SIZE, RESIZE = 48, 55


def randomised(model):
    """Random statistics and scales: fresh ones are 0 and 1, with which forgotten tensors would not be seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
        if isinstance(model, MoCoForImageClassification):
            model.classifier.weight.normal_(0, 0.3, generator=generator)
            model.classifier.bias.normal_(generator=generator)
    return model.eval()


def images():
    """Of sizes whose margins are odd and even, wide and high, gray and with transparency."""
    random = np.random.default_rng(0)
    sizes = [(60, 80), (81, 60), (57, 57), (120, 90), (49, 61), (200, 63)]
    coarse = [Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size) for size in sizes]
    return [coarse[0].convert("L"), coarse[1].convert("RGBA"), *coarse[2:]]


def saved(folder, architecture, kind, **config):
    torch.manual_seed(0)
    if kind == "classifier":
        names = dict(enumerate(LABELS))
        config |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    whole = MoCoForImageClassification if kind == "classifier" else MoCoModel
    model = randomised(whole(moco_config(architecture, **config)))
    model.save_pretrained(folder)
    processor = MoCoImageProcessor(
        size={"shortest_edge": RESIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.25, 0.3],
    )
    processor.save_pretrained(folder)
    return model


def published(source, folder, **flags):
    args = PublishArguments(**flags)
    model, processor = load_published(str(source), args.include_training_state)
    publish(str(source), model, processor, "org/name", args, folder)
    return folder


@torch.no_grad()
def ours(model, inputs):
    return model(inputs).logits if isinstance(model, MoCoForImageClassification) else model(inputs).pooler_output


def assert_same(found, expected):
    """To the bit, or within the rounding of another order of the same sums: some loaders keep weights elsewhere."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())
