"""The detector: its losses against plain loops, its limits, loading, and what it refuses."""

import json
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from tiny_detectors import CLASSES, absolute, batch, corners, deltas, detector, iou, rcnn_config
from tiny_models import CHECKPOINTING, assert_equal, moco_config
from torchvision.ops import box_iou

from modeling_moco import (
    MoCoConfig,
    MoCoForImageClassification,
    MoCoForObjectDetection,
    MoCoImageProcessor,
    MoCoModel,
    MoCoRCNNConfig,
)
from training.hub.publish import PublishArguments, load_published, publish

SIZES = [(64, 96), (80, 64)]
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def training_step(model, inputs):
    torch.manual_seed(2)
    outputs = model.train()(**inputs)
    outputs.loss.backward()
    return outputs


def detections(model, inputs):
    with torch.no_grad():
        return model.eval()(inputs["pixel_values"], inputs["pixel_mask"])


# Losses


def test_losses_of_boxes_equal_loops_over_all_boxes(monkeypatch):
    model = detector(roi_samples=2000).train()  # more than there are: the sample has all of them
    inputs, seen = batch(), {}
    pool = model._pool
    monkeypatch.setattr(model, "_pool", lambda maps, boxes: pool(maps, seen.setdefault("boxes", boxes)))
    for name in ("cls_score", "bbox_pred"):
        getattr(model, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.double()}))
    losses = model(**inputs).loss_dict

    row, entropy, distance = 0, 0.0, 0.0
    found = 0
    for boxes, label, size in zip(seen["boxes"], inputs["labels"], SIZES, strict=True):
        objects = corners(label, size)
        for box in objects:  # they are boxes themselves, though no proposal may have found them
            assert (boxes - torch.tensor(box)).abs().sum(dim=1).min() < 1e-3
        for box in boxes.tolist():
            overlap = [iou(box, other) for other in objects]
            best = overlap.index(max(overlap))
            kind = label["class_labels"][best].item() if overlap[best] >= 0.5 else CLASSES
            entropy -= seen["cls_score"][row].log_softmax(dim=0)[kind].item()
            if kind < CLASSES:
                found += 1
                moves = seen["bbox_pred"][row, 4 * kind : 4 * kind + 4].tolist()
                distance += absolute(moves, deltas(objects[best], box, WEIGHTS))
            row += 1
    assert row == len(seen["cls_score"])
    assert 2 < found < row
    assert losses["loss_cls"].item() == pytest.approx(entropy / row, rel=1e-5)
    assert losses["loss_box_reg"].item() == pytest.approx(distance / row, rel=1e-4)


def test_boxes_are_sampled_by_number_and_share():
    model, inputs = detector(roi_samples=16), batch()
    drawn = []
    model.cls_score.register_forward_hook(lambda _, __, out: drawn.append(len(out)))
    training_step(model, inputs)
    assert drawn == [2 * 16]
    objects = model._objects(inputs["labels"], SIZES)
    near = objects[0].boxes[:1] + torch.rand(50, 4)
    far = torch.tensor([[0.0, 0.0, 5.0, 5.0]]) + torch.rand(50, 4)
    sampled = model._sample(torch.cat([near, far]), objects[0])
    assert (sampled.classes < CLASSES).sum() == 4
    assert len(sampled.boxes) == 16


