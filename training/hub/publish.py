"""The folder that is published, which every library loads by one name. `repository.py` sends it to the Hub.

The folder of an encoder that timm knows:

    config.json                 timm's, which transformers' TimmWrapper reads too; ours is its section "moco"
    model.safetensors           timm's names: what users without our code load
    moco.safetensors            our names, with --include_training_state key encoder, projector and queue too
    *_moco.py                   our code, for `trust_remote_code=True`
    resnet/                     the same weights as transformers' ResNet
    onnx/, torch_export/        by flag
    README.md, *.png            the model card and its figures

One with a stem for small images, which timm does not know, has our format alone, and so have detectors and segmentation models.
Nothing in it is a pickle, and only files written here or figures of the run are in it.
"""

import getpass
import json
import re
import shutil
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import constants, get_token
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

import modeling_moco
from modeling_moco import MoCoConfig, MoCoImageProcessor, MoCoModel
from modeling_moco.dictionary_moco import BUILT_IN, build_dictionary

from ..cli import INCLUDE_PICTURES
from ..engine.files import check_model_files, write_json
from ..errors import SECRETS, first_line
from ..model_folder import load_model
from . import exports
from .exports import Model, read_written
from .kinds import ENCODER, Processor, Published, Transferred, kind_of, read_kind
from .model_card import TEMPLATE, render_card
from .origin import published_figures, read_origin, usual_license

CARD = "README.md"
TEXTS = (".md", ".json", ".py")
PATH = r"(?<![\w.:/~<-])/(?:[\w.@+-]+/)+[\w.@+-]*[\w@+-]|\b[A-Za-z]:\\+\w"  # an absolute one, of two names at least
PUBLIC_NAMES = ("root", "localhost")


