"""What a GPU makes of this project, in one command, the most valuable first, as far as the minutes last.

1. correctness: the same steps, views, BatchNorm and collectives as on the CPU
2. the step of a ResNet-50 at 224 px: against its encoders alone and the official style, in every precision, and its memory
3. the views that the GPU renders
4. the step of every method that MoCo is compared with: time, memory, hours for 200 epochs
5. the step of a detector
6. CIFAR-10 with a ResNet-18 by its recipe, as many epochs as two thirds of the time left allow
7. the step and the views compiled, which can take minutes to compile

Every row is printed and written to `--output` as soon as it is measured: gpu.json, gpu.md and gpu.png. `--tiny` goes through
all of it with small models, on a CPU too.
"""

import argparse
import copy
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.split_norm_moco import SplitBatchNorm2d, part_by_part

from ..data.images import collate
from ..data.sources import EvaluationDataArguments, load_images
from ..engine.files import write_whole
from ..engine.results import conditions
from ..views.device import DeviceCrops, DeviceViews
from ..views.pil import render_view
from ..views.policy import build_policies, seeded_generator
from . import detect
from .measure import Benchmark, draw_timings, peak_memory, time_rounds, write_numbers
from .step import methods as methods_of_step
from .step.variants import VARIANTS, build_step, build_steps, this_project
from .train import PRETRAIN

PRECISIONS = {"fp32": "fp32 (no TF32)", "tf32": "TF32", "bf16": "bf16"}
TINY = {"architecture": "test_resnet", "image_size": 32, "queue_size": 64}
FULL = {"architecture": "resnet50", "image_size": 224, "queue_size": 65536}
RESERVE = 15  # seconds that a run gets to save and end


@dataclass(frozen=True)
class Check:
    """A figure that must stay below its limit."""

    title: str
    value: float
    limit: float

    def line(self) -> str:
        return (
            f"{'right' if self.value < self.limit else 'WRONG'}: {self.title}: {self.value:.2g} (limit {self.limit:g})"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10, help="Minutes that all of it may take.")
    parser.add_argument("--dataset_name", help="CIFAR-10, as in scripts/pretrain.py. Without it that part is left out.")
    parser.add_argument("--output", type=Path, required=True, help="Folder for gpu.json, gpu.md and gpu.png.")
    parser.add_argument("--rounds", type=int, default=5, help="Number of measured steps of each variant.")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="Parts to measure.")
    parser.add_argument(
        "--cifar_flags", default="--bf16 true", help="Flags of the CIFAR-10 run, as scripts/pretrain.py takes them."
    )
    parser.add_argument("--tiny", action="store_true", help="Small models and few steps, to try the command itself.")


