"""Train a linear classifier on a frozen encoder: `accelerate launch scripts/linear_probe.py runs/quickstart`."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from transformers import pipeline
from transformers.utils import logging

from training.cli import REQUEUE, claim_output_dir, one_line_errors
from training.data import ImageSplits, load_images
from training.images import decode_image
from training.linear_probe import (
    Probe,
    build_trainer,
    finish,
    load_classifier,
    parse_linear_probe,
    run_cached,
    save_probe,
)
from training.sgd_trainer import TrainingError

SHOWN_IMAGES = 4


def main(argv: list[str]) -> None:
    logging.disable_progress_bar()
    with one_line_errors():
        run = parse_linear_probe(argv)
        splits = load_images(run.data, labelled=True)
        model = load_classifier(run.encoder, splits, run.training.seed)
        official = run.training.mode == "official"
        trainer = build_trainer(model, run.training, run.data, splits) if official else None
        division = None if trainer is None else trainer.division
        checkpoint = claim_output_dir(run.training, division, run.settings, {"title": run.title})
    folder = Path(str(run.training.output_dir))
    if run.training.process_index == 0:
        print(f"{run.title}\n{len(splits.train):,} images, {len(splits.class_names)} classes, to {folder}")
    probes: Iterable[Probe]
    if trainer is None:
        probes = run_cached(model, run.training, run.data, splits, run.encoder.home / "features")
    else:
        with one_line_errors((TrainingError,)):
            trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.terminated:
            raise SystemExit(REQUEUE)
        probes = [finish(trainer, model)]
    top1 = {}
    for probe in probes:
        if run.training.process_index == 0:
            save_probe(probe, run, splits, model.moco)
            print(probe.table())
            top1[f"linear probe, {probe.name}"] = probe.scores.top1
    if run.training.process_index == 0:
        if official:
            classify_some(folder, splits)
        print_table(run.encoder.home, top1)


def classify_some(folder: Path, splits: ImageSplits) -> None:
    classify = pipeline("image-classification", model=str(folder))
    print(f"pipeline('image-classification', model='{folder}') on test images:")
    for row in splits.eval.select(range(min(SHOWN_IMAGES, len(splits.eval)))):
        best = classify(decode_image(row["image"]))[0]
        print(f"  {splits.class_names[row['label']]} is called {best['label']} ({best['score']:.2f})")


def print_table(home: Path, top1: dict[str, float]) -> None:
    pretraining = home / "metrics.json"
    rows: dict[str, float | None] = {}
    if pretraining.is_file():
        numbers = json.loads(pretraining.read_text(encoding="utf-8"))
        rows = {"kNN before training": numbers["knn_top1_before"], "kNN after": numbers["knn_top1_after"]}
    rows |= top1
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}} | " + (f"{value:5.1f} %" if value is not None else "not measured"))


if __name__ == "__main__":
    main(sys.argv[1:])
