"""Draw the figures of a run and write its report.html: `python scripts/report.py runs/quickstart`."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils import logging

from modeling_moco import MoCoModel

from ..cli import build_parser, how_to_run, section_of_file
from ..data.sources import DataArguments
from ..engine.page import check_state, read_run, write_report
from ..engine.run_folder import SAVED_RECIPE, TRAINING, recorded_content, refuse_namesake
from ..errors import one_line_errors
from ..evaluation.encoder import Encoder, not_there
from ..process import command, keep_freed_memory
from ..reports.run import draw_curves, draw_features, open_images
from ..transfer.figures import draw_training


@command
def main(argv: list[str]) -> None:
    keep_freed_memory()
    logging.disable_progress_bar()
    parser = build_parser([], usage=f"{how_to_run('report')} RUN", description=str(__doc__))
    parser.add_argument(
        "run_dir", type=Path, nargs="+", help="output directory of pretraining, detect or segment, ended or not"
    )
    with one_line_errors():
        folder, *others = parser.parse_args(argv).run_dir
        if others:
            raise ValueError(f"a report is of one run: {how_to_run('compare')} puts several into one table")
        if not folder.exists():
            raise not_there(str(folder), " as a folder here")
        run = read_run(folder)
        check_state(run)
        state = PartialState(cpu=not torch.cuda.is_available())
        if run.task:
            if state.is_main_process:
                draw_training(run.state["log_history"], folder / TRAINING)
                print(f"Wrote {write_report(run)}")
            return
        model = Encoder(str(run.source)).load(MoCoModel, seed=0).to(state.device)
        missing = None
        try:
            data = DataArguments(**section_of_file(folder / SAVED_RECIPE, "data", run.recipe["data"], DataArguments))
            refuse_namesake(run.recipe["data"].get("dataset_name"), data.dataset_name)
            data.content = recorded_content(folder, data.dataset_name)
            draw_features(model, open_images(data), data, folder)
        except ValueError as error:
            missing = str(error)
        if state.is_main_process:
            if missing:
                print(f"warning: no neighbours and no t-SNE: {missing}", file=sys.stderr)
            draw_curves(run)
            print(f"Wrote {write_report(run, missing)}")


if __name__ == "__main__":
    main(sys.argv[1:])
