"""The FCN-16s of MoCo v1: its convolutions, its loss by loops in float64, what it takes of an encoder, the Auto classes."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tiny_models import CHECKPOINTING, assert_equal
from torch import nn
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

from modeling_moco import (
    MoCoConfig,
    MoCoFCNConfig,
    MoCoForObjectDetection,
    MoCoForSemanticSegmentation,
    MoCoModel,
    MoCoRCNNConfig,
    MoCoSegmentationImageProcessor,
)
from modeling_moco.distributed_moco import SyncBatchNorm2d
from modeling_moco.image_processing_moco import enlarge

CLASSES, IGNORED = 3, 255
HEADS = {"context.0", "context.1", "context.3", "context.4", "pixel_classifier"}


def segmenter(**kwargs):
    """A model with the statistics of some images, so that its scores differ from pixel to pixel."""
    torch.manual_seed(0)
    config = MoCoFCNConfig(**{"architecture": "test_resnet", "num_labels": CLASSES, **kwargs})
    model = MoCoForSemanticSegmentation(config)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        model.pixel_classifier.weight.mul_(20)
        kinds = {norm: norm.__class__ for norm in norms}
        for norm in norms:
            norm.momentum, norm.__class__ = 1.0, nn.BatchNorm2d  # a frozen one keeps no statistics
        model.train()(torch.randn(4, 3, 64, 64))
        for norm, kind in kinds.items():
            norm.__class__, norm.momentum = kind, 0.1
    return model


def batch(height=41, width=70):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, height, width, generator=generator)
    labels = torch.randint(CLASSES, (2, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED
    return images, labels


def at_pixel(scores, row, column):
    """Scores (L, h, w) between the places of a map, which lie on every sixteenth pixel; beyond the last one its own."""
    y, x = min(row / 16, scores.shape[1] - 1), min(column / 16, scores.shape[2] - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, scores.shape[1] - 1), min(left + 1, scores.shape[2] - 1)
    down, along = y - top, x - left
    upper = scores[:, top, left] * (1 - along) + scores[:, top, right] * along
    lower = scores[:, bottom, left] * (1 - along) + scores[:, bottom, right] * along
    return upper * (1 - down) + lower * down


# The network


def test_the_maps_are_those_of_the_dilated_detector_and_the_heads_those_of_the_paper():
    model = segmenter().eval()
    detector = MoCoForObjectDetection(
        MoCoRCNNConfig(architecture="test_resnet", num_labels=2, rcnn_variant="dilated_c5", roi_size=2)
    ).eval()
    detector.moco.load_state_dict(model.moco.state_dict())
    images, _ = batch(113, 150)
    seen = []
    handle = detector.reduce.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        detector._features(images, hidden=False)[0]
        handle.remove()
        x = seen[0].double()
        assert x.shape[2:] == (math.ceil(113 / 16), math.ceil(150 / 16))
        state = {name: tensor.double() for name, tensor in model.state_dict().items()}
        for conv, norm in (("context.0", "context.1"), ("context.3", "context.4")):
            assert state[f"{conv}.weight"].shape[0] == 256
            x = F.conv2d(x, state[f"{conv}.weight"], padding=6, dilation=6)
            mean, variance = (state[f"{norm}.running_{name}"][:, None, None] for name in ("mean", "var"))
            scale, shift = (state[f"{norm}.{name}"][:, None, None] for name in ("weight", "bias"))
            x = ((x - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)
        expected = torch.einsum("nchw,lc->nlhw", x, state["pixel_classifier.weight"][:, :, 0, 0])
        expected += state["pixel_classifier.bias"][:, None, None]
        logits = model(images).logits
    assert logits.std(dim=(2, 3)).min() > 0.05
    assert logits.std() > 0.1
    assert logits.shape == (2, CLASSES, 8, 10)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_mean_of_the_pixels_that_count():
    model, (images, labels) = segmenter().eval(), batch()
    outputs = model(images, labels=labels)
    losses = []
    for image in range(2):
        scores = outputs.logits[image].detach().double()
        for row, column in (labels[image] != IGNORED).nonzero().tolist():
            at = at_pixel(scores, row, column)
            losses.append(float(at.exp().sum().log() - at[labels[image, row, column]]))
    assert 0.2 < len(losses) / labels.numel() < 0.9
    assert outputs.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_maps_are_enlarged_from_every_sixteenth_pixel():
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 3, 4)
    expected = F.interpolate(logits, size=(33, 49), mode="bilinear", align_corners=True)
    torch.testing.assert_close(enlarge(logits, (33, 49)), expected)  # the kind of size that the paper crops to
    larger = enlarge(logits, (45, 52))
    for row, column in ((0, 0), (7, 21), (16, 32), (31, 47), (40, 51)):
        expected = at_pixel(logits[0].double(), row, column)
        torch.testing.assert_close(larger[0, :, row, column].double(), expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_has_a_gradient_and_a_few_steps_lower_the_loss():
    model, (images, labels) = segmenter(fcn_norm="plain").train(), batch(97, 97)
    labels[:, :, :49], labels[:, :, 49:] = 0, 2
    images += labels[:, None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(images, labels=labels).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bytes_are_normalised_by_the_model():
    model = segmenter().eval()
    raw = torch.randint(256, (1, 3, 48, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.image_mean, model.config.image_std))
    torch.testing.assert_close(model(raw).logits, model((raw / 255 - mean) / std).logits, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_neither_gradients_nor_statistics():
    plain, spared = (segmenter(fcn_norm="plain").train() for _ in range(2))
    getattr(spared, f"{CHECKPOINTING}_enable")()
    seen = []
    spared.encoder_q.layer4[0].register_forward_pre_hook(lambda *_: seen.append(1))
    images, labels = batch()
    for model in (plain, spared):
        model(images, labels=labels).loss.backward()
    assert len(seen) == 2
    torch.testing.assert_close(spared.state_dict(), plain.state_dict())
    for (name, parameter), other in zip(spared.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_batch_norm_is_shared_or_frozen_as_asked():
    shared, frozen, (images, labels) = segmenter(), segmenter(fcn_norm="frozen").train(), batch()
    norms = [module for module in shared.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 2
    assert all(type(norm) is SyncBatchNorm2d for norm in norms)
    before = {name: tensor.clone() for name, tensor in frozen.named_buffers()}
    frozen(images, labels=labels).loss.backward()
    assert_equal(dict(frozen.named_buffers()), before)
    assert not any("norm" in name or "context.1." in name for name, _ in frozen.named_parameters())


@pytest.mark.parametrize("architecture", ["resnet18", "resnet26d", "seresnet50", "resnest26d"])
def test_any_resnet_has_a_place_for_every_sixteenth_pixel_of_images_of_any_size(architecture):
    model = MoCoForSemanticSegmentation(MoCoFCNConfig(architecture=architecture, num_labels=2)).eval()
    for height, width in ((33, 50), (48, 65)):
        with torch.no_grad():
            maps = model(torch.randn(1, 3, height, width)).logits.shape[2:]
        assert tuple(maps) == (math.ceil(height / 16), math.ceil(width / 16))


def test_hidden_states_are_the_maps_of_the_stages_and_attention_weights_are_refused():
    model, (images, labels) = segmenter().eval(), batch()
    plain, outputs = model(images, labels), model(images, labels, output_hidden_states=True)
    assert plain.hidden_states is None
    expected = model.encoder_q.forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(outputs.hidden_states, tuple(expected), atol=0, rtol=0)
    assert torch.equal(outputs.logits, plain.logits)
    outputs.hidden_states[0].retain_grad()
    outputs.loss.backward()
    assert outputs.hidden_states[0].grad.abs().sum() > 0
    with pytest.raises(ValueError, match="output_attentions"):
        model(images, output_attentions=True)


# Loading


def test_an_encoder_is_taken_whole_and_the_heads_are_new(tmp_path):
    torch.manual_seed(0)
    encoder = MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=16, batch_norm="plain"))
    with torch.no_grad():
        for tensor in encoder.encoder_q.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    encoder.save_pretrained(tmp_path)
    model, info = MoCoForSemanticSegmentation.from_pretrained(tmp_path, num_labels=CLASSES, output_loading_info=True)
    assert {name.rpartition(".")[0] for name in info["missing_keys"]} == HEADS
    assert not info["unexpected_keys"]
    assert_equal(dict(model.encoder_q.state_dict()), dict(encoder.encoder_q.state_dict()))
    assert type(model.config) is MoCoFCNConfig
    assert model.pixel_classifier.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert not model.pixel_classifier.bias.any()
    he = math.sqrt(2 / (256 * 9))
    assert model.context[0].weight.std().item() == pytest.approx(he, rel=0.05)
    assert (model.context[1].weight == 1).all()


@pytest.mark.parametrize("norm", ["sync", "frozen"])
def test_a_segmentation_model_survives_saving_and_the_auto_classes_find_it(norm, tmp_path):
    model, (images, _) = segmenter(fcn_norm=norm).eval(), batch()
    model.save_pretrained(tmp_path)
    MoCoSegmentationImageProcessor(image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MoCoForSemanticSegmentation
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_equal(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded.eval()(images).logits, model(images).logits)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is MoCoSegmentationImageProcessor
    assert list(processor.image_mean) == [0.4, 0.5, 0.6]


def test_a_pipeline_gives_each_class_a_mask_of_the_size_of_the_image(tmp_path):
    names = {0: "ground", 1: "tree", 2: "sky"}
    model = segmenter(id2label=names, label2id={name: i for i, name in names.items()}).eval()
    torch.manual_seed(3)
    pixels = torch.randint(256, (1, 3, 41, 70), dtype=torch.uint8)
    with torch.no_grad():
        model.pixel_classifier.bias.sub_(model(pixels).logits.mean(dim=(0, 2, 3)))  # or one class wins everywhere
        scores = model(pixels).logits[0]
    model.save_pretrained(tmp_path)
    MoCoSegmentationImageProcessor().save_pretrained(tmp_path)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    found = pipeline("image-segmentation", str(tmp_path))(image)
    expected = torch.stack([torch.stack([at_pixel(scores, y, x) for x in range(70)]) for y in range(41)]).argmax(2)
    assert len(expected.unique()) > 1
    assert [one["label"] for one in found] == [names[i] for i in expected.unique().tolist()]
    for one in found:
        mask = torch.from_numpy(np.array(one["mask"])) == 255
        same = mask == (expected == model.config.label2id[one["label"]])
        assert same.float().mean() > 0.999  # a tie within rounding may fall either way


def test_classes_of_the_processor_have_the_size_that_was_asked_for_or_that_of_the_logits():
    processor, outputs = MoCoSegmentationImageProcessor(), {"logits": torch.randn(2, CLASSES, 3, 5)}
    assert [tuple(one.shape) for one in processor.post_process_semantic_segmentation(outputs)] == [(3, 5), (3, 5)]
    found = processor.post_process_semantic_segmentation(outputs, [(41, 70), (48, 65)])
    assert [tuple(one.shape) for one in found] == [(41, 70), (48, 65)]
    with pytest.raises(ValueError, match="must be of all 2 images"):
        processor.post_process_semantic_segmentation(outputs, [(41, 70)])
    with pytest.raises(ValueError, match=r"target_sizes \(82, 140\) must be of the image that the model saw"):
        processor.post_process_semantic_segmentation(outputs, [(41, 70), (82, 140)])


# Refusals


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"fcn_norm": "shuffle"}, "fcn_norm ('shuffle') is unknown: choose one of sync, plain, frozen"),
        ({"num_labels": 300}, "semantic_loss_ignore_index (255) must not be one of the 300 classes"),
        ({"stem": "small"}, "stem ('small') is for small images"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_in_one_line(kwargs, words):
    with pytest.raises(StrictDataclassError) as error:
        MoCoFCNConfig(**kwargs)
    line = str(error.value.__cause__)
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"architecture": "test_vit"}, "architecture ('test_vit') must be a ResNet"),
        ({"architecture": "test_convnext"}, "architecture ('test_convnext') must be a ResNet"),
        ({"architecture": "resnetaa50"}, "architecture ('resnetaa50') halves even sides alone"),
        ({"model_args": {"output_stride": 8}}, "may not have output_stride"),
    ],
)
def test_an_encoder_that_cannot_segment_is_refused_in_one_line(kwargs, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        segmenter(**kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda labels: labels.fill_(IGNORED), "labels are 255 at every pixel"),
        (lambda labels: labels.fill_(CLASSES), "labels (3 to 3) must lie between 0 and 2, or be 255"),
        (lambda labels: labels.fill_(-100), "labels (-100 to -100) must lie between 0 and 2, or be 255"),
        (lambda labels: labels[:, :-1], "must be (2, 41, 70), int64"),
        (lambda labels: labels.int(), "must be (2, 41, 70), int64"),
    ],
)
def test_labels_that_are_not_of_the_images_are_refused_in_one_line(change, words):
    images, labels = batch()
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        segmenter()(images, labels=change(labels))
    assert "\n" not in str(error.value)
