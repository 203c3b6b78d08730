"""A whole table, trained and measured on the digits: stopped by Ctrl-C, continued, and read again."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import pytest

from training.engine.results import interval, read_results

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

SMALL = [
    *("--dataset_name", "digits", "--image_size", "32", "--eval_resize", "32", "--max_eval_samples", "100"),
    *("--architecture", "test_resnet", "--batch_norm", "plain", "--queue_size", "256", "--view_backend", "pil"),
    *(
        "--global_batch_size",
        "64",
        "--max_steps",
        "12",
        "--save_strategy",
        "steps",
        "--save_steps",
        "4",
        "--knn_k",
        "20",
    ),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False", "--use_cpu"),
]
PROBE = "--mode cached --num_train_epochs 5 --lr_milestones 3 --learning_rates 0.1 1"
CELLS = {1: ("0.9", 0), 2: ("0.99", 0), 6: ("0.9", 1), 7: ("0.99", 1)}  # of five rows with two seeds


def start(out: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "table.py"), "v1_key_momentum", "--output_dir", str(out), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(table: subprocess.Popen) -> tuple[int, str]:
    said, _ = table.communicate(timeout=1200)
    return table.returncode, said


def wait_for(path: Path, table: subprocess.Popen) -> None:
    while not path.exists():
        assert table.poll() is None, finish(table)
        time.sleep(0.05)


def test_a_table_is_stopped_continued_and_filled(tmp_path):
    out = tmp_path / "out"
    words = ["--seeds", "0", "1", "--cell", *map(str, CELLS), *SMALL, "--evaluation", PROBE]
    second = out / "key_momentum_m_0.99" / "seed0"
    table = start(out, *words)
    wait_for(second / "checkpoint-4" / "manifest.json", table)
    table.send_signal(signal.SIGINT)  # to the table alone: it passes it on
    status, said = finish(table)
    assert status == 75, said
    assert "Stopped by SIGINT" in said
    assert not (second / "metrics.json").exists()
    assert "1 of 10 cells are done" in (out / "table.md").read_text()
    reached = max(int(path.name.split("-")[1]) for path in second.glob("checkpoint-*"))
    assert 4 <= reached < 12

    status, said = finish(start(out, *words))
    assert status == 0, said
    assert "cell 1, key momentum m 0.9, seed 0, is done" in said
    assert f"continue: from {second}/checkpoint-{reached}" in said
    text = (out / "table.md").read_text()
    assert "4 of 10 cells are done" in text
    rows = dict(re.findall(r"^\| key momentum m ([\d.]+) \| (.*?) \|$", text, re.M)[:5])
    for m in ("0.9", "0.99"):
        values, steps = [], []
        for seed in (0, 1):
            folder = out / f"key_momentum_m_{m}" / f"seed{seed}"
            sgd = [x for x in read_results(folder) if "cached features, SGD" in x["protocol"] and x["metric"] == "top1"]
            (value,) = [x["value"] for x in sgd if "best epoch" not in x["protocol"]]
            values.append(value)
            steps.append(json.loads((folder / "trainer_state.json").read_text())["global_step"])
        assert steps == [12, 12]
        low, high = interval(mean(values), 100)
        ours = f"{mean(values):.2f} ± {stdev(values):.2f} | 2 of 2 | {low:.2f} to {high:.2f}"
        assert rows[m].startswith(ours)
    assert rows["0"] == "– | 0 of 2 | – | fails"

    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/**/*") if path.is_file()}
    status, said = finish(start(out, *words))
    assert status == 0, said
    assert said.count("is done") == len(CELLS)
    status, said = finish(start(out, "--write_only"))
    assert status == 0, said
    assert (out / "table.md").read_text() == text
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*/**/*") if path.is_file()} == before


def test_cells_of_two_processes_are_started_stopped_and_continued_by_the_launcher(tmp_path):
    out = tmp_path / "out"
    two = shlex.join(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--quiet"),
            *("--config_file", str(ROOT / "configs/accelerate/two_cpus.yaml")),
        ]
    )
    words = ["--cell", "1", *SMALL, "--evaluation", PROBE, "--launcher", two]
    folder = out / "key_momentum_m_0.9" / "seed0"
    table = start(out, *words)
    wait_for(folder / "checkpoint-4" / "manifest.json", table)
    table.send_signal(signal.SIGTERM)
    status, said = finish(table)
    assert status == 75, said
    status, said = finish(start(out, *words))
    assert status == 0, said
    assert f"continue: from {folder}/checkpoint-" in said
    assert "processes 2 (published: 8)" in (out / "table.md").read_text()
