"""The papers' tables as files: their numbers, the commands of their rows, and the folder of one."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools
from paper_tables import ABOUT, ROWS

from training.commands.tables.plan import flags, parse_table, plan_row
from training.engine.files import UNFINISHED
from training.recipe import load_recipe
from training.reports.table import TABLES, claim, load_table, table_names

ROOT = Path(__file__).parents[2]


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
        plan = plan_row(table, row, [], [])
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
    words = flags(row.settings)
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
    claim(table, tmp_path / "out")
    claim(table, tmp_path / "out")
    again = load_table(str(tmp_path / "out" / "table.yaml"))
    assert (again.rows, again.about, again.measure, again.x) == (table.rows, table.about, table.measure, table.x)
    other = load_table(definition(about=ABOUT | {"title": "Another"}))
    with pytest.raises(ValueError, match="holds the table 'Temperatures', and this is 'Another': pass another"):
        claim(other, tmp_path / "out")
    begun = tmp_path / "begun" / f"{UNFINISHED}abc"  # by another job of an array, or by one that was killed
    begun.mkdir(parents=True)
    claim(table, begun.parent)
    assert load_table(str(begun.parent / "table.yaml")).rows == table.rows
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "table.md").write_text("mine")
    with pytest.raises(ValueError, match="holds files of something else"):
        claim(table, tmp_path / "work")
    assert (tmp_path / "work" / "table.md").read_text() == "mine"