def run(args: argparse.Namespace) -> list[Benchmark]:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not args.tiny:
        raise ValueError(
            "no GPU is visible: run this where torch.cuda.is_available(), or pass --tiny to try the command"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    args.device, args.deadline = device, time.monotonic() + 60 * args.minutes
    found: list[Benchmark | Check] = []
    for name in args.only:
        rows: Iterator[Benchmark | Check] = PARTS[name](args)
        for row in rows:
            found.append(row)
            print(row.line() if isinstance(row, Check) else row.table(), flush=True)
            _write(found, args.output)
            if time.monotonic() > args.deadline - RESERVE:
                print(f"the {args.minutes:g} minutes are over in the part {name!r}: raise --minutes for the rest")
                return []
    return []  # all is printed and written


def _write(found: list[Benchmark | Check], folder: Path) -> None:
    checks = [row for row in found if isinstance(row, Check)]
    timed = [row for row in found if isinstance(row, Benchmark)]
    write_numbers(timed, folder / "gpu.json", checks=[vars(check) for check in checks])
    tables = [*(f"- {check.line()}" for check in checks), *(f"\n```\n{row.table()}\n```" for row in timed)]
    write_whole(folder / "gpu.md", f"# {conditions()['hardware']}\n\n" + "\n".join(tables) + "\n")
    if timed:
        draw_timings(timed, folder / "gpu")


# Correctness


def correctness(args: argparse.Namespace) -> Iterator[Check]:
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield from _steps_as_on_the_cpu(args)
    yield from _split_norm(args)
    yield from _views_as_pil(args)
    torch.backends.cudnn.allow_tf32 = tf32
    if args.device.type == "cuda":
        yield _replayed(args)
        yield from _one_nccl_process(args)


def _model(**settings: Any) -> MoCoModel:
    torch.manual_seed(0)
    defaults = {"architecture": "test_resnet", "queue_size": 64, "batch_norm": "split", "batch_norm_splits": 2}
    return MoCoModel(MoCoConfig(**defaults | settings)).to(memory_format=torch.channels_last).train()


def _losses(model: MoCoModel, device: torch.device, precision: str = "fp32", compiled: bool = False) -> torch.Tensor:
    """Losses of a few steps on the same random views."""
    generator = torch.Generator().manual_seed(1)
    model = copy.deepcopy(model).to(device)
    forward: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(4):
        views = torch.randint(256, (2, 16, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
        model.shuffle_generator = seeded_generator(step)
        model.update_key_encoder()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs = forward(*views)
        outputs.loss.backward()
        model.dictionary.enqueue(outputs.key_embeds)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.detach())
    return torch.stack(losses).cpu()


def _steps_as_on_the_cpu(args: argparse.Namespace) -> Iterator[Check]:
    for mode in ("plain", "split"):
        model = _model(batch_norm=mode)
        on_cpu = _losses(model, torch.device("cpu"))
        yield _check_losses(f"{mode} BatchNorm, fp32", _losses(model, args.device) - on_cpu, 2e-3)
        # Later steps of 16 bits go another way.
        yield _check_losses(f"{mode} BatchNorm, bf16", (_losses(model, args.device, "bf16") - on_cpu)[:1], 0.05)


def _replayed(args: argparse.Namespace) -> Check:
    """A replayed step computes what the step itself does."""
    found = []
    for graph in (False, True):
        model, losses = _model().to(args.device), []
        step = this_project(model, _views(args.device), "bf16", compiled=False, graph=graph)
        for number in range(8):
            model.shuffle_generator = seeded_generator(number)
            losses.append(step())
        found.append(torch.stack(losses))
    return Check(
        "a replayed step: loss of 8 steps from the step itself", (found[0] - found[1]).abs().max().item(), 1e-9
    )


def _views(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (2, 16, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)


def _check_losses(title: str, difference: torch.Tensor, limit: float) -> Check:
    title = f"{title}: loss of {len(difference)} steps from fp32 on the CPU"
    return Check(title, difference.abs().max().item(), limit)


def _split_norm(args: argparse.Namespace) -> Iterator[Check]:
    torch.manual_seed(0)
    norm = SplitBatchNorm2d(256).to(args.device).train()
    norm.splits = 8
    x = (3 * torch.randn(64, 256, 14, 14) + 20).to(args.device).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    dy = torch.randn_like(x)
    out = norm(x)
    out.backward(dy)
    exact_x = x.detach().double().cpu().requires_grad_()
    weight, bias = norm.weight.detach().double().cpu(), norm.bias.detach().double().cpu()
    mean, var = torch.zeros(256, dtype=torch.float64), torch.ones(256, dtype=torch.float64)
    exact = part_by_part(exact_x, weight, bias, mean, var, norm.splits, 0.1, norm.eps)
    exact.backward(dy.double().cpu())
    for title, ours, right in (("output", out, exact), ("gradient", x.grad, exact_x.grad)):
        assert ours is not None
        assert right is not None
        error = (ours.detach().double().cpu() - right.detach()).norm() / right.detach().norm()
        yield Check(f"split BatchNorm, {title}, relative error from float64", error.item(), 1e-5)


def _views_as_pil(args: argparse.Namespace) -> Iterator[Check]:
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (16, 6, 6, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC) for pixels in small]
    policies, size = build_policies("v3"), 64  # has every operation
    crops, views = DeviceCrops(policies, size), DeviceViews(policies, size)
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
    rows = [crops(x, torch.Generator().manual_seed(i)) for i, x in enumerate(tensors)]
    rendered = views({name: x.to(args.device) for name, x in collate(rows).items()})
    ours = torch.stack([rendered["pixel_values"], rendered["key_pixel_values"]], dim=1).cpu().float()
    distances = []
    for i, picture in enumerate(pictures):
        sampled = crops.sample(picture, torch.Generator().manual_seed(i))
        for view, params, policy in zip(ours[i], sampled, policies, strict=True):
            right = render_view(picture, params, size, policy)
            distances.append((view - right).abs().mean().item())
    yield Check("views from PIL's, mean distance in levels of 255", float(np.mean(distances)), 2)


def _one_nccl_process(args: argparse.Namespace) -> Iterator[Check]:
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=args.device)
        x = torch.arange(8.0, device=args.device)
        gathered, exchanged = torch.empty_like(x), torch.empty_like(x)
        dist.all_gather_into_tensor(gathered, x)
        dist.all_to_all_single(exchanged, x)
        wrong = (gathered - x).abs().max() + (exchanged - x).abs().max()
        dist.destroy_process_group()
    yield Check("NCCL: gather and exchange in one process", wrong.item(), 1e-9)


# The step


def steps(args: argparse.Namespace) -> Iterator[Benchmark]:
    batches = (16, 8) if args.tiny else (256, 64)
    rows: list[dict[str, Any]] = [{"precision": "bf16"}, {"precision": "bf16", "batch_norm": "split"}]
    rows += [{"precision": precision} for precision in ("tf32", "fp32")]
    rows += [{"precision": "bf16", "global_batch_size": batches[1]}]
    rows += [{"precision": "tf32", "global_batch_size": batches[1]}, {"precision": "tf32", "batch_norm": "split"}]
    for row in rows:
        yield _step(args, {"global_batch_size": batches[0]} | row)


def compiled(args: argparse.Namespace) -> Iterator[Check | Benchmark]:
    if args.device.type == "cpu":
        print("the compiled steps are left out: a CPU compiles longer than all the rest takes")
        return
    for mode in ("plain", "split"):
        model = _model(batch_norm=mode)
        difference = _losses(model, args.device, compiled=True) - _losses(model, torch.device("cpu"))
        yield _check_losses(f"{mode} BatchNorm, compiled", difference, 2e-3)
        batch = 16 if args.tiny else 256
        yield _step(args, {"global_batch_size": batch, "precision": "bf16", "batch_norm": mode, "compile": True})
    yield from views(args, compiled=True)


def _step(command: argparse.Namespace, row: dict[str, Any]) -> Benchmark:
    model: dict[str, Any] = TINY if command.tiny else FULL
    args = argparse.Namespace(**model | {"batch_norm": "plain", "compile": False, "rounds": command.rounds} | row)
    name, args.precision = args.precision, "bf16" if args.precision == "bf16" else "fp32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name != "fp32"
    columns: dict[str, dict[str, float]] = {"allocated GB": {}, "reserved GB": {}}
    if command.device.type == "cuda":
        for variant in VARIANTS:
            for column, gigabytes in peak_memory(partial(build_step, variant, args)).items():
                columns[column][variant] = gigabytes
    seconds = time_rounds(build_steps(list(VARIANTS), args), args.rounds)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False  # torch's defaults
    title = (
        f"a step: {args.architecture}, {args.global_batch_size} images of {args.image_size} px, {PRECISIONS[name]}, "
        f"{args.batch_norm} BatchNorm{', compiled' * args.compile}"
    )
    return Benchmark(title, seconds, ("encoder only", "official style"), args.global_batch_size, columns)


def methods(args: argparse.Namespace) -> Iterator[Benchmark]:
    model: dict[str, Any] = (
        (TINY | {"bank_size": 1000}) if args.tiny else (FULL | {"bank_size": methods_of_step.IMAGENET})
    )
    for batch in (8, 16) if args.tiny else (32, 256):
        for precision in ("fp32", "bf16"):
            row = argparse.Namespace(**model, global_batch_size=batch, precision=precision, rounds=args.rounds)
            measured = partial(methods_of_step.measure, row, torch.get_num_threads())
            yield methods_of_step.compare(list(methods_of_step.RECIPES), row, measured)


def detectors(args: argparse.Namespace) -> Iterator[Benchmark]:
    tiny = {"architecture": "test_resnet", "height": 64, "width": 96, "roi_samples": 32}
    sizes = tiny if args.tiny else {"architecture": "resnet50", "height": 800, "width": 1216, "roi_samples": 512}
    for precision in ("fp32", "bf16"):
        row = argparse.Namespace(
            **sizes, rcnn_variant="c4", masks=False, num_labels=20, batch=2, precision=precision, rounds=args.rounds
        )
        yield detect.measure(row, partial(detect.memory, row, torch.get_num_threads()))


# Views and a whole run


def views(args: argparse.Namespace, compiled: bool = False) -> Iterator[Benchmark]:
    for name, size, n in (("v2", 48, 4),) if args.tiny else (("v2", 224, 256), ("cifar", 32, 512)):
        policies = build_policies(name)
        crops, render = DeviceCrops(policies, size), DeviceViews(policies, size)
        pixels = torch.randint(256, (3, size, size), dtype=torch.uint8)
        rows = [crops(pixels, torch.Generator().manual_seed(seed)) for seed in range(n)]
        batch = {key: x.to(args.device) for key, x in collate(rows).items()}
        variants: dict[str, Any] = {"eager": partial(render, batch)}
        if compiled:
            variants["compiled"] = partial(torch.compile(render.__call__), batch)
        seconds = time_rounds(variants, args.rounds)
        each = {key: 1000 * float(np.median(times)) / n for key, times in seconds.items()}
        title = f"two {name} views of {n} images of {size} px, after the crop"
        yield Benchmark(title, seconds, ("eager",), n, {"ms an image": each})


def cifar(args: argparse.Namespace) -> Iterator[Benchmark]:
    if not args.dataset_name:
        print("CIFAR-10 is left out: name it with --dataset_name")
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--recipe", "cifar10_r18_200ep", "--dataset_name", args.dataset_name, "--output_dir", f"{folder}/run"]
        flags += [
            "--eval_every_n_epochs",
            "10",
            "--save_strategy",
            "no",
            "--report_to",
            "none",
            *args.cifar_flags.split(),
        ]
        if args.tiny:
            flags += [
                "--architecture",
                "test_resnet",
                "--global_batch_size",
                "64",
                "--max_steps",
                "4",
                "--dataloader_num_workers",
                "1",
            ]
            flags += ["--use_cpu", str(args.device.type == "cpu"), "--eval_strategy", "no"]
        process = subprocess.Popen([sys.executable, "-m", PRETRAIN, *flags])
        try:
            process.wait(timeout=max(1, (args.deadline - RESERVE - time.monotonic()) * 2 / 3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it saves and ends
            process.wait()
        log = json.loads(_newest_state(Path(folder, "run")).read_text(encoding="utf-8"))["log_history"]
    images = len(load_images(EvaluationDataArguments(dataset_name=args.dataset_name)).train)
    epochs = [images / entry["images_per_second"] for entry in log if "loss" in entry]
    waiting = [entry["waiting_for_data"] for entry in log if "loss" in entry]
    knn = [f"{entry['eval_knn_top1']:.1f} (epoch {entry['epoch']:.0f})" for entry in log if "eval_knn_top1" in entry]
    remarks = [f"kNN, %: {', '.join(knn) or 'none'}", f"waiting for images: {np.mean(waiting):.1f} % of the time"]
    title = (
        f"CIFAR-10, an epoch without evaluations, to epoch {log[-1]['epoch']:.1f}: cifar10_r18_200ep {args.cifar_flags}"
    )
    yield Benchmark(title, {"training": epochs}, (), images, remarks=remarks)


def _newest_state(folder: Path) -> Path:
    """The state of a run that ended, or of the checkpoint that it stopped at."""
    found = sorted(folder.glob("**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RuntimeError(f"the run left nothing in {folder}: its error is above")
    return found[-1]


PARTS: dict[str, Any] = {
    "correctness": correctness,
    "steps": steps,
    "views": views,
    "methods": methods,
    "detectors": detectors,
    "cifar": cifar,
    "compiled": compiled,
}
