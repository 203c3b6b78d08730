"""One directory, many loaders: all compute the same, through the preprocessing that each finds in it."""

import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from tiny_models import assert_equal, moco_config
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    DetrConfig,
    DetrModel,
    ResNetBackbone,
    dynamic_module_utils,
    pipeline,
)

from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoImageProcessor, MoCoImageProcessorPil, MoCoModel
from training.convert.key_maps import RESNETS as TORCHVISION
from training.data.sources import DataArguments, load_images
from training.hub import exports
from training.hub.publish import PublishArguments, list_files, load_published, publish

LABELS = [f"class {i}" for i in range(7)]
SIZE, RESIZE = 48, 55


def randomised(model):
    """Random statistics and scales: fresh ones are 0 and 1, with which forgotten tensors would not be seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
        if isinstance(model, MoCoForImageClassification):
            model.classifier.weight.normal_(0, 0.3, generator=generator)
            model.classifier.bias.normal_(generator=generator)
    return model.eval()


def images():
    """Of sizes whose margins are odd and even, wide and high, gray and with transparency."""
    random = np.random.default_rng(0)
    sizes = [(60, 80), (81, 60), (57, 57), (120, 90), (49, 61), (200, 63)]
    coarse = [Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size) for size in sizes]
    return [coarse[0].convert("L"), coarse[1].convert("RGBA"), *coarse[2:]]


def saved(folder, architecture, kind, **config):
    torch.manual_seed(0)
    if kind == "classifier":
        names = dict(enumerate(LABELS))
        config |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    whole = MoCoForImageClassification if kind == "classifier" else MoCoModel
    model = randomised(whole(moco_config(architecture, **config)))
    model.save_pretrained(folder)
    processor = MoCoImageProcessor(
        size={"shortest_edge": RESIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.25, 0.3],
    )
    processor.save_pretrained(folder)
    return model


def published(source, folder, **flags):
    args = PublishArguments(**flags)
    model, processor = load_published(str(source), args.include_training_state)
    publish(str(source), model, processor, "org/name", args, folder)
    return folder


@pytest.fixture(scope="module", params=["encoder", "classifier"])
def resnet(request, tmp_path_factory):
    """Kind, model and published folder of a ResNet-18."""
    folder = tmp_path_factory.mktemp(request.param)
    model = saved(folder / "saved", "resnet18", request.param, batch_norm="split")
    return request.param, model, published(folder / "saved", folder / "published")


@torch.no_grad()
def ours(model, inputs):
    return model(inputs).logits if isinstance(model, MoCoForImageClassification) else model(inputs).pooler_output


def assert_same(found, expected):
    """To the bit, or within the rounding of another order of the same sums: some loaders keep weights elsewhere."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())


@pytest.fixture(scope="module")
def exact(resnet):
    """Inputs by the exact transform, and what our model makes of them."""
    _, model, folder = resnet
    processor = MoCoImageProcessorPil.from_pretrained(folder)
    assert processor.size["shortest_edge"] == RESIZE
    inputs = torch.cat([processor(image.convert("RGB"), return_tensors="pt").pixel_values for image in images()])
    return inputs, ours(model, inputs)


# ours, timm, TimmWrapper, ResNet


def test_our_classes_load_what_was_published(resnet, exact):
    kind, model, folder = resnet
    inputs, expected = exact
    whole = MoCoForImageClassification if kind == "classifier" else MoCoModel
    loaded, report = whole.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.batch_norm == "split"
    assert torch.equal(ours(loaded.eval(), inputs), expected)
    assert_equal(
        exports.encoder_and_classifier(loaded)[0].state_dict(), exports.encoder_and_classifier(model)[0].state_dict()
    )


def test_timm_loads_the_folder_with_its_own_transform(resnet, exact):
    _, _, folder = resnet
    inputs, expected = exact
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    own = torch.stack([transform(image.convert("RGB")) for image in images()])
    assert torch.equal(own, inputs)
    with torch.no_grad():
        assert_same(model(own), expected)
    fresh = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3).eval()
    assert torch.equal(fresh.layer1[0].conv1.weight, model.layer1[0].conv1.weight)
    assert fresh(own).shape == (len(own), 3)


@pytest.mark.parametrize("part", [".", "resnet"])
def test_transformers_loads_it_without_our_code(resnet, exact, part):
    kind, _, folder = resnet
    inputs, expected = exact
    place = folder / part
    processor = AutoImageProcessor.from_pretrained(place)
    own = torch.cat([processor(image.convert("RGB"), return_tensors="pt").pixel_values for image in images()])
    assert torch.equal(own, inputs)
    auto = AutoModelForImageClassification if kind == "classifier" else AutoModel
    model, report = auto.from_pretrained(place, output_loading_info=True)
    assert type(model).__module__.startswith("transformers.")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        outputs = model.eval()(own)
    assert_same(outputs.logits if kind == "classifier" else outputs.pooler_output.flatten(1), expected)


