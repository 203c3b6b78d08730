"""A pretraining run from its arguments: preview its views, build it, run it, leave its results behind."""

import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.dictionary_moco import BUILT_IN, negatives

from . import plots
from .cli import how_to_run
from .convert.start import Start, begin_with
from .data.images import StreamedImages
from .data.pipeline import build_render, training_images, training_views
from .data.sources import DataArguments, ImageSplits
from .engine.files import write_json
from .engine.page import read_run, write_report
from .engine.record import record
from .engine.results import Result, conditions, encoder_digest, read_results
from .engine.run_folder import FIGURES, METRICS, drawn, mark_ended, unused
from .evaluation.encoder import encode_blank
from .evaluation.knn import accuracies, protocol
from .model_folder import bare_name
from .recipe import PretrainArguments
from .reports.run import chance_loss, draw_curves, draw_features
from .trainer import MoCoTrainer, MoCoTrainingArguments
from .views.pil import render_view

PREVIEWED = 8  # images
STARTS = {  # what `queue_start` and `bank_start` do
    "random": "begins with random keys",
    "encode": "begins with keys of training images, which are encoded before the first step",
}
OFFICIAL_GPUS = 8  # that share a global batch in the papers
BOUND_BY_DATA = 10  # per cent of the time
BACKENDS = ("pil", "cv2", "device")  # of views, each faster than the one before; the last with a GPU


def build_trainer(args: PretrainArguments, splits: ImageSplits, start: Start | None = None) -> MoCoTrainer:
    """Model and trainer. Everything that the user's input can break breaks here, before any time is spent.

    Args:
        start: weights that the model begins with; None for random ones.

    Raises:
        ValueError: with the value, the rule and the remedy.
    """
    data, training = args.data, args.training
    read_results(Path(str(training.output_dir)))  # what is there can be added to
    of_bank = args.config.dictionary == "bank"
    train = training_images(data, splits, training, of_bank)
    bank = queries = None
    if training.eval_strategy != IntervalStrategy.NO:
        view = data.evaluation_view()
        if not data.streaming:
            bank = splits.train_in(view).evenly_spaced(training.knn_bank_size or len(splits.train))
        missing = _missing_for_knn(args, splits)
        if missing is None and bank is not None:
            queries = splits.eval_in(view)
            if max(training.knn_k) > len(bank):
                raise ValueError(
                    f"knn_k ({max(training.knn_k)}) is larger than the bank ({len(bank)} images): lower it"
                )
        elif training.process_index == 0:
            print(f"The kNN monitor is off: {missing}.")
    set_seed(training.seed)
    if of_bank:
        args.config.bank_size = train.images_per_epoch
    model = MoCoModel(args.config)
    if start is not None:
        begin_with(model, start)
        if args.config.dictionary == "queue" and training.queue_start is None and not start.has_queue:
            training.queue_start = "encode"
        if of_bank and training.bank_start is None:
            training.bank_start = "encode"
    check_image_size(model, data.image_size, images_at_once(training, args.config))
    render = build_render(data, training.torch_compile, of_bank)
    return MoCoTrainer(model, training, train, data.image_processor(args.config), bank, queries, render)


def _missing_for_knn(args: PretrainArguments, splits: ImageSplits) -> str | None:
    return "it needs an indexed dataset (no --streaming)" if args.data.streaming else splits.label_problem


def images_at_once(training: MoCoTrainingArguments, config: MoCoConfig) -> int:
    """Images that one BatchNorm normalises together."""
    if config.batch_norm == "sync":
        return training.per_device_train_batch_size * training.world_size
    return training.per_device_train_batch_size // (config.batch_norm_splits if config.batch_norm == "split" else 1)


def check_image_size(model: MoCoModel, size: int, group: int) -> None:
    """Try the encoder on one blank image.

    Args:
        group: images that one BatchNorm normalises together.

    Raises:
        ValueError: it takes no images of that size, or a BatchNorm would have one value to normalise.
    """
    remedy = f"choose another, or for a ViT pass --model_args '{{\"img_size\": {size}}}'"
    last = encode_blank(model.eval(), size, remedy)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    pixels = 1 if any(isinstance(norm, torch.nn.BatchNorm1d) for norm in norms) else last[0, 0].numel()
    if norms and group * pixels == 1:
        raise ValueError(
            f"BatchNorm would have 1 value of a channel at once (1 image, whose last map has 1 pixel at {size} px): raise "
            "--global_batch_size, lower --batch_norm_splits, or use fewer processes"
        )


