"""Which formats an encoder has: ResNets, other encoders of timm, stems that timm does not know."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from exported_models import SIZE, assert_same, ours, published, saved
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
)

from modeling_moco import MoCoConfig, MoCoForImageClassification
from training.convert.key_maps import RESNETS as TORCHVISION
from training.hub import exports
from training.hub.publish import list_files


@pytest.mark.parametrize("architecture", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_every_named_resnet_is_one_of_transformers(architecture, tmp_path):
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=0)
    names = {exports._resnet_name(name) for name in model.state_dict()}
    block, depths = exports.RESNETS[architecture]
    widths = [stage["num_chs"] for stage in model.feature_info[1:]]
    with torch.device("meta"):
        resnet = exports.ResNetModel(exports.ResNetConfig(layer_type=block, depths=depths, hidden_sizes=widths))
    shapes = {name: tuple(tensor.shape) for name, tensor in resnet.state_dict().items()}
    assert names == shapes.keys()
    assert all(shapes[exports._resnet_name(name)] == tuple(t.shape) for name, t in model.state_dict().items())


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("test_convnext", {}),
        ("test_vit", {"model_args": {"img_size": SIZE}}),
        ("test_vit", {"model_args": {"img_size": SIZE, "num_heads": 1}, "stem": "moco_v3"}),
        ("mobilenetv3_small_050", {}),
    ],
)
def test_any_encoder_of_timm_is_published_for_timm(architecture, args, kind, tmp_path):
    model = saved(tmp_path / "saved", architecture, kind, **args)
    folder = published(tmp_path / "saved", tmp_path / "published")
    assert "resnet/config.json" not in list_files(folder)
    x = torch.randn(2, 3, SIZE, SIZE)
    expected = ours(model, x)
    with torch.no_grad():
        assert_same(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x), expected)
    auto = AutoModelForImageClassification if kind == "classifier" else AutoModel
    wrapper = auto.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = wrapper(x)
    assert_same(outputs.logits if kind == "classifier" else outputs.pooler_output, expected)


@pytest.mark.parametrize("stem", ["small", "no_max_pool"])
def test_a_stem_that_timm_does_not_know_is_published_in_our_format_alone(stem, tmp_path):
    model = saved(tmp_path / "saved", "resnet18", "classifier", stem=stem)
    folder = published(tmp_path / "saved", tmp_path / "published")
    files = list_files(folder)
    assert "moco.safetensors" not in files
    assert not any(name.startswith("resnet/") for name in files)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "moco"
    x = torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(ours(MoCoForImageClassification.from_pretrained(folder).eval(), x), ours(model, x))
    assert "hf-hub:" not in (folder / "README.md").read_text()


def test_torchvision_has_the_resnets_that_the_converter_knows_and_no_other():
    assert set(timm.list_models(module="resnet")) & set(torchvision.models.list_models()) == set(TORCHVISION)
    for architecture in (*TORCHVISION, "densenet121", "resnet26"):
        config = MoCoConfig(architecture=architecture)
        with torch.device("meta"):
            model = SimpleNamespace(config=config, encoder_q=timm.create_model(architecture, num_classes=0))
        assert exports.is_resnet_of_torchvision(model) == (architecture in TORCHVISION)
        config.stem = "small"
        assert not exports.is_resnet_of_torchvision(model)
