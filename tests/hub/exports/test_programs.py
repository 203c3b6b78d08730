"""ONNX and torch.export, the precision of what is exported, and the preparation that formats can say."""

import json
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from exported_models import SIZE, assert_same, images, ours, published, saved

from modeling_moco import MoCoImageProcessorPil
from training.hub import exports
from training.hub.publish import list_files, load_published


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["default", "small"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # torch's own
def test_onnx_and_torch_export_take_any_number_of_images(stem, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = saved(tmp_path / "saved", "test_resnet", "classifier", stem=stem, batch_norm="split")
    folder = published(tmp_path / "saved", tmp_path / "published", onnx=True, torch_export=True)
    assert {"onnx/model.onnx", "onnx/model.onnx.data", "torch_export/model.pt2"} <= set(list_files(folder))
    with zipfile.ZipFile(folder / "torch_export" / "model.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    assert not [data for data in contents if data[:2] in (b"\x80\x02", b"\x80\x04", b"PK")]  # no pickle
    contents.append((folder / "onnx" / "model.onnx").read_bytes())
    assert not [data for data in contents if str(Path(timm.__file__).parent).encode() in data]  # no path
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    program = torch.export.load(folder / "torch_export" / "model.pt2").module()
    for n in (1, 2, 5):
        x = torch.randn(n, 3, SIZE, SIZE)
        expected = ours(model, x)
        (found,) = session.run(["logits"], {"pixel_values": x.numpy()})
        assert (torch.from_numpy(found) - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
        with torch.no_grad():
            assert_same(program(x), expected)


def test_a_model_in_16_bits_is_exported_in_32(tmp_path):
    model = saved(tmp_path / "saved", "test_resnet", "classifier").bfloat16()
    program = exports.export_program(model, SIZE).module()
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert program(x).dtype == torch.float32
    assert_same(program(x).detach(), ours(model.float(), x))


@pytest.mark.parametrize(
    "edit",
    [{"resample": 3}, {"do_center_crop": False}, {"size": {"height": 9, "width": 9}}, {"crop_size": [48, 40]}],
    ids=lambda edit: next(iter(edit)),
)
def test_a_preparation_that_other_formats_cannot_say_is_refused(edit, tmp_path):
    saved(tmp_path, "test_resnet", "encoder")
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(ValueError, match=f"{next(iter(edit))} .* is not what the other formats do"):
        load_published(str(tmp_path), training_state=False)


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (32, 37), (32, 32), (49, 56), (96, 109), (160, 183)])
def test_timm_resizes_to_the_same_pixel(size, resize):
    processor = MoCoImageProcessorPil(
        size={"shortest_edge": resize}, crop_size={"height": size, "width": size}, image_mean=[0.5] * 3
    )
    transform = timm.data.create_transform(**exports.data_config(processor), is_training=False)
    for image in images():
        enlarged = image.convert("RGB").resize((image.width * 3, image.height * 3))
        assert torch.equal(transform(enlarged), processor(enlarged, return_tensors="pt").pixel_values[0])
