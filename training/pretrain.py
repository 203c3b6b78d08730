"""A pretraining run from its arguments: build it, run it, leave its results behind."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

from modeling_moco import MoCoConfig, MoCoModel

from . import plots
from .augment import TwoViews, build_policy
from .data import ImageSplits, load_images
from .features import extract_features, unit
from .images import MapImages, StreamedImages
from .recipe import PretrainArguments
from .trainer import MoCoTrainer

PICTURED_QUERIES, PICTURED_BANK = 8, 10_000  # rows of the neighbour picture, and images that it searches


def build_trainer(args: PretrainArguments) -> MoCoTrainer:
    """Data, model and trainer. Everything that the user's input can break breaks here, before any time is spent.

    Raises:
        ValueError: with the value, the rule and the remedy.
    """
    data, training = args.data, args.training
    splits = load_images(data)
    train = _training_images(args, splits)
    bank = queries = None
    if training.eval_strategy != IntervalStrategy.NO:
        view = data.evaluation_view()
        if not data.streaming:
            bank = MapImages(splits.train, view).spread(training.knn_bank_size or len(splits.train))
        missing = _missing_for_knn(args, splits)
        if missing is None and bank is not None:
            queries = MapImages(splits.eval, view)
            if max(training.knn_k) > len(bank):
                raise ValueError(
                    f"knn_k ({max(training.knn_k)}) is larger than the bank ({len(bank)} images): lower it"
                )
        elif training.process_index == 0:
            print(f"The kNN monitor is off: {missing}.")
    set_seed(training.seed)
    model = MoCoModel(args.config)
    check_image_size(model, data.image_size)
    trainer = MoCoTrainer(model, training, train, data.image_processor(args.config), bank, queries)
    trainer.class_names = splits.class_names
    return trainer


def _training_images(args: PretrainArguments, splits: ImageSplits) -> MapImages | StreamedImages:
    data, training = args.data, args.training
    views = TwoViews(build_policy(data.augmentation, data.horizontal_flip, data.crop_min_scale), data.image_size)
    if not data.streaming:
        return MapImages(splits.train, views, training.seed)
    return StreamedImages(
        splits.train,
        views,
        batch_size=training.per_device_train_batch_size,
        seed=training.seed,
        rank=training.process_index,
        world_size=training.world_size,
        buffer_size=data.shuffle_buffer,
    )


def _missing_for_knn(args: PretrainArguments, splits: ImageSplits) -> str | None:
    return "it needs an indexed dataset (no --streaming)" if args.data.streaming else splits.label_flaw


@torch.no_grad()
def check_image_size(model: MoCoModel, size: int) -> None:
    """Try the encoder on one blank image.

    Raises:
        ValueError: it takes no images of that size.
    """
    try:
        model.eval().features(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"image_size ({size}) is refused by {model.config.architecture} ({error}): choose another, or for a ViT pass "
            f"--model_args '{{\"img_size\": {size}}}'"
        ) from error


def announce(args: PretrainArguments, trainer: MoCoTrainer, default_recipe: bool) -> None:
    """Say what is about to run, in the numbers that decide its result."""
    training, config = args.training, args.config
    if default_recipe:
        print(
            "No --recipe given: running 'quickstart'. For your own images:\n"
            "  accelerate launch --quiet scripts/pretrain.py --recipe moco_v2_r50_in1k_200ep --dataset_name FOLDER "
            "--output_dir runs/mine\n  (with one GPU add --batch_norm split)"
        )
    for key in ("title", "source", "hardware", "expected"):
        if key in args.recipe.about:
            print(f"{key:>9}: {args.recipe.about[key]}")
    print(
        f"      run: {trainer.train_dataset.images_per_epoch:,} images, global batch {training.images_per_step} "
        f"({training.world_size} x {training.per_device_train_batch_size} x {training.gradient_accumulation_steps} "
        f"accumulated), rate {training.learning_rate:g}, {config.architecture}, K {config.queue_size:,}, "
        f"m {config.key_momentum:g}, T {config.temperature:g}, to {training.output_dir}"
    )
    print(
        f"  reading: the loss may rise while keys replace the random queue, and stay near {'2 ' * config.symmetric_loss}"
        f"log(1+K) = {chance_loss(config):.2f}, where all keys look alike, for a while. That is not a fault: watch "
        f"contrast_top1, {100 / (1 + config.queue_size):.2g} % by chance"
    )
    for warning in _warnings(args, trainer):
        print(f"warning: {warning}")


def chance_loss(config: MoCoConfig) -> float:
    """The loss of a model for which all keys are equally similar to every query."""
    return (2 if config.symmetric_loss else 1) * math.log(1 + config.queue_size)


def _warnings(args: PretrainArguments, trainer: MoCoTrainer) -> Iterator[str]:
    training, config = args.training, args.config
    batch, rate = training.images_per_step, training.learning_rate
    recipe_batch, recipe_rate = (args.recipe.values.get(key) for key in ("global_batch_size", "learning_rate"))
    if recipe_batch not in (None, batch) and rate == recipe_rate:
        yield (
            f"the recipe's rate {rate:g} is for a global batch of {recipe_batch}; for {batch} the linear rule gives "
            f"{rate * batch / recipe_batch:g} (--learning_rate)"
        )
    if training.world_size == 1 and config.batch_norm == "shuffle":
        yield (
            "in one process there is nobody to shuffle with, and BatchNorm tells keys apart by their batch. Pass "
            "--batch_norm split, which imitates several GPUs"
        )
    group = training.per_device_train_batch_size // (config.batch_norm_splits if config.batch_norm == "split" else 1)
    if group < 2 and config.batch_norm != "sync":
        yield (
            f"BatchNorm sees {group} image at once, whose statistics say nothing: raise the batch, use fewer processes or "
            "--batch_norm_splits, or pass --batch_norm sync"
        )
    images = trainer.train_dataset.images_per_epoch
    if images < config.queue_size:
        yield (
            f"the queue ({config.queue_size:,}) is larger than the dataset ({images:,} images): keys of the same image are "
            "among the negatives. Lower --queue_size"
        )


def finish(args: PretrainArguments, trainer: MoCoTrainer) -> dict[str, Any]:
    """Save the model, `metrics.json`, the curves and the nearest neighbours to the output directory."""
    folder = Path(str(args.training.output_dir))
    trainer.save_model(str(folder))
    history = trainer.state.log_history
    knn = [entry["eval_knn_top1"] for entry in history if "eval_knn_top1" in entry]
    steps = [entry for entry in history if "loss" in entry]
    metrics = {
        "knn_top1_before": knn[0] if knn else None,
        "knn_top1_after": knn[-1] if knn else None,
        "loss": steps[-1]["loss"],
        "contrast_top1": steps[-1]["contrast_top1"],
        "images_per_second": median(entry["images_per_second"] for entry in steps),
        "steps": trainer.state.global_step,
        "skipped_images": trainer.train_dataset.skipped,
    }
    if trainer.knn_bank is not None and trainer.knn_queries is not None:
        bank, queries = trainer.knn_bank.spread(PICTURED_BANK), trainer.knn_queries.spread(PICTURED_QUERIES)
        query_features, _ = extract_features(trainer.model, queries)
        bank_features, _ = extract_features(trainer.model, bank)
    if trainer.is_world_process_zero():
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        plots.training_curve(history, chance_loss(args.config), folder / "training_curve.png")
        if trainer.knn_queries is not None:
            plots.neighbour_grid(
                queries, bank, unit(query_features), unit(bank_features), trainer.class_names, folder / "neighbours.png"
            )
    return metrics
