"""Checkpoints of other MoCo code, built from torchvision's ResNets in the layouts that their sources write."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from modeling_moco import MoCoModel

C, K, CLASSES = 16, 48, 10


def resnet(architecture="resnet18", head=None) -> nn.Module:
    """torchvision's, in evaluation mode, with nothing at its initial value; `head(width)` in the place of `fc`."""
    model = torchvision.models.get_model(architecture)
    model.fc = head(model.fc.in_features) if head else nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.5, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(1234)
    return model.eval()


def resave(path, **changes):
    """A file with some of its entries changed, or left out for None."""
    content = torch.load(path, weights_only=True) | changes
    torch.save({key: value for key, value in content.items() if value is not None}, path)


def linear(width):
    return nn.Linear(width, C)


def mlp(width, hidden=None):
    return nn.Sequential(nn.Linear(width, hidden or width), nn.ReLU(), nn.Linear(hidden or width, C))


def prefixed(module: nn.Module, prefix: str) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def keys(size=K, *, copies=()):
    return F.normalize(torch.randn(*copies, C, size), dim=-2)


class Official(nn.Module):
    """What DistributedDataParallel wraps in main_moco.py, as far as a state dict shows."""

    def __init__(self, architecture, head, size=K):
        super().__init__()
        self.register_buffer("queue", keys(size))
        self.register_buffer("queue_ptr", torch.tensor([32]))
        self.encoder_q, self.encoder_k = resnet(architecture, head), resnet(architecture, head)


def official(path, architecture="resnet18", head=mlp, size=K, legacy=False) -> Official:
    model = Official(architecture, head, size)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03, momentum=0.9)
    model.encoder_q(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 200,
        "arch": architecture,
        "state_dict": OrderedDict(prefixed(model, "module.")),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return model


def lincls(path, architecture="resnet18", supervised=False) -> nn.Module:
    """As main_lincls.py writes it, or main.py of pytorch/examples, which trains the encoder too."""
    model = resnet(architecture, lambda width: nn.Linear(width, CLASSES))
    optimizer = torch.optim.SGD((model if supervised else model.fc).parameters(), 30.0, momentum=0.9)
    content = {
        "epoch": 100,
        "arch": architecture,
        "state_dict": OrderedDict(prefixed(model, "module.")),
        "best_acc1": torch.tensor(67.72),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, path)
    return model


class LightlyHead(nn.Module):
    def __init__(self, width, **kwargs):
        super().__init__()
        self.layers = mlp(width, **kwargs)

    def forward(self, x):
        return self.layers(x)


def lightning(path, state):
    content = {
        "epoch": 9,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": OrderedDict(state),
        "callbacks": {"ModelCheckpoint": {"best_model_path": "", "dirpath": "/tmp"}},
        "hyper_parameters": {"batch_size_per_device": 128, "num_classes": 1000},
    }
    torch.save(content, path)


def pixels(n=2, size=64):
    return torch.randn(n, 3, size, size)


@torch.no_grad()
def assert_computes(model: MoCoModel, query: nn.Module, key: nn.Module | None = None):
    """Queries and keys are those of networks from images to embeddings."""
    x = pixels()
    torch.testing.assert_close(model.eval().encode_queries(x), F.normalize(query(x)), atol=1e-6, rtol=0)
    if key is not None:
        model.config.batch_norm = "plain"
        torch.testing.assert_close(model.encode_keys(x), F.normalize(key(x)), atol=1e-6, rtol=0)


def solo_learn(path, hidden=None, **changes):
    query, key = (nn.Sequential(resnet(), mlp(512, hidden)) for _ in range(2))
    state = {
        "queue": keys(copies=(2,)),
        "queue_ptr": torch.tensor([16]),
        **prefixed(query[0], "backbone."),
        **prefixed(nn.Linear(512, 100), "classifier."),
        **prefixed(key[0], "momentum_backbone."),
        **prefixed(query[1], "projector."),
        **prefixed(key[1], "momentum_projector."),
    }
    lightning(path, {name: tensor for name, tensor in (state | changes).items() if tensor is not None})
    return query, key, state
