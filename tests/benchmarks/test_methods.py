"""The benchmark of the methods steps each as its recipe says, and reports what it measured beside what was published."""

import argparse
import json
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import pytest
import timm
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from training.benchmarks import step as step_benchmark
from training.benchmarks.measure import in_own_process, peak_memory
from training.benchmarks.step.methods import HOURS, RECIPES, build, compare, hours, measure, table
from training.optimization.lars import Lars
from training.recipe import load_recipe

TINY = "--architecture test_resnet --global_batch_size 8 --image_size 32 --queue_size 64 --bank_size 100 --rounds 2"


def parse(flags: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    step_benchmark.add_arguments(parser)
    return parser.parse_args(f"{TINY} {flags}".split())


def test_hours_are_those_of_200_epochs_of_imagenet():
    assert hours(1_281_167) == pytest.approx(200 / 3600)
    # 53 h of the paper are 1,343 images/s of its eight GPUs.
    assert hours(1343) == pytest.approx(53, abs=0.01)


def test_the_table_compares_with_moco_and_leaves_published_numbers_as_they_are():
    seconds = {"queue": [0.1, 0.4, 0.2], "end_to_end": [0.3, 0.6, 0.3], "bank": [0.1, 0.1, 0.1]}
    found = table(seconds, {"peak GB": {"queue": 1.5}}, parse("--global_batch_size 32"), [])
    queue, end_to_end, bank = map(found.numbers, seconds)
    assert (end_to_end["min"], end_to_end["median"], end_to_end["max"]) == (0.3, 0.3, 0.6)
    assert [n["times_as_long_as"]["queue"] for n in (queue, end_to_end, bank)] == pytest.approx([1, 1.5, 0.5])
    assert end_to_end["rounds_faster_than"] == {"queue": 0}
    assert queue[HOURS] == pytest.approx(200 * 1_281_167 * 0.2 / 32 / 3600)
    assert bank[HOURS] == pytest.approx(queue[HOURS] / 2)
    published = [
        [n.get(f"paper's 8 V100 x 32 images: {of}") for of in ("G a GPU", "hours")] for n in (queue, end_to_end)
    ]
    assert published == [[5.0, 53], [7.4, 65]]
    assert not [name for name in bank if name.startswith("paper")]
    printed = found.table()
    assert "BatchNorm is plain, in one process; the recipes have shuffle for queue, end_to_end\n" in printed
    assert "93.0 G a GPU by its authors' estimate" in printed


@pytest.fixture
def optimizers():
    """Those that have made a step."""
    made: list[torch.optim.Optimizer] = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: made.append(optimizer))
    yield made
    hook.remove()


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_is_stepped_as_its_recipe_says(name, optimizers):
    model, step = build(name, parse("--precision bf16"))
    recipe = load_recipe(RECIPES[name])
    own = {"architecture": "test_resnet", "queue_size": 64, "batch_norm": "plain"}
    for setting in [*recipe.values, *own]:
        if hasattr(model.config, setting):
            assert getattr(model.config, setting) == own.get(setting, recipe.value(setting)), setting
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dtypes = set()
    model.encoder_q.layer4.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    step(), step()
    assert dtypes == {torch.bfloat16}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert {key for key, value in model.named_parameters() if value.requires_grad} <= changed
    assert {key for key in before if key.startswith("dictionary.")} <= changed
    assert ("encoder_k.conv1.0.weight" in changed) == (recipe.value("key_encoder") == "momentum")
    (optimizer,) = set(optimizers)
    (group,) = optimizer.param_groups
    assert type(optimizer) is (Lars if recipe.value("optim") == "lars" else torch.optim.SGD)
    assert (group["momentum"], group["weight_decay"]) == (0.9, recipe.value("weight_decay"))
    scale = {"none": 1, "linear": 8 / 256, "sqrt": 8**0.5}[recipe.value("learning_rate_scaling")]
    assert group["lr"] == pytest.approx(scale * recipe.value("learning_rate"))
    assert group.get("classic", False) == (name == "simclr")


