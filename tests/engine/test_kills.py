"""A run killed twenty times ends as one that was left alone: `pytest -m slow tests/test_kills.py` (eight minutes)."""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.engine.checkpoints import newest_complete
from training.engine.run_folder import MANIFEST

ROOT = Path(__file__).parents[2]
KILLS, SAVE_STEPS = 20, 5
FLAGS = [
    *("--dataset_name", "digits", "--max_train_samples", "512", "--image_size", "32", "--eval_resize", "32"),
    *("--queue_size", "64", "--global_batch_size", "16", "--num_train_epochs", "12", "--eval_strategy", "no"),
    *("--save_strategy", "steps", "--save_steps", str(SAVE_STEPS), "--dataloader_num_workers", "1", "--use_cpu"),
    *("--disable_tqdm", "True", "--logging_steps", "1"),
]


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts/pretrain.py"), *FLAGS, "--output_dir", str(folder)]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}  # or the steps before a kill would not be seen
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)


def is_saving(folder: Path) -> bool:
    return any(not (checkpoint / MANIFEST).exists() for checkpoint in folder.glob("checkpoint-*"))


def kill_after(folder: Path, process: subprocess.Popen, steps: int, during_save: bool, delay: float) -> str:
    """kill -9 some time after so many steps, or while it writes the next checkpoint. Returns what it has printed."""
    printed = ""
    while printed.count("'loss'") < steps and (line := process.stdout.readline()):
        printed += line
    time.sleep(delay)
    while during_save and process.poll() is None and not is_saving(folder):
        pass
    process.kill()
    return printed + process.communicate()[0]


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_bit_for_bit_as_one_left_alone(tmp_path):
    whole = start(tmp_path / "whole")
    moments = random.Random(0)
    folder, unfinished = tmp_path / "killed", 0
    for kill in range(KILLS):
        before, damaged = newest_complete(folder) if folder.exists() else (None, [])
        unfinished += len(damaged)
        process = start(folder)
        # Counted in steps, a kill comes neither before something new is saved nor at the run's end, however fast the
        # machine is; and the delay puts it anywhere within a step.
        until = SAVE_STEPS + moments.randint(1, SAVE_STEPS)
        out = kill_after(folder, process, until, during_save=kill % 2 == 0, delay=moments.uniform(0, 0.05))
        assert process.returncode == -9, "the run ended before it could be killed: make it longer"
        continued = re.search(r"continue: from (.*)", out)
        assert (Path(continued[1]) if continued else None) == before
        steps = len(re.findall(r"'loss'", out))
        after = newest_complete(folder)[0]
        saved = (int(after.name.split("-")[1]) if after else 0) - (int(before.name.split("-")[1]) if before else 0)
        print(
            f"kill {kill + 1}: {steps} steps, of which {steps - saved} are lost; {after.name if after else 'nothing'}"
        )
        assert steps - saved <= SAVE_STEPS
    process = start(folder)
    process.communicate()
    whole.communicate()
    assert (process.returncode, whole.returncode) == (0, 0)
    print(f"{KILLS} kills, {unfinished} left an unfinished checkpoint")
    assert unfinished > 0
    ends = [load_file(run / "model.safetensors") for run in (folder, tmp_path / "whole")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
