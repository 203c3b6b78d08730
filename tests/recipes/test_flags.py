"""The command line goes over a recipe, and says what it does not know, or cannot obey."""

import os
import sys
import warnings

import pytest
import torch
import yaml
from parsed_recipes import CPU, values_of

from training.cli import names_in_files, offered
from training.errors import one_line_errors
from training.recipe import PARTS, load_recipe, parse_pretrain, recipe_names


@pytest.fixture
def recipe_file(tmp_path):
    def write(content: dict):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


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
