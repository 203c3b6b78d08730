"""The main job from its command line: every recipe, the files it leaves, and what evaluations make of them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from short_runs import TINY, launch
from transformers import pipeline

from modeling_moco import MoCoForImageClassification, MoCoModel
from training.data.formats import load_digits
from training.data.images import MapImages
from training.data.sources import load_images
from training.engine.checkpoints import claim_output_dir
from training.engine.results import encoder_digest, read_results
from training.evaluation.finetune import FinetuneArguments
from training.evaluation.knn import by_newest_k, evaluate_knn
from training.evaluation.linear_probe import parse_linear_probe
from training.evaluation.probe_arguments import LinearProbeArguments
from training.pretrain import build_trainer, finish, saved_step
from training.recipe import RECIPES, load_recipe, parse_pretrain, recipe_names
from training.reports.compare import read_measured

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
    # Two images at once in a ResNet-50 whose maps are one pixel: the weights move, and what they make of images is not finite.
    args.training.save_strategy = args.training.eval_strategy = "no"
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


def test_a_probe_takes_its_data_from_the_run_even_of_a_checkpoint(quickstart, tmp_path):
    folder, _, _ = quickstart
    for model in (folder, folder / "checkpoint-11"):
        run = parse_linear_probe(["--num_train_epochs", "3", str(model)])
        assert (run.data.dataset_name, run.data.image_size, run.training.learning_rate) == ("digits", 32, 1.0)
        assert Path(run.training.output_dir) == model / "linear_probe"
    with pytest.raises(ValueError, match="holds no MoCo model"):
        parse_linear_probe([str(tmp_path)])


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
