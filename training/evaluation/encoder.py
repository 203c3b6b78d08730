"""What all evaluations share: the encoder that is evaluated, the data it was trained on, and where results go."""

import difflib
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from transformers import set_seed
from transformers.utils import CONFIG_NAME, logging

from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoImageProcessor, MoCoModel

from ..cli import build_parser, how_to_run, offered, parse_flags, section_of_file
from ..data.sources import DataArguments, EvaluationDataArguments, ImageSplits, NotOpenedError, load_images
from ..engine.checkpoints import has_ended
from ..engine.files import check_model_files
from ..engine.results import Result, encoder_digest, read_results, table
from ..engine.run_folder import (
    METRICS,
    OF_TASKS,
    SAVED_RECIPE,
    WEIGHTS,
    begin_with,
    read_metrics,
    read_sections,
    recorded_content,
    refuse_namesake,
    results_folder,
)
from ..engine.sgd_trainer import PUBLISHING, SGDTrainingArguments
from ..errors import first_line, one_line
from ..model_folder import TO_TRAIN, check_size, load_model, read_config
from .knn import KNNArguments

Model = TypeVar("Model", MoCoModel, MoCoForImageClassification)


@dataclass(frozen=True)
class Encoder:
    """The encoder that is evaluated.

    Args:
        source: folder or Hub repository of a MoCo model.
        random: its architecture with random weights, the baseline of any evaluation.
    """

    source: str
    random: bool = False

    @property
    def results_dir(self) -> Path:
        """Folder of its results, see `results_folder`."""
        return results_folder(self.source, self.random)

    def __str__(self) -> str:
        return f"a random encoder like {self.source}" if self.random else self.source

    def load(self, kind: type[Model], seed: int, head: bool = False, **config: Any) -> Model:
        """The model as `kind`, in evaluation mode, a classifier always new; `config` overrides its configuration.

        Args:
            head: whether the checkpoint must have the projector of the queries too.

        Raises:
            ValueError: there is no model, it lacks what `kind` or `head` needs, or a file of it lies elsewhere.
        """
        verbosity = logging.get_verbosity()
        check_model_files(Path(self.source))
        logging.set_verbosity_error()  # transformers warns that a classifier is new, which is the point
        set_seed(seed)
        try:
            loaded = read_config(self.source)
            for name, value in config.items():
                setattr(loaded, name, value)
            if self.random:
                check_size(self.source, loaded, kind)
                return _new(kind, loaded, seed).eval()
            # Projectors come with the key encoder and the dictionary, which may be a class that is not registered here.
            options = {"momentum_encoder": head} if kind is MoCoModel else {}
            model, report = load_model(self.source, loaded, kind, TO_TRAIN, new="classifier.", **options)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.source} holds no MoCo model ({error}): pass the folder that a run saved to, e.g. runs/quickstart"
            ) from error
        finally:
            logging.set_verbosity(verbosity)
        missing = {key for key in report["missing_keys"] if not key.startswith("classifier.")}
        if head:
            missing |= {key for key in model.absent_keys if key.startswith("projector_q.")}
        if missing:
            raise ValueError(
                f"{self.source} holds a model without {min(missing)}: pass the folder that a pretraining run saved to, e.g. "
                "runs/quickstart"
            )
        if isinstance(model, MoCoForImageClassification):  # that of an earlier probe has seen labels
            torch.nn.init.normal_(model.classifier.weight, std=0.01)
            torch.nn.init.zeros_(model.classifier.bias)
        return model

    def load_classifier(self, class_names: list[str], seed: int) -> MoCoForImageClassification:
        """The encoder with a new classifier for these classes.

        Raises:
            ValueError: there is no model.
        """
        id2label = dict(enumerate(class_names))
        label2id = {name: number for number, name in id2label.items()}
        return self.load(MoCoForImageClassification, seed, id2label=id2label, label2id=label2id)


def _new(kind: type[Model], config: MoCoConfig, seed: int) -> Model:
    """A model with random weights. Its encoder is that of the seed, whatever else the model has.

    A stem of our own gets its weights after the heads, the key encoder and the dictionary have drawn theirs.
    """
    set_seed(seed)
    encoder = MoCoModel(config, momentum_encoder=False).encoder_q
    set_seed(seed)
    model = kind(config)
    moco = model if isinstance(model, MoCoModel) else model.moco
    moco.encoder_q.load_state_dict(encoder.state_dict())
    if moco.has_key_encoder:
        moco.reset_key_encoder()
    return model


