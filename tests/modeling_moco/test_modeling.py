"""MoCoModel and its siblings: architecture, initialisation, Algorithm 1."""

import copy
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from tiny_models import BACKBONES, C, K, assert_equal, key_parts, moco_config, query_parts, views
from torch import nn
from transformers.utils import logging as transformers_logging

from modeling_moco import (
    MoCoBackbone,
    MoCoConfig,
    MoCoFCNConfig,
    MoCoForImageClassification,
    MoCoImageProcessor,
    MoCoImageProcessorPil,
    MoCoModel,
    MoCoRCNNConfig,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return MoCoModel(moco_config())


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
        ("image_std", 0),
        ("image_std", True),
        ("image_mean", "0.5"),
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, from inside torch.compile
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")  # of torch.compile, on that version alone
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
        assert (ours.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            # CPUs add up in different orders, and a small number may be the difference of large ones.
            largest = expected.grad.abs().max().item()
            torch.testing.assert_close(ours.grad, expected.grad, atol=1e-5 * largest, rtol=1e-4)


def test_an_exported_model_has_the_loss_and_the_logits_of_the_model(trained):
    images = views()
    program = torch.export.export(trained, images)
    ours, expected = program.module()(*images), trained(*images)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.logits, expected.logits)


@pytest.mark.parametrize("kind", [MoCoConfig, MoCoRCNNConfig, MoCoFCNConfig])
def test_one_number_normalises_all_channels(kind, tmp_path):
    kind(image_mean=0.5, image_std=1).save_pretrained(tmp_path)
    config = kind.from_pretrained(tmp_path)
    assert (config.image_mean, config.image_std) == ([0.5, 0.5, 0.5], [1.0, 1.0, 1.0])
    assert [type(value) for value in config.image_std] == [float] * 3
    config.image_std = 0.25
    assert config.image_std == [0.25, 0.25, 0.25]
    assert config.image_mean == [0.5, 0.5, 0.5]


def test_images_of_a_model_with_one_number_are_those_of_its_processor():
    model = MoCoModel(moco_config(image_mean=0.5, image_std=0.25), momentum_encoder=False)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    by_hand = torch.tensor([[(level / 255 - 0.5) / 0.25 for level in image.flatten().tolist()] for image in images])
    torch.testing.assert_close(model.normalize(images), by_hand.view_as(images), atol=1e-6, rtol=1e-6)
    settings = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    for kind in (MoCoImageProcessor, MoCoImageProcessorPil):
        for mean, std in ((0.5, 0.25), (model.config.image_mean, model.config.image_std)):
            processed = kind(image_mean=mean, image_std=std)([*images], **settings).pixel_values
            torch.testing.assert_close(processed, model.normalize(images), atol=1e-5, rtol=1e-5)


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
    for other in (torch.int64, torch.int32, torch.bool):  # levels, which would pass for normalised numbers
        with pytest.raises(ValueError, match=r"^pixel_values \(torch.*\) must be uint8 levels, or normalised floats"):
            forward(images.to(other))


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
