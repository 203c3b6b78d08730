"""Classify by nearest neighbours on frozen features: `python scripts/knn.py runs/quickstart --knn_k 10 20 200`."""

import sys
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils import logging

from modeling_moco import MoCoModel

from ...cli import names_in_files
from ...data.images import MapImages
from ...data.sources import EvaluationDataArguments, load_images
from ...engine.record import Trackers, record, run_name
from ...engine.results import encoder_digest, table
from ...engine.run_folder import FEATURES
from ...errors import DataError, one_line_errors
from ...evaluation.encoder import Encoder, check_image_size, check_writable, parse_evaluation
from ...evaluation.knn import KNNArguments, evaluate_knn
from ...process import command, keep_freed_memory


@command
def main(argv: list[str]) -> None:
    keep_freed_memory()
    logging.disable_progress_bar()
    with one_line_errors():
        encoder, data, args = parse_knn(argv)
        state = PartialState(cpu=args.use_cpu or not torch.cuda.is_available())  # unasked it forms no group on CPUs
        splits = load_images(data, labelled=True)
        if max(args.knn_k) > len(splits.train):
            raise ValueError(
                f"knn_k ({max(args.knn_k)}) is larger than the train split ({len(splits.train)} images): lower it"
            )
        check_writable(encoder.results_dir)
        model = load_model(encoder, args).to(state.device)
        check_image_size(model, data.image_size)
        trackers = Trackers(args.report_to, args.project, run_name(encoder.results_dir), encoder.results_dir)
        trackers.check()
    view, decode = data.evaluation_view(), splits.decoder.image
    bank, queries = (MapImages(split, view, decode=decode) for split in (splits.train, splits.eval))
    if state.is_main_process:
        print(f"kNN of {encoder}: {args.knn_features} feature, bank {len(bank):,} images, {len(queries):,} queries")
    with one_line_errors((DataError,)):
        results = evaluate_knn(model, bank, queries, args, cache=encoder.results_dir / FEATURES)
    if state.is_main_process:
        digest = encoder_digest(model, args.knn_features)
        record(encoder.results_dir, results, model=digest, data=splits.about, trackers=trackers)
        print(table(results))


def parse_knn(argv: list[str]) -> tuple[Encoder, EvaluationDataArguments, KNNArguments]:
    """Flags over the data and monitor settings of the pretraining run that the model came from.

    Raises:
        ValueError: no model there, no dataset named, an unknown flag, or a value out of its range.
    """

    def of_monitor(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
        training, names = recipe.get("training", {}), names_in_files(KNNArguments)
        return {"training": {key: training[key] for key in names if key in training and key.startswith("knn_")}}

    encoder, (data, args), _, _ = parse_evaluation(
        argv,
        {"data": EvaluationDataArguments, "knn": KNNArguments},
        command="knn",
        description="Classify images by their nearest neighbours among the train split's frozen features.",
        defaults=of_monitor,
    )
    return encoder, data, args


def load_model(encoder: Encoder, args: KNNArguments) -> MoCoModel:
    """The model with what the chosen feature needs."""
    return encoder.load(MoCoModel, args.seed, head=args.knn_features == "head")


if __name__ == "__main__":
    main(sys.argv[1:])
