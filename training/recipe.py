"""Recipes: YAML files that say everything about a run, and the command line on top of them."""

import argparse
import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from modeling_moco import MoCoConfig

from .data import DataArguments
from .trainer import MoCoTrainingArguments

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "quickstart"
SAVED_RECIPE = "recipe.yaml"
ABOUT = ("title", "source", "command", "hardware", "expected")
# What may differ between a run and its continuation.
FREE_TO_CHANGE = {"dataloader_num_workers", "logging_steps", "report_to", "disable_tqdm", "save_total_limit"}


def _model_arguments() -> type:
    # The model's flags are MoCoConfig's own fields with their defaults. argparse knows one type per flag.
    hints = MoCoConfig.__annotations__ | {"key_momentum": float, "temperature": float, "model_args": str | None}
    entries = re.findall(r"^    (\w+) \(.*?\): (.*?)(?=^    \w|^\S|\Z)", str(inspect.getdoc(MoCoConfig)), re.M | re.S)
    help_texts = {name: re.sub(r"\s+", " ", text).replace("%", "%%").strip() for name, text in entries}
    fields = [
        (f.name, hints[f.name], dataclasses.field(default=f.default, metadata={"help": help_texts[f.name]}))
        for f in dataclasses.fields(MoCoConfig)
        if f.name in MoCoConfig.__annotations__ and f.name != "model_type"
    ]
    return dataclasses.make_dataclass("ModelArguments", fields, namespace={"_argument_group_name": "model (MoCoConfig)"})


ModelArguments = _model_arguments()
PARTS: dict[str, Any] = {"data": DataArguments, "model": ModelArguments, "training": MoCoTrainingArguments}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One YAML file: what it reproduces, and values for the flags of `scripts/pretrain.py`."""

    name: str
    about: dict[str, str]
    values: dict[str, Any]


@dataclasses.dataclass
class PretrainArguments:
    """A recipe with the command line applied. `settings` are the values that either of them gave."""

    recipe: Recipe
    data: DataArguments
    config: MoCoConfig
    training: MoCoTrainingArguments
    settings: dict[str, dict[str, Any]]


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _part_keys() -> list[list[str]]:
    return [[f.name for f in dataclasses.fields(kind) if f.init] for kind in PARTS.values()]


def sections() -> dict[str, list[str]]:
    """Keys that each section of a recipe may have."""
    return {"about": list(ABOUT)} | dict(zip(PARTS, _part_keys(), strict=True))


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe by its name or from a file.

    Raises:
        ValueError: no such recipe, or a key that no flag has.
    """
    path = RECIPES / f"{name_or_path}.yaml" if name_or_path in recipe_names() else Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"recipe ({name_or_path!r}) is neither a file nor one of {', '.join(recipe_names())}"
            + _nearest(name_or_path, recipe_names())
        )
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    known = sections()
    for section, entries in content.items():
        if section not in known:
            raise ValueError(f"section {section!r} in {path} is unknown{_nearest(section, list(known))}")
        for key in entries:
            if key not in known[section]:
                raise ValueError(f"key {key!r} in section {section!r} of {path} is unknown{_nearest(key, known[section])}")
    values = {key: value for section, entries in content.items() if section != "about" for key, value in entries.items()}
    return Recipe(path.stem, content.get("about", {}), values)


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f": did you mean {close[0]!r}?" if close else f": it may be one of {', '.join(known)}"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    # One spelling of each flag; the others (dashes, --no_...) still work.
    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, 'VALUE')}"


def build_parser() -> HfArgumentParser:
    """All flags, the project's own first."""
    parser = HfArgumentParser(
        formatter_class=lambda prog: _Help(prog, max_help_position=34, width=120),
        allow_abbrev=False,
        usage="accelerate launch scripts/pretrain.py [--recipe NAME_OR_PATH] [--flag value ...]",
        description="Pretrain an encoder with MoCo. A recipe sets every value; any flag overrides it.",
    )
    parser.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        help=f"a YAML file, or one of: {', '.join(recipe_names())}",
    )
    for kind in PARTS.values():
        parser.dataclass_types.append(kind)
        parser._add_dataclass_arguments(kind)
    # argparse prints groups in order: what MoCoTrainingArguments inherits goes into one of its own, at the end.
    training = parser._action_groups[-1]
    inherited = parser.add_argument_group("transformers.TrainingArguments")
    own = set(MoCoTrainingArguments.__annotations__)
    inherited._group_actions = [a for a in training._group_actions if a.dest not in own]
    training._group_actions = [a for a in training._group_actions if a.dest in own]
    return parser


def parse_pretrain(argv: list[str]) -> PretrainArguments:
    """The recipe named in `argv`, overridden by the other flags in it.

    Raises:
        ValueError: an unknown flag, or a value out of its range.
    """
    parser = build_parser()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default=DEFAULT_RECIPE)
    recipe = load_recipe(first.parse_known_args(argv)[0].recipe)

    flags = {flag for action in parser._actions for flag in action.option_strings}
    dest = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    for flag in sorted(given - flags):
        raise ValueError(f"flag {flag} is unknown{_nearest(flag, sorted(flags))}")
    given_names = {dest[flag] for flag in given}
    values = dict(recipe.values)
    if "per_device_train_batch_size" in given_names:
        values.pop("global_batch_size", None)

    parser.set_defaults(**{"output_dir": f"runs/{recipe.name}"} | values)
    namespace = vars(parser.parse_args(argv))
    if isinstance(namespace["model_args"], str):
        namespace["model_args"] = json.loads(namespace["model_args"])
    data, model, training = (
        kind(**{key: namespace[key] for key in keys}) for kind, keys in zip(PARTS.values(), _part_keys(), strict=True)
    )
    chosen = (given_names | set(values)) - {"output_dir"}
    settings = {
        section: {key: namespace[key] for key in keys if key in chosen}
        for section, keys in zip(PARTS, _part_keys(), strict=True)
    }
    return PretrainArguments(recipe, data, MoCoConfig(**dataclasses.asdict(model)), training, settings)


def claim_output_dir(args: PretrainArguments) -> str | None:
    """Make the output directory this run's own.

    An empty one gets the settings as `recipe.yaml`. One that holds the same run is continued.

    Returns:
        the checkpoint to continue from, if any.

    Raises:
        ValueError: the directory holds another run, or something else.
    """
    folder = Path(str(args.training.output_dir))
    saved = folder / SAVED_RECIPE
    with args.training.main_process_first(desc="claiming the output directory"):
        if saved.is_file():
            there = yaml.safe_load(saved.read_text(encoding="utf-8"))
            _check_same_run(folder, there, args.settings)
            return get_last_checkpoint(str(folder))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"output_dir ({folder}) holds files of something else: pass another --output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        content = {"about": args.recipe.about} | args.settings
        saved.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return None


def _check_same_run(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    for section, now in here.items():
        then = there.get(section, {})
        for key in sorted((set(then) | set(now)) - FREE_TO_CHANGE):
            if then.get(key) != now.get(key):
                raise ValueError(
                    f"output_dir ({folder}) already holds another run: {key} is {then.get(key)} there and {now.get(key)} "
                    "here. Pass another --output_dir, or the same settings to continue it"
                )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line for an error of the user's, on the main process, before any time is spent."""
    try:
        yield
    except (ValueError, StrictDataclassError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
            print("error: " + " ".join(str(reason).split()), file=sys.stderr)
        raise SystemExit(2) from None
