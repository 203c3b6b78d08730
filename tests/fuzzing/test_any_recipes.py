"""Mutated recipes and flags are parsed, or refused in one line."""

import copy
import os
from unittest.mock import patch

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutations import (
    LONG,
    RECIPE_TREES,
    anything,
    mutated_yaml,
    refusal,
    yaml_bytes,
)

from training.recipe import load_recipe, parse_pretrain


@settings(max_examples=LONG or 100)
@example(data=b"\0")
@example(data=b"[" * 20_000)
@example(data=b"data: {image_size: !!int ''}")
@example(data=b"1: {}")
@example(data=b'data: {"\\e[2J": 1}')
@example(data=b"training: {learning_rate: .nan}")
@example(data=b"training: {learning_rate: 1" + b"0" * 400 + b"}")
@given(data=mutated_yaml(RECIPE_TREES))
def test_a_recipe_is_loaded_or_refused(place, data):
    with place() as folder:
        path = folder / "mine.yaml"
        path.write_bytes(data)
        refusal(lambda: load_recipe(str(path)), path)


@pytest.fixture
def _own_world():
    """Settings of transformers change the environment and the level of its log."""
    level = transformers.logging.get_verbosity()
    with patch.dict(os.environ):  # replaces nothing: it brings the environment back
        yield
    transformers.logging.set_verbosity(level)


KEYS = {
    "data": [
        "dataset_name",
        "image_size",
        "eval_resize",
        "crop_min_scale",
        "shuffle_buffer",
        "streaming",
        "view_backend",
        "decode",
    ],
    "model": [
        "architecture",
        "model_args",
        "queue_size",
        "temperature",
        "image_mean",
        "image_std",
        "batch_norm_splits",
    ],
    "training": [
        "learning_rate",
        "num_train_epochs",
        "lr_milestones",
        "knn_k",
        "report_to",
        "optim",
        "optim_args",
        "learning_rate_scaling",
        "warmup_epochs",
        "seed",
    ],
    "probe": ["learning_rates", "mode", "lr_milestones", "num_train_epochs", "learning_rate_scaling"],
}


@pytest.mark.filterwarnings("ignore")  # transformers warns of settings that it will drop
@pytest.mark.usefixtures("_own_world")
@settings(max_examples=LONG or 60)
@given(
    data=mutated_yaml(RECIPE_TREES),
    changes=st.lists(
        st.sampled_from([(section, key) for section, keys in KEYS.items() for key in keys]).flatmap(
            lambda place: st.tuples(st.just(place), anything)
        ),
        max_size=2,
    ),
)
@example(data=b"", changes=[(("data", "dataset_name"), None)])
@example(data=b"", changes=[(("model", "image_mean"), [0, 1, 0])])
@example(data=b"", changes=[(("training", "knn_k"), "200")])
def test_a_run_is_parsed_from_a_recipe_or_refused(place, data, changes):
    with place() as folder:
        path = folder / "mine.yaml"
        if changes:
            tree = copy.deepcopy(RECIPE_TREES[-1])
            for (section, key), value in changes:
                tree.setdefault(section, {})[key] = value
            data = yaml_bytes(tree)
        path.write_bytes(data)
        refusal(lambda: parse_pretrain(["--recipe", str(path), "--use_cpu", "--report_to", "none"]), as_printed=True)
