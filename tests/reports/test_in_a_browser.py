"""The report as people see it: in a browser, on a desk and in a hand, by day and by night."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from modeling_moco import MoCoConfig, MoCoModel
from training.cli import default_values
from training.engine.page import read_run, write_report
from training.engine.results import Result, append_results, encoder_digest
from training.recipe import PARTS
from training.reports.compare import compare, write

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed to look at the report with"
    ),
]

PROTOCOLS = [
    "weighted kNN, k 200, T 0.07",
    "linear probe, cached features, SGD, learning rate 0.1 0.3 1 3 10 30 by a held-out tenth, 100 epochs, a tenth at 60 80",
    "a-protocol-of-one-word-that-does-not-end-" * 4,
]
FIGURE = '<svg xmlns="http://www.w3.org/2000/svg" width="576pt" height="100pt"><rect width="9" height="9"/></svg>'
# What is wider than its place or lies outside the page. Figures may be scrolled where they would be too small to be read.
MEASURE = r"""
const inner = document.getElementById("page").contentDocument;
inner.querySelectorAll("details").forEach(d => d.open = true);
const root = inner.documentElement, wide = [], outside = [];
for (const e of inner.querySelectorAll("main, main *")) {
  const scroller = e.closest("figure div");
  if (scroller && e !== scroller) continue;
  if (!scroller && e.scrollWidth > e.clientWidth && e.clientWidth > 0) wide.push(e.tagName + " " + e.textContent.slice(0, 60));
  const box = e.getBoundingClientRect();
  if (box.left < -0.5 || box.right > root.clientWidth + 0.5) outside.push(e.tagName + " " + e.textContent.slice(0, 60));
}
for (const table of inner.querySelectorAll("table"))
  if (table.scrollWidth > table.parentElement.clientWidth) wide.push("table " + table.className);
const broken = [];  // numbers that do not stand on one line
const words = document.createTreeWalker(inner.body, NodeFilter.SHOW_TEXT), range = document.createRange();
while (words.nextNode()) {
  const number = words.currentNode.textContent.match(/\d[\d,.]*/);
  if (!number || !words.currentNode.parentElement.closest(".results td, .columns td + td")) continue;
  range.setStart(words.currentNode, number.index);
  range.setEnd(words.currentNode, number.index + number[0].length);
  if (new Set([...range.getClientRects()].map(box => box.top)).size > 1) broken.push(number[0]);
}
const style = (e, name) => getComputedStyle(e).getPropertyValue(name);
const figures = [...inner.querySelectorAll("figure img")].map(e => e.getBoundingClientRect().width);
const names = [...inner.querySelectorAll(".results td:first-child")].map(e => e.getBoundingClientRect().width);
const found = {wide, outside, broken, figures, names, page: root.scrollWidth, width: root.clientWidth,
  tables: inner.querySelectorAll("table").length,
  ink: style(inner.body, "color"), paper: style(inner.body, "background-color")};
document.body.innerHTML = "<pre>" + btoa(unescape(encodeURIComponent(JSON.stringify(found)))) + "</pre>";
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of a run whose names and numbers are as long as they get."""
    folder = tmp_path_factory.mktemp("a-folder-with-a-long-name-" * 3)
    about = {
        "title": "A title-of-one-word-that-does-not-end-anywhere-near-the-edge-of-a-page",
        "source": "nobody " * 20,
    }
    recipe = {"about": about, "data": {"dataset_name": "/one/path/" + "x" * 200}, "model": {"x" * 80: "y" * 200}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    state = {"global_step": 10**6, "max_steps": 10**6, "epoch": 200, "num_train_epochs": 200, "log_history": [{}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "metrics.json").write_text(json.dumps({"knn_top1_before": None, "data": {"revision": "0" * 300}}))
    (folder / "training_curves.svg").write_text(FIGURE)
    for protocol in PROTOCOLS:
        for metric, value in (("top1", 100.0), ("top5", 99.999)):
            result = Result(protocol, metric, value, 1_281_167, settings={"chosen": "z" * 90})
            data = {"dataset": "/home/somebody/pictures/of/" + "w" * 90, "split": "test"}
            append_results(folder, [result], model="0123456789abcdef", data=data)
    return write_report(read_run(folder))


@pytest.fixture(scope="module")
def comparison(report, tmp_path_factory) -> Path:
    """Such runs in one table, with many settings that differ, and many measurements."""
    folder = tmp_path_factory.mktemp("compared")
    folders = []
    for i in range(6):
        folders.append(Path(shutil.copytree(report.parent, folder / f"{i}-{report.parent.name}")))
        (folders[i] / "results.json").unlink()
        recipe = yaml.safe_load((folders[i] / "recipe.yaml").read_text())
        changed = {
            "queue_size": 64 * 2**i,
            "temperature": 0.1 + i,
            "architecture": "test_resnet",
            "x" * 60: "y" * 40 + str(i),
        }
        recipe["model"] = recipe["model"] | changed
        (folders[i] / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=64)).save_pretrained(folders[i])
        digest = encoder_digest(MoCoModel.from_pretrained(folders[i]))
        for protocol in PROTOCOLS:
            data = {"dataset": "/home/somebody/pictures/of/" + "w" * 90, "split": "test"}
            measured = [Result(f"{protocol}, {n}", "top1", 99.999, 1_281_167) for n in range(4)]
            append_results(folders[i], measured, model=digest, data=data)
    write(compare(folders, default_values(PARTS)), folder / "out")
    return folder / "out" / "comparison.html"


def look(report: Path, width: int, dark: bool, tmp_path: Path) -> dict:
    """What the browser measures of a report in a window of that width."""
    source = html.escape(report.read_text(encoding="utf-8"))
    frame = f'<iframe id="page" style="border: 0; width: {width}px; height: 900px" srcdoc="{source}"></iframe>'
    script = f"<script>window.onload = () => {{{MEASURE}}}</script>"
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><body style='margin: 0'>{frame}{script}", encoding="utf-8")
    scheme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/profile"]
    command = [str(BROWSER), *quiet, *scheme, f"--window-size={width + 200},1000", "--dump-dom", page.as_uri()]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<pre>([\w+/=]+)</pre>", text)
    assert found is not None, text[-500:]
    return dict(json.loads(base64.b64decode(found[1])))


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 390])
def test_no_table_scrolls_no_word_is_cut_and_figures_can_be_read(report, width, dark, tmp_path):
    seen = look(report, width, dark, tmp_path)
    assert seen["width"] == width
    assert seen["page"] <= width
    assert seen["tables"] > 10
    assert seen["wide"] == []
    assert seen["outside"] == []
    assert seen["broken"] == []
    assert min(seen["figures"]) >= 640
    assert min(seen["names"]) >= 100  # the protocols have room beside their numbers
    ink, paper = brightness(seen["ink"]), brightness(seen["paper"])
    assert (paper < 60 and ink > 200) if dark else (paper > 240 and ink < 60)


@pytest.mark.parametrize("width", [1280, 800, 390])
def test_a_comparison_of_long_names_is_read_without_scrolling(comparison, width, tmp_path):
    seen = look(comparison, width, False, tmp_path)
    assert seen["width"] == width
    assert seen["page"] <= width
    assert seen["tables"] == 3  # four rows of six side by side, the others, and all runs
    assert seen["wide"] == []
    assert seen["outside"] == []
    assert seen["broken"] == []
