"""Detectors are trained in steps by detectron2's schedule, go on where they were stopped, and find what they have learned."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from boxed_images import write_voc
from drawn_boxes import CLASSES, draw_boxes
from tiny_trainer import StopAt
from torch.nn.modules.batchnorm import _BatchNorm

from modeling_moco import (
    MoCoConfig,
    MoCoDetectionImageProcessor,
    MoCoForObjectDetection,
    MoCoImageProcessor,
    MoCoModel,
)
from training.detection.dataset.opening import load_detection
from training.detection.run import (
    TASK,
    DetectorArguments,
    build_model,
    build_trainer,
    load_detector,
    parse_detect,
)
from training.optimization.schedules import step_factor

ROOT = Path(__file__).parents[2]
TINY = [
    *("--recipe", "bccd_quickstart", "--train_sizes", "64", "72", "--test_size", "64", "--anchor_sizes", "16", "32"),
    *("--roi_samples", "16", "--rpn_post_nms_train", "40", "--rpn_post_nms_test", "20", "--global_batch_size", "2"),
    *("--precise_bn_steps", "2", "--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1", "--warmup_steps", "2"),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=16, batch_norm="plain")).save_pretrained(folder)
    MoCoImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    return draw_boxes(tmp_path_factory.mktemp("boxes"))


def build(encoder, boxes, folder, *flags):
    run = parse_detect([str(encoder), *TINY, "--dataset_name", str(boxes), "--output_dir", str(folder), *flags])
    return build_trainer(run, load_detection(run.data))


def test_the_learning_rate_is_detectron2s():
    """WarmupMultiStepLR of detectron2 02b5c4e: 100 steps from a thousandth, drops at 18,000 and 22,000 (MoCo's VOC configs)."""
    for step, factor in [(0, 0.001), (50, 0.5005), (99, 0.99001), (100, 1), (17_999, 1), (18_000, 0.1), (22_000, 0.01)]:
        assert step_factor(step, 100, [18_000, 22_000]) == pytest.approx(factor, rel=1e-12)
    assert step_factor(0, 0, []) == 1


def test_batch_norm_has_no_decay_and_all_else_has(encoder, boxes, tmp_path):
    trainer = build(encoder, boxes, tmp_path / "run", "--max_steps", "2")
    trainer.train()
    norms = {id(p) for m in trainer.model.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
    groups = trainer.optimizer.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {id(p): 0 if id(p) in norms else 1e-4 for p in trainer.model.parameters()}
    assert {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"} <= trainer.state.log_history[0].keys()


@pytest.mark.slow
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(encoder, boxes, tmp_path):
    flags = ["--max_steps", "7", "--save_steps", "1"]
    whole = build(encoder, boxes, tmp_path / "whole", *flags)
    whole.train()
    first = build(encoder, boxes, tmp_path / "parts", *flags)
    first.add_callback(StopAt(4))
    first.train()
    assert first.state.global_step == 4
    second = build(encoder, boxes, tmp_path / "parts", *flags)
    second.train(resume_from_checkpoint=True)
    for name, x in whole.model.state_dict().items():
        assert torch.equal(x, second.model.state_dict()[name]), name
    losses = [[e["loss"] for e in one.state.log_history if "loss" in e] for one in (whole, second)]
    assert losses[0][4:] == losses[1][-3:]


def test_it_is_measured_in_the_precision_in_which_its_files_are_measured_again(encoder, boxes, tmp_path):
    folder = tmp_path / "detector"
    trainer = build(encoder, boxes, folder, "--max_steps", "2", "--bf16", "True")
    trainer.train()
    trainer.save_model(str(folder))
    image = torch.rand(1, 3, 64, 96)
    loaded = MoCoForObjectDetection.from_pretrained(folder).eval()(image)
    assert torch.allclose(trainer.trained_model().eval()(image).scores, loaded.scores, rtol=0, atol=2e-6)


def test_precise_statistics_are_of_views_that_the_training_has_not_used(encoder, boxes, tmp_path):
    flags = ["--max_steps", "5", "--gradient_accumulation_steps", "6", "--global_batch_size", "12", "--save_steps", "5"]
    for _ in range(2):  # the second goes on at the end of the first
        trainer = build(encoder, boxes, tmp_path / "run", *flags)
        trainer.train(resume_from_checkpoint=(tmp_path / "run/checkpoint-5").exists() or None)
        assert trainer.state.epoch == 5  # a step takes the six batches of an epoch
        next(trainer._later_batches())
        assert trainer.train_dataset.epoch >= 5


@pytest.mark.slow
def test_the_script_leaves_a_detector_with_its_results_and_measures_it_again(encoder, boxes, tmp_path, script, capsys):
    folder = tmp_path / "detector"
    command = [str(encoder), *TINY, "--dataset_name", str(boxes), "--output_dir", str(folder), "--max_steps", "3"]
    script("detect").main(command)
    shown = capsys.readouterr().out
    assert "Based on recipe bccd_quickstart, changed: dataset_name" in shown
    results = json.loads((folder / "results.json").read_text())
    assert [entry["metric"] for entry in results][:1] == ["box AP"]
    assert all(entry["interval"] == [] and entry["n"] == 6 for entry in results)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["box_per_class"]) == sorted(CLASSES)
    model = MoCoForObjectDetection.from_pretrained(folder)
    assert sorted(model.config.id2label.values()) == sorted(CLASSES)
    script("detect").main(command)
    assert "nothing to do" in capsys.readouterr().out
    assert {"detections.png", "ap_by_class.png"} <= {path.name for path in folder.iterdir()}
    script("detect").main([str(folder), "--eval_only", "--use_cpu"])
    measured = capsys.readouterr().out
    assert "3 steps of 2" in measured
    again = re.findall(r"box AP +\| +([\d.]+) %", measured)
    assert again == re.findall(r"box AP +\| +([\d.]+) %", shown)


@pytest.mark.parametrize(
    ("year", "metric"), [("2007", "voc07"), ("2009", "voc07"), ("2010", "voc12"), ("2012", "voc12")]
)
def test_the_metric_of_voc_is_that_of_the_year_of_the_split(year, metric, encoder, tmp_path):
    folder = write_voc(tmp_path / "voc", {"test": year})
    flags = ["--dataset_name", str(folder), "--train_split", "2007_train", "--eval_split", f"{year}_test"]
    run = parse_detect([str(encoder), *TINY, *flags])
    splits = load_detection(run.data)
    assert run.metric_of(splits) == metric
    asked = parse_detect([str(encoder), *TINY, *flags, "--metric", "coco"])
    assert asked.metric_of(splits) == "coco"


def test_sizes_that_contradict_each_other_are_refused_before_anything_is_trained(encoder, boxes, tmp_path):
    flags = [str(encoder), "--recipe", "voc_r50_c4_24k", "--use_cpu"]
    with pytest.raises(
        ValueError, match=r"test_size \(1400\) is longer than longest_side \(1333\): lower it, or raise"
    ):
        parse_detect([*flags, "--test_size", "1400"])
    with pytest.raises(ValueError, match=r"sizes \(\[900\]\) must be lengths of 1 to 850 pixels"):
        build(encoder, boxes, tmp_path / "run", "--train_sizes", "900", "--longest_side", "850", "--test_size", "64")
    folder = tmp_path / "detector"
    build_model(parse_detect(flags), CLASSES).save_pretrained(folder)
    MoCoDetectionImageProcessor(size={"shortest_edge": 300, "longest_edge": 400}).save_pretrained(folder)
    flags = [str(folder), "--eval_only", "--use_cpu", "--dataset_name", str(boxes)]
    for side, size, words in (("test_size", 401, r"401.* \(400"), ("longest_side", 299, r"300.* \(299")):
        with pytest.raises(ValueError, match=rf"test_size \({words}\): lower it, or raise the other"):
            load_detector(parse_detect([*flags, f"--{side}", str(size)]))
    _, processor = load_detector(parse_detect([*flags, "--longest_side", "500"]))  # less than the recipes' test_size
    assert dict(processor.size) == {"shortest_edge": 300, "longest_edge": 500}


def test_another_batch_is_told_the_rate_and_the_steps_in_proportion(encoder):
    flags = [str(encoder), "--recipe", "voc_r50_c4_24k", "--use_cpu"]
    told = parse_detect([*flags, "--global_batch_size", "2"]).rate_rule
    assert "0.02 for 16 images a step" in told
    assert "it would be 0.0025 for 2, with 192,000 steps instead of 24,000" in told
    assert parse_detect(flags).rate_rule is None
    assert parse_detect([*flags, "--global_batch_size", "2", "--learning_rate", "0.0025"]).rate_rule is None


@pytest.mark.parametrize("name", TASK.recipe_names())
def test_every_recipe_builds_the_detector_that_it_names(name, encoder):
    recipe = TASK.load_recipe(name)
    assert {"title", "source", "command", "hardware", "expected"} == recipe.about.keys()
    assert name in recipe.about["command"]
    run = parse_detect([str(encoder), "--recipe", name, "--use_cpu", "--global_batch_size", "2"])
    model = build_model(run, CLASSES)
    of_model = {field.name for field in fields(DetectorArguments)} - {"train_sizes", "test_size", "longest_side"}
    named = {key: value for key, value in recipe.values.items() if key in of_model | {"masks"}}
    assert named
    assert {key: getattr(model.config, key) for key in named} == named
    assert hasattr(model, "hidden") == (recipe.values["rcnn_variant"] == "dilated_c5")
    assert hasattr(model, "mask_predictor") == recipe.values.get("masks", False)


@pytest.mark.slow
def test_it_finds_what_it_has_learned_from_random_weights(encoder, tmp_path, script):
    boxes = draw_boxes(tmp_path / "boxes", train=64, test=24)
    folder = tmp_path / "detector"
    flags = ["--max_steps", "240", "--global_batch_size", "4", "--step_milestones", "200", "--logging_steps", "40"]
    script("detect").main([str(encoder), *TINY, "--dataset_name", str(boxes), "--output_dir", str(folder), *flags])
    assert (
        json.loads((folder / "metrics.json").read_text())["box"]["AP50"] > 40
    )  # 56 when this was written; a few steps have 5


@pytest.mark.slow
def test_two_processes_share_the_training_and_the_evaluation_and_end(encoder, tmp_path):
    boxes, folder = draw_boxes(tmp_path / "boxes", train=12, test=7), tmp_path / "detector"
    flags = ["--detector_norm", "sync", "--global_batch_size", "4", "--max_steps", "4", "--save_steps", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(ROOT / "configs/accelerate/two_cpus.yaml"), str(ROOT / "scripts/detect.py")]
    command += [str(encoder), *TINY, *flags, "--dataset_name", str(boxes), "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["n"] == 7
    assert metrics["ended"]
    model = MoCoForObjectDetection.from_pretrained(folder)
    assert all(x.isfinite().all() for x in model.state_dict().values())