def pretraining_recipe(source: str, kind: type[EvaluationDataArguments] = EvaluationDataArguments) -> dict[str, Any]:
    """The recipe of the pretraining run that saved a model or its checkpoint.

    Args:
        source: folder or Hub repository of the model.
        kind: flags of the evaluation's data. The section `data` keeps their values and drops those of pretraining alone.

    Returns:
        the sections of `recipe.yaml`; without that file a section `data` with the sizes of the image processor, if there is
        one.

    Raises:
        ValueError: it is damaged, or of a model that was trained around an encoder.
    """
    for folder in _folders_of(source):
        if (folder / SAVED_RECIPE).is_file():
            recipe = read_sections(folder / SAVED_RECIPE, "correct it, or move it away")
            if (task := recipe.get("encoder", {}).get("task")) in OF_TASKS:
                raise ValueError(
                    f"{source} is of {how_to_run(task)}, whose encoder has been trained with labels: pass the run that it "
                    "began with, or measure it by --eval_only of that command"
                )
            known = {f.name for f in offered(kind)}
            data = {key: value for key, value in recipe.get("data", {}).items() if key in known}
            return recipe | {"data": section_of_file(folder / SAVED_RECIPE, "data", data, kind)}
    try:
        processor = MoCoImageProcessor.from_pretrained(source)
    except OSError:
        return {"data": {}}  # `Encoder.load` will say that there is no model
    return {"data": {"image_size": processor.crop_size["height"], "eval_resize": processor.size["shortest_edge"]}}


def _folders_of(source: str) -> tuple[Path, Path]:
    return Path(source), Path(source).parent  # of a run, or of its checkpoint


def _elsewhere() -> dict[str, str]:
    """Flags of other commands that one may expect here, and the command that has each."""
    model = MoCoConfig.__annotations__.keys() - {"model_type"}
    pretraining = (
        {f.name for f in offered(DataArguments)} | model | {*PUBLISHING, "eval_every_n_epochs", "knn_bank_size"}
    )
    knn = {f.name for f in offered(KNNArguments) if f.name.startswith("knn_")}
    return dict.fromkeys(pretraining, "pretrain") | dict.fromkeys(knn, "knn")


def check_exists(source: str) -> None:
    """
    Raises:
        ValueError: a model's path or name leads nowhere.
    """
    if Path(source).exists():
        return
    try:
        read_config(source)
    except OSError as error:
        raise not_there(source, ", neither here nor as a model that the Hub gives") from error


def check_results(folder: Path) -> None:
    """Read what an evaluation adds to or shows beside its own result, before any time is spent on it.

    Raises:
        ValueError: a file is damaged.
    """
    read_results(folder)
    for path in (folder / METRICS, *folder.glob(f"*/{METRICS}")):  # of the run, and of the probes in it
        read_metrics(path, "correct it, or move it away")


