"""Classify by nearest neighbours on frozen features: `accelerate launch scripts/knn.py runs/quickstart --k 10 20 200`."""

import sys

import torch
from accelerate import PartialState
from transformers.utils import logging

from ..data.images import MapImages
from ..data.sources import load_images
from ..engine.record import record
from ..engine.results import encoder_digest, table
from ..engine.run_folder import FEATURES
from ..engine.trackers import Trackers, run_name
from ..errors import one_line_errors
from ..evaluation.knn import evaluate_knn, load_model, parse_knn
from ..memory import keep_freed_memory


def main(argv: list[str]) -> None:
    keep_freed_memory()
    logging.disable_progress_bar()
    with one_line_errors():
        encoder, data, args = parse_knn(argv)
        state = PartialState(cpu=args.use_cpu or not torch.cuda.is_available())  # unasked it forms no group on CPUs
        splits = load_images(data, labelled=True)
        if max(args.k) > len(splits.train):
            raise ValueError(f"k ({max(args.k)}) is larger than the train split ({len(splits.train)} images): lower it")
        model = load_model(encoder, args).to(state.device)
        trackers = Trackers(args.report_to, args.project, run_name(encoder.results_dir), encoder.results_dir)
        trackers.check()
    bank, queries = (MapImages(split, data.evaluation_view()) for split in (splits.train, splits.eval))
    if state.is_main_process:
        print(f"kNN of {encoder}: {args.features} feature, bank {len(bank):,} images, {len(queries):,} queries")
    results = evaluate_knn(model, bank, queries, args, cache=encoder.results_dir / FEATURES)
    if state.is_main_process:
        digest = encoder_digest(model, args.features)
        record(encoder.results_dir, results, model=digest, data=splits.about, trackers=trackers)
        print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
