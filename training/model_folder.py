"""Load a model's folder, or its repository on the Hub, that a stranger may have made.

Only `config.json` and one safetensors file are read. Neither can start code, name another file or another repository, or take
much more memory than the weights that are there.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file

from modeling_moco import MoCoConfig

from .engine.files import inside
from .errors import first_line, one_line, shown

Model = TypeVar("Model", bound=PreTrainedModel)
# Settings of any transformers model, and the values that load nothing: others name a package, or a kernel on the Hub.
LOADS_NOTHING: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "_attn_implementation": (None, "eager", "sdpa"),
    "attn_implementation": (None, "eager", "sdpa"),
}
OF_THE_CLASSIFIER = ("num_classes", "in_chans")  # model_args of timm that an encoder of colour images has no choice in
MOST_CLASSES = 1_000_000  # each gets a name
# Numbers of a model beyond the bytes of its file: a queue, a second encoder and heads need not be saved.
MUCH = 2**28
# Arguments of `from_pretrained`: weights that are saved in half precision would lose the small steps of training.
TO_TRAIN = {"dtype": torch.float32}
# What transformers and timm raise for values of another kind.
DAMAGED = (
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, ImportError, RecursionError),
)


def read_config(source: str, kinds: Sequence[type[MoCoConfig]] = (MoCoConfig,)) -> MoCoConfig:
    """The configuration of a MoCo model.

    Args:
        kinds: what it may be; by default that of an encoder or its classifier.

    Raises:
        OSError: there is none.
        ValueError: it is damaged or of another model, or has a setting that would load code, or another file.
    """
    try:
        content, _ = MoCoConfig.get_config_dict(source)
        for name, harmless in LOADS_NOTHING.items():
            if content.get(name) not in harmless:
                raise ValueError(f"{name} ({shown(content[name])}) would load something else: remove it")
        if isinstance(classes := content.get("num_labels"), int) and classes > MOST_CLASSES:
            raise ValueError(f"num_labels ({classes:,}) must be at most {MOST_CLASSES:,}: lower it")
        kind = next((kind for kind in kinds if kind.model_type == content.get("model_type")), None)
        if kind is None:
            raise OSError(f"model_type {shown(content.get('model_type'))} in {CONFIG_NAME}")
        config: MoCoConfig = kind.from_pretrained(source)
        if not isinstance(config.dtype, torch.dtype | None):
            raise ValueError(f"dtype ({shown(config.dtype)}) is none of torch's: use float32")
    except StrictDataclassError as error:
        raise _damaged(source, error.__cause__) from error
    except DAMAGED as error:
        raise _damaged(source, error) from error
    return config


def bare_name(architecture: str) -> str:
    """The name of an architecture without that of weights, which timm writes behind a dot."""
    return architecture.partition(".")[0]


def read_timm_config(source: str) -> MoCoConfig | None:
    """The configuration of an encoder from the config.json of a timm model; None for another one's.

    Raises:
        OSError: there is none.
        ValueError: it is damaged.
    """
    try:
        content, _ = MoCoConfig.get_config_dict(source)
        if not {"architecture", "pretrained_cfg"} <= content.keys():
            return None
        told, given = content["pretrained_cfg"], content.get("model_args") or {}
        return MoCoConfig(
            architecture=content["architecture"],
            model_args={name: value for name, value in given.items() if name not in OF_THE_CLASSIFIER} or None,
            image_mean=list(told["mean"]),
            image_std=list(told["std"]),
        )
    except StrictDataclassError as error:
        raise _damaged(source, error.__cause__) from error
    except DAMAGED as error:
        raise _damaged(source, error) from error


def _damaged(source: str, error: BaseException | None) -> ValueError:
    return ValueError(f"{source} has a {CONFIG_NAME} that MoCo cannot use: {one_line(first_line(error))}")


def weights_file(source: str, config: MoCoConfig) -> Path:
    """The weights of a model, which are in one file; a published one has given it a name.

    Raises:
        OSError: there is no such file.
        ValueError: it is no safetensors file, or lies outside the folder.
    """
    given = getattr(config, "transformers_weights", None)
    name = SAFE_WEIGHTS_NAME if given is None else given
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
        raise ValueError(f"{source} has its weights in {shown(name)}, which is no safetensors file of the folder")
    return inside(Path(str(cached_file(source, name))))


def check_size(source: str, config: MoCoConfig, kind: type[PreTrainedModel], **options: Any) -> None:
    """
    Raises:
        OSError: the model has no weights.
        ValueError: by its configuration it would be far larger than its weights, or cannot be built.
    """
    size = weights_file(source, config).stat().st_size
    try:
        with torch.device("meta"):
            numbers = sum(tensor.numel() for tensor in kind(config, **options).state_dict().values())
    except (RuntimeError, *DAMAGED) as error:
        raise _damaged(source, error) from error
    if numbers > size + MUCH:
        raise ValueError(
            f"{source} has {size:,} bytes of weights, and a {CONFIG_NAME} of {numbers:,} numbers (queue_size "
            f"{config.queue_size:,}, projection_dim {config.projection_dim:,}): one of the two is of another model"
        )


def load_model(
    source: str, config: MoCoConfig, kind: type[Model], loading: dict[str, Any], new: str | None = None, **options: Any
) -> tuple[Model, Any]:
    """The model of a folder or repository, and transformers' account of what was loaded.

    Args:
        loading: arguments of `from_pretrained`.
        new: beginning of the names of tensors that may be new where theirs have another shape.
        options: arguments of `kind`.

    Raises:
        OSError: there is no model.
        ValueError: as `check_size` and `check_finite`, or a tensor has another shape than by the configuration.
        SafetensorError: its weights are damaged.
    """
    check_size(source, config, kind, **options)
    # transformers' own error names no tensor; where it is told to ignore them, it makes them new.
    loading = loading | {"ignore_mismatched_sizes": True}
    model, report = kind.from_pretrained(
        source, config=config, output_loading_info=True, use_safetensors=True, **loading, **options
    )
    for name, there, here in sorted(report["mismatched_keys"]):
        if new is None or not name.startswith(new):
            raise ValueError(
                f"{source} has {name} {tuple(there)} in its weights, which by its {CONFIG_NAME} is {tuple(here)}: one of the "
                "two is of another model"
            )
    check_finite(source, model.state_dict())
    return model, report


def check_finite(source: str, state: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        ValueError: a tensor has a number that is not finite, with which a model gives any image the same class or none.
    """
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{source} has numbers in {name} that are not finite: its training diverged, or it is damaged. Pass another "
                "model, or an earlier checkpoint of its run"
            )
