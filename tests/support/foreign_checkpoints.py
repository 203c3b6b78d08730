"""Checkpoints of other MoCo code, built from torchvision's ResNets and a plain ViT in the layouts that their sources write."""

import itertools
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
    return as_if_trained(model)


def as_if_trained(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            if module.affine:
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
    """As main_lincls.py writes it, of v3 too, or main.py of pytorch/examples, which trains the encoder too."""

    def head(width):
        return nn.Linear(width, CLASSES)

    model = ViT(*VITS[architecture], 32, head) if architecture in VITS else resnet(architecture, head)
    trained = model if supervised else model.head if architecture in VITS else model.fc
    optimizer = torch.optim.SGD(trained.parameters(), 30.0, momentum=0.9)
    content = {
        "epoch": 100,
        "arch": architecture,
        "state_dict": OrderedDict(prefixed(model, "module.")),
        "best_acc1": torch.tensor(67.72),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, path)
    return model


class Block(nn.Module):
    """Attention of several heads, and an MLP, each added to what it is computed from."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, 1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, 1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        q, k, v = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.attn.qkv(self.norm1(x)).chunk(3, dim=2)
        )
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + self.attn.proj((attention @ v).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A ViT with patches of 16 px, whose feature is its class token, in the names of moco-v3's vits.py."""

    def __init__(self, width, heads, size, head=None):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // 16) ** 2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(12)])
        self.norm = nn.LayerNorm(width, 1e-6)
        self.head = head(width) if head else nn.Identity()

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


VITS = {"vit_tiny": (192, 3), "vit_small": (384, 12)}  # moco-v3's small has 12 heads, and timm's 6


def batch_norm_mlp(widths, last_norm=True) -> nn.Sequential:
    """A head of MoCo v3: BatchNorm after every layer and no biases; the last one without scale and shift, or not there."""
    layers = []
    for before, after in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    return nn.Sequential(*layers, *[nn.BatchNorm1d(widths[-1], affine=False)][: int(last_norm)])


class OfficialV3(nn.Module):
    """What DistributedDataParallel wraps in main_moco.py of moco-v3, as far as a state dict shows."""

    def __init__(self, arch, size=224, hidden=24):
        super().__init__()
        is_vit = arch in VITS
        layers = 3 if is_vit else 2

        def projector(width):
            return batch_norm_mlp([width, *[hidden] * (layers - 1), C])

        def encoder():
            return ViT(*VITS[arch], size, projector) if is_vit else resnet(arch, projector)

        self.base_encoder, self.momentum_encoder = encoder(), encoder()
        self.predictor = batch_norm_mlp([C, hidden, C], last_norm=is_vit)
        as_if_trained(self)


def official_v3(path, arch="resnet18", size=224) -> OfficialV3:
    model = OfficialV3(arch, size)
    content = {
        "epoch": 300,
        "arch": arch,
        "state_dict": OrderedDict(prefixed(model, "module.")),
        "optimizer": torch.optim.AdamW(model.predictor.parameters()).state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "_growth_tracker": 7},
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
