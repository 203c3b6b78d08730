"""A published ResNet, and what it makes of images."""

import pytest
import torch
from exported_models import RESIZE, images, ours, published, saved

from modeling_moco import MoCoImageProcessorPil


@pytest.fixture(scope="module", params=["encoder", "classifier"])
def resnet(request, tmp_path_factory):
    """Kind, model and published folder of a ResNet-18."""
    folder = tmp_path_factory.mktemp(request.param)
    model = saved(folder / "saved", "resnet18", request.param, batch_norm="split")
    return request.param, model, published(folder / "saved", folder / "published")


@pytest.fixture(scope="module")
def exact(resnet):
    """Inputs by the exact transform, and what our model makes of them."""
    _, model, folder = resnet
    processor = MoCoImageProcessorPil.from_pretrained(folder)
    assert processor.size["shortest_edge"] == RESIZE
    inputs = torch.cat([processor(image.convert("RGB"), return_tensors="pt").pixel_values for image in images()])
    return inputs, ours(model, inputs)
