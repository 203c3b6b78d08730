"""Checkpoints of other MoCo code, built here from torchvision's ResNets in the layouts that their sources write."""

import io
import json
import os
import pickle
import resource
from argparse import Namespace
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from tiny_models import assert_equal, moco_config
from torch import nn
from transformers import AutoImageProcessor, AutoModel, pipeline

from modeling_moco import MoCoForImageClassification, MoCoModel
from training.convert.detect import recognise_resnet
from training.convert.files import FORMATS, read, write
from training.convert.key_maps import RESNETS
from training.hub.publish import PublishArguments, load_published, publish

C, K, CLASSES = 16, 48, 10


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def convert(script, capsys):
    """Run the script; what it prints."""

    def run(*words) -> str:
        capsys.readouterr()  # what the test itself has printed
        script("convert").main([str(word) for word in words])
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


@pytest.fixture
def refuse(script, capsys):
    """Run the script, which is to end with one line on standard error; that line."""

    def run(*words) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            script("convert").main([str(word) for word in words])
        assert end.value.code == 2
        error = capsys.readouterr().err.removesuffix("\n")
        assert error.startswith("error: ")
        assert error.isprintable()
        return error.removeprefix("error: ")

    return run


# Files


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


# Official


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
        (mlp, "resnet50", 65536, False, "official MoCo v2, resnet50, K 65,536, dim 16, epoch 200"),
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


# lightly, solo-learn


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


# Out


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


@pytest.mark.parametrize("config", [{"architecture": "test_resnet"}, {"architecture": "resnet18", "stem": "small"}])
def test_models_that_the_others_cannot_hold_are_refused(refuse, tmp_path, config):
    MoCoModel(moco_config(**config)).save_pretrained(tmp_path / "ours")
    for to in set(FORMATS) - {"moco"}:
        error = refuse(tmp_path / "ours", tmp_path / "out", "--to", to)
        assert f"--to {to} writes torchvision's ResNets alone" in error
    assert not (tmp_path / "out").exists()


# Refusals


class RunsCode:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def with_state(**changes):
    """An official file with some tensors changed, or left out for None; `__` stands for a dot."""

    def write(path):
        state = prefixed(Official("resnet18", linear), "module.")
        state |= {f"module.{name.replace('__', '.')}": tensor for name, tensor in changes.items()}
        torch.save({"state_dict": {name: t for name, t in state.items() if t is not None}}, path)

    return write


def cut_official(share, legacy):
    def write(path):
        content = {"state_dict": {"module.queue": keys(4096), "module.queue_ptr": torch.zeros(1)}}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        cut(path, share)

    return write


def saved(content, legacy=False):
    return lambda path: torch.save(
        content(path) if callable(content) else content, path, _use_new_zipfile_serialization=not legacy
    )


def code(path):
    return {"state_dict": {"module.encoder_q.conv1.weight": RunsCode(path.parent / "canary")}}


def quantised():
    return torch.quantize_per_tensor(torch.ones(64, 3, 7, 7), 0.1, 0, torch.qint8)


def half_a_key_encoder(head: bool):
    """An official file whose keys have their head alone, or all else alone."""
    names = [name for name in Official("resnet18", linear).state_dict() if name.startswith("encoder_k.")]
    return with_state(**{name: None for name in names if name.startswith("encoder_k.fc.") != head})


def v3(_):
    return {"state_dict": prefixed(resnet(), "module.base_encoder.") | prefixed(resnet(), "module.momentum_encoder.")}


