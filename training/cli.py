"""Flags from dataclasses: every command offers the fields that it can use, the project's own first."""

import argparse
import copy
import dataclasses
import difflib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from inspect import get_annotations
from types import MappingProxyType
from typing import Any, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

# Prefixes of settings outside a run's identity: destinations, what goes there, and the token.
NOT_IDENTITY = ("output_dir", "push_to_hub", "hub_", "include_pictures")
INCLUDE_PICTURES = (
    "Publish figures that show images of a local dataset too. "
    "Those of a Hub dataset and of the digits are always published."
)
INHERITED = "transformers.TrainingArguments"  # section of the flags that transformers documents
SCRIPTS = {"probe": "linear_probe", "publish": "push_to_hub"}  # of the commands whose script has another name


class _Parser(HfArgumentParser):
    def __init__(self, groups: list[Any], elsewhere: Mapping[str, str], **kwargs: Any):
        self.elsewhere = elsewhere
        self.names = {f.name for group in groups for f in dataclasses.fields(group)}  # of the values that flags set
        super().__init__(groups, **kwargs)

    def add_argument(self, *args, **kwargs):
        action = super().add_argument(*args, **kwargs)
        self.names.add(action.dest)
        return action

    def error(self, message):
        raise ValueError(message)

    def parse_args(self, args=None, namespace=None):
        known = sorted(f"--{name}" for name in self.names)
        for word in args:
            flag = "--" + word.split("=")[0][2:].replace("-", "_")
            if word.startswith("--") and flag not in known and flag.replace("--no_", "--") not in known:
                raise ValueError(f"flag {flag} is unknown{self._where(flag) or nearest_name(flag, known)}")
        return super().parse_args(args, namespace)

    def _where(self, flag: str) -> str | None:
        command = self.elsewhere.get(flag[2:].removeprefix("no_"))
        return None if command is None else f" here: `{how_to_run(command)}` has it"

    def given(self, argv: list[str]) -> set[str]:
        """Names of the values that `argv` sets itself."""
        unset = object()
        blank = argparse.Namespace(**dict.fromkeys(self.names, unset))
        return {name for name, value in vars(self.parse_args(argv, blank)).items() if value is not unset}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    # argparse has no public way to show one spelling of a flag; the others (dashes, --no_...) still work.
    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        shown = copy.copy(action)
        shown.option_strings = action.option_strings[:1]
        shown.metavar = None if action.choices else "VALUE"
        return super()._format_action_invocation(shown)


def offered(kind: Any) -> list[dataclasses.Field]:
    """The fields of a dataclass that are flags: all that `__init__` takes, but those of its NOT_OFFERED."""
    hidden = getattr(kind, "NOT_OFFERED", ())
    return [f for f in dataclasses.fields(kind) if f.init and f.name not in hidden]


def default_values(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The value of every flag that is not given, by section."""
    return {
        section: {
            f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            for f in offered(kind)
        }
        for section, kind in parts.items()
    }


def build_parser(
    kinds: Iterable[Any], usage: str, description: str, elsewhere: Mapping[str, str] = MappingProxyType({})
) -> _Parser:
    """A parser with a flag for every offered field of these dataclasses.

    Args:
        elsewhere: flags of other commands, which an error names, and the command that has each.
    """
    groups = [group for kind in kinds for group in _groups(kind)]
    groups.sort(key=lambda group: group._argument_group_name == INHERITED)  # transformers' own last
    return _Parser(
        groups,
        elsewhere,
        formatter_class=lambda prog: _Help(prog, max_help_position=34, width=120),
        allow_abbrev=False,
        usage=usage,
        description=description,
    )


def _groups(kind: Any) -> Iterator[Any]:
    """The fields of a dataclass as dataclasses of their own, one for each section of the help."""
    fields, types = offered(kind), get_type_hints(kind)
    inherited = {f.name for f in fields if issubclass(kind, TrainingArguments)} - _declared_here(kind)
    title = getattr(kind, "_argument_group_name", kind.__name__)
    for name, part in (
        (title, [f for f in fields if f.name not in inherited]),
        (INHERITED, [f for f in fields if f.name in inherited]),
    ):
        if part:
            content = [(f.name, types[f.name], copy.copy(f)) for f in part]
            yield dataclasses.make_dataclass(
                kind.__name__, content, namespace={"_argument_group_name": name}, kw_only=True
            )


def _declared_here(kind: Any) -> set[str]:
    ours = [ancestor for ancestor in kind.__mro__ if not issubclass(TrainingArguments, ancestor)]
    return {name for ancestor in ours for name in get_annotations(ancestor)}


def parse_flags(
    parser: _Parser, parts: dict[str, Any], argv: list[str], defaults: dict[str, Any]
) -> tuple[argparse.Namespace, list[Any], dict[str, dict[str, Any]]]:
    """Parse `argv` over `defaults`.

    Returns:
        the namespace, an instance of each part, and what `argv` or `defaults` said, by part.

    Raises:
        ValueError: an unknown flag, or a value out of its range.
    """
    given = parser.given(argv)
    if "per_device_train_batch_size" in given:
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
    chosen = {name for name in given | set(defaults) if not name.startswith(NOT_IDENTITY)}
    keys = {section: [f.name for f in offered(kind)] for section, kind in parts.items()}
    instances = [kind(**{key: getattr(namespace, key) for key in keys[section]}) for section, kind in parts.items()]
    settings = {section: {key: getattr(namespace, key) for key in keys[section] if key in chosen} for section in parts}
    return namespace, instances, settings


def nearest_name(word: str, known: list[str]) -> str:
    """The end of an error message about an unknown name: the closest known one, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f": did you mean {close[0]!r}?" if close else f": it may be one of {', '.join(known)}"


def how_to_run(command: str) -> str:
    """How a user starts a command here: `moco probe` in an installation, `python scripts/linear_probe.py` in a checkout."""
    if __name__.startswith("moco_hf."):
        return f"moco {command}"
    return f"python scripts/{SCRIPTS.get(command, command)}.py"


def how_to_classify(folder: str) -> str:
    """How a user classifies the picture IMAGE with the classifier in a folder, for a shell."""
    program = f'print(pipeline("image-classification", {json.dumps(folder)})("IMAGE"))'
    return f"python -c {shlex.quote(f'from transformers import pipeline; import modeling_moco; {program}')}"
