"""Recipes: YAML files that say everything about a run, and the command line on top of them."""

import dataclasses
import inspect
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from modeling_moco import MoCoConfig
from modeling_moco.dictionary_moco import check_dictionary

from .cli import (
    build_parser,
    check_names,
    default_values,
    how_to_run,
    names_in_files,
    nearest_name,
    offered,
    parse_flags,
    section_of_file,
)
from .convert.start import Start
from .data.sources import DataArguments
from .engine.run_folder import FREE_TO_CHANGE, OF_MONITOR, START, WEIGHTS, read_sections
from .errors import shown
from .evaluation.probe_arguments import LinearProbeArguments
from .trainer import MoCoTrainingArguments
from .views.policy import build_policies

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "quickstart"
BASED_ON = "Based on recipe "
INIT_FROM = (
    "Weights to begin with instead of random ones: the folder of a run, a model on the Hub (of MoCo, or of timm as "
    "timm/resnet50.a1_in1k), or a checkpoint that `convert` reads. What does not fit is new, and is named."
)
ABOUT = ("title", "source", "command", "hardware", "expected")
# Settings that neither the weights nor a result depend on, beside those that a continued run may change.
WITHOUT_RESULT = (
    FREE_TO_CHANGE
    | OF_MONITOR
    | {
        *("eval_strategy", "eval_every_n_epochs", "per_device_eval_batch_size", "save_strategy", "save_steps"),
        *("log_level", "log_level_replica", "logging_strategy", "logging_first_step"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("use_cpu", "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_timeout", "local_rank"),
    }
)


def _model_arguments() -> type:
    # The model's flags are MoCoConfig's own fields with their defaults. argparse knows one type per flag.
    hints = MoCoConfig.__annotations__ | {
        **dict.fromkeys(("key_momentum", "temperature", "bank_momentum", "loss_scale"), float),
        **{"model_args": str | None},
        **{"image_mean": list[float], "image_std": list[float]},
    }
    entries = re.findall(r"^    (\w+) \(.*?\): (.*?)(?=^    \w|^\S|\Z)", str(inspect.getdoc(MoCoConfig)), re.M | re.S)
    help_texts = {name: re.sub(r"\s+", " ", text).replace("%", "%%").strip() for name, text in entries}
    fields: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(MoCoConfig):
        if f.name in MoCoConfig.__annotations__ and f.name not in ("model_type", "bank_size"):  # a run sets the second
            default: dict[str, Any] = {"default": f.default}
            if isinstance(f.default, tuple):  # a list on the command line
                default = {"default_factory": partial(list, f.default)}
            fields.append((f.name, hints[f.name], dataclasses.field(**default, metadata={"help": help_texts[f.name]})))
    fields.append(("init_from", str | None, dataclasses.field(default=None, metadata={"help": INIT_FROM})))
    return dataclasses.make_dataclass(
        "ModelArguments", fields, namespace={"_argument_group_name": "model (MoCoConfig)"}
    )


ModelArguments = _model_arguments()
PARTS: dict[str, Any] = {"data": DataArguments, "model": ModelArguments, "training": MoCoTrainingArguments}
PROBE: dict[str, Any] = {"probe": LinearProbeArguments}  # what scripts/linear_probe.py starts from on this run's model


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One YAML file: what it reproduces, and values for the flags of `scripts/pretrain.py`."""

    name: str
    about: dict[str, str]
    values: dict[str, Any]
    probe: dict[str, Any]

    @property
    def processes(self) -> int:
        """Processes that its command starts, which the groups of BatchNorm depend on."""
        asked = re.search(r"--num_processes (\d+)", self.about.get("command", ""))
        return int(asked[1]) if asked else 1

    def value(self, name: str) -> Any:
        """What it gives a setting, or the default of that."""
        if name in self.values:
            return self.values[name]
        known = next(f for kind in PARTS.values() for f in offered(kind) if f.name == name)
        return known.default if known.default_factory is dataclasses.MISSING else known.default_factory()


@dataclasses.dataclass
class PretrainArguments:
    """A recipe with the command line applied.

    Args:
        settings: the values that either of them gave.
        given: names of the values that the command line set itself.
        init_from: the weights to begin with, None for random ones.
        preview_views: a figure to draw instead of training, without its suffix.
    """

    recipe: Recipe
    data: DataArguments
    config: MoCoConfig
    training: MoCoTrainingArguments
    settings: dict[str, dict[str, Any]]
    given: frozenset[str] = frozenset()
    init_from: str | None = None
    preview_views: Path | None = None

    def begin_with(self, start: Start) -> None:
        """Make the weights part of the run, and normalise images as they were trained to see them."""
        self.settings[START] = {"model": self.init_from, WEIGHTS: start.digest}
        for name in {"image_mean", "image_std"} - self.given:
            setattr(self.config, name, getattr(start.checkpoint.config, name))

    @property
    def changed(self) -> list[str]:
        """Settings of this run that are not the recipe's and change what comes out of it."""
        given = {name: value for section in PARTS for name, value in self.settings[section].items()}
        names = [
            name for name, value in given.items() if name not in WITHOUT_RESULT and value != self.recipe.value(name)
        ]
        regrouped = self.training.world_size != self.recipe.processes and self.config.batch_norm != "sync"
        return names + ["processes"] * regrouped

    @property
    def about(self) -> dict[str, str]:
        """Title, source and expected result of the recipe if this run is its; else what it is based on and what differs."""
        if not self.changed:
            return self.recipe.about
        title = self.recipe.about.get("title", "")
        if not title.startswith(BASED_ON):  # as that of a run's own recipe.yaml may
            title = BASED_ON + self.recipe.name
        return {"title": f"{title}, changed: {', '.join(self.changed)}"}

    @property
    def defaults(self) -> dict[str, dict[str, Any]]:
        """Values of the flags that neither gave."""
        return default_values(PARTS)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def sections() -> dict[str, list[str]]:
    """Keys that each section of a recipe may have."""
    of_flags = {section: names_in_files(kind) for section, kind in (PARTS | PROBE).items()}
    return {"about": list(ABOUT), START: ["model", WEIGHTS]} | of_flags  # the second is in the recipe.yaml of a run


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe by its name or from a file.

    Raises:
        ValueError: no such recipe, a key that no flag has, or a value of another kind than its flag's.
    """
    path = RECIPES / f"{name_or_path}.yaml" if name_or_path in recipe_names() else Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"recipe ({name_or_path!r}) is neither a file nor one of {', '.join(recipe_names())}"
            + nearest_name(name_or_path, recipe_names())
        )
    known = sections()
    content = read_sections(path, f"write the sections {', '.join(known)}, as in the recipes of {RECIPES}")
    for section, entries in content.items():
        if section not in known:
            raise ValueError(f"section {shown(section)!r} in {path} is unknown{nearest_name(section, list(known))}")
        if section == "about":
            check_names(path, section, entries, ABOUT)
    for section, kind in (PARTS | PROBE).items():
        content[section] = section_of_file(path, section, content.get(section, {}), kind)
    values = {key: value for section in PARTS for key, value in content[section].items()}
    about = {key: str(value) for key, value in content.get("about", {}).items()}
    return Recipe(path.stem, about, values, content["probe"])


def parse_pretrain(argv: list[str]) -> PretrainArguments:
    """The recipe named in `argv`, overridden by the other flags in it.

    Raises:
        ValueError: an unknown recipe or flag, or a value out of its range.
    """
    parser = build_parser(
        PARTS.values(),
        usage=f"{how_to_run('pretrain')} [--recipe NAME_OR_PATH] [--flag value ...]",
        description="Pretrain an encoder with MoCo. A recipe sets every value; any flag overrides it.",
    )
    parser.add_argument(
        "--recipe", default=DEFAULT_RECIPE, help=f"A YAML file, or one of: {', '.join(recipe_names())}."
    )
    parser.add_argument(
        "--preview_views",
        metavar="FILE",
        help="Draw the two views of eight images to FILE, as PNG and SVG, and do not train.",
    )
    recipe = load_recipe(parser.parse_args(argv).recipe)
    namespace, (data, model, training), settings = parse_flags(
        parser, PARTS, argv, {"output_dir": f"runs/{recipe.name}"} | recipe.values
    )
    if "dataset_name" in settings["data"]:
        settings["data"]["dataset_name"] = data.dataset_name  # absolute, where it is a folder
    settings["probe"] = recipe.probe
    preview = None if namespace.preview_views is None else _figure_path(namespace.preview_views)
    of_model = dataclasses.asdict(model)
    build_policies(data.augmentation)
    check_dictionary(of_model["dictionary"])
    init_from = of_model.pop("init_from")
    if init_from is not None and os.path.exists(init_from):
        init_from = settings["model"]["init_from"] = os.path.abspath(init_from)  # the run is continued from anywhere
    given = frozenset(parser.given(argv))
    return PretrainArguments(recipe, data, MoCoConfig(**of_model), training, settings, given, init_from, preview)


def _figure_path(name: str) -> Path:
    path = Path(name)
    if path.suffix not in ("", ".png", ".svg"):
        raise ValueError(f"preview_views ({name}) must end in .png or .svg: both are written")
    if not path.parent.is_dir():
        raise ValueError(f"preview_views ({name}) is to lie in {path.parent}, which is no folder: make it first")
    if taken := [p for p in (path, path.with_suffix(".png"), path.with_suffix(".svg")) if p.is_dir()]:
        raise ValueError(f"preview_views ({name}) needs the name of the folder {taken[0]}: choose another")
    return path.with_suffix("")
