"""What the main job says, or refuses in one line, before any time is spent."""

import json
import math
import re
import shlex

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from short_runs import ROOT, TINY, launch

from training.commands.pretrain import next_command
from training.data.formats import load_digits
from training.data.sources import ImageSplits, load_images
from training.pretrain import announce, build_trainer
from training.recipe import parse_pretrain

REFUSED = {
    "preview of another kind": (["--preview_views", "views.jpg"], "must end in .png or .svg"),
    "preview without a folder": (["--preview_views", "/no/such/views.png"], "/no/such, which is no folder"),
    "preview in place of a folder": (["--preview_views", str(ROOT / "tests")], "needs the name of the folder"),
    "missing dataset": (["--dataset_name", "/no/such/folder"], "/no/such/folder"),
    "missing column": (["--image_column", "picture"], "image_column ('picture')"),
    "unknown recipe": (["--recipe", "quikstart"], "did you mean 'quickstart'"),
    "unknown flag": (["--quue_size", "64"], "did you mean '--queue_size'"),
    "unknown backbone": (["--architecture", "resnet51"], "architecture ('resnet51')"),
    "queue below the batch": (["--queue_size", "8"], "queue_size (8) is smaller than the keys of a global batch (16)"),
    "dataset below a batch": (["--max_train_samples", "10"], "the dataset (10 images) is smaller"),
    "image size": (["--architecture", "vit_tiny_patch16_224"], "image_size (32) is refused by vit_tiny_patch16_224"),
    "one value to normalise": (
        ["--stem", "default", "--batch_norm", "split", "--batch_norm_splits", "16"],
        "BatchNorm would have 1 value of a channel at once (1 image, whose last map has 1 pixel at 32 px): raise",
    ),
    "neighbours above the bank": (["--knn_k", "65"], "knn_k (65) is larger"),
    "no bank": (["--knn_bank_size", "-5"], "knn_bank_size (-5) must be at least 1 image"),
    "output below a file": (["--output_dir", __file__ + "/run"], "cannot be written"),
    "one checkpoint": (["--save_total_limit", "1"], "save_total_limit (1) must be at least 2"),
    "not a number": (["--learning_rate", "fast"], "invalid float value: 'fast'"),
    "not a choice": (["--augmentation", "v9"], "augmentation ('v9') is unknown: choose one of v1, v2"),
    "bad value": (["--temperature", "0"], "temperature (0.0) must be above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_before_training(case, tmp_path, script, capsys):
    flags, message = REFUSED[case]
    with pytest.raises(SystemExit) as end:
        script("pretrain").main([*TINY, "--output_dir", str(tmp_path / "run"), *flags])
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


WARNED = {
    "rate": (["--batch_norm", "plain"], "for 16 the linear rule gives 0.0075"),
    "leak": (["--batch_norm", "shuffle", "--learning_rate", "0.1"], "nobody to shuffle with"),
    "small groups": (
        ["--batch_norm", "split", "--batch_norm_splits", "16", "--image_size", "64", "--eval_resize", "64"],
        "BatchNorm sees 1 image at once",
    ),
    "weights of timm": (
        ["--architecture", "test_resnet.r160_in1k"],
        "architecture (test_resnet.r160_in1k) names weights of timm, and the run begins with random ones all the same: pass "
        "--architecture test_resnet, or --init_from timm/test_resnet.r160_in1k to begin with those",
    ),
    "queue": (
        ["--queue_size", "128", "--symmetric_loss", "True"],
        "the queue (128) is larger than the dataset (64 images)",
    ),
}


@pytest.mark.parametrize(("flags", "said"), [([], 1), (["--include_pictures"], 0), (["--streaming"], 0)])
def test_it_is_said_at_the_start_which_pictures_a_tracker_elsewhere_does_not_get(flags, said, tmp_path, capsys):
    for i, row in enumerate(load_digits()["train"].select(range(16))):
        path = tmp_path / "mine" / "train" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    elsewhere = ["--report_to", "trackio", "--trackio_space_id", "org/space", "--eval_strategy", "no", *flags]
    folders = ["--dataset_name", str(tmp_path / "mine"), "--output_dir", str(tmp_path / "run")]
    args = parse_pretrain([*TINY, *folders, *elsewhere])
    announce(args, build_trainer(args, load_images(args.data)))
    assert (
        capsys.readouterr().out.count(
            "neighbours.png shows images that not everybody may see and is not sent to trackio"
        )
        == said
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--lr_milestones", "1", "120", "--num_train_epochs", "3"],
            "lr_milestones (120) come after the last of 3 epochs",
        ),
        (["--batch_norm_splits", "4"], "batch_norm_splits (4) has no effect with batch_norm 'plain'"),
        (["--bank_momentum", "0.9"], "bank_momentum (0.9) has no effect with dictionary 'queue'"),
        (["--dictionary", "batch", "--queue_size", "8"], "queue_size (8) has no effect with dictionary 'batch'"),
        (
            ["--dictionary", "batch", "--key_encoder", "shared", "--key_momentum", "0.9"],
            "key_momentum (0.9) has no effect with key_encoder 'shared'",
        ),
        (
            ["--projection_head", "linear", "--projection_hidden_dim", "8"],
            "projection_hidden_dim (8) has no effect with projection_head 'linear'",
        ),
    ],
)
def test_a_setting_that_has_no_effect_is_named_where_the_command_line_gave_it(flags, said, tmp_path, capsys):
    args = parse_pretrain([*TINY, *flags, "--output_dir", str(tmp_path / "run")])
    announce(args, build_trainer(args, load_images(args.data)))
    assert f"warning: {said}" in capsys.readouterr().out
    args = parse_pretrain([*TINY, "--batch_norm", "split", "--batch_norm_splits", "4"])
    announce(args, build_trainer(args, load_images(args.data)))
    assert "has no effect" not in capsys.readouterr().out


