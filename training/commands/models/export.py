"""Write a model in formats of other libraries: `python scripts/export.py runs/mine exported --timm --onnx`."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from modeling_moco import MoCoForImageClassification, MoCoImageProcessor

from ...cli import build_parser, how_to_run, parse_flags
from ...engine.files import whole_files
from ...errors import first_line, one_line_errors
from ...evaluation.encoder import check_exists
from ...hub import exports
from ...hub.exports import Model
from ...hub.kinds import Transferred, kind_of
from ...hub.publish import load_published
from ...model_folder import bare_name
from ...process import command


@dataclass
class ExportArguments:
    """The formats, by the flag of each; several lie in one folder, as in a published one."""

    timm: bool = field(default=False, metadata={"help": "For timm.create_model, in the folder itself."})
    transformers: bool = field(default=False, metadata={"help": "transformers' own ResNet, in resnet/."})
    onnx: bool = field(default=False, metadata={"help": "An ONNX file, checked in onnxruntime, in onnx/."})
    torch_export: bool = field(default=False, metadata={"help": "A file for torch.export.load, in torch_export/."})
    torchvision: bool = field(default=False, metadata={"help": "Tensors for torchvision's ResNets, in torchvision/."})

    @property
    def chosen(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name)]


@dataclass
class Job:
    """A model that is exported, and its image processor."""

    model: Model
    processor: MoCoImageProcessor

    @property
    def size(self) -> int:
        """Side of an image in pixels."""
        return int(self.processor.crop_size["height"])

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        return exports.export_program(self.model, self.size)


class Format(NamedTuple):
    """A format.

    Args:
        place: its folder in the exported one, as in a published one: timm and transformers both want a `config.json` and a
            `model.safetensors` at the top of theirs.
        what: it has models of.
        holds: whether it can be this model.
        save: writes it.
        load: the line of Python that loads it from a path.
    """

    place: str
    what: str
    holds: Callable[[Model], bool]
    save: Callable[[Job, Path], object]
    load: Callable[[Model, str], str]


def _save_transformers(job: Job, place: Path) -> None:
    with TemporaryDirectory() as beside:  # its image processor is that of timm's format
        exports.save_timm(job.model, job.processor, Path(beside))
        exports.save_resnet(job.model, place, exports.read_written(Path(beside) / "config.json"))


def _save_onnx(job: Job, place: Path) -> None:
    exports.save_onnx(job.program, job.size, exports.output_name(job.model), place)


def _load_timm(model: Model, path: str) -> str:
    return f"import timm; model = timm.create_model({f'local-dir:{path}'!r}, pretrained=True).eval()"


def _load_transformers(model: Model, path: str) -> str:
    kind = "AutoModelForImageClassification" if isinstance(model, MoCoForImageClassification) else "AutoModel"
    return f"from transformers import {kind}; model = {kind}.from_pretrained({path!r}).eval()"


def _load_onnx(model: Model, path: str) -> str:
    return f"import onnxruntime; session = onnxruntime.InferenceSession({f'{path}/model.onnx'!r})"


def _load_torch_export(model: Model, path: str) -> str:
    return f"import torch; model = torch.export.load({f'{path}/model.pt2'!r}).module()"


def _load_torchvision(model: Model, path: str) -> str:
    _, classifier = exports.encoder_and_classifier(model)
    build = f"torchvision.models.{bare_name(model.config.architecture)}"
    if classifier is None:
        build = f"model = {build}(); model.fc = torch.nn.Identity()"
    else:
        build = f"model = {build}(num_classes={classifier.out_features})"
    load = f"load_model(model.eval(), {f'{path}/model.safetensors'!r})"
    return f"import torch, torchvision; from safetensors.torch import load_model; {build}; {load}"


FORMATS = {
    "timm": Format(
        place="",
        what="models that timm has",
        holds=lambda model: exports.to_timm(model) is not None,
        save=lambda job, place: exports.save_timm(job.model, job.processor, place),
        load=_load_timm,
    ),
    "transformers": Format(
        place="resnet",
        what=f"{', '.join(exports.RESNETS)} with the stem of timm",
        holds=exports.is_resnet_of_transformers,
        save=_save_transformers,
        load=_load_transformers,
    ),
    "onnx": Format("onnx", "any model", lambda model: True, _save_onnx, _load_onnx),
    "torch_export": Format(
        place="torch_export",
        what="any model",
        holds=lambda model: True,
        save=lambda job, place: exports.save_torch_export(job.program, place),
        load=_load_torch_export,
    ),
    "torchvision": Format(
        place="torchvision",
        what="the ResNets of torchvision with their own stem",
        holds=exports.is_resnet_of_torchvision,
        save=lambda job, place: exports.save_torchvision(job.model, place),
        load=_load_torchvision,
    ),
}


@command
def main(argv: list[str]) -> None:
    disable_progress_bar()  # transformers' bars for loading and saving weights
    parser = build_parser(
        [ExportArguments],
        usage=f"{how_to_run('export')} RUN_OR_MODEL FOLDER {' '.join(f'[--{name}]' for name in FORMATS)}",
        description="Write a model to a folder in the formats of other libraries, which need no code of this project.",
    )
    parser.add_argument("source", help="Folder that a run or a probe saved to, a checkpoint, or a model on the Hub.")
    parser.add_argument("folder", type=Path, help="Where to write; it must not be there, or be empty.")
    with one_line_errors():
        names, (args,), _ = parse_flags(parser, {"export": ExportArguments}, argv, {})
        if not args.chosen:
            raise ValueError(f"no format is given: choose one or several of --{', --'.join(FORMATS)}")
        if not PartialState(cpu=True).is_main_process:  # one of them writes
            return
        check_free(names.folder)
        check_exists(names.source)
        model, processor = load_published(names.source, training_state=False)
        if isinstance(model, Transferred) or not isinstance(processor, MoCoImageProcessor):
            raise ValueError(f"{names.source} is a {kind_of(model).name}, which no other library has: publish it")
        job = Job(model, processor)
        check_formats(names.source, job.model, args)
        export(job, names.folder, args)
    show(job, names.folder, args)


def check_free(folder: Path) -> None:
    """
    Raises:
        ValueError: there is something at this path.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there already, and is not overwritten: name another folder")


