"""The report is one file that tells all of a run, whatever state the run is in."""

import html
import json
import re
import shlex
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from html_page import Page

from modeling_moco import MoCoConfig, MoCoModel
from training.data.formats import load_digits
from training.data.images import MapImages
from training.data.sources import DataArguments, ImageSplits
from training.engine.page import NUMBERS, read_run, refresh_report, write_report
from training.engine.results import Result, append_results, encoder_digest, read_results
from training.evaluation.features import extract_features, unit
from training.reports.run import draw_features, spread_over_classes

ROOT = Path(__file__).parents[2]
FIGURES = ("training_curves", "neighbours", "tsne")
FLAGS = [
    *("--dataset_name", "digits", "--max_train_samples", "64", "--max_eval_samples", "24", "--image_size", "32"),
    *("--eval_resize", "32", "--queue_size", "64", "--global_batch_size", "16", "--knn_k", "5", "3", "--use_cpu"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False", "--disable_tqdm", "True"),
    *("--num_train_epochs", "2", "--eval_every_n_epochs", "1", "--logging_steps", "2"),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory, script) -> Path:
    """A run that has ended; tests copy it."""
    folder = tmp_path_factory.mktemp("runs") / "ended"
    script("pretrain").main([*FLAGS, "--output_dir", str(folder)])
    return folder


@pytest.fixture
def run(ended, tmp_path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "run"))


@pytest.fixture
def killed(run) -> Path:
    for path in run.iterdir():
        if path.is_file() and path.name != "recipe.yaml":
            path.unlink()
    (run / "checkpoint-8" / "manifest.json").unlink()  # killed while it was written
    return run


def test_a_run_leaves_its_history_its_last_knn_and_its_figures(ended):
    history = json.loads((ended / "trainer_state.json").read_text())["log_history"]
    last = [entry for entry in history if "eval_knn_top1" in entry][-1]
    results = read_results(ended)
    assert [(r["protocol"], r["value"], r["n"]) for r in results] == [
        ("weighted kNN, k 5, T 0.07", last["eval_knn_top1"], 24),
        ("weighted kNN, k 3, T 0.07", last["eval_knn_top1_k3"], 24),
    ]
    assert {r["model"] for r in results} == {encoder_digest(MoCoModel.from_pretrained(ended))}
    assert results[0]["data"]["dataset"] == "digits"
    for name in FIGURES:
        assert (ended / f"{name}.png").stat().st_size > 10_000
        ElementTree.parse(ended / f"{name}.svg")


def test_the_report_needs_no_other_file(ended):
    page = Page(ended / "report.html")
    assert "://" not in page.source
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    assert all(re.fullmatch(r"data:image/svg\+xml;base64,[\w+/=]+", a["src"]) for _, a in page.tags if "src" in a)
    assert not any(name in attrs for _, attrs in page.tags for name in ("href", "srcset", "style", "onload"))
    assert "url(" not in page.source
    assert "@import" not in page.source
    for name, content in zip(FIGURES, page.images.values(), strict=True):
        assert content == (ended / f"{name}.svg").read_bytes()
    assert "prefers-color-scheme: dark" in page.source
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_it_tells_all_settings_numbers_results_and_versions(run):
    about = {"dataset": "digits", "split": "test"}
    append_results(
        run, [Result("some probe", "top5", 98.76, 360, feature="head")], model="0123456789abcdef", data=about
    )
    write_report(read_run(run))
    text = Page(run / "report.html").text
    lines = text.splitlines()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for section, values in recipe.items():
        assert section in lines
        for key, value in values.items():
            shown = lines[lines.index(section) :][lines[lines.index(section) :].index(key) + 1 :][0:2]
            value = ", ".join(map(str, value)) if isinstance(value, list) else value
            assert (f"{value:.6g}" if isinstance(value, float) else str(value)) in shown, key
    metrics = json.loads((run / "metrics.json").read_text())
    assert lines[lines.index("kNN top-1 before training") + 1] == f"{metrics['knn_top1_before']:.2f} %"
    assert lines[lines.index("kNN top-1 of the saved weights") + 1] == f"{metrics['knn_top1_after']:.2f} %"
    for key in metrics:
        assert NUMBERS.get(key, (key,))[0] in lines
    entries = read_results(run)
    assert len(entries) == 3
    for entry in entries:
        low, high = entry["interval"]
        for shown in (
            entry["protocol"],
            f"{entry['value']:.2f} %",
            f"{low:.2f} to {high:.2f}",
            f"{entry['n']:,}",
            entry["date"],
            entry["model"],
        ):
            assert shown in lines, shown
    assert f"transformers\n{__import__('transformers').__version__}" in text
    assert "Ended. Step 8 of 8, epoch 2 of 2." in text
    assert recipe["about"]["title"] in lines


