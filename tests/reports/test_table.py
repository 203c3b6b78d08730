"""Tables of the papers: their files, what is shown of ours beside the paper's, and what is run."""

import html
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import yaml
from tiny_models import save_encoder

from modeling_moco import MoCoModel
from training.commands import table as command
from training.commands.table import parse_table
from training.engine.files import UNFINISHED
from training.engine.results import Result, append_results, conditions, encoder_digest
from training.engine.run_folder import write_recipe
from training.recipe import load_recipe, parse_pretrain
from training.reports.children import Children
from training.reports.table import TABLES, load_table, table_names
from training.reports.table_results import to_html, to_markdown, write

ROOT = Path(__file__).parents[2]
KNN = "weighted kNN, k 200, T 0.07"  # the monitor of the quickstart
DIGITS = {
    "dataset": "digits",
    "train_split": "train",
    "train_images": 1437,
    "split": "test",
    "split_images": 360,
    "label_column": "label",
    "classes": 10,
    "view": "short side 32 px, centre 32 px",
}
ABOUT = {
    "title": "Temperatures",
    "paper": "arXiv:0000.00000",
    "conditions": "ImageNet, 200 epochs",
    "source": "invented",
}
ROWS = [
    {"label": 0.1, "set": {"temperature": 0.1}, "paper": 60.5},
    {"label": 0.2, "set": {"temperature": 0.2}, "paper": "fails"},
    {"label": 0.5, "set": {"temperature": 0.5}, "source": "another paper"},
]
WILSON = {91.5: (88.16, 93.96)}  # of 360 images, computed with 40 digits


@pytest.fixture
def definition(tmp_path):
    """Writes a table: `definition(rows=...)`, and gives its path."""

    def make(about=ABOUT, **changed) -> str:
        content = {"base": "quickstart", "measure": "kNN", "x": "T", "rows": ROWS} | changed
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"about": about, "table": {k: v for k, v in content.items() if v is not None}}))
        return str(path)

    return make


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> tuple[Path, str]:
    """A model on disk, and the digest of its features."""
    folder = save_encoder(tmp_path_factory.mktemp("encoder"))
    return folder, encoder_digest(MoCoModel.from_pretrained(folder))


@pytest.fixture
def ran(encoder):
    """Leaves in a cell's folder what its run leaves: `ran(plan, 0, 91.5, protocol=...)`; without a value it has not ended."""

    def leave(
        plan, number, value=None, protocol=KNN, processes=1, n=360, model=None, bank=1437, commit=None, **data
    ) -> Path:
        cell = plan.cells[number]
        settings = parse_pretrain([*plan.rows[cell.row.folder].words, "--seed", str(cell.seed), "--use_cpu"]).settings
        shutil.copytree(encoder[0], cell.folder)
        write_recipe(cell.folder, {"about": {"title": "mine"}} | settings)
        history = [{"epoch": i, "loss": 6.0 - i, "contrast_top1": 10.0 * i} for i in range(3)]
        state = {"global_step": 8, "max_steps": 8, "epoch": 2, "num_train_epochs": 2, "log_history": history}
        if value is None:
            return cell.folder
        (cell.folder / "trainer_state.json").write_text(json.dumps(state))
        (cell.folder / "metrics.json").write_text(
            json.dumps({"ended": "2026-01-01", "processes": processes, "commit": commit, "data": DIGITS})
        )
        knn = {"bank": bank} if protocol.startswith("weighted kNN") else {}
        result = Result(protocol, "top1", value, n, settings=knn, seed=cell.seed)
        append_results(cell.folder, [result], model=model or encoder[1], data=DIGITS | data)
        return cell.folder

    return leave


def plan_of(name, tmp_path, *words):
    return parse_table([name, "--output_dir", str(tmp_path / "out"), *words])


def shown(plan) -> tuple[list[str], list[list[str]], str]:
    filled = plan.fill()
    return filled.head, filled.body, "\n".join(filled.notes())


# Files


