"""Parsed recipes, and what a run of one is claimed with."""

import dataclasses

from training.engine.checkpoints import BatchLayout

CPU = ["--use_cpu", "--report_to", "none"]
LAYOUT = BatchLayout(processes=1, per_device_batch_size=128, accumulation=1, images=1437, workers=None)
PLACE = {"dataset": "digits", "content": {}}


def values_of(args) -> dict:
    """Every value of a parsed run."""
    training = {field.name: getattr(args.training, field.name) for field in dataclasses.fields(args.training)}
    return args.config.to_dict() | vars(args.data) | training
