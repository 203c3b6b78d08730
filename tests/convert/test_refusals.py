"""Files that are no checkpoint, damaged, or hold what MoCo has not: one line each, and nothing written."""

import os
import pickle
from argparse import Namespace

import numpy as np
import pytest
import torch
from foreign_checkpoints import C, K, Official, keys, lincls, linear, official_v3, pixels, prefixed, resnet, solo_learn
from PIL import Image
from tiny_models import moco_config
from torch import nn

from modeling_moco import MoCoModel
from training.convert.files import read


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


def v3_without(name):
    """An official file of MoCo v3 without one of its tensors."""

    def write(path):
        state = official_v3(path).state_dict()
        del state[name]
        torch.save({"state_dict": state}, path)

    return write


def of_a_vit(**changes):
    """The encoder of a ViT as MoCo v3 names it, with some tensors of other sizes; `__` stands for a dot."""
    sizes = {
        "cls_token": (1, 1, 192),
        "pos_embed": (1, 5, 192),
        "patch_embed__proj__weight": (192, 3, 16, 16),
    } | changes
    state = {f"base_encoder.{name.replace('__', '.')}": torch.zeros(size) for name, size in sizes.items() if size}
    return saved({"state_dict": state})


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
        "contains a DINO checkpoint (student and teacher): what can be read: official MoCo, official linear classifier,",
    ),
    "DINO with its arguments": (
        saved({"student": {}, "teacher": {}, "args": Namespace(lr=1)}),
        "needs argparse.Namespace",
    ),
    "v3, key tensor missing": (
        v3_without("momentum_encoder.layer1.0.bn1.weight"),
        "is not a complete model: encoder_k.layer1.0.bn1.weight is missing",
    ),
    "v3 and a queue": (
        saved({"state_dict": {"base_encoder.conv1.weight": torch.ones(64, 3, 7, 7), "queue": keys()}}),
        "contains queue, which MoCo does not have",
    ),
    "v3 with a convolutional stem": (
        of_a_vit(patch_embed__proj__weight=None, patch_embed__proj__0__weight=(24, 3, 3, 3)),
        "contains a ViT with a convolutional stem (vit_conv_small or vit_conv_base), which timm does not have: convert",
    ),
    "v3, ViT of another width": (
        of_a_vit(pos_embed=(1, 5, 100)),
        "contains a ViT of width 100 with patches of 16 px, and those that are read are vit_small_patch16_224,",
    ),
    "v3, ViT of no square image": (
        of_a_vit(pos_embed=(1, 4, 192)),
        "does not contain a plain ViT; compared with vit_tiny_patch16_224 of 16 px, patch_embed.proj.bias is missing",
    ),
    "v3, ViT of an endless image": (of_a_vit(pos_embed=(0, 10**11, 192)), "does not contain a plain ViT"),
    "supervised ViT": (
        lambda path: lincls(path, "vit_tiny", supervised=True),
        "contains a supervised ViT (its optimizer has 152 parameters, that of a linear classifier has head.weight and "
        "head.bias alone)",
    ),
    "supervised torchvision": (
        saved(lambda _: resnet(head=linear).state_dict()),
        "contains the weights of a ResNet alone, which timm and torchvision load themselves (a run begins with a folder that",
    ),
    "official notebook": (
        saved({"state_dict": {"queue": keys(), "encoder_q.net.0.weight": torch.ones(64, 3, 3, 3)}}),
        "contains a checkpoint of the official CIFAR-10 notebook",
    ),
    "something else": (
        saved({"model": {"a": torch.ones(1)}}),
        "contains unknown names (a): what can be read: official MoCo,",
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
