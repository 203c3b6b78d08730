"""Train a segmentation model around an encoder: `python scripts/segment.py runs/mine --dataset_name VOCdevkit`."""

import sys

from transformers.utils.logging import disable_progress_bar

from ...engine.checkpoints import claim_output_dir, has_ended
from ...engine.results import encoder_digest
from ...engine.run_folder import WEIGHTS
from ...engine.sgd_trainer import train
from ...errors import one_line_errors
from ...process import command, keep_freed_memory
from ...segmentation.dataset.opening import load_segmentation
from ...segmentation.run import (
    SegmentRun,
    announce,
    build_trainer,
    finish,
    leave_results,
    load_segmenter,
    parse_segment,
    results_of,
    show_recorded,
)


@command
def main(argv: list[str]) -> None:
    keep_freed_memory()
    disable_progress_bar()  # transformers' bars for loading and saving weights
    with one_line_errors():
        run = parse_segment(argv)
        if run.eval_only:
            evaluate(run)
            return
        splits = load_segmentation(run.data)
        trainer = build_trainer(run, splits)
        run.settings["encoder"][WEIGHTS] = encoder_digest(trainer.model.moco)
        if has_ended(run.training, run.settings, run.defaults, splits.place):
            show_recorded(run)
            return
        checkpoint = claim_output_dir(
            run.training, trainer.batch_layout, run.settings, run.defaults, run.about, splits.place
        )
    if trainer.is_world_process_zero():
        announce(run, splits)
        if checkpoint:
            print(f"Continuing from {checkpoint}.")
    train(trainer, checkpoint)
    finish(run, splits, trainer)
    if trainer.is_world_process_zero():
        print(f"Saved to {run.training.output_dir}")


def evaluate(run: SegmentRun) -> None:
    """Measure a model that is there, and add the results to its folder."""
    model, processor = load_segmenter(run)
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    splits = load_segmentation(run.data, names, training=False)
    measured = results_of(run, splits, model.to(run.training.device), processor)
    if run.training.process_index == 0:
        leave_results(run, splits, model, measured, None)


if __name__ == "__main__":
    main(sys.argv[1:])