def test_a_scaled_learning_rate_is_told_as_the_optimizer_has_it(run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["training"] |= {"optim": "lars", "learning_rate": 0.6, "learning_rate_scaling": "linear"}
    (run / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"training": recipe["training"] | {"global_batch_size": 4096}})
    )
    write_report(read_run(run))
    lines = Page(run / "report.html").text.splitlines()
    assert ["learning_rate", "0.6 x 4096/256 = 9.6"] in [lines[i : i + 2] for i in range(len(lines))]
    assert ["optim", "lars"] in [lines[i : i + 2] for i in range(len(lines))]


def rows_of_results(path: Path) -> list[list[str]]:
    """Cells of the table of results; the words under a protocol are a cell."""
    table = path.read_text().partition('<table class="results">')[2].partition("</table>")[0]
    rows = [re.findall(r"(?:<t[hd]>|<small>)(.*?)(?=<)", row) for row in table.split("</tr>")]
    return [[html.unescape(cell) for cell in row] for row in rows if row]


def test_a_report_that_is_a_link_becomes_a_file_with_what_was_added(run, tmp_path):
    write_report(read_run(run))
    (run / "report.html").rename(tmp_path / "shown.html")
    (run / "report.html").symlink_to(tmp_path / "shown.html")
    before = (tmp_path / "shown.html").read_text()
    (run / "results.json").write_text(json.dumps([read_results(run)[0] | {"protocol": "measured since"}]))
    refresh_report(run)
    assert not (run / "report.html").is_symlink()
    assert rows_of_results(run / "report.html")[1][0] == "measured since"
    assert (tmp_path / "shown.html").read_text() == before


