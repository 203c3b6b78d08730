"""The main job from its command line: every recipe, the files it leaves, and what it refuses."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, pipeline

from modeling_moco import MoCoForImageClassification, MoCoModel
from training.commands.evaluations.linear_probe import print_table
from training.commands.pretrain import next_command
from training.data.decode import decode_image
from training.data.formats import load_digits
from training.data.images import MapImages, collate
from training.data.pipeline import build_render, training_images
from training.data.sources import ImageSplits, load_images
from training.engine.checkpoints import claim_output_dir
from training.engine.files import write_json
from training.engine.results import Result, append_results, encoder_digest, read_results
from training.evaluation.finetune import FinetuneArguments
from training.evaluation.knn import by_newest_k, evaluate_knn
from training.evaluation.linear_probe import parse_linear_probe
from training.evaluation.probe_arguments import LinearProbeArguments
from training.pretrain import announce, build_trainer, drawn_images, finish, monitored, saved_step
from training.recipe import RECIPES, load_recipe, parse_pretrain, recipe_names
from training.reports.compare import read_measured
from training.views.device import sample_operations, unpack_params
from training.views.opencv import crop_and_resize
from training.views.policy import VIEWS, build_policies

ROOT = Path(__file__).parents[1]
TINY = [
    *("--dataset_name", "digits", "--max_train_samples", "64", "--max_eval_samples", "16", "--image_size", "32"),
    *("--eval_resize", "32", "--queue_size", "64", "--global_batch_size", "16", "--knn_k", "5", "--use_cpu"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False", "--disable_tqdm", "True"),
]


KNN = ("eval_knn_top1", "eval_knn_top1_k5")
# One for each kind of step.
UNLIKE = ("quickstart", "cifar10_small", "photos_small")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in UNLIKE)) for name in recipe_names()],
)
def test_every_recipe_trains_two_steps(name, tmp_path):
    flags = [
        "--max_steps",
        "2",
        "--output_dir",
        str(tmp_path / "run"),
        "--warmup_epochs",
        "0",
    ]  # which begins at rate 0
    # With them, two steps move the layers before them by less than a number can show.
    flags += ["--zero_init_residual", "False"]
    if "_vit_" in name:
        flags += ["--model_args", json.dumps({"img_size": 32, **(load_recipe(name).value("model_args") or {})})]
    args = parse_pretrain(["--recipe", name, *TINY, *flags])
    args.training.save_strategy = "no"
    trainer = build_trainer(args, load_images(args.data))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.state.global_step == 2
    for n, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter).all(), n
            assert not torch.equal(parameter, before[n]), n
    keys = 2 * 16 * (2 if args.config.symmetric_loss else 1)
    if args.config.dictionary == "queue":
        assert trainer.model.dictionary.queue_ptr.item() == keys % 64


def launch(*flags: str, config: str = "one_gpu") -> subprocess.CompletedProcess:
    """`accelerate launch --quiet --config_file configs/accelerate/... scripts/pretrain.py --use_cpu`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(ROOT / f"configs/accelerate/{config}.yaml"), str(ROOT / "scripts/pretrain.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *flags, "--use_cpu"], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The default command, shortened, through the launcher, as a user types it."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    short = ["--num_train_epochs", "1", "--queue_size", "256", "--dataloader_num_workers", "0"]
    short += ["--output_dir", str(folder)]
    result = launch(*short)
    assert result.returncode == 0, result.stderr
    return folder, short, result


@pytest.mark.slow
@pytest.mark.parametrize("view_backend", ["cv2", "device"])
@pytest.mark.parametrize(
    "size", [32, 80], ids=["small", "large"]
)  # of the files: those of up to 64 px are kept in memory
def test_views_can_be_made_by_every_backend(script, tmp_path, view_backend, size):
    for part, count in (("train", 24), ("test", 8)):
        for i in range(count):
            path = tmp_path / "images" / part / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((size, size), 50 + 20 * (i % 2)).convert("RGB").save(path)
    flags = ["--recipe", "quickstart", "--dataset_name", str(tmp_path / "images"), "--queue_size", "32", "--use_cpu"]
    flags += ["--global_batch_size", "8", "--num_train_epochs", "2", "--eval_every_n_epochs", "1", "--knn_k", "3"]
    flags += ["--dataloader_num_workers", "0", "--disable_tqdm", "True", "--view_backend", view_backend]
    script("pretrain").main([*flags, "--output_dir", str(tmp_path / "run")])
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    assert any("eval_contrast_top1_shuffled" in entry for entry in state["log_history"])
    assert 0 <= json.loads((tmp_path / "run" / "metrics.json").read_text())["waiting_for_data"] <= 100
    script("pretrain").main([*flags, "--preview_views", str(tmp_path / "views.png")])
    with Image.open(tmp_path / "views.png") as image:
        assert min(image.size) > 300


@pytest.mark.slow
def test_two_processes_train_one_model_with_shuffling_batch_norm(tmp_path):
    folder, recipe = tmp_path / "run", tmp_path / "mine.yaml"
    sections = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    recipe.write_text(yaml.safe_dump(sections | {"model": sections["model"] | {"batch_norm": "shuffle"}}))
    flags = ["--recipe", str(recipe), "--queue_size", "256", "--max_steps", "3", "--max_train_samples", "512"]
    result = launch(*flags, "--dataloader_num_workers", "0", "--output_dir", str(folder), config="two_cpus")
    assert result.returncode == 0, result.stderr
    assert "global batch 128 (2 x 64 x 1 accumulated)" in result.stdout
    assert (
        "BatchNorm normalises the 64 images of each process by themselves; the recipe has groups of 16, a global batch of 128 "
        "on 8 processes. Launch as many, or pass --global_batch_size 32" in result.stdout
    )
    assert result.stdout.count("kNN after") == 1
    model = MoCoModel.from_pretrained(folder)
    assert model.dictionary.queue_ptr.item() == 3 * 128 % 256
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 3


def test_without_arguments_the_quickstart_runs_and_says_so(quickstart):
    _, _, result = quickstart
    assert "running 'quickstart'" in result.stdout
    assert "--dataset_name FOLDER" in result.stdout
    for shown in ("loss ", "contrast ", "kNN ", "images/s "):
        assert re.search(rf"^step 11 of 11, epoch 1: .*{shown}", result.stdout, re.M)
    assert "\r" not in result.stderr  # no bar in a log


def test_a_run_leaves_checkpoint_model_numbers_and_figures(quickstart):
    folder, _, _ = quickstart
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-11"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 11
    assert metrics["skipped_images"] == 0
    assert metrics["knn_top1_before"] > 50
    assert metrics["knn_top1_after"] != metrics["knn_top1_before"]
    assert metrics["images_per_second"] > 0
    assert 0.1 < metrics["peak_memory"] < 10  # GB
    for figure in ("training_curves.png", "neighbours.png", "tsne.png"):
        with Image.open(folder / figure) as image:
            assert min(image.size) > 300
    model, report = MoCoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert model.dictionary.queue_ptr.item() == 11 * 128 % 256


def test_a_run_that_has_ended_says_so_and_is_not_touched_and_another_is_refused(quickstart, script, capsys):
    folder, short, _ = quickstart
    weights = (folder / "model.safetensors").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    script("pretrain").main([*short, "--use_cpu", "--disable_tqdm", "True", "--logging_steps", "7"])
    (line,) = capsys.readouterr().out.splitlines()
    date = json.loads((folder / "metrics.json").read_text())["ended"]
    assert line.startswith(f"{folder} holds this run, which ended at {date}: nothing to do.")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(SystemExit):
        script("pretrain").main([*short, "--use_cpu", "--temperature", "0.3"])
    assert "temperature is" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_run_that_was_stopped_before_its_report_continues_and_ends(quickstart, script, tmp_path, capsys):
    folder, short, _ = quickstart
    run = tmp_path / "run"
    shutil.copytree(folder, run, ignore=shutil.ignore_patterns("metrics.json", "report.html", "*.png"))
    script("pretrain").main([*short, "--use_cpu", "--disable_tqdm", "True", "--output_dir", str(run)])
    assert f"from {run}/checkpoint-11" in capsys.readouterr().out
    assert (run / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    metrics = json.loads((run / "metrics.json").read_text())
    assert "ended" in metrics
    assert metrics["knn_top1_after"] == pytest.approx(
        json.loads((folder / "metrics.json").read_text())["knn_top1_after"]
    )
    assert (run / "report.html").is_file()


def test_a_continued_run_may_count_other_neighbours_and_says_which_are_whose(script, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = [*TINY, "--num_train_epochs", "2", "--eval_every_n_epochs", "1", "--output_dir", str(folder)]
    script("pretrain").main([*flags, "--save_strategy", "epoch"])
    before = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    shutil.rmtree(folder / "checkpoint-8")
    (folder / "metrics.json").unlink()
    flags[flags.index("--knn_k") + 1 : flags.index("--knn_k") + 2] = ["3", "5"]
    script("pretrain").main([*flags, "--save_strategy", "epoch"])
    assert f"from {folder}/checkpoint-4" in capsys.readouterr().out
    after = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    measured = [entry for entry in after if "eval_knn_top1" in entry]
    assert [(entry["step"], entry["eval_knn_k"]) for entry in measured] == [(0, 5), (4, 5), (8, 3)]
    curves = {name: [entry[name] for entry in by_newest_k(after) if name in entry] for name in KNN}
    assert curves["eval_knn_top1_k5"] == [entry["eval_knn_top1"] for entry in before if "eval_knn_top1" in entry]
    assert curves["eval_knn_top1"] == [measured[-1]["eval_knn_top1"]]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["knn"]["protocol"] == "weighted kNN, k 3, T 0.07"
    assert metrics["knn_top1_after"] == measured[-1]["eval_knn_top1"]
    assert "knn_top1_before" not in metrics  # of another number
    values = {entry["protocol"]: entry["value"] for entry in read_results(folder)[-2:]}
    assert values == {
        "weighted kNN, k 3, T 0.07": measured[-1]["eval_knn_top1"],
        "weighted kNN, k 5, T 0.07": measured[-1]["eval_knn_top1_k5"],
    }
    assert read_measured(folder, parse_pretrain([]).defaults).monitor["knn_k"] == 3


@pytest.mark.slow
def test_the_pipeline_loads_the_probe_and_reaches_its_accuracy(quickstart, script, capsys):
    folder, _, _ = quickstart
    script("linear_probe").main([str(folder), "--num_train_epochs", "1", "--use_cpu", "--disable_tqdm", "True"])
    out = capsys.readouterr().out
    assert "linear probe, official |" in out
    assert "kNN before training" in out
    assert "95 % of last" in out
    probe = folder / "linear_probe"
    (result,) = json.loads((probe / "metrics.json").read_text())["probes"]
    assert (result["name"], result["n"]) == ("official", 360)
    assert read_results(folder)[-3]["model"] == encoder_digest(MoCoModel.from_pretrained(folder))
    pretrained = MoCoModel.from_pretrained(folder).encoder_q.state_dict()
    for name, tensor in MoCoForImageClassification.from_pretrained(probe).moco.encoder_q.state_dict().items():
        assert torch.equal(tensor, pretrained[name]), name
    classify = pipeline("image-classification", model=str(probe))
    hits = [classify(row["image"].convert("RGB"))[0]["label"] == str(row["label"]) for row in load_digits()["test"]]
    assert 100 * np.mean(hits) == pytest.approx(result["top1"], abs=0.5)


@pytest.mark.slow
def test_the_cached_probe_shares_the_features_of_knn(quickstart, script, capsys):
    folder, _, _ = quickstart
    script("knn").main([str(folder), "--use_cpu"])
    features = sorted((folder / "features").iterdir())
    script("linear_probe").main([str(folder), "--mode", "cached", "--learning_rates", "0.3", "1", "--use_cpu"])
    assert sorted((folder / "features").iterdir()) == features
    out = capsys.readouterr().out
    for shown in (
        "linear probe, cached SGD ",
        "linear probe, cached L-BFGS |",
        "kNN after",
        "chosen: learning rate",
        "chosen: C",
    ):
        assert shown in out
    probe = folder / "linear_probe_cached"
    names = [entry["name"] for entry in json.loads((probe / "metrics.json").read_text())["probes"]]
    assert names == ["cached SGD", "cached L-BFGS"]
    assert {path.name for path in probe.glob("*.png")} == {"confusion_sgd.png", "confusion_lbfgs.png"}
    assert "L-BFGS" in read_results(folder)[-1]["protocol"]


def test_knn_of_a_saved_run_is_the_monitors_and_travels(quickstart, script, capsys):
    folder, _, _ = quickstart
    script("knn").main([str(folder), "--knn_k", "200", "5", "--use_cpu"])
    out = capsys.readouterr().out
    assert "backbone feature" in out
    assert "weighted kNN, k 5, T 0.07" in out
    monitored = json.loads((folder / "metrics.json").read_text())["knn_top1_after"]
    of_monitor, *others = (e for e in read_results(folder) if e["protocol"] == "weighted kNN, k 200, T 0.07")
    assert of_monitor["value"] == pytest.approx(monitored)
    assert of_monitor["data"]["dataset"] == "digits"
    assert of_monitor["model"] == encoder_digest(MoCoModel.from_pretrained(folder))
    of_script = read_results(folder)[-1]
    assert of_script["protocol"] == "weighted kNN, k 5, T 0.07"
    assert of_script["model"] == of_monitor["model"]
    assert all(entry["value"] == pytest.approx(monitored) for entry in others)
    with pytest.raises(SystemExit):
        script("knn").main([str(folder), "--knn_k", "2000", "--use_cpu"])
    assert "k (2000) is larger than the train split (1437 images)" in capsys.readouterr().err


@pytest.mark.slow
def test_knn_of_the_heads_output_needs_the_head(quickstart, tmp_path, script, capsys):
    folder, _, _ = quickstart
    MoCoModel.from_pretrained(folder, momentum_encoder=False).save_pretrained(tmp_path / "encoder")
    flags = ["--use_cpu", "--dataset_name", "digits", "--image_size", "32", "--eval_resize", "32"]
    script("knn").main([str(folder), "--knn_features", "head", "--use_cpu"])
    assert "| head" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script("knn").main([str(tmp_path / "encoder"), "--knn_features", "head", *flags])
    assert "a model without projector_q" in capsys.readouterr().err
    script("knn").main([str(tmp_path / "encoder"), *flags])


def test_a_random_encoder_is_probed_into_a_folder_of_its_own(quickstart, script, capsys):
    folder, _, _ = quickstart
    flags = ["--num_train_epochs", "1", "--max_train_samples", "256", "--use_cpu", "--disable_tqdm", "True"]
    script("linear_probe").main([str(folder), "--random_encoder", *flags])
    assert "random encoder" in capsys.readouterr().out
    saved = MoCoForImageClassification.from_pretrained(folder / "random_encoder" / "linear_probe")
    trained = MoCoModel.from_pretrained(folder)
    assert not torch.equal(saved.moco.encoder_q.conv1[0].weight, trained.encoder_q.conv1[0].weight)


@pytest.mark.parametrize("policy", ["v1", "v2"])
def test_the_preview_shows_the_views_of_epoch_0(policy, tmp_path):
    args = parse_pretrain([*TINY, "--augmentation", policy, "--seed", "7", "--output_dir", str(tmp_path / "run")])
    splits = load_images(args.data)
    drawn = list(drawn_images(args, splits))
    assert len(drawn) == 8
    images = build_trainer(args, splits).train_dataset
    for i, (image, _, views) in enumerate(drawn):
        trained = images[8 * i]
        assert torch.equal(views[0], trained["pixel_values"])
        assert torch.equal(views[1], trained["key_pixel_values"])
        assert np.array_equal(np.array(image), np.array(decode_image(splits.train[8 * i]["image"])))
    images.set_epoch(1)
    assert not torch.equal(drawn[0].views[0], images[0]["pixel_values"])


def test_the_preview_of_a_stream_shows_the_views_of_its_images(tmp_path):
    args = parse_pretrain([*TINY, "--streaming", "--output_dir", str(tmp_path / "run")])
    splits = load_images(args.data)
    trained = {sample["pixel_values"].numpy().tobytes() for sample in build_trainer(args, splits).train_dataset}
    drawn = list(islice(drawn_images(args, splits), 8))
    assert len({example.views[0].numpy().tobytes() for example in drawn} & trained) == 8


def test_the_preview_of_device_views_shows_the_draws_of_their_crops(tmp_path):
    # A stream, for it is not kept in memory however small its images are.
    args = parse_pretrain([*TINY, "--streaming", "--view_backend", "device", "--output_dir", str(tmp_path / "run")])
    splits = load_images(args.data)
    samples, data = build_trainer(args, splits).train_dataset, args.data
    policy, _ = build_policies(data.augmentation, data.horizontal_flip, data.crop_min_scale)
    trained = {sample["pixel_values"].numpy().tobytes(): sample["numbers"] for sample in samples}
    for example in islice(drawn_images(args, splits), 8):
        query, key = example.params
        image = torch.from_numpy(np.array(example.image)).permute(2, 0, 1)
        crop = crop_and_resize(image, query.box, data.image_size).permute(1, 2, 0)
        rows = sample_operations(trained[crop.numpy().tobytes()], policy)
        for params, row in zip((query, key), rows, strict=True):
            assert unpack_params(torch.tensor(params.box), row) == params


@pytest.mark.parametrize("backend", ["cv2", "device"])
@pytest.mark.parametrize("dictionary", ["queue", "bank"])
def test_the_preview_shows_unequal_views_and_the_one_view_of_a_bank(dictionary, backend, tmp_path):
    args = parse_pretrain(
        [*TINY, "--augmentation", "v3", "--view_backend", backend, "--output_dir", str(tmp_path / "run")]
    )
    args.config.dictionary, data = dictionary, args.data
    splits, bank = load_images(data), dictionary == "bank"
    images = training_images(data, splits, args.training, bank)
    in_memory = backend == "device"
    rows = images.with_pixels(images.batch([0, 8], 0)) if in_memory else collate([images[0], images[8]])
    render = build_render(data, compiled=False, bank=bank) or dict
    trained = render(rows)
    drawn = list(islice(drawn_images(args, splits), 2))
    for i, example in enumerate(drawn):
        assert len(example.views) == len(example.params) == (1 if bank else 2)
        assert example.params[0].blur > 0
        for name, view in zip(VIEWS, example.views, strict=False):
            assert (view.float() - trained[name][i].float()).abs().mean() < 3
    assert ("index" in trained) == bank


def test_a_preview_writes_two_figures_and_nothing_else(tmp_path, script, capsys):
    path = tmp_path / "views.png"
    path.write_text("an older figure")
    script("pretrain").main([*TINY, "--output_dir", str(tmp_path / "run"), "--preview_views", str(path)])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["views.png", "views.svg"]
    with Image.open(path) as image:
        assert image.width == 1600
    assert "epoch 0" in capsys.readouterr().out


def test_broken_images_are_left_out_of_the_preview(tmp_path):
    folder = tmp_path / "images" / "train" / "a"
    folder.mkdir(parents=True)
    for i in range(16):
        image = Image.new("RGB", (40, 40), (i, i, i))
        image.paste("white", (20, 20, 40, 40))
        image.save(folder / f"{i:02}.png")
    (folder / "02.png").write_bytes(b"not a picture")
    flags = ["--dataset_name", str(tmp_path / "images"), "--output_dir", str(tmp_path / "run")]
    args = parse_pretrain([*TINY, *flags])
    drawn = list(drawn_images(args, load_images(args.data)))
    assert [example.image.getpixel((0, 0))[0] for example in drawn] == [0, 4, 6, 8, 10, 12, 14]


REFUSED = {
    "preview of another kind": (["--preview_views", "views.jpg"], "must end in .png or .svg"),
    "preview without a folder": (["--preview_views", "/no/such/views.png"], "/no/such, which is no folder"),
    "preview in place of a folder": (["--preview_views", str(ROOT / "tests")], "needs the name of the folder"),
    "missing dataset": (["--dataset_name", "/no/such/folder"], "/no/such/folder"),
    "missing column": (["--image_column", "picture"], "image_column ('picture')"),
    "unknown recipe": (["--recipe", "quikstart"], "did you mean 'quickstart'"),
    "unknown flag": (["--quue_size", "64"], "did you mean '--queue_size'"),
    "unknown backbone": (["--architecture", "resnet51"], "architecture ('resnet51')"),
    "queue below the batch": (["--queue_size", "8"], "queue_size (8) is smaller than the keys of a global batch (16)"),
    "dataset below a batch": (["--max_train_samples", "10"], "the dataset (10 images) is smaller"),
    "image size": (["--architecture", "vit_tiny_patch16_224"], "image_size (32) is refused by vit_tiny_patch16_224"),
    "one value to normalise": (
        ["--stem", "default", "--batch_norm", "split", "--batch_norm_splits", "16"],
        "BatchNorm would have 1 value of a channel at once (1 image, whose last map has 1 pixel at 32 px): raise",
    ),
    "neighbours above the bank": (["--knn_k", "65"], "knn_k (65) is larger"),
    "no bank": (["--knn_bank_size", "-5"], "knn_bank_size (-5) must be at least 1 image"),
    "output below a file": (["--output_dir", __file__ + "/run"], "cannot be written"),
    "one checkpoint": (["--save_total_limit", "1"], "save_total_limit (1) must be at least 2"),
    "not a number": (["--learning_rate", "fast"], "invalid float value: 'fast'"),
    "not a choice": (["--augmentation", "v9"], "augmentation ('v9') is unknown: choose one of v1, v2"),
    "bad value": (["--temperature", "0"], "temperature (0.0) must be above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_before_training(case, tmp_path, script, capsys):
    flags, message = REFUSED[case]
    with pytest.raises(SystemExit) as end:
        script("pretrain").main([*TINY, "--output_dir", str(tmp_path / "run"), *flags])
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


WARNED = {
    "rate": (["--batch_norm", "plain"], "for 16 the linear rule gives 0.0075"),
    "leak": (["--batch_norm", "shuffle", "--learning_rate", "0.1"], "nobody to shuffle with"),
    "small groups": (
        ["--batch_norm", "split", "--batch_norm_splits", "16", "--image_size", "64", "--eval_resize", "64"],
        "BatchNorm sees 1 image at once",
    ),
    "queue": (
        ["--queue_size", "128", "--symmetric_loss", "True"],
        "the queue (128) is larger than the dataset (64 images)",
    ),
}


@pytest.mark.parametrize(("flags", "said"), [([], 1), (["--include_pictures"], 0), (["--streaming"], 0)])
def test_it_is_said_at_the_start_which_pictures_a_tracker_elsewhere_does_not_get(flags, said, tmp_path, capsys):
    for i, row in enumerate(load_digits()["train"].select(range(16))):
        path = tmp_path / "mine" / "train" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    elsewhere = ["--report_to", "trackio", "--trackio_space_id", "org/space", "--eval_strategy", "no", *flags]
    folders = ["--dataset_name", str(tmp_path / "mine"), "--output_dir", str(tmp_path / "run")]
    args = parse_pretrain([*TINY, *folders, *elsewhere])
    announce(args, build_trainer(args, load_images(args.data)))
    assert (
        capsys.readouterr().out.count("neighbours.png shows images of a local dataset and is not sent to trackio")
        == said
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--lr_milestones", "1", "120", "--num_train_epochs", "3"],
            "lr_milestones (120) come after the last of 3 epochs",
        ),
        (["--batch_norm_splits", "4"], "batch_norm_splits (4) has no effect with batch_norm 'plain'"),
        (["--bank_momentum", "0.9"], "bank_momentum (0.9) has no effect with dictionary 'queue'"),
        (["--dictionary", "batch", "--queue_size", "8"], "queue_size (8) has no effect with dictionary 'batch'"),
        (
            ["--dictionary", "batch", "--key_encoder", "shared", "--key_momentum", "0.9"],
            "key_momentum (0.9) has no effect with key_encoder 'shared'",
        ),
        (
            ["--projection_head", "linear", "--projection_hidden_dim", "8"],
            "projection_hidden_dim (8) has no effect with projection_head 'linear'",
        ),
    ],
)
def test_a_setting_that_has_no_effect_is_named_where_the_command_line_gave_it(flags, said, tmp_path, capsys):
    args = parse_pretrain([*TINY, *flags, "--output_dir", str(tmp_path / "run")])
    announce(args, build_trainer(args, load_images(args.data)))
    assert f"warning: {said}" in capsys.readouterr().out
    args = parse_pretrain([*TINY, "--batch_norm", "split", "--batch_norm_splits", "4"])
    announce(args, build_trainer(args, load_images(args.data)))
    assert "has no effect" not in capsys.readouterr().out


@pytest.mark.parametrize("case", WARNED)
def test_what_decides_the_result_is_said_at_the_start(case, tmp_path, capsys):
    flags, warning = WARNED[case]
    args = parse_pretrain([*TINY, *flags, "--output_dir", str(tmp_path / "run")])
    announce(args, build_trainer(args, load_images(args.data)))
    out = capsys.readouterr().out
    assert out.count(warning) == 1
    assert "global batch 16 (1 x 16 x 1 accumulated)" in out
    losses = 2 if args.config.symmetric_loss else 1
    assert f"log(1+K) = {losses * math.log(1 + args.config.queue_size):.2f}" in out
    if case != "rate":
        assert ("linear rule" in out) == ("--learning_rate" not in flags)


@pytest.mark.parametrize(("variable", "value"), [("WORLD_SIZE", "2"), ("MASTER_PORT", "29500")])
def test_a_launcher_that_started_fewer_processes_is_noticed(variable, value, script, tmp_path, monkeypatch, capsys):
    # What `accelerate launch` sets with --multi_gpu on a machine without GPUs, and with --cpu --num_processes 2.
    monkeypatch.setenv(variable, value)
    flags = [flag for flag in TINY if flag != "--use_cpu"]
    with pytest.raises(SystemExit) as end:
        script("pretrain").main([*flags, "--output_dir", str(tmp_path / "run")])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "processes, but this is one of 1: on GPUs pass --multi_gpu" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [("one_gpu", 1, 1), ("eight_gpus", 1, 8), ("two_nodes", 2, 16), ("two_cpus", 1, 2)],
)
def test_launcher_configs_are_what_their_names_say(name, machines, processes):
    config = load_config_from_file(str(ROOT / f"configs/accelerate/{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert (config.distributed_type == "MULTI_GPU") == (processes > 1)


def next_line(out: str) -> list[str]:
    """The words of the last proposed command."""
    return shlex.split(re.findall(r"^Next: (.*)$", out, re.M)[-1])


def test_the_next_command_is_quoted_and_free_of_what_is_taken(script, tmp_path, capsys):
    folder = tmp_path / "my run's"
    folder.mkdir()
    splits = ImageSplits(None, None, ["a", "b"])
    assert shlex.split(next_command(str(folder), splits)) == ["python", "scripts/linear_probe.py", str(folder)]
    (folder / "linear_probe").mkdir()
    words = shlex.split(next_command(str(folder), splits))
    assert words[3:] == ["--output_dir", f"{folder}/linear_probe_2"]


@pytest.mark.slow
def test_a_run_without_labels_is_not_told_to_probe_them(script, tmp_path, capsys):
    for i in range(20):
        path = tmp_path / "images" / "train" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50).convert("RGB").save(path)
    folder = tmp_path / "my run"
    flags = ["--dataset_name", str(tmp_path / "images"), "--max_steps", "1", "--output_dir", str(folder)]
    script("pretrain").main([*TINY, "--max_train_samples", "20", *flags])
    out = capsys.readouterr().out
    assert "kNN after" not in out  # there was none to measure
    assert "knn_top1_before" not in json.loads((folder / "metrics.json").read_text())
    *command, source, name, dry = next_line(out)
    assert (command, source) == (["python", "scripts/push_to_hub.py"], str(folder))
    script("push_to_hub").main([source, name, dry])  # it runs as it is printed
    assert "Nothing was uploaded" in capsys.readouterr().out


def test_the_table_of_a_probe_has_a_knn_that_was_measured_later(tmp_path, capsys):
    write_json(tmp_path / "metrics.json", {"loss": 1.0})
    digits, top1 = {"dataset": "digits", "split": "test", "train_images": 1437}, {"linear probe, official": 50.0}
    print_table(tmp_path, "digest", digits, top1)
    assert "kNN" not in capsys.readouterr().out
    knn = [Result("weighted kNN, k 5, T 0.07", "top1", 61.25, 16)]
    append_results(tmp_path, knn, model="digest", data=digits)
    append_results(tmp_path, [replace(knn[0], value=9.0)], model="of other weights", data=digits)
    for other in ({"dataset": "birds"}, {"split": "train"}, {"train_images": 500}):
        append_results(tmp_path, [replace(knn[0], value=9.0)], model="digest", data=digits | other)
    print_table(tmp_path, "digest", digits, top1)
    assert re.search(r"^kNN after +\|  61\.2 %  weighted kNN, k 5, T 0\.07$", capsys.readouterr().out, re.M)


def test_the_table_of_a_probe_has_the_same_knn_before_and_after_and_none_of_other_weights_or_images(tmp_path, capsys):
    digits = {"dataset": "digits", "split": "test", "train_images": 1437}
    by_monitor = Result("weighted kNN, k 200, T 0.07", "top1", 94.25, 360, settings={"bank": 1437})
    metrics = {"knn_top1_before": 69.25, "knn_top1_after": 94.25, "knn": monitored(by_monitor), "data": digits}
    write_json(tmp_path / "metrics.json", metrics)
    # Other measurements of the same value, by chance.
    others = [{"protocol": "weighted kNN, k 1, T 0.07"}, {"feature": "head"}, {"settings": {"bank": 500}}]
    alike = [replace(by_monitor, **other) for other in others]
    append_results(tmp_path, [*alike, by_monitor], model="digest", data=digits)
    later = replace(by_monitor, protocol="weighted kNN, k 1, T 0.07", value=12.5)
    append_results(tmp_path, [later], model="digest", data=digits)
    append_results(tmp_path, [later], model="digest", data=digits | {"dataset": "birds"})
    print_table(tmp_path, "digest", digits, {"linear probe, official": 50.0})
    before, after, probe = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"kNN before training +\|  69\.2 %  weighted kNN, k 200, T 0\.07", before)
    assert re.fullmatch(r"kNN after +\|  94\.2 %  weighted kNN, k 200, T 0\.07", after)
    write_json(tmp_path / "metrics.json", metrics | {"knn": monitored(replace(by_monitor, settings={"bank": 9}))})
    print_table(tmp_path, "digest", digits, {})  # the monitor's is not there
    assert capsys.readouterr().out == "kNN after |  12.5 %  weighted kNN, k 1, T 0.07\n"
    for digest, data in (("of other weights", digits), ("digest", digits | {"label_column": "parity"})):
        print_table(tmp_path, digest, data, {"linear probe, official": 50.0})
        assert capsys.readouterr().out == f"{probe.split('|')[0].strip()} |  50.0 %\n"


def test_an_unknown_recipe_key_is_refused_with_the_nearest(tmp_path, script, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model:\n  queue_sise: 64\n")
    with pytest.raises(SystemExit):
        script("pretrain").main(["--recipe", str(recipe), *TINY])
    assert "'queue_sise'" in (err := capsys.readouterr().err)
    assert "did you mean 'queue_size'?" in err


def test_a_folder_with_other_files_is_left_alone(tmp_path, script, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit):
        script("pretrain").main([*TINY, "--output_dir", str(tmp_path)])
    assert "holds files of something else" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_probe_suggests_the_flag_that_was_meant(script, capsys):
    with pytest.raises(SystemExit):
        script("linear_probe").main(["runs/x", "--learning_rat", "1"])
    assert "did you mean '--learning_rate'" in capsys.readouterr().err


def test_a_probe_of_a_folder_without_a_model_is_refused(tmp_path, script, capsys):
    for argv in ([str(tmp_path), "--dataset_name", "digits"], []):
        with pytest.raises(SystemExit):
            script("linear_probe").main(argv)
        assert "pass the folder that a run saved to" in capsys.readouterr().err


@pytest.mark.slow
def test_the_launcher_shows_one_line_for_bad_input():
    result = launch("--recipe", "x")
    assert result.returncode != 0
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: recipe ('x')")


def test_a_probe_takes_its_data_from_the_run_even_of_a_checkpoint(quickstart, tmp_path):
    folder, _, _ = quickstart
    for model in (folder, folder / "checkpoint-11"):
        run = parse_linear_probe(["--num_train_epochs", "3", str(model)])
        assert (run.data.dataset_name, run.data.image_size, run.training.learning_rate) == ("digits", 32, 1.0)
        assert Path(run.training.output_dir) == model / "linear_probe"
    with pytest.raises(ValueError, match="holds no MoCo model"):
        parse_linear_probe([str(tmp_path)])


def test_a_probe_of_another_model_is_refused(tmp_path, script, capsys):
    ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        script("linear_probe").main([str(tmp_path), "--dataset_name", "digits", "--image_size", "32"])
    assert "holds no MoCo model (model_type resnet in config.json)" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["pil", pytest.param("device", marks=pytest.mark.slow)])
def test_a_broken_file_is_named_once_skipped_and_counted_whatever_looks_at_it(backend, tmp_path, script, caplog):
    folder = tmp_path / "images"
    for split, count in (("train", 10), ("test", 4)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                gradient = Image.linear_gradient("L").rotate(9 * i + 90 * (name == "b"))
                gradient.resize((40, 40)).save(folder / split / name / f"{i}.png")
    broken = [folder / "test" / "a" / "1.png", folder / "train" / "b" / "7.png"]
    for path in broken:
        path.write_bytes(b"not a picture")
    # Training, the bank and the queries of the monitor, before and after, and three figures look at them.
    flags = ["--dataset_name", str(folder), "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    flags += ["--view_backend", backend, "--knn_k", "3", "--max_train_samples", "20", "--max_eval_samples", "8"]
    script("pretrain").main([*TINY, *flags])
    named = [record.getMessage() for record in caplog.records if record.name == "training.data.decode"]
    assert sorted(message.split(": ")[1].split(" (")[0] for message in named) == list(map(str, broken))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["skipped_images"] == 2
    assert (tmp_path / "run" / "unreadable_images.txt").read_text() == "".join(f"{path}\n" for path in broken)


# Which weights, which images, which recipe


@pytest.mark.slow
@pytest.mark.parametrize("best_is_highest", [True, False])
def test_the_recorded_knn_is_that_of_the_saved_weights_whichever_epoch_they_are_of(best_is_highest, tmp_path):
    folder = tmp_path / "run"
    args = parse_pretrain([*TINY, "--num_train_epochs", "3", "--eval_every_n_epochs", "1", "--output_dir", str(folder)])
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": "eval_rankme"}
    for name, value in (chosen | {"greater_is_better": best_is_highest, "eval_on_start": True}).items():
        setattr(args.training, name, value)
    splits = load_images(args.data)
    trainer = build_trainer(args, splits)
    claim_output_dir(args.training, trainer.batch_layout, args.settings, args.defaults, args.about, splits.place)
    trainer.train()
    metrics = finish(args, trainer, splits)
    measured = [entry for entry in trainer.state.log_history if "eval_rankme" in entry and entry["step"] > 0]
    best = (max if best_is_highest else min)(measured, key=lambda entry: entry["eval_rankme"])
    assert saved_step(trainer) == metrics["steps"] == best["step"]
    saved = MoCoModel.from_pretrained(folder).eval()
    bank, queries = (MapImages(split, args.data.evaluation_view()) for split in (splits.train, splits.eval))
    (anew,) = evaluate_knn(saved, bank, queries, args.training.knn)
    (result,) = read_results(folder)
    assert result["value"] == anew.value == best["eval_knn_top1"] == metrics["knn_top1_after"]
    assert result["model"] == encoder_digest(saved)
    assert result["protocol"] == f"{anew.protocol}, best epoch on the evaluated images"
    assert result["settings"] == {"bank": 64, "step": best["step"]}
    assert metrics["knn_top1_before"] == trainer.state.log_history[0]["eval_knn_top1"]


def test_no_epoch_is_chosen_by_the_images_that_an_evaluation_reports_on(tmp_path):
    for kind in (LinearProbeArguments, FinetuneArguments):
        with pytest.raises(ValueError, match="would choose the epoch by the images that are reported on") as refused:
            kind(output_dir=str(tmp_path), load_best_model_at_end=True, save_strategy="epoch")
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.slow
def test_what_was_not_measured_before_training_is_no_number_of_it(tmp_path):
    args = parse_pretrain(
        [*TINY, "--num_train_epochs", "1", "--eval_every_n_epochs", "1", "--output_dir", str(tmp_path)]
    )
    splits = load_images(args.data)
    trainer = build_trainer(args, splits)
    claim_output_dir(args.training, trainer.batch_layout, args.settings, args.defaults, args.about, splits.place)
    trainer.train()
    metrics = finish(args, trainer, splits)
    assert "knn_top1_before" not in metrics
    assert metrics["knn_top1_after"] == read_results(tmp_path)[0]["value"]
