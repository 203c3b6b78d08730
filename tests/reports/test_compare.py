"""Runs in one table: what is put together, what is kept apart, and what is shown of strangers' words."""

import html
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from modeling_moco import MoCoModel
from training.cli import default_values
from training.engine.checkpoints import BatchLayout, write_manifest
from training.engine.results import Result, append_results, encoder_digest
from training.recipe import PARTS, parse_pretrain
from training.reports.compare import compare, draw

ROOT = Path(__file__).parents[2]
KNN = "weighted kNN, k 20, T 0.07"
DATA = {"dataset": "digits", "split": "test", "view": "short side 32 px, centre 32 px"}


@pytest.fixture
def make(encoder, tmp_path):
    """Writes a run with these settings and kNN accuracies: `make("a", seed=1, values=[90.0], queue_size=64)`."""

    def make(
        name, values=(), seed=0, n=360, bank=100, protocol=KNN, model=None, data=DATA, logged=4, **settings
    ) -> Path:
        folder = tmp_path / name
        shutil.copytree(encoder[0], folder)
        of_model = {key: value for key, value in settings.items() if key in ("queue_size", "temperature")}
        training = {key: value for key, value in settings.items() if key not in of_model} | {"seed": seed}
        recipe = {"about": {"title": name}, "data": {"dataset_name": "digits"}, "model": of_model, "training": training}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        history = [{"epoch": i, "loss": 6.0 - i - seed / 10, "eval_knn_top1": 50.0 + i} for i in range(logged)]
        state = {"global_step": 8, "max_steps": 8, "epoch": 2, "num_train_epochs": 2, "log_history": history}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        for value in values:
            result = Result(protocol, "top1", value, n, settings={"bank": bank}, seed=seed)
            append_results(folder, [result], model=model or encoder[1], data=data)
        return folder

    return make


def table(folders) -> list[list[str]]:
    """The cells of the table, its head first."""
    comparison = compare(folders, default_values(PARTS))
    return [comparison.head, *comparison.body]


def notes(folders) -> str:
    return "\n".join(compare(folders, default_values(PARTS)).notes())


def test_seeds_are_one_row_with_their_mean_and_sample_deviation(make):
    values = {0: 90.0, 1: 91.5, 2: 94.25}
    runs = [make(f"a{seed}", [value], seed, queue_size=64) for seed, value in values.items()]
    runs.insert(1, make("b", [88.0], 7, queue_size=128))
    head, first, second = table(runs)
    mean = sum(values.values()) / 3
    std = (sum((value - mean) ** 2 for value in values.values()) / 2) ** 0.5
    assert head == ["", "queue_size", "n", f"{KNN}, top-1, digits, test, n 360"]
    assert first == ["A", "64", "3", f"{mean:.2f} ± {std:.2f}"]
    assert second == ["B", "128", "1", "88.00"]


def test_defaults_are_settings_and_what_changes_no_weight_is_none(make):
    alike = [
        make("a", [90.0]),
        make("b", [92.0], 1, queue_size=65536, dataloader_num_workers=3, save_steps=7, knn_k=[5]),
    ]
    (row,) = table(alike)[1:]
    assert row[:2] == ["A", "2"]
    other = make("c", [92.0], 1, temperature=0.07)
    head, *rows = table([*alike, other])
    assert head[1:3] == ["temperature", "n"]
    assert [row[:3] for row in rows] == [["A", "0.2", "2"], ["B", "0.07", "1"]]


def test_runs_of_other_images_under_one_name_are_rows_of_their_own(make):
    runs = [make(name, [90.0 + i], i) for i, name in enumerate("abcd")]
    seen = {0: "8 files, digest 0", 1: "8 files, digest 1", 2: "8 files, digest 0"}
    for i, revision in seen.items():
        data = DATA | {"train_images": 8, "revision": revision}
        (runs[i] / "metrics.json").write_text(json.dumps({"data": data}))
    head, *rows = table(runs)
    assert head[:3] == ["", "trained on", "n"]
    assert [row[1:] for row in rows] == [
        ["8 images, 8 files, digest 0", "2", "91.00 ± 1.41"],
        ["8 images, 8 files, digest 1", "1", "91.00"],
        ["–", "1", "93.00"],
    ]


def test_a_run_that_has_not_ended_is_a_row_of_its_own(make):
    ended, other = make("a", [90.0]), make("b", [80.0], 1)
    checkpoint = other / "checkpoint-4"
    checkpoint.mkdir()
    for path in other.iterdir():
        if path.is_file() and path.name not in ("recipe.yaml", "results.json"):
            path.rename(checkpoint / path.name)
    state = json.loads((checkpoint / "trainer_state.json").read_text()) | {"global_step": 4}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(checkpoint, BatchLayout(1, 4, 1, 16, None))
    head, *rows = table([ended, other])
    assert head[1:3] == ["state", "n"]
    assert [row[1:] for row in rows] == [["ended", "1", "90.00"], ["step 4 of 8", "1", "80.00"]]


