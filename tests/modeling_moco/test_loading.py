"""What is saved comes back: models whole and half, Auto classes, the backbone and pipelines."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import C, K, assert_equal, key_parts, moco_config, query_parts, views
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)

from modeling_moco import MoCoBackbone, MoCoConfig, MoCoForImageClassification, MoCoImageProcessor, MoCoModel

LABELS = 100


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def checkpoints(trained, tmp_path_factory):
    """Directories with the whole model, with the query encoder alone, and with a classifier, beside image processors."""
    folder = tmp_path_factory.mktemp("checkpoints")
    trained.save_pretrained(folder / "full")
    MoCoModel.from_pretrained(folder / "full", momentum_encoder=False).save_pretrained(folder / "encoder")
    classifier = MoCoForImageClassification.from_pretrained(folder / "full", num_labels=LABELS)
    classifier.save_pretrained(folder / "classifier")
    processor = MoCoImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for name in ("full", "classifier"):
        processor.save_pretrained(folder / name)
    return folder


# Saving and loading


LOADING = {
    "full precision": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "device map": {"device_map": "cpu"},
    "another queue": {"queue_size": 32, "ignore_mismatched_sizes": True},
}


@pytest.mark.parametrize("kwargs", LOADING.values(), ids=LOADING)
@pytest.mark.parametrize("source", ["full", "encoder", "classifier"])
def test_loaded_model_is_whole_and_its_key_encoder_frozen(trained, checkpoints, source, kwargs):
    model, info = MoCoModel.from_pretrained(checkpoints / source, output_loading_info=True, **kwargs)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["error_msgs"]

    dtype = kwargs.get("dtype", torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(("encoder_q.", "projector_q.")), name
        assert parameter.dtype == dtype, name
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in trained.state_dict().items()}
    encoder = {name: t for name, t in state.items() if name.startswith("encoder_q.")}
    assert_equal({name: t for name, t in query_parts(model).items() if name in encoder}, encoder)
    if source == "full":
        assert_equal(key_parts(model), {name: state[name] for name in key_parts(trained)})
    else:
        assert_equal(key_parts(model), query_parts(model, rename=True))

    size = kwargs.get("queue_size", K)
    queue, pointer = model.dictionary.queue, model.dictionary.queue_ptr
    assert queue.dtype == torch.float32
    assert queue.shape == (C, size)
    torch.testing.assert_close(queue.norm(dim=0), torch.ones(size))
    assert pointer.dtype == torch.long
    assert 0 <= pointer.item() < size
    if source == "full" and size == K:
        assert torch.equal(queue, trained.dictionary.queue)


def test_trained_state_survives_saving_bit_for_bit(trained, checkpoints):
    assert trained.dictionary.queue_ptr.item() == 40
    for name, tensor in query_parts(trained, rename=True).items():  # otherwise a copied key encoder would pass
        assert not torch.equal(tensor, trained.state_dict()[name]) or "num_batches_tracked" in name
    assert_equal(MoCoModel.from_pretrained(checkpoints / "full").state_dict(), trained.state_dict())


def test_bare_tie_weights_leaves_the_key_encoder_alone(trained):
    before = {name: t.clone() for name, t in trained.state_dict().items()}
    trained.tie_weights()
    assert_equal(trained.state_dict(), before)


def test_encoder_and_classifier_survive_the_round_trip(trained, checkpoints, tmp_path):
    classifier, info = MoCoForImageClassification.from_pretrained(
        checkpoints / "full", num_labels=LABELS, output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert_equal(classifier.moco.encoder_q.state_dict(), trained.encoder_q.state_dict())
    assert classifier.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not classifier.classifier.bias.any()

    classifier.save_pretrained(tmp_path)
    assert_equal(MoCoForImageClassification.from_pretrained(tmp_path).state_dict(), classifier.state_dict())
    back = MoCoModel.from_pretrained(tmp_path)
    assert_equal(back.encoder_q.state_dict(), trained.encoder_q.state_dict())
    assert_equal(back.encoder_k.state_dict(), trained.encoder_q.state_dict())


def test_channels_last_model_loads_back_equal(trained, tmp_path):
    model = MoCoModel(moco_config())
    model.load_state_dict(trained.state_dict())
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    assert_equal(MoCoModel.from_pretrained(tmp_path).state_dict(), trained.state_dict())


@pytest.mark.parametrize(
    ("architecture", "model_args"),
    [
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2}),
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2]}),
    ],
)
def test_buffers_that_checkpoints_lack_are_rebuilt_on_loading(architecture, model_args, tmp_path):
    model = MoCoModel(moco_config(architecture, model_args=model_args))
    model.save_pretrained(tmp_path)
    lacking = {name: t for name, t in model.named_buffers() if name not in model.state_dict() and t is not None}
    assert lacking
    assert_equal({n: t for n, t in MoCoModel.from_pretrained(tmp_path).named_buffers() if n in lacking}, lacking)


# Auto classes and pipelines


def test_auto_classes_load_the_trained_weights(trained, checkpoints):
    config = AutoConfig.from_pretrained(checkpoints / "full")
    assert type(config) is MoCoConfig
    assert (config.architecture, config.queue_size, config.projection_dim) == ("test_resnet", K, C)
    model = AutoModel.from_pretrained(checkpoints / "full")
    classifier = AutoModelForImageClassification.from_pretrained(checkpoints / "classifier")
    assert type(model) is MoCoModel
    assert type(classifier) is MoCoForImageClassification
    assert_equal(model.state_dict(), trained.state_dict())
    images = views()[0]
    with torch.no_grad():
        logits = classifier.eval()(images).logits
        expected = F.linear(trained(images).pooler_output, classifier.classifier.weight, classifier.classifier.bias)
    assert logits.shape == (8, LABELS)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("source", ["full", "encoder", "classifier"])
def test_backbone_returns_the_maps_of_timm_at_the_chosen_stages(trained, checkpoints, source):
    backbone, info = MoCoBackbone.from_pretrained(checkpoints / source, out_indices=[1, 3], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    oracle = timm.create_model("test_resnet", features_only=True)
    oracle.load_state_dict(trained.encoder_q.state_dict())
    images = views(2, size=64)[0]
    with torch.no_grad():
        maps, stages = backbone.eval()(images).feature_maps, oracle.eval()(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 16, 16), (192, 4, 4)]
    assert backbone.channels == [32, 192]
    assert backbone.out_features == ["layer1", "layer3"]
    torch.testing.assert_close(maps, (stages[1], stages[3]))


def test_auto_backbone_from_config_defaults_to_the_last_stage():
    backbone = AutoBackbone.from_config(moco_config())
    assert type(backbone) is MoCoBackbone
    assert [tuple(m.shape) for m in backbone(views(2, size=64)[0]).feature_maps] == [(2, 96, 2, 2)]
    chosen = AutoBackbone.from_config(moco_config(out_features=["layer2", "layer4"]))
    assert (chosen.out_indices, chosen.channels) == ([2, 4], [48, 96])


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_pipelines_return_what_the_model_computes(trained, checkpoints, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    processor = AutoImageProcessor.from_pretrained(checkpoints / "full")
    inputs = processor(image.convert("RGB"), return_tensors="pt").pixel_values
    assert inputs.shape == (1, 3, 32, 32)
    classifier = MoCoForImageClassification.from_pretrained(checkpoints / "classifier").eval()
    with torch.no_grad():
        features = trained(inputs).pooler_output
        probabilities = classifier(inputs).logits.softmax(dim=1)[0]

    extract = pipeline("image-feature-extraction", model=str(checkpoints / "full"), device="cpu")
    torch.testing.assert_close(extract(image, pool=True, return_tensors=True), features)
    classify = pipeline("image-classification", model=str(checkpoints / "classifier"), device="cpu")
    top = classify(image, top_k=3)
    expected = probabilities.topk(3)
    assert [entry["label"] for entry in top] == [f"LABEL_{i}" for i in expected.indices]
    assert [entry["score"] for entry in top] == pytest.approx(expected.values.tolist(), rel=1e-4)


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"])
def test_a_configuration_opens_no_file_of_its_own_choice(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(moco_config(model_args={name: "/private/weights.pth"}).to_dict()))
    with pytest.raises(ValueError, match=f"may not have {name}, which is no argument of test_resnet"):
        MoCoModel(MoCoConfig.from_pretrained(tmp_path))
