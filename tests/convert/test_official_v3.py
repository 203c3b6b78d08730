"""The checkpoints of moco-v3 in, and back out bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from foreign_checkpoints import C, OfficialV3, lincls, official_v3, pixels, resave
from methods import method_config
from PIL import Image
from tiny_models import assert_equal
from torch import nn

from modeling_moco import MoCoForImageClassification, MoCoImageProcessor, MoCoModel
from training.convert.files import read, write

HIDDEN = 24


@torch.no_grad()
def assert_computes_as(model: MoCoModel, there: OfficialV3, size: int) -> None:
    """Features, projections, queries with their prediction, and keys are those of the modules of the other code."""
    x = pixels(size=size)
    features = model.eval()(x).pooler_output
    head = "head" if hasattr(there.base_encoder, "head") else "fc"
    projector = getattr(there.base_encoder, head)
    projected = there.base_encoder(x)
    setattr(there.base_encoder, head, nn.Identity())
    equal = {
        "features": (features, there.base_encoder(x)),
        "projections": (model.projector_q(features), projected),
        "queries": (model.encode_queries(x), F.normalize(there.predictor(projected))),
        "keys": (model.encode_keys(x), F.normalize(there.momentum_encoder(x))),
    }
    setattr(there.base_encoder, head, projector)
    for ours, theirs in equal.values():
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (equal["queries"][0] * equal["keys"][0]).sum(dim=1).abs().max() < 0.99  # two encoders, not one


def assert_comes_back(there, back) -> None:
    before, after = (torch.load(path, weights_only=True) for path in (there, back))
    assert list(after["state_dict"]) == list(before["state_dict"])
    assert_equal(after["state_dict"], before["state_dict"])
    assert list(after) == ["epoch", "arch", "state_dict"]
    assert (after["epoch"], after["arch"]) == (before["epoch"], before["arch"])


def test_a_resnet_computes_what_its_modules_do_and_comes_back_bit_for_bit(convert, tmp_path):
    there = official_v3(tmp_path / "there.pth.tar")
    words = convert(tmp_path / "there.pth.tar", tmp_path / "ours")
    assert "official MoCo v3, resnet18, dim 16, epoch 300" in words
    assert "T 1 and m 0.99, which rises to 1, are the published values of v3 for ResNets; m is 0.996 for those" in words
    model, report = MoCoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    config = model.config
    assert (config.architecture, config.stem, config.zero_init_residual) == ("resnet18", "default", True)
    assert (config.projection_head, config.projection_layers, config.prediction_head) == ("mlp_bn", 2, "mlp")
    assert (config.projection_hidden_dim, config.projection_dim) == (HIDDEN, C)
    assert (config.dictionary, config.key_encoder, config.symmetric_loss) == ("batch", "momentum", True)
    assert (config.temperature, config.loss_scale, config.key_momentum) == (1.0, 2.0, 0.99)
    assert config.batch_norm == "sync"
    assert_computes_as(model, there, 64)
    convert(tmp_path / "ours", tmp_path / "back.pth.tar", "--to", "official")
    assert_comes_back(tmp_path / "there.pth.tar", tmp_path / "back.pth.tar")


def test_a_vit_computes_what_its_modules_do_and_comes_back_bit_for_bit(tmp_path):
    there = official_v3(tmp_path / "there.pth.tar", "vit_tiny", 32)
    checkpoint = read(str(tmp_path / "there.pth.tar"))
    config = checkpoint.config
    assert (config.architecture, config.stem) == ("vit_tiny_patch16_224", "moco_v3")
    assert config.model_args == {"img_size": 32}
    assert (config.projection_head, config.projection_layers, config.prediction_head) == ("mlp_bn", 3, "mlp_bn")
    assert (config.temperature, config.loss_scale, config.zero_init_residual) == (0.2, 0.4, False)
    assert "tensors do not show the heads of attention: 3, as timm's vit_tiny_patch16_224 has" in checkpoint.notes
    model = MoCoModel(config)
    model.load_state_dict(checkpoint.state)
    assert_computes_as(model, there, 32)
    write(checkpoint, tmp_path / "back.pth.tar", "official")
    resave(tmp_path / "back.pth.tar", arch="vit_tiny")  # moco-v3 has none of this size, and ours has timm's name
    assert_comes_back(tmp_path / "there.pth.tar", tmp_path / "back.pth.tar")


def test_the_images_of_a_vit_have_the_size_of_its_positions(convert, tmp_path):
    for size, resize in ((32, 37), (224, 256)):
        official_v3(tmp_path / f"{size}.pth.tar", "vit_tiny", size)
        convert(tmp_path / f"{size}.pth.tar", tmp_path / str(size))
        processor = MoCoImageProcessor.from_pretrained(tmp_path / str(size))
        assert dict(processor.crop_size) == {"height": size, "width": size}
        assert dict(processor.size) == {"shortest_edge": resize}
        model = MoCoModel.from_pretrained(tmp_path / str(size), momentum_encoder=False).eval()
        assert model(**processor(Image.new("RGB", (300, 280)), return_tensors="pt")).pooler_output.shape == (1, 192)


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 32])
def test_the_small_vit_has_twelve_heads(convert, refuse, tmp_path, size):
    there = official_v3(tmp_path / "there.pth.tar", "vit_small", size)
    words = convert(tmp_path / "there.pth.tar", tmp_path / "ours")
    assert "tensors do not show the heads of attention: 12, as vit_small of MoCo v3 has" in words
    assert "its arch is" not in words
    model = MoCoModel.from_pretrained(tmp_path / "ours")
    assert model.config.model_args == {"num_heads": 12} | ({"img_size": size} if size != 224 else {})
    assert_computes_as(model, there, size)
    convert(tmp_path / "ours", tmp_path / "back.pth.tar", "--to", "official")
    assert_comes_back(tmp_path / "there.pth.tar", tmp_path / "back.pth.tar")

    resave(tmp_path / "there.pth.tar", arch="vit_small_patch16_224")  # not moco-v3's own, but timm's
    checkpoint = read(str(tmp_path / "there.pth.tar"))
    assert "num_heads" not in (checkpoint.config.model_args or {})
    write(checkpoint, tmp_path / "six", "moco")
    assert "has model_args=" in refuse(tmp_path / "six", tmp_path / "six.pth.tar", "--to", "official")
    assert not (tmp_path / "six.pth.tar").exists()


def test_the_classifier_of_a_vit_computes_what_it_did_and_comes_back_bit_for_bit(tmp_path):
    there = lincls(tmp_path / "there.pth.tar", "vit_tiny")
    checkpoint = read(str(tmp_path / "there.pth.tar"))
    assert str(checkpoint) == "official linear classifier, vit_tiny_patch16_224, 10 classes, epoch 100, best_acc1 67.72"
    assert not any("supervised" in note for note in checkpoint.notes)
    model = MoCoForImageClassification(checkpoint.config).eval()
    model.load_state_dict(checkpoint.state)
    x = pixels(size=32)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, there(x), atol=1e-5, rtol=0)
    write(checkpoint, tmp_path / "back.pth.tar", "official")
    before, after = (torch.load(tmp_path / f"{name}.pth.tar", weights_only=True) for name in ("there", "back"))
    assert list(after["state_dict"]) == list(before["state_dict"])
    assert_equal(after["state_dict"], before["state_dict"])
    assert torch.equal(after["best_acc1"], before["best_acc1"])


def test_of_a_part_the_rest_is_said_and_new(tmp_path):
    state = official_v3(tmp_path / "there.pth.tar").state_dict()
    parts = {
        "base": ("base_encoder.",),
        "encoder": ("base_encoder.conv", "base_encoder.bn", "base_encoder.layer"),
    }
    notes = {}
    for name, prefixes in parts.items():
        kept = {tensor: state[tensor] for tensor in state if tensor.startswith(prefixes)}
        resave(tmp_path / "there.pth.tar", state_dict=kept)
        checkpoint = read(str(tmp_path / "there.pth.tar"))
        notes[name] = checkpoint.notes
        write(checkpoint, tmp_path / name, "official" if name == "base" else "moco")
    assert "it has no predictor: loading the model starts a new one" in notes["base"]
    assert "it has no key encoder: loading the model copies the query encoder" in notes["base"]
    assert torch.load(tmp_path / "base", weights_only=True)["state_dict"].keys() == {
        name for name in state if name.startswith("base_encoder.")
    }
    model = MoCoModel(method_config("moco_v3", architecture="resnet18"), momentum_encoder=False)
    model.save_pretrained(tmp_path / "published")  # without what contrastive training needs alone
    write(read(str(tmp_path / "published")), tmp_path / "published.pth.tar", "official")
    for name, tensor in torch.load(tmp_path / "published.pth.tar", weights_only=True)["state_dict"].items():
        assert torch.equal(tensor, model.state_dict()[name.replace("module.base_encoder.", "encoder_q.")])
    assert notes["encoder"] == [
        "only the encoder is kept: the projection head (none at all) is not MoCo's, and the keys depend on it"
    ]


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("simclr", {}, "has dictionary='batch_both_views', key_encoder='none', projection_head='simclr'"),
        (
            "moco_v3",
            {"dictionary": "queue"},
            "has dictionary='queue', key_encoder='momentum', projection_head='mlp_bn'",
        ),
    ],
    ids=["SimCLR", "heads of v3 with a queue"],
)
def test_what_no_official_file_holds_is_refused(refuse, tmp_path, method, changes, reason):
    MoCoModel(method_config(method, architecture="resnet18", **changes)).save_pretrained(tmp_path / "ours")
    error = refuse(tmp_path / "ours", tmp_path / "out.pth.tar", "--to", "official")
    assert reason in error
    assert "those of MoCo v1 and v2 have a queue and a head without BatchNorm" in error
    assert not (tmp_path / "out.pth.tar").exists()