def announce(args: PretrainArguments, trainer: MoCoTrainer, start: Start | None = None) -> None:
    """Say what is about to run, in the numbers that decide its result."""
    training, config = args.training, args.config
    if "recipe" not in args.given:
        print(
            "No --recipe given: running 'quickstart'. For your own images:\n"
            f"  {how_to_run('pretrain')} --recipe moco_v2_r50_in1k_200ep --dataset_name FOLDER "
            f"--output_dir {unused('runs/mine')}\n  (with one GPU add --batch_norm split)"
        )
    for key in ("title", "source", "hardware", "expected"):
        if key in args.about:
            print(f"{key:>9}: {args.about[key]}")
    views = "one view" if config.dictionary == "bank" else "two views"
    print(
        f"      run: {trainer.train_dataset.images_per_epoch:,} images in {views} of {args.data.image_size} px, "
        f"global batch {training.global_batch_size} "
        f"({training.world_size} x {training.per_device_train_batch_size} x {training.gradient_accumulation_steps} "
        f"accumulated), learning rate {training.optimization}, {config.architecture}, {_negatives(args)}, "
        f"{_momentum(args)}T {config.temperature:g}, to {training.output_dir}"
    )
    if start is not None:
        print(f"    start: from {args.init_from} ({start.checkpoint})")
    for note in [] if start is None else start.notes:
        print(f"         - {note}")
    if training.queue_start is not None:
        print(f"    queue: {STARTS[training.queue_start]}")
    if config.dictionary == "bank":
        print(
            f"     bank: {config.bank_size:,} keys, {4e-6 * config.bank_size * config.projection_dim:,.0f} MB in memory and in "
            f"every checkpoint; {STARTS[training.bank_start or 'random']}"
        )
    print(f"  reading: {_reading(args)}")
    for warning in _warnings(args, trainer):
        print(f"warning: {warning}")


def _negatives(args: PretrainArguments) -> str:
    if args.config.dictionary in ("batch", "batch_both_views"):
        return f"{negatives(args.config, args.training.global_batch_size):,} negatives of the batch"
    return f"K {args.config.queue_size:,}"


def _momentum(args: PretrainArguments) -> str:
    if args.config.key_encoder != "momentum":
        return ""
    return f"m {args.config.key_momentum:g}{' to 1' * (args.training.key_momentum_schedule == 'cosine')}, "


def _reading(args: PretrainArguments) -> str:
    config = args.config
    count = negatives(config, args.training.global_batch_size)
    factor = config.loss_scale * (2 if config.symmetric_loss else 1)
    before = {
        "queue": "the loss may rise while keys replace the random queue, and stay",
        "bank": "the loss is far above chance while the keys of the bank are random, for an epoch or more, and may stay",
    }.get(config.dictionary, "the loss may stay")
    return (
        f"{before} near {f'{factor:g} ' * (factor != 1)}log(1+K) = {chance_loss(config, count):.2f}, where all keys look "
        f"alike, for a while. That is not a fault: watch contrast_top1, {100 / (1 + count):.2g} % by chance"
    )


