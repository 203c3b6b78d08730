"""A segmentation model is published with its mean IoU, and strangers see with it what we see."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from html_page import Page
from hub_server import environment, metadata_errors
from huggingface_hub import ModelCard
from masked_images import write_folder
from PIL import Image
from tiny_trainer import TINY

from modeling_moco import MoCoForSemanticSegmentation, MoCoSegmentationImageProcessor

SEGMENTER = [
    *("--recipe", "masks_quickstart", "--crop_size", "49", "--global_batch_size", "3", "--use_cpu", "--max_steps", "2"),
    *("--disable_tqdm", "True", "--logging_steps", "1", "--save_strategy", "no"),
]
STRANGER = """
import json, sys
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

image = Image.open(sys.argv[1])
processor = AutoImageProcessor.from_pretrained("org/masks", trust_remote_code=True)
model = AutoModelForSemanticSegmentation.from_pretrained("org/masks", trust_remote_code=True).eval()
outputs = model(**processor(image, return_tensors="pt"))
size = [(image.height, image.width)]
classes = processor.post_process_semantic_segmentation(outputs, target_sizes=size)[0]
pipe = pipeline("image-segmentation", model="org/masks", trust_remote_code=True, device="cpu")
found = {one["label"]: np.asarray(one["mask"]) for one in pipe(image)}
print(json.dumps({
    "class": type(model).__module__,
    "classes": classes.tolist(),
    "pipeline": {label: int((mask > 0).sum()) for label, mask in found.items()},
}))
"""


@pytest.fixture(scope="module")
def segmenter(script, tmp_path_factory):
    """A segmentation model in the folder of the pretraining run whose encoder it began with."""
    folder = tmp_path_factory.mktemp("runs")
    images = write_folder(folder / "masks")
    script("pretrain").main([*TINY, "--num_train_epochs", "1", "--output_dir", str(folder / "run")])
    script("segment").main([str(folder / "run"), *SEGMENTER, "--dataset_name", str(images)])
    return folder / "run" / "masks_quickstart"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")
@pytest.mark.slow
def test_a_stranger_sees_with_it_what_we_see(hub, segmenter, script, tmp_path):
    script("push_to_hub").main([str(segmenter), "org/masks"])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "image.png")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(hub, tmp_path / "home"), cwd="/")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["class"].startswith("transformers_modules.")
    model = MoCoForSemanticSegmentation.from_pretrained(segmenter).eval()
    processor = MoCoSegmentationImageProcessor.from_pretrained(segmenter)
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    ours = processor.post_process_semantic_segmentation(outputs, target_sizes=[(50, 61)])[0]
    assert (np.array(found["classes"]) == ours.numpy()).mean() > 0.999
    counts = {model.config.id2label[i]: int((ours == i).sum()) for i in ours.unique().tolist()}
    assert found["pipeline"] == pytest.approx(counts, abs=3)


def test_its_card_has_its_mean_iou_and_says_what_the_encoder_was(segmenter, script, capsys):
    script("push_to_hub").main([str(segmenter), "org/masks", "--dry_run"])
    shown = capsys.readouterr().out
    text = shown[shown.index("---\n") : shown.index("Nothing was uploaded")]
    assert metadata_errors(text) == []
    data = ModelCard(text).data
    assert (data.pipeline_tag, data.metrics) == ("image-segmentation", ["accuracy", "mean_iou"])
    measured = [(r["metric"], round(r["value"], 2)) for r in json.loads((segmenter / "results.json").read_text())]
    assert [name for name, _ in measured] == ["mIoU", "pixel accuracy"]
    told = [(result.metric_name.partition(" in per cent")[0], result.metric_value) for result in data.eval_results]
    assert told == measured
    assert {result.task_type for result in data.eval_results} == {"image-segmentation"}
    assert "An FCN-16s that names the class of every pixel" in text
    assert "was trained by Momentum Contrast (MoCo v2" in text
    assert "segmentations.png shows images of the evaluated split" in shown
    assert "(segmentations.png)" not in text
    assert "(iou_by_class.png)" in text


def test_its_report_and_that_of_its_encoder_show_what_it_predicts(segmenter, script):
    page = Page(segmenter / "report.html")
    figures = [
        (segmenter / f"{name}.svg").read_bytes() for name in ("training_curves", "segmentations", "iou_by_class")
    ]
    assert list(page.images.values()) == figures
    miou = json.loads((segmenter / "metrics.json").read_text())["miou"]
    assert page.text.index(f"{miou:.2f} %") < page.text.index("What it predicts")
    of_encoder = Page(segmenter.parent / "report.html")
    assert figures[1] in of_encoder.images.values()
    assert f"mIoU {miou:.2f} %" in of_encoder.text
    script("report").main([str(segmenter)])
    assert list(Page(segmenter / "report.html").images.values()) == figures


def test_what_it_does_not_have_is_refused_in_one_line(segmenter, script, capsys, tmp_path):
    for command in (["push_to_hub", "org/masks", "--onnx"], ["export", str(tmp_path / "out"), "--timm"]):
        with pytest.raises(SystemExit):
            script(command[0]).main([str(segmenter), *command[1:]])
        assert "segmentation model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script("segment").main([str(segmenter), "--eval_only", "--crop_size", "65"])
    assert "--crop_size is for training" in capsys.readouterr().err


def test_an_evaluation_makes_its_folder_before_it_begins(segmenter, script, capsys, tmp_path):
    folder = tmp_path / "new" / "folder"
    script("segment").main([str(segmenter), "--eval_only", "--use_cpu", "--output_dir", str(folder)])
    assert {"results.json", "segmentations.png", "iou_by_class.png"} <= {path.name for path in folder.iterdir()}
    (tmp_path / "file").touch()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        script("segment").main([str(segmenter), "--eval_only", "--use_cpu", "--output_dir", str(tmp_path / "file")])
    assert "cannot be written" in capsys.readouterr().err


def test_figures_are_of_the_evaluation_whose_numbers_are_beside_them(segmenter, script, capsys, tmp_path):
    copy = shutil.copytree(segmenter, tmp_path / "masks")
    figures = [copy / f"{name}.svg" for name in ("segmentations", "iou_by_class")]
    for figure in figures:
        figure.write_text("of the run")
    for flags in (["--eval_split", "train"], ["--max_eval_samples", "1"]):
        script("segment").main([str(copy), "--eval_only", "--use_cpu", *flags])
        assert f"The figures in {copy} stay those of FCN-16s" in capsys.readouterr().out
        assert {figure.read_text() for figure in figures} == {"of the run"}
    script("segment").main([str(copy), "--eval_only", "--use_cpu"])
    assert "of the run" not in {figure.read_text() for figure in figures}