@pytest.mark.slow
@pytest.mark.parametrize("name", table_names())
def test_every_command_of_every_table_is_parsed(name):
    plan = parse_table([name, "--seeds", "0", "1"])
    assert len(plan.cells) == 2 * len(plan.table.rows)
    for cell in plan.cells:
        steps = plan.steps(cell)
        assert list(steps) == ["pretrain", *(["linear_probe"] if plan.table.measure == "linear probe" else [])]
        assert steps["pretrain"][-4:] == ["--seed", str(cell.seed), "--output_dir", str(cell.folder)]


def test_every_kind_of_row_of_every_table_is_parsed():
    kinds = {}
    for table in map(load_table, table_names()):
        assert re.match(r"arXiv:\d{4}\.\d{5}|official CIFAR-10 notebook", table.about["paper"])
        kinds |= {(row.base, *row.settings): (table, row) for row in table.rows}
    for table, row in kinds.values():
        plan = command.plan_row(table, row, [], [])
        assert {name: getattr_of(plan.args, name) for name in row.settings} == row.settings


def getattr_of(args, name):
    return next(getattr(part, name) for part in (args.config, args.training, args.data) if hasattr(part, name))


PAPERS = {  # the numbers of the papers in the order of their rows
    "cifar10_methods": [82.6, 85.3, *[None] * 4],
    "v1_dictionary": [None, None, None, *[None] * 5, 58.0, *[None] * 5, 60.6],
    "v1_key_momentum": ["fails", 55.2, 57.8, 59.0, 58.9],
    "v1_shuffling": [None, None],
    "v2_table1": [60.6, 66.2, 63.4, 67.3, 67.5, 71.1],
    "v2_table2": [61.9, 66.6, 69.3, 67.5, 71.1],
    "v2_temperature": [60.6, 60.7, 59.0, 58.2, 57.2, 56.4, 62.9, 64.9, 66.2, 65.7, 65.0, 64.3],
    "v3_r50": [68.9, 72.8, 74.6],
    "v3_vit": [73.2, 76.7],
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_numbers_of_the_papers_are_theirs(name):
    rows = load_table(name).rows
    assert [row.paper for row in rows] == PAPERS[name]
    of_simclr = [row for row in rows if row.group == "SimCLR"]
    assert all("published by the authors of SimCLR" in str(row.source) for row in of_simclr)


def test_every_table_is_held_to_the_papers_and_a_recipe_gives_the_same_number():
    assert sorted(PAPERS) == table_names()
    rows = [
        row for name in PAPERS for row in load_table(name).rows if not row.settings and isinstance(row.paper, float)
    ]
    assert len(rows) == 17
    for row in rows:
        expected = re.search(r"([\d.]+) % top-1|kNN ([\d.]+) %", load_recipe(row.base).about["expected"])
        assert expected is not None
        assert float(expected[1] or expected[2]) == row.paper, row


def test_a_row_is_its_base_with_the_settings_of_the_table_and_its_own(definition):
    rows = [{"group": "a", "label": "b/c", "base": "cifar10_small", "set": {"queue_size": 8, "model_args": {"x": 1}}}]
    table = load_table(definition(set={"queue_size": 4, "lr_milestones": [1, 2]}, rows=[*rows, *ROWS], x=None))
    (row, first, *_), seeds = table.rows, (3, 5)
    assert (row.title, row.folder, row.base, first.base) == ("a, b/c", "a_b_c", "cifar10_small", "quickstart")
    words = command.flags(row.settings)
    assert words == ["--lr_milestones", "1", "2", "--queue_size", "8", "--model_args", '{"x": 1}']
    cells = table.cells(Path("out"), seeds)
    assert [(cell.number, cell.seed) for cell in cells] == [(i, seeds[i // 4]) for i in range(8)]
    assert cells[4].folder == Path("out/a_b_c/seed5")


def test_the_wheel_has_every_data_file_of_the_package(monkeypatch):
    asked = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    packed = {path for pattern in asked["package_data"]["moco_hf"] for path in (ROOT / "training").glob(pattern)}
    data = {path for path in (ROOT / "training").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data == packed
    assert {TABLES / f"{name}.yaml" for name in table_names()} <= packed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rows": []}, "rows of .* must be a list of at least one"),
        ({"rows": [{"label": "!"}], "x": None}, "1 rows that are called '': give each a label"),
        ({"rows": [ROWS[0], ROWS[0]]}, "2 rows that are called 't_0.1'"),
        ({"rows": [{"lable": 1}]}, "key 'lable' in section 'rows' of .* did you mean 'label'"),
        ({"rows": [3]}, "has the row 3, which has no names"),
        ({"rows": [ROWS[0] | {"paper": [1]}]}, r"has paper \[1\], which is neither per cent nor words"),
        ({"rows": [ROWS[0] | {"set": {"temprature": 1}}]}, "row 'T 0.1' of mine: flag --temprature is unknown"),
        ({"rows": [ROWS[0] | {"set": {"lr_milestones": None}}]}, "lr_milestones has no value"),
        ({"base": "quick"}, "row 'T 0.1' of mine: recipe .'quick'. is neither"),
        ({"base": None}, "without a base recipe"),
        ({"measure": "accuracy"}, r"measure \(accuracy\) of .* must be one of linear probe, kNN"),
        ({"about": {"title": "x"}}, "has no paper"),
        ({"mesure": "kNN"}, "key 'mesure' in section 'table'"),
    ],
)
def test_a_wrong_table_is_named_in_one_line(changed, words, definition):
    with pytest.raises(ValueError, match=words) as error:
        parse_table([definition(**changed)])
    assert "\n" not in str(error.value)


def test_a_folder_of_a_table_says_which_and_can_be_read_as_one(definition, tmp_path):
    table = load_table(definition(rows=[*ROWS, {"group": "g", "label": "x"}]))
    command.claim(table, tmp_path / "out")
    command.claim(table, tmp_path / "out")
    again = load_table(str(tmp_path / "out" / "table.yaml"))
    assert (again.rows, again.about, again.measure, again.x) == (table.rows, table.about, table.measure, table.x)
    other = load_table(definition(about=ABOUT | {"title": "Another"}))
    with pytest.raises(ValueError, match="holds the table 'Temperatures', and this is 'Another': pass another"):
        command.claim(other, tmp_path / "out")
    begun = tmp_path / "begun" / f"{UNFINISHED}abc"  # by another job of an array, or by one that was killed
    begun.mkdir(parents=True)
    command.claim(table, begun.parent)
    assert load_table(str(begun.parent / "table.yaml")).rows == table.rows
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "table.md").write_text("mine")
    with pytest.raises(ValueError, match="holds files of something else"):
        command.claim(table, tmp_path / "work")
    assert (tmp_path / "work" / "table.md").read_text() == "mine"


# What is shown


def test_mean_deviation_and_interval_are_those_of_the_seeds(definition, tmp_path, ran):
    plan = plan_of(definition(), tmp_path, "--seeds", "0", "1", "2")
    values = {0: 90.0, 3: 91.5, 6: 93.0, 1: 50.0}
    for number, value in values.items():
        ran(plan, number, value)
    head, body, notes = shown(plan)
    std = (((90.0 - 91.5) ** 2 + (93.0 - 91.5) ** 2) / 2) ** 0.5
    low, high = WILSON[91.5]
    assert head == ["", "ours", "seeds", "95 % interval", "paper: ImageNet, 200 epochs", "ours - paper"]
    assert body == [
        ["T 0.1", f"91.50 ± {std:.2f}", "3 of 3", f"{low} to {high}", "60.5", "+31.00"],
        ["T 0.2", "50.00", "1 of 3", "44.86 to 55.14", "fails", "–"],
        ["T 0.5", "–", "0 of 3", "–", "–", "–"],
    ]
    assert plan.fill().progress.startswith("4 of 9 cells are done")
    assert (
        f"Ours: {KNN}, top-1, digits, test, n 360, backbone feature, 1437 train images, labels label, 10 classes."
        in notes
    )
    assert "Of another source, T 0.5: another paper." in notes
    assert "are not compared" not in notes


@pytest.mark.parametrize(
    ("words", "left", "said"),
    [
        (["--num_train_epochs", "2"], {}, "Changed in ours: num_train_epochs 2 (published: 30)."),
        ([], {"processes": 2}, "Changed in ours: processes 2 (published: 1)."),
        ([], {"protocol": "weighted kNN, k 5, T 0.07"}, "k 5"),
        (["--knn_temperature", "0.1"], {"protocol": "weighted kNN, k 200, T 0.1"}, "T 0.1"),
        ([], {"bank": 500}, KNN),
        ([], {"train_images": 500, "bank": 500}, "500 train images"),
        ([], {"label_column": "coarse_label", "classes": 5}, "labels coarse_label, 5 classes"),
        ([], {"n": 100}, "n 100"),
    ],
)
def test_numbers_of_other_conditions_stand_beside_the_papers_and_are_not_subtracted(
    words, left, said, definition, tmp_path, ran
):
    name = definition(rows=ROWS[:1])
    plan = plan_of(name, tmp_path, *words)
    ran(plan, 0, 91.5, **left)
    for seen in (plan, plan_of(name, tmp_path)):  # from the runs alone, whatever the command line says
        head, body, notes = shown(seen)
        assert head[-1] == "paper: ImageNet, 200 epochs"
        assert body[0] == ["T 0.1", "91.50", "1 of 1", body[0][3], "60.5"]
        assert said in notes
        assert "measured under other conditions, and are not compared with ours" in notes


@pytest.mark.parametrize(
    ("words", "data"),
    [
        ("", {}),
        ("--max_train_samples 500", {"train_images": 500}),
        ("--max_train_samples 5000", {}),
        ("--max_eval_samples 100", {"n": 100}),
        ("--label_column coarse_label", {"label_column": "coarse_label", "classes": 5}),
        ("--eval_split train", {"split": "train", "n": 1437}),
        ("--image_size 64 --eval_resize 64", {"view": "short side 64 px, centre 64 px"}),
    ],
)
def test_a_cell_is_done_by_a_probe_of_the_images_and_labels_that_were_asked_for(words, data, definition, tmp_path, ran):
    name = definition(measure="linear probe", rows=ROWS[:1])
    plan, usual = plan_of(name, tmp_path, f"--evaluation={words}"), plan_of(name, tmp_path)
    (cell,) = plan.cells
    ran(plan, 0, 70.0, protocol=plan.rows[cell.row.folder].planned.protocol, **data)
    assert plan.is_done(plan.find(cell))
    assert usual.is_done(usual.find(cell)) == (data == {})
    assert usual.fill().reproduced == plan.fill().reproduced == (data == {})
    if data:
        shutil.rmtree(cell.folder)
        ran(usual, 0, 70.0, protocol=usual.rows[cell.row.folder].planned.protocol)
        assert usual.is_done(usual.find(cell))
        assert not plan.is_done(plan.find(cell))


def test_runs_that_are_not_alike_are_not_put_together(definition, tmp_path, ran):
    plan = plan_of(definition(), tmp_path, "--seeds", "0", "1")
    other = plan_of(definition(), tmp_path, "--seeds", "0", "1", "--queue_size", "64")
    ran(plan, 0, 90.0)
    odd, stale = ran(other, 3, 95.0), ran(plan, 1, 80.0, model="0123456789abcdef")
    _, body, notes = shown(plan)
    assert [row[1:3] for row in body] == [["90.00", "1 of 2"], ["–", "0 of 2"], ["–", "0 of 2"]]
    assert f"Left out: {odd}, whose settings are changed in another way" in notes
    assert f"Left out: 1 results of {stale}, which are of other weights" in notes


def test_a_cell_that_was_measured_otherwise_is_left_out_with_a_word(definition, tmp_path, ran):
    plan = plan_of(definition(rows=NO_NUMBERS), tmp_path, "--seeds", "0", "1")
    ran(plan, 0, 90.0), ran(plan, 1, 80.0, protocol="linear probe, official")
    odd = ran(plan, 2, 95.0, split_revision="other images")
    _, body, notes = shown(plan)
    assert [row[1:3] for row in body] == [["90.00", "1 of 2"], ["–", "0 of 2"]]
    how = f"{KNN}, top-1, digits, test, evaluated images other images, n 360"
    assert f"Left out: {odd}, which was measured otherwise: {how}." in notes
    assert notes.count("Left out") == 1


def test_the_commits_of_a_cells_training_and_of_its_result_are_shown(definition, tmp_path, ran):
    plan = plan_of(definition(rows=NO_NUMBERS), tmp_path)
    ran(plan, 0, 90.0, commit="0123456789ab")
    assert "different commits" not in shown(plan)[2]
    ran(plan, 1, 90.0, commit="ba9876543210")
    measured = conditions()["commit"]
    assert [row[6] for row in plan.fill().cells] == [
        ", ".join(filter(None, (trained, measured))) for trained in ("0123456789ab", "ba9876543210")
    ]
    assert "Ours were trained by different commits of the code: 0123456789ab, ba9876543210." in shown(plan)[2]


@pytest.mark.slow
def test_one_change_of_rows_that_are_published_differently_is_one_change(definition, tmp_path, ran):
    rows = [{"label": t, "set": {"temperature": t, "weight_decay": t}, "paper": 60.0} for t in (0.1, 0.2)]
    plan = plan_of(definition(rows=rows), tmp_path, "--weight_decay", "0.2")
    assert "Changed in ours: weight_decay 0.2 (published: 0.1, 0.2)." in shown(plan)[2]
    ran(plan, 0, 90.0), ran(plan, 1, 91.0)
    head, body, notes = shown(plan_of(definition(rows=rows), tmp_path))
    assert [row[1] for row in body] == ["90.00", "91.00"]
    assert head[-1] == "paper: ImageNet, 200 epochs"
    assert "Changed in ours: weight_decay 0.2 (published: 0.1, 0.2)." in notes
    assert "Left out" not in notes


def test_unfinished_and_damaged_cells_are_states(definition, tmp_path, ran):
    plan = plan_of(definition(rows=NO_NUMBERS), tmp_path, "--seeds", "0", "1")
    ran(plan, 1), ran(plan, 3, 90.0)
    (ran(plan, 2, 70.0) / "results.json").write_text("{")
    filled = plan.fill()
    assert filled.progress.startswith("1 of 4 cells are done")
    assert [row[3].split(":")[0] for row in filled.cells] == ["not begun", "begun", "cannot be read", "ended"]
    assert filled.cells[3][4] == "90.00"
    text = to_markdown(filled, False)
    assert "| T 0.2 | 90.00 | 1 of 2 |" in text
    assert str(tmp_path) not in re.sub(r"cannot be read[^|]*", "", text)


@pytest.mark.slow
def test_a_table_is_written_at_any_moment_with_its_picture(definition, tmp_path, ran):
    plan = plan_of(definition(), tmp_path, "--seeds", "0", "1")
    plan.folder.mkdir()
    write(plan.fill(), plan.folder)
    assert "0 of 6 cells are done" in (plan.folder / "table.md").read_text()
    ran(plan, 0, 90.0), ran(plan, 3, 92.0), ran(plan, 1)
    damaged = ran(plan, 2, 70.0)
    (damaged / "results.json").write_text("{")
    write(plan.fill(), plan.folder)
    text, page = ((plan.folder / f"table.{kind}").read_text() for kind in ("md", "html"))
    assert "2 of 6 cells are done" in text
    assert "| T 0.1 | 91.00 ± 1.41 | 2 of 2 |" in text
    assert "| 1 | T 0.2 | 0 | begun |" in text
    assert "| 2 | T 0.5 | 0 | cannot be read: " in text
    assert "| 4 | T 0.2 | 1 | not begun |" in text
    assert str(tmp_path) not in re.sub(r"cannot be read[^|]*", "", text)
    assert "data:image/svg+xml;base64," in page
    assert (plan.folder / "table.png").stat().st_size > 10_000
    svg = (plan.folder / "table.svg").read_text()
    assert 'id="ours 0"' in svg
    assert 'id="paper 0"' in svg


@pytest.mark.slow
def test_seeds_that_are_there_count_even_where_they_were_not_asked_for(definition, tmp_path, ran):
    name = definition(rows=ROWS[:1])
    ran(plan_of(name, tmp_path, "--seeds", "4", "5"), 0, 90.0)
    _, body, _ = shown(plan_of(name, tmp_path))
    assert body[0][1:3] == ["90.00", "1 of 2"]


@pytest.mark.slow
def test_the_curves_of_a_figure_are_those_that_were_logged(definition, tmp_path, ran):
    plan = plan_of(definition(x="epoch"), tmp_path)
    for number in range(2):
        ran(plan, number, 90.0)
    plan.folder.mkdir(exist_ok=True)
    write(plan.fill(), plan.folder)
    svg = (plan.folder / "table.svg").read_text()
    lines = re.findall(r'<g id="Contrast top-1, % (\d)">\s*<path d="(.*?)"', svg, re.S)
    assert [(row, len(re.findall("[ML]", path))) for row, path in lines] == [("0", 3), ("1", 3)]


def test_words_of_strangers_are_shown_as_words(definition, tmp_path):
    attack = "<script>x|y</script>\u202e[a](b)"
    about = {name: f"{attack} {name}" for name in ABOUT}
    plan = plan_of(
        definition(about=about, rows=[ROWS[0] | {"label": attack, "paper": attack, "source": attack}]), tmp_path
    )
    filled = plan.fill()
    page, text = to_html(filled, None), to_markdown(filled, False)
    assert "<script" not in page
    assert html.escape("<script>x|y</script>\\u202e[a](b) title") in page
    assert "\\<script\\>x\\|y\\</script\\>\\\\u202e\\[a\\](b)" in text
    assert all(line.isprintable() for line in text.splitlines())


# The command

NO_NUMBERS = [row | {"paper": None} for row in ROWS[:2]]  # so that nothing is drawn
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
    command.claim(load_table(name), tmp_path / "out")
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
    command.claim(load_table(name), tmp_path / "elsewhere")
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


# Stops

NAP = "for i in $(seq 100); do sleep 0.05; done"
SAVES = "trap 'echo saved >> {place}; exit 75' INT TERM; kill -{signal} {parent}; " + NAP


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_a_command_once_and_no_other_is_started(number, tmp_path):
    place, children = tmp_path / "said", Children()
    body = SAVES.format(place=place, signal=number.name.removeprefix("SIG"), parent=os.getpid())
    with children.receiving():
        assert children.run(["bash", "-c", body]) == 75
        assert children.stopped_by == number
        assert children.run(["touch", str(tmp_path / "started")]) == -number
    assert place.read_text() == "saved\n"
    assert not (tmp_path / "started").exists()
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


def test_what_a_launcher_leaves_behind_is_waited_for(tmp_path):
    place, children = tmp_path / "said", Children()
    inner = f"trap 'sleep 0.5; echo saved > {place}; exit 75' INT; touch {place}.ready; {NAP}"
    with children.receiving():
        status = children.run([sys.executable, "-c", LAUNCHER, inner, f"{place}.ready"])
    assert status != 75
    assert place.read_text() == "saved\n"


LAUNCHER = """
import os, signal, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen(["bash", "-c", sys.argv[1]])
while not Path(sys.argv[2]).exists():
    time.sleep(0.02)
signal.signal(signal.SIGINT, lambda *_: os._exit(1))
os.kill(os.getppid(), signal.SIGINT)
child.wait()
"""


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
