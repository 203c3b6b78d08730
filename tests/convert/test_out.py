"""Models out, for detectron2 and torchvision."""

import io
import pickle

import numpy as np
import pytest
import torch
from foreign_checkpoints import (
    CLASSES,
    lincls,
    mlp,
    official,
    pixels,
    prefixed,
    resnet,
)
from tiny_models import moco_config
from torch import nn

from modeling_moco import MoCoModel
from training.convert.files import FORMATS


class ArraysOnly(pickle.Unpickler):
    """Knows what NumPy arrays are pickled with, and nothing else."""

    def find_class(self, module, name):
        assert module.split(".")[0] == "numpy", (module, name)
        return super().find_class(module, name)


def test_detectron2_gets_its_own_names_and_the_same_bits(convert, tmp_path):
    net = resnet("resnet50", mlp)
    torch.save({"state_dict": prefixed(net, "module.encoder_q.")}, tmp_path / "there.pth.tar")
    convert(tmp_path / "there.pth.tar", tmp_path / "out.pkl", "--to", "detectron2")
    content = ArraysOnly(io.BytesIO((tmp_path / "out.pkl").read_bytes())).load()
    assert {key: content[key] for key in content if key != "model"} == {
        "__author__": "MOCO",
        "matching_heuristics": True,
    }

    modules = {"stem.conv1": net.conv1, "stem.conv1.norm": net.bn1, "stem.fc.0": net.fc[0], "stem.fc.2": net.fc[2]}
    for stage, blocks in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=2):
        for b, block in enumerate(blocks):
            for i, (conv, norm) in enumerate(
                zip(("conv1", "conv2", "conv3"), ("bn1", "bn2", "bn3"), strict=True), start=1
            ):
                modules[f"res{stage}.{b}.conv{i}"] = getattr(block, conv)
                modules[f"res{stage}.{b}.conv{i}.norm"] = getattr(block, norm)
            if block.downsample is not None:
                modules[f"res{stage}.{b}.shortcut"] = block.downsample[0]
                modules[f"res{stage}.{b}.shortcut.norm"] = block.downsample[1]
    expected = {key: t.numpy() for name, module in modules.items() for key, t in prefixed(module, f"{name}.").items()}
    assert content["model"].keys() == expected.keys()
    for name, array in expected.items():
        assert content["model"][name].dtype == array.dtype
        assert np.array_equal(content["model"][name], array), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_detectron2_gets_single_precision(convert, tmp_path, dtype):
    net = resnet(head=mlp).to(dtype)
    torch.save({"state_dict": prefixed(net, "module.encoder_q.")}, tmp_path / "there.pth.tar")
    convert(tmp_path / "there.pth.tar", tmp_path / "out.pkl", "--to", "detectron2")
    content = ArraysOnly(io.BytesIO((tmp_path / "out.pkl").read_bytes())).load()["model"]
    assert {str(array.dtype) for name, array in content.items() if "num_batches" not in name} == {"float32"}
    assert np.array_equal(content["stem.conv1.weight"], net.conv1.weight.detach().float().numpy())


def test_torchvision_loads_encoder_and_classifier_strictly(convert, tmp_path):
    there = official(tmp_path / "there.pth.tar")
    convert(tmp_path / "there.pth.tar", tmp_path / "encoder.pth", "--to", "torchvision")
    encoder = resnet()
    encoder.load_state_dict(torch.load(tmp_path / "encoder.pth", weights_only=True))
    classifier = lincls(tmp_path / "lincls.pth.tar")
    convert(tmp_path / "lincls.pth.tar", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "classifier.pth", "--to", "torchvision")
    loaded = resnet(head=lambda width: nn.Linear(width, CLASSES))
    loaded.load_state_dict(torch.load(tmp_path / "classifier.pth", weights_only=True))
    there.encoder_q.fc = nn.Identity()
    x = pixels()
    with torch.no_grad():
        assert torch.equal(encoder(x), there.encoder_q(x))
        assert torch.equal(loaded(x), classifier(x))


def test_detectron2_gets_a_name_by_which_it_knows_the_file(refuse, tmp_path):
    official(tmp_path / "there.pth.tar")
    for name in ("out.pth", "out"):
        error = refuse(tmp_path / "there.pth.tar", tmp_path / name, "--to", "detectron2")
        assert f"{name} must end in .pkl, or detectron2 reads it as another kind of file: rename it" in error


def test_settings_that_a_file_of_weights_does_not_have_are_said(convert, tmp_path):
    images = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    for name, config in {
        "published": {"temperature": 0.2, "key_momentum": 0.999},
        "own": {"temperature": 0.1, "key_momentum": 0.99, **images},
    }.items():
        MoCoModel(moco_config("resnet18", projection_head="mlp", **config)).save_pretrained(tmp_path / name)
    of_images = "image_mean [0.1, 0.2, 0.3], image_std [0.4, 0.5, 0.6]"
    of_training = ", temperature 0.1, key_momentum 0.99"
    for to, ending, lost in (
        ("official", "pth.tar", of_images + of_training),
        ("torchvision", "pth", of_images),
        ("detectron2", "pkl", of_images),
    ):
        said = convert(tmp_path / "own", tmp_path / f"own.{ending}", "--to", to)
        assert f"\n  the file does not have {lost}: what reads it must be told\n" in said
        assert "does not have" not in convert(tmp_path / "published", tmp_path / f"published.{ending}", "--to", to)


@pytest.mark.parametrize("config", [{"architecture": "test_resnet"}, {"architecture": "resnet18", "stem": "small"}])
def test_models_that_the_others_cannot_hold_are_refused(refuse, tmp_path, config):
    MoCoModel(moco_config(**config)).save_pretrained(tmp_path / "ours")
    for to in set(FORMATS) - {"moco"}:
        error = refuse(tmp_path / "ours", tmp_path / "out", "--to", to)
        assert f"--to {to} writes torchvision's ResNets alone" in error
    assert not (tmp_path / "out").exists()
