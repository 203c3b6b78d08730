"""The command line of every script: flags from dataclasses, one line for an error, an output directory per run."""

import argparse
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from modeling_moco.distributed_moco import world_size

from .checkpoints import Division, check_division, newest_complete
from .sgd_trainer import SGDTrainer, SGDTrainingArguments, TrainingError

REQUEUE = 75  # exit status after a SIGTERM: saved, to be continued by the same command (EX_TEMPFAIL of sysexits.h)
SAVED_RECIPE = "recipe.yaml"  # the settings of a run, in its output directory
ELSEWHERE = ("output_dir", "push_to_hub", "hub_")  # first letters of settings that say where a run goes, and a token
# What may differ between a run and its continuation.
FREE_TO_CHANGE = {
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "logging_steps",
    "report_to",
    "project",
    "run_name",
    "disable_tqdm",
    "save_total_limit",
}


class _Parser(HfArgumentParser):
    def error(self, message):
        raise ValueError(message)

    def flags(self) -> dict[str, str]:
        """Name of the value that each flag sets."""
        return {flag: action.dest for action in self._actions for flag in action.option_strings}

    def parse_args(self, args=None, namespace=None):
        for word in args:
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in self.flags():
                raise ValueError(f"flag {flag} is unknown{nearest_name(flag, sorted(self.flags()))}")
        return super().parse_args(args, namespace)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    # One spelling of each flag; the others (dashes, --no_...) still work.
    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, 'VALUE')}"


def build_parser(kinds: Iterable[Any], usage: str, description: str) -> _Parser:
    """A flag for every field of these dataclasses, the project's own first."""
    parser = _Parser(
        formatter_class=lambda prog: _Help(prog, max_help_position=34, width=120),
        allow_abbrev=False,
        usage=usage,
        description=description,
    )
    for kind in kinds:
        parser._add_dataclass_arguments(kind)
    # argparse prints groups in order: what the training arguments inherit from transformers goes to the end.
    training = parser._action_groups[-1]
    inherited = parser.add_argument_group("transformers.TrainingArguments")
    project = {
        name
        for ancestor in kind.__mro__
        if ancestor.__module__.startswith("training.")
        for name in ancestor.__annotations__
    }
    inherited._group_actions = [a for a in training._group_actions if a.dest not in project]
    training._group_actions = [a for a in training._group_actions if a.dest in project]
    return parser


def parse_flags(
    parser: _Parser, parts: dict[str, Any], argv: list[str], defaults: dict[str, Any]
) -> tuple[argparse.Namespace, list[Any], dict[str, dict[str, Any]]]:
    """Parse `argv` over `defaults`.

    Returns:
        the namespace, an instance of each part, and what `argv` or `defaults` said, by part.

    Raises:
        ValueError: an unknown flag, or a value out of its range.
    """
    names = {name for flag, name in parser.flags().items() if flag in {word.split("=")[0] for word in argv}}
    if "per_device_train_batch_size" in names:
        defaults = defaults | {"global_batch_size": None}
    parser.set_defaults(**defaults)
    namespace = parser.parse_args(argv)
    if isinstance(getattr(namespace, "model_args", None), str):
        try:
            namespace.model_args = json.loads(namespace.model_args)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"model_args ({namespace.model_args}) is not JSON: write it like '{{\"img_size\": 32}}'"
            ) from error
    chosen = {name for name in names | set(defaults) if not name.startswith(ELSEWHERE)}
    keys = {section: [f.name for f in dataclasses.fields(kind) if f.init] for section, kind in parts.items()}
    instances = [kind(**{key: getattr(namespace, key) for key in keys[section]}) for section, kind in parts.items()]
    settings = {section: {key: getattr(namespace, key) for key in keys[section] if key in chosen} for section in parts}
    return namespace, instances, settings


