"""Train a linear classifier on a frozen encoder: `python scripts/linear_probe.py runs/quickstart`."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from transformers import pipeline
from transformers.utils import logging

from ..cli import how_to_run
from ..data.decode import decode_image
from ..data.sources import ImageSplits, load_images
from ..engine.checkpoints import claim_output_dir
from ..engine.run_folder import FEATURES, METRICS
from ..engine.sgd_trainer import train
from ..errors import one_line_errors
from ..evaluation import linear_probe as lp
from ..evaluation.cached_probe import build_cached
from ..evaluation.probe_results import Probe
from ..memory import keep_freed_memory

SHOWN_IMAGES = 4
NEXT = """Next:
  python -c "from transformers import pipeline; import modeling_moco; print(pipeline('image-classification', '{0}')('IMAGE'))"
  {1} --recipe moco_v2_r50_in1k_200ep --dataset_name FOLDER --batch_norm split --output_dir runs/mine
  {1} --help"""


def main(argv: list[str]) -> None:
    keep_freed_memory()
    logging.disable_progress_bar()
    with one_line_errors():
        run = lp.parse_linear_probe(argv)
        splits = load_images(run.data, labelled=True)
        model = run.encoder.load_classifier(splits.class_names, run.training.seed)
        trainer = None
        probes: Iterable[Probe] = []
        if run.training.mode == "official":
            trainer = lp.build_trainer(model, run.training, run.data, splits)
        else:
            probes = build_cached(model, run.training, run.data, splits, run.encoder.results_dir / FEATURES)
        layout = None if trainer is None else trainer.batch_layout
        checkpoint = claim_output_dir(run.training, layout, run.settings, {"title": run.title}, splits.place)
    folder, main_process = Path(str(run.training.output_dir)), run.training.process_index == 0
    if main_process:
        print(f"{run.title}\n{len(splits.train):,} images, {len(splits.class_names)} classes, to {folder}")
    if trainer is not None:
        train(trainer, checkpoint)
        probes = [lp.finish(trainer, model)]
    top1 = {}
    for probe in probes:
        if main_process:
            lp.save_probe(probe, run, splits, model.moco)
            print(probe.table())
            top1[f"linear probe, {probe.name}"] = probe.scores.top1
    if main_process:
        print_table(run.encoder.results_dir, top1)
    if main_process and trainer is not None:
        classify_some(folder, splits)
        print(NEXT.format(folder, how_to_run("pretrain")))


def classify_some(folder: Path, splits: ImageSplits) -> None:
    classify = pipeline("image-classification", model=str(folder))
    print(f"pipeline('image-classification', model='{folder}') on test images:")
    for row in splits.eval.select(range(min(SHOWN_IMAGES, len(splits.eval)))):
        best = classify(decode_image(row["image"]))[0]
        print(f"  {splits.class_names[row['label']]} is called {best['label']} ({best['score']:.2f})")


def print_table(results_dir: Path, top1: dict[str, float]) -> None:
    pretraining = results_dir / METRICS
    rows: dict[str, float | None] = {}
    if pretraining.is_file():
        numbers = json.loads(pretraining.read_text(encoding="utf-8"))
        names = {"kNN before training": "knn_top1_before", "kNN after": "knn_top1_after"}
        rows = {name: numbers[key] for name, key in names.items() if key in numbers}
    rows |= top1
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}} | " + (f"{value:5.1f} %" if value is not None else "not measured"))


if __name__ == "__main__":
    main(sys.argv[1:])
