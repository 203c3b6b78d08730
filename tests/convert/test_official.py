"""The official code's checkpoints in, and back out bit for bit."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from foreign_checkpoints import (
    CLASSES,
    C,
    K,
    Official,
    assert_computes,
    lincls,
    linear,
    mlp,
    official,
    pixels,
    prefixed,
    resave,
    resnet,
    solo_learn,
)
from PIL import Image
from tiny_models import assert_equal, moco_config
from torch import nn
from transformers import AutoImageProcessor, AutoModel, pipeline

from modeling_moco import MoCoForImageClassification, MoCoModel
from training.convert.files import read, write
from training.convert.key_maps import RESNETS
from training.convert.shapes import recognise_resnet


@pytest.mark.parametrize(
    ("head", "architecture", "size", "legacy", "words"),
    [
        (
            linear,
            "resnet18",
            K,
            True,
            "official MoCo v1, resnet18, K 48, dim 16, epoch 200",
        ),  # as torch 1.3 wrote files
        pytest.param(
            *(mlp, "resnet50", 65536, False, "official MoCo v2, resnet50, K 65,536, dim 16, epoch 200"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_official_checkpoint_computes_what_torchvision_does_and_comes_back_bit_for_bit(
    convert, tmp_path, head, architecture, size, legacy, words
):
    there = official(tmp_path / "there.pth.tar", architecture, head, size, legacy)
    assert words in convert(tmp_path / "there.pth.tar", tmp_path / "ours")
    model, report = MoCoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert_computes(model, there.encoder_q, there.encoder_k)
    assert torch.equal(model.dictionary.queue, there.queue)
    assert model.dictionary.queue_ptr.tolist() == [32]
    config = model.config
    published = {"linear": 0.07, "mlp": 0.2}
    assert (config.architecture, config.queue_size, config.projection_dim) == (architecture, size, C)
    assert (config.temperature, config.key_momentum) == (published[config.projection_head], 0.999)

    convert(tmp_path / "ours", tmp_path / "back.pth.tar", "--to", "official")
    before, after = (torch.load(tmp_path / f"{name}.pth.tar", weights_only=True) for name in ("there", "back"))
    assert list(after["state_dict"]) == list(before["state_dict"])
    assert_equal(after["state_dict"], before["state_dict"])
    assert list(after) == ["epoch", "arch", "state_dict"]
    assert (after["epoch"], after["arch"]) == (200, architecture)


def test_linear_classifier_computes_what_torchvision_does_and_comes_back_bit_for_bit(convert, tmp_path):
    there = lincls(tmp_path / "there.pth.tar")
    words = convert(tmp_path / "there.pth.tar", tmp_path / "ours")
    assert "official linear classifier, resnet18, 10 classes, epoch 100, best_acc1 67.7" in words
    assert "may be supervised" not in words
    model = MoCoForImageClassification.from_pretrained(tmp_path / "ours").eval()
    x = pixels()
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, there(x), atol=1e-6, rtol=0)

    convert(tmp_path / "ours", tmp_path / "back.pth.tar", "--to", "official")
    before, after = (torch.load(tmp_path / f"{name}.pth.tar", weights_only=True) for name in ("there", "back"))
    assert list(after["state_dict"]) == list(before["state_dict"])
    assert_equal(after["state_dict"], before["state_dict"])
    assert list(after) == ["epoch", "arch", "state_dict", "best_acc1"]
    assert torch.equal(after["best_acc1"], before["best_acc1"])


@pytest.mark.parametrize("optimizer", [None, {}, {"param_groups": [{"params": []}]}, {"param_groups": 3}, [1]])
def test_classifier_without_its_optimizer_may_be_a_supervised_one(convert, tmp_path, optimizer):
    lincls(tmp_path / "there.pth.tar")
    resave(tmp_path / "there.pth.tar", optimizer=optimizer)
    words = convert(tmp_path / "there.pth.tar", tmp_path / "ours")
    assert "it has no optimizer of fc, so that the encoder may be supervised and not MoCo's" in words
    MoCoForImageClassification.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("make", [official, lincls])
def test_names_without_the_prefix_of_ddp_come_back_without_it(convert, tmp_path, make):
    there = make(tmp_path / "there.pth.tar").state_dict()
    resave(tmp_path / "there.pth.tar", state_dict=there)
    convert(tmp_path / "there.pth.tar", tmp_path / "ours")
    for source in ("there.pth.tar", "ours"):
        convert(tmp_path / source, tmp_path / f"{source}.back", "--to", "official")
        back = torch.load(tmp_path / f"{source}.back", weights_only=True)["state_dict"]
        assert list(back) == list(there)
        assert_equal(back, there)


@pytest.mark.parametrize("kind", [MoCoModel, MoCoForImageClassification])
def test_our_model_survives_the_official_format(convert, tmp_path, kind):
    model = kind(moco_config("resnet18", projection_head="linear", temperature=0.07, num_labels=CLASSES))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there.pth.tar", "--to", "official")
    convert(tmp_path / "there.pth.tar", tmp_path / "back")
    assert_equal(kind.from_pretrained(tmp_path / "back").state_dict(), model.state_dict())
    assert set(torch.load(tmp_path / "there.pth.tar", weights_only=True)) == {"arch", "state_dict"}


def test_model_keeps_its_precision(convert, tmp_path):
    MoCoModel(moco_config("resnet18")).to(torch.bfloat16).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there.pth.tar", "--to", "official")
    convert(tmp_path / "there.pth.tar", tmp_path / "back")
    assert_equal(read(str(tmp_path / "back")).state, read(str(tmp_path / "ours")).state)
    assert MoCoModel.from_pretrained(tmp_path / "back").dtype == torch.bfloat16


def test_converted_processor_normalises_as_the_model_does(tmp_path):
    official(tmp_path / "there.pth.tar")
    checkpoint = read(str(tmp_path / "there.pth.tar"))
    checkpoint.config.image_mean, checkpoint.config.image_std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    write(checkpoint, tmp_path / "ours", "moco")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_tensors_that_share_memory_in_the_file_no_longer_do(tmp_path):
    model = Official("resnet18", mlp)
    state = prefixed(model, "module.")
    shared = torch.randn(2, 512)
    for part in ("encoder_q", "encoder_k"):  # one tensor twice, and two views of one
        state[f"module.{part}.conv1.weight"] = model.encoder_q.conv1.weight.to(memory_format=torch.channels_last)
        state[f"module.{part}.layer4.1.bn1.weight"], state[f"module.{part}.layer4.1.bn1.bias"] = shared
    torch.save({"state_dict": state}, tmp_path / "there.pth.tar")
    tensors = read(str(tmp_path / "there.pth.tar")).state.values()
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.is_contiguous() for tensor in tensors)


def test_converted_directory_serves_auto_classes_and_pipelines(convert, tmp_path):
    lincls(tmp_path / "there.pth.tar")
    convert(tmp_path / "there.pth.tar", tmp_path / "ours")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "conversion.json")
    }
    assert AutoImageProcessor.from_pretrained(tmp_path / "ours").crop_size["height"] == 224
    assert type(AutoModel.from_pretrained(tmp_path / "ours")) is MoCoModel
    classify = pipeline("image-classification", model=str(tmp_path / "ours"), device="cpu")
    assert len(classify(Image.new("RGB", (260, 230)), top_k=3)) == 3


def test_query_encoder_alone_gets_a_copy_and_a_fresh_queue_when_loaded(convert, tmp_path):
    there = resnet(head=mlp)
    torch.save({"state_dict": prefixed(there, "module.encoder_q.")}, tmp_path / "there.pth.tar")
    words = convert(tmp_path / "there.pth.tar", tmp_path / "ours")
    assert "no queue" in words
    assert "no key encoder" in words
    model = MoCoModel.from_pretrained(tmp_path / "ours")
    assert_computes(model, there, there)
    torch.testing.assert_close(model.dictionary.queue.norm(dim=0), torch.ones(65536))

    convert(tmp_path / "ours", tmp_path / "back.pth.tar", "--to", "official")
    back = torch.load(tmp_path / "back.pth.tar", weights_only=True)["state_dict"]
    assert_equal(back, prefixed(there, "module.encoder_q."))


def test_tensors_win_over_the_name_that_a_file_gives_itself(convert, tmp_path):
    lincls(tmp_path / "there.pth.tar")
    resave(tmp_path / "there.pth.tar", arch="resnet50")
    assert "its arch is resnet50, but its tensors are those of resnet18" in convert(
        tmp_path / "there.pth.tar", tmp_path / "ours"
    )
    convert(tmp_path / "ours", tmp_path / "back.pth.tar", "--to", "official")
    assert torch.load(tmp_path / "back.pth.tar", weights_only=True)["arch"] == "resnet18"


def test_no_control_characters_of_a_file_are_printed_or_kept(convert, tmp_path):
    _, _, state = solo_learn(tmp_path / "there.ckpt")
    state["classifier.\x1b[31m\n"] = torch.ones(1)
    torch.save({"arch": "\x1b[2Jresnet50\n", "epoch": "\x1b[2J", "state_dict": state}, tmp_path / "there.ckpt")
    words = convert(tmp_path / "there.ckpt", tmp_path / "ours")
    assert words.replace("\n", "").isprintable()
    assert "\n\n" not in words
    assert not {"arch", "epoch"} & json.loads((tmp_path / "ours" / "conversion.json").read_text()).keys()


@pytest.mark.parametrize("architecture", RESNETS)
def test_every_resnet_is_told_by_its_shapes(architecture):
    with torch.device("meta"):
        model = torchvision.models.get_model(architecture)
    model.fc = nn.Identity()
    assert recognise_resnet(Path("file"), model.state_dict()) == architecture
