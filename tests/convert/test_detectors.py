"""Detectors under detectron2's names, by recorded ones of detectron2 (tests/support/detectron2_step.py says how recorded)."""

import json
import pickle
import re
from collections import OrderedDict

import pytest
import torch
from detectron2_step import Step, our_name
from tiny_detectors import detector

from modeling_moco import (
    MoCoConfig,
    MoCoDetectionImageProcessor,
    MoCoForObjectDetection,
    MoCoImageProcessor,
    MoCoModel,
    MoCoRCNNConfig,
)
from training.convert.files import FORMATS, read, write
from training.convert.start import read_start

TINY = {"architecture": "resnet50", "model_args": {"channels": [4, 8, 16, 32]}, "num_labels": 3}
# The anchors of a place by detectron2's formula: width sqrt(area / ratio), height ratio times that.
SIDES = [(s * r**-0.5, s * r**0.5) for s in (32, 64, 128, 256, 512) for r in (0.5, 1.0, 2.0)]
ANCHORS = torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in SIDES])
OLD = {  # what older versions of detectron2 saved beside the weights
    "pixel_mean": torch.tensor([123.675, 116.28, 103.53])[:, None, None],
    "pixel_std": torch.tensor([58.395, 57.12, 57.375])[:, None, None],
    "proposal_generator.anchor_generator.cell_anchors.0": ANCHORS,
}


@pytest.fixture(scope="module", params=[False, True], ids=["boxes", "boxes and masks"])
def step(request):
    return Step(request.param)


@pytest.fixture(scope="module")
def boxes():
    return Step(False)


def weights(step) -> OrderedDict:
    """detectron2's tensors under detectron2's names."""
    names = [name for name in step.tensors if name.startswith("weights.")]
    return OrderedDict((name.removeprefix("weights."), step.tensors[name]) for name in names)


def save(path, state, **around):
    """A file as detectron2's trainer leaves it."""
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.02, "params": [0]}]}
    torch.save(
        {"model": state, "optimizer": optimizer, "scheduler": {"last_epoch": 7}, "iteration": 23999} | around, path
    )


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_a_detector_has_the_names_and_shapes_of_the_recorded_one(convert, step, tmp_path):
    model = MoCoForObjectDetection(MoCoRCNNConfig(**TINY, masks=step.masks))
    model.save_pretrained(tmp_path / "ours")
    out = convert(tmp_path / "ours", tmp_path / "model.pth", "--to", "detectron2")
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert content.keys() == {"model"}  # with matching_heuristics detectron2 would guess
    theirs = weights(step)
    assert {n: t.shape for n, t in content["model"].items()} == {n: t.shape for n, t in theirs.items()}
    assert {n: t.dtype for n, t in content["model"].items()} == {n: t.dtype for n, t in theirs.items()}
    equal({our_name(name): tensor for name, tensor in content["model"].items()}, dict(model.state_dict()))
    assert "MODEL.ROI_HEADS.NUM_CLASSES 3, MODEL.RESNETS.WIDTH_PER_GROUP 4, MODEL.RESNETS.RES2_OUT_CHANNELS 16" in out
    assert ("MODEL.MASK_ON True" in out) == step.masks


