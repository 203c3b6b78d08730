"""Recipes of a task that encoders are transferred to, and the command line on top of them."""

import shlex
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_moco import MoCoConfig, MoCoFCNConfig, MoCoRCNNConfig

from ..cli import (
    DESTINATIONS,
    build_parser,
    check_names,
    default_values,
    how_to_run,
    nearest_name,
    offered,
    parse_flags,
    section_of_file,
)
from ..engine.checkpoints import decided_by_main
from ..engine.files import below
from ..engine.results import read_results
from ..engine.run_folder import (
    FREE_TO_CHANGE,
    SAVED_RECIPE,
    begin_with,
    content_to_continue,
    home_of,
    read_sections,
    recorded_content,
    refuse_namesake,
)
from ..errors import shown
from ..evaluation.encoder import Encoder, check_exists
from ..hub.lineage import steps_of
from ..model_folder import read_config

RECIPES = Path(__file__).parent.parent / "recipes"
ABOUT = ("title", "source", "command", "hardware", "expected")


@dataclass(frozen=True)
class TransferRecipe:
    """One YAML file: what it reproduces, and values for the flags of the task's script."""

    name: str
    about: dict[str, str]
    values: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What encoders are transferred to.

    Args:
        command: name of its command and of its script.
        noun: what it trains, in words.
        recipes: folder of its recipes.
        default_recipe: the name of one.
        parts: dataclasses of its flags, by section of a recipe: data, model, training.
        of_evaluation: names of the flags of the model that an evaluation of a trained one takes.
    """

    command: str
    noun: str
    recipes: Path
    default_recipe: str
    parts: dict[str, Any]
    of_evaluation: frozenset[str] = frozenset()

    def recipe_names(self) -> list[str]:
        return sorted(path.stem for path in self.recipes.glob("*.yaml"))

    def load_recipe(self, name_or_path: str) -> TransferRecipe:
        """Read a recipe by its name or from a file.

        Raises:
            ValueError: no such recipe, a key that no flag has, or a value of another kind than its flag's.
        """
        names = self.recipe_names()
        path = self.recipes / f"{name_or_path}.yaml" if name_or_path in names else Path(name_or_path)
        if not path.is_file():
            raise ValueError(
                f"recipe ({name_or_path!r}) is neither a file nor one of {', '.join(names)}"
                + nearest_name(name_or_path, names)
            )
        known = ["about", *self.parts, "encoder"]  # the last is in the recipe.yaml of a run
        content = read_sections(path, f"write the sections about, {', '.join(self.parts)}")
        for section in content:
            if section not in known:
                raise ValueError(f"section {shown(section)!r} in {path} is unknown{nearest_name(section, known)}")
        check_names(path, "about", content.get("about", {}), ABOUT)
        values: dict[str, Any] = {}
        for section, kind in self.parts.items():
            values |= section_of_file(path, section, content.get(section, {}), kind)
        return TransferRecipe(path.stem, {key: str(value) for key, value in content.get("about", {}).items()}, values)

    def build_parser(self, description: str) -> Any:
        """A parser with the flags that every transfer has; a task adds its own."""
        parser: ArgumentParser = build_parser(
            self.parts.values(),
            usage=f"{how_to_run(self.command)} MODEL [--recipe NAME_OR_PATH] [--flag value ...]",
            description=description,
        )
        parser.add_argument(
            "model",
            nargs="?",
            help=f"Folder or Hub repository of a MoCo model; with --eval_only of a {self.noun}.",
        )
        parser.add_argument(
            "--recipe", default=self.default_recipe, help=f"A YAML file, or one of: {', '.join(self.recipe_names())}."
        )
        parser.add_argument(
            "--eval_only", action="store_true", help=f"Measure a trained {self.noun}, and train nothing."
        )
        parser.add_argument(
            "--random_encoder",
            action="store_true",
            help="Begin with random weights instead: the baseline of any evaluation.",
        )
        return parser

    def parse(self, parser: Any, argv: list[str]) -> tuple[Namespace, dict[str, Any]]:
        """The recipe named in `argv`, overridden by the other flags in it: a namespace, and the fields of a `TransferRun`.

        Raises:
            ValueError: no model or dataset named, an unknown recipe or flag, or a value out of its range.
        """
        known = parser.parse_args(argv)
        if known.model is None:
            raise ValueError("no model given: pass the folder that a run saved to, e.g. runs/quickstart")
        check_exists(known.model)
        self._check_kind(known.model, known.eval_only)
        given = parser.given(argv)
        if known.eval_only:
            self._check_evaluation(given)
        encoder = Encoder(known.model, known.random_encoder)
        of_model = known.eval_only and "recipe" not in given
        recipe = self._recipe_of(known.model) if of_model else self.load_recipe(known.recipe)
        values = self._for_evaluation(recipe.values) if known.eval_only else recipe.values
        if "dataset_name" not in recipe.values and "dataset_name" not in given:
            raise ValueError(f"{recipe.name} names no dataset: pass --dataset_name")
        folder = str(encoder.results_dir if known.eval_only else below(encoder.results_dir, recipe.name))
        _, (data, model, training), settings = parse_flags(parser, self.parts, argv, {"output_dir": folder} | values)
        if settings["training"].get("global_batch_size", 0) is None:  # the devices' batches were given
            settings["training"]["global_batch_size"] = training.global_batch_size
        if of_model and "dataset_name" not in given:
            refuse_namesake(recipe.values.get("dataset_name"), data.dataset_name)
        settings["data"]["dataset_name"] = data.dataset_name
        place = Path(known.model) if known.eval_only else Path(str(training.output_dir))
        of_run = home_of(place) if known.eval_only else place
        recorded = recorded_content if known.eval_only else content_to_continue
        data.content = decided_by_main(lambda: recorded(of_run, data.dataset_name))
        settings["encoder"] = begin_with(encoder.source, encoder.random) | {"task": self.command}
        read_results(Path(str(training.output_dir)))
        return known, {
            **{"task": self, "encoder": encoder, "recipe": recipe, "settings": settings},
            **{"data": data, "model": model, "training": training, "eval_only": known.eval_only, "given": given},
        }

    def _for_evaluation(self, values: dict[str, Any]) -> dict[str, Any]:
        """Without what fits the training alone: its batch need not fit these processes, nor its precision this device."""
        of_training = {field.name for field in offered(self.parts["training"])} - FREE_TO_CHANGE
        left = {name: value for name, value in values.items() if name not in of_training}
        return left | {"max_steps": 1, "global_batch_size": None}

    def _check_kind(self, model: str, eval_only: bool) -> None:
        """
        Raises:
            ValueError: it was trained around an encoder, and is to be one; or is to be evaluated, and is none of this task.
        """
        kinds: dict[type, str] = {MoCoConfig: "pretrain", MoCoRCNNConfig: "detect", MoCoFCNConfig: "segment"}
        try:
            config = read_config(model, list(kinds))
        except OSError:
            return  # none of ours: who loads it says so
        command = kinds[type(config)]
        if command == (self.command if eval_only else "pretrain"):
            return
        what = f"no {self.noun}" if eval_only else "no encoder"
        if command == "pretrain":
            raise ValueError(
                f"{model} is {what} but an encoder: leave --eval_only out to train one around it, or pass the folder that "
                f"{how_to_run(self.command)} saved to"
            )
        another = "" if eval_only else "pass the folder of a pretraining run, or "
        raise ValueError(
            f"{model} is {what} but was trained around one ({config.model_type}): {another}measure it by {how_to_run(command)} "
            f"{shlex.quote(model)} --eval_only"
        )

    def _recipe_of(self, model: str) -> TransferRecipe:
        """The settings that a trained model has beside it; none of a model without, whose training nobody knows."""
        own = home_of(Path(model)) / SAVED_RECIPE
        return self.load_recipe(str(own)) if own.is_file() else TransferRecipe(model, {}, {})

    def _check_evaluation(self, given: set[str]) -> None:
        """
        Raises:
            ValueError: a flag was given that an evaluation of a trained model does not use.
        """
        of_training = {field.name for part in ("model", "training") for field in offered(self.parts[part])}
        spare = (of_training | {"random_encoder"}) & given - self.of_evaluation - FREE_TO_CHANGE
        for name in sorted(name for name in spare if not DESTINATIONS.fullmatch(name)):
            raise ValueError(f"--{name} is for training, and --eval_only trains nothing: leave one of them out")


@dataclass
class TransferRun:
    """A recipe with the command line applied.

    Args:
        data, model, training: instances of the task's `parts`.
        settings: the values that either of them gave, by section.
        given: names of the values that the command line gave.
    """

    task: Task
    encoder: Encoder
    recipe: TransferRecipe
    data: Any
    model: Any
    training: Any
    eval_only: bool
    settings: dict[str, dict[str, Any]]
    given: set[str]

    @property
    def trained(self) -> dict[str, Any] | None:
        """Settings that the model was or will be trained with; None for one that is evaluated and has no record of them."""
        if not self.eval_only:
            return vars(self.model) | vars(self.training)
        own = home_of(Path(self.encoder.source)) / SAVED_RECIPE
        usual = self.defaults["model"] | self.defaults["training"]
        return usual | self.task.load_recipe(str(own)).values if own.is_file() else None

    @property
    def rate_rule(self) -> str | None:
        """What to say where the batch is another than the recipe's: the learning rate and the steps in proportion to it."""
        usual = self.defaults["training"] | self.recipe.values
        batch, recipe_batch = self.training.global_batch_size, usual["global_batch_size"]
        if batch == recipe_batch or "learning_rate" in self.given:
            return None
        share = batch / recipe_batch
        rate, steps = usual["learning_rate"], usual["max_steps"]
        return (
            f"the recipe's learning rate is {rate:g} for {recipe_batch} images a step, and is kept: in proportion it would be "
            f"{rate * share:g} for {batch}, with {steps / share:,.0f} steps instead of {steps:,} (--learning_rate, "
            "--max_steps, --step_milestones)"
        )

    @property
    def training_in_words(self) -> str:
        """Steps, batch and learning rate of the training, for the words of a protocol."""
        if (by := self.trained) is None:
            return "training not recorded"
        checkpoint = steps_of(Path(self.encoder.source)) if self.eval_only else None
        made = f"{checkpoint[0]:,} of " if checkpoint else ""
        return f"{made}{by['max_steps']:,} steps of {by['global_batch_size']}, learning rate {by['learning_rate']:g}"

    @property
    def changed(self) -> list[str]:
        """Settings of this run that are not the recipe's and change what comes out of it."""
        given = {name: value for section in self.task.parts for name, value in self.settings[section].items()}
        given["dataset_name"] = Path(self.data.dataset_name).name
        usual = {name: value for section in self.defaults.values() for name, value in section.items()}
        there = usual | self.recipe.values
        return [name for name, value in given.items() if name not in FREE_TO_CHANGE and value != there[name]]

    @property
    def about(self) -> dict[str, str]:
        """Title, source and expected result of the recipe if this run is its; else what it is based on and what differs."""
        if not self.changed and not self.encoder.random:
            return self.recipe.about
        changed = self.changed + ["random_encoder"] * self.encoder.random
        return {"title": f"Based on recipe {self.recipe.name}, changed: {', '.join(changed)}"}

    @property
    def defaults(self) -> dict[str, dict[str, Any]]:
        """Values of the flags that neither gave."""
        return default_values(self.task.parts)
