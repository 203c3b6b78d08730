"""The main job, short enough for a test."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = [
    *("--dataset_name", "digits", "--max_train_samples", "64", "--max_eval_samples", "16", "--image_size", "32"),
    *("--eval_resize", "32", "--queue_size", "64", "--global_batch_size", "16", "--knn_k", "5", "--use_cpu"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False", "--disable_tqdm", "True"),
]


def launch(*flags: str, config: str = "one_gpu") -> subprocess.CompletedProcess:
    """`accelerate launch --quiet --config_file configs/accelerate/... scripts/pretrain.py --use_cpu`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(ROOT / f"configs/accelerate/{config}.yaml"), str(ROOT / "scripts/pretrain.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *flags, "--use_cpu"], capture_output=True, text=True, env=env)
