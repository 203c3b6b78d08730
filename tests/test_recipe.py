"""Recipes hold the published numbers, the command line goes over them, and an output directory belongs to one run."""

import dataclasses
import os
import sys
import warnings

import pytest
import torch
import yaml

from modeling_moco import MoCoConfig
from training.cli import cores, names_in_files, offered
from training.engine.checkpoints import BatchLayout, claim_output_dir, write_manifest
from training.errors import one_line_errors
from training.recipe import PARTS, RECIPES, load_recipe, parse_pretrain, recipe_names

NAMES = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
CPU = ["--use_cpu", "--report_to", "none"]

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
LAYOUT = BatchLayout(processes=1, per_device_batch_size=128, accumulation=1, images=1437, workers=None)
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

PLACE = {"dataset": "digits", "content": {}}


def values_of(args) -> dict:
    """Every value of a parsed run."""
    training = {field.name: getattr(args.training, field.name) for field in dataclasses.fields(args.training)}
    return args.config.to_dict() | vars(args.data) | training


@pytest.fixture
def recipe_file(tmp_path):
    def write(content: dict):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


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


def test_without_a_recipe_the_quickstart_runs():
    assert parse_pretrain(CPU).recipe == load_recipe("quickstart")


@pytest.mark.skipif(sys.platform != "linux", reason="a process is not bound to a core there")
@pytest.mark.parametrize(
    ("flags", "started"),
    [
        ([], 1),
        (["--streaming", "True"], 8),  # whose order depends on them
        (["--dataloader_num_workers", "3"], 3),  # a flag is what is asked for
        (["--dataloader_num_workers", "1"], 1),
    ],
)
def test_a_recipe_starts_as_many_workers_as_there_are_cores(flags, started, capsys):
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            args = parse_pretrain(["--recipe", "photos_gpu", "--dataset_name", "digits", *flags, *CPU])
            torch.utils.data.DataLoader([0], num_workers=args.training.dataloader_num_workers)
    finally:
        os.sched_setaffinity(0, cores)
    asked = int(flags[1]) if "--dataloader_num_workers" in flags else 8
    assert args.training.dataloader_num_workers == started
    assert args.settings["training"]["dataloader_num_workers"] == asked  # which another machine may have cores for
    becomes = "stays" if started == asked else "becomes 1"
    said = f"dataloader_num_workers ({asked}) is more than the cores here (1), and {becomes}\n"
    assert capsys.readouterr().err == said * (asked > 1)


def test_flags_override_the_recipe():
    base = parse_pretrain(["--recipe", "moco_v1_r50_in1k_200ep", *CPU])
    flags = ["--temperature", "0.3", "--no_horizontal_flip", "--lr_milestones", "60", "80", "--output_dir", "elsewhere"]
    args = parse_pretrain(["--recipe=moco_v1_r50_in1k_200ep", *flags, *CPU])
    before, after = values_of(base), values_of(args)
    changed = {"temperature": 0.3, "horizontal_flip": False, "lr_milestones": [60, 80], "output_dir": "elsewhere"}
    assert {key for key in before if before[key] != after[key]} == changed.keys()
    assert {key: after[key] for key in changed} == changed
    assert args.settings["model"]["temperature"] == 0.3


def test_a_flag_without_a_value_takes_the_milestones_of_a_recipe_away():
    for rest in ([], ["--seed", "3"]):
        args = parse_pretrain(["--recipe", "moco_v1_r50_in1k_200ep", *CPU, "--lr_milestones", *rest])
        assert args.training.lr_milestones is args.settings["training"]["lr_milestones"] is None
        assert "lr_milestones" in args.changed


def test_a_batch_per_device_overrides_the_recipes_global_batch():
    args = parse_pretrain(["--recipe", "cifar10_r18_200ep", "--per_device_train_batch_size", "64", *CPU])
    assert (args.training.per_device_train_batch_size, args.training.global_batch_size) == (64, 64)
    args = parse_pretrain(["--global_batch_size", "96", "--gradient_accumulation_steps", "3", *CPU])
    assert (args.training.global_batch_size, args.training.per_device_train_batch_size) == (96, 32)
    with pytest.raises(ValueError, match=r"global_batch_size \(97\) must be a positive multiple of 3"):
        parse_pretrain(["--global_batch_size", "97", "--gradient_accumulation_steps", "3", *CPU])


