"""Pretraining, evaluating and publishing MoCo encoders.

    pretrain    a pretraining run: build it, say what it is, leave its results
    trainer     the training step of MoCo, and when its monitor looks
    health      numbers that show a collapse or a leak
    recipe      a YAML file and the command line on top of it; the files are in recipes/
    cli         flags from dataclasses
    errors      one line for an error of the user's
    model_folder  a stranger's model: no code, no other file
    plots       every figure, from data
    process     around every command: how it ends, and its memory
    reports/    what runs have found, drawn for people
    commands/   one module for each command: parse, build, run
    benchmarks/ one module for each claim about speed and memory
    evaluation/ kNN, linear probe, fine-tuning: what features are worth
    hub/        what is published, and its way to the Hub
    convert/    checkpoints of other code, in and out, and to begin a run with
    engine/     the trainer that all methods share, checkpoints, the folder of a run, results, trackers
    data/       from the name of a dataset to rows, and from rows to images
    views/      random parameters of a view, and three backends that render it

Imports run one way: commands, benchmarks, pretrain, recipe, trainer, then reports and process, then evaluation, hub and
convert, then engine, data and plots, then views, then `modeling_moco`. docs/design.md has every module.
"""