@dataclass
class PublishArguments:
    """Options of publishing."""

    include_training_state: bool = field(
        default=False,
        metadata={"help": "Publish key encoder, projector and queue too, so that others can continue training."},
    )
    onnx: bool = field(default=False, metadata={"help": "Add an ONNX file, checked in onnxruntime."})
    torch_export: bool = field(default=False, metadata={"help": "Add a file for torch.export.load."})
    include_pictures: bool = field(default=False, metadata={"help": INCLUDE_PICTURES})
    license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the weights, by the Hub's short name. By default mit, or unknown where they began with weights "
            "from elsewhere, whose licence counts."
        },
    )
    private: bool = field(default=False, metadata={"help": "Make the repository private when it is created."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to; by default main."})
    dry_run: bool = field(default=False, metadata={"help": "Show the files and the card, without a network."})


def load_published(source: str, training_state: bool) -> tuple[Published, Processor]:
    """The model of a folder or Hub repository, in evaluation mode, and its image processor.

    Raises:
        ValueError: there is no such model, or it lacks its weights, its image processor or the training state; they are
            damaged or lie elsewhere; or its images are prepared in a way that other libraries cannot follow.
    """
    check_model_files(Path(source))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        kind, config = read_kind(source)
        if training_state and kind is not ENCODER:
            raise ValueError(
                f"include_training_state (True) is for encoders, and {source} is a {kind.name}: leave it out, or publish the "
                "run that it was trained on"
            )
        options: dict[str, Any] = {"momentum_encoder": training_state} if kind is ENCODER else {}
        model, report = load_model(source, config, kind.model, {}, **options)
        processor = kind.processor.from_pretrained(source)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last for weights of another shape
        raise ValueError(
            f"{source} holds no MoCo model with its image processor ({first_line(error)}): pass the folder that a run saved "
            "to, e.g. runs/quickstart, or one of its checkpoints"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    absent = report["missing_keys"] | (model.absent_keys if isinstance(model, MoCoModel) else set())
    if absent:
        raise ValueError(f"{source} lacks {min(absent)}: pass the folder that a run saved to, e.g. runs/quickstart")
    if isinstance(processor, MoCoImageProcessor):
        exports.check_processor(processor, source)
    _forget_unknown(model.config, kind.config())
    _forget_unknown(processor, kind.processor())
    return model.eval(), processor


def check_formats(model: Published, args: PublishArguments) -> None:
    """
    Raises:
        ValueError: a format was asked for that this model does not have, or for which packages are missing.
    """
    for name in ("onnx", "torch_export"):
        if isinstance(model, Transferred) and getattr(args, name):
            what = kind_of(model).name
            raise ValueError(f"{name} (True) is for encoders and classifiers, and this is a {what}: leave it out")
    if args.onnx:
        exports.check_onnx()


def _forget_unknown(settings: Any, known: Any) -> None:
    # transformers keeps whatever somebody has written into a file, and would publish it.
    for name in settings.to_dict().keys() - known.to_dict().keys() - {"id2label", "label2id", "architectures"}:
        if name in vars(settings):
            delattr(settings, name)


def publish(source: str, model: Published, processor: Processor, repo_id: str, args: PublishArguments, folder: Path):
    """Write everything that is to be uploaded to an empty folder, the card last.

    Args:
        source: folder of the model, which may have its recipe, results and figures beside it.

    Raises:
        ValueError: an export could not be made, there is no room, or what lies beside the model cannot be read.
    """
    try:
        _publish(source, model, processor, repo_id, args, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{source} could not be written to {folder.parent} ({first_line(error)}): make room there, or set TMPDIR to "
            "another folder"
        ) from error


def _publish(source: str, model: Published, processor: Processor, repo_id: str, args: PublishArguments, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    model.config.name_or_path = repo_id  # or it would be a path of this machine
    model.config.auto_map = kind_of(model).auto_map
    model.config.architectures = [type(model).__name__]
    origin = read_origin(Path(source), model)
    license = args.license or usual_license(origin)
    if isinstance(model, Transferred):
        model.save_pretrained(folder)
    else:
        _save_weights(model, processor, license, folder)
    _save_processor(processor, folder)
    for path in Path(modeling_moco.__file__).parent.glob("*_moco.py"):
        shutil.copyfile(path, folder / path.name)
    if not isinstance(model, Transferred) and (args.onnx or args.torch_export):
        size = processor.crop_size["height"]
        program = exports.export_program(model, size)
        if args.onnx:
            exports.save_onnx(program, size, exports.output_name(model), folder / "onnx")
        if args.torch_export:
            exports.save_torch_export(program, folder / "torch_export")
    origin = replace(origin, figures=published_figures(origin, args.include_pictures))
    for figure in origin.figures:
        shutil.copyfile(figure, folder / figure.name)
    card = render_card(
        repo_id,
        model,
        processor,
        origin,
        list_files(folder),
        license=license,
        training_state=args.include_training_state,
        branch=None if args.revision == constants.DEFAULT_REVISION else args.revision,
    )
    card.save(folder / CARD)
    check_private(source, repo_id, folder)


def _save_weights(model: Model, processor: MoCoImageProcessor, license: str, folder: Path) -> None:
    config, written = model.config, {}
    if not (isinstance(model, MoCoModel) and model.momentum_encoder) and config.dictionary not in BUILT_IN:
        # Whoever loads an encoder alone need not have registered one's own; the card is of the true one.
        written = {"dictionary": "queue", "key_encoder": "momentum"}
    if config.dictionary == "bank":  # a bank is of the images of its run: a random one of one key stands for it
        config.bank_size = 1
        if isinstance(model, MoCoModel) and model.momentum_encoder:
            model.dictionary = build_dictionary(config)
    if exports.save_timm(model, processor, folder, license):
        section = config.to_dict() | written | {"transformers_weights": "moco.safetensors"}
        whole = _with_code(read_written(folder / "config.json"), config) | {"moco": section}
        write_json(folder / "config.json", whole)
        save_file(model.state_dict(), folder / "moco.safetensors", metadata={"format": "pt"})
        exports.save_resnet(model, folder / "resnet", whole)
    else:
        model.save_pretrained(folder)
        write_json(folder / "config.json", read_written(folder / "config.json") | written)


def _with_code(whole: dict[str, Any], config: MoCoConfig) -> dict[str, Any]:
    """This config.json with the places of our code, for `trust_remote_code=True`.

    `auto_map` names files of the same folder, so that a copy of the folder needs no network. Who loads the model without our
    code also saves it without: transformers' TimmWrapper keeps `auto_map`, which would name files that are not there. By
    `attribute_map` transformers reads one key as another: `auto_map_of_copies`, which names the repository too, takes the
    place of `auto_map` when the configuration is read, and is what is saved.
    """
    named = {kind: f"{config.name_or_path}--{place}" for kind, place in config.auto_map.items()}
    maps = {"attribute_map": whole["attribute_map"] | {"auto_map_of_copies": "auto_map"}}
    return whole | maps | {"auto_map": config.auto_map, "auto_map_of_copies": named}


def _save_processor(processor: Processor, folder: Path) -> None:
    # The processor's class is in config.json: TimmWrapper's, or ours where the code is trusted. Named here, ours would make
    # pipelines ask whether to trust the code of a video processor.
    settings = processor.to_dict()
    del settings["image_processor_type"]
    write_json(folder / "preprocessor_config.json", settings)


def make_folder() -> TemporaryDirectory:
    """An empty folder for what is published.

    Raises:
        ValueError: there is no room for one.
    """
    try:
        return TemporaryDirectory()
    except OSError as error:
        raise ValueError(f"no temporary folder can be made ({error}): make room, or set TMPDIR to another") from error


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def check_private(source: str, repo_id: str, folder: Path) -> None:
    """The last of several guards: nothing above should have let one through.

    Raises:
        ValueError: a text that would be published has what belongs to this machine or its user.
    """
    private = _private(source, repo_id, folder)
    found = [
        f"{what}{'' if 'token' in what else f' ({match[0]})'} in line {number} of {name}"
        for name in list_files(folder)
        if name.endswith(TEXTS)
        for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1)
        for what, pattern in private.items()
        if (match := re.search(pattern, line))
    ]
    if found:
        raise ValueError(
            f"nothing is published, for it would show {', '.join(found[:5])}: take it out of the recipe, the results or the "
            f"configuration beside {source}"
        )


def _private(source: str, repo_id: str, folder: Path) -> dict[str, str]:
    """What may not be published: in words, and as a pattern."""
    names = {"your user name": _user(), "the name of this machine": socket.gethostname().split(".")[0]}
    # A name that everybody's card or code has, or the repository itself, says nothing.
    known = "\n".join([repo_id, *PUBLIC_NAMES, TEMPLATE.read_text(encoding="utf-8")])
    names = {what: name for what, name in names.items() if name and not re.search(_word(name), known)}
    places = {"your folder": str(Path.home()), "the folder of the model": str(Path(source).absolute())}
    texts = names | {what: text for what, text in places.items() if text != "/"} | {"your token": get_token() or ""}
    return {"a token or a password": SECRETS.pattern, "a path": PATH} | {
        what: f"{_word(text)}|{_word(json.dumps(text)[1:-1])}" for what, text in texts.items() if text
    }


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # none in the list of users, as in some containers
        return None


def _word(text: str) -> str:
    return rf"(?<![\w.~-]){re.escape(text)}(?![\w-])"  # no part of another name