def test_a_recipe_may_be_any_file(recipe_file):
    path = recipe_file({"model": {"model_args": {"img_size": 32}}, "data": {"image_size": 32}})
    args = parse_pretrain(["--recipe", str(path), *CPU])
    assert (args.config.model_args, args.data.image_size) == ({"img_size": 32}, 32)
    args = parse_pretrain(["--recipe", str(path), "--model_args", '{"img_size": 64}', *CPU])
    assert args.config.model_args == {"img_size": 64}


@pytest.mark.parametrize(
    ("argv", "content", "parts"),
    [
        (["--recipe", "moco_v2_r50"], None, ["recipe ('moco_v2_r50')", "did you mean 'moco_v2_r50_in1k_"]),
        ([], {"modle": {}}, ["section 'modle'", "did you mean 'model'"]),
        ([], {"model": {"temprature": 1}}, ["key 'temprature'", "section 'model'", "did you mean 'temperature'"]),
        ([], {"data": {"temperature": 1}}, ["key 'temperature'", "section 'data'"]),
        (["--learning_rte", "1"], {}, ["flag --learning_rte", "did you mean '--learning_rate'"]),
        (["--learning_rte=1"], {}, ["flag --learning_rte", "did you mean '--learning_rate'"]),
        # No prefixes: a flag that transformers adds tomorrow must not change what a command means.
        (["--temp", "1"], {}, ["flag --temp is unknown"]),
    ],
)
def test_unknown_names_are_answered_with_the_nearest_known_one(argv, content, parts, recipe_file):
    if content is not None:
        argv = [*argv, "--recipe", str(recipe_file(content))]
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the parts are the match)
        parse_pretrain([*argv, *CPU])
    for part in [*parts, "unknown" if content is not None else "neither a file nor one of"]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--temperature", "-1"], "temperature (-1.0) must be above 0"),
        (["--batch_norm", "ghost"], "batch_norm ('ghost') is unknown"),
        (["--eval_every_n_epochs", "0"], "eval_every_n_epochs (0)"),
        (["--recipe", "nothing"], "recipe ('nothing')"),
        (["--eval_resize", "8"], "eval_resize (8) is smaller than image_size (32)"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(argv, value, capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        parse_pretrain([*argv, *CPU])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert value in err
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_an_error_of_several_lines_is_joined_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError("one\n   two")
    assert capsys.readouterr().err == "error: one two\n"
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("x")


def test_only_the_main_process_prints_an_error(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise ValueError("once is enough")
    assert end.value.code == 2
    assert capsys.readouterr().err == ""


def test_help_lists_the_projects_own_flags_first(capsys):
    with pytest.raises(SystemExit) as end:
        parse_pretrain(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    headings = ["\ndata:", "\nmodel (MoCoConfig):", "\ntraining:", "\ntransformers.TrainingArguments:"]
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    own, inherited = text[: places[3]], text[places[3] :]
    for flag in ("--dataset_name", "--queue_size", "--knn_k", "--global_batch_size", "--learning_rate"):
        assert f"\n  {flag} " in own
        assert f"\n  {flag} " not in inherited
    assert "\n  --gradient_accumulation_steps " in inherited
    assert all(name in own for name in recipe_names())


# Where results go


PLACES = {
    *("output_dir", "report_to", "project", "run_name", "include_pictures"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy"),
}


@pytest.mark.parametrize("section", ["data", "model", "training", "probe"])
@pytest.mark.parametrize("key", sorted({*PLACES, "hub_token", "logging_dir"}))
def test_no_file_says_where_results_go_or_who_is_told(key, section, recipe_file):
    path = recipe_file({section: {key: "elsewhere"}})
    with pytest.raises(ValueError, match=rf"key '{key}' in section '{section}' of {path} would say where") as refused:
        parse_pretrain(["--recipe", str(path), *CPU])
    assert f"take it out, and pass --{key} if you want it" in str(refused.value)


def test_these_are_all_the_flags_that_a_file_may_not_set():
    flags = {f.name for kind in PARTS.values() for f in offered(kind)}
    assert flags - {name for kind in PARTS.values() for name in names_in_files(kind)} == PLACES


def test_a_run_does_not_record_where_its_results_went(claim, tmp_path):
    claim("--run_name", "mine", "--project", "birds", "--include_pictures", "True")
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert not [name for name in PLACES if f" {name}:" in recipe]


@pytest.mark.parametrize(
    "word",
    ["https://user:hunter2@host/run", "hf_" + "a1" * 16, "--run_name=https://:hunter2@host", "ghp_" + "a1" * 16],
)
def test_passwords_and_tokens_are_refused_and_not_repeated(word, recipe_file):
    flags = [word] if word.startswith("--") else ["--run_name", word]
    with pytest.raises(ValueError, match=r"\*\*\*.* has a token or a password") as refused:
        parse_pretrain([*flags, *CPU])
    assert "hunter2" not in str(refused.value)
    assert "a1a1" not in str(refused.value)
    path = recipe_file({"data": {"dataset_name": word.removeprefix("--run_name=")}})
    with pytest.raises(ValueError, match=r"'dataset_name' .* has a token or a password") as refused:
        parse_pretrain(["--recipe", str(path), *CPU])
    assert "hunter2" not in str(refused.value)


# Output directories


@pytest.fixture
def claim(tmp_path):
    def claim(*flags, folder=tmp_path / "run", place=PLACE):
        args = parse_pretrain(["--temperature", "0.2", "--output_dir", str(folder), *flags, *CPU])
        return claim_output_dir(args.training, LAYOUT, args.settings, args.defaults, args.about, place)

    return claim


def test_a_fresh_directory_gets_a_recipe_that_repeats_the_run(claim, tmp_path):
    assert claim("--queue_size", "512", "--per_device_train_batch_size", "64") is None
    args = parse_pretrain(["--temperature", "0.2", "--queue_size", "512", "--per_device_train_batch_size", "64", *CPU])
    again = parse_pretrain(["--recipe", str(tmp_path / "run" / "recipe.yaml"), *CPU])
    assert again.about == args.about
    assert again.config.to_dict() == args.config.to_dict()
    assert again.data == args.data
    assert again.settings == args.settings
    assert again.training.global_batch_size == 64


def test_the_same_settings_continue_from_the_newest_checkpoint(claim, tmp_path):
    assert claim() is None
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    assert claim() is None
    for step in (9, 10, 100):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir()
        write_manifest(tmp_path / "run" / f"checkpoint-{step}", LAYOUT)
    assert claim() == str(tmp_path / "run" / "checkpoint-100")
    # How fast the images are read and what is printed do not make another run.
    assert claim("--dataloader_num_workers", "2", "--logging_steps", "3") == str(tmp_path / "run" / "checkpoint-100")
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--per_device_eval_batch_size", "7", "--eval_every_n_epochs", "5", "--ddp_timeout", "99"],
        ["--save_strategy", "steps", "--save_steps", "3"],
        ["--eval_strategy", "no", "--save_strategy", "steps", "--dataloader_prefetch_factor", "4"],
        ["--seed", "0", "--weight_decay", "0.0005", "--queue_size", "1024"],  # what neither gave, or the recipe gives
    ],
)
def test_what_changes_no_weight_does_not_stand_in_the_way(flags, claim, tmp_path):
    claim()
    (tmp_path / "run" / "checkpoint-9").mkdir()
    write_manifest(tmp_path / "run" / "checkpoint-9", LAYOUT)
    assert claim(*flags) == str(tmp_path / "run" / "checkpoint-9")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--save_steps", "500"], "save_steps (500) has no effect, it is for --save_strategy steps"),
        (["--logging_strategy", "epoch", "--logging_steps", "5"], "it is for --logging_strategy steps"),
        (["--adam_beta1", "0.5"], "adam_beta1 (0.5) has no effect, --optim sgd does not read it"),
        (["--optim", "adafactor", "--adam_epsilon", "0.1"], "--optim adafactor does not read it"),
    ],
)
def test_a_flag_that_the_other_settings_leave_without_effect_is_refused(flags, words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        parse_pretrain([*CPU, *flags])
    assert words in str(refusal.value)


def test_the_monitor_looks_between_epochs_alone():
    with pytest.raises(
        ValueError, match=r"argument --eval_strategy.*invalid choice: 'steps' \(choose from .*no.*epoch"
    ):
        parse_pretrain([*CPU, "--eval_strategy", "steps"])


def test_the_settings_of_adam_stay_where_adam_is():
    training = parse_pretrain([*CPU, "--optim", "adamw_torch", "--adam_beta1", "0.5"]).training
    assert training.adam_beta1 == 0.5
    assert load_recipe("moco_v3_vit_small_in1k_300ep").values["optim"] == "adamw_torch"


@pytest.mark.parametrize("name", ["use_cache", "liger_kernel_config", "activation_checkpointing_kwargs"])
def test_no_flag_is_offered_that_nothing_here_reads(name):
    assert name not in {f.name for kind in PARTS.values() for f in offered(kind)}


def test_a_folder_of_images_is_the_same_by_any_of_its_paths(claim, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    claim("--dataset_name", "base")
    (tmp_path / "run" / "checkpoint-9").mkdir()
    write_manifest(tmp_path / "run" / "checkpoint-9", LAYOUT)
    for path in ("base/", "./base", str(tmp_path / "base"), "link", "other/../base"):
        assert claim("--dataset_name", path) == str(tmp_path / "run" / "checkpoint-9")
    for path in ("other", "basis"):
        with pytest.raises(ValueError, match=f"another run: dataset_name is .*base there and .*{path} here"):
            claim("--dataset_name", path)


@pytest.mark.parametrize(
    ("then", "now"), [("digits", "./digits"), ("org/photos", "org/photos"), ("./digits", "digits")]
)
def test_a_folder_is_not_the_dataset_of_its_name_on_the_hub_or_built_in(then, now, claim, tmp_path, monkeypatch):
    """A run went on with the images of the folder, if it had as many."""
    monkeypatch.chdir(tmp_path)
    if then.startswith("."):
        (tmp_path / then).mkdir()
    claim("--dataset_name", then)
    (tmp_path / "run" / "checkpoint-9").mkdir()
    (tmp_path / now).mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match="another run: dataset_name is "):
        claim("--dataset_name", now)


def test_a_dataset_that_was_moved_behind_a_link_is_compared_with_what_it_was(claim, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    content = {"train": "12 images 1"}
    claim("--dataset_name", str(photos), place={"dataset": str(photos), "content": content})
    (tmp_path / "run" / "checkpoint-9").mkdir()
    photos.rename(tmp_path / "moved")
    photos.symlink_to(tmp_path / "moved")
    moved = {"dataset": str(tmp_path / "moved"), "content": content}
    assert claim("--dataset_name", str(photos), place=moved) is None
    with pytest.raises(ValueError, match="split 'train' was 12 images 1 and is 12 images 2"):
        claim("--dataset_name", str(photos), place=moved | {"content": {"train": "12 images 2"}})


def test_another_probe_section_of_a_recipe_does_not_make_another_run(claim, tmp_path):
    claim()
    path = tmp_path / "run" / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(recipe | {"probe": {"learning_rate": 7.0}}))
    (tmp_path / "run" / "checkpoint-9").mkdir()
    write_manifest(tmp_path / "run" / "checkpoint-9", LAYOUT)
    assert claim() == str(tmp_path / "run" / "checkpoint-9")


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--queue_size", "512"], "queue_size is 1024 there and 512 here"),
        (["--max_train_samples", "99"], "max_train_samples is None there and 99 here"),
        (["--learning_rate", "0.5"], "learning_rate is 0.06 there and 0.5 here"),
        (["--seed", "1"], "seed is 0 there and 1 here"),
        # Results name them beside numbers that the run has logged before.
        (["--knn_temperature", "0.2"], "knn_temperature is 0.07 there and 0.2 here"),
        (["--knn_bank_size", "9"], "knn_bank_size is None there and 9 here"),
        (["--knn_features", "head"], "knn_features is backbone there and head here"),
    ],
)
def test_other_settings_are_refused_by_their_name(flags, difference, claim, tmp_path):
    claim()
    (tmp_path / "run" / "checkpoint-1").mkdir()
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    with pytest.raises(ValueError, match=f"another run: {difference}.*--output_dir"):
        claim(*flags)
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


