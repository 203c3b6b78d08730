"""Models around a pretrained encoder: built from its folder, and loaded once they are trained."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from ..cli import how_to_run
from ..engine.files import check_model_files
from ..evaluation.encoder import Encoder
from ..model_folder import TO_TRAIN, load_model, read_config
from .recipe import Task

Model = TypeVar("Model", bound=PreTrainedModel)


def build_around(
    encoder: Encoder,
    kind: type[Model],
    class_names: Sequence[str],
    settings: dict[str, Any],
    new: re.Pattern,
    seed: int,
) -> Model:
    """The encoder in a new model of these classes.

    Args:
        settings: of the model's configuration, beside those of the encoder.
        new: matches the names of the tensors that no encoder has.
        seed: of the new weights.

    Raises:
        ValueError: there is no such encoder, or it cannot be in such a model.
    """
    source, config_kind = encoder.source, kind.config_class
    assert config_kind is not None
    id2label = dict(enumerate(class_names))
    names = {"id2label": id2label, "label2id": {name: number for number, name in id2label.items()}}
    set_seed(seed)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers warns that the heads are new, which is the point
    try:
        check_model_files(Path(source))
        read_config(source)
        config: Any = config_kind.from_pretrained(source, **names, **settings)
        if encoder.random:
            return kind(config)
        model, report = load_model(source, config, kind, TO_TRAIN)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{source} holds no MoCo model ({error}): pass the folder that a run saved to, e.g. runs/quickstart"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(key for key in report["missing_keys"] if not new.match(key))
    if missing:
        raise ValueError(
            f"{source} holds a model without {missing[0]}: pass the folder that a pretraining run saved to"
        )
    return model


def load_trained(source: str, task: Task, kind: type[Model], processor: Any) -> tuple[Model, Any]:
    """The trained model that is to be evaluated, and its image processor.

    Args:
        processor: its class.

    Raises:
        ValueError: there is none.
    """
    config_kind = kind.config_class
    assert config_kind is not None
    try:
        check_model_files(Path(source))
        config = read_config(source, [config_kind])
        model, report = load_model(source, config, kind, {})
        if report["missing_keys"]:
            raise OSError(f"it lacks {min(report['missing_keys'])}")
        return model.eval(), processor.from_pretrained(source)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{source} holds no {task.noun} ({error}): pass the folder that {how_to_run(task.command)} saved to"
        ) from error
