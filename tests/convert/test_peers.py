"""Checkpoints of lightly and solo-learn in."""

import pytest
import torch
from foreign_checkpoints import LightlyHead, assert_computes, lightning, pixels, prefixed, resnet, solo_learn
from tiny_models import assert_equal
from torch import nn

from modeling_moco import MoCoModel


@pytest.mark.parametrize("sequential", [True, False])
def test_lightly_checkpoint_computes_what_its_modules_do(convert, tmp_path, sequential):
    def backbone():
        return nn.Sequential(*list(resnet().children())[:-1], nn.Flatten()) if sequential else resnet()

    parts = {
        "backbone.": backbone(),
        "projection_head.": LightlyHead(512),
        "backbone_momentum.": backbone(),
        "projection_head_momentum.": LightlyHead(512),
    }
    lightning(tmp_path / "there.ckpt", {k: v for prefix, m in parts.items() for k, v in prefixed(m, prefix).items()})
    words = convert(tmp_path / "there.ckpt", tmp_path / "ours")
    assert "lightly MoCo v2, resnet18, dim 16, epoch 9" in words
    assert "no queue" in words
    query, key = list(parts.values())[:2], list(parts.values())[2:]
    assert_computes(MoCoModel.from_pretrained(tmp_path / "ours"), nn.Sequential(*query), nn.Sequential(*key))
    convert(tmp_path / "ours", tmp_path / "official.pth.tar", "--to", "official")
    names = torch.load(tmp_path / "official.pth.tar", weights_only=True)["state_dict"]
    assert all(name.startswith("module.encoder_") for name in names)  # which main_lincls.py looks for


def test_lightly_benchmark_names_the_key_encoder_plainly(convert, tmp_path):
    key, query = nn.Sequential(resnet(), LightlyHead(512)), nn.Sequential(resnet(), LightlyHead(512))
    state = {
        **prefixed(key[0], "backbone."),
        **prefixed(key[1], "projection_head."),
        **prefixed(query[0], "query_backbone."),
        **prefixed(query[1], "query_projection_head."),
        **prefixed(nn.Linear(512, 1000), "online_classifier.classification_head."),
    }
    lightning(tmp_path / "there.ckpt", state)
    words = convert(tmp_path / "there.ckpt", tmp_path / "ours")
    assert "lightly benchmark MoCo v2, resnet18" in words
    assert "left out: online_classifier.classification_head.weight" in words
    assert_computes(MoCoModel.from_pretrained(tmp_path / "ours"), query, key)


def test_solo_learn_checkpoint_computes_what_its_modules_do(convert, tmp_path):
    query, key, state = solo_learn(tmp_path / "there.ckpt")
    words = convert(tmp_path / "there.ckpt", tmp_path / "ours")
    assert "solo-learn MoCo v2, resnet18, K 48, dim 16" in words
    assert "left out: classifier.weight, classifier.bias" in words
    assert "it has two queues, one for each view: the first is kept" in words
    model = MoCoModel.from_pretrained(tmp_path / "ours")
    assert_computes(model, query, key)
    assert torch.equal(model.dictionary.queue, state["queue"][0])
    assert model.dictionary.queue_ptr.tolist() == [16]


def test_head_that_moco_has_not_leaves_the_encoder_alone(convert, tmp_path):
    query, _, _ = solo_learn(tmp_path / "there.ckpt", hidden=64)
    words = convert(tmp_path / "there.ckpt", tmp_path / "ours")
    assert "only the encoder is kept: the projection head (0.weight (64, 512)" in words
    model = MoCoModel.from_pretrained(tmp_path / "ours")
    x = pixels()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x).pooler_output, query[0](x), atol=1e-6, rtol=0)
    assert_equal(model.encoder_k.state_dict(), model.encoder_q.state_dict())
