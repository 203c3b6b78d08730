"""Pretrain an encoder with MoCo: `python scripts/pretrain.py --recipe quickstart`."""

import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ..cli import how_to_run
from ..data.sources import load_images
from ..engine.checkpoints import claim_output_dir
from ..engine.run_folder import REPORT
from ..engine.sgd_trainer import train
from ..errors import one_line_errors
from ..hub.repository import PublishCallback
from ..memory import keep_freed_memory
from ..pretrain import announce, build_trainer, describe_bottleneck, finish, preview_views
from ..recipe import parse_pretrain


def main(argv: list[str]) -> None:
    keep_freed_memory()
    disable_progress_bar()  # transformers' bars for loading and saving weights
    with one_line_errors():
        args = parse_pretrain(argv)
        splits = load_images(args.data)
        if args.preview_views is not None:
            if args.training.process_index == 0:
                preview_views(args, splits)
                print(f"Wrote {args.preview_views}.png and .svg: what epoch 0 of this run sees.")
            return
        trainer = build_trainer(args, splits)
        publisher = PublishCallback.of_run(args.training) if args.training.publish else None
        if publisher is not None:
            publisher.prepare()
            trainer.add_callback(publisher)  # after the trainer's own, which complete a checkpoint
        checkpoint = claim_output_dir(args.training, trainer.batch_layout, args.settings, args.recipe.about)
    if trainer.is_world_process_zero():
        announce(args, trainer)
        if checkpoint:
            print(f" continue: from {checkpoint}")
    args.training.eval_on_start = args.training.eval_strategy != "no" and checkpoint is None
    train(trainer, checkpoint)
    metrics = finish(args, trainer, splits)
    if trainer.is_world_process_zero():
        folder = args.training.output_dir
        rows = {"kNN before training": metrics["knn_top1_before"], "kNN after": metrics["knn_top1_after"]}
        for name, value in rows.items():
            print(f"{name:>20}: " + (f"{value:.1f} %" if value is not None else "not measured"))
        print(f"{'skipped images':>20}: {metrics['skipped_images']}")
        print(f"{'images/s':>20}: {metrics['images_per_second']:.0f}; {describe_bottleneck(metrics)}")
        print(f"Saved to {folder}; its figures and numbers are in {folder}/{REPORT}")
        if publisher is not None:
            with one_line_errors():
                print(f"Published: {publisher.send_last(Path(str(folder)))}")
        print(f"Next: {how_to_run('probe')} {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
