"""The README says what is there and what runs."""

import re
from pathlib import Path

import torch

from training.recipe import recipe_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs():
    block = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    names: dict = {}
    exec(compile(block.replace("224, 224", "32, 32"), "README.md", "exec"), names)
    assert names["features"].shape == (8, 512)
    assert names["model"].dictionary.queue_ptr.item() == 8
    assert torch.isfinite(names["outputs"].loss)


def test_the_recipe_table_is_complete():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.M)) == set(recipe_names())