def test_detectron2s_detector_detects_the_same_and_comes_back_bit_for_bit(convert, step, tmp_path):
    save(tmp_path / "model_final.pth", weights(step))
    out = convert(tmp_path / "model_final.pth", tmp_path / "ours")
    assert "resnet50, c4, 3 classes" + (", masks" if step.masks else "") in out
    assert "no names of classes, anchors, thresholds and sizes of images" in out
    settings = {"score_threshold": 0.3, "max_detections": 12}  # of the record
    model = MoCoForObjectDetection.from_pretrained(tmp_path / "ours", **settings).eval()
    assert model.config.id2label == {i: f"LABEL_{i}" for i in range(3)}
    assert model.config.detector_norm == "sync"
    processor = MoCoDetectionImageProcessor.from_pretrained(tmp_path / "ours")
    inputs = processor(step.images, do_resize=False, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    for i, found in enumerate(processor.post_process_object_detection(outputs, 0, step.sizes)):
        assert torch.equal(found["labels"], step.tensors[f"labels_{i}"])
        torch.testing.assert_close(found["scores"], step.tensors[f"scores_{i}"], atol=1e-5, rtol=0)
        torch.testing.assert_close(found["boxes"], step.tensors[f"boxes_{i}"], atol=1e-2, rtol=0)
    if step.masks:
        for i, found in enumerate(processor.post_process_instance_segmentation(outputs, 0, step.sizes)):
            assert (found["masks"] != step.tensors[f"masks_{i}"].bool()).sum() <= 6  # a half within rounding
    convert(tmp_path / "ours", tmp_path / "back.pth", "--to", "detectron2")
    equal(torch.load(tmp_path / "back.pth", weights_only=True)["model"], weights(step))


def test_a_file_goes_directly_from_one_form_to_another(convert, boxes, tmp_path):
    torch.save(weights(boxes), tmp_path / "bare.pth")  # detectron2 takes it as the model too
    convert(tmp_path / "bare.pth", tmp_path / "again.pth", "--to", "detectron2")
    equal(torch.load(tmp_path / "again.pth", weights_only=True)["model"], weights(boxes))


def test_the_buffers_of_older_versions_are_checked_and_left_out(convert, refuse, boxes, tmp_path):
    save(tmp_path / "old.pth", weights(boxes) | OLD)
    out = convert(tmp_path / "old.pth", tmp_path / "ours")
    assert "left out: pixel_mean, pixel_std, proposal_generator.anchor_generator.cell_anchors.0" in out
    for name, value in {
        "pixel_mean": OLD["pixel_mean"].flip(0),  # BGR
        "pixel_std": torch.ones(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": ANCHORS / 2,
        "proposal_generator.anchor_generator.cell_anchors.1": ANCHORS,
    }.items():
        save(tmp_path / "other.pth", weights(boxes) | OLD | {name: value})
        error = refuse(tmp_path / "other.pth", tmp_path / "other")
        assert f"was trained with another '{name}' than MoCo's configurations have" in error


def test_frozen_statistics_have_no_counter(convert, boxes, tmp_path):
    frozen = {name: tensor for name, tensor in weights(boxes).items() if not name.endswith("num_batches_tracked")}
    save(tmp_path / "frozen.pth", frozen)
    out = convert(tmp_path / "frozen.pth", tmp_path / "ours")
    assert "its BatchNorm is frozen" in out
    model, loading = MoCoForObjectDetection.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not loading["missing_keys"]
    assert model.config.detector_norm == "frozen"
    out = convert(tmp_path / "ours", tmp_path / "back.pth", "--to", "detectron2")
    assert "MODEL.RESNETS.NORM FrozenBN" in out
    equal(torch.load(tmp_path / "back.pth", weights_only=True)["model"], frozen)


def without(*starts):
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(starts)}


REFUSED = {
    "without the norm behind res5": without("roi_heads.res5.norm."),
    "a detector of detectron2 that is not R50-C4": without("roi_heads.res5."),
    "roi_heads.keypoint_head.x, which MoCo does not have": lambda state: (
        state | {"roi_heads.keypoint_head.x": torch.zeros(1)}
    ),
    "has 12 anchors at a place": lambda state: (
        state | {"proposal_generator.rpn_head.objectness_logits.weight": torch.zeros(12, 64, 1, 1)}
    ),
    "compared with resnet50, layer3.5.conv1.weight is missing": without("backbone.res4.5."),
    "is not a complete model: cls_score.bias is missing": without("roi_heads.box_predictor.cls_score.bias"),
    "is not a complete model: bbox_pred.weight is (4, 128), not (12, 128)": lambda state: (
        state | {"roi_heads.box_predictor.bbox_pred.weight": torch.zeros(4, 128)}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_detectors_of_detectron2_are_refused_in_one_line(refuse, boxes, tmp_path, message):
    save(tmp_path / "other.pth", REFUSED[message](weights(boxes)))
    error = refuse(tmp_path / "other.pth", tmp_path / "ours")
    print(error)
    assert message in error
    assert not (tmp_path / "ours").exists()


def test_a_pickle_of_arrays_is_refused_because_it_may_run_code(refuse, boxes, tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in weights(boxes).items()}
    for protocol in (2, 4):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "MOCO"}, protocol))
        error = refuse(tmp_path / "x.pkl", tmp_path / "ours")
        print(error)
        assert "x.pkl is a pickle, which may run code, so that it is not loaded" in error
        assert 'torch.save({"model": tensors}, "model.pth")' in error


def _zeros(model):
    """A model of the meta device with 0 everywhere."""
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model


def test_what_detectron2_has_no_place_for_is_refused(refuse, tmp_path):
    for name, config, message in (
        ("c5", {"rcnn_variant": "dilated_c5"}, "rcnn_variant='dilated_c5', whose convolution to 512 channels"),
        ("tiny", {}, "around a test_resnet with model_args=None"),
        ("odd", TINY | {"model_args": {"channels": [4, 8, 16, 31]}}, "whose channels may be scaled alone"),
        ("basic", {"architecture": "resnet18"}, "around a resnet18"),
    ):
        with torch.device("meta"):
            model = MoCoForObjectDetection(detector(**config).config)
        _zeros(model).save_pretrained(tmp_path / name)
        assert message in refuse(tmp_path / name, tmp_path / "out.pth", "--to", "detectron2")
    good = MoCoForObjectDetection(MoCoRCNNConfig(**TINY))
    good.save_pretrained(tmp_path / "good")
    assert "out.pkl must end in .pth" in refuse(tmp_path / "good", tmp_path / "out.pkl", "--to", "detectron2")
    for to in set(FORMATS) - {"moco", "detectron2"}:
        error = refuse(tmp_path / "good", tmp_path / "out.pth", "--to", to)
        assert f"is a detector, which --to {to} cannot hold: pass --to detectron2" in error
    assert "is already a model directory" in refuse(tmp_path / "good", tmp_path / "again")


