"""One directory, many loaders: all compute the same, through the preprocessing that each finds in it."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from exported_models import LABELS, SIZE, assert_same, images, ours, published, randomised
from packaging import version
from PIL import Image
from tiny_models import assert_equal, moco_config
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
from training.data.sources import DataArguments, load_images
from training.hub import exports
from training.hub.publish import list_files

OLD_PIPELINES = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="transformers before 5.23 takes the sigmoid of what a regression predicts",
)


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


@pytest.mark.parametrize(
    ("problem", "classes", "scores"),
    [
        (None, 3, lambda logits: logits.softmax(dim=0)),
        pytest.param("regression", 1, lambda logits: logits, marks=OLD_PIPELINES),
        ("multi_label_classification", 3, torch.sigmoid),
    ],
)
def test_every_pipeline_makes_the_same_of_logits(problem, classes, scores, tmp_path):
    names = {i: str(i) for i in range(classes)}
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    model = randomised(MoCoForImageClassification(moco_config("resnet18", problem_type=problem, **labels)))
    model.save_pretrained(tmp_path / "saved")
    MoCoImageProcessorPil(size={"shortest_edge": SIZE}).save_pretrained(tmp_path / "saved")
    folder = published(tmp_path / "saved", tmp_path / "published")
    image = images()[2]
    inputs = MoCoImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt").pixel_values
    expected = {str(i): score for i, score in enumerate(scores(ours(model, inputs)[0]).tolist())}
    for place in (folder, folder / "resnet"):
        found = pipeline("image-classification", model=str(place), device="cpu")(image, top_k=classes)
        assert {one["label"]: one["score"] for one in found} == pytest.approx(expected, rel=1e-3), place


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