def test_a_section_without_settings_is_not_headed(run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"probe": {}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_report(read_run(run))
    assert re.findall(r"<h3>(data|model|training|probe)</h3>", Page(run / "report.html").source) == [
        *("data", "model", "training")
    ]


def test_the_numbers_come_first_and_each_once(run):
    write_report(read_run(run))
    knn, third = read_results(run)
    for command in ("this again", "and again"):
        (run / "results.json").write_text(json.dumps([*read_results(run), knn | {"command": command}]))
    (run / "results.json").write_text(json.dumps([*read_results(run), knn | {"model": "other", "value": 1.25}]))
    write_report(read_run(run))
    rows = rows_of_results(run / "report.html")
    assert rows[0] == ["protocol", "value", "95 % interval", "n"]
    low, high = knn["interval"]
    under = f"top-1 · backbone · weights {knn['model']} · digits, test · {knn['date'][:10]}"
    assert rows[1] == [knn["protocol"], under, f"{knn['value']:.2f} %", f"{low:.2f} to {high:.2f}", "24"]
    assert [(row[0], row[2]) for row in rows[2:]] == [
        (third["protocol"], f"{third['value']:.2f} %"),
        (knn["protocol"], "1.25 %"),
    ]
    page = Page(run / "report.html")
    assert page.source.count("<h3>weighted kNN") == 5  # every measurement has its conditions
    headings = re.findall(r"<h2>(.*?)</h2>", page.source)
    assert headings[:2] == ["Results", "Numbers of the run"]


def test_numbers_of_other_weights_are_told_apart(run):
    (knn, _), path = read_results(run), run / "results.json"
    path.write_text(json.dumps([knn | {"feature": "head", "model": "1" * 16}, knn]))  # a digest for each feature
    write_report(read_run(run))
    assert not any("weights" in row[1] for row in rows_of_results(run / "report.html")[1:])
    path.write_text(json.dumps([*read_results(run), knn | {"model": "0" * 16, "value": 1.25}]))
    write_report(read_run(run))
    under = {row[2]: row[1] for row in rows_of_results(run / "report.html")[2:]}
    end = f"digits, test · {knn['date'][:10]}"
    assert under == {
        f"{knn['value']:.2f} %": f"top-1 · backbone · weights {knn['model']} · {end}",
        "1.25 %": f"top-1 · backbone · weights {'0' * 16} · {end}",
    }


def test_its_commands_can_be_given_to_a_shell(ended, tmp_path):
    folder = Path(shutil.copytree(ended, tmp_path / "my runs" / "a & b"))
    (folder / "results.json").unlink()
    (folder / "neighbours.svg").unlink()
    write_report(read_run(folder))
    text = Page(folder / "report.html").text
    quoted = f"'{folder}'"
    assert f"neighbours is missing: draw it by python scripts/report.py {quoted}\n" in text
    for name in ("knn", "linear_probe"):
        assert f"python scripts/{name}.py {quoted}" in text.splitlines()


@pytest.mark.parametrize(("place", "path"), [(ROOT, "scripts/knn.py"), (ROOT / "scripts", "knn.py"), (None, None)])
def test_its_commands_are_those_of_the_place_where_it_is_written(place, path, run, tmp_path, monkeypatch):
    (run / "results.json").unlink()
    monkeypatch.chdir(place or tmp_path)
    write_report(read_run(run))
    (command,) = re.findall(r"^python .*knn\.py.*$", Page(run / "report.html").text, re.M)
    assert shlex.split(command) == ["python", path or str(ROOT / "scripts" / "knn.py"), str(run)]


def test_a_run_under_way_is_not_to_be_measured(killed):
    write_report(read_run(killed), missing="no images")
    page = Page(killed / "report.html")
    assert "None yet: they are measured of the weights that the run ends with." in page.text
    assert "scripts/knn.py" not in page.text


def test_what_was_not_measured_is_said_in_words(run):
    metrics = json.loads((run / "metrics.json").read_text())
    nothing = {"knn_top1_before": None, "knn_top1_after": None, "commit": None}
    (run / "metrics.json").write_text(json.dumps(metrics | nothing))
    write_report(read_run(run))
    lines = Page(run / "report.html").text.splitlines()
    assert lines[lines.index("kNN top-1 before training") + 1] == "not measured"
    assert lines[lines.index("kNN top-1 of the saved weights") + 1] == "not measured"
    assert "None" not in lines


@pytest.mark.slow
def test_an_evaluation_refreshes_the_report_and_shows_which_classes_it_confuses(run, script):
    seen = [(run / "report.html").read_text()]
    script("knn").main([str(run), "--use_cpu", "--knn_k", "2"])
    seen.append((run / "report.html").read_text())
    script("linear_probe").main([str(run), "--use_cpu", "--mode", "cached", "--num_train_epochs", "1"])
    seen.append((run / "report.html").read_text())
    finetune = ["--use_cpu", "--disable_tqdm", "True", "--max_steps", "1", "--global_batch_size", "16"]
    script("finetune").main([str(run), "--label_fraction", "0.5", *finetune, "--save_strategy", "no"])
    seen.append((run / "report.html").read_text())
    assert len(set(seen)) == 4
    assert "weighted kNN, k 2, T 0.07" in seen[1]
    assert "Which classes are confused" not in seen[1]
    page, results = Page(run / "report.html"), read_results(run)
    assert len(rows_of_results(run / "report.html")) == 1 + len(results)
    probes = json.loads((run / "linear_probe_cached" / "metrics.json").read_text())["probes"]
    tuned = json.loads((run / "finetune_50pct" / "metrics.json").read_text())["protocol"]
    confusions = {
        f"Mistakes of finetune_50pct, {tuned}": "finetune_50pct/confusion.svg",
        f"Mistakes of linear_probe_cached, {probes[0]['protocol']}": "linear_probe_cached/confusion_sgd.svg",
        f"Mistakes of linear_probe_cached, {probes[1]['protocol']}": "linear_probe_cached/confusion_lbfgs.svg",
    }
    for title, file in confusions.items():
        assert page.images[title] == (run / file).read_bytes()
    assert list(page.images) == ["Training", *confusions, "Nearest neighbours", "The space of features"]


def test_no_report_is_made_of_a_run_that_has_none_and_no_link_is_followed(run, tmp_path, script):
    (run / "neighbours.svg").unlink()
    (tmp_path / "private.svg").write_text("<svg/>")
    (run / "neighbours.svg").symlink_to(tmp_path / "private.svg")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "confusion.svg").write_text("<svg/>")
    (run / "linked").symlink_to(tmp_path / "elsewhere")
    write_report(read_run(run))
    page = Page(run / "report.html")
    assert list(page.images) == ["Training", "The space of features"]
    assert f"neighbours is missing: draw it by python scripts/report.py {run}" in page.text
    (run / "report.html").unlink()
    script("knn").main([str(run), "--use_cpu", "--knn_k", "2"])
    assert not (run / "report.html").exists()


