"""Where weights came from: the trainings that made them one after the other, back to the pretraining run.

Every training records the model that it began with and a digest of its encoder, by which that model is known again: a folder of
the same name may hold another one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from modeling_moco import MoCoModel

from ..engine.files import check_model_files, read_object
from ..engine.results import encoder_digest
from ..engine.run_folder import (
    PATHS,
    SAVED_RECIPE,
    SEEN_LABELS,
    WEIGHTS,
    holds_checkpoint,
    home_of,
    read_sections,
    results_folder,
)
from ..errors import shown
from ..model_folder import load_model, read_config

REMEDY = "correct it, or move it away"
Steps = tuple[int, int]  # steps that a training had made when it saved the weights, and those that it was to make


@dataclass(frozen=True)
class Lineage:
    """
    Args:
        folders: that of the model, that of the model with which its training began, and so on. With a checkpoint comes the
            folder of its training, and of a model that is on the Hub or was random the folder of its evaluations.
        run: the folder of the pretraining; None where it is not known, or nothing was pretrained.
        fine_tuned: whether a training before the model's own changed the encoder by labels.
        reached: of a model that is a checkpoint.
        pretrained_to: of a pretraining, with a checkpoint of which the next training began.
    """

    folders: list[Path]
    run: Path | None
    fine_tuned: bool
    reached: Steps | None
    pretrained_to: Steps | None

    @property
    def final(self) -> bool:
        """Whether the weights are the final ones of the pretraining, or were trained from them."""
        return self.run is not None and not any(map(holds_checkpoint, self.folders))


def trace(source: Path) -> Lineage:
    """The lineage of the model in a folder; nothing is known of one on the Hub.

    Raises:
        ValueError: a file there is damaged.
    """
    models, folders, fine_tuned = [], [], False
    run, folder = None, source.resolve() if source.is_dir() else None
    while folder is not None:
        models.append(folder)
        home = home_of(folder)
        folders += [folder] if folder == home else [folder, home]
        began = read_yaml(home / SAVED_RECIPE).get("encoder")
        if began is None:
            run = home
            break
        fine_tuned |= bool(began.get(SEEN_LABELS)) or (len(models) > 1 and bool(began.get("fine_tuned")))
        folder = _before(home, began, folders)
        if folder is None:
            folders.append(_evaluations(home, began))
    pretrained_to = steps_of(models[-1]) if run is not None and len(models) > 1 else None
    return Lineage(folders, run, fine_tuned, steps_of(models[0]) if models else None, pretrained_to)


def read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """Sections of a file beside a model; none if it is not there.

    Raises:
        ValueError: it has none, or a dataset or a model in them that is no name.
    """
    if not path.is_file():
        return {}
    sections = read_sections(path, REMEDY)
    for section, values in sections.items():
        for name in PATHS:
            if not isinstance(value := values.get(name), str | None):
                raise ValueError(f"{path} has {shown(value)} as {name} in {section}, which is no name: {REMEDY}")
    return sections


def _before(home: Path, began: dict[str, Any], seen: list[Path]) -> Path | None:
    """The folder of the model with whose encoder a training began: that around its own, or where it was then.

    Args:
        began: what the training has recorded of it.
    """
    if began.get("random_encoder"):
        return None
    recorded, named = began.get(WEIGHTS), Path(str(began.get("model")))
    above, there = home.parent, named.resolve() if named.is_dir() else None
    if recorded is not None:
        for folder in (above, there):
            if folder is not None and folder not in seen and _digest(folder) == recorded:
                return folder
    # Of an older version, or without its weights.
    known_by_name = named.name == above.name and (recorded is None or _digest(above) is None)
    return above if known_by_name else None


def _evaluations(home: Path, began: dict[str, Any]) -> Path:
    """The folder where evaluations of a model that is no folder here have written: that around this one, if it has the name."""
    folder = results_folder(str(began.get("model")), bool(began.get("random_encoder")))
    return home.parent if home.parent.name == folder.name else folder


def _digest(folder: Path) -> str | None:
    """Of the encoder of a model; None where there is none."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        check_model_files(folder)
        model, _ = load_model(str(folder), read_config(str(folder)), MoCoModel, {}, momentum_encoder=False)
        return encoder_digest(model)
    except (OSError, SafetensorError, RuntimeError, ValueError):
        return None
    finally:
        logging.set_verbosity(verbosity)


def steps_of(folder: Path) -> Steps | None:
    """Of a checkpoint; None of what is none."""
    path = folder / TRAINER_STATE_NAME
    if not holds_checkpoint(folder) or not path.is_file():
        return None
    state = read_object(path, REMEDY)
    made, of = state.get("global_step"), state.get("max_steps")
    return (made, of) if isinstance(made, int) and isinstance(of, int) else None