def test_two_methods_are_measured_in_turns_with_what_they_hold():
    args = parse()
    found = compare(["queue", "end_to_end"], args, partial(measure, args, torch.get_num_threads()))
    assert {name: len(values) for name, values in found.seconds.items()} == {"queue": 2, "end_to_end": 2}
    encoder = timm.create_model("test_resnet", num_classes=0)
    d = encoder.num_features
    of_encoder = sum(p.numel() for p in encoder.parameters())
    assert found.columns["parameters, M"] == {
        "queue": pytest.approx(2 * (of_encoder + d * d + d + d * 128 + 128) / 1e6),  # two encoders with an MLP
        "end_to_end": pytest.approx((of_encoder + d * 128 + 128) / 1e6),
    }
    assert found.columns["dictionary, MB"] == {"queue": pytest.approx((64 * 128 * 4 + 8) / 1e6), "end_to_end": 0}


def test_a_method_without_memory_is_named_and_left_out():
    def measured(name: str) -> dict[str, float]:
        if name in without:
            raise without[name]
        return {"peak GB": 1.0}

    without: dict[str, type[Exception]] = {"moco_v3": torch.OutOfMemoryError, "simclr": BrokenProcessPool}
    found = compare(["queue", "moco_v3", "simclr"], parse("--rounds 1"), measured)
    assert list(found.seconds) == list(found.columns["peak GB"]) == ["queue"]
    assert found.remarks[0].startswith("not enough memory here for a step of moco_v3, simclr")
    without["queue"] = BrokenProcessPool
    with pytest.raises(ValueError, match=r"global_batch_size \(8\) is too much for the memory here"):
        compare(["queue", "moco_v3"], parse(), measured)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--method simclr --compile", "compile is for the step without method"),
        ("--method simclr --batch_norm split", "batch_norm (split) is for the step without method"),
        ("--method bank --global_batch_size 1", "global_batch_size (1) must be at least 2"),
        ("--method bank --queue_size 4", "queue_size (4) must be at least global_batch_size (8)"),
        ("--method bank --bank_size 0", "bank_size (0) must be at least 1"),
        ("--method bank --rounds 0", "rounds (0) must be at least 1"),
        ("--method bank --image_size 0", "image_size (0) must be at least 1"),
        ("--method moco_v3 --architecture test_vit", "method (moco_v3): zero_init_residual=True is for ResNets"),
        ("--method bank --architecture resnet5", "resnet5"),
        ("--method moco_v4", "invalid choice: 'moco_v4'"),
    ],
)
def test_what_no_method_can_do_is_refused_before_anything_is_measured(flags, reason, script, capsys):
    with pytest.raises(SystemExit):
        script("benchmark").main(["step", *TINY.split(), *flags.split()])
    printed = capsys.readouterr()
    assert reason in printed.err
    assert not printed.out


@pytest.mark.slow
def test_the_command_measures_moco_beside_the_methods_asked_for(script, tmp_path, capsys):
    flags = f"--method bank moco_v3 bank {TINY} --precision bf16 --json {tmp_path / 'numbers.json'}"
    script("benchmark").main(["step", *flags.split(), "--figure", str(tmp_path / "figure.png")])
    printed = capsys.readouterr().out
    (benchmark,) = json.loads((tmp_path / "numbers.json").read_text())["benchmarks"]
    assert benchmark["references"] == ["queue"]
    assert list(benchmark["variants"]) == ["queue", "bank", "moco_v3"]
    assert all(numbers["peak GB"] > 0 for numbers in benchmark["variants"].values())
    assert all(line in printed for line in [benchmark["title"], *benchmark["remarks"]])


def peak_of_a_call_that_holds(megabytes: int) -> float:
    def build_call():
        torch.zeros(4 * megabytes * 250_000).add_(1)  # needed while it is built
        held = torch.ones(megabytes * 250_000)
        return lambda: torch.zeros(2 * megabytes * 250_000).add_(held.sum())

    (gigabytes,) = peak_memory(build_call).values()
    return gigabytes


@pytest.mark.slow
def test_peak_memory_is_of_the_calls_with_what_they_hold_and_not_of_the_building():
    assert in_own_process(peak_of_a_call_that_holds, 100) == pytest.approx(0.3, rel=0.05)
