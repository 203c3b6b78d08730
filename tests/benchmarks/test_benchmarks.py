"""Benchmarks compare what they say they compare, and report what they measured."""

import argparse
import copy
import json
import math
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomApply

from modeling_moco import MoCoConfig, MoCoModel
from training.benchmarks import step as step_benchmark
from training.benchmarks import train
from training.benchmarks.data import DECODE_ALONE, OfficialViews, PILBlur, photograph_transforms
from training.benchmarks.measure import Benchmark, PeakMemory, in_own_process, time_rounds
from training.benchmarks.step.variants import VARIANTS, build_steps, encoder_only, official_style, this_project
from training.benchmarks.train import pretrain_flags, trainer_overhead
from training.data.decode import Decoder
from training.recipe import parse_pretrain

TINY = {
    "data": "--images 2 --image_size 40 --small_images 4 --loader_images 4 --rounds 1",
    "step": "--architecture test_resnet --global_batch_size 16 --image_size 32 --queue_size 64 --rounds 2 --batch_norm split",
    "train": "--global_batch_size 64 --precision bf16 --max_steps 12 --logging_steps 2",
    "stream": "--dataset_name digits --image_size 16 --shuffle_buffer 50 --batches 2 --rounds 1",
    "exchange": "--per_device_train_batch_size 2 --image_size 16 --rounds 2",
    "folder": "--images 30 --classes 3 --rounds 1",
    "detect": "--architecture test_resnet --height 64 --width 96 --roi_samples 32 --rounds 1",
    "embed": "--images 8 --image_size 32 --architecture test_resnet --rows 200 --dim 16 --rounds 1",
    "knn": "--bank 2000 --queries 50 --dim 16 --knn_k 20 --rounds 1",
}
SLOW = (
    "step",
    "train",
    "knn",
    "exchange",
    "stream",
    "data",
    "folder",
    "embed",
    "detect",
)  # many seconds, most with processes of their own


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TINY])
def test_a_command_reports_finite_figures_of_every_variant(name, script, tmp_path, capsys):
    files = ["--json", str(tmp_path / "numbers.json"), "--figure", str(tmp_path / "figure.png")]
    script("benchmark").main([name, *TINY[name].split(), *files])
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "numbers.json").read_text())
    assert torch.__version__.startswith(content["versions"]["torch"])
    assert content["threads"] == torch.get_num_threads()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    for benchmark in content["benchmarks"]:
        assert benchmark["title"] in printed
        assert len(benchmark["variants"]) > 1
        for variant, numbers in benchmark["variants"].items():
            assert variant in printed
            assert numbers["min"] <= numbers["median"] <= numbers["max"]
            floats = [value for value in numbers.values() if isinstance(value, float)]
            assert all(map(math.isfinite, numbers["seconds"] + floats))
            for reference in benchmark["references"]:
                expected = median(numbers["seconds"]) / median(benchmark["variants"][reference]["seconds"])
                assert numbers["times_as_long_as"][reference] == pytest.approx(expected)
                assert f"{expected:.3f}" in printed
    if name == "step":
        assert "split BatchNorm" in printed
        assert all(numbers["peak GB"] > 0 for numbers in content["benchmarks"][0]["variants"].values())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("step --rounds 0", "rounds (0) must be at least 1"),
        ("data --megapixels 0", "megapixels (0) must be above 0"),
        ("knn --knn_k -1", "knn_k (-1) must be at least 1"),
        ("embed --dataloader_num_workers -1", "dataloader_num_workers (-1) must be at least 0"),
        ("detect --batch 0", "batch (0) must be at least 1"),
        ("exchange --ranks 1", "ranks (1) must be at least 2"),
        ("train --max_steps 2", "max_steps (2) must be at least logging_steps (5)"),
        ("gpu --tiny --minutes 0 --output OUT", "minutes (0) must be above 0"),
        ("step --json nowhere/step.json", "nowhere/step.json: the folder does not exist"),
        ("step --figure nowhere/step.png", "nowhere/step.png: the folder does not exist"),
    ],
)
def test_what_cannot_be_measured_or_written_is_refused_before_anything_is_measured(flags, reason, script, capsys):
    with pytest.raises(SystemExit):
        script("benchmark").main(flags.split())
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {reason}")
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_a_table_holds_ratios_of_medians_and_rounds_won():
    seconds = {"ours": [0.1, 0.3, 0.2], "limit": [0.1, 0.1, 0.1], "peer": [0.2, 0.2, 0.5]}
    benchmark = Benchmark("work", seconds, ("limit", "peer"), images=8, columns={"GB": {"ours": 1.5}}, remarks=["end"])
    title, _, ours, limit, peer, end = benchmark.table().splitlines()
    assert (title, end) == ("work", "end")
    assert ours.split() == [
        "ours",
        "100",
        "200",
        "300",
        "40",
        "2.000",
        "(0",
        "of",
        "3)",
        "1.000",
        "(2",
        "of",
        "3)",
        "1.5",
    ]
    assert limit.split()[4:] == ["80", "1.000", "0.500", "(3", "of", "3)"]
    assert peer.split()[4:6] == ["40", "2.000"]


