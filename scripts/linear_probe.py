"""Train a linear classifier on a frozen encoder: `accelerate launch scripts/linear_probe.py runs/quickstart`."""

import json
import sys
from pathlib import Path

from transformers import pipeline
from transformers.utils import logging

from training.cli import REQUEUE, claim_output_dir, one_line_errors
from training.data import load_images
from training.images import decode_image
from training.linear_probe import build_trainer, load_classifier, logistic_top1, parse_linear_probe
from training.sgd_trainer import TrainingError

SHOWN_IMAGES = 4


def main(argv: list[str]) -> None:
    logging.disable_progress_bar()
    with one_line_errors():
        args = parse_linear_probe(argv)
        splits = load_images(args.data, labelled=True)
        model = load_classifier(args.encoder, splits, args.training.seed)
        trainer = build_trainer(model, args.training, args.data, splits)
        checkpoint = claim_output_dir(args.training, trainer.division, args.settings, {"title": args.title})
    folder = Path(str(args.training.output_dir))
    if trainer.is_world_process_zero():
        print(f"{args.title}: {len(splits.train):,} images, {len(splits.class_names)} classes, to {folder}")
    with one_line_errors((TrainingError,)):
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.terminated:
        raise SystemExit(REQUEUE)
    evaluations = [entry for entry in trainer.state.log_history if "eval_top1" in entry]
    metrics = evaluations[-1] if evaluations else trainer.evaluate()
    trainer.save_model(str(folder))
    logistic = logistic_top1(trainer, args.data.evaluation_view()) if args.training.logistic else None
    if not trainer.is_world_process_zero():
        return
    result = {"protocol": args.title, "top1": metrics["eval_top1"], "top5": metrics["eval_top5"], "n": len(splits.eval)}
    if logistic is not None:
        result["logistic_top1"] = logistic
    (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    classify = pipeline("image-classification", model=str(folder))
    print(f"pipeline('image-classification', model='{folder}') on test images:")
    for row in splits.eval.select(range(min(SHOWN_IMAGES, len(splits.eval)))):
        best = classify(decode_image(row["image"]))[0]
        print(f"  {splits.class_names[row['label']]} is called {best['label']} ({best['score']:.2f})")
    print_table(args.encoder.home, result)
    print(
        "Next:\n"
        f'  python -c "from transformers import pipeline; import modeling_moco; '
        f"print(pipeline('image-classification', '{folder}')('IMAGE'))\"\n"
        "  accelerate launch --quiet scripts/pretrain.py --recipe moco_v2_r50_in1k_200ep --dataset_name FOLDER "
        "--batch_norm split --output_dir runs/mine\n"
        "  accelerate launch --quiet scripts/pretrain.py --help"
    )


def print_table(run: Path, result: dict) -> None:
    pretraining = run / "metrics.json"
    rows = {}
    if pretraining.is_file():
        numbers = json.loads(pretraining.read_text(encoding="utf-8"))
        rows = {"kNN before training": numbers["knn_top1_before"], "kNN after": numbers["knn_top1_after"]}
    rows["linear probe top-1"] = result["top1"]
    if "logistic_top1" in result:
        rows["logistic probe top-1"] = result["logistic_top1"]
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}} | " + (f"{value:5.1f} %" if value is not None else "not measured"))


if __name__ == "__main__":
    main(sys.argv[1:])
