"""A detector is published with its AP, and strangers find with it what we find."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from drawn_boxes import draw_boxes
from html_page import Page
from hub_server import environment, metadata_errors
from huggingface_hub import ModelCard
from PIL import Image
from tiny_trainer import TINY

from modeling_moco import MoCoDetectionImageProcessor, MoCoForObjectDetection
from training.detection.run import parse_detect
from training.hub.model_card import _newest
from training.hub.origin import published_figures, read_origin

DETECTOR = [
    *("--recipe", "bccd_quickstart", "--train_sizes", "64", "72", "--test_size", "64", "--anchor_sizes", "16", "32"),
    *("--roi_samples", "16", "--rpn_post_nms_train", "40", "--rpn_post_nms_test", "20", "--global_batch_size", "2"),
    *("--precise_bn_steps", "2", "--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1", "--warmup_steps", "2"),
    *("--max_steps", "2"),
]
STRANGER = """
import json, sys
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

image = Image.open(sys.argv[1])
processor = AutoImageProcessor.from_pretrained("org/detector", trust_remote_code=True)
model = AutoModelForObjectDetection.from_pretrained("org/detector", trust_remote_code=True).eval()
outputs = model(**processor(image, return_tensors="pt"))
size = [(image.height, image.width)]
found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=size)[0]
pipe = pipeline("object-detection", model="org/detector", trust_remote_code=True, device="cpu")
from modeling_moco import MoCoForObjectDetection

ours = MoCoForObjectDetection.from_pretrained("org/detector").eval()
print(json.dumps({
    "class": type(model).__module__,
    "scores": found["scores"].tolist(),
    "boxes": found["boxes"].tolist(),
    "package": ours(**processor(image, return_tensors="pt")).scores[0, : len(found["scores"])].tolist(),
    "pipeline": [one["score"] for one in pipe(image, threshold=0.0)],
}))
"""


@pytest.fixture(scope="module")
def detector(script, tmp_path_factory):
    """A detector in the folder of the pretraining run whose encoder it began with, and its images."""
    folder = tmp_path_factory.mktemp("runs")
    images = draw_boxes(folder / "drawn")
    script("pretrain").main([*TINY, "--output_dir", str(folder / "run")])
    script("detect").main([str(folder / "run"), *DETECTOR, "--dataset_name", str(images)])
    return folder / "run" / "bccd_quickstart"


@pytest.fixture(scope="module")
def stranger(detector, tmp_path_factory):
    """The detector as it comes from elsewhere: without what its training left beside it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copyfile(detector / name, folder / name)
    return folder


def push(script, *words: str) -> None:
    script("push_to_hub").main(list(words))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")
@pytest.mark.slow
def test_a_stranger_finds_with_it_what_we_find(hub, detector, script, tmp_path):
    push(script, str(detector), "org/detector")
    assert not [name for name in hub.files("org/detector") if name.endswith((".bin", ".pt", ".pkl"))]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "image.png")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(hub, tmp_path / "home"), cwd="/")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["class"].startswith("transformers_modules.")

    model = MoCoForObjectDetection.from_pretrained(detector).eval()
    processor = MoCoDetectionImageProcessor.from_pretrained(detector)
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    ours = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(50, 61)])[0]
    assert len(ours["scores"])
    for way in ("scores", "package", "pipeline"):
        assert found[way] == pytest.approx(ours["scores"].tolist(), rel=1e-5), way
    assert np.array(found["boxes"]) == pytest.approx(ours["boxes"].numpy(), abs=1e-3)


def test_its_card_has_its_ap_and_says_what_the_encoder_was(detector, script, capsys):
    push(script, str(detector), "org/detector", "--dry_run")
    shown = capsys.readouterr().out
    text = shown[shown.index("---\n") : shown.index("Nothing was uploaded")]
    assert metadata_errors(text) == []
    data = ModelCard(text).data
    assert (data.pipeline_tag, data.metrics) == ("object-detection", ["mAP"])
    measured = [(r["metric"], round(r["value"], 2)) for r in json.loads((detector / "results.json").read_text())]
    assert measured[0][0] == "box AP"
    told = [(result.metric_name.partition(" in per cent")[0], result.metric_value) for result in data.eval_results]
    assert told == measured
    assert {(result.task_type, result.dataset_name, result.dataset_split) for result in data.eval_results} == {
        ("object-detection", "drawn", "test")
    }
    assert "Faster R-CNN (C4) that finds objects of 2 classes, trained with the boxes of drawn." in text
    assert "was trained by Momentum Contrast (MoCo v2" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["training"]["max_steps"] == 2
    assert settings["pretraining"]["data"]["dataset_name"] == "digits"
    assert str(detector.parent.parent) not in text