def check_writable(folder: Path) -> None:
    """Try to write in the folder of an encoder's results, before any time is spent on one.

    Raises:
        ValueError: it is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"results cannot be written to {folder} ({error.strerror}): copy the model to a folder of your own"
        ) from error


@torch.no_grad()
def encode_blank(model: MoCoModel, size: int, remedy: str) -> torch.Tensor:
    """The last map of one blank image, by a model in evaluation mode.

    Args:
        size: its side in pixels.
        remedy: what to do about an encoder that takes no images of this size.

    Raises:
        ValueError: it takes none.
    """
    try:
        last: torch.Tensor = model.features(torch.zeros(1, 3, size, size, device=model.device)).last_hidden_state
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"image_size ({size}) is refused by {model.config.architecture} ({one_line(first_line(error))}): {remedy}"
        ) from error
    return last


def check_image_size(model: MoCoModel, size: int) -> None:
    """
    Raises:
        ValueError: the encoder takes no images of this size.
    """
    encode_blank(model, size, "pass the --image_size that it was trained with")


class Evaluation(Protocol):
    """A parsed command line of an evaluation with a folder of its own."""

    encoder: Encoder
    data: Any
    training: Any
    settings: dict[str, dict[str, Any]]

    @property
    def defaults(self) -> dict[str, dict[str, Any]]:
        """Values of the flags that were not given."""


def open_images(run: Evaluation) -> ImageSplits | None:
    """The images of an evaluation.

    Returns:
        None where they cannot be opened any more and the evaluation has ended: what it has measured is then shown.

    Raises:
        ValueError: as `load_images`.
    """
    try:
        return load_images(run.data, labelled=True)
    except NotOpenedError as error:
        with suppress(ValueError):  # other settings or no model: that the images are missing comes first
            run.settings["encoder"][WEIGHTS] = encoder_digest(run.encoder.load(MoCoModel, run.training.seed))
            if has_ended(run.training, run.settings, run.defaults):
                if run.training.process_index == 0:
                    print(f"warning: the images were not compared with those of then: {error}", file=sys.stderr)
                show_recorded(run.training)
                return None
        raise


def show_recorded(training: SGDTrainingArguments) -> None:
    """Print, on the main process, what the evaluation that ended in the output directory has measured."""
    if training.process_index != 0:
        return
    metrics = read_metrics(Path(str(training.output_dir)) / METRICS, "correct it, or move it away")
    entries = metrics.get("probes", [metrics])
    whole = [(e, name) for e in entries for name in ("top1", "top5") if {"protocol", "n", name} <= e.keys()]
    print(table([Result(e["protocol"], name, e[name], e["n"]) for e, name in whole]))


def not_there(source: str, where: str) -> ValueError:
    """The error for a path, or a name on the Hub, that leads nowhere.

    Args:
        where: it was looked for, in words.
    """
    beside = [str(path) for path in Path(source).parent.glob("*") if path.is_dir()]
    close = difflib.get_close_matches(source, beside, n=1)
    meant = f"did you mean {close[0]}?" if close else "pass the folder that a run saved to, e.g. runs/quickstart"
    return ValueError(f"{source} does not exist{where}: {meant}")


def parse_evaluation(
    argv: list[str],
    parts: dict[str, Any],
    *,
    command: str,
    description: str,
    defaults: Callable[[dict[str, Any]], dict[str, dict[str, Any]]] = lambda recipe: {},
    output: str | None = None,
) -> tuple[Encoder, list[Any], dict[str, dict[str, Any]], set[str]]:
    """Flags over the settings of the pretraining run that the model came from.

    Args:
        command: its name in `moco`.
        parts: dataclasses of flags; "data" is `EvaluationDataArguments` or a subclass.
        defaults: from the run's recipe to those of its values that are for other flags than those of the data, by section.
        output: name of the folder in the encoder's results_dir that `--output_dir` defaults to.

    Returns:
        the encoder, an instance of each part, the settings that the run or `argv` gave, and the names that `argv` gave.

    Raises:
        ValueError: no model or dataset named, an unknown flag, or a value out of its range.
    """
    parser = build_parser(
        parts.values(),
        elsewhere=_elsewhere(),
        usage=f"{how_to_run(command)} MODEL [--random_encoder] [--flag value ...]",
        description=description,
    )
    parser.add_argument("model", nargs="?", help="Folder or Hub repository of a MoCo model.")
    parser.add_argument(
        "--random_encoder", action="store_true", help="Use random weights instead: the baseline of any evaluation."
    )
    known = parser.parse_args(argv)
    if known.model is None:
        raise ValueError("no model given: pass the folder that a run saved to, e.g. runs/quickstart")
    given = parser.given(argv)
    check_exists(known.model)
    encoder = Encoder(known.model, known.random_encoder)
    check_results(encoder.results_dir)
    recipe = pretraining_recipe(known.model, parts["data"])
    if "dataset_name" not in recipe["data"] and "dataset_name" not in given:
        if not recipe["data"] and not (Path(known.model) / CONFIG_NAME).is_file():
            raise ValueError(
                f"{known.model} holds no MoCo model: pass the folder that a run saved to, e.g. runs/quickstart"
            )
        raise ValueError(f"{known.model} does not say what it was trained on: pass --dataset_name")
    values = dict(recipe["data"])
    kind = next(kind for part, kind in parts.items() if part != "data")
    for section, entries in defaults(recipe).items():
        values |= section_of_file(Path(known.model) / SAVED_RECIPE, section, entries, kind)
    if output is not None:
        values = {"output_dir": str(encoder.results_dir / output)} | values
    _, instances, settings = parse_flags(parser, parts, argv, values)
    data = instances[list(parts).index("data")]
    if "dataset_name" not in given:
        refuse_namesake(recipe["data"].get("dataset_name"), data.dataset_name)
    if "dataset_name" in settings["data"]:
        settings["data"]["dataset_name"] = data.dataset_name
    for folder in _folders_of(known.model):
        data.content = data.content or recorded_content(folder, data.dataset_name)
    settings["encoder"] = begin_with(encoder.source, encoder.random)
    return encoder, instances, settings, given
