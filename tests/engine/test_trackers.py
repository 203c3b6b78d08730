"""What a run logs reaches a tracker."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modeling_moco import MoCoConfig, MoCoModel

ROOT = Path(__file__).parents[2]
TINY = [
    *("--dataset_name", "digits", "--max_train_samples", "64", "--max_eval_samples", "16", "--image_size", "32"),
    *("--eval_resize", "32", "--queue_size", "64", "--global_batch_size", "16", "--knn_k", "5", "--use_cpu"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False", "--disable_tqdm", "True"),
    *("--num_train_epochs", "1", "--logging_steps", "2"),
]
LOGGED = {
    *("loss", "learning_rate", "contrast_top1", "contrast_top5", "positive_similarity", "uniformity", "alignment"),
    *("hardest_negative_similarity", "queue_age", "key_drift", "images_per_second"),
    "waiting_for_data",
}
EVALUATED = {"knn_k", "knn_top1", "rankme", "contrast_top1", "contrast_top1_shuffled", "leaks"}
NAMES = {f"train/{name}" for name in LOGGED} | {f"eval/{name}" for name in EVALUATED}


RESULTS = {"results/weighted kNN, k 5, T 0.07, backbone, top1"}
FIGURES = {"figures/training_curves", "figures/neighbours", "figures/tsne"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_gets_everything(script, tmp_path):
    folder, tensorboard = tmp_path / "run", ["--report_to", "tensorboard"]
    script("pretrain").main([*TINY, *tensorboard, "--output_dir", str(folder)])
    (events,) = (path for path in folder.glob("runs/*/events*") if path.parent.name != "results")
    read = EventAccumulator(str(events)).Reload()
    assert set(read.Tags()["scalars"]) >= NAMES
    assert [event.step for event in read.Scalars("train/loss")] == [2, 4]
    assert [event.step for event in read.Scalars("eval/knn_top1")] == [0, 4]
    script("knn").main([str(folder), "--use_cpu", "--knn_k", "5", "10", *tensorboard])
    script("linear_probe").main([str(folder), "--use_cpu", "--mode", "cached", "--num_train_epochs", "2", *tensorboard])
    sent = EventAccumulator(str(folder / "runs" / "results")).Reload()
    assert set(sent.Tags()["images"]) == FIGURES
    assert set(sent.Tags()["scalars"]) == RESULTS | {"results/weighted kNN, k 10, T 0.07, backbone, top1"}
    assert sent.Scalars(*RESULTS)[0].value == pytest.approx(read.Scalars("eval/knn_top1")[-1].value)
    probe = EventAccumulator(str(folder / "linear_probe_cached" / "runs" / "results")).Reload()
    assert set(probe.Tags()["images"]) == {"figures/confusion_sgd", "figures/confusion_lbfgs"}
    assert {name.rpartition(", ")[2] for name in probe.Tags()["scalars"]} == {"top1", "top5"}


@pytest.mark.slow
def test_trackio_gets_everything_but_the_token_under_a_name_that_a_continued_run_has_too(tmp_path):
    folder, trackio, token = tmp_path / "run", ["--report_to", "trackio"], "hf_" + "Secret0" * 5
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1", "HF_TOKEN": token}
    for script, *flags in (["pretrain", *TINY, "--output_dir", str(folder)], ["knn", str(folder), "--knn_k", "7"]):
        command = [sys.executable, str(ROOT / f"scripts/{script}.py"), *flags, *trackio]
        subprocess.run(command, check=True, capture_output=True, env=env)
    with sqlite3.connect(tmp_path / "trackio" / "moco.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name for name, _, _ in rows} == {str(folder).lstrip("/")}
    logged = {name: value for _, _, metrics in rows for name, value in json.loads(metrics).items()}
    assert set(logged) >= NAMES | RESULTS | FIGURES | {"results/weighted kNN, k 7, T 0.07, backbone, top1"}
    assert all(Path(tmp_path / "trackio" / "media" / logged[name]["file_path"]).is_file() for name in FIGURES)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


@pytest.mark.parametrize("script_name", ["pretrain", "knn", "linear_probe"])
def test_a_tracker_that_is_not_installed_is_refused_before_any_time_is_spent(script, tmp_path, script_name, capsys):
    save_tiny(tmp_path)
    flags = [*TINY, "--output_dir", str(tmp_path)] if script_name == "pretrain" else [str(tmp_path), *TINY[:2]]
    with pytest.raises(SystemExit):
        script(script_name).main([*flags, "--report_to", "wandb"])
    assert "error: report_to (wandb) is not installed: pip install wandb" in capsys.readouterr().err


def save_tiny(folder: Path) -> None:
    MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=16)).save_pretrained(folder)
