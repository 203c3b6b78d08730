"""Recipes of a task that encoders are transferred to, and the command line on top of them."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli import build_parser, check_names, default_values, how_to_run, nearest_name, parse_flags, section_of_file
from ..engine.files import below
from ..engine.results import read_results
from ..engine.run_folder import FREE_TO_CHANGE, SAVED_RECIPE, read_sections
from ..errors import shown
from ..evaluation.encoder import Encoder, check_exists

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
    """

    command: str
    noun: str
    recipes: Path
    default_recipe: str
    parts: dict[str, Any]

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
        if not known.eval_only:
            check_exists(known.model)
        encoder = Encoder(known.model, known.random_encoder)
        own = Path(known.model) / SAVED_RECIPE  # of a trained model: what it is called is what it was trained by
        of_trained = known.eval_only and "recipe" not in parser.given(argv) and own.is_file()
        recipe = self.load_recipe(str(own) if of_trained else known.recipe)
        if "dataset_name" not in recipe.values and "dataset_name" not in parser.given(argv):
            raise ValueError(f"recipe {recipe.name} names no dataset: pass --dataset_name")
        folder = known.model if known.eval_only else str(below(encoder.results_dir, recipe.name))
        _, (data, model, training), settings = parse_flags(
            parser, self.parts, argv, {"output_dir": folder} | recipe.values
        )
        settings["data"]["dataset_name"] = data.dataset_name
        settings["encoder"] = {"model": encoder.source, "random_encoder": encoder.random}
        read_results(Path(str(training.output_dir)))
        return known, {
            **{"task": self, "encoder": encoder, "recipe": recipe, "settings": settings},
            **{"data": data, "model": model, "training": training, "eval_only": known.eval_only},
        }


@dataclass
class TransferRun:
    """A recipe with the command line applied.

    Args:
        data, model, training: instances of the task's `parts`.
        settings: the values that either of them gave, by section.
    """

    task: Task
    encoder: Encoder
    recipe: TransferRecipe
    data: Any
    model: Any
    training: Any
    eval_only: bool
    settings: dict[str, dict[str, Any]]

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
