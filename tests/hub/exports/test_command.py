"""`export.py`: formats in a folder, loaded by the lines that it prints."""

import re
import subprocess
import sys
import warnings

import pytest
import torch
from exported_models import RESIZE, SIZE, assert_same, images, ours, saved
from transformers import (
    AutoImageProcessor,
)

from modeling_moco import MoCoImageProcessorPil
from training.hub import exports
from training.hub.publish import list_files

FORMATS = ("timm", "transformers", "onnx", "torch_export", "torchvision")


# Runs the lines that a command printed, and keeps what each model makes of the same images. Code of ours cannot be imported.
USER = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_moco", "training", "moco_hf"):
            raise ImportError(f"{name} is code of the project")
sys.meta_path.insert(0, Nothing())
import torch
x, found = torch.load(sys.argv[1])["x"], []
for line in sys.argv[3:]:
    names = {}
    exec(line, names)
    with torch.no_grad():
        if "session" in names:
            y = torch.from_numpy(names["session"].run(None, {"pixel_values": x.numpy()})[0])
        else:
            y = names["model"](x)
    y = y if isinstance(y, torch.Tensor) else y.logits if "logits" in y else y.pooler_output
    found.append(y.flatten(1))
torch.save(found, sys.argv[2])
"""


def exported(script, capsys, source, folder, *formats):
    """What the command printed, and the lines that load what it wrote."""
    script("export").main([str(source), str(folder), *(f"--{name}" for name in formats)])
    out = capsys.readouterr().out
    return out, re.findall(r"^Load it: (.*)$", out, re.M)


def features(line, x):
    names = {}
    exec(line, names)
    with torch.no_grad():
        y = names["model"](x)
    return (y if isinstance(y, torch.Tensor) else y.logits if "logits" in y else y.pooler_output).flatten(1)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("encoder", "resnet18.a1_in1k"), pytest.param("classifier", "resnet18", marks=pytest.mark.slow)],
)
def test_an_export_is_loaded_by_the_lines_that_the_command_prints(kind, architecture, script, capsys, tmp_path):
    model = saved(tmp_path / "saved", architecture, kind, batch_norm="split")
    out, lines = exported(
        script, capsys, tmp_path / "saved", tmp_path / "it's here", "timm", "transformers", "torchvision"
    )
    assert len(lines) == 3
    assert out.splitlines()[-3:] == [f"Load it: {line}" for line in lines]
    assert f"short side {RESIZE} px (bilinear), central {SIZE} px, divided by 255, mean 0.4, 0.5, 0.6, std 0.2" in out
    x = torch.randn(2, 3, SIZE, SIZE)
    for line in lines:
        assert "moco" not in line
        assert_same(features(line, x), ours(model, x))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "it's here" / "resnet")
    own = processor(images()[2], return_tensors="pt").pixel_values
    assert torch.equal(
        own, MoCoImageProcessorPil.from_pretrained(tmp_path / "saved")(images()[2], return_tensors="pt").pixel_values
    )
    assert list_files(tmp_path / "it's here") == [
        *("config.json", "model.safetensors", "resnet/config.json", "resnet/model.safetensors"),
        *("resnet/preprocessor_config.json", "torchvision/model.safetensors"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_every_export_is_loaded_by_a_process_without_our_code(kind, script, capsys, tmp_path):
    model = saved(tmp_path / "saved", "resnet18", kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        _, lines = exported(script, capsys, tmp_path / "saved", tmp_path / "out", *FORMATS)
    assert len(lines) == len(FORMATS)
    x = torch.randn(3, 3, SIZE, SIZE)
    torch.save({"x": x}, tmp_path / "x.pt")
    command = [sys.executable, "-I", "-W", "ignore", "-c", USER, str(tmp_path / "x.pt"), str(tmp_path / "y.pt"), *lines]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    found, expected = torch.load(tmp_path / "y.pt"), ours(model, x)
    for name, y in zip(FORMATS, found, strict=True):
        print(f"{name}: {(y - expected).abs().max():.1e}")
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


REFUSED = {
    (
        "test_vit",
        "torchvision",
    ): "is a test_vit (stem default, model_args {'img_size': 32}), but --torchvision is for the ResNets",
    ("test_vit", "transformers"): "but --transformers is for resnet18, resnet34",
    ("small", "timm"): "is a resnet18 (stem small), but --timm is for models that timm has: leave it out",
}


@pytest.mark.parametrize(("name", "wanted"), REFUSED)
def test_an_encoder_that_a_format_has_not_is_refused_before_anything_is_written(name, wanted, script, capsys, tmp_path):
    architecture, config = ("resnet18", {"stem": "small"}) if name == "small" else (name, {})
    saved(tmp_path / "saved", architecture, "encoder", **config)
    with pytest.raises(SystemExit):
        script("export").main([str(tmp_path / "saved"), str(tmp_path / "out"), "--onnx", f"--{wanted}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert REFUSED[name, wanted] in line
    assert not (tmp_path / "out").exists()


def test_an_export_overwrites_nothing_and_names_its_formats(script, capsys, tmp_path):
    saved(tmp_path / "saved", "test_resnet", "encoder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "empty").mkdir()
    for argv, words in (
        ([tmp_path / "full", "--timm"], "full is there already, and is not overwritten: name another folder"),
        ([tmp_path / "full" / "mine", "--timm"], "mine is there already"),
        ([tmp_path / "full" / "mine" / "below", "--timm"], "below cannot be written"),
        (
            [tmp_path / "out"],
            "no format is given: choose one or several of --timm, --transformers, --onnx, --torch_export",
        ),
    ):
        with pytest.raises(SystemExit):
            script("export").main([str(tmp_path / "saved"), *map(str, argv)])
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert list_files(tmp_path / "full") == ["mine"]
    exported(script, capsys, tmp_path / "saved", tmp_path / "empty", "timm")
    assert list_files(tmp_path / "empty") == ["config.json", "model.safetensors"]
    config = exports.read_written(tmp_path / "empty" / "config.json")
    assert "license" not in config["pretrained_cfg"]