def test_only_the_same_measurement_shares_a_column(make):
    digits, seen = f"{KNN}, top-1, digits, test, n 360", {"split": "test", "view": DATA["view"]}
    runs = [
        make("a", [90.0]),
        make("fewer", [91.0], n=100, queue_size=64),
        make("bank", [92.0], bank=50, queue_size=128),
        make("train", [93.0], data=DATA | {"split": "train"}, queue_size=256),
        make("birds", [94.0], data=seen | {"dataset": "/data/birds"}, queue_size=512),
        make("k", [95.0], protocol="weighted kNN, k 5, T 0.07", queue_size=1024),
        make("images", [96.0], data=DATA | {"train_images": 500}, queue_size=4096),
        make("labels", [97.0], data=DATA | {"label_column": "coarse_label", "classes": 5}, queue_size=8192),
        make("revision", [98.0], data=DATA | {"revision": "commit a", "split_revision": "commit b"}, queue_size=16384),
        make("nothing", queue_size=2048),
    ]
    head, *rows = table(runs)
    measured = [row[3:] for row in rows]
    assert head[3:] == [
        f"{KNN}, top-1, digits, test, bank 100, n 360",
        f"{KNN}, top-1, digits, test, bank 100, n 100",
        f"{KNN}, top-1, digits, test, bank 50, n 360",
        f"{KNN}, top-1, digits, train, bank 100, n 360",
        f"{KNN}, top-1, birds, test, bank 100, n 360",
        "weighted kNN, k 5, T 0.07, top-1, digits, test, bank 100, n 360",
        f"{KNN}, top-1, digits, test, 500 train images, bank 100, n 360",
        f"{KNN}, top-1, digits, test, labels coarse_label, 5 classes, bank 100, n 360",
        f"{KNN}, top-1, digits, test, evaluated images commit b, train images commit a, bank 100, n 360",
    ], digits
    expected = [[f"{90 + i:.2f}" if i == j else "–" for j in range(9)] for i in range(9)]
    assert measured == [*expected, ["–"] * 9]
    assert f"Not measured by {head[3]}: {', '.join(map(str, runs[1:]))}." in notes(runs)


def test_folders_of_one_name_are_columns_that_can_be_told_apart(make):
    places = {"/data/old/birds": "a", "/data/new/birds": "b", "/data/fish": "c"}
    head, *_ = table([make(name, [90.0], data=DATA | {"dataset": place}) for place, name in places.items()])
    assert head[-3:] == [
        f"{KNN}, top-1, {name}, test, n 360" for name in ("/data/old/birds", "/data/new/birds", "fish")
    ]


def test_a_run_is_named_as_it_was_given(make, tmp_path, monkeypatch):
    make("a", [90.0]), make("other/a")
    monkeypatch.chdir(make("b"))
    said = notes([Path("."), Path("../a"), Path("../other/a")])
    assert f"Not measured by {KNN}, top-1, digits, test, n 360: ., ../other/a." in said


def test_results_of_other_weights_are_left_out_and_the_last_one_counts(make):
    run, other = make("a", [90.0, 91.0]), make("b", [95.0], 1, model="0123456789abcdef")
    append_results(run, [Result(KNN, "top1", 50.0, 360, "head", {"bank": 100})], model="fedcba9876543210", data=DATA)
    (row,) = table([run, other])[1:]
    assert row == ["A", "2", "91.00 (1 of 2)"]
    out = notes([run, other])
    assert f"Left out: 1 results of {other}, which are of other weights than it has now." in out
    assert f"Left out: 1 results of {run}," in out
    assert f"top-1, digits, test, n 360: {other}." in out


def test_losses_of_other_negatives_are_not_taken_for_a_comparison(make):
    first = make("a")
    assert "depend on queue_size itself" in notes([first, make("b", queue_size=64)])
    assert "depend on" not in notes([first, make("c", weight_decay=0.5)])


def test_a_seed_that_comes_twice_is_said(make):
    said = notes([make("a", [90.0]), make("b", [90.0])])
    assert "Row A has 2 runs of seed 0, which are not independent." in said


def test_the_commit_of_every_run_is_shown_and_other_commits_in_a_row_are_said(make):
    runs = [make("a", [90.0]), make("b", [91.0], 1), make("c", [92.0], 2), make("d", queue_size=64)]
    commits = ("0123456789ab", "ba9876543210", None, "0123456789ab")
    for run, commit in zip(runs, commits, strict=True):
        (run / "metrics.json").write_text(json.dumps({"commit": commit}))
    comparison = compare(runs, default_values(PARTS))
    assert [row[3] for row in comparison.runs] == ["0123456789ab", "ba9876543210", "–", "0123456789ab"]
    said = "\n".join(comparison.notes())
    assert "Row A has runs of different commits of the code: 0123456789ab, ba9876543210." in said
    assert "Row B has" not in said