def test_rounds_begin_with_another_variant_each_after_two_calls_that_are_not_counted():
    calls = []
    seconds = time_rounds({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4)
    assert "".join(calls) == "abcabc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def held_by_a_tensor(megabytes: int) -> tuple[int, int]:
    with PeakMemory() as memory:
        torch.zeros(megabytes * 250_000).add_(1)
    with PeakMemory() as nothing:
        pass
    return memory.bytes, nothing.bytes


@pytest.mark.slow
def test_peak_memory_is_what_was_held_in_between_even_if_it_is_free_again():
    held, nothing = in_own_process(held_by_a_tensor, 200)
    assert held == pytest.approx(200e6, rel=0.05)
    assert nothing < 2e6


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MoCoConfig(architecture="test_resnet", queue_size=64, batch_norm="plain", key_momentum=0.9)
    return MoCoModel(config).train()


def test_our_step_and_the_official_style_train_the_same_weights_and_queue(model):
    views = torch.randint(256, (2, 16, 3, 32, 32), dtype=torch.uint8)
    # In float32 a rounding error may put out another unit, and three steps later the weights differ by 1e-3.
    models, steps = [copy.deepcopy(model).double() for _ in range(2)], []
    for variant, trained in zip((this_project, official_style), models, strict=True):
        steps.append(variant(trained, views, "fp32", False))
    for step in steps:
        for _ in range(3):
            step()
    ours, official = (trained.state_dict() for trained in models)
    assert not torch.allclose(ours["encoder_q.conv1.0.weight"], model.encoder_q.conv1[0].weight.double(), atol=1e-3)
    for name, tensor in official.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_the_limit_runs_both_encoders_and_changes_no_weight(model):
    views = torch.randint(256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    encoder_only(model, views, "bf16", False)()
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert model.encoder_q.bn1.num_batches_tracked == model.encoder_k.bn1.num_batches_tracked == 1


def test_the_limit_runs_backward_through_all_that_is_trained(model):
    filled = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: filled.update({name: p.grad.abs().sum()}))
    encoder_only(model, torch.randint(256, (2, 4, 3, 32, 32), dtype=torch.uint8), "fp32", False)()
    assert set(filled) == {
        name for name, _ in model.named_parameters() if name.startswith(("encoder_q", "projector_q"))
    }
    assert all(total > 0 for total in filled.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_every_variant_computes_in_the_precision_asked_for(model, variant, precision, dtype):
    found = []
    for part in (model.encoder_q.layer4, model.projector_q, model.encoder_k.layer4, model.projector_k):
        part.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    VARIANTS[variant](model, torch.randint(256, (2, 4, 3, 32, 32), dtype=torch.uint8), precision, False)()
    assert found == [dtype] * 4


def parse(benchmark, line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    return parser.parse_args(line.split())


def test_every_variant_has_the_batch_norm_asked_for():
    for batch_norm in ("plain", "split"):
        args = parse(step_benchmark, f"{TINY['step']} --global_batch_size 4 --batch_norm {batch_norm}")
        for variant in build_steps(list(VARIANTS), args).values():
            if batch_norm == "plain":
                variant()
            else:  # which has eight groups
                with pytest.raises(ValueError, match=r"\(4\) must be a multiple of batch_norm_splits"):
                    variant()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_are_trained_in_the_precision_asked_for(precision, tmp_path):
    flags = pretrain_flags(parse(train, f"--precision {precision}"), 1, tmp_path)
    assert parse_pretrain(flags).training.bf16 == (precision == "bf16")


@pytest.mark.parametrize(("slower", "faster"), [("data alone", "step alone"), ("step alone", "data alone")])
def test_the_limit_of_a_run_is_the_slower_of_its_data_and_its_step(slower, faster):
    seconds = {slower: [0.1, 0.3, 0.3], faster: [0.1, 0.1, 0.9], "training": [0.5]}
    benchmark = train._against_limit(parse(train, "--global_batch_size 128"), 1, seconds)
    assert benchmark.references == (slower,)
    (remark,) = benchmark.remarks
    assert f"limit is {slower}" in remark
    assert "320 images/s" in remark  # 128 in 0.3 + 0.1 s


def test_the_limit_of_the_views_decodes_as_the_fastest_variants_do():
    decoders = {name: decode for name, (_, decode) in photograph_transforms(224, Decoder()).items()}
    assert decoders[DECODE_ALONE] == decoders["cv2"] == decoders["device, the CPU's share"]


def test_official_views_are_blurred_where_they_are_of_photographs():
    def blurs(size: int) -> list[float]:
        parts = OfficialViews(size).view.transforms
        return [part.p for part in parts if isinstance(part, RandomApply) and isinstance(part.transforms[0], PILBlur)]

    assert blurs(224) == [0.5]
    assert blurs(32) == []
    noise = Image.effect_noise((32, 32), 90)
    assert np.std(PILBlur()(noise)) < np.std(noise)


@pytest.mark.slow
def test_the_cost_of_the_trainer_is_the_difference_of_its_medians():
    benchmark = trainer_overhead(rounds=1)
    more = 1000 * (benchmark.median("Trainer") - benchmark.median("plain loop"))
    assert benchmark.remarks == [f"overhead {more:.2f} ms per step"]
    assert {len(values) for values in benchmark.seconds.values()} == {4}


@pytest.mark.slow
def test_the_gpu_command_runs_whole_on_a_cpu(script, tmp_path, capsys):
    flags = ["--tiny", "--rounds", "1", "--dataset_name", "digits", "--cifar_flags", "--image_size 16 --eval_resize 16"]
    script("benchmark").main(["gpu", *flags, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "WRONG" not in printed
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [check["value"] < check["limit"] for check in content["checks"]] == [True] * 7
    titles = [benchmark["title"] for benchmark in content["benchmarks"]]
    parts = {"a step": 7, "two v2 views": 1, "the methods": 4, "CIFAR-10": 1}
    assert {part: sum(title.startswith(part) for title in titles) for part in parts} == parts
    written = (tmp_path / "gpu.md").read_text()
    assert all(title in written and title in printed for title in titles)
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_gpu_command_says_where_there_is_no_gpu(script, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        script("benchmark").main(["gpu", "--output", str(tmp_path / "new")])
    assert (
        "error: no GPU is visible: run this where torch.cuda.is_available(), or pass --tiny" in capsys.readouterr().err
    )
    assert not (tmp_path / "new").exists()
