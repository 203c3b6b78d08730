"""The recorded steps of the official implementation, and our model with its first weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_moco import MoCoConfig, MoCoModel
from training.convert.key_maps import OFFICIAL, rename

TRACE = load_file(Path(__file__).parents[1] / "records" / "official_trace.safetensors")
STEPS, BATCH = TRACE["one.images_q"].shape[:2]


def from_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {rename(name, OFFICIAL): tensor for name, tensor in state.items()}


def official_model(batch_norm: str = "plain") -> MoCoModel:
    config = MoCoConfig(
        architecture="test_resnet",
        queue_size=32,
        projection_dim=16,
        key_momentum=0.9,
        temperature=0.2,
        projection_head="mlp",
        batch_norm=batch_norm,
    )
    state = {name.removeprefix("init."): t for name, t in TRACE.items() if name.startswith("init.")}
    state |= {name.replace("encoder_q", "encoder_k"): t for name, t in state.items() if name.startswith("encoder_q")}
    state["queue_ptr"] = torch.zeros(1, dtype=torch.long)
    state = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
    model = MoCoModel(config)
    model.load_state_dict(from_official(state))
    return model


def deviation(ours: dict[str, torch.Tensor], final: dict[str, torch.Tensor]) -> float:
    """Largest difference over the recorded tensors; the pointers must agree."""
    assert len(final) > 20
    assert torch.equal(ours["dictionary.queue_ptr"], final["dictionary.queue_ptr"])
    return max((ours[name] - tensor).abs().max().item() for name, tensor in final.items())
