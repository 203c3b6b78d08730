"""Recipes hold the published numbers."""

import dataclasses

import pytest
import yaml
from parsed_recipes import CPU, values_of

from modeling_moco import MoCoConfig
from training.cli import cores
from training.recipe import RECIPES, load_recipe, parse_pretrain

NAMES = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]

# arXiv:1911.05722, arXiv:2003.04297 and the official scripts; the last one is the official CIFAR-10 notebook.
IMAGENET = {
    "architecture": "resnet50",
    "stem": "default",
    "projection_dim": 128,
    "queue_size": 65536,
    "key_momentum": 0.999,
    "batch_norm": "shuffle",
    "learning_rate": 0.03,
    "weight_decay": 1e-4,
    "global_batch_size": 256,
    "image_size": 224,
}
V1 = {"temperature": 0.07, "projection_head": "linear", "augmentation": "v1", "lr_milestones": [120, 160]}
V2 = {"temperature": 0.2, "projection_head": "mlp", "augmentation": "v2", "lr_milestones": None}
PUBLISHED = {
    "moco_v1_r50_in1k_200ep": IMAGENET | V1 | {"num_train_epochs": 200},
    "moco_v2_r50_in1k_200ep": IMAGENET | V2 | {"num_train_epochs": 200},
    "moco_v2_r50_in1k_800ep": IMAGENET | V2 | {"num_train_epochs": 800},
    "cifar10_r18_200ep": {
        "architecture": "resnet18",
        "stem": "small",
        "projection_head": "linear",
        "projection_dim": 128,
        "queue_size": 4096,
        "key_momentum": 0.99,
        "temperature": 0.1,
        "batch_norm": "split",
        "batch_norm_splits": 8,
        "augmentation": "cifar",
        "horizontal_flip": True,
        "image_size": 32,
        "image_mean": [0.4914, 0.4822, 0.4465],
        "image_std": [0.2023, 0.1994, 0.2010],
        "num_train_epochs": 200,
        "global_batch_size": 512,
        "learning_rate": 0.06,
        "weight_decay": 5e-4,
        "lr_milestones": None,
        "knn_k": [200],
        "knn_features": "head",
        "knn_temperature": 0.1,
    },
}
for letter, changes in {"a": {"projection_head": "mlp", "temperature": 0.2}, "b": {"augmentation": "v2"}}.items():
    PUBLISHED[f"moco_v2_{letter}_r50_in1k_200ep"] = IMAGENET | V1 | changes