def test_every_run_has_a_line_in_the_colour_of_its_row(make, script, tmp_path):
    runs = [make("a", seed=0), make("b", seed=1, logged=7), make("c", queue_size=64)]
    script("compare").main([*map(str, runs), "--output_dir", str(tmp_path / "out")])
    svg = (tmp_path / "out" / "curves.svg").read_text()
    for title in ("InfoNCE loss", "kNN top-1, %"):
        lines = re.findall(rf'<g id="{re.escape(title)} (\d)">\s*<path d="(.*?)".*?stroke: (#\w+)', svg, re.S)
        assert [(row, len(re.findall("[ML]", path))) for row, path, _ in lines] == [("0", 4), ("0", 7), ("1", 4)]
        first, second, third = (colour for *_, colour in lines)
        assert first == second != third
    assert "<!-- B, queue_size 64 -->" in svg
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "data:image/svg+xml;base64," in page
    assert "://" not in page


@pytest.mark.parametrize(
    ("section", "one", "other", "same"),
    [
        ("training", {"knn_k": [5]}, {"knn_k": [10]}, False),
        ("training", {"knn_k": [200]}, {}, True),  # which is the default
        ("data", {"augmentation": "v1"}, {"augmentation": "v2"}, True),  # of the training views alone
        ("data", {"image_size": 32}, {"image_size": 64}, False),
        ("data", {"max_eval_samples": 8}, {}, False),
        ("seen", DATA | {"split_revision": "8 files, digest 0"}, DATA | {"split_revision": "8 files, digest 1"}, False),
        ("seen", DATA, {}, True),  # one has not ended
    ],
)
def test_knn_curves_are_laid_over_each_other_where_they_are_the_same_measurement(
    section, one, other, same, make, tmp_path
):
    runs = [make("a"), make("b", seed=1)]
    for run, values in zip(runs, (one, other), strict=True):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        if section == "seen":
            (run / "metrics.json").write_text(json.dumps({"data": values}))
        else:
            recipe[section] |= values
            (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    comparison = compare(runs, default_values(PARTS))
    assert ("The kNN curves are left out" in "".join(comparison.notes())) != same
    assert draw(comparison, tmp_path / "curves")
    svg = (tmp_path / "curves.svg").read_text()
    assert "InfoNCE loss 0" in svg
    assert ("kNN top-1" in svg) == same


def test_words_and_histories_of_strangers_are_shown_as_words(make, script, tmp_path):
    attack = "<script>x|y</script>\u202e[a](b)"
    run, other = make("a", [90.0], protocol=attack, optim=attack), make("b", [91.0], optim="sgd")
    state = json.loads((run / "trainer_state.json").read_text())
    odd = [
        3,
        {"epoch": "x", "loss": 2},
        {"loss": 3.0},
        {"epoch": 1, "loss": float("nan")},
        {"epoch": None, "loss": None},
    ]
    (run / "trainer_state.json").write_text(json.dumps(state | {"log_history": odd, "max_steps": attack}))
    script("compare").main([str(run), str(other), "--output_dir", str(tmp_path / "out")])
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<script" not in page
    assert html.escape("<script>x|y</script>\\u202e[a](b)") in page
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "\\<script\\>x\\|y\\</script\\>\\\\u202e\\[a\\](b)" in text
    assert all(line.isprintable() for line in text.splitlines())


def test_markdown_and_html_have_the_rows_as_columns(make, script, tmp_path):
    runs = [make(f"r{i}", [90.0 + i], queue_size=64 + i) for i in range(5)]
    append_results(runs[0], [Result("probe", "top1", 50.0, 360)], model=digest_of(runs[0]), data=DATA)
    script("compare").main([*map(str, runs), "--output_dir", str(tmp_path / "out")])
    text, page = ((tmp_path / "out" / f"comparison.{kind}").read_text() for kind in ("md", "html"))
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    rows = [[line.strip("| \n").split(" | ") for line in table.splitlines()] for table in tables[:2]]
    assert [table[0] for table in rows] == [["A", "B", "C", "D"], ["E"]]
    assert [line[1:] for line in rows[0][2:]] == [
        ["64", "65", "66", "67"],
        ["1"] * 4,
        ["90.00", "91.00", "92.00", "93.00"],
        ["50.00", "–", "–", "–"],
    ]
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", page.replace("<wbr>", ""))
    assert [x for table in rows for line in table if line[0] != "---" for x in line if x] == [
        x for x in cells[: cells.index("row")] if x
    ]


def test_the_table_of_a_terminal_is_as_narrow_as_its_numbers(make, script, tmp_path, capsys):
    runs = [make("a", [90.0]), make("b", [91.0], queue_size=64)]
    append_results(runs[0], [Result("probe", "top1", 50.0, 360)], model=digest_of(runs[0]), data=DATA)
    script("compare").main([*map(str, runs), "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said[:3]] == [
        ["queue_size", "n", "(1)", "(2)"],
        ["A", "65536", "1", "90.00", "50.00"],
        ["B", "64", "1", "91.00", "–"],
    ]
    assert said[3:5] == [f"(1) {KNN}, top-1, digits, test, bank 100, n 360", "(2) probe, top-1, digits, test, n 360"]
    assert f"Not measured by (2): {runs[1]}." in said


def digest_of(run: Path) -> str:
    return encoder_digest(MoCoModel.from_pretrained(run))


def test_nothing_is_overwritten_and_bad_input_is_one_line(make, script, tmp_path, capsys):
    runs = [str(make("a", [90.0])), str(make("b", [91.0], 1))]
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "comparison.md").write_text("of an earlier time")
    script("compare").main([*runs, str(shutil.copytree(tmp_path / "comparison", tmp_path / "earlier"))])
    written = {path.name for path in (tmp_path / "comparison_2").iterdir()}
    assert written == {"comparison.md", "comparison.html", "curves.png", "curves.svg"}
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "empty").mkdir()
    for argv, words in (
        ([*runs, "--output_dir", runs[0]], "is there already, and is not overwritten: name another folder"),
        (runs[:1], "a is compared with nothing: name several runs"),
        ([runs[0], runs[1], f"{runs[0]}/../a"], "is named twice: name each run once"),
        ([runs[0], str(tmp_path / "lost")], "does not exist"),
        ([runs[0], str(tmp_path / "empty")], "is not the folder of a pretraining run"),
    ):
        with pytest.raises(SystemExit) as end:
            script("compare").main(argv)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    with pytest.raises(SystemExit):
        script("report").main(runs)
    assert "a report is of one run: python scripts/compare.py puts several into one table" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "empty"])