def test_what_comes_from_files_is_escaped(run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["about"] |= {"title": "<script>alert(1)</script>", "source": '"><img src=x>'}
    recipe["probe"]["<i>key</i>"] = "<b>value</b>"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    attack = Result("<u>protocol</u>", "<s>metric</s>", 50.0, 4, settings={"<em>": "<hr>"})
    append_results(run, [attack], model="<a>", data={"dataset": "<q>", "split": "<q>"})
    write_report(read_run(run), missing="<form>why")
    page = Page(run / "report.html")
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "i", "b", "u", "s", "em", "hr", "a", "q", "form"})
    assert page.source.count("<img") == 3
    for words in ("<script>alert(1)</script>", '"><img src=x>', "<i>key</i>", "<u>protocol</u>", "<form>why"):
        assert html.escape(words) in page.source


def test_signs_that_turn_a_text_are_shown(run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["about"]["title"] = recipe["probe"]["optim"] = "a\u202eb\x1b"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_report(read_run(run))
    text = (run / "report.html").read_text()
    assert text.count("a\\u202eb\\x1b") == 4  # the title twice, and in both sections
    assert all(line.isprintable() for line in text.splitlines())


def test_the_report_of_a_killed_run_shows_its_newest_complete_checkpoint(killed, script, capsys):
    before = {path.name for path in killed.iterdir()}
    script("report").main([str(killed)])
    assert "Wrote" in capsys.readouterr().out
    page = Page(killed / "report.html")
    assert "Not ended: this is checkpoint-4, the newest complete checkpoint. Step 4 of 8, epoch 1 of 2." in page.text
    assert len(page.images) == 3
    written = {path.name for path in killed.iterdir()} - before
    assert written == {"report.html", *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))}
    curve = (killed / "training_curves.svg").read_text()
    assert 'id="loss"' in curve
    assert "<!-- k 5: " in curve  # of the two k of the monitor


def test_a_run_that_has_logged_nothing_has_a_report(killed):
    run = read_run(killed)
    write_report(replace(run, state=run.state | {"log_history": []}), missing="no images")
    page = Page(killed / "report.html")
    assert "training_curves is missing: nothing has been logged yet" in page.text
    assert page.images == {}


def test_an_ended_run_is_drawn_again_with_the_same_bytes(run, ended, script):
    for name in FIGURES:
        (run / f"{name}.svg").unlink()
    script("report").main([str(run)])
    assert (run / "tsne.svg").is_file()  # which magnifies the last bit of a feature, and kernels differ in it
    for name in set(FIGURES) - {"tsne"}:
        assert (run / f"{name}.svg").read_bytes() == (ended / f"{name}.svg").read_bytes()


def test_lost_images_cost_their_figures_only(killed, script, capsys):
    recipe = yaml.safe_load((killed / "recipe.yaml").read_text())
    recipe["data"]["dataset_name"] = "/lost/images"
    (killed / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    script("report").main([str(killed)])
    assert "no neighbours and no t-SNE: dataset_name (/lost/images) does not exist" in capsys.readouterr().err
    page = Page(killed / "report.html")
    assert list(page.images) == ["Training"]
    for name in ("neighbours", "tsne"):
        assert f"{name} is missing: dataset_name (/lost/images) does not exist" in page.text
    shutil.copy(killed / "training_curves.svg", killed / "tsne.svg")  # one drawn earlier
    script("report").main([str(killed)])
    page = Page(killed / "report.html")
    assert "Drawn earlier; not drawn again, because dataset_name (/lost/images) does not exist" in page.text
    assert "tsne is missing" not in page.text


@pytest.mark.slow
def test_a_stream_has_curves_and_says_what_is_missing(tmp_path, script, capsys):
    flags = ["--streaming", "--shuffle_buffer", "32", "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    script("pretrain").main([*FLAGS, *flags])
    assert list(Page(tmp_path / "run" / "report.html").images) == ["Training"]
    assert read_results(tmp_path / "run") == []
    script("report").main([str(tmp_path / "run")])
    assert "the images were streamed" in capsys.readouterr().err
    assert "neighbours is missing: the images were streamed" in Page(tmp_path / "run" / "report.html").text


def no_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").unlink()


def recipe_of_a_probe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"about": {}, "data": {}, "training": {}, "encoder": {}}))


