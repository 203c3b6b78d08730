"""The documents say what is there and what runs."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import moco_config

from modeling_moco import MoCoImageProcessor, MoCoModel
from training.recipe import recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")]
TEMPLATE = ROOT / "model_card.md"  # its links are of a published folder


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _python(name: str) -> str:
    block = re.search(r"```python\n(.*?)```", _read(name), re.S)
    assert block is not None
    return block.group(1)


def test_the_features_of_the_readme_come_out_of_a_saved_run(tmp_path, monkeypatch):
    config = moco_config()
    MoCoModel(config).save_pretrained(tmp_path / "runs" / "quickstart")
    MoCoImageProcessor().save_pretrained(tmp_path / "runs" / "quickstart")
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(_python("README.md"), "README.md", "exec"), names)
    assert names["features"].shape == (1, names["model"].encoder_q.num_features)


def test_the_training_step_of_the_design_page_runs():
    names: dict = {}
    exec(compile(_python("docs/design.md").replace("224, 224", "32, 32"), "docs/design.md", "exec"), names)
    assert names["features"].shape == (8, 512)
    assert names["model"].dictionary.queue_ptr.item() == 8
    assert torch.isfinite(names["outputs"].loss)


def test_the_readme_is_short_and_with_the_page_of_methods_lists_every_recipe():
    readme = _read("README.md")
    assert len(readme.splitlines()) <= 180
    of_methods = _read("docs/methods.md").partition("## Recipes")[2]
    first_cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", readme + of_methods, re.M)
    assert sorted(re.findall(r"\w+", " ".join(first_cells))) == recipe_names()


def test_the_map_has_every_module_in_its_folder_and_no_other():
    folder, mapped = "", set()
    tree = re.search(r"```\n(modeling_moco/.*?)```", _read("docs/design.md"), re.S)
    assert tree is not None
    for line in tree.group(1).splitlines():
        if not line.startswith(" "):
            folder = line.split()[0]
        elif module := re.match(r"  (\w+\.py)\b", line):
            mapped.add(folder + module.group(1))
    modules = {
        path.relative_to(ROOT).as_posix()
        for top in ("modeling_moco", "training", "scripts")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert mapped == modules


def _anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page != TEMPLATE], ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):  # another site
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page != TEMPLATE], ids=lambda page: page.name)
def test_files_of_the_project_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(
        r"\b(?:configs|scripts|tests|training)/[a-z0-9_/-]+\.(?:py|yaml|sbatch|safetensors)\b", text
    ):
        assert (ROOT / name).is_file(), name
