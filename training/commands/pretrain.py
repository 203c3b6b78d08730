"""Pretrain an encoder with MoCo: `python scripts/pretrain.py --recipe quickstart`."""

import shlex
import sys
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from ..cli import how_to_run
from ..convert.start import read_start
from ..data.sources import ImageSplits, load_images
from ..engine.checkpoints import claim_output_dir, decided_by_main, has_ended
from ..engine.run_folder import REPORT, UNREADABLE, content_to_continue, unused
from ..engine.sgd_trainer import train
from ..errors import one_line_errors
from ..hub.repository import PublishCallback
from ..pretrain import announce, build_trainer, describe_bottleneck, finish, preview_views
from ..process import command, keep_freed_memory
from ..recipe import PretrainArguments, parse_pretrain


@command
def main(argv: list[str]) -> None:
    keep_freed_memory()
    disable_progress_bar()  # transformers' bars for loading and saving weights
    with one_line_errors():
        args = parse_pretrain(argv)
        if args.preview_views is not None:
            preview(args)
            return
        publisher = (
            PublishCallback.of_run(args.training, args.training.include_pictures) if args.training.publish else None
        )
        if publisher is not None:
            decided_by_main(publisher.prepare)
        if has_ended(args.training, args.settings, args.defaults):
            publish_end(args, publisher)
            return
        start = None if args.init_from is None else read_start(args.init_from, args.config)
        if start is not None:
            args.begin_with(start)
        folder = Path(str(args.training.output_dir))
        args.data.content = decided_by_main(lambda: content_to_continue(folder, args.data.dataset_name))
        splits = load_images(args.data)
        trainer = build_trainer(args, splits, start)
        if publisher is not None:
            trainer.add_callback(publisher)  # after the trainer's own, which complete a checkpoint
        layout = trainer.batch_layout
        checkpoint = claim_output_dir(args.training, layout, args.settings, args.defaults, args.about, splits.place)
    if trainer.is_world_process_zero():
        announce(args, trainer, start)
        if checkpoint:
            print(f" continue: from {checkpoint}")
    args.training.eval_on_start = args.training.eval_strategy != "no" and checkpoint is None
    train(trainer, checkpoint)
    metrics = finish(args, trainer, splits)
    if trainer.is_world_process_zero():
        show(metrics, str(folder), args)
        print(f"Saved to {folder}; its figures and numbers are in {folder}/{REPORT}")
    publish_end(args, publisher)
    if trainer.is_world_process_zero():
        print(f"Next: {next_command(str(folder), splits)}")


def preview(args: PretrainArguments) -> None:
    splits = load_images(args.data)  # which all processes agree about
    if args.training.process_index == 0:
        preview_views(args, splits)
        print(f"Wrote {args.preview_views}.png and .svg: what epoch 0 of this run sees.")


def publish_end(args: PretrainArguments, publisher: PublishCallback | None) -> None:
    if publisher is not None and args.training.process_index == 0:
        with one_line_errors():
            print(f"Published: {publisher.send_last(Path(str(args.training.output_dir)))}")


def show(metrics: dict[str, Any], folder: str, args: PretrainArguments) -> None:
    for name, key in (("kNN before training", "knn_top1_before"), ("kNN after", "knn_top1_after")):
        if key in metrics:
            print(f"{name:>20}: {metrics[key]:.1f} %")
    listed = f", listed in {folder}/{UNREADABLE}" if metrics["skipped_images"] else ""
    print(f"{'unreadable images':>20}: {metrics['skipped_images']}{listed}")
    bottleneck = describe_bottleneck(metrics, args.data, args.training.device)
    print(f"{'images/s':>20}: {metrics['images_per_second']:.0f}; {bottleneck}")


def next_command(folder: str, splits: ImageSplits) -> str:
    """A command that runs as it is printed: the linear probe, or without labels what would be published."""
    if splits.label_problem is not None:
        return f"{how_to_run('publish')} {shlex.quote(folder)} ORG/NAME --dry_run"
    probe = str(Path(folder) / "linear_probe")  # where a probe is written by default
    free = "" if unused(probe) == probe else f" --output_dir {shlex.quote(unused(probe))}"
    return f"{how_to_run('probe')} {shlex.quote(folder)}{free}"


if __name__ == "__main__":
    main(sys.argv[1:])