def check_formats(source: str, model: Model, args: ExportArguments) -> None:
    """
    Raises:
        ValueError: a format cannot be this model, or packages that it takes are not installed.
    """
    for name in args.chosen:
        if not FORMATS[name].holds(model):
            config = model.config
            arguments = f", model_args {config.model_args}" if config.model_args else ""
            raise ValueError(
                f"{source} is a {config.architecture} (stem {config.stem}{arguments}), but --{name} is for "
                f"{FORMATS[name].what}: leave it out"
            )
    if args.onnx:
        exports.check_onnx()


def export(job: Job, folder: Path, args: ExportArguments) -> None:
    """Write the chosen formats to a folder that is empty or not there: all of them or none.

    Raises:
        ValueError: the folder cannot be written, or an ONNX model computes something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_files(folder) as fresh:
            for name in tqdm(args.chosen, "export", disable=None):
                FORMATS[name].save(job, fresh / FORMATS[name].place)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be written ({first_line(error)}): name another, or make room") from error


def show(job: Job, folder: Path, args: ExportArguments) -> None:
    """Print what was written, how images are to be prepared, and the line that loads each format."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"Wrote {folder}: {', '.join(args.chosen)}; {size / 1e6:,.1f} MB")
    mean, std = (", ".join(f"{x:g}" for x in values) for values in (job.processor.image_mean, job.processor.image_std))
    print(
        f"Images: RGB, short side {job.processor.size['shortest_edge']} px (bilinear), central {job.size} px, divided by "
        f"255, mean {mean}, std {std}; out come {exports.output_name(job.model)}"
    )
    for name in args.chosen:
        print(f"Load it: {FORMATS[name].load(job.model, str(folder / FORMATS[name].place))}")


if __name__ == "__main__":
    main(sys.argv[1:])
