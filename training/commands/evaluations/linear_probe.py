"""Train a linear classifier on a frozen encoder: `python scripts/linear_probe.py runs/quickstart`."""

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import pipeline
from transformers.utils import logging

from ...cli import how_to_classify, how_to_run
from ...data.sources import ImageSplits
from ...engine.checkpoints import claim_output_dir, has_ended
from ...engine.results import encoder_digest, read_results
from ...engine.run_folder import FEATURES, METRICS, WEIGHTS, mark_ended, read_metrics, unused
from ...engine.sgd_trainer import train
from ...errors import DataError, one_line_errors
from ...evaluation import linear_probe as lp
from ...evaluation.cached_probe import build_cached
from ...evaluation.encoder import check_image_size, check_writable, open_images, show_recorded
from ...evaluation.probe_results import Probe
from ...process import command, keep_freed_memory
from ...reports.compare import OF_DATA

BY_MONITOR = ("protocol", "feature", "settings")  # which the kNN of a run's monitor is known by
SHOWN_IMAGES = 4
NEXT = """Next, with your IMAGE and your FOLDER of images:
  {classify}
  {pretrain} --recipe moco_v2_r50_in1k_200ep --dataset_name FOLDER --batch_norm split --output_dir {unused}
  {pretrain} --help"""


@command
def main(argv: list[str]) -> None:
    keep_freed_memory()
    logging.disable_progress_bar()
    with one_line_errors():
        run = lp.parse_linear_probe(argv)
        splits = open_images(run)
        if splits is None:
            return
        model = run.encoder.load_classifier(splits.class_names, run.training.seed)
        run.settings["encoder"][WEIGHTS] = encoder_digest(model.moco)
        if has_ended(run.training, run.settings, run.defaults, splits.place):
            show_recorded(run.training)
            return
        check_writable(run.encoder.results_dir)
        check_image_size(model.moco, run.data.image_size)
        trainer = None
        probes: Iterable[Probe] = []
        if run.training.mode == "official":
            trainer = lp.build_trainer(model, run.training, run.data, splits)
        else:
            probes = build_cached(model, run.training, run.data, splits, run.encoder.results_dir / FEATURES)
        layout = None if trainer is None else trainer.batch_layout
        checkpoint = claim_output_dir(
            run.training, layout, run.settings, run.defaults, {"title": run.title}, splits.place
        )
    folder, main_process = Path(str(run.training.output_dir)), run.training.process_index == 0
    if main_process:
        print(f"{run.title}\n{len(splits.train):,} images, {len(splits.class_names)} classes, to {folder}")
        if run.training.late_milestones:
            print(f"warning: {run.training.late_milestones}")
    if trainer is not None:
        train(trainer, checkpoint)
        probes = [lp.finish(trainer, model)]
    top1 = {}
    with one_line_errors((DataError,)):  # features are read where the first probe is asked for
        for probe in probes:
            if main_process:
                lp.save_probe(probe, run, splits, model.moco)
                print(probe.table())
                top1[f"linear probe, {probe.name}"] = probe.scores.top1
    if main_process:
        print_table(run.encoder.results_dir, encoder_digest(model.moco), splits.about, top1)
        mark_ended(folder)
    if main_process and trainer is not None:
        classify_some(folder, splits)
        classify, free = how_to_classify(str(folder)), unused("runs/mine")
        print(NEXT.format(classify=classify, pretrain=how_to_run("pretrain"), unused=free))


def classify_some(folder: Path, splits: ImageSplits) -> None:
    classify = pipeline("image-classification", model=str(folder))
    print(f"pipeline('image-classification', model='{folder}') on test images:")
    for image, label in islice(readable_images(splits), SHOWN_IMAGES):
        best = classify(image)[0]
        print(f"  {splits.class_names[label]} is called {best['label']} ({best['score']:.2f})")


def readable_images(splits: ImageSplits) -> Iterator[tuple[Image.Image, int]]:
    """The evaluated images with their classes. One that cannot be read is left out: the evaluation has named it."""
    for row in splits.eval:
        try:
            image = splits.decoder.image(row["image"])
        except OSError:
            continue
        yield image, row["label"]


def print_table(results_dir: Path, digest: str, data: dict[str, Any], top1: dict[str, float]) -> None:
    """The probe beside a kNN of these weights on the same images: the monitor's, before and after, or else the last one.

    Args:
        digest: of the encoder's weights.
        data: the images of the probe (`ImageSplits.about`).
        top1: of the probe, by the name of its row.
    """
    monitored = read_metrics(results_dir / METRICS, "correct it, or move it away")
    knn = [entry for entry in read_results(results_dir) if _is_knn(entry, digest, data)]
    rows, protocol = {}, ""
    if knn:
        of_monitor = [entry for entry in knn if {name: entry[name] for name in BY_MONITOR} == monitored.get("knn")]
        before = {"kNN before training": monitored.get("knn_top1_before")} if of_monitor else {}
        shown = of_monitor[0] if of_monitor else knn[-1]
        rows, protocol = before | {"kNN after": shown["value"]}, shown["protocol"]
    measured = {name: value for name, value in (rows | top1).items() if value is not None}
    for name, value in measured.items():
        print(f"{name:<{max(map(len, measured))}} | {value:5.1f} %{f'  {protocol}' if name in rows else ''}")


def _is_knn(entry: dict[str, Any], digest: str, data: dict[str, Any]) -> bool:
    same = all(entry["data"].get(name) == data.get(name) for name in OF_DATA)
    return entry["protocol"].startswith("weighted kNN") and entry["model"] == digest and same


if __name__ == "__main__":
    main(sys.argv[1:])