@pytest.mark.parametrize("part", [".", "resnet"])
def test_pipelines_need_nothing_but_the_folder(resnet, exact, part):
    kind, _, folder = resnet
    _, expected = exact
    if kind == "classifier":
        classify = pipeline("image-classification", model=str(folder / part), device="cpu")
        for image, logits in zip(images(), expected, strict=True):
            top = classify(image, top_k=3)
            best = logits.softmax(dim=0).topk(3)
            assert [entry["label"] for entry in top] == [LABELS[i] for i in best.indices]
            assert [entry["score"] for entry in top] == pytest.approx(best.values.tolist(), rel=1e-4)
    else:
        extract = pipeline("image-feature-extraction", model=str(folder / part), device="cpu")
        for image, features in zip(images(), expected, strict=True):
            assert_same(extract(image, pool=True, return_tensors=True).flatten(), features)


def test_a_detector_takes_it_as_its_backbone(resnet):
    _, _, folder = resnet
    stages = ["stage2", "stage4"]
    backbone = ResNetBackbone.from_pretrained(folder / "resnet", out_features=stages).eval()
    oracle = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(2, 4)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for found, expected in zip(backbone(x).feature_maps, oracle(x), strict=True):
            assert_same(found, expected)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 3}
    small = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")}
    config = DetrConfig(backbone_config=backbone.config, **sizes, **small)
    detector = DetrModel(config).eval()
    missing, unexpected = detector.backbone.model.load_state_dict(backbone.state_dict(), strict=False)
    assert not missing  # its BatchNorm is frozen and counts nothing
    assert all(name.endswith("num_batches_tracked") for name in unexpected)
    with torch.no_grad():
        for found, expected in zip(detector.backbone.model(x).feature_maps, backbone(x).feature_maps, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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


# Other encoders


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
@pytest.mark.parametrize("architecture", ["test_convnext", "test_vit", "mobilenetv3_small_050"])
def test_any_encoder_of_timm_is_published_for_timm(architecture, kind, tmp_path):
    args = {"model_args": {"img_size": SIZE}} if architecture == "test_vit" else {}
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


# Training state


def test_training_state_travels_when_asked_for(tmp_path):
    model = saved(tmp_path / "saved", "test_resnet", "encoder")
    model.dictionary.enqueue(torch.nn.functional.normalize(torch.randn(8, 16)))
    model.save_pretrained(tmp_path / "saved")
    alone = published(tmp_path / "saved", tmp_path / "alone")
    whole = published(tmp_path / "saved", tmp_path / "whole", include_training_state=True)
    assert_equal(MoCoModel.from_pretrained(whole).state_dict(), model.state_dict())
    assert set(exports.read_written(whole / "config.json")) == set(exports.read_written(alone / "config.json"))
    fresh = MoCoModel.from_pretrained(alone)
    assert_equal(fresh.encoder_q.state_dict(), model.encoder_q.state_dict())
    assert fresh.dictionary.queue_ptr.item() == 0
    assert timm.create_model(f"local-dir:{whole}", pretrained=True).num_classes == 0


def test_training_state_that_is_not_there_is_not_made_up(tmp_path):
    saved(tmp_path / "saved", "test_resnet", "encoder")
    alone = published(tmp_path / "saved", tmp_path / "alone")
    with pytest.raises(ValueError, match=r"lacks dictionary\.queue"):
        load_published(str(alone), training_state=True)
    saved(tmp_path / "probe", "test_resnet", "classifier")
    with pytest.raises(ValueError, match="is for encoders"):
        load_published(str(tmp_path / "probe"), training_state=True)


def test_a_model_without_image_processor_or_weights_is_refused(tmp_path):
    model = saved(tmp_path / "saved", "test_resnet", "encoder")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no MoCo model with its image processor"):
        load_published(str(tmp_path / "bare"), training_state=False)
    with pytest.raises(ValueError, match="pass the folder that a run saved to"):
        load_published(str(tmp_path), training_state=False)


def test_what_was_published_can_be_saved_and_published_again(tmp_path):
    model = saved(tmp_path / "saved", "test_resnet", "classifier")
    folder = published(tmp_path / "saved", tmp_path / "published")
    again = published(folder, tmp_path / "again")
    for name in list_files(folder):
        if name != "config.json":  # whose keys come in another order
            assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    assert exports.read_written(again / "config.json") == exports.read_written(folder / "config.json")
    MoCoForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    assert exports.read_written(tmp_path / "ours" / "config.json")["model_type"] == "moco"
    back = MoCoForImageClassification.from_pretrained(tmp_path / "ours")
    assert_equal(back.state_dict(), model.state_dict())


# ONNX, torch.export


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


# Sizes


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (32, 37), (32, 32), (49, 56), (96, 109), (160, 183)])
def test_timm_resizes_to_the_same_pixel(size, resize):
    processor = MoCoImageProcessorPil(
        size={"shortest_edge": resize}, crop_size={"height": size, "width": size}, image_mean=[0.5] * 3
    )
    transform = timm.data.create_transform(**exports.data_config(processor), is_training=False)
    for image in images():
        enlarged = image.convert("RGB").resize((image.width * 3, image.height * 3))
        assert torch.equal(transform(enlarged), processor(enlarged, return_tensors="pt").pixel_values[0])


