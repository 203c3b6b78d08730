"""Two processes under a launcher that starts them again: whichever is killed, the run goes on by itself, and to the bit."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
KILLS = 2
FLAGS = [
    *("--dataset_name", "digits", "--max_train_samples", "512", "--image_size", "32", "--eval_resize", "32"),
    *("--queue_size", "64", "--global_batch_size", "16", "--num_train_epochs", "3", "--eval_strategy", "no"),
    *("--save_strategy", "steps", "--save_steps", "5", "--dataloader_num_workers", "0", "--use_cpu"),
    *("--dataloader_persistent_workers", "False", "--disable_tqdm", "True", "--logging_steps", "1"),
]


def start(folder: Path, log: Path) -> subprocess.Popen:
    """As docs/scale.md says."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "--max_restarts", str(KILLS), str(ROOT / "scripts/pretrain.py"), *FLAGS]
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "default"}
    with log.open("w") as file:
        return subprocess.Popen([*command, "--output_dir", str(folder)], stdout=file, stderr=subprocess.STDOUT, env=env)


def wait_for_steps(launcher: subprocess.Popen, log: Path, count: int) -> None:
    while launcher.poll() is None and log.read_text().count("'loss'") < count:
        time.sleep(0.02)
    assert launcher.poll() is None, log.read_text()[-2000:]


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_ends_as_one_left_alone(tmp_path):
    log = tmp_path / "killed.log"
    killed = start(tmp_path / "killed", log)
    for kill in range(KILLS):
        wait_for_steps(killed, log, log.read_text().count("'loss'") + 8)
        processes = sorted(psutil.Process(killed.pid).children(), key=lambda process: process.pid)
        processes[kill % 2].kill()  # the main one, then the other
        while log.read_text().count("continue: from") == kill and killed.poll() is None:
            time.sleep(0.02)
    assert killed.wait() == 0, log.read_text()[-2000:]
    continued = [int(step) for step in re.findall(r"continue: from .*checkpoint-(\d+)", log.read_text())]
    assert len(continued) == KILLS
    assert continued == sorted(continued)
    whole = start(tmp_path / "whole", tmp_path / "whole.log")
    assert whole.wait() == 0
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole")]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