@pytest.mark.parametrize("case", WARNED)
def test_what_decides_the_result_is_said_at_the_start(case, tmp_path, capsys):
    flags, warning = WARNED[case]
    args = parse_pretrain([*TINY, *flags, "--output_dir", str(tmp_path / "run")])
    announce(args, build_trainer(args, load_images(args.data)))
    out = capsys.readouterr().out
    assert out.count(warning) == 1
    assert "global batch 16 (1 x 16 x 1 accumulated)" in out
    losses = 2 if args.config.symmetric_loss else 1
    assert f"log(1+K) = {losses * math.log(1 + args.config.queue_size):.2f}" in out
    if case != "rate":
        assert ("linear rule" in out) == ("--learning_rate" not in flags)


@pytest.mark.parametrize(("variable", "value"), [("WORLD_SIZE", "2"), ("MASTER_PORT", "29500")])
def test_a_launcher_that_started_fewer_processes_is_noticed(variable, value, script, tmp_path, monkeypatch, capsys):
    # What `accelerate launch` sets with --multi_gpu on a machine without GPUs, and with --cpu --num_processes 2.
    monkeypatch.setenv(variable, value)
    flags = [flag for flag in TINY if flag != "--use_cpu"]
    with pytest.raises(SystemExit) as end:
        script("pretrain").main([*flags, "--output_dir", str(tmp_path / "run")])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "processes, but this is one of 1: on GPUs pass --multi_gpu" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [("one_gpu", 1, 1), ("eight_gpus", 1, 8), ("two_nodes", 2, 16), ("two_cpus", 1, 2)],
)
def test_launcher_configs_are_what_their_names_say(name, machines, processes):
    config = load_config_from_file(str(ROOT / f"configs/accelerate/{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert (config.distributed_type == "MULTI_GPU") == (processes > 1)


def next_line(out: str) -> list[str]:
    """The words of the last proposed command."""
    return shlex.split(re.findall(r"^Next: (.*)$", out, re.M)[-1])


def test_the_next_command_is_quoted_and_free_of_what_is_taken(script, tmp_path, capsys):
    folder = tmp_path / "my run's"
    folder.mkdir()
    splits = ImageSplits(None, None, ["a", "b"])
    assert shlex.split(next_command(str(folder), splits)) == ["python", "scripts/linear_probe.py", str(folder)]
    (folder / "linear_probe").mkdir()
    words = shlex.split(next_command(str(folder), splits))
    assert words[3:] == ["--output_dir", f"{folder}/linear_probe_2"]


@pytest.mark.slow
def test_a_run_without_labels_is_not_told_to_probe_them(script, tmp_path, capsys):
    for i in range(20):
        path = tmp_path / "images" / "train" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50).convert("RGB").save(path)
    folder = tmp_path / "my run"
    flags = ["--dataset_name", str(tmp_path / "images"), "--max_steps", "1", "--output_dir", str(folder)]
    script("pretrain").main([*TINY, "--max_train_samples", "20", *flags])
    out = capsys.readouterr().out
    assert "kNN after" not in out  # there was none to measure
    assert "knn_top1_before" not in json.loads((folder / "metrics.json").read_text())
    *command, source, name, dry = next_line(out)
    assert (command, source) == (["python", "scripts/push_to_hub.py"], str(folder))
    script("push_to_hub").main([source, name, dry])  # it runs as it is printed
    assert "Nothing was uploaded" in capsys.readouterr().out


def test_an_unknown_recipe_key_is_refused_with_the_nearest(tmp_path, script, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model:\n  queue_sise: 64\n")
    with pytest.raises(SystemExit):
        script("pretrain").main(["--recipe", str(recipe), *TINY])
    assert "'queue_sise'" in (err := capsys.readouterr().err)
    assert "did you mean 'queue_size'?" in err


def test_a_folder_with_other_files_is_left_alone(tmp_path, script, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit):
        script("pretrain").main([*TINY, "--output_dir", str(tmp_path)])
    assert "holds files of something else" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_the_launcher_shows_one_line_for_bad_input():
    result = launch("--recipe", "x")
    assert result.returncode != 0
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: recipe ('x')")