def nearest_name(word: str, known: list[str]) -> str:
    """The end of an error message about an unknown name: the closest known one, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f": did you mean {close[0]!r}?" if close else f": it may be one of {', '.join(known)}"


def claim_output_dir(
    training: SGDTrainingArguments,
    division: Division | None,
    settings: dict[str, dict[str, Any]],
    about: dict[str, str],
) -> str | None:
    """Make the output directory this run's own.

    An empty one gets `about` and `settings` as `recipe.yaml`. One that holds the same run is continued.

    Args:
        division: how the run divides its images; None for one without checkpoints.

    Returns:
        the checkpoint to continue from, if any.

    Raises:
        ValueError: the directory holds another run, or something else.
    """
    folder = Path(str(training.output_dir))
    saved = folder / SAVED_RECIPE
    with training.main_process_first(local=False, desc="claiming the output directory"):
        checkpoint = None
        if saved.is_file() and len(list(folder.iterdir())) > 1:  # alone, it is what a crash at the start left
            there = yaml.safe_load(saved.read_text(encoding="utf-8"))
            _check_same_run(folder, there, settings)
            checkpoint = None if division is None else _checkpoint_of(folder, training, division)
        elif training.process_index == 0:
            _write_recipe(folder, {"about": about} | settings)
    _check_same_view(folder, checkpoint)
    return checkpoint


def _write_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    saved = folder / SAVED_RECIPE
    if folder.exists() and (not folder.is_dir() or any(path != saved for path in folder.iterdir())):
        raise ValueError(f"output_dir ({folder}) holds files of something else: pass another --output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = saved.with_suffix(".tmp")
        unfinished.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        unfinished.replace(saved)
    except OSError as error:
        raise ValueError(f"output_dir ({folder}) cannot be written ({error}): pass another --output_dir") from error


def _checkpoint_of(folder: Path, training: SGDTrainingArguments, division: Division) -> str | None:
    checkpoint, remarks = newest_complete(folder)
    if checkpoint is not None:
        remarks += filter(None, [check_division(checkpoint, division)])
    if training.process_index == 0:
        for remark in remarks:
            print(f"warning: {remark}", file=sys.stderr)
    return None if checkpoint is None else str(checkpoint)


def _check_same_view(folder: Path, checkpoint: str | None) -> None:
    if world_size() == 1:
        return
    seen: list[str | None] = [None] * world_size()
    dist.all_gather_object(seen, checkpoint)
    if len(set(seen)) > 1:
        raise ValueError(
            f"output_dir ({folder}) has {seen[0] or 'no checkpoint'} for the first process and not for all others: pass a "
            "folder that all machines share"
        )


def _check_same_run(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    for section, now in here.items():
        then = there.get(section, {})
        for key in sorted((set(then) | set(now)) - FREE_TO_CHANGE):
            if then.get(key) != now.get(key):
                raise ValueError(
                    f"output_dir ({folder}) already holds another run: {key} is {then.get(key)} there and {now.get(key)} "
                    "here. Pass another --output_dir, or the same settings to continue it"
                )


def train(trainer: SGDTrainer, checkpoint: str | None) -> None:
    """Train to the end, or end the program: with one line for a `TrainingError`, with status 75 after a SIGTERM."""
    with one_line_errors((TrainingError,)):
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.terminated:
        if trainer.is_world_process_zero():
            print(f"Stopped by SIGTERM at step {trainer.state.global_step}, saved. The same command continues.")
        raise SystemExit(REQUEUE)


@contextmanager
def one_line_errors(kinds: tuple[type[Exception], ...] = (ValueError, StrictDataclassError)) -> Iterator[None]:
    """End the program with one line on the main process for an error of these kinds; by default the user's own."""
    try:
        yield
    except kinds as error:
        # A training error with a cause happened on one process alone.
        alone = isinstance(error, TrainingError) and error.__cause__ is not None
        if alone or int(os.environ.get("RANK", "0")) == 0:
            reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
            print("error: " + " ".join(str(reason).split()), file=sys.stderr)
        raise SystemExit(2) from None