def _warnings(args: PretrainArguments, trainer: MoCoTrainer) -> Iterator[str]:
    training, config = args.training, args.config
    batch, rate = training.global_batch_size, training.learning_rate
    recipe_batch, recipe_rate = (args.recipe.values.get(key) for key in ("global_batch_size", "learning_rate"))
    if recipe_batch not in (None, batch) and rate == recipe_rate and training.learning_rate_scaling == "none":
        yield (
            f"the recipe's learning rate {rate:g} is for a global batch of {recipe_batch}; for {batch} the linear rule gives "
            f"{rate * batch / recipe_batch:g} (--learning_rate)"
        )
    if training.late_milestones:
        yield training.late_milestones
    if args.init_from is None and (bare := bare_name(config.architecture)) != config.architecture:
        yield (
            f"architecture ({config.architecture}) names weights of timm, and the run begins with random ones all the same: "
            f"pass --architecture {bare}, or --init_from timm/{config.architecture} to begin with those"
        )
    for name, other in _idle_settings(config).items():
        if name in args.given:
            yield f"{name} ({getattr(config, name)}) has no effect with {other} {getattr(config, other)!r}"
    if training.world_size == 1 and config.batch_norm == "shuffle":
        yield (
            "in one process there is nobody to shuffle with, and BatchNorm tells keys apart by their batch. Pass "
            "--batch_norm split, which imitates several GPUs"
        )
    if args.recipe.values.get("batch_norm") == config.batch_norm == "shuffle" and recipe_batch:
        group, published = training.per_device_train_batch_size, recipe_batch // OFFICIAL_GPUS
        if training.world_size > 1 and group != published:
            yield (
                f"BatchNorm normalises the {group} images of each process by themselves; the recipe has groups of {published}, "
                f"a global batch of {recipe_batch} on {OFFICIAL_GPUS} processes. Launch as many, or pass "
                f"--global_batch_size {published * training.world_size} and its learning rate"
            )
    group = images_at_once(training, config)
    if group < 2:
        yield (
            f"BatchNorm sees {group} image at once, whose statistics say nothing: raise the batch, use fewer processes or "
            "--batch_norm_splits, or pass --batch_norm sync"
        )
    drawn = [] if args.data.streaming else [Path(f"{name}.png") for name in FIGURES]
    if kept := training.trackers.kept_back(drawn, {"dataset": args.data.dataset_name, "local": args.data.local}):
        yield kept
    if (
        config.key_encoder == "none"
        and config.symmetric_loss
        and config.batch_norm == "plain"
        and training.world_size > 1
    ):
        yield (
            "BatchNorm normalises the images of each process by themselves, where SimCLR has those of all. On GPUs pass "
            "--batch_norm sync"
        )
    images = trainer.train_dataset.images_per_epoch
    if config.dictionary == "queue" and images < config.queue_size:
        yield (
            f"the queue ({config.queue_size:,}) is larger than the dataset ({images:,} images): keys of the same image are "
            "among the negatives. Lower --queue_size"
        )


def _idle_settings(config: MoCoConfig) -> dict[str, str]:
    """Settings of a model that others leave without effect, and which those are."""
    of_batch = config.dictionary in ("batch", "batch_both_views")
    one_layer = config.projection_head == "linear" or config.projection_layers == 1
    return {
        name: other
        for name, idle, other in (
            ("queue_size", of_batch, "dictionary"),
            ("bank_momentum", config.dictionary in BUILT_IN - {"bank"}, "dictionary"),
            ("key_momentum", config.key_encoder != "momentum", "key_encoder"),
            ("batch_norm_splits", config.batch_norm != "split", "batch_norm"),
            ("projection_layers", config.projection_head == "linear", "projection_head"),
            ("projection_hidden_dim", one_layer and config.prediction_head == "none", "projection_head"),
        )
        if idle
    }


def peak_memory() -> float:
    """Most GB (10^9 bytes) that this process has had: for tensors on a GPU of CUDA, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def finish(args: PretrainArguments, trainer: MoCoTrainer, splits: ImageSplits) -> dict[str, Any]:
    """Leave the model, its history, `metrics.json`, `results.json`, the figures and `report.html` in the output directory."""
    folder = Path(str(args.training.output_dir))
    trainer.save_model(str(folder))
    trainer.save_state()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    step, knn = saved_step(trainer), _knn_at(trainer, saved_step(trainer))
    results = list(_results(trainer, knn))
    metrics = {
        "knn_top1_before": accuracies(_knn_at(trainer, 0)).get(next(iter(accuracies(knn)), 0)),
        "knn_top1_after": knn.get("eval_knn_top1"),
        "knn": monitored(results[0]) if results else None,
        "loss": steps[-1]["loss"],
        "contrast_top1": steps[-1]["contrast_top1"],
        "images_per_second": median(entry["images_per_second"] for entry in steps),
        "waiting_for_data": median(entry["waiting_for_data"] for entry in steps),
        "peak_memory": peak_memory(),
        "steps": step,
        "skipped_images": trainer.unreadable.write(folder),
    }
    metrics = {key: value for key, value in metrics.items() if value is not None}  # what was measured
    about = {key: value for key, value in conditions().items() if key != "command"} | {"data": splits.about}
    if trainer.is_world_process_zero():
        write_json(folder / METRICS, metrics | about)
    if not args.data.streaming:
        draw_features(trainer.model, splits, args.data, folder)
    if trainer.is_world_process_zero():
        draw_curves(read_run(folder))
        record(
            folder,
            results,
            model=encoder_digest(trainer.model, args.training.knn_features),
            data=splits.about,
            trackers=args.training.trackers,
            figures=drawn(folder),
            step=trainer.state.global_step,
        )
        write_report(read_run(folder))
        mark_ended(folder)
    return metrics


def monitored(result: Result) -> dict[str, Any]:
    """What says that a result is the kNN of a run's monitor, as `metrics.json` has it and results have it too."""
    return {"protocol": result.protocol, "feature": result.feature, "settings": result.settings}


