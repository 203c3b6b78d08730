"""The command line of every script: flags from dataclasses, one line for an error, an output directory per run."""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Iterable
from typing import Any

from transformers import HfArgumentParser

ELSEWHERE = ("output_dir", "push_to_hub", "hub_")  # first letters of settings that say where a run goes, and a token


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