PUBLISHED["moco_v2_c_r50_in1k_200ep"] = PUBLISHED["moco_v2_a_r50_in1k_200ep"] | {"augmentation": "v2"}
PUBLISHED["cifar10_r18_symmetric_200ep"] = PUBLISHED["cifar10_r18_200ep"] | {"symmetric_loss": True}
PUBLISHED["cifar10_r18_200ep"]["symmetric_loss"] = False
EXPECTED = {
    "moco_v1_r50_in1k_200ep": "60.6",
    "moco_v2_r50_in1k_200ep": "67.5",
    "moco_v2_r50_in1k_800ep": "71.1",
    "moco_v2_a_r50_in1k_200ep": "66.2",
    "moco_v2_b_r50_in1k_200ep": "63.4",
    "moco_v2_c_r50_in1k_200ep": "67.3",
    "cifar10_r18_200ep": "82.6",
    "cifar10_r18_symmetric_200ep": "85.3",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_what_it_reproduces_in_known_keys(name):
    content = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about.keys() == {"title", "source", "command", "hardware", "expected"}
    assert all(isinstance(text, str) and text for text in recipe.about.values())
    assert f"--recipe {name}" in recipe.about["command"]
    model_keys = {field.name for field in dataclasses.fields(MoCoConfig)}
    assert content["model"].keys() <= model_keys
    assert content.keys() <= {"about", "data", "model", "training", "probe"}


# arXiv:2003.04297, accuracy by temperature, without and with the MLP head
TEMPERATURES = {
    "moco_v1_r50_in1k_200ep": {0.07: 60.6, 0.1: 60.7, 0.2: 59.0, 0.3: 58.2, 0.4: 57.2, 0.5: 56.4},
    "moco_v2_a_r50_in1k_200ep": {0.07: 62.9, 0.1: 64.9, 0.2: 66.2, 0.3: 65.7, 0.4: 65.0, 0.5: 64.3},
}


@pytest.mark.parametrize("base", TEMPERATURES)
def test_recipes_of_temperatures_differ_from_their_base_in_nothing_else(base):
    of_base = load_recipe(base)
    for temperature, top1 in TEMPERATURES[base].items():
        own = temperature == of_base.value("temperature")
        recipe = of_base if own else load_recipe(f"{base}_t{round(100 * temperature):02d}")
        assert recipe.values == of_base.values | {"temperature": temperature}
        assert f"{top1} %" in recipe.about["expected"]


# The settings of the official code, as docs/methods.md has them.
METHODS = {
    "end_to_end_r50_in1k": {
        "dictionary": "batch",
        "key_encoder": "shared",
        "batch_norm": "shuffle",
        "symmetric_loss": False,
    },
    "memory_bank_r50_in1k": {"dictionary": "bank", "key_encoder": "none", "bank_momentum": 0.5, "queue_size": 65536},
    "simclr_r50_in1k_200ep": {
        **{"dictionary": "batch_both_views", "key_encoder": "none", "symmetric_loss": True, "batch_norm": "sync"},
        **{"temperature": 0.1, "optim": "lars", "optim_args": "momentum=0.9,classic=true", "warmup_epochs": 10},
        **{
            "projection_head": "simclr",
            "augmentation": "simclr",
            "learning_rate": 0.075,
            "learning_rate_scaling": "sqrt",
        },
    },
    "moco_v3_r50_in1k_100ep": {
        **{"dictionary": "batch", "key_encoder": "momentum", "symmetric_loss": True, "batch_norm": "sync"},
        **{"temperature": 1.0, "loss_scale": 2.0, "key_momentum": 0.99, "key_momentum_schedule": "cosine"},
        **{"projection_head": "mlp_bn", "projection_layers": 2, "projection_hidden_dim": 4096, "projection_dim": 256},
        **{"prediction_head": "mlp", "zero_init_residual": True, "crop_min_scale": 0.2, "augmentation": "v3"},
        **{"optim": "lars", "learning_rate": 0.6, "learning_rate_scaling": "linear", "warmup_epochs": 10},
        **{"weight_decay": 1e-6, "global_batch_size": 4096},
    },
    "moco_v3_vit_small_in1k_300ep": {
        **{"temperature": 0.2, "loss_scale": 0.4, "stem": "moco_v3", "model_args": {"num_heads": 12}},
        **{"projection_layers": 3, "prediction_head": "mlp_bn", "crop_min_scale": None, "augmentation": "v3"},
        **{"optim": "adamw_torch", "learning_rate": 1.5e-4, "warmup_epochs": 40, "weight_decay": 0.1},
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_recipes_of_the_other_methods_have_the_settings_of_their_code(name):
    values = values_of(parse_pretrain(["--recipe", name, *CPU]))
    assert {key: values[key] for key in METHODS[name]} == METHODS[name]


@pytest.mark.parametrize("name", NAMES)
def test_parsed_arguments_are_the_recipes_values(name):
    content = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    args = parse_pretrain(["--recipe", name, *CPU])
    for section, parsed in (("data", args.data), ("model", args.config), ("training", args.training)):
        expected = dict(content[section])
        if "dataloader_num_workers" in expected:
            expected["dataloader_num_workers"] = min(expected["dataloader_num_workers"], cores())
        assert {key: getattr(parsed, key) for key in expected} == expected
        assert content[section].items() <= args.settings[section].items()
    assert args.settings["probe"] == content.get("probe", {})
    assert args.training.output_dir == f"runs/{name}"
    assert args.training.global_batch_size == content["training"]["global_batch_size"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_reproduction_has_the_published_numbers(name):
    args = parse_pretrain(["--recipe", name, *CPU])
    values = values_of(args)
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert EXPECTED[name] in args.recipe.about["expected"]
    training = args.training
    # SGD with momentum 0.9, a cosine or steps without warm-up, whole batches, no clipping.
    assert (training.optim, training.optim_args, training.lr_scheduler_type) == ("sgd", "momentum=0.9", "cosine")
    assert (training.get_warmup_steps(1000), training.max_grad_norm, training.dataloader_drop_last) == (0, 0, True)
