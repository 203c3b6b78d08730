"""The command line of the converter, and the formats that it writes.

It reads what `detect.py` recognises, and model directories. It writes a model directory, the official file, detectron2's
pickle or checkpoint, or torchvision's state dict. An output is complete or absent. Optimizers are not converted.
"""

import io
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_NAME, cached_file

from modeling_moco import (
    MoCoConfig,
    MoCoDetectionImageProcessor,
    MoCoForObjectDetection,
    MoCoModel,
    MoCoRCNNConfig,
)
from modeling_moco.modeling_moco import names_of_wrapper

from ..cli import build_parser, how_to_run, nearest_name
from ..data.sources import EvaluationDataArguments
from ..engine.files import check_model_files, read_json, write_json
from ..engine.run_folder import CONVERSION
from ..errors import first_line, one_line
from ..model_folder import DAMAGED, check_size, read_config, read_timm_config, weights_file
from .detect import Checkpoint, known_values, read_file, recognise
from .detectors import check_detector, detectron2_settings, detectron2_state
from .key_maps import (
    CLASSIFIER,
    CLASSIFIER_VIT,
    DETECTRON2,
    LAYOUTS,
    OFFICIAL,
    OFFICIAL_ARCH,
    OFFICIAL_V3,
    OFFICIAL_V3_VIT,
    RESNETS,
    VITS,
    WITH_HEAD,
    WITHOUT_HEAD,
    WRAPPED,
    Names,
    State,
    rename_back,
)
from .shapes import few

# What the official code's file must be read back with.
SETTINGS_OF_THE_ENCODER = ("architecture", "stem", "model_args")
# What no file of weights has, and what a model directory has of its training.
OF_IMAGES, OF_TRAINING = ("image_mean", "image_std"), ("temperature", "key_momentum")
SUFFIXES = (".tar", ".pth", ".pt", ".pkl", ".ckpt")  # suffixes of checkpoint files


# The command line


@dataclass
class ConvertArguments:
    to: str = field(
        default="moco",
        metadata={
            "help": "Format of the output. moco: a model directory; official: .pth.tar of the official code; detectron2: a "
            "pickle of the backbone (.pkl), or of a detector all weights (.pth); torchvision: a state dict (.pth). The last "
            "three are pickles: publish only the first."
        },
    )

    def __post_init__(self):
        if self.to not in FORMATS:
            raise ValueError(f"to ({self.to!r}) is unknown{nearest_name(self.to, list(FORMATS))}")


def parse_convert(argv: list[str]) -> tuple[str, Path, str]:
    """Parse source, output and format of a command line.

    Raises:
        ValueError: one is missing or unknown, the output exists, or it does not suit the format.
    """
    parser = build_parser(
        [ConvertArguments],
        usage=f"{how_to_run('convert')} CHECKPOINT OUTPUT [--to FORMAT]",
        description="Convert MoCo checkpoints of other code to a model directory, and back.",
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="File of the official code, lightly, solo-learn or detectron2; or a folder or Hub repository.",
    )
    parser.add_argument("output", nargs="?", help="What to write; it must not exist yet.")
    args = parser.parse_args(argv)
    to, out = ConvertArguments(args.to).to, args.output
    if out is None:
        raise ValueError(f"two names are needed: {how_to_run('convert')} CHECKPOINT OUTPUT [--to FORMAT]")
    # os.path, because a Path of too long a name raises where it is asked whether it exists.
    if not os.path.exists(args.checkpoint) and Path(args.checkpoint).suffix in SUFFIXES:  # no name of a Hub repository
        raise ValueError(f"{args.checkpoint} does not exist: pass a checkpoint, or the folder that a run saved to")
    if os.path.lexists(out):
        raise ValueError(f"{out} exists and is not overwritten: name another output")
    if to == "moco" and os.path.isfile(os.path.join(args.checkpoint, CONFIG_NAME)):
        raise ValueError(f"{args.checkpoint} is already a model directory: pass --to official or another format")
    if to == "moco" and Path(out).suffix in SUFFIXES:
        raise ValueError(
            f"{out} looks like a file, but --to moco writes a folder: pass --to official or another format"
        )
    return args.checkpoint, Path(out), to


