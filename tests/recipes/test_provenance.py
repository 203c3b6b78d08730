"""A run has the title and the expected result of a recipe where it is the recipe's run alone."""

import pytest

from training.recipe import load_recipe, parse_pretrain


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