def no_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint-4")


def damaged_results(folder: Path) -> None:
    (folder / "results.json").write_text("{")


def result_without_an_interval(folder: Path) -> None:
    append_results(
        folder, [Result("some probe", "top1", 90.0, 40)], model="0", data={"dataset": "digits", "split": "test"}
    )
    (entry,) = read_results(folder)
    del entry["interval"]
    (folder / "results.json").write_text(json.dumps([entry]))


def damaged_metrics(folder: Path) -> None:
    (folder / "metrics.json").write_text('{"loss": [2.0')


def state_of_another_kind(folder: Path) -> None:
    (folder / "trainer_state.json").write_text("[]")


def state_without_its_steps(folder: Path) -> None:
    (folder / "trainer_state.json").write_text('{"log_history": []}')


REFUSED = {
    no_recipe: "is not the folder of a pretraining run",
    recipe_of_a_probe: "is not the folder of a pretraining run",
    no_checkpoint: "has no complete checkpoint yet",
    damaged_results: "results.json is not a valid results file",
    result_without_an_interval: "results.json is not a valid results file (entry 1 has no interval): correct it, or move it",
    damaged_metrics: "metrics.json is not JSON",
    state_without_its_steps: "trainer_state.json has no global_step that can be shown: delete it",
    state_of_another_kind: "trainer_state.json is not JSON of names and values: delete it",
}


@pytest.mark.parametrize("damage", REFUSED)
def test_a_folder_without_a_run_is_refused_in_one_line(damage, killed, script, capsys):
    damage(killed)
    with pytest.raises(SystemExit) as end:
        script("report").main([str(killed)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert REFUSED[damage] in line
    assert not (killed / "report.html").exists()


def test_a_run_whose_results_are_damaged_is_not_continued(run, script, capsys):
    damaged_results(run)
    (run / "metrics.json").unlink()  # as before its end
    with pytest.raises(SystemExit):
        script("pretrain").main([*FLAGS, "--output_dir", str(run)])
    assert "results.json is not a valid results file" in capsys.readouterr().err
    assert (run / "results.json").read_text() == "{"


def test_without_labels_or_an_evaluation_split_neighbours_are_other_training_images(tmp_path):
    torch.manual_seed(0)
    model = MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=64)).eval()
    train = load_digits()["train"].cast_column("image", datasets.Image(decode=False)).select(range(40))
    data = DataArguments(image_size=32, eval_resize=32)
    draw_features(model, ImageSplits(train.remove_columns("label"), None, []), data, tmp_path)
    drawn = re.findall(r"<!-- (.*?) -->", (tmp_path / "neighbours.svg").read_text())
    assert drawn[:2] == ["query", "nearest of 32 training images, with cosine similarity"]
    features = unit(extract_features(model, MapImages(train, data.evaluation_view()))[0])
    queries = [40 * i // 8 for i in range(8)]
    others = [i for i in range(40) if i not in queries]
    expected = (features[queries] @ features[others].T).sort(descending=True).values[:, :7]
    assert [float(word) for word in drawn[2:]] == pytest.approx(expected.flatten().tolist(), abs=0.0051)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (list("aabbccddeeffgghh"), list("abcdefgh")),
        (list("hgfedcbahgfedcba"), list("abcdefgh")),
        (list("aaaabbbb"), list("aaaabbbb")),
        (list("ab"), list("ab")),
    ],
)
def test_queries_are_spread_over_the_classes(labels, classes):
    chosen = spread_over_classes(labels, 8)
    assert [labels[i] for i in chosen] == classes
    assert len(set(chosen)) == len(chosen)
