"""MoCoModel and its siblings: architecture, initialisation, loading, Algorithm 1, Auto classes and pipelines."""

import copy
import logging

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from modeling_moco import MoCoBackbone, MoCoConfig, MoCoForImageClassification, MoCoImageProcessor, MoCoModel

K, C, LABELS = 64, 16, 100
BACKBONES = {
    "test_resnet": None,
    "test_convnext": None,
    "test_vit": {"img_size": 32},
    "mobilenetv3_small_050": None,  # its head is wider than its feature map
}


def moco_config(architecture="test_resnet", **kwargs):
    defaults = {"queue_size": K, "projection_dim": C, "key_momentum": 0.9, "batch_norm": "plain"}
    return MoCoConfig(architecture=architecture, **{"model_args": BACKBONES.get(architecture), **defaults, **kwargs})


def views(n=8, size=32):
    return torch.randn(2, n, 3, size, size).unbind()


def key_parts(model):
    return {name: t for name, t in model.state_dict().items() if name.startswith(("encoder_k.", "projector_k."))}


def query_parts(model, rename=False):
    parts = {name: t for name, t in model.state_dict().items() if name.startswith(("encoder_q.", "projector_q."))}
    return {name.replace("_q.", "_k.", 1): t for name, t in parts.items()} if rename else parts


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return MoCoModel(moco_config())


@pytest.fixture(scope="module")
def trained():
    """A model whose every tensor differs from its initial value, with the pointer inside the queue."""
    torch.manual_seed(1)
    model = MoCoModel(moco_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for _ in range(5):
        model.dictionary.enqueue(model(*views()).key_embeds)
    return model.eval()


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


# Architecture


@pytest.mark.parametrize("architecture", BACKBONES)
def test_features_are_those_of_timm_and_survive_a_round_trip(architecture, tmp_path):
    model = MoCoModel(moco_config(architecture)).eval()
    oracle = timm.create_model(architecture, num_classes=0, **(BACKBONES[architecture] or {})).eval()
    oracle.load_state_dict(model.encoder_q.state_dict())
    model.save_pretrained(tmp_path)
    images = views()[0]
    with torch.no_grad():
        for candidate in (model, MoCoModel.from_pretrained(tmp_path).eval()):
            outputs = candidate(images)
            torch.testing.assert_close(outputs.last_hidden_state, oracle.forward_features(images), atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(outputs.pooler_output, oracle(images), atol=1e-6, rtol=1e-4)
            assert outputs.pooler_output.shape == (8, oracle.head_hidden_size)


@pytest.mark.parametrize("architecture", BACKBONES)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_backbone_trains_with_the_projector_of_v1_or_v2(architecture, head):
    model = MoCoModel(moco_config(architecture, projection_head=head))
    width = model.encoder_q.head_hidden_size
    expected = {"linear": [(C, width)], "mlp": [(width, width), (C, width)]}[head]
    for projector in (model.projector_q, model.projector_k):
        assert [tuple(m.weight.shape) for m in projector.modules() if isinstance(m, nn.Linear)] == expected
        assert sum(isinstance(m, nn.ReLU) for m in projector.modules()) == len(expected) - 1
    outputs = model(*views())
    outputs.loss.backward()
    assert outputs.query_embeds.shape == outputs.key_embeds.shape == (8, C)
    assert all(p.grad.abs().sum() > 0 for p in model.projector_q.parameters())


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


@pytest.mark.parametrize(("stem", "side"), [("default", 1), ("no_max_pool", 2), ("small", 4)])
def test_stem_sets_the_size_of_the_feature_map(stem, side):
    model = MoCoModel(moco_config("resnet18", stem=stem), momentum_encoder=False)
    assert model(views(2)[0]).last_hidden_state.shape == (2, 512, side, side)
    conv = model.encoder_q.conv1
    assert (conv.kernel_size, conv.stride) == (((3, 3), (1, 1)) if stem == "small" else ((7, 7), (2, 2)))
    assert isinstance(model.encoder_q.maxpool, nn.MaxPool2d) == (stem == "default")


@pytest.mark.parametrize("stem", ["small", "no_max_pool"])
def test_stem_is_for_resnets_only(stem):
    with pytest.raises(ValueError, match="ResNet"):
        MoCoModel(moco_config("test_convnext", stem=stem))


@pytest.mark.parametrize(("unknown", "meant"), [("convnext_smal", "convnext_small"), ("resnet5", "resnet50")])
def test_unknown_architecture_is_rejected_with_close_names(unknown, meant):
    with pytest.raises(ValueError, match=f"'{unknown}'") as error:
        MoCoModel(moco_config(unknown))
    suggestions = str(error.value).partition("try ")[2].split(", ")
    assert meant in suggestions
    assert all(timm.is_model(name) for name in suggestions)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", -0.2),
        ("key_momentum", 2),
        ("key_momentum", -0.1),
        ("queue_size", 0),
        ("queue_size", "many"),
        ("projection_dim", 0),
        ("batch_norm_splits", 0),
        ("stem", "tiny"),
        ("projection_head", "transformer"),
        ("batch_norm", "ghost"),
        ("image_mean", [0.5, 0.5]),
        ("image_std", [0.2, 0.2, 0]),
    ],
)
def test_config_rejects_a_value_out_of_range_by_name(name, value):
    with pytest.raises(StrictDataclassError, match=name):
        MoCoConfig(**{name: value})