def test_a_run_that_crashed_before_its_first_checkpoint_does_not_stand_in_the_way(claim, tmp_path):
    claim()
    claim("--queue_size", "512")
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["model"]["queue_size"] == 512


def test_a_run_goes_on_with_the_images_that_it_was_begun_with(claim, tmp_path):
    then = {"dataset": "/data/birds", "content": {"train": "12 images aa", "test": "3 images bb"}}
    claim(place=then)
    (tmp_path / "run" / "checkpoint-1").mkdir()
    write_manifest(tmp_path / "run" / "checkpoint-1", LAYOUT)
    assert claim(place=then) is not None
    now = {"dataset": "/data/birds", "content": {"train": "13 images cc", "test": "3 images bb"}}
    with pytest.raises(ValueError, match="split 'train' was 12 images aa and is 13 images cc"):
        claim(place=now)


@pytest.mark.parametrize("linked", [False, True])
def test_a_run_does_not_lie_in_its_dataset(linked, claim, tmp_path):
    """Or the next one would train on its figures, and no evaluation would find the images that it has seen."""
    photos = tmp_path / "photos"
    (photos / "a").mkdir(parents=True)
    folder = photos / "a" / "run"
    if linked:
        (tmp_path / "link").symlink_to(photos / "a")
        folder = tmp_path / "link" / "run"
    place = {"dataset": str(photos), "content": {"train": "1 images 0"}}
    with pytest.raises(ValueError, match=f"^{folder} lies in {photos}, and would be read as part of it"):
        claim(folder=folder, place=place)
    assert not folder.exists()
    claim(folder=tmp_path / "photos_run", place=place)


