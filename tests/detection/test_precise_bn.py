"""Statistics of many batches, against those of all values at once in float64."""

import pytest
import torch
from torch import nn

from training.detection.precise_bn import set_precise_statistics


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 3, 9, 7), (2, 3, 6, 6), (2, 3, 12, 5)]
    return [torch.randn(shape, generator=generator) * (i + 1) + 3 for i, shape in enumerate(shapes)]


def test_every_value_of_every_batch_counts_the_same():
    network = model()
    set_precise_statistics(network, batches(), network)
    assert network.training
    exact = model().double().train()
    values: list[list[torch.Tensor]] = [[], []]
    for x in batches():
        for layer in exact:
            if isinstance(layer, nn.BatchNorm2d):
                values[layer.num_features == 2].append(x.transpose(0, 1).flatten(1))
            x = layer(x.double())
    for norm, seen in zip((network[1], network[4]), values, strict=True):
        together = torch.cat(seen, dim=1)
        torch.testing.assert_close(norm.running_mean.double(), together.mean(dim=1), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), together.var(dim=1, correction=0), atol=1e-6, rtol=1e-6)


def test_what_does_not_normalise_by_the_batch_is_left_alone():
    network = model()
    network[1].requires_grad_(False)
    before = {name: x.clone() for name, x in network[1].state_dict().items() if name != "num_batches_tracked"}
    network[1].momentum = 0.0
    set_precise_statistics(network, batches(), network)
    assert all(torch.equal(x, network[1].state_dict()[name]) for name, x in before.items())
    assert not network[4].running_mean.eq(0).all()


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        set_precise_statistics(model(), [], model())