SETTINGS = {
    "anchor_sizes": ([16, 32, 64, 128, 256], "MODEL.ANCHOR_GENERATOR.SIZES [[16, 32, 64, 128, 256]]"),
    "roi_size": (7, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7"),
    "max_detections": (50, "TEST.DETECTIONS_PER_IMAGE 50"),
    "image_mean": ([0.5, 0.5, 0.4], "MODEL.PIXEL_MEAN [127.5, 127.5, 102.0]"),
    "detector_norm": ("plain", "MODEL.RESNETS.NORM BN"),
    "architecture": ("resnet101", "MODEL.RESNETS.DEPTH 101"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_that_detectron2_needs_are_named(name, tmp_path):
    value, line = SETTINGS[name]
    model = MoCoForObjectDetection(MoCoRCNNConfig(**(TINY | {name: value})))
    model.save_pretrained(tmp_path / "ours")
    (said,) = write(read(str(tmp_path / "ours")), tmp_path / "out.pth", "detectron2")
    settings = set(re.split(r", (?=[A-Z]+\.)", said.split(" needs ")[1]))
    widths = {"MODEL.RESNETS.WIDTH_PER_GROUP 4", "MODEL.RESNETS.RES2_OUT_CHANNELS 16"}
    assert settings == {"MODEL.ROI_HEADS.NUM_CLASSES 3", line} | widths


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("wide_resnet50_2", "resnet101")]


@pytest.mark.parametrize("architecture", [*LARGE, "resnext50_32x4d"])
def test_wider_and_deeper_encoders_are_recognised(convert, tmp_path, architecture):
    with torch.device("meta"):
        model = MoCoForObjectDetection(MoCoRCNNConfig(architecture=architecture, num_labels=2))
    model = _zeros(model).half()  # a small file; its content does not matter here
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out.pth", "--to", "detectron2")
    content = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert {tensor.dtype for name, tensor in content.items() if "tracked" not in name} == {torch.float32}
    again = read(str(tmp_path / "out.pth"))
    assert (again.config.architecture, again.config.model_args, again.config.num_labels) == (architecture, None, 2)


def test_a_detector_is_no_start_for_pretraining(boxes, tmp_path):
    save(tmp_path / "model_final.pth", weights(boxes))
    with pytest.raises(ValueError, match="is a detector, whose encoder may have seen labels"):
        read_start(str(tmp_path / "model_final.pth"), MoCoConfig(architecture="resnet50"))


def test_the_sizes_of_images_are_those_of_the_source(convert, refuse, tmp_path):
    """To detectron2's names as settings that are printed, to a model directory in its image processor."""
    ours = tmp_path / "ours"
    MoCoForObjectDetection(MoCoRCNNConfig(**TINY)).save_pretrained(ours)
    MoCoDetectionImageProcessor().save_pretrained(ours)
    assert "INPUT." not in convert(ours, tmp_path / "usual.pth", "--to", "detectron2")
    processor = MoCoDetectionImageProcessor(
        size={"shortest_edge": 240, "longest_edge": 400}, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(ours)
    out = convert(ours, tmp_path / "model.pth", "--to", "detectron2")
    assert "INPUT.MIN_SIZE_TEST 240, INPUT.MAX_SIZE_TEST 400" in out
    write(read(str(ours)), tmp_path / "again", "moco")
    again = MoCoDetectionImageProcessor.from_pretrained(tmp_path / "again")
    assert again.to_dict() == processor.to_dict()

    MoCoDetectionImageProcessor(size={"height": 240, "width": 400}).save_pretrained(ours)
    assert "detectron2 resizes by a shortest_edge" in refuse(ours, tmp_path / "square.pth", "--to", "detectron2")
    (ours / "preprocessor_config.json").write_text("{")
    error = refuse(ours, tmp_path / "damaged.pth", "--to", "detectron2")
    assert f"{ours} has a preprocessor_config.json that cannot be read" in error
    assert not (tmp_path / "square.pth").exists()


def test_an_encoder_keeps_the_size_of_its_images(tmp_path):
    source = tmp_path / "source"
    MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=16)).save_pretrained(source)
    processor = MoCoImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(source)
    content = json.loads((source / "preprocessor_config.json").read_text())
    (source / "preprocessor_config.json").write_text(json.dumps(content | {"unknown": "of somebody"}))
    write(read(str(source)), tmp_path / "again", "moco")
    assert MoCoImageProcessor.from_pretrained(tmp_path / "again").to_dict() == processor.to_dict()
