"""Fine-tune an encoder with few labels or all: `python scripts/finetune.py runs/mine --label_fraction 0.1`."""

import sys

from transformers.utils.logging import disable_progress_bar

from ...cli import how_to_classify
from ...engine.checkpoints import claim_output_dir, has_ended
from ...engine.run_folder import RESULTS, WEIGHTS
from ...engine.sgd_trainer import train
from ...errors import one_line_errors
from ...evaluation.encoder import check_image_size, check_writable, open_images, show_recorded
from ...evaluation.finetune import announce, build_trainer, choose_labelled, finish, parse_finetune, save_split
from ...process import command, keep_freed_memory


@command
def main(argv: list[str]) -> None:
    keep_freed_memory()
    disable_progress_bar()  # transformers' bars for loading and saving weights
    with one_line_errors():
        run = parse_finetune(argv)
        splits = open_images(run)
        if splits is None:
            return
        labelled = choose_labelled(splits, run.training)
        trainer = build_trainer(run, splits, labelled)
        run.settings["encoder"][WEIGHTS] = trainer.encoder
        if has_ended(run.training, run.settings, run.defaults, splits.place):
            show_recorded(run.training)
            return
        check_writable(run.encoder.results_dir)
        check_image_size(trainer.model.moco, run.data.image_size)
        about = {"title": f"fine-tuning {run.encoder}"}
        checkpoint = claim_output_dir(
            run.training, trainer.batch_layout, run.settings, run.defaults, about, splits.place
        )
        save_split(splits, run.training, labelled)
    if trainer.is_world_process_zero():
        announce(run, trainer)
        if checkpoint:
            print(f"Continuing from {checkpoint}.")
    train(trainer, checkpoint)
    scores = finish(run, trainer, splits)
    if trainer.is_world_process_zero():
        print(scores)
        folder = str(run.training.output_dir)
        print(f"Saved to {folder}, results to {run.encoder.results_dir}/{RESULTS}. Classify your IMAGE:")
        print(f"  {how_to_classify(folder)}")


if __name__ == "__main__":
    main(sys.argv[1:])
