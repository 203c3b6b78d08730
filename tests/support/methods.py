"""A tiny model of every method that the papers compare."""

from modeling_moco import MoCoConfig

BANK = 64  # images
METHODS = {
    "queue": {},
    "queue_symmetric": {"symmetric_loss": True},
    "end_to_end": {"dictionary": "batch", "key_encoder": "shared"},
    "bank": {"dictionary": "bank", "key_encoder": "none", "bank_size": BANK},
    "simclr": {
        "dictionary": "batch_both_views",
        "key_encoder": "none",
        "symmetric_loss": True,
        "projection_head": "simclr",
        "projection_layers": 3,
    },
    "moco_v3": {
        "dictionary": "batch",
        "symmetric_loss": True,
        "projection_head": "mlp_bn",
        "prediction_head": "mlp_bn",
        "projection_hidden_dim": 24,
        "loss_scale": 0.4,
    },
}


def method_config(method: str, **changes) -> MoCoConfig:
    """The configuration of a tiny model: 32 px, no shuffling, K 32."""
    tiny = {"architecture": "test_resnet", "projection_dim": 16, "queue_size": 32, "batch_norm": "plain"}
    return MoCoConfig(**tiny | METHODS[method] | changes)
