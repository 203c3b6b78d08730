"""Flags from dataclasses: every command offers the fields that it can use, the project's own first."""

import argparse
import copy
import dataclasses
import difflib
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from inspect import get_annotations
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from .errors import hide_secrets, one_line, shown

# Settings that the command line alone may give, for a file may be a stranger's: where results go, who is told, what is
# published. They are no part of what a run is, and are not recorded with it.
DESTINATIONS = re.compile(
    "output_dir|logging_dir|report_to|project|run_name|include_pictures|push_to_hub.*|(hub|trackio)_.*"
)
INCLUDE_PICTURES = (
    "Publish figures that show images of a local, private or gated dataset too. "
    "Those of a public Hub dataset and of the digits are always published."
)
LOG_IN = "For the Hub log in by `hf auth login`, or set HF_TOKEN"
WITHOUT_VALUE: dict[str, Any] = {
    "lr_milestones": None,
    "step_milestones": [],
}  # what a flag without a value leaves of a list
INHERITED = "transformers.TrainingArguments"  # section of the flags that transformers documents
CHECKOUT = Path(__file__).parents[1]  # if this is no installation
SCRIPTS = {"probe": "linear_probe", "publish": "push_to_hub"}  # of the commands whose script has another name


def refuse_secrets(argv: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a word has a token, or a URL a password.
    """
    for word in argv:
        if hide_secrets(word) != word:
            raise ValueError(
                f"{one_line(word)} has a token or a password, which would be recorded: leave it out. {LOG_IN}"
            )


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
        refuse_secrets(args)
        for word in args:
            flag = "--" + _name(word.split("=")[0])
            if word.startswith("--") and flag not in known and flag.replace("--no_", "--") not in known:
                raise ValueError(f"flag {flag} is unknown{self._where(flag) or nearest_name(flag, known)}")
        cleared = [i for i, word in enumerate(args) if _takes_away(word, *args[i + 1 : i + 2])]
        parsed = super().parse_args([word for i, word in enumerate(args) if i not in cleared], namespace)
        for i in cleared:
            setattr(parsed, _name(args[i]), copy.copy(WITHOUT_VALUE[_name(args[i])]))
        return parsed

    def _where(self, flag: str) -> str | None:
        if "token" in flag:
            return f": a command line is seen by everybody on this machine. {LOG_IN}"
        command = self.elsewhere.get(flag[2:].removeprefix("no_"))
        return None if command is None else f" here: `{how_to_run(command)}` has it"

    def given(self, argv: list[str]) -> set[str]:
        """Names of the values that `argv` sets itself."""
        unset = object()
        blank = argparse.Namespace(**dict.fromkeys(self.names, unset))
        return {name for name, value in vars(self.parse_args(argv, blank)).items() if value is not unset}


def _name(flag: str) -> str:
    return flag[2:].replace("-", "_")


def _takes_away(word: str, following: str = "--") -> bool:
    """Whether a flag without a value takes away the list that a recipe or a default has."""
    return word.startswith("--") and _name(word) in WITHOUT_VALUE and following.startswith("--")


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
    keep_workers = "dataloader_num_workers" in given or bool(getattr(namespace, "streaming", False))
    chosen = {name for name in given | set(defaults) if not DESTINATIONS.fullmatch(name)}
    keys = {section: [f.name for f in offered(kind)] for section, kind in parts.items()}
    settings = {section: {key: getattr(namespace, key) for key in keys[section] if key in chosen} for section in parts}
    if asked := getattr(namespace, "dataloader_num_workers", None):
        namespace.dataloader_num_workers = _workers_here(asked, keep_workers)
    instances = [kind(**{key: getattr(namespace, key) for key in keys[section]}) for section, kind in parts.items()]
    for name, reason in chain.from_iterable(getattr(part, "without_effect", {}).items() for part in instances):
        if name in given:
            raise ValueError(f"{name} ({getattr(namespace, name):g}) has no effect, {reason}: leave it out")
    return namespace, instances, settings


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _workers_here(asked: int, keep: bool) -> int:
    """How many processes read images: those that a recipe asks for, or as many as there are cores.

    Args:
        keep: whether to start them all, since the command line asks for them, or the order of a stream depends on them.
    """
    if asked <= cores():
        return asked
    # torch's own warning, which is for each of its loaders.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    started = asked if keep else cores()
    becomes = "stays" if keep else f"becomes {started}"
    _say_once(f"dataloader_num_workers ({asked}) is more than the cores here ({cores()}), and {becomes}")
    return started


@cache
def _say_once(line: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, file=sys.stderr)


def names_in_files(kind: Any) -> list[str]:
    """The flags of a dataclass that a file may set too."""
    return [f.name for f in offered(kind) if not DESTINATIONS.fullmatch(f.name)]


def section_of_file(path: Path, section: str, entries: dict[str, Any], kind: Any) -> dict[str, Any]:
    """The values that a section of a file gives to the fields of a dataclass.

    Raises:
        ValueError: a key is no field, or one that the command line alone may set; or a value is of another kind than its
            field's, or has a password.
    """
    check_names(path, section, entries, names_in_files(kind))
    hints = get_type_hints(kind) | {"model_args": dict | str | None}
    hints |= {f.name: hints[f.name] | None for f in offered(kind) if f.default is None}
    for key, value in entries.items():
        if hide_secrets(str(value)) != str(value):
            raise ValueError(f"key {key!r} in section {section!r} of {path} has a token or a password: take it out")
        if not _fits(value, hints[key]):
            raise ValueError(
                f"key {key!r} in section {section!r} of {path} is {shown(value)}, which is no "
                f"{_in_words(hints[key])}: correct it"
            )
    of_floats = {
        key for key in entries if list[float] in (hints[key], *get_args(hints[key]))
    }  # YAML reads 1 as an integer
    return {key: list(map(float, value)) if key in of_floats and value else value for key, value in entries.items()}


def check_names(path: Path, section: str, entries: dict[str, Any], known: Sequence[str]) -> None:
    """
    Raises:
        ValueError: a section of a file has a key that is not known.
    """
    for key in (key for key in entries if key not in known):
        where = f"key {shown(key)!r} in section {section!r} of {path}"
        if DESTINATIONS.fullmatch(key):
            raise ValueError(
                f"{where} would say where results go or who is told, as the command line alone may: take it out, and "
                f"pass --{key} if you want it"
            )
        raise ValueError(f"{where} is unknown{nearest_name(key, list(known))}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of YAML is of the kind of a flag. A text may stand for a number: YAML 1.1 takes 1e-4 for one."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in kinds
    if origin is list:
        texts = kinds[0] is str
        return isinstance(value, list) and all(isinstance(x, str) == texts and _fits(x, kinds[0]) for x in value)
    if origin is dict or kind is dict:
        return isinstance(value, dict)
    if kinds:  # one of several
        return any(_fits(value, other) for other in kinds)
    if kind in (int, float):
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        return isinstance(value, str) or (number and abs(value) < 2**63)
    return isinstance(value, str) or (kind in (bool, type(None)) and isinstance(value, kind))


def _in_words(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


def nearest_name(word: str, known: list[str]) -> str:
    """The end of an error message about an unknown name: the closest known one, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f": did you mean {close[0]!r}?" if close else f": it may be one of {', '.join(known)}"


def how_to_run(command: str) -> str:
    """How a user starts a command here: `moco probe` in an installation, `python scripts/linear_probe.py` in a checkout.

    Outside the checkout it is the script's whole path.
    """
    if __name__.startswith("moco_hf."):
        return f"moco {command}"
    return f"python {shlex.quote(script_here(SCRIPTS.get(command, command)))}"


def script_here(name: str) -> str:
    """The path of a script of the checkout, from the working directory if it is below it."""
    script = CHECKOUT / "scripts" / f"{name}.py"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)


def how_to_classify(folder: str) -> str:
    """How a user classifies the picture IMAGE with the classifier in a folder, for a shell."""
    program = f'print(pipeline("image-classification", {json.dumps(folder)})("IMAGE"))'
    return f"python -c {shlex.quote(f'from transformers import pipeline; import modeling_moco; {program}')}"
