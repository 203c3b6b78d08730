"""What a table shows of ours beside the paper's."""

import html
import json
import re
import shutil

import pytest
import yaml
from paper_tables import ABOUT, KNN, NO_NUMBERS, ROWS, plan_of

from training.engine.results import conditions
from training.reports.table_results import draw, to_html, to_markdown, write

WILSON = {91.5: (88.16, 93.96)}  # of 360 images, computed with 40 digits


def shown(plan) -> tuple[list[str], list[list[str]], str]:
    filled = plan.fill()
    return filled.head, filled.body, "\n".join(filled.notes())


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


def test_rows_that_are_measured_in_different_ways_are_not_compared(definition, tmp_path, ran):
    apart = "Rows that the table measures alike were measured in different ways"
    rows = [row | {"set": row["set"] | {"knn_k": k}} for row, k in zip(NO_NUMBERS, ([200], [5]), strict=True)]
    plan = plan_of(definition(rows=NO_NUMBERS), tmp_path)
    ran(plan, 0, 90.0), ran(plan, 1, 80.0, protocol="weighted kNN, k 5, T 0.07")
    assert apart in shown(plan)[2]
    assert apart not in shown(plan_of(definition(rows=rows), tmp_path))[2]  # which is what this table is of


def test_runs_that_are_not_alike_are_not_put_together(definition, tmp_path, ran):
    plan = plan_of(definition(), tmp_path, "--seeds", "0", "1")
    other = plan_of(definition(), tmp_path, "--seeds", "0", "1", "--queue_size", "64")
    ran(plan, 0, 90.0)
    odd, stale = ran(other, 3, 95.0), ran(plan, 1, 80.0, model="0123456789abcdef")
    _, body, notes = shown(plan)
    assert [row[1:3] for row in body] == [["90.00", "1 of 2"], ["–", "0 of 2"], ["–", "0 of 2"]]
    assert f"Left out: {odd}, whose settings are changed in another way" in notes
    assert f"Left out: 1 results of {stale}, which are of other weights" in notes


def test_a_table_is_of_the_settings_that_most_of_its_runs_have(definition, tmp_path, ran):
    plan = plan_of(definition(), tmp_path, "--seeds", "0", "1")
    other = plan_of(definition(), tmp_path, "--seeds", "0", "1", "--queue_size", "64")
    odd = ran(plan, 0, 90.0)
    ran(other, 1, 80.0), ran(other, 4, 82.0)
    _, body, notes = shown(plan)
    assert [row[1:3] for row in body] == [["–", "0 of 2"], ["81.00 ± 1.41", "2 of 2"], ["–", "0 of 2"]]
    assert f"Left out: {odd}, whose settings are changed in another way than those of most runs." in notes
    assert "queue_size 64 (published: 1024)" in notes


def test_a_row_that_the_table_had_before_is_left_out_with_a_word(definition, tmp_path, ran):
    plan = plan_of(definition(rows=NO_NUMBERS), tmp_path, "--seeds", "0", "5")
    ran(plan, 0, 90.0)
    gone = ran(plan, 3, 80.0)  # the second row with seed 5
    now = plan_of(definition(rows=NO_NUMBERS[:1]), tmp_path)
    _, body, notes = shown(now)
    assert [row[:3] for row in body] == [["T 0.1", "90.00", "1 of 1"]]
    assert f"Left out: {gone}, which is of no row of this table." in notes


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


def test_knn_curves_of_other_monitors_are_left_out_of_a_table(definition, tmp_path, ran):
    plan = plan_of(definition(rows=NO_NUMBERS, x="epoch"), tmp_path)
    for number in range(2):
        ran(plan, number, 90.0)
        path = plan.cells[number].folder / "trainer_state.json"
        state = json.loads(path.read_text())
        history = [entry | {"eval_knn_top1": 50.0} for entry in state["log_history"]]
        path.write_text(json.dumps(state | {"log_history": history}))
    assert draw(plan.fill(), tmp_path / "same")
    assert "kNN top-1" in (tmp_path / "same.svg").read_text()
    assert "curves are left out" not in shown(plan)[2]
    path = plan.cells[0].folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(recipe | {"training": recipe["training"] | {"knn_k": [5]}}))
    assert draw(plan.fill(), tmp_path / "other")
    assert "kNN top-1" not in (tmp_path / "other.svg").read_text()
    assert "The kNN curves are left out" in shown(plan)[2]


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
