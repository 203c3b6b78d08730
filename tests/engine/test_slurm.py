"""The SLURM scripts with stand-ins for srun and scontrol: two processes, a SIGTERM, a requeue, and the run's end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import save_encoder

from training.engine.checkpoints import newest_complete

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/bash
shift 2  # --wait, --cpus-per-task
for i in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
jobs -p > "$TASKS"
worst=0
for pid in $(jobs -p); do wait "$pid"; status=$?; [ $status -gt $worst ] && worst=$status; done
exit $worst
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$REQUEUED"
"""


def test_pretraining_takes_the_processes_of_the_papers_unless_it_is_told_otherwise():
    """BatchNorm normalises the images of one process: 256 images on 16 processes would be another method."""
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (ROOT / "configs/slurm/pretrain.sbatch").read_text(), re.M))
    assert (asked["nodes"], asked["ntasks-per-node"]) == ("1", "8")


@pytest.fixture
def cluster(tmp_path):
    """The environment of a job with two tasks; `srun` and `scontrol` are the stand-ins."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    env |= {"TASKS": str(tmp_path / "tasks"), "REQUEUED": str(tmp_path / "requeued")}
    return env | {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_NODELIST": "node[0-1]",
    }


@pytest.mark.slow
def test_a_preempted_job_saves_requeues_itself_and_goes_on(cluster, tmp_path):
    tasks, requeued, run = tmp_path / "tasks", tmp_path / "requeued", tmp_path / "run"
    job = ["bash", str(ROOT / "configs/slurm/pretrain.sbatch"), "--use_cpu", "--batch_norm", "shuffle"]
    job += ["--queue_size", "256", "--num_train_epochs", "4", "--eval_strategy", "no", "--output_dir", str(run)]
    with subprocess.Popen(job, cwd=ROOT, env=cluster, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and newest_complete(run)[0] is None:
            time.sleep(0.1)
        for pid in tasks.read_text().split():
            os.kill(int(pid), signal.SIGTERM)
        out, _ = process.communicate()
    assert process.returncode == 75
    step = re.search(r"Stopped by SIGTERM at step (\d+), saved", out)[1]
    assert newest_complete(run)[0] == run / f"checkpoint-{step}"
    assert requeued.read_text() == f"requeue {os.getpid()}\n"
    again = subprocess.run(job, cwd=ROOT, env=cluster, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"continue: from {run}/checkpoint-{step}" in again.stdout
    assert newest_complete(run)[0] == run / "checkpoint-44"
    assert requeued.read_text() == f"requeue {os.getpid()}\n"


@pytest.mark.slow
def test_an_evaluation_is_shared_by_the_tasks_of_a_job(cluster, tmp_path):
    encoder = save_encoder(tmp_path / "encoder")
    job = ["bash", str(ROOT / "configs/slurm/evaluate.sbatch"), "knn", str(encoder), "--use_cpu", "--knn_k", "5"]
    job += ["--dataset_name", "digits", "--image_size", "32", "--eval_resize", "32"]
    job += ["--max_train_samples", "64", "--max_eval_samples", "20"]
    done = subprocess.run(job, cwd=ROOT, env=cluster, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((encoder / "results.json").read_text())
    assert (result["processes"], result["n"]) == (2, 20)
    wrong = subprocess.run([*job[:2], "nothing"], cwd=ROOT, env=cluster, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "scripts/nothing.py is not there" in wrong.stderr