# Sweeps

STUB = """#!/bin/bash
[ "$0" = "${0%srun}" ] || shift 2  # --cpus-per-task, python
echo "$@" >> "$STARTED"
exit $STATUS
"""


@pytest.fixture
def shell(tmp_path):
    """Runs words in a shell whose `python` and `srun` write down what they are started with, and `scontrol` too."""
    for name in ("python", "srun", "scontrol"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)

    def run(*words, status=0, **env):
        started = tmp_path / "started"
        started.unlink(missing_ok=True)
        env = (
            os.environ
            | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STARTED": str(started), "STATUS": str(status)}
            | env
        )
        done = subprocess.run(["bash", *words], env=env, cwd=tmp_path, capture_output=True, text=True)
        return done, started.read_text().splitlines() if started.is_file() else []

    return run


def test_the_documented_sweep_starts_a_run_for_every_pair_and_compares_them(shell, tmp_path):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (block,) = [block for block in re.findall(r"```bash\n(.*?)```", page, re.S) if block.startswith("for ")]
    _, started = shell("-c", block)
    *runs, last = started
    seen = {_queue_and_seed(line.removeprefix("scripts/pretrain.py ")) for line in runs}
    assert seen == {(queue, seed) for queue in (256, 1024) for seed in (0, 1, 2)}
    assert last == "scripts/compare.py runs/sweep/*"


def _queue_and_seed(words: str) -> tuple[int, int]:
    args = parse_pretrain([*shlex.split(words), "--use_cpu"])
    pair = args.config.queue_size, args.training.seed
    assert args.training.output_dir.endswith(f"runs/sweep/queue_{pair[0]}-seed_{pair[1]}")
    return pair


def test_the_sweep_of_slurm_has_a_job_for_every_pair_and_requeues_what_was_stopped(shell):
    script = str(ROOT / "configs" / "slurm" / "sweep.sbatch")
    of_slurm = {"SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_ID": "77"}
    seen = set()
    for task in range(9):
        done, (started,) = shell(script, "--recipe", "quickstart", **of_slurm, SLURM_ARRAY_TASK_ID=str(task))
        assert done.returncode == 0
        seen.add(_queue_and_seed(started.removeprefix("scripts/pretrain.py ")))
    assert seen == {(queue, seed) for queue in (1024, 4096, 16384) for seed in (0, 1, 2)}
    assert "#SBATCH --array=0-8\n" in Path(script).read_text()
    done, (_, requeued) = shell(script, status=75, **of_slurm, SLURM_ARRAY_TASK_ID="0")
    assert (done.returncode, requeued) == (75, "requeue 77")
    done, started = shell(script, **of_slurm, SLURM_ARRAY_TASK_ID="9")
    assert (done.returncode, started) == (2, [])
    assert "there is no run 9: submit with --array=0-8" in done.stderr
