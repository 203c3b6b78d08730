"""Tiny models on four kinds of backbone, and which of their tensors belong to the queries and to the keys."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_moco import MoCoConfig, MoCoModel

K, C = 64, 16
BACKBONES = {
    "test_resnet": None,
    "test_convnext": None,
    "test_vit": {"img_size": 32},
    "mobilenetv3_small_050": None,  # its head is wider than its feature map
}

# transformers 5.24 calls it by another name than 5.18.
CHECKPOINTING = (
    f"{'activation' if hasattr(PreTrainedModel, 'is_activation_checkpointing') else 'gradient'}_checkpointing"
)


def moco_config(architecture="test_resnet", **kwargs):
    defaults = {"queue_size": K, "projection_dim": C, "key_momentum": 0.9, "batch_norm": "plain"}
    return MoCoConfig(architecture=architecture, **{"model_args": BACKBONES.get(architecture), **defaults, **kwargs})


def views(n=8, size=32):
    return torch.randn(2, n, 3, size, size).unbind()


def key_parts(model):
    return {name: t for name, t in model.state_dict().items() if name.startswith(("encoder_k.", "projector_k."))}


def query_parts(model, rename=False):
    parts = {name: t for name, t in model.state_dict().items() if name.startswith(("encoder_q.", "projector_q."))}
    return {name.replace("_q.", "_k.", 1): t for name, t in parts.items()} if rename else parts


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def save_encoder(folder: Path) -> Path:
    """A folder with a tiny pretrained model, as a run leaves it for evaluations."""
    torch.manual_seed(7)
    MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=64, batch_norm="split")).save_pretrained(folder)
    return folder