def test_config_accepts_the_ends_of_its_ranges():
    config = MoCoConfig(key_momentum=1, temperature=1, queue_size=1, projection_dim=1, batch_norm_splits=1)
    assert MoCoConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert MoCoConfig(key_momentum=0).key_momentum == 0


# Initialisation


@pytest.mark.parametrize("architecture", BACKBONES)
def test_key_encoder_starts_as_a_copy_of_the_query_encoder(architecture):
    model = MoCoModel(moco_config(architecture))
    assert_equal(key_parts(model), query_parts(model, rename=True))
    storages = [t.data_ptr() for parts in (key_parts(model), query_parts(model)) for t in parts.values() if t.numel()]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("stem", ["default", "small"])
def test_resnet_starts_as_the_official_one(stem):
    model = MoCoModel(moco_config(stem=stem))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:  # the last one of each residual block included, which timm starts at 0
        assert_equal(norm.state_dict(), nn.BatchNorm2d(norm.num_features).state_dict())
    for name, conv in model.encoder_q.named_modules():
        if isinstance(conv, nn.Conv2d):
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.12), name


@pytest.mark.parametrize("architecture", ["test_vit", "test_convnext"])
def test_other_architectures_keep_the_initialisation_of_timm(architecture):
    model = MoCoModel(moco_config(architecture))
    oracle = timm.create_model(architecture, num_classes=0, **(BACKBONES[architecture] or {}))
    ours = dict(model.encoder_q.named_parameters())
    assert ours.keys() == dict(oracle.named_parameters()).keys()
    for name, parameter in oracle.named_parameters():
        if parameter.unique().numel() == 1:
            assert torch.equal(ours[name], parameter), name
        elif parameter.numel() > 1000:
            assert ours[name].std().item() == pytest.approx(parameter.std().item(), rel=0.1), name
    if architecture == "test_vit":
        assert ours["blocks.0.attn.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.05)


# Loading


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


# Algorithm 1


@pytest.mark.parametrize("m", [0, 0.9, 0.999, 1])
def test_key_parameters_move_by_their_share_of_the_difference_and_buffers_stay(m):
    model = MoCoModel(moco_config(key_momentum=m))
    model(*views())  # moves the BatchNorm statistics of both encoders, differently
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.update_key_encoder()
    key_parameters = [name for name, _ in model.named_parameters() if "_k." in name]
    assert len(key_parameters) == len(list(model.parameters())) // 2
    for name, tensor in model.state_dict().items():
        expected = before[name]
        if name in key_parameters:
            q = before[name.replace("_k.", "_q.", 1)].double()
            expected = (expected.double() * m + q * (1 - m)).float()
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-6, msg=name)
    assert model.encoder_k.bn1.num_batches_tracked == 1
    assert not torch.equal(model.encoder_k.bn1.running_mean, model.encoder_q.bn1.running_mean)


def test_only_query_parameters_receive_a_gradient(model):
    for _ in range(2):
        model.update_key_encoder()
        x_q, x_k = views()
        outputs = model(x_q.requires_grad_(), x_k.requires_grad_())
        outputs.loss.backward()
        model.dictionary.enqueue(outputs.key_embeds)
    for name, parameter in model.named_parameters():
        if name.startswith(("encoder_q.", "projector_q.")):
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    assert x_q.grad.abs().sum() > 0
    assert x_k.grad is None  # nor does any gradient pass through the key encoder
    assert not outputs.key_embeds.requires_grad
    assert not model.dictionary.queue.requires_grad