def test_a_later_evaluation_with_another_long_side_or_of_a_few_images_hides_no_number(
    detector, script, capsys, tmp_path
):
    copy = shutil.copytree(detector, tmp_path / "detector")
    whole = json.loads((copy / "results.json").read_text())
    script("detect").main([str(copy), "--eval_only", "--use_cpu", "--longest_side", "70"])
    script("detect").main([str(copy), "--eval_only", "--use_cpu", "--max_eval_samples", "1"])
    entries = json.loads((copy / "results.json").read_text())
    assert {entry["protocol"] for entry in entries[len(whole) :] if entry["n"] == 6} == {
        whole[0]["protocol"].replace("short side 64 px", "short side 64 px, long side to 70 px")
    }
    assert {entry["protocol"] for entry in entries if entry["n"] == 1} == {whole[0]["protocol"]}
    capsys.readouterr()
    push(script, str(copy), "org/detector", "--dry_run")
    shown = capsys.readouterr().out
    results = ModelCard(shown[shown.index("---\n") : shown.index("Nothing was uploaded")]).data.eval_results
    assert {result.metric_args["images"] for result in results} == {6}
    told = [result.metric_value for result in results if "long side" not in result.metric_name]
    assert told == [round(entry["value"], 2) for entry in whole]
    assert any("long side to 70 px" in result.metric_name for result in results)


def test_the_card_has_the_newest_number_of_the_most_images_of_each_part_of_a_dataset():
    data = {"dataset": "org/digits", "split": "test"}
    usual = {"protocol": "kNN", "feature": "backbone", "metric": "top1", "settings": {}, "data": data}
    entries = [usual | {"n": n, "value": value} for n, value in ((6, 50.0), (9, 60.0), (9, 61.0), (1, 100.0))]
    entries.append(usual | {"n": 2, "value": 10.0, "data": data | {"config": "other"}})
    assert [entry["value"] for entry in _newest(entries)] == [61.0, 10.0]


def test_pictures_of_a_local_dataset_stay_here(detector, script, capsys):
    push(script, str(detector), "org/detector", "--dry_run")
    shown = capsys.readouterr().out
    assert "detections.png shows images of the evaluated split" in shown
    assert "(detections.png)" not in shown
    assert "(ap_by_class.png)" in shown
    push(script, str(detector), "org/detector", "--dry_run", "--include_pictures")
    assert "(detections.png)" in capsys.readouterr().out