def test_files_of_something_else_are_left_alone(claim, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("words")
    for path in (folder, folder / "chapter1.tex"):
        with pytest.raises(ValueError, match=r"holds files of something else: pass another --output_dir"):
            claim(folder=path)
    assert [path.name for path in folder.iterdir()] == ["chapter1.tex"]
    assert (folder / "chapter1.tex").read_text() == "words"


# What a run may say of itself


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--max_grad_norm", "0"],  # the default, which the recipe leaves alone
        [
            "--dataset_name",
            "digits",
            "--output_dir",
            "elsewhere",
            "--save_strategy",
            "steps",
            "--save_steps",
            "5",
            "--logging_steps",
            "1",
        ],
        ["--disable_tqdm", "True", "--dataloader_num_workers", "0", "--per_device_eval_batch_size", "7"],
    ],
)
def test_a_run_of_a_recipe_has_its_title_source_and_expected_result(flags):
    args = parse_pretrain([*flags, "--use_cpu"])
    assert args.changed == []
    assert args.about == load_recipe("quickstart").about


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--dataset_name", "my/photographs"], "dataset_name"),
        (["--num_train_epochs", "1", "--temperature", "0.5"], "num_train_epochs, temperature"),
        (["--max_train_samples", "60"], "max_train_samples"),
        (["--seed", "3"], "seed"),
        (["--image_mean", "0.5", "0.5", "0.5"], "image_mean"),
    ],
)
def test_another_run_says_what_it_is_based_on_and_what_differs(flags, changed):
    args = parse_pretrain([*flags, "--use_cpu"])
    names = [name.strip() for name in args.about["title"].partition("changed: ")[2].split(",")]
    assert args.about.keys() == {"title"}
    assert args.about["title"].startswith("Based on recipe quickstart, changed: ")
    assert sorted(names) == sorted(changed.split(", "))


def test_a_run_of_the_recipe_of_a_run_says_what_that_one_was_based_on(claim, tmp_path):
    claim("--seed", "3")
    again = parse_pretrain(["--recipe", str(tmp_path / "run" / "recipe.yaml"), "--use_cpu", "--queue_size", "256"])
    assert again.about == {"title": "Based on recipe quickstart, changed: seed, changed: queue_size"}


def test_a_recipe_for_eight_processes_is_another_run_in_one():
    args = parse_pretrain(["--recipe", "moco_v2_r50_in1k_200ep", "--use_cpu"])
    assert args.recipe.processes == 8
    assert args.about == {"title": "Based on recipe moco_v2_r50_in1k_200ep, changed: processes"}
    synced = parse_pretrain(["--recipe", "moco_v2_r50_in1k_200ep", "--use_cpu", "--batch_norm", "sync"])
    assert "processes" not in synced.changed