@torch.no_grad()
def algorithm_1(model, x_q, x_k):
    """Logits of the paper's pseudo-code in float64, one image and one negative at a time."""
    model = copy.deepcopy(model).double()
    q = model.projector_q(model.encoder_q(x_q.double()))
    k = model.projector_k(model.encoder_k(x_k.double()))
    rows = []
    for i in range(len(q)):
        q_i, k_i = q[i] / q[i].norm(), k[i] / k[i].norm()
        rows.append([q_i @ k_i] + [q_i @ model.dictionary.queue[:, j] for j in range(K)])
    return torch.tensor(rows, dtype=torch.float64) / model.config.temperature


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_logits_and_loss_are_those_of_algorithm_1(trained, training, temperature):
    model = copy.deepcopy(trained).train(training)
    model.config.temperature = temperature
    x_q, x_k = views()
    expected = algorithm_1(model, x_q, x_k)
    outputs = model(x_q, x_k)
    torch.testing.assert_close(outputs.logits.double(), expected, atol=1e-4, rtol=1e-4)
    loss = -expected.log_softmax(dim=1)[:, 0].mean()
    assert outputs.loss.item() == pytest.approx(loss.item(), abs=1e-4)
    assert outputs.loss.item() == pytest.approx(F.cross_entropy(outputs.logits, torch.zeros(8).long()).item(), abs=1e-6)


def test_contrast_is_computed_in_float32_under_autocast(trained):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = trained(*views())
        assert trained.encoder_q(views()[0]).dtype == torch.bfloat16  # the encoder itself does run in 16 bits
    assert {t.dtype for t in outputs.to_tuple()} == {torch.float32}
    q, k = outputs.query_embeds, outputs.key_embeds
    similarities = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ trained.dictionary.queue], dim=1)
    torch.testing.assert_close(outputs.logits, similarities / trained.config.temperature, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, from inside torch.compile
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_compiled_model_has_the_loss_the_gradients_and_the_queue_of_the_model(symmetric):
    model = MoCoModel(moco_config(symmetric_loss=symmetric))
    compiled = copy.deepcopy(model)
    x_q, x_k = torch.randint(256, (2, 8, 3, 32, 32), dtype=torch.uint8)
    for trained, forward in ((model, model), (compiled, torch.compile(compiled, backend="aot_eager"))):
        outputs = forward(x_q, x_k)
        outputs.loss.backward()
        trained.dictionary.enqueue(outputs.key_embeds)
    assert_equal({"queue": compiled.dictionary.queue}, {"queue": model.dictionary.queue})
    for ours, expected in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["features", "keys", "backbone", "classifier"])
def test_uint8_images_are_normalised_by_the_model(kind):
    config = moco_config(image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.3], num_labels=3)
    model = {"backbone": MoCoBackbone, "classifier": MoCoForImageClassification}.get(kind, MoCoModel)(config).eval()
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    by_hand = (images / 255 - torch.tensor(config.image_mean).view(3, 1, 1)) / torch.tensor(config.image_std).view(
        3, 1, 1
    )
    with torch.no_grad():
        forward = model.encode_keys if kind == "keys" else lambda x: model(x, return_dict=False)[0]
        ours, expected = forward(images), forward(by_hand)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_symmetric_loss_is_the_sum_of_both_and_no_key_meets_itself_in_the_queue():
    model = MoCoModel(moco_config(symmetric_loss=True)).eval()
    x_1, x_2 = views()
    outputs = model(x_1, x_2)
    queue = model.dictionary.queue.clone()
    model.config.symmetric_loss = False
    forth, back = model(x_1, x_2), model(x_2, x_1)
    torch.testing.assert_close(outputs.loss, forth.loss + back.loss)
    torch.testing.assert_close(outputs.logits, torch.cat([forth.logits, back.logits]))
    # Both losses see the queue as it was before the step; then the keys of the first view enter, then the second's.
    model.dictionary.enqueue(outputs.key_embeds)
    assert torch.equal(model.dictionary.queue[:, 16:], queue[:, 16:])
    assert torch.equal(model.dictionary.queue[:, :16].T, torch.cat([model.encode_keys(x_1), model.encode_keys(x_2)]))


def test_tuples_replace_outputs_on_request(trained):
    x_q, x_k = views()
    with torch.no_grad():
        for images in ((x_q,), (x_q, x_k)):
            outputs, values = trained(*images), trained(*images, return_dict=False)
            assert type(values) is tuple
            assert all(torch.equal(a, b) for a, b in zip(values, outputs.to_tuple(), strict=True))
    assert len(values) == 4


@pytest.mark.parametrize(("batch_norm", "warnings"), [("shuffle", 1), ("plain", 0), ("split", 0)])
def test_shuffling_in_one_process_warns_once(batch_norm, warnings, caplog):
    model = MoCoModel(moco_config(batch_norm=batch_norm, batch_norm_splits=2))
    transformers_logging.warning_once.cache_clear()  # other tests may have used up the one warning
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(*views())
    assert sum("batch_norm" in record.getMessage() for record in caplog.records) == warnings