def test_the_card_of_a_baseline_does_not_claim_a_pretraining(detector, script, tmp_path, capsys):
    folder = tmp_path / "run" / "detector"
    folder.parent.mkdir()
    folder.symlink_to(detector)
    recipe = yaml.safe_load((detector / "recipe.yaml").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in detector.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    recipe["encoder"]["random_encoder"] = True
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    push(script, str(copy), "org/detector", "--dry_run")
    shown = capsys.readouterr().out
    assert "began with random weights" in shown
    assert "Momentum Contrast" not in shown.partition("## Use")[0]


def test_the_card_says_that_the_encoder_was_fine_tuned_in_between(detector, script, tmp_path, capsys):
    tuned = tmp_path / "run" / "finetune_100pct"
    copy = shutil.copytree(detector, tuned / "detector")
    shutil.copyfile(detector.parent / "recipe.yaml", tuned.parent / "recipe.yaml")
    recipe = yaml.safe_load((detector / "recipe.yaml").read_text())
    recipe["encoder"]["model"] = str(tuned)
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for random, words in (
        (
            False,
            r"was trained by Momentum Contrast \(MoCo v2, .*\) on digits without labels and fine-tuned with labels before",
        ),
        (True, "began with the weights of finetune_100pct, which had been fine-tuned with labels"),
    ):
        encoder = {"model": str(tuned.parent), "random_encoder": random, "fine_tuned": True}
        (tuned / "recipe.yaml").write_text(yaml.safe_dump({"training": {}, "encoder": encoder}))
        push(script, str(copy), "org/detector", "--dry_run")
        assert re.search(words, capsys.readouterr().out.partition("## Use")[0])


def test_the_card_of_one_that_lies_elsewhere_says_so_too(detector, script, tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "elsewhere" / "detector"
    shutil.copytree(detector.parent, run, ignore=shutil.ignore_patterns(detector.name))
    images = yaml.safe_load((detector / "recipe.yaml").read_text())["data"]["dataset_name"]
    flags = ["--use_cpu", "--num_train_epochs", "1", "--disable_tqdm", "True", "--global_batch_size", "16"]
    script("finetune").main([str(run), *flags])
    tuned = str(run / "finetune_100pct")
    script("detect").main([tuned, *DETECTOR, "--dataset_name", images, "--output_dir", str(folder)])
    for gone, words in (
        (False, "on digits without labels and fine-tuned with labels before."),
        (True, "began with the weights of finetune_100pct, which had been fine-tuned with labels."),
    ):
        if gone:
            run.rename(tmp_path / "moved")
        capsys.readouterr()
        push(script, str(folder), "org/detector", "--dry_run")
        assert words in capsys.readouterr().out.partition("## Use")[0]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["push_to_hub", "org/detector", "--onnx"], "onnx (True) is for encoders and classifiers"),
        (["push_to_hub", "org/detector", "--include_training_state"], "is for encoders, and"),
        (["export", "exported", "--timm"], "is a detector, which no other library has"),
        (["knn", "--use_cpu"], "whose encoder has been trained with labels: pass the run that it began with"),
        (["linear_probe", "--use_cpu"], "whose encoder has been trained with labels"),
        (["compare", "RUN", "--output_dir", "compared"], "is of detect, and pretraining runs are compared"),
    ],
)
def test_what_a_detector_does_not_have_is_refused_in_one_line(
    command, says, detector, script, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        script(command[0]).main([str(detector), *(word.replace("RUN", str(detector.parent)) for word in command[1:])])
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_its_report_and_that_of_its_encoder_show_what_it_finds(detector, script, capsys):
    page = Page(detector / "report.html")
    figures = [(detector / f"{name}.svg").read_bytes() for name in ("training_curves", "detections", "ap_by_class")]
    assert list(page.images.values()) == figures
    results = json.loads((detector / "results.json").read_text())
    assert f"{results[0]['value']:.2f} %" in page.text
    assert page.text.index("box AP") < page.text.index("What it finds")

    of_encoder = Page(detector.parent / "report.html")
    assert figures[1] in of_encoder.images.values()
    assert f"box AP {json.loads((detector / 'metrics.json').read_text())['box']['AP']:.6g}" in of_encoder.text

    (detector / "detections.svg").rename(detector / "kept.svg")
    try:
        script("report").main([str(detector)])
        assert "draw it by" in Page(detector / "report.html").text
        assert "--eval_only" in Page(detector / "report.html").text
    finally:
        (detector / "kept.svg").rename(detector / "detections.svg")
    script("report").main([str(detector)])
    assert list(Page(detector / "report.html").images.values()) == figures


def test_figures_are_of_the_evaluation_whose_numbers_are_beside_them(detector, script, capsys, tmp_path):
    run = shutil.copytree(detector.parent, tmp_path / detector.parent.name)
    copy, other = run / detector.name, run / "on_train"
    evaluate = [str(copy), "--eval_only", "--use_cpu"]
    names = [f"{name}.{kind}" for name in ("detections", "ap_by_class") for kind in ("png", "svg")]
    for name in names:
        (copy / name).write_bytes(b"<svg>of the run</svg>")
    for flags in (
        ["--eval_split", "train"],
        ["--max_eval_samples", "1"],
        ["--metric", "voc12"],
    ):
        script("detect").main([*evaluate, *flags])
        assert f"The figures in {copy} stay those of Faster R-CNN C4, 2 steps of 2" in capsys.readouterr().out
        assert {(copy / name).read_bytes() for name in names} == {b"<svg>of the run</svg>"}

    script("detect").main([*evaluate, "--eval_split", "train", "--output_dir", str(other)])
    assert "stay those of" not in capsys.readouterr().out
    script("detect").main([*evaluate, "--output_dir", str(shutil.copytree(copy, tmp_path / "another"))])
    assert "stay those of" in capsys.readouterr().out  # whose numbers are of a model of its own
    script("detect").main(evaluate)
    assert "stay those of" not in capsys.readouterr().out
    assert b"<svg>of the run</svg>" not in {(copy / name).read_bytes() for name in names}

    script("report").main([str(run)])
    text = Page(run / "report.html").text
    measured = json.loads((copy / "metrics.json").read_text())
    assert f"What it finds, bccd_quickstart: {measured['protocol']}; box AP" in text
    assert "What it finds, on_train: of the evaluation that was drawn last in this folder, which has no metrics" in text


def test_of_an_unknown_training_nothing_is_said(detector, stranger, script, capsys):
    images = yaml.safe_load((detector / "recipe.yaml").read_text())["data"]["dataset_name"]
    script("detect").main([str(stranger), "--eval_only", "--dataset_name", images, "--use_cpu"])
    entries = json.loads((stranger / "results.json").read_text())
    protocol = "Faster R-CNN C4, training not recorded, short side 64 px, COCO AP"
    assert {(entry["protocol"], entry["seed"]) for entry in entries} == {(protocol, None)}
    assert entries[0]["value"] == json.loads((detector / "results.json").read_text())[0]["value"]
    script("detect").main([str(stranger), "--eval_only", "--dataset_name", images, "--use_cpu", "--test_size", "96"])
    assert "short side 96 px" in json.loads((stranger / "results.json").read_text())[-1]["protocol"]
    push(script, str(stranger), "org/detector", "--dry_run")
    shown = capsys.readouterr().out
    assert "nothing is recorded of what that was pretrained on" in shown
    assert "Nothing is recorded of how these weights were trained." in shown


def test_an_evaluation_makes_its_folder_before_it_begins(detector, script, capsys, tmp_path):
    folder = tmp_path / "new" / "folder"
    script("detect").main([str(detector), "--eval_only", "--use_cpu", "--output_dir", str(folder)])
    names = {path.name for path in folder.iterdir()}
    assert {"results.json", "detections.png", "ap_by_class.png"} <= names
    results = [json.loads((place / "results.json").read_text()) for place in (folder, detector)]
    values = [[(entry["protocol"], entry["metric"], entry["value"]) for entry in entries] for entries in results]
    assert values[0] == values[1][: len(values[0])]
    (tmp_path / "file").touch()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        script("detect").main([str(detector), "--eval_only", "--use_cpu", "--output_dir", str(tmp_path / "file")])
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["", "checkpoint-2"])
def test_an_evaluation_on_other_images_than_the_runs_is_refused(part, detector, script, capsys, tmp_path):
    """Also where it changed after the training; the first images of a split are no other ones."""
    model = shutil.copytree(detector, tmp_path / "detector") / part
    record = tmp_path / "detector" / "dataset.json"
    place = json.loads(record.read_text())
    count, _, digest = place["content"]["test"].partition(" images ")
    place["content"]["test"] = f"{count} images {digest[::-1]}"
    record.write_text(json.dumps(place))
    with pytest.raises(SystemExit):
        script("detect").main([str(model), "--eval_only", "--use_cpu"])
    assert (
        f"is not what the run was begun with: split 'test' was {count} images {digest[::-1]} and is {count} images {digest}. "
        "Bring its files back, or name other data with --dataset_name" in capsys.readouterr().err
    )
    script("detect").main([str(model), "--eval_only", "--use_cpu", "--max_eval_samples", "2"])
    entry = json.loads((model / "results.json").read_text())[-1]
    assert (entry["n"], entry["data"]["content"]["test"].rpartition(" ")[0]) == (2, "first 2 images")


