"""What the command of a table runs, passes over and refuses."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from paper_tables import NO_NUMBERS, plan_of

from training.commands.tables.plan import parse_table
from training.engine.run_folder import write_recipe
from training.evaluation.linear_probe import parse_linear_probe
from training.reports.table import claim, load_table

ROOT = Path(__file__).parents[2]
STUB = """#!/bin/bash
echo "$@" >> {folder}/started
exit $(cat {folder}/status 2>/dev/null || echo 0)
"""


@pytest.fixture
def launcher(tmp_path):
    """A launcher that writes down what it is to start, and ends with the status in `status`."""
    path = tmp_path / "stub"
    path.write_text(STUB.format(folder=tmp_path))
    path.chmod(0o755)
    return path


def started(tmp_path) -> list[str]:
    path = tmp_path / "started"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def run(script, *words) -> int:
    try:
        script("table").main(list(map(str, words)))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_cell_with_its_result_is_passed_over(definition, launcher, tmp_path, ran, script, capsys):
    name, words = definition(rows=NO_NUMBERS), ["--output_dir", tmp_path / "out", "--launcher", launcher]
    claim(load_table(name), tmp_path / "out")
    ran(plan_of(name, tmp_path), 0, 90.0)
    (tmp_path / "status").write_text("75")
    assert run(script, name, *words) == 75
    (line,) = started(tmp_path)
    assert line.endswith(f"--temperature 0.2 --seed 0 --output_dir {tmp_path}/out/t_0.2/seed0")
    said = capsys.readouterr().out
    assert "[1/2] cell 0, T 0.1, seed 0, is done" in said
    assert "the same command continues" in said


@pytest.mark.slow
def test_what_is_missing_is_run_and_a_failed_cell_is_named(definition, launcher, tmp_path, ran, script, capsys):
    name, out = definition(rows=NO_NUMBERS), tmp_path / "out"
    ran(plan_of(name, tmp_path, "--seeds", "0", "1"), 1, 90.0)
    claim(load_table(name), tmp_path / "elsewhere")
    shutil.copy(tmp_path / "elsewhere" / "table.yaml", out)
    words = [name, "--seeds", "0", "1", "--output_dir", out, "--launcher", launcher]
    (tmp_path / "status").write_text("3")
    assert run(script, *words, "--cell", 0, 1, 3) == 1
    pretrained = [re.search(r"scripts/pretrain\.py (.*)", line)[1] for line in started(tmp_path)]
    assert pretrained == [
        f"--recipe quickstart --temperature {t} --seed {seed} --output_dir {out}/t_{t}/seed{seed}"
        for t, seed in ((0.1, 0), (0.2, 1))
    ]
    said = capsys.readouterr()
    assert "cell 1, T 0.2, seed 0, is done" in said.out
    errors = said.err.strip().splitlines()[-2:]
    assert [line.split(":")[1].strip() for line in errors] == ["cell 0, T 0.1, seed 0", "cell 3, T 0.2, seed 1"]
    assert all("status 3 of " in line for line in errors)
    (tmp_path / "status").write_text("0")  # and nothing is left
    assert run(script, *words, "--cell", 0) == 1
    assert "cell 0, T 0.1, seed 0: it has ended without a kNN" in capsys.readouterr().err
    assert len(started(tmp_path)) == 1
    (tmp_path / "status").write_text("75")
    assert run(script, *words) == 75
    assert len(started(tmp_path)) == 1
    assert "the same command continues" in capsys.readouterr().out
    assert run(script, *words, "--write_only") == 0
    assert run(script, *words, "--list") == 0
    assert started(tmp_path) == []
    assert f"cell 1, T 0.2, seed 0: done\n  {launcher} scripts/pretrain.py" in capsys.readouterr().out.replace(
        os.path.relpath(ROOT / "scripts"), "scripts"
    )


@pytest.mark.slow
def test_an_evaluation_follows_in_a_process_of_its_own(definition, launcher, tmp_path, ran, script, capsys):
    name, out = definition(measure="linear probe", rows=NO_NUMBERS[:1]), tmp_path / "out"
    words = ["--launcher", launcher, "--evaluation", "--mode cached", "--use_cpu", "--output_dir", out]
    assert run(script, name, *words) == 1
    first, second = started(tmp_path)
    assert "scripts/pretrain.py --recipe quickstart --temperature 0.1 --use_cpu --seed 0" in first
    assert second.endswith(f"scripts/linear_probe.py {out}/t_0.1/seed0 --use_cpu True --mode cached")
    capsys.readouterr()
    plan = plan_of(name, tmp_path, *map(str, words))
    ran(plan, 0, 90.0)  # trained, and measured by kNN alone
    assert run(script, name, *words) == 1
    (line,) = started(tmp_path)
    assert "linear_probe" in line
    shutil.rmtree(plan.cells[0].folder)
    ran(plan, 0, 90.0, protocol=plan.rows["t_0.1"].planned.protocol)
    assert run(script, name, *words) == 0
    assert started(tmp_path) == []


def test_a_probe_of_other_settings_gets_a_folder_of_its_own(definition, tmp_path, ran):
    def probe_of(evaluation: str) -> tuple[list[str], dict]:
        """The words behind those of the evaluation, and what the probe would be."""
        plan = plan_of(name, tmp_path, f"--evaluation={evaluation}", "--use_cpu")
        (cell,) = plan.cells
        words = plan.steps(cell)["linear_probe"]
        words = words[words.index(str(cell.folder)) :]
        probe = parse_linear_probe(words)
        return words[1 + len(plan.evaluation) :], {"folder": Path(probe.training.output_dir), "recipe": probe.settings}

    name = definition(measure="linear probe", rows=NO_NUMBERS[:1])
    ran(plan_of(name, tmp_path), 0, 90.0)
    said, first = probe_of("--mode cached --num_train_epochs 2 --lr_milestones 1")
    assert said == []
    first["folder"].mkdir()
    write_recipe(first["folder"], first["recipe"])
    (first["folder"] / "metrics.json").write_text("{}")
    assert probe_of("--mode cached --num_train_epochs 2 --lr_milestones 1")[0] == []  # continues
    said, second = probe_of("--mode cached --num_train_epochs 3 --lr_milestones 1")
    assert said == ["--output_dir", f"{first['folder']}_2"]
    second["folder"].mkdir()
    write_recipe(second["folder"], second["recipe"])
    (second["folder"] / "metrics.json").write_text("{}")
    assert probe_of("--mode cached --num_train_epochs 3 --lr_milestones 1")[0] == said
    assert probe_of("--mode cached --num_train_epochs 4 --lr_milestones 1")[0] == [
        "--output_dir",
        f"{first['folder']}_3",
    ]
    assert probe_of("--num_train_epochs 4 --lr_milestones 1")[0] == []  # of the other mode


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["v1_key"], "table ('v1_key') is neither a file nor one of cifar10_methods, v1_"),
        (["--seeds", "0"], "no table named: begin with one of"),
        (["MINE", "--temprature", "1"], "flag --temprature is unknown: did you mean '--temperature'?"),
        (["MINE", "--seed", "1"], "seed is not for all cells alike: pass --seeds"),
        (["MINE", "--push_to_hub"], "push_to_hub is not for all cells alike: publish the run that you choose"),
        (["MINE", "--temperature", "1"], "rows 'T 0.1' and 'T 0.2' of mine are the same with these flags"),
        (["MINE", "--queue_size", "-1"], "queue_size (-1)"),
        (["MINE", "--evaluation=--moode cached"], "flag --moode is unknown: did you mean '--mode'?"),
        (["MINE", "--evaluation=--random_encoder"], "leave --random_encoder and --output_dir out"),
        (["MINE", "--cell", "1"], "there is no cell 1: mine with 1 seeds has cells 0 to 0"),
        (["MINE", "--seeds", "1", "1"], "seeds (1 1) must be different numbers from 0 on"),
        (["MINE", "--launcher", "no-such-program"], "launcher (no-such-program) is no program here"),
    ],
)
def test_a_typo_costs_nothing(words, said, definition, tmp_path, script, capsys):
    name, out = definition(measure="linear probe", rows=NO_NUMBERS[: 1 + ("--temperature" in words)]), tmp_path / "out"
    assert run(script, *[name if word == "MINE" else word for word in words], "--output_dir", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not out.exists()


def test_a_folder_with_other_settings_is_refused_before_anything_runs(
    definition, launcher, tmp_path, ran, script, capsys
):
    name = definition(rows=NO_NUMBERS[:1])
    ran(plan_of(name, tmp_path), 0, 90.0)
    assert run(script, name, "--output_dir", tmp_path / "out", "--launcher", launcher, "--queue_size", "64") == 2
    assert "already holds another run: queue_size is 1024 there and 64 here" in capsys.readouterr().err
    assert started(tmp_path) == []


def test_one_of_several_processes_is_refused(definition, script, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(script, definition()) == 2
    assert "start it by python, and pass --launcher 'accelerate launch ...'" in capsys.readouterr().err


def test_the_array_of_slurm_has_a_job_for_every_cell_and_requeues_what_was_stopped(tmp_path):
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text('#!/bin/bash\necho "$@" >> "$STARTED"\nexit $STATUS\n')
        (tmp_path / name).chmod(0o755)
    script = ROOT / "configs" / "slurm" / "table.sbatch"
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "STARTED": str(tmp_path / "started"),
        "STATUS": "75",
    }
    of_slurm = {"SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "14"}
    words = ["v1_key_momentum", "--seeds", "0", "1", "2"]
    done = subprocess.run(["bash", script, *words], env=env | of_slurm, check=False)
    first, second = started(tmp_path)
    assert (done.returncode, second) == (75, "requeue 77")
    plan = parse_table(first.split("scripts/table.py ")[1].split())
    (cell,) = plan.chosen
    assert (cell.row.label, cell.seed) == ("0.9999", 2)
    assert f"#SBATCH --array=0-{len(plan.cells) - 1}\n" in script.read_text()