UNREADABLE = "is not a torch checkpoint, or is damaged: download or copy it again"
REFUSED = {
    "code": (
        saved(code),
        "needs posix.mkdir, which is not a tensor and may run code, so that it is not loaded: ask its author",
    ),
    "code, as torch 1.3 wrote": (saved(code, legacy=True), "needs posix.mkdir"),
    "code in a plain pickle": (
        lambda path: path.write_bytes(pickle.dumps(RunsCode(path.parent / "canary"), protocol=2)),
        "needs posix.mkdir",
    ),
    "code of a name that terminals obey": (
        lambda path: path.write_bytes(b"\x80\x02cos\x1b[31m\nmkdir\n)R."),
        "needs os, which is not a tensor",
    ),
    "cut off": (cut_official(0.6, legacy=False), UNREADABLE),
    "cut off, as torch 1.3 wrote": (cut_official(0.6, legacy=True), UNREADABLE),
    "cut off early": (cut_official(0.001, legacy=True), UNREADABLE),
    "empty": (lambda path: path.touch(), "(0 bytes) is not a torch checkpoint"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html><html>Not Found</html>"), UNREADABLE),
    "image": (lambda path: Image.new("RGB", (9, 9)).save(path, "PNG"), UNREADABLE),
    "TorchScript": (lambda path: torch.jit.save(torch.jit.trace(nn.ReLU(), pixels()), path), UNREADABLE),
    "DINO": (
        saved({"student": {"module.head.weight": torch.ones(1)}, "teacher": {}, "epoch": 1}),
        "contains a DINO checkpoint (student and teacher): this script converts official MoCo, official linear classifier,",
    ),
    "DINO with its arguments": (
        saved({"student": {}, "teacher": {}, "args": Namespace(lr=1)}),
        "needs argparse.Namespace",
    ),
    "MoCo v3": (saved(v3), "contains a MoCo v3 checkpoint (no queue)"),
    "supervised torchvision": (
        saved(lambda _: resnet(head=linear).state_dict()),
        "contains the weights of a ResNet alone, which timm and torchvision load themselves",
    ),
    "official notebook": (
        saved({"state_dict": {"queue": keys(), "encoder_q.net.0.weight": torch.ones(64, 3, 3, 3)}}),
        "contains a checkpoint of the official CIFAR-10 notebook",
    ),
    "something else": (
        saved({"model": {"a": torch.ones(1)}}),
        "contains unknown names (model): this script converts",
    ),
    "tensor": (saved(torch.ones(1)), "contains a Tensor, not a checkpoint"),
    "supervised, of pytorch/examples": (
        lambda path: lincls(path, supervised=True),
        "contains a supervised ResNet (its optimizer has 62 parameters, that of a linear classifier has fc.weight and "
        "fc.bias alone): load it with timm or torchvision",
    ),
    "with the prefix of DDP and without": (
        lambda path: torch.save(
            {"state_dict": prefixed(Official("resnet18", linear), "module.") | {"queue": keys()}}, path
        ),
        "contains queue without the prefix module., and other tensors with it: delete one",
    ),
    "sparse": (with_state(queue=keys().to_sparse()), "contains queue, which are not dense tensors with data"),
    "without data": (with_state(queue=keys().to("meta")), "contains queue, which are not dense tensors with data"),
    "quantised": (
        lambda path: with_state(encoder_q__conv1__weight=quantised())(path),
        "contains encoder_q.conv1.weight, which are not dense tensors with data",
    ),
    "complex queue": (
        with_state(queue=torch.ones(C, K, dtype=torch.complex64)),
        "dictionary.queue is torch.complex64, not floating point",
    ),
    "integer queue": (with_state(queue=torch.ones(C, K).long()), "dictionary.queue is torch.int64, not floating point"),
    "integer weights": (
        with_state(encoder_q__fc__bias=torch.ones(C, dtype=torch.int8)),
        "projector_q.bias is torch.int8, not floating point",
    ),
    "pointer with a fraction": (
        with_state(queue_ptr=torch.zeros(1)),
        "dictionary.queue_ptr is torch.float32, not integer",
    ),
    "boolean pointer": (
        with_state(queue_ptr=torch.tensor([True])),
        "dictionary.queue_ptr is torch.bool, not integer",
    ),
    "batches with a fraction": (
        with_state(encoder_k__bn1__num_batches_tracked=torch.tensor(0.5)),
        "encoder_k.bn1.num_batches_tracked is torch.float32, not integer",
    ),
    "no tensors": (
        with_state(encoder_q__conv1__weight="?"),
        "contains encoder_q.conv1.weight, which are not dense tensors with data",
    ),
    "tensor missing": (
        with_state(encoder_q__layer1__0__bn1__weight=None),
        "does not contain a ResNet of torchvision; compared with resnet18, layer1.0.bn1.weight is missing",
    ),
    "key tensor missing": (
        with_state(encoder_k__layer1__0__bn1__weight=None),
        "is not a complete model: encoder_k.layer1.0.bn1.weight is missing",
    ),
    "key encoder without its head": (half_a_key_encoder(head=False), "projector_k.weight is missing"),
    "key head without its encoder": (half_a_key_encoder(head=True), "encoder_k.conv1.weight is missing"),
    "half a key head": (with_state(encoder_k__fc__bias=None), "projector_k.bias is missing"),
    "other shape": (
        with_state(queue=torch.ones(C + 1, K)),
        f"dictionary.queue is ({C + 1}, {K}), not ({C}, {K}). It is damaged or another model",
    ),
    "more than MoCo": (
        with_state(predictor__0__weight=torch.ones(1)),
        "contains predictor.0.weight, which MoCo does not have",
    ),
    "scalar": (with_state(queue=torch.ones(())), "dictionary.queue is (), not (16, 1)"),
    "solo-learn on CIFAR": (
        lambda path: solo_learn(path, **{"backbone.conv1.weight": torch.ones(64, 3, 3, 3)}),
        "begins with a 3x3 convolution of unknown padding (solo-learn pads by 2, the official notebook by 1)",
    ),
    "solo-learn without a queue": (
        lambda path: solo_learn(path, queue=None, queue_ptr=None),
        "contains a checkpoint of another solo-learn method",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*quantize")
@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_file_leaves_one_line_and_nothing_else(refuse, tmp_path, write, message):
    path = tmp_path / "there.pth.tar"
    write(path)
    error = refuse(path, tmp_path / "ours")
    print(error.replace(str(tmp_path), ""))
    assert message in error
    assert str(path) in error
    assert os.listdir(tmp_path) == ["there.pth.tar"]  # no canary either


@pytest.mark.parametrize("legacy", [False, True])
def test_damage_anywhere_is_one_line(tmp_path, legacy):
    path, random = tmp_path / "there.pth.tar", np.random.default_rng(0)
    saved({"epoch": 1, "state_dict": {"module.queue": keys(4), "module.queue_ptr": torch.zeros(1)}}, legacy)(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(300):
        damaged = whole.copy()
        damaged[random.integers(0, len(whole), 3)] = random.integers(0, 256, 3)
        path.write_bytes(damaged[: random.integers(1, 2 * len(whole))].tobytes())
        with pytest.raises(ValueError, match=r"damaged|contains?|needs"):
            read(str(path))


def test_sources_that_are_no_checkpoint_are_refused(refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    moco_config("resnet18").save_pretrained(tmp_path / "config")
    MoCoModel(moco_config("resnet18")).save_pretrained(tmp_path / "damaged")
    cut(tmp_path / "damaged" / "model.safetensors", 0.5)
    MoCoModel(moco_config("resnet18")).save_pretrained(tmp_path / "edited")
    (tmp_path / "edited" / "conversion.json").write_text('{"epoch": 3,')
    for source, message in {
        "absent.pth.tar": "does not exist",
        "absent/folder": "is not a file, a folder or a Hub repository that can be reached",
        "empty": "does not contain a MoCo model",
        "vit": "does not contain a MoCo model (model_type vit in config.json)",
        "config": "does not contain a MoCo model",
        "damaged": "does not contain a MoCo model",
        "edited": "edited/conversion.json is not a JSON object",
        "/proc/self/mem": "cannot be read",
    }.items():
        error = refuse(tmp_path / source, tmp_path / "out.pkl", "--to", "detectron2")
        print(error.replace(str(tmp_path), ""))
        assert message in error
    assert not (tmp_path / "out.pkl").exists()


# The command line, and what is there already


def test_wrong_commands_are_told_what_would_be_right(refuse, tmp_path):
    lincls(tmp_path / "there.pth.tar")
    MoCoModel(moco_config("resnet18")).save_pretrained(tmp_path / "ours")
    source = tmp_path / "there.pth.tar"
    for words, message in {
        (): "two names are needed: python scripts/convert.py CHECKPOINT OUTPUT [--to FORMAT]",
        (source,): "two names are needed",
        (source, tmp_path / "out", "--to", "offical"): "to ('offical') is unknown: did you mean 'official'?",
        (source, tmp_path / "out", "--too", "official"): "flag --too is unknown: did you mean '--to'?",
        (
            tmp_path / "ours",
            tmp_path / "out",
        ): "is already a model directory: pass --to official or another format",
        (
            source,
            tmp_path / "out.pth",
        ): "looks like a file, but --to moco writes a folder: pass --to official",
    }.items():
        error = refuse(*words)
        print(error.replace(str(tmp_path), ""))
        assert message in error
    assert not list(tmp_path.glob("out*"))


def test_names_longer_than_a_file_system_takes_are_refused(refuse, tmp_path):
    lincls(tmp_path / "there.pth.tar")
    for to in FORMATS:
        error = refuse(tmp_path / "there.pth.tar", tmp_path / ("n" * 300), "--to", to)
        assert "File name too long" in error
        assert "name another output" in error
    assert "is not a file, a folder or a Hub repository" in refuse("n" * 300, tmp_path / "out")
    assert "does not exist" in refuse("n" * 300 + ".pth", tmp_path / "out")


def test_what_is_there_is_never_overwritten(refuse, tmp_path):
    lincls(tmp_path / "there.pth.tar")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "link"):
        for to in FORMATS:
            error = refuse(tmp_path / "there.pth.tar", tmp_path / name, "--to", to)
            assert f"{name} exists and is not overwritten: name another output" in error
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "folder").iterdir())


@contextmanager
def files_no_larger_than(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("to", FORMATS)
def test_nothing_is_half_written(refuse, tmp_path, to):
    lincls(tmp_path / "there.pth.tar")
    with files_no_larger_than(1_000_000):  # as on a full disk
        error = refuse(tmp_path / "there.pth.tar", tmp_path / "new" / "out", "--to", to)
    print(error.replace(str(tmp_path), ""))
    assert "cannot be written" in error
    assert not list((tmp_path / "new").iterdir())
    assert "cannot be written" in refuse(tmp_path / "there.pth.tar", tmp_path / "there.pth.tar" / "out", "--to", to)


def test_what_was_published_is_converted_too_and_its_card_says_where_it_came_from(convert, tmp_path):
    official(tmp_path / "moco.pth.tar", "resnet18", mlp, K, False)
    convert(tmp_path / "moco.pth.tar", tmp_path / "model")
    model, processor = load_published(str(tmp_path / "model"), training_state=True)
    args = PublishArguments(include_training_state=True)
    publish(str(tmp_path / "model"), model, processor, "org/name", args, tmp_path / "published")
    assert (
        "Converted from `moco.pth.tar` (official MoCo, epoch 200)" in (tmp_path / "published" / "README.md").read_text()
    )
    convert(tmp_path / "published", tmp_path / "back.pth.tar", "--to", "official")
    before, after = (torch.load(tmp_path / f"{name}.pth.tar", weights_only=True) for name in ("moco", "back"))
    assert_equal(after["state_dict"], before["state_dict"])
