"""What a run logs reaches a tracker."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
TINY = [
    *("--dataset_name", "digits", "--max_train_samples", "64", "--max_eval_samples", "16", "--image_size", "32"),
    *("--eval_resize", "32", "--queue_size", "64", "--global_batch_size", "16", "--knn_k", "5", "--use_cpu"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False", "--disable_tqdm", "True"),
    *("--num_train_epochs", "1", "--logging_steps", "2"),
]
LOGGED = {
    *("loss", "learning_rate", "contrast_top1", "contrast_top5", "positive_similarity", "uniformity", "alignment"),
    *("hardest_negative_similarity", "queue_age", "key_drift", "images_per_second"),
}
EVALUATED = {"knn_top1", "rankme", "contrast_top1", "contrast_top1_shuffled", "leaks"}
NAMES = {f"train/{name}" for name in LOGGED} | {f"eval/{name}" for name in EVALUATED}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_gets_everything(script, tmp_path):
    folder = tmp_path / "run"
    script("pretrain").main([*TINY, "--report_to", "tensorboard", "--output_dir", str(folder)])
    (events,) = folder.glob("runs/*/events*")
    read = EventAccumulator(str(events)).Reload()
    assert set(read.Tags()["scalars"]) >= NAMES
    assert [event.step for event in read.Scalars("train/loss")] == [2, 4]
    assert [event.step for event in read.Scalars("eval/knn_top1")] == [0, 4]


def test_trackio_gets_everything_under_a_name_that_a_continued_run_has_too(tmp_path):
    folder = tmp_path / "run"
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts/pretrain.py"), *TINY, "--report_to", "trackio"]
    subprocess.run([*command, "--output_dir", str(folder)], check=True, capture_output=True, env=env)
    with sqlite3.connect(tmp_path / "trackio" / "moco.db") as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics").fetchall()
    assert {name for name, _ in rows} == {str(folder)}
    assert set().union(*(json.loads(metrics) for _, metrics in rows)) >= NAMES
