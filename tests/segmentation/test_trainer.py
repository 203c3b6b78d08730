"""Segmentation models are trained in steps, go on where they were stopped, and are measured as a pipeline would segment."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from masked_images import CLASSES, draw_splits, write_folder
from sklearn.metrics import jaccard_score
from tiny_trainer import StopAt
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import pipeline

from modeling_moco import MoCoConfig, MoCoImageProcessor, MoCoModel, MoCoSegmentationImageProcessor
from training.engine.run_folder import write_recipe
from training.segmentation.dataset.opening import load_segmentation
from training.segmentation.evaluate import evaluate
from training.segmentation.mean_iou import scores
from training.segmentation.run import TASK, build_model, build_trainer, load_segmenter, parse_segment

ROOT = Path(__file__).parents[2]
TINY = [
    *("--recipe", "masks_quickstart", "--crop_size", "49", "--global_batch_size", "3", "--use_cpu"),
    *("--disable_tqdm", "True", "--logging_steps", "1"),
]
PAPER = {  # arXiv:1911.05722, appendix A.5
    "voc_fcn16s_r50_30k": (513, 30_000, 0.003),
    "cityscapes_fcn16s_r50_90k": (769, 90_000, 0.01),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=16, batch_norm="plain")).save_pretrained(folder)
    MoCoImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("masks"))


def build(encoder, masks, folder, *flags):
    run = parse_segment([str(encoder), *TINY, "--dataset_name", str(masks), "--output_dir", str(folder), *flags])
    return build_trainer(run, load_segmentation(run.data))


def test_batch_norm_has_no_decay_and_the_rate_drops_at_the_milestones(encoder, masks, tmp_path):
    trainer = build(encoder, masks, tmp_path / "run", "--max_steps", "4", "--step_milestones", "1", "3")
    trainer.train()
    norms = {id(p) for m in trainer.model.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
    groups = trainer.optimizer.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {id(p): 0 if id(p) in norms else 1e-4 for p in trainer.model.parameters()}
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    full = trainer.args.learning_rate
    assert rates == pytest.approx([full, full / 10, full / 10, full / 100])


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(encoder, masks, tmp_path):
    flags = ["--max_steps", "5", "--save_steps", "1"]
    whole = build(encoder, masks, tmp_path / "whole", *flags)
    whole.train()
    first = build(encoder, masks, tmp_path / "parts", *flags)
    first.add_callback(StopAt(3))  # within the second epoch of two batches
    first.train()
    second = build(encoder, masks, tmp_path / "parts", *flags)
    second.train(resume_from_checkpoint=True)
    for name, x in whole.model.state_dict().items():
        assert torch.equal(x, second.model.state_dict()[name]), name
    losses = [[e["loss"] for e in one.state.log_history if "loss" in e] for one in (whole, second)]
    assert losses[0][3:] == losses[1][-2:]


def test_it_is_measured_in_the_precision_in_which_its_files_are_measured_again(encoder, masks, tmp_path, script):
    folder = tmp_path / "model"
    flags = ["--dataset_name", str(masks), "--output_dir", str(folder), "--max_steps", "6", "--bf16", "True"]
    script("segment").main([str(encoder), *TINY, *flags])
    script("segment").main([str(folder), "--eval_only", "--use_cpu"])
    values = [entry["value"] for entry in json.loads((folder / "results.json").read_text())]
    assert values[:2] == pytest.approx(values[2:], abs=1e-9)


@pytest.mark.slow
def test_the_script_leaves_a_model_that_a_pipeline_runs_with_its_results_and_measures_it_again(
    encoder, masks, tmp_path, script, capsys
):
    folder = tmp_path / "model"
    flags = ["--max_steps", "30", "--logging_steps", "10", "--learning_rate", "0.1"]
    command = [str(encoder), *TINY, "--dataset_name", str(masks), "--output_dir", str(folder), *flags]
    script("segment").main(command)
    shown = capsys.readouterr().out
    assert "Based on recipe masks_quickstart, changed: dataset_name" in shown
    results = json.loads((folder / "results.json").read_text())
    assert [(entry["metric"], entry["interval"], entry["n"]) for entry in results] == [
        ("mIoU", [], 4),
        ("pixel accuracy", [], 4),
    ]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["iou_per_class"]) <= set(CLASSES)
    assert {"segmentations.png", "iou_by_class.png"} <= {path.name for path in folder.iterdir()}
    segment = pipeline("image-segmentation", str(folder))
    numbers = {name: number for number, name in segment.model.config.id2label.items()}
    truth, predicted = [], []
    for number, (_, mask) in enumerate(draw_splits()["test"]):
        found = np.full(mask.shape, -1)
        for one in segment(str(masks / "test" / "images" / f"{number:02}.png")):
            found[np.asarray(one["mask"]) > 0] = numbers[one["label"]]
        truth.append(mask[mask != 255])
        predicted.append(found[mask != 255])
    per_class = jaccard_score(np.concatenate(truth), np.concatenate(predicted), labels=range(3), average=None)
    assert len(np.unique(np.concatenate(predicted))) > 1
    assert metrics["miou"] == pytest.approx(100 * per_class.mean(), abs=1e-9)
    script("segment").main(command)
    assert "nothing to do" in capsys.readouterr().out
    script("segment").main([str(folder), "--eval_only", "--use_cpu", "--dataloader_num_workers", "1"])
    measured = capsys.readouterr().out
    assert "30 steps of 3" in measured
    again = re.findall(r"mIoU +\| +([\d.]+) %", measured)
    assert again == re.findall(r"mIoU +\| +([\d.]+) %", shown) == [f"{metrics['miou']:.2f}"]


@pytest.mark.parametrize("name", TASK.recipe_names())
def test_every_recipe_builds_the_model_that_it_names(name, encoder):
    recipe = TASK.load_recipe(name)
    assert {"title", "source", "command", "hardware", "expected"} == recipe.about.keys()
    assert name in recipe.about["command"]
    run = parse_segment([str(encoder), "--recipe", name, "--use_cpu"])
    assert build_model(run, CLASSES).config.fcn_norm == recipe.values["fcn_norm"]
    if name in PAPER:
        crop, steps, rate = PAPER[name]
        assert run.model.crop_size == crop
        assert run.model.scales == [0.5, 2.0]
        args = run.training
        assert (args.max_steps, args.learning_rate, args.weight_decay) == (steps, rate, 1e-4)
        assert args.step_milestones == [steps * 7 // 10, steps * 9 // 10]
        assert args.global_batch_size == 16
        assert args.warmup_steps == 0
        assert run.model.fcn_norm == "sync"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--max_steps", "0"],
            "max_steps (0) must be at least 1: segmentation models are trained for a number of steps",
        ),
        (["--scales", "1"], "scales ([1.0]) must be the least and the greatest factor"),
        (["--scales", "2", "1"], "scales (2, 1) must be two factors above 0"),
        (["--crop_size", "0"], "crop (0) must be at least 1 pixel"),
        (["--recipe", "voc"], "recipe ('voc') is neither a file nor one of"),
        (["--global_batch_size", "7"], "the train split (6 images with masks) is smaller than the global batch (7)"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(flags, words, encoder, masks, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        build(encoder, masks, tmp_path / "run", *flags)
    assert "\n" not in str(error.value)


def test_a_folder_without_such_a_model_is_refused_in_one_line(encoder, masks, script, capsys):
    with pytest.raises(SystemExit):
        script("segment").main([str(encoder), "--eval_only", "--dataset_name", str(masks), "--use_cpu"])
    assert "is no segmentation model but an encoder" in capsys.readouterr().err


def test_the_class_names_of_a_training_are_for_its_own_dataset(encoder, masks, tmp_path):
    names, folder = ["earth", "a", "b"], tmp_path / "model"
    flags = ["--dataset_name", str(masks), "--output_dir", str(folder), "--class_names", *names]
    run = parse_segment([str(encoder), *TINY, *flags])
    model = build_model(run, names)
    model.save_pretrained(folder)
    MoCoSegmentationImageProcessor().save_pretrained(folder)
    write_recipe(folder, {"about": run.about} | run.settings)
    other = ["--dataset_name", str(write_folder(tmp_path / "other"))]
    for more, expected in (([], names), (other, None), ([*other, "--class_names", *names], names)):
        again = parse_segment([str(folder), "--eval_only", "--use_cpu", *more])
        load_segmenter(again)
        assert again.data.class_names == expected


@pytest.mark.slow
def test_it_segments_what_it_has_learned_from_random_weights(encoder, tmp_path, script):
    masks, folder = write_folder(tmp_path / "masks", draw_splits(train=40, test=12)), tmp_path / "model"
    flags = ["--max_steps", "120", "--global_batch_size", "4", "--step_milestones", "100", "--logging_steps", "40"]
    script("segment").main([str(encoder), *TINY, "--dataset_name", str(masks), "--output_dir", str(folder), *flags])
    assert json.loads((folder / "metrics.json").read_text())["miou"] > 50  # one class alone has about 20


@pytest.mark.slow
def test_two_processes_share_the_training_and_the_evaluation_and_end(encoder, tmp_path):
    masks, folder = write_folder(tmp_path / "masks", draw_splits(train=8, test=5)), tmp_path / "model"
    flags = ["--fcn_norm", "sync", "--global_batch_size", "4", "--max_steps", "4", "--save_steps", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(ROOT / "configs/accelerate/two_cpus.yaml"), str(ROOT / "scripts/segment.py")]
    command += [str(encoder), *TINY, *flags, "--dataset_name", str(masks), "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["n"] == 5
    assert metrics["ended"]
    alone = parse_segment([str(folder), "--eval_only", "--use_cpu"])
    model, processor = load_segmenter(alone)
    split = load_segmentation(alone.data, CLASSES, training=False).eval
    assert metrics["miou"] == pytest.approx(100 * scores(evaluate(model, split, processor), CLASSES).miou, abs=1e-9)