# Reading


def read(source: str, timm_too: bool = False) -> Checkpoint:
    """Read a checkpoint file of any kind in `LAYOUTS`, or a model directory or Hub repository of this project.

    Args:
        timm_too: whether it may be timm's too, which no contrastive training has seen.

    Raises:
        ValueError: the source does not exist, is damaged, is of another kind or needs code; or its tensors are not a complete
            model.
    """
    folder, name = os.path.split(source)
    if name == SAFE_WEIGHTS_NAME and os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        raise ValueError(f"{source} has the weights of a model directory without its settings: pass {folder or '.'}")
    return read_file(Path(source)) if os.path.isfile(source) else _read_model(source, timm_too)


def _read_model(source: str, timm_too: bool) -> Checkpoint:
    check_model_files(Path(source))
    try:
        of_timm = read_timm_config(source) if timm_too else None
        config = of_timm or read_config(source, (MoCoConfig, MoCoRCNNConfig))
        if isinstance(config, MoCoRCNNConfig):
            check_size(source, config, MoCoForObjectDetection)
        else:
            check_size(source, config, MoCoModel, momentum_encoder=of_timm is None)
        state = _own_names(source, load_file(weights_file(source, config)))
    except (OSError, SafetensorError) as error:
        what = (
            "does not contain a MoCo model"
            if os.path.isdir(source)
            else "is not a file, a folder or a Hub repository that can be reached"
        )
        raise ValueError(
            f"{source} {what} ({one_line(first_line(error))}): pass a checkpoint, or the folder that a run saved to"
        ) from error
    if of_timm is not None:
        return _encoder_alone(source, config, state).checked()
    checkpoint = Checkpoint(source, "MoCo", config, state, _read_about(Path(source) / CONVERSION))
    if checkpoint.is_classifier or checkpoint.is_detector:
        checkpoint.title = "MoCo detector" if checkpoint.is_detector else "MoCo classifier"
    return checkpoint.checked()


def _own_names(source: str, state: State) -> State:
    """Tensors in the names of this project, where transformers' TimmWrapper has saved a published model."""
    for pattern, ours in (names_of_wrapper(source, {}) or {}).items():
        state = {re.sub(pattern, ours, name): tensor for name, tensor in state.items()}
    if "classifier.weight" in state:  # around the encoder
        state = {re.sub("^(?=encoder_q)", "moco.", name): tensor for name, tensor in state.items()}
    return state


def _encoder_alone(source: str, config: MoCoConfig, state: State) -> Checkpoint:
    """The encoder of a timm model, without its classifier."""
    state = {f"encoder_q.{name.removeprefix('timm_model.')}": x for name, x in state.items()}  # TimmWrapper adds that
    checkpoint = Checkpoint(source, "timm", config, state)
    known = checkpoint.empty_model().state_dict().keys()
    spare = [name for name in state if name not in known]
    checkpoint.state = {name: x for name, x in state.items() if name in known}
    checkpoint.notes = [f"left out: {few(spare)}"] if spare else []
    return checkpoint


def _read_about(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path, "delete it, which loses epoch and accuracy", "a JSON object")
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: delete it, which loses epoch and accuracy")
    return known_values(content) | ({"prefix": ""} if content.get("prefix") == "" else {})


# Writing