def test_an_evaluation_takes_the_trainings_metric_and_nothing_that_fits_its_devices_alone(
    detector, script, capsys, tmp_path
):
    copy = tmp_path / "detector"
    shutil.copytree(detector, copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["training"] |= {"global_batch_size": 3, "gradient_accumulation_steps": 2, "tf32": True}  # of a GPU
    recipe["model"]["metric"] = "voc12"
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for words, metric in (((), "VOC AP"), (("--metric", "coco"), "COCO AP")):
        script("detect").main([str(copy), "--eval_only", "--use_cpu", *words])
        told = json.loads((copy / "results.json").read_text())[-1]["protocol"]
        assert told.startswith("Faster R-CNN C4, 2 steps of 3, learning rate 0.04, ")
        assert metric in told
    with pytest.raises(SystemExit):
        script("detect").main([str(copy), "--eval_only", "--use_cpu", "--masks", "true"])
    assert f"masks (True) is not what {copy} was trained with: leave --masks out" in capsys.readouterr().err


def test_the_batch_of_a_device_is_kept_as_the_batch_of_all(detector):
    words = (
        "--recipe",
        "bccd_quickstart",
        "--dataset_name",
        "digits",
        "--use_cpu",
        "--per_device_train_batch_size",
        "3",
    )
    run = parse_detect([str(detector.parent), *words, "--gradient_accumulation_steps", "2"])
    assert run.settings["training"]["global_batch_size"] == 6
    assert "150 steps of 6" in run.training_in_words


@pytest.mark.parametrize("command", ["detect", "segment"])
def test_a_detector_is_no_encoder_to_train_around_and_is_told_before_any_data_is_read(
    command, detector, script, capsys
):
    with pytest.raises(SystemExit):
        script(command).main([str(detector), "--dataset_name", "no/such-dataset", "--use_cpu"])
    assert (
        f"{detector} is no encoder but was trained around one (moco_rcnn): pass the folder of a pretraining run, or measure it "
        f"by python scripts/detect.py {detector} --eval_only" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("command", "model", "says"),
    [
        ("segment", "detector", "is no segmentation model but was trained around one (moco_rcnn): measure it by "),
        ("detect", "run", "is no detector but an encoder: leave --eval_only out to train one around it, or pass the"),
    ],
)
def test_an_evaluation_of_another_kind_of_model_is_refused_by_its_kind(command, model, says, detector, script, capsys):
    with pytest.raises(SystemExit):
        script(command).main([str(detector if model == "detector" else detector.parent), "--eval_only", "--use_cpu"])
    assert says in capsys.readouterr().err


def test_a_checkpoint_is_measured_by_the_words_of_its_own_training(detector, script, capsys, tmp_path):
    script("detect").main([str(detector / "checkpoint-2"), "--eval_only", "--use_cpu", "--output_dir", str(tmp_path)])
    assert "Faster R-CNN C4, 2 of 2 steps of 2, learning rate 0.04, short side 64 px" in capsys.readouterr().out
    assert {entry["seed"] for entry in json.loads((tmp_path / "results.json").read_text())} == {0}


def test_milestones_without_a_value_are_none(detector):
    run = parse_detect([str(detector.parent), *DETECTOR, "--dataset_name", "x/y", "--step_milestones"])
    assert run.training.step_milestones == run.settings["training"]["step_milestones"] == []


@pytest.mark.parametrize("flag", ["--max_steps", "--roi_samples", "--seed"])
def test_an_evaluation_refuses_what_only_a_training_uses(flag, detector, script, capsys):
    with pytest.raises(SystemExit):
        script("detect").main([str(detector), "--eval_only", flag, "3"])
    assert f"{flag} is for training, and --eval_only trains nothing" in capsys.readouterr().err


def test_no_evaluation_of_public_images_publishes_pictures_of_private_ones(detector, tmp_path):
    copy = shutil.copytree(detector, tmp_path / "copy")
    model = MoCoForObjectDetection.from_pretrained(copy)
    entries = json.loads((copy / "results.json").read_text())
    public = [entry | {"data": entry["data"] | {"dataset": "digits", "local": False}} for entry in entries]
    (copy / "results.json").write_text(json.dumps(public))
    assert "detections" in {path.stem for path in published_figures(read_origin(copy, model), False)}
    (copy / "results.json").write_text(json.dumps(entries + public))
    assert "detections" not in {path.stem for path in published_figures(read_origin(copy, model), False)}
