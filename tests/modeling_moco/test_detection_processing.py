"""Images and annotations for detectors, and their outputs in pixels."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import batch, detector
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, pipeline
from transformers.dynamic_module_utils import get_imports

import modeling_moco
from modeling_moco import (
    MoCoDetectionImageProcessor,
    MoCoDetectionOutput,
    MoCoForObjectDetection,
    MoCoRCNNConfig,
)
from modeling_moco.image_processing_moco import paste_masks, resized_size
from training.detection.dataset.masks import check_segmentation, encode, rasterize

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(image) -> torch.Tensor:
    pixels = (np.asarray(image, dtype=np.float64) / 255 - MEAN) / STD
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


@pytest.fixture(scope="module")
def processor():
    return MoCoDetectionImageProcessor(size={"shortest_edge": 40, "longest_edge": 60})


# detectron2's ResizeShortestEdge(800, 1333), computed by hand from its formula: height, width before and after
SIZES = {
    (480, 640): (800, 1067),  # 1066.67: transformers has 1066
    (375, 500): (800, 1067),
    (500, 375): (1067, 800),
    (333, 500): (800, 1201),  # 1201.2
    (427, 640): (800, 1199),  # 1199.06
    (640, 427): (1199, 800),
    (300, 600): (667, 1333),  # 666.5 by the long side
    (200, 1000): (267, 1333),  # 266.6
    (800, 800): (800, 800),
    (1, 3000): (1, 1333),  # 0.44 would be no side
}


@pytest.mark.parametrize("before", SIZES)
def test_sizes_are_rounded_as_detectron2_rounds_them(before):
    assert resized_size(*before, 800, 1333) == SIZES[before]


def test_images_are_pils_normalised_and_padded_with_zeros_to_the_largest(processor):
    images = [noise(100, 80), noise(50, 90, seed=1)]
    inputs = processor(images, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 60, 50)
    assert inputs["pixel_values"].dtype == torch.float32
    for image, pixels, mask, (height, width) in zip(
        images, inputs["pixel_values"], inputs["pixel_mask"], [(40, 50), (60, 33)], strict=True
    ):
        expected = normalised(image.resize((width, height), Image.Resampling.BILINEAR))
        torch.testing.assert_close(pixels[:, :height, :width], expected, atol=1e-6, rtol=0)
        assert not pixels[:, height:].any()
        assert not pixels[:, :, width:].any()
        assert mask[:height, :width].all()
        assert mask.sum() == height * width
    assert set(processor(images[0], return_tensors="pt")) == {"pixel_values", "pixel_mask"}


def test_the_defaults_are_those_of_the_papers():
    processor = MoCoDetectionImageProcessor()
    inputs = processor(noise(64, 48), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 800, 1067)
    assert inputs["pixel_mask"].all()
    assert processor(noise(64, 48).convert("L"), return_tensors="pt")["pixel_values"].shape == (1, 3, 800, 1067)


BOXES = [[10, 20, 40, 30], [60, 50, 80, 90], [0, 0, 5, 5], [20, 30, 0, 10], [110, 10, 9, 9]]  # of an image of 100 x 80
COCO = {
    "image_id": 7,
    "annotations": [
        {"bbox": box, "category_id": i, "iscrowd": int(i == 2), "area": 1, "id": i} for i, box in enumerate(BOXES)
    ],
}
COLUMNS = {"bbox": BOXES, "category": [0, 1, 2, 3, 4], "iscrowd": [False, False, True, False, False]}


@pytest.mark.parametrize("annotations", [COCO, {"image_id": 7, "objects": COLUMNS}], ids=["COCO", "columns"])
def test_annotations_become_labels_without_crowds_and_empty_boxes(processor, annotations):
    inputs = processor(
        [noise(100, 80), noise(50, 90)], [annotations, {"objects": {"bbox": [], "category": []}}], return_tensors="pt"
    )
    first, second = inputs["labels"]
    assert first["class_labels"].tolist() == [0, 1]
    expected = [[30 / 100, 35 / 80, 40 / 100, 30 / 80], [80 / 100, 65 / 80, 40 / 100, 30 / 80]]  # the second is clipped
    torch.testing.assert_close(first["boxes"], torch.tensor(expected))
    assert first["orig_size"].tolist() == [80, 100]
    assert first["size"].tolist() == [40, 50]
    assert first["image_id"].tolist() == [7]
    assert second["class_labels"].dtype == torch.long
    assert second["boxes"].shape == (0, 4)
    only = processor(noise(100, 80), annotations, return_tensors="pt")["labels"]
    assert torch.equal(only[0]["boxes"], first["boxes"])


def test_columns_alone_are_annotations_too(processor):
    labels = processor(noise(100, 80), COLUMNS, return_tensors="pt")["labels"]
    assert labels[0]["class_labels"].tolist() == [0, 1]


def test_masks_follow_their_objects_at_the_nearest_pixel():
    processor = MoCoDetectionImageProcessor(
        size={"shortest_edge": 40, "longest_edge": 60}, return_segmentation_masks=True
    )
    mask = np.zeros((80, 100), dtype=bool)
    mask[20:50, 10:50] = True
    columns = {
        "bbox": BOXES[:3],
        "category": [0, 1, 2],
        "iscrowd": [1, 0, 0],
        "segmentation": [~mask, mask, mask & False],
    }
    label = processor(noise(100, 80), columns, return_tensors="pt")["labels"][0]
    assert label["class_labels"].tolist() == [1]  # the third has no pixel
    assert label["boxes"].shape == (1, 4)
    assert label["masks"].shape == (1, 40, 50)
    assert torch.equal(label["masks"][0].bool(), torch.from_numpy(mask[::2, ::2]))
    none = processor(noise(100, 80), {"bbox": [], "category": []}, return_tensors="pt")["labels"][0]
    assert none["masks"].shape == (0, 40, 50)


def test_a_batch_of_the_processor_trains_the_model(processor):
    with_masks = MoCoDetectionImageProcessor(size=processor.size, return_segmentation_masks=True)
    columns = {"bbox": BOXES[:2], "category": [0, 1], "segmentation": [np.ones((80, 100))] * 2}
    for masks, prepare in ((False, processor), (True, with_masks)):
        inputs = prepare([noise(100, 80), noise(50, 90)], [columns, {"bbox": [], "category": []}], return_tensors="pt")
        assert torch.isfinite(detector(masks=masks).train()(**inputs).loss)


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ([COCO], "annotations (of 1 images) must be of all 2 images"),
        ([COCO, {"bbox": [[1, 2, 3, 4]]}], "annotations (bbox) must have bbox and category_id: rename the columns"),
        ([COCO, {"annotations": [{"category_id": 1}]}], "annotations (category_id) must have bbox and category_id"),
        ([COCO, {"bbox": BOXES, "category": [1]}], "must have lists of one length, one entry for each object"),
        (
            [COCO, {"bbox": [[1, 2, 3]], "category": [1]}],
            "bbox ([1, 2, 3]) must have four numbers: x, y, width, height",
        ),
    ],
)
def test_annotations_that_do_not_fit_are_refused_in_one_line(processor, annotations, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        processor([noise(100, 80), noise(50, 90)], annotations)
    assert "\n" not in str(error.value)


POLYGONS = [[10.0, 20, 50, 20, 49.5, 50, 10, 50], [60, 60, 70, 60, 65, 75.5]]
RUNS = {"size": [80, 100], "counts": [931, *[29, 51] * 19, 29, 5520]}  # the last 29 pixels of columns 11 to 30


def labels_of(segmentations, size=None, **columns):
    """The label of an image of 100 x 80 that is resized to 50 x 40, or to `size`."""
    processor = MoCoDetectionImageProcessor(
        size=size or {"shortest_edge": 40, "longest_edge": 60}, return_segmentation_masks=True
    )
    columns = {"bbox": BOXES[:1] * len(segmentations), "category": list(range(len(segmentations))), **columns}
    return processor(noise(100, 80), columns | {"segmentation": segmentations}, return_tensors="pt")["labels"][0]


@pytest.mark.parametrize("short", [40, 80, 111])
def test_polygons_and_run_lengths_become_the_masks_that_the_trainer_sees(short):
    size = {"shortest_edge": short, "longest_edge": 2 * short}
    text = encode(rasterize(check_segmentation(RUNS, 100, 80), 100, 80)[None])[0]
    forms = [POLYGONS, RUNS, text, {**text, "counts": text["counts"].encode()}]
    label = labels_of([tuple(POLYGONS), *forms[1:]], size)
    height, width = label["size"].tolist()
    assert label["class_labels"].tolist() == [0, 1, 2, 3]
    scaled = [[x * (width / 100, height / 80)[i % 2] for i, x in enumerate(polygon)] for polygon in POLYGONS]
    checked = [check_segmentation(scaled, width, height), *(check_segmentation(form, 100, 80) for form in forms[1:])]
    for mask, form in zip(label["masks"], checked, strict=True):
        assert np.array_equal(mask.numpy(), rasterize(form, width, height))


def test_the_pixels_of_a_polygon_are_those_inside_it():
    square = [10, 20, 30, 20, 30, 50, 10, 50]  # corners on pixels, so that no rule of a border matters
    label = labels_of(
        [[square], [square, [60, 0, 70, 0, 70, 10, 60, 10]], RUNS], {"shortest_edge": 80, "longest_edge": 100}
    )
    expected = np.zeros((80, 100), bool)
    expected[20:50, 10:30] = True
    assert np.array_equal(label["masks"][0], expected)
    expected[0:10, 60:70] = True
    assert np.array_equal(label["masks"][1], expected)
    columns = np.zeros((80, 100), bool)
    columns[51:80, 11:31] = True
    assert np.array_equal(label["masks"][2], columns)


def test_objects_without_a_pixel_and_crowds_are_left_out_whatever_their_masks_are():
    outside = [[200, 200, 300, 200, 300, 300]]
    around = [[-50, -50, 200, -50, 200, 200, -50, 200]]
    nothing = {"size": [80, 100], "counts": [8000]}
    label = labels_of([outside, around, "not read", nothing, [[5, 5, 5, 5, 5, 5]]], iscrowd=[0, 0, 1, 0, 0])
    assert label["class_labels"].tolist() == [1]
    assert label["boxes"].shape == (1, 4)
    assert label["masks"].all()  # it is around the image
    assert label["masks"].shape == (1, 40, 50)
    none = labels_of([outside])
    assert none["masks"].shape == (0, 40, 50)
    assert none["class_labels"].dtype == torch.long


MASK_OF_THE_IMAGE = "must be a mask of 80 x 100 pixels, a list of polygons or an RLE"
BAD_MASKS = [
    (np.ones((8, 9)), MASK_OF_THE_IMAGE),
    (None, MASK_OF_THE_IMAGE),
    ([], MASK_OF_THE_IMAGE),
    ("x", MASK_OF_THE_IMAGE),
    *(
        ([polygon], "must be a list x0, y0, x1, y1, ... of at least three points")
        for polygon in (
            [1, 2, 3, 4],
            [1, 2, 3, 4, 5, 6, 7],
            [[1, 2], [3, 4], [5, 6]],
            ["a"] * 6,
            [float("nan")] * 6,
            [1e7] * 6,
            3,
            [[1], 2],
        )
    ),
    *(({"size": size, "counts": [8000]}, "must have counts, and the size [80, 100]") for size in ([100, 80], 3, None)),
    ({"size": [80, 100]}, "must have counts, and the size [80, 100]"),
    *(
        ({"size": [80, 100], "counts": counts}, "has run lengths that do not fill its 80 x 100 pixels")
        for counts in ([10, 20], [10, -5, 7995], [0, 10**12], [], ["a"], "x", "P" * 5000, "o" * 5000, b"~" * 5000)
    ),
]


@pytest.mark.parametrize(("segmentation", "words"), BAD_MASKS)
def test_what_is_no_mask_of_the_image_is_refused_in_one_line(segmentation, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        labels_of([segmentation])
    assert "\n" not in str(error.value)
    MoCoDetectionImageProcessor()(noise(100, 80), {"bbox": BOXES[:1], "category": [0], "segmentation": [segmentation]})


def test_without_the_library_arrays_are_masks_and_others_name_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)  # as where it is not installed
    assert labels_of([np.ones((80, 100))])["masks"].all()
    for segmentation in (POLYGONS, RUNS):
        with pytest.raises(ValueError, match=r"faster-coco-eval is not installed.*: pip install faster-coco-eval$"):
            labels_of([segmentation])


def test_remote_code_does_not_ask_for_the_library():
    code = Path(modeling_moco.__file__).parent
    needed = {name for file in code.glob("*.py") for name in get_imports(file)}
    own = {"torch", "torchvision", "transformers", "huggingface_hub", "timm", "numpy", "PIL"}
    assert needed - sys.stdlib_module_names == own


# Outputs


@pytest.fixture
def outputs():
    return MoCoDetectionOutput(
        scores=torch.tensor([[0.9, 0.6, 0.2], [0.5, 0.0, 0.0]]),
        labels=torch.tensor([[2, 0, 1], [1, -1, -1]]),
        pred_boxes=torch.tensor(
            [[[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 1], [0.3, 0.3, 0.4, 0.4]], [[0.5, 0.5, 1, 1], *[[0.0] * 4] * 2]]
        ),
    )


def test_detections_above_the_threshold_are_in_pixels_of_their_image(processor, outputs):
    found = processor.post_process_object_detection(outputs, 0.3, torch.tensor([[100, 200], [50, 60]]))
    assert [one["labels"].tolist() for one in found] == [[2, 0], [1]]
    assert found[0]["scores"].tolist() == pytest.approx([0.9, 0.6])
    torch.testing.assert_close(found[0]["boxes"], torch.tensor([[20.0, 20.0, 100.0, 60.0], [0.0, 0.0, 200.0, 100.0]]))
    torch.testing.assert_close(found[1]["boxes"], torch.tensor([[30.0, 25.0, 60.0, 50.0]]))
    every = processor.post_process_object_detection(outputs, -1)  # places without a detection are none at any threshold
    assert [len(one["scores"]) for one in every] == [3, 1]
    torch.testing.assert_close(every[0]["boxes"], outputs.pred_boxes[0])
    with pytest.raises(ValueError, match=r"target_sizes \(of 1 images\) must be of all 2 images"):
        processor.post_process_object_detection(outputs, target_sizes=[(1, 2)])


def test_masks_are_pasted_at_the_centres_of_pixels():
    masks, boxes = (
        torch.rand(3, 4, 4),
        torch.tensor([[2.0, 3.0, 10.0, 7.0], [-3.5, 1.25, 6.5, 12.75], [5.2, 5.3, 5.9, 5.6]]),
    )
    pasted = paste_masks(masks, boxes, 11, 13)
    for mask, (x0, y0, x1, y1), ours in zip(masks.double().numpy(), boxes.tolist(), pasted, strict=True):
        padded = np.pad(mask, 1)  # 0 outside
        for row in range(11):
            for column in range(13):
                # Place of the pixel's centre among the centres of the values of the padded mask.
                u, v = (column + 0.5 - x0) / (x1 - x0) * 4 + 0.5, (row + 0.5 - y0) / (y1 - y0) * 4 + 0.5
                value = 0.0
                if 0 <= u < 5 and 0 <= v < 5:
                    i, j = int(v), int(u)
                    a, b = v - i, u - j
                    value = (1 - a) * ((1 - b) * padded[i, j] + b * padded[i, j + 1]) + a * (
                        (1 - b) * padded[i + 1, j] + b * padded[i + 1, j + 1]
                    )
                assert ours[row, column].item() == pytest.approx(value, abs=1e-5)
    assert paste_masks(torch.zeros(0, 4, 4), torch.zeros(0, 4), 5, 6).shape == (0, 5, 6)


def test_instances_have_masks_of_the_size_of_their_image(processor, outputs):
    masks, sizes = torch.zeros(2, 3, 4, 4), [(100, 200), (50, 60)]
    masks[0, 0], masks[0, 1, :2] = 1, 0.6
    with_masks = MoCoDetectionOutput(**outputs, pred_masks=masks)
    found = processor.post_process_instance_segmentation(with_masks, 0.3, sizes)
    assert found[0]["masks"].dtype == torch.bool
    assert [tuple(one["masks"].shape) for one in found] == [(2, 100, 200), (1, 50, 60)]
    inside = torch.zeros(100, 200, dtype=torch.bool)
    inside[20:60, 20:100] = True
    assert not (found[0]["masks"][0] & ~inside).any()
    assert torch.equal(found[0]["masks"][0][40], inside[40])  # the corners are cut, between values and 0
    assert torch.equal(found[0]["masks"][0][:, 60], inside[:, 60])
    assert found[0]["masks"][1, 13:40, 25:175].all()
    assert not found[0]["masks"][1, 60:].any()
    higher = processor.post_process_instance_segmentation(with_masks, 0.3, sizes, mask_threshold=0.7)
    assert not higher[0]["masks"][1].any()
    with pytest.raises(ValueError, match=r"pred_masks \(None\) are needed: load the model with masks=True"):
        processor.post_process_instance_segmentation(outputs, 0.3, sizes)
    with pytest.raises(ValueError, match=r"target_sizes \(None\) are needed for masks"):
        processor.post_process_instance_segmentation(with_masks, 0.3)


# Folders


NAMES = {0: "circle", 1: "square", 2: "star"}


def save(folder, masks=False) -> MoCoForObjectDetection:
    """A folder of a detector that finds something everywhere, with its processor."""
    model = detector(masks=masks, score_threshold=0.1, id2label=NAMES)
    torch.nn.init.normal_(model.cls_score.weight, std=0.5)
    model.save_pretrained(folder)
    MoCoDetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return model.eval()


def expected_of(model, image) -> list[dict]:
    """What the pipeline is to return."""
    processor = MoCoDetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    found = processor.post_process_object_detection(outputs, 0.2, [(image.height, image.width)])[0]
    return [
        {"label": NAMES[label], "score": score, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))}
        for label, score, box in zip(
            found["labels"].tolist(), found["scores"].tolist(), found["boxes"].int().tolist(), strict=True
        )
    ]


def assert_same(found, expected):
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        for name, side in other["box"].items():
            assert abs(one["box"][name] - side) <= 1, name  # an integer at the edge of another


@pytest.mark.parametrize("masks", [False, True])
def test_auto_classes_and_the_pipeline_load_a_detector(masks, tmp_path):
    model, image = save(tmp_path, masks), noise(120, 90)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MoCoRCNNConfig
    assert type(AutoModelForObjectDetection.from_pretrained(tmp_path)) is MoCoForObjectDetection
    for backend in ("torchvision", "pil"):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert type(loaded) is MoCoDetectionImageProcessor
        assert dict(loaded.size) == {"shortest_edge": 64, "longest_edge": 96}
    detect = pipeline("object-detection", model=str(tmp_path), device="cpu")
    assert_same(detect(image, threshold=0.2), expected_of(model, image))


# What a stranger does: no package of ours. Prints a line of JSON.
STRANGER = """
import sys
sys.modules["modeling_moco"] = sys.modules["training"] = None  # an import would raise
import json, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline
folder, image = sys.argv[1], Image.open(sys.argv[2])
trusted = {"trust_remote_code": True}
model = AutoModelForObjectDetection.from_pretrained(folder, **trusted).eval()
processor = AutoImageProcessor.from_pretrained(folder, **trusted)
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
found = {"module": type(model).__module__, "scores": outputs.scores[0].tolist(), "boxes": outputs.pred_boxes[0].tolist()}
found["pipeline"] = pipeline("object-detection", model=folder, device="cpu", **trusted)(image, threshold=0.2)
model.train()
labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}]
found["loss"] = model(**processor(image, return_tensors="pt"), labels=labels).loss.item()
model.save_pretrained(sys.argv[3]), processor.save_pretrained(sys.argv[3])
again = pipeline("object-detection", model=sys.argv[3], device="cpu", **trusted)
found["again"] = type(again.model).__name__
print(json.dumps(found))
"""
AUTO_MAP = {
    "AutoConfig": "configuration_moco.MoCoRCNNConfig",
    "AutoModelForObjectDetection": "rcnn_moco.MoCoForObjectDetection",
    "AutoImageProcessor": "image_processing_moco.MoCoDetectionImageProcessor",
}


@pytest.mark.slow
def test_a_process_without_the_package_detects_trains_and_saves(tmp_path):
    folder, image = tmp_path / "detector", noise(120, 90)
    model = save(folder)
    image.save(tmp_path / "image.png")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    del settings["image_processor_type"]  # as a published folder: the class is in config.json
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    for path in Path(modeling_moco.__file__).parent.glob("*_moco.py"):  # as a published folder has them
        shutil.copyfile(path, folder / path.name)
    command = [
        sys.executable,
        "-W",
        "default",
        "-c",
        STRANGER,
        str(folder),
        str(tmp_path / "image.png"),
        str(tmp_path / "again"),
    ]
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["module"].startswith("transformers_modules.")
    assert found["again"] == "MoCoForObjectDetection"
    processor = MoCoDetectionImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    assert found["scores"] == pytest.approx(outputs.scores[0].tolist(), abs=1e-6)
    torch.testing.assert_close(torch.tensor(found["boxes"]), outputs.pred_boxes[0], atol=1e-5, rtol=0)
    assert_same(found["pipeline"], expected_of(model, image))
    assert found["loss"] > 0


def test_a_batch_of_a_loader_and_of_the_processor_are_alike():
    inputs = batch()
    images = [Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)) for size in ((64, 96), (80, 64))]
    ours = MoCoDetectionImageProcessor(do_resize=False)(images, return_tensors="pt")
    assert torch.equal(ours["pixel_mask"], inputs["pixel_mask"])
    assert ours["pixel_values"].shape == inputs["pixel_values"].shape