def write(checkpoint: Checkpoint, out: Path, to: str) -> list[str]:
    """Write a checkpoint in one of `FORMATS`, complete or not at all.

    Returns:
        sentences about what the output needs beside itself.

    Raises:
        ValueError: the format cannot store this model, or the output cannot be written.
    """
    if checkpoint.is_detector and to != "moco":
        if to != "detectron2":
            raise ValueError(f"{checkpoint.source} is a detector, which --to {to} cannot hold: pass --to detectron2")
        check_detector(checkpoint.source, checkpoint.config, out)
    elif to != "moco":
        _check_encoder(checkpoint, to, out)
    theirs = _check_official(checkpoint) if to == "official" else MoCoConfig()
    needs = []
    if to != "moco" and not checkpoint.is_detector:
        of_training = OF_TRAINING if to == "official" and "projector_q" in checkpoint.parts else ()
        needs = _not_in_the_file(checkpoint, theirs, [*OF_IMAGES, *of_training])
    if checkpoint.is_detector and to == "detectron2":
        settings = detectron2_settings(checkpoint.source, checkpoint.config, _processor(checkpoint).size)
        needs.append(f"beside a *_moco.yaml of the official code, detectron2 needs {settings}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            unfinished = Path(folder) / out.name
            FORMATS[to].save(checkpoint, unfinished)
            unfinished.rename(out)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{out} cannot be written ({error}): name another output, or make room") from error
    return needs


def _not_in_the_file(checkpoint: Checkpoint, theirs: MoCoConfig, names: Sequence[str]) -> list[str]:
    """A sentence about settings that a file of weights does not have, where they are others than its readers take.

    Args:
        theirs: what is taken where the file is read.
        names: of the settings.
    """

    def value(config: MoCoConfig, name: str) -> Any:
        setting = getattr(config, name)
        return list(setting) if isinstance(setting, tuple) else setting

    ours = {name: value(checkpoint.config, name) for name in names}
    unlike = [f"{name} {mine}" for name, mine in ours.items() if mine != value(theirs, name)]
    return [f"the file does not have {', '.join(unlike)}: what reads it must be told"] if unlike else []


def _check_encoder(checkpoint: Checkpoint, to: str, out: Path) -> None:
    config = checkpoint.config
    if to == "official" and config.architecture in VITS:
        return
    if config.architecture not in RESNETS or config.stem != "default" or config.model_args:
        model = f"a {config.architecture} with stem={config.stem!r}, model_args={config.model_args}"
        too = ", and of MoCo v3 plain ViTs" if to == "official" else ""
        raise ValueError(
            f"{checkpoint.source} is {model}, but --to {to} writes torchvision's ResNets alone{too}: keep it as it is"
        )
    if to == "detectron2" and out.suffix != ".pkl":
        raise ValueError(f"{out} must end in .pkl, or detectron2 reads it as another kind of file: rename it")


def _check_official(checkpoint: Checkpoint) -> MoCoConfig:
    """The configuration by which the official file of this model would be read back.

    Raises:
        ValueError: the official file of this model would be read as another model, of which this names settings.
    """
    ours, names = checkpoint.config, _official_names(checkpoint)
    layout = next(layout for layout in LAYOUTS if layout.names == names)
    theirs, kept, _ = recognise(Path(checkpoint.source), layout, dict(checkpoint.state), _official_arch(ours))
    unlike = [name for name in SETTINGS_OF_THE_ENCODER if getattr(ours, name) != getattr(theirs, name)]
    methods = [(config.dictionary, config.key_encoder) for config in (ours, theirs)]
    if kept.keys() != checkpoint.state.keys() or ("projector_q" in checkpoint.parts and methods[0] != methods[1]):
        unlike = ["dictionary", "key_encoder", "projection_head", "prediction_head"]
    if unlike:
        has = ", ".join(f"{name}={getattr(ours, name)!r}" for name in unlike)
        raise ValueError(
            f"{checkpoint.source} has {has}, which no official file has: those of MoCo v1 and v2 have a queue and a head "
            "without BatchNorm, those of v3 a batch, heads with BatchNorm, and a ViT-S with 12 heads of attention; keep it as "
            "it is"
        )
    return theirs


def _official_names(checkpoint: Checkpoint) -> Names:
    config = checkpoint.config
    is_vit = config.architecture in VITS
    if checkpoint.is_classifier:
        return CLASSIFIER_VIT if is_vit else CLASSIFIER
    if is_vit:
        return OFFICIAL_V3_VIT
    return OFFICIAL if config.dictionary == "queue" else OFFICIAL_V3


def _official_arch(config: MoCoConfig) -> str:
    return OFFICIAL_ARCH.get(config.architecture, config.architecture)


def _save_model(checkpoint: Checkpoint, path: Path) -> None:
    model = checkpoint.empty_model()
    model.load_state_dict(checkpoint.state, strict=False, assign=True)
    model.save_pretrained(path, state_dict=dict(checkpoint.state))
    _processor(checkpoint).save_pretrained(path)
    about = {"format": checkpoint.title, "file": Path(checkpoint.source).name} | checkpoint.about
    write_json(path / CONVERSION, about)


def _processor(checkpoint: Checkpoint) -> Any:
    """The image processor of a model directory or repository; where it has none, that of MoCo's configurations.

    Raises:
        ValueError: it is damaged.
    """
    config = checkpoint.config
    if checkpoint.is_detector:
        mean, std = list(config.image_mean), list(config.image_std)
        usual: Any = MoCoDetectionImageProcessor(image_mean=mean, image_std=std)
    else:
        usual = EvaluationDataArguments(image_size=_image_size(config)).image_processor(config)
    if not _has_processor(checkpoint.source):
        return usual
    try:
        settings = type(usual).from_pretrained(checkpoint.source).to_dict()
        return type(usual)(**{name: value for name, value in settings.items() if name in usual.to_dict()})
    except (OSError, *DAMAGED) as error:
        raise ValueError(
            f"{checkpoint.source} has a {IMAGE_PROCESSOR_NAME} that cannot be read ({one_line(first_line(error))}): correct "
            "it, or move it away"
        ) from error


def _image_size(config: MoCoConfig) -> int:
    """Pixels of a side of the images that an encoder takes: those of a ViT's positions, else the papers'."""
    size = (config.model_args or {}).get("img_size")
    return size if isinstance(size, int) else EvaluationDataArguments.image_size


def _has_processor(source: str) -> bool:
    if os.path.isfile(source):
        return False  # beside a file of other code lies nothing of it
    try:
        return cached_file(source, IMAGE_PROCESSOR_NAME) is not None
    except OSError:
        return False


def _save_official(checkpoint: Checkpoint, path: Path) -> None:
    state = rename_back(checkpoint.state, _official_names(checkpoint))
    # torch lists the buffers of a module first, and then its children in the order in which the code makes them.
    ordered = sorted(state, key=lambda name: (not name.startswith("queue"), name.startswith("predictor.")))
    about = checkpoint.about | {"arch": _official_arch(checkpoint.config)}
    content: dict[str, Any] = {key: about[key] for key in ("epoch", "arch") if key in about}
    prefix = about.get("prefix", WRAPPED)
    content["state_dict"] = {f"{prefix}{name}": state[name] for name in ordered}
    if isinstance(about.get("best_acc1"), int | float):
        content["best_acc1"] = torch.tensor(about["best_acc1"])
    _torch_save(content, path)


def _save_torchvision(checkpoint: Checkpoint, path: Path) -> None:
    _torch_save(rename_back(checkpoint.state, CLASSIFIER if checkpoint.is_classifier else WITHOUT_HEAD), path)


def _torch_save(content: dict[str, Any], path: Path) -> None:
    # On a full disk write_bytes raises OSError, which `write` handles; torch.save raises another error.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())  # a copy: a view that an error leaves open ends in a second error


def _save_detectron2(checkpoint: Checkpoint, path: Path) -> None:
    if checkpoint.is_detector:
        # Its names are the whole names, which detectron2 loads without matching heuristics.
        _torch_save({"model": detectron2_state(checkpoint.config, checkpoint.state)}, path)
        return
    encoder = {name.removeprefix("moco."): tensor for name, tensor in checkpoint.state.items()}
    model = {}
    for name, tensor in rename_back(encoder, WITH_HEAD).items():
        for old, new in DETECTRON2.items():
            name = name.replace(old, new)
        stem = "" if name.startswith("res") else "stem."
        model[stem + name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    with path.open("wb") as file:
        pickle.dump({"model": model, "__author__": "MOCO", "matching_heuristics": True}, file)


class Format(NamedTuple):
    save: Callable[[Checkpoint, Path], None]
    use: str


FORMATS = {
    "moco": Format(_save_model, "a model directory for from_pretrained, pipelines and every script"),
    "official": Format(_save_official, "without an optimizer, which --resume of the official code needs"),
    "detectron2": Format(_save_detectron2, "for MODEL.WEIGHTS of detectron2; do not publish it, it is a pickle"),
    "torchvision": Format(
        _save_torchvision, "for load_state_dict of torchvision's model; do not publish it, it is a pickle"
    ),
}