# 100 photographs


def photographs(count=100):
    folder = Path(__file__).parents[3] / "shared" / "data" / "imagenet-500"
    if folder.is_dir():
        splits = load_images(DataArguments(dataset_name=str(folder)))
        return [splits.decoder.image(splits.train[i]["image"]) for i in range(count)]
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    return [Image.fromarray(x).resize((500 - i, 375 + i)) for i, x in enumerate(coarse)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # torch's own
def test_a_resnet50_has_the_same_logits_in_every_format(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    torch.manual_seed(0)
    names = {i: f"class {i}" for i in range(1000)}
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    model = randomised(MoCoForImageClassification(MoCoConfig(**labels)))
    model.classifier.weight.data.div_(100)  # to logits of the usual size
    model.save_pretrained(tmp_path / "saved")
    MoCoImageProcessor().save_pretrained(tmp_path / "saved")
    folder = published(tmp_path / "saved", tmp_path / "published", onnx=True, torch_export=True)
    pictures = photographs()
    exact = MoCoImageProcessorPil.from_pretrained(folder)
    inputs = torch.cat([exact(picture, return_tensors="pt").pixel_values for picture in pictures])
    alone = torch.cat([ours(model, x[None]) for x in inputs])  # sums of a batch are added in another order
    together = ours(model, inputs)

    def through(network, processor):
        pixels = torch.cat([processor(picture, return_tensors="pt").pixel_values for picture in pictures])
        with torch.no_grad():
            return network.eval()(pixels).logits

    def through_pipeline(place):
        classify = pipeline("image-classification", model=str(place), device="cpu")
        found = [classify(picture, top_k=1000, function_to_apply="none") for picture in pictures]
        scores = [{entry["label"]: entry["score"] for entry in entries} for entries in found]
        return torch.tensor([[row[f"class {i}"] for i in range(1000)] for row in scores])

    def through_timm():
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
        with torch.no_grad():
            return network(torch.stack([transform(picture) for picture in pictures]))

    auto, resnet, remote = (
        AutoModelForImageClassification.from_pretrained,
        folder / "resnet",
        {"trust_remote_code": True},
    )
    processor = AutoImageProcessor.from_pretrained(folder)
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    program = torch.export.load(folder / "torch_export" / "model.pt2").module()
    found = {
        "ours | MoCoForImageClassification": lambda: ours(model.from_pretrained(folder).eval(), inputs),
        "ours | Auto classes, remote code": lambda: through(auto(folder, **remote), processor),
        "timm | timm.create_model, its transform": through_timm,
        "timm | Auto classes (TimmWrapper)": lambda: through(auto(folder), processor),
        "timm | pipeline": lambda: through_pipeline(folder),
        "ResNet | Auto classes": lambda: through(auto(resnet), AutoImageProcessor.from_pretrained(resnet)),
        "ResNet | pipeline": lambda: through_pipeline(resnet),
        "torch.export | torch.export.load": lambda: program(inputs).detach(),
        "ONNX | onnxruntime": lambda: torch.from_numpy(session.run(None, {"pixel_values": inputs.numpy()})[0]),
    }
    largest = together.abs().max().item()
    print(f"\nlargest logit {largest:.1f}\n| format | loader | largest difference |\n|---|---|---|")
    differences = {}
    for name, compute in found.items():
        expected = alone if "pipeline" in name else together
        differences[name] = (compute() - expected).abs().max().item()
        print(f"| {name} | {differences[name]:.1e} |")
    assert differences.pop("ONNX | onnxruntime") < 1e-5
    assert max(differences.values()) <= 1e-6 * largest
    sizes = {"a classifier, all formats": folder}
    for words, flags in {
        "an encoder": {},
        "an encoder with its training state": {"include_training_state": True},
    }.items():
        MoCoModel(MoCoConfig()).save_pretrained(tmp_path / "encoder")
        MoCoImageProcessor().save_pretrained(tmp_path / "encoder")
        sizes[words] = published(tmp_path / "encoder", tmp_path / words, **flags)
    for words, place in sizes.items():
        parts = {name: (place / name).stat().st_size / 1e6 for name in list_files(place)}
        large = ", ".join(f"{name} {size:.1f}" for name, size in parts.items() if size > 1)
        print(f"| {words} | {sum(parts.values()):.0f} MB | {large} |")


# A line for each way back: the folder, whether its code is trusted, and the same logits.
TUNE = """
import sys
sys.modules["modeling_moco"] = sys.modules["training"] = None  # a stranger has no package of ours
import json, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
source, target, trust, image = sys.argv[1], sys.argv[2], sys.argv[3] == "trust", Image.open(sys.argv[4])
trusted = {"trust_remote_code": True} if trust else {}
kinds = {"num_labels": 3, "ignore_mismatched_sizes": True, **trusted}
model, processor = AutoModelForImageClassification.from_pretrained(source, **kinds), None
processor = AutoImageProcessor.from_pretrained(source, **trusted)
pixels = processor(image, return_tensors="pt").pixel_values
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
model.train()(torch.cat([pixels, -pixels]), labels=torch.tensor([0, 2])).loss.backward()
optimizer.step()
model.save_pretrained(target), processor.save_pretrained(target)
with torch.no_grad():
    logits = model.eval()(pixels).logits[0]
    again = AutoModelForImageClassification.from_pretrained(target, **trusted).eval()
    pixels = AutoImageProcessor.from_pretrained(target, **trusted)(image, return_tensors="pt").pixel_values
    found = {"kind": type(again).__name__, "reloaded": again(pixels).logits[0].tolist()}
    scores = pipeline("image-classification", model=target, device="cpu", **trusted)(image, top_k=3)
found |= {"tuned": logits.tolist(), "probabilities": logits.softmax(dim=0).tolist()}
print(json.dumps(found | {"scores": {entry["label"]: entry["score"] for entry in scores}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["trust", "no trust"])
def test_what_is_fine_tuned_by_a_stranger_and_saved_loads_again(resnet, trust, tmp_path):
    images()[2].save(tmp_path / "image.png")
    target = tmp_path / "tuned"
    command = [
        sys.executable,
        "-W",
        "default",
        "-c",
        TUNE,
        str(resnet[2]),
        str(target),
        trust,
        str(tmp_path / "image.png"),
    ]
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["kind"] == ("MoCo" if trust == "trust" else "TimmWrapper") + "ForImageClassification"
    assert found["reloaded"] == pytest.approx(found["tuned"], abs=1e-6)
    assert found["scores"] == pytest.approx({f"LABEL_{i}": p for i, p in enumerate(found["probabilities"])}, rel=1e-4)
    if trust == "trust":  # and with our package, with which it can be published again
        model = MoCoForImageClassification.from_pretrained(target).eval()
        pixels = MoCoImageProcessorPil.from_pretrained(target)(images()[2], return_tensors="pt").pixel_values
        assert ours(model, pixels)[0].tolist() == pytest.approx(found["tuned"], abs=1e-6)
        again = published(target, tmp_path / "again")
        torch.testing.assert_close(
            ours(MoCoForImageClassification.from_pretrained(again).eval(), pixels), ours(model, pixels)
        )
    else:
        with pytest.raises(ValueError, match="without trust_remote_code"):
            MoCoForImageClassification.from_pretrained(target)


# The command

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


@pytest.mark.parametrize("kind", ["encoder", pytest.param("classifier", marks=pytest.mark.slow)])
def test_an_export_is_loaded_by_the_lines_that_the_command_prints(kind, script, capsys, tmp_path):
    model = saved(tmp_path / "saved", "resnet18", kind, batch_norm="split")
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


def test_torchvision_has_the_resnets_that_the_converter_knows_and_no_other():
    assert set(timm.list_models(module="resnet")) & set(torchvision.models.list_models()) == set(TORCHVISION)
    for architecture in (*TORCHVISION, "densenet121", "resnet26"):
        config = MoCoConfig(architecture=architecture)
        with torch.device("meta"):
            model = SimpleNamespace(config=config, encoder_q=timm.create_model(architecture, num_classes=0))
        assert exports.is_resnet_of_torchvision(model) == (architecture in TORCHVISION)
        config.stem = "small"
        assert not exports.is_resnet_of_torchvision(model)


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