def test_the_loss_of_masks_is_that_of_the_class_and_the_object_of_each_box():
    model, inputs = detector(masks=True), batch(masks=True)
    objects = model._objects(inputs["labels"], SIZES)
    side = 4
    # The boxes of whole pixels, so that each value of the target is the mean of some pixels.
    boxes = torch.tensor([[10.0, 20.0, 26.0, 28.0], [40.0, 8.0, 48.0, 40.0], [0.0, 0.0, 8.0, 8.0]])
    sampled = type(model._sample(boxes, objects[0]))(boxes, torch.tensor([1, 0, 0]), torch.tensor([2, 0, CLASSES]))
    logits = torch.randn(2, side, side)
    expected = []
    for i in range(2):
        x0, y0, x1, y1 = boxes[i].int().tolist()
        mask = objects[0].masks[sampled.object_of[i]].double()[y0:y1, x0:x1]
        wanted = F.avg_pool2d(mask[None], ((y1 - y0) // side, (x1 - x0) // side))[0] >= 0.5
        for logit, one in zip(logits[i].double().flatten().tolist(), wanted.flatten().tolist(), strict=True):
            expected.append(math.log1p(math.exp(-logit if one else logit)))
    loss = model._mask_loss(logits, [sampled], objects[:1])
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    pooled, classes = torch.randn(2, 96, 2, 2), torch.tensor([2, 0])
    every = model.mask_predictor(model.mask_deconv(pooled).relu())
    assert torch.equal(model._masks(pooled, classes), torch.stack([every[0, 2], every[1, 0]]))


@pytest.mark.parametrize("variant", ["c4", "dilated_c5"])
@pytest.mark.parametrize("objects", [(2, 1), (0, 1), (0, 0)], ids=["objects", "an image without", "a batch without"])
def test_every_parameter_has_a_gradient_in_every_step(variant, objects):
    masks = variant == "c4"
    model = detector(rcnn_variant=variant, masks=masks)
    outputs = training_step(model, batch(masks=masks, objects=objects))
    names = ["loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", *["loss_mask"] * masks]
    assert list(outputs.loss_dict) == names
    assert torch.isfinite(outputs.loss)
    torch.testing.assert_close(outputs.loss.detach(), sum(outputs.loss_dict.values()))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    for name in ("loss_rpn_loc", "loss_box_reg", *["loss_mask"] * masks):
        assert (outputs.loss_dict[name] > 0) == any(objects), name


def test_a_few_steps_lower_the_loss():
    model = detector(anchor_sizes=(32,))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 64, 64, generator=generator)
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.4, 0.6, 0.5, 0.5]])
    for image, (x, y, w, h) in zip(pixels, (boxes * 64).int().tolist(), strict=True):
        image[:, y - h // 2 : y + h // 2, x - w // 2 : x + w // 2] += 3
    labels = [{"class_labels": torch.tensor([i]), "boxes": boxes[i : i + 1]} for i in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(25):
        loss = model.train()(pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


# Features


def dilated_block(block, x):
    """A bottleneck block of layer4 as detectron2 dilates it: 3x3 with dilation 2, and no stride."""
    y = block.bn1(F.conv2d(x, block.conv1.weight)).relu()
    y = block.bn2(F.conv2d(y, block.conv2.weight, padding=2, dilation=2)).relu()
    y = block.bn3(F.conv2d(y, block.conv3.weight))
    if block.downsample is not None:
        x = block.downsample[1](F.conv2d(x, block.downsample[0].weight))
    return (x + y).relu()


def test_layer4_of_dilated_c5_is_dilated_in_all_its_blocks():
    small = {"architecture": "resnet50", "model_args": {"channels": (4, 8, 16, 32)}}
    model = detector(rcnn_variant="dilated_c5", **small).eval()
    encoder = model.encoder_q
    maps = torch.randn(1, 64, 9, 11)
    expected = maps
    for block in encoder.layer4:
        expected = dilated_block(block, expected)
    torch.testing.assert_close(encoder.layer4(maps), expected)
    assert model._features(torch.randn(1, 3, 100, 130), hidden=False)[0].shape == (1, 512, 7, 9)
    assert model.state_dict().keys() >= {
        f"moco.encoder_q.{n}" for n in MoCoModel(moco_config(**small)).encoder_q.state_dict()
    }


@pytest.mark.parametrize("variant", ["c4", "dilated_c5"])
def test_the_map_of_the_variant_is_the_one_of_timm(variant):
    model = detector(rcnn_variant=variant).eval()
    oracle = timm.create_model("test_resnet", features_only=True).eval()
    oracle.load_state_dict(model.encoder_q.state_dict())
    images = torch.randn(1, 3, 64, 96)
    if variant == "c4":
        torch.testing.assert_close(model._features(images, hidden=False)[0], oracle(images)[3])
        assert model.proposals.conv.in_channels == 192
    else:
        assert model._features(images, hidden=False)[0].shape == (1, 512, 4, 6)
        assert (model._features(images, hidden=False)[0] >= 0).all()


def test_bytes_are_normalised_and_their_padding_is_zero():
    model, inputs = detector().eval(), batch()
    raw = torch.randint(0, 256, inputs["pixel_values"].shape, dtype=torch.uint8)
    normalised = model.normalize(raw) * inputs["pixel_mask"][:, None]
    ours, expected = (detections(model, inputs | {"pixel_values": x}) for x in (raw, normalised))
    assert torch.equal(ours.scores, expected.scores)
    assert torch.equal(ours.pred_boxes, expected.pred_boxes)


# Detections


def biased(cls, **kwargs):
    """A detector whose classes hang on a bias alone."""
    model = detector(**kwargs)
    with torch.no_grad():
        model.cls_score.weight.zero_()
        model.cls_score.bias.copy_(torch.eye(CLASSES + 1)[cls] * 10)
    return model


def test_the_last_score_is_that_of_the_background():
    inputs = batch()
    nothing = detections(biased(CLASSES, masks=True), inputs)
    assert nothing.pred_masks.shape == (2, 10, 4, 4)
    assert not nothing.pred_masks.any()
    assert (nothing.labels == -1).all()
    assert not nothing.scores.any()
    assert not nothing.pred_boxes.any()
    for cls in range(CLASSES):
        found = detections(biased(cls), inputs)
        assert (found.labels == cls).all()


@pytest.mark.parametrize(("threshold", "overlap"), [(0.2, 0.5), (0.3, 0.2)])
def test_detections_are_the_best_apart_from_each_other_and_inside_the_image(threshold, overlap):
    model, inputs = detector(masks=True, score_threshold=threshold, nms_threshold=overlap, max_detections=100), batch()
    torch.nn.init.normal_(model.cls_score.weight, std=1.0)
    torch.nn.init.normal_(model.bbox_pred.weight, std=0.3)
    outputs = detections(model, inputs)
    assert outputs.loss is None
    assert outputs.scores.shape == outputs.labels.shape == (2, 100)
    assert outputs.pred_boxes.shape == (2, 100, 4)
    assert outputs.pred_masks.shape == (2, 100, 4, 4)  # of 4, layer4 makes 2, and the deconvolution 4
    for scores, labels, boxes, masks in zip(
        outputs.scores, outputs.labels, outputs.pred_boxes, outputs.pred_masks, strict=True
    ):
        found = labels >= 0
        count = int(found.sum())
        assert 6 < count < 100
        assert found[:count].all()
        assert (scores[:count] > threshold).all()
        assert (scores[:count].diff() <= 0).all()
        assert not scores[count:].any()
        assert not masks[count:].any()
        assert (masks[:count] > 0).all()
        assert (boxes >= 0).all()
        assert (boxes <= 1).all()
        assert (boxes[:count, 2:] > boxes[:count, :2]).all()
        same = labels[:count, None] == labels[:count]
        overlaps = box_iou(boxes[:count], boxes[:count]).fill_diagonal_(0)
        assert overlaps[same].max() <= overlap + 1e-5
    model.config.max_detections = 6
    few = detections(model, inputs)
    assert torch.equal(few.scores, outputs.scores[:, :6])
    assert torch.equal(few.pred_boxes, outputs.pred_boxes[:, :6])


@pytest.mark.parametrize("variant", ["c4", "dilated_c5"])
def test_images_without_a_proposal_have_no_detections(variant):
    model, inputs = detector(rcnn_variant=variant, masks=variant == "c4"), batch()
    with torch.no_grad():  # all anchors move out of the image, to the left
        model.proposals.deltas.weight.zero_()
        model.proposals.deltas.bias.copy_(torch.tensor([-1e4, 0, 0, 0]).repeat(9))
    found = detections(model, inputs)
    assert (found.labels == -1).all()
    assert found.scores.shape == (2, 10)


def test_classes_do_not_suppress_each_other():
    model = detector(score_threshold=0.1)
    probabilities, boxes = torch.tensor([[0.5, 0.4, 0.0], [0.3, 0.45, 0.0]]), torch.tensor([10.0, 10.0, 30.0, 30.0])
    scores, labels, _ = model._best(probabilities, boxes.expand(2, 3, 4), (64, 64))
    assert scores.tolist() == pytest.approx([0.5, 0.45])
    assert labels.tolist() == [0, 1]


def test_boxes_that_clipping_empties_take_the_places_of_others_and_are_dropped_last():
    model = detector(max_detections=3)
    outside, inside = [70.0, 10.0, 90.0, 30.0], [[x, 10.0, x + 8, 30.0] for x in (0.0, 15.0, 30.0)]
    boxes = torch.tensor([outside, *inside])[:, None].expand(4, CLASSES, 4)
    probabilities = torch.zeros(4, CLASSES)
    probabilities[:, 1] = torch.tensor([0.9, 0.8, 0.7, 0.6])
    scores, labels, kept = model._best(probabilities, boxes, (64, 64))
    assert scores.tolist() == pytest.approx([0.8, 0.7])
    assert labels.tolist() == [1, 1]
    assert kept.tolist() == inside[:2]


def test_an_image_does_not_change_the_detections_of_another():
    model = detector(score_threshold=0.2)
    inputs = batch(sizes=((64, 96), (64, 96)))
    both = detections(model, inputs)
    alone = [detections(model, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(2)]
    torch.testing.assert_close(both.scores, torch.cat([one.scores for one in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(both.pred_boxes, torch.cat([one.pred_boxes for one in alone]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("variant", "stages"), [("c4", 4), ("dilated_c5", 5)])
def test_hidden_states_are_the_maps_of_the_stages_and_change_nothing_else(variant, stages):
    inputs = batch()
    model = detector(rcnn_variant=variant).eval()
    with torch.no_grad():
        expected = model.encoder_q.forward_intermediates(inputs["pixel_values"], intermediates_only=True)[:stages]
        plain, outputs = model(**inputs), model(**inputs, output_hidden_states=True)
        assert plain.hidden_states is None
        torch.testing.assert_close(outputs.hidden_states, tuple(expected), atol=0, rtol=0)
        for name in plain:
            assert torch.equal(plain[name], outputs[name]), name
    model, asked = (detector(rcnn_variant=variant) for _ in range(2))
    asked.config.output_hidden_states = True
    plain = training_step(model, inputs)
    torch.manual_seed(2)
    outputs = asked.train()(**inputs)
    for maps in outputs.hidden_states:
        maps.retain_grad()
    outputs.loss.backward()
    assert torch.equal(outputs.loss, plain.loss)
    assert_equal(asked.state_dict(), model.state_dict())
    for parameter, other in zip(asked.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
    assert all(maps.grad.abs().sum() > 0 for maps in outputs.hidden_states)


def test_attention_weights_are_refused():
    with pytest.raises(ValueError, match="output_attentions"):
        detector().eval()(batch()["pixel_values"], output_attentions=True)


@pytest.mark.parametrize("variant", ["c4", "dilated_c5"])
def test_the_encoder_of_a_detector_is_saved_alone_as_any_encoder(variant, tmp_path):
    model = detector(rcnn_variant=variant)
    model.moco.save_pretrained(tmp_path)
    again, report = MoCoForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert_equal(again.encoder_q.state_dict(), model.encoder_q.state_dict())
    assert report["missing_keys"] == {name for name in model.state_dict() if not name.startswith("moco.")}
    assert (again.config.rcnn_variant, again.config.model_args) == (variant, None)
    images = batch()["pixel_values"]
    torch.testing.assert_close(
        again.eval().encoder_q.forward_features(images), model.eval().encoder_q.forward_features(images)
    )


# Memory and precision


@pytest.mark.parametrize("variant", ["c4", "dilated_c5"])
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(variant):
    plain, spared = (detector(rcnn_variant=variant) for _ in range(2))
    getattr(spared, f"{CHECKPOINTING}_enable")()
    seen = []
    spared.encoder_q.layer4[0].register_forward_pre_hook(lambda *_: seen.append(1))
    expected, ours = (training_step(model, batch()) for model in (plain, spared))
    assert len(seen) == 2
    assert torch.equal(ours.loss, expected.loss)
    torch.testing.assert_close(spared.state_dict(), plain.state_dict())
    for (name, parameter), other in zip(spared.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_sixteen_bits_train_and_detect():
    model, inputs = detector(masks=True), batch(masks=True)
    expected = training_step(model, inputs).loss_dict
    model = detector(masks=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = training_step(model, inputs)
    assert outputs.loss.dtype == torch.float32
    for name, loss in outputs.loss_dict.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.3), name
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    half = detector(masks=True).to(torch.bfloat16)
    found = detections(half, inputs)
    assert found.scores.dtype == found.pred_boxes.dtype == torch.float32
    assert (found.labels >= 0).any()


# Loading


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a whole MoCo model, and its query encoder."""
    torch.manual_seed(3)
    model = MoCoModel(moco_config(batch_norm="split"))
    with torch.no_grad():
        for tensor in model.encoder_q.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    return folder, {name: tensor.clone() for name, tensor in model.encoder_q.state_dict().items()}


HEADS = {
    "c4": {"proposals.conv", "proposals.objectness", "proposals.deltas", "norm", "cls_score", "bbox_pred"},
    "dilated_c5": {
        *("proposals.conv", "proposals.objectness", "proposals.deltas", "cls_score", "bbox_pred"),
        *("reduce.0", "reduce.1", "hidden.0", "hidden.2"),
    },
    "c4 with masks": {
        *("proposals.conv", "proposals.objectness", "proposals.deltas", "norm", "cls_score", "bbox_pred"),
        *("mask_deconv", "mask_predictor"),
    },
}


@pytest.mark.parametrize("norm", ["sync", "frozen"])
@pytest.mark.parametrize("heads", HEADS)
def test_an_encoder_is_taken_whole_and_the_heads_are_new(encoder, heads, norm):
    folder, state = encoder
    model, info = MoCoForObjectDetection.from_pretrained(
        folder,
        num_labels=CLASSES,
        rcnn_variant=heads.split()[0],
        masks="masks" in heads,
        detector_norm=norm,
        roi_size=4,
        output_loading_info=True,
    )
    assert {name.rpartition(".")[0] for name in info["missing_keys"]} == HEADS[heads]
    assert not info["unexpected_keys"]
    assert_equal(dict(model.encoder_q.state_dict()), state)
    assert type(model.config) is MoCoRCNNConfig
    assert model.config.architecture == "test_resnet"
    named = dict(model.named_modules())
    deviations = {"proposals.conv": 0.01, "proposals.objectness": 0.01, "proposals.deltas": 0.01, "cls_score": 0.01}
    for name, deviation in {**deviations, "bbox_pred": 0.001, "mask_predictor": 0.001}.items():
        if name in HEADS[heads]:
            assert named[name].weight.std().item() == pytest.approx(deviation, rel=0.2), name
            assert not named[name].bias.any()
    for norm_name in ("norm", "reduce.1"):
        if norm_name in HEADS[heads]:
            assert (named[norm_name].weight == 1).all()
            assert (named[norm_name].running_var == 1).all()
            assert not named[norm_name].bias.any()


def test_a_classifier_gives_its_encoder(encoder, tmp_path):
    MoCoForImageClassification.from_pretrained(encoder[0], num_labels=7).save_pretrained(tmp_path)
    model, info = MoCoForObjectDetection.from_pretrained(
        tmp_path, num_labels=CLASSES, roi_size=4, output_loading_info=True
    )
    assert_equal(dict(model.encoder_q.state_dict()), encoder[1])
    assert not info["unexpected_keys"]
    assert model.cls_score.out_features == CLASSES + 1


def test_a_published_encoder_gives_itself_and_neither_its_code_nor_its_file_names(encoder, tmp_path):
    MoCoImageProcessor().save_pretrained(encoder[0])
    for training_state in (False, True):
        folder = tmp_path / f"published {training_state}"
        published, processor = load_published(str(encoder[0]), training_state)
        args = PublishArguments(include_training_state=training_state)
        publish(str(encoder[0]), published, processor, "org/name", args, folder)
        model, info = MoCoForObjectDetection.from_pretrained(folder, num_labels=CLASSES, output_loading_info=True)
        assert {name.rpartition(".")[0] for name in info["missing_keys"]} == HEADS["c4"]
        assert not info["unexpected_keys"]
        assert_equal(dict(model.encoder_q.state_dict()), encoder[1])
        model.save_pretrained(folder / "detector")
        config = json.loads((folder / "detector" / "config.json").read_text())
        assert config["architectures"] == ["MoCoForObjectDetection"]
        assert "auto_map" not in config
        assert_equal(MoCoForObjectDetection.from_pretrained(folder / "detector").state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "kwargs", [{"masks": True}, {"rcnn_variant": "dilated_c5"}, {"detector_norm": "frozen"}], ids=str
)
def test_a_detector_survives_saving_bit_for_bit(kwargs, tmp_path):
    model = detector(**kwargs)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.rand_like(tensor)) if tensor.is_floating_point() else tensor.add_(3)
    model.save_pretrained(tmp_path)
    loaded, info = MoCoForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_equal(loaded.state_dict(), model.state_dict())
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    ours, expected = detections(loaded, batch()), detections(model, batch())
    assert torch.equal(ours.pred_boxes, expected.pred_boxes)
    assert torch.equal(ours.scores, expected.scores)


# Refusals


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"rcnn_variant": "fpn"}, "rcnn_variant ('fpn') is unknown: choose one of c4, dilated_c5"),
        ({"detector_norm": "shuffle"}, "detector_norm ('shuffle') is unknown: choose one of sync, plain, frozen"),
        ({"rcnn_variant": "dilated_c5", "masks": True}, "masks (True) are for rcnn_variant='c4', not for 'dilated_c5'"),
        ({"stem": "small"}, "stem ('small') is for small images"),
        ({"anchor_sizes": ()}, "anchor_sizes (()) must have 1 to 64 numbers above 0"),
        ({"anchor_sizes": (32, 0)}, "anchor_sizes ((32, 0)) must have 1 to 64 numbers above 0"),
        ({"anchor_ratios": (-1.0,)}, "anchor_ratios ((-1.0,)) must have 1 to 64 numbers above 0"),
        ({"anchor_ratios": (float("nan"),)}, "anchor_ratios ((nan,)) must have 1 to 64 numbers above 0"),
        ({"rpn_pre_nms_train": 0}, "rpn_pre_nms_train (0) must be at least 1"),
        ({"rpn_post_nms_test": 0}, "rpn_post_nms_test (0) must be at least 1"),
        ({"rpn_samples": -4}, "rpn_samples (-4) must be at least 1"),
        ({"roi_samples": 0}, "roi_samples (0) must be at least 1"),
        ({"max_detections": 0}, "max_detections (0) must be at least 1"),
        ({"roi_size": 1}, "roi_size (1) must lie between 2 and 64"),
        ({"score_threshold": 1.5}, "score_threshold (1.5) must lie in [0, 1]"),
        ({"nms_threshold": -0.1}, "nms_threshold (-0.1) must lie in [0, 1]"),
        ({"temperature": 0}, "temperature (0) must be above 0"),  # of the encoder, as ever
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_a_setting_out_of_its_range_is_refused_in_one_line(kwargs, words):
    with pytest.raises(StrictDataclassError) as error:
        MoCoRCNNConfig(**kwargs)
    line = str(error.value.__cause__)
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"architecture": "test_vit"}, "architecture ('test_vit') must be a ResNet"),
        (
            {"architecture": "test_convnext", "rcnn_variant": "dilated_c5"},
            "architecture ('test_convnext') must be a ResNet",
        ),
        ({"model_args": {"output_stride": 8}}, "may not have output_stride: leave it out; rcnn_variant='dilated_c5'"),
        ({"architecture": "resnet51"}, "architecture ('resnet51') is not a timm model"),
    ],
)
def test_an_encoder_that_cannot_be_a_detector_is_refused_in_one_line(kwargs, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        detector(**kwargs)
    assert "\n" not in str(error.value)


def test_labels_that_are_not_of_the_images_are_refused_in_one_line():
    model, inputs = detector(masks=True).train(), batch(masks=True)
    first, second = inputs["labels"]
    for labels, words in (
        (None, "labels (None) are needed in training mode"),
        ([first], "labels (of 1 images) must be of all 2 images"),
        ([first, second | {"class_labels": torch.tensor([CLASSES])}], "class_labels ([3]) must lie between 0 and 2"),
        ([first, second | {"class_labels": torch.tensor([-1])}], "class_labels ([-1]) must lie between 0 and 2"),
        (
            [first, {k: v for k, v in second.items() if k != "masks"}],
            "labels (class_labels, boxes) must have masks, one for each object",
        ),
        ([first | {"masks": first["masks"][:1]}, second], "must have masks, one for each object"),
        ([first | {"boxes": first["boxes"][:1]}, second], "boxes (1) must be as many as class_labels (2)"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            model(**inputs | {"labels": labels})


def test_the_configuration_of_an_encoder_is_that_of_a_detector_of_the_papers(tmp_path):
    MoCoConfig(architecture="resnet50", image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    config = MoCoRCNNConfig.from_pretrained(tmp_path)
    assert (config.architecture, config.image_mean) == ("resnet50", [0.1, 0.2, 0.3])
    assert config.model_type == "moco_rcnn"
    assert (config.roi_side, MoCoRCNNConfig(rcnn_variant="dilated_c5").roi_side, rcnn_config().roi_side) == (14, 7, 4)