def describe_bottleneck(metrics: dict[str, Any], data: DataArguments, device: torch.device) -> str:
    """A sentence: whether data or compute bounded the run that left these metrics, and what of the data is not as fast yet."""
    share = metrics["waiting_for_data"]
    if share < BOUND_BY_DATA:
        return f"compute bounded it: {share:.0f} % of the time was waiting for images"
    later = BACKENDS[1 + BACKENDS.index(data.view_backend) :]
    faster = [f"--view_backend {name}" for name in later if name != "device" or device.type != "cpu"]
    large = ["--decode scaled"] * (data.decode != "scaled") + [f"a copy by {how_to_run('prepare')}"]
    return (
        f"data bounded it: {share:.0f} % of the time was waiting for images. "
        f"{', or '.join(['More --dataloader_num_workers', *faster])}; for large photographs {', or '.join(large)}"
    )


def saved_step(trainer: MoCoTrainer) -> int:
    """Steps behind the weights that the trainer has now: its last ones or, with `load_best_model_at_end`, the best ones."""
    args, state = trainer.args, trainer.state
    best = state.best_global_step if args.load_best_model_at_end else None
    return state.global_step if best is None else best


def _knn_at(trainer: MoCoTrainer, step: int) -> dict[str, float]:
    """What the monitor logged after that many steps; nothing if it measured no kNN then."""
    logged = [x for x in trainer.state.log_history if "eval_knn_top1" in x and x["step"] == step]
    return logged[-1] if logged else {}


def _results(trainer: MoCoTrainer, knn: dict[str, float]) -> Iterator[Result]:
    args, monitor = trainer.args, trainer.monitor
    # Among several epochs the evaluated images themselves have chosen.
    chosen = ", best epoch on the evaluated images" if args.load_best_model_at_end else ""
    for k, top1 in accuracies(knn).items():
        words, n = protocol(k, args.knn_temperature) + chosen, len(monitor.queries or [])
        settings: dict[str, Any] = {"bank": len(monitor.bank or [])} | ({"step": knn["step"]} if chosen else {})
        yield Result(words, "top1", top1, n, args.knn_features, settings=settings, seed=args.seed)


def preview_views(args: PretrainArguments, splits: ImageSplits) -> None:
    """Draw the views that epoch 0 will make of eight training images, as a figure at `args.preview_views`.

    Raises:
        ValueError: no image can be read.
    """
    assert args.preview_views is not None
    drawn = list(islice(drawn_images(args, splits), PREVIEWED))
    if not drawn:
        raise ValueError(f"none of these images of {args.data.dataset_name} can be read: is this an image dataset?")
    plots.view_pairs(drawn, args.preview_views)


def drawn_images(args: PretrainArguments, splits: ImageSplits) -> Iterator[plots.DrawnImage]:
    """Training images, spread over the dataset (of a stream the first), with the views that epoch 0 makes of them.

    One that cannot be read is left out.
    """
    bank = args.config.dictionary == "bank"
    views, images = training_views(args.data, bank), training_images(args.data, splits, args.training, bank)
    rows: Iterable[tuple[int, dict[str, Any]]] = enumerate(islice(splits.train, 10 * PREVIEWED))
    if not isinstance(images, StreamedImages):  # from the whole dataset: folders are sorted by class
        rows = ((i, splits.train[i]) for i in range(0, len(images), max(1, len(images) // PREVIEWED)))
    for index, row in rows:
        with suppress(OSError):
            image = splits.decoder.image(row["image"])
            drawn = images.view_params(index, image)
            of_each = zip(drawn, views.policies, strict=True)
            rendered = [render_view(image, params, views.size, policy) for params, policy in of_each]
            yield plots.DrawnImage(image, drawn, rendered)
