"""Publishing: a directory that every library loads by one name, and its way to the Hub in one commit.

The directory of an encoder that timm knows:

    config.json                 timm's, which transformers' TimmWrapper reads too; ours is its section "moco"
    model.safetensors           timm's names: what everybody loads who has no code of ours
    moco.safetensors            our names, with --include_training_state key encoder, projector and queue too
    *_moco.py                   our code, for `trust_remote_code=True`
    resnet/                     the same weights as transformers' ResNet
    onnx/, torch_export/        by flag
    README.md, *.png            the model card and its pictures

One with a stem for small images, which timm does not know, has our format alone. Nothing in it is a pickle, and only files
written here or pictures of the run are in it.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # the last is httpx's or httpx2's
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

import modeling_moco
from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoImageProcessor, MoCoModel

from . import exports
from .checkpoints import MANIFEST
from .cli import SAVED_RECIPE
from .convert import CONVERSION
from .exports import Model, read_json, write_json
from .features import encoder_digest
from .model_card import MEASURED, Origin, render_card
from .report import METRICS, PICTURES
from .results import RESULTS, read_results

logger = logging.getLogger(__name__)

CARD = "README.md"
AUTO_MAP = {
    "AutoConfig": "configuration_moco.MoCoConfig",
    "AutoModel": "modeling_moco.MoCoModel",
    "AutoModelForImageClassification": "modeling_moco.MoCoForImageClassification",
    "AutoBackbone": "modeling_moco.MoCoBackbone",
}
PROCESSOR = "image_processing_moco.MoCoImageProcessorPil"  # the exact one
# What a push leaves out of a repository, if it does not bring it anew: weights of the push before would answer to its name.
WRITTEN = ("onnx/*", "torch_export/*", "resnet/*", "*.safetensors", "*_moco.py", *(f"{name}.png" for name in PICTURES))
MADE_BY_HAND = {".gitattributes", "README.md", "LICENSE"}  # what a repository has that was made on the website


@dataclass
class PublishArguments:
    """What is published, and how."""

    include_training_state: bool = field(
        default=False, metadata={"help": "key encoder, projector and queue too, so that others can go on training"}
    )
    onnx: bool = field(default=False, metadata={"help": "an ONNX file too, checked in onnxruntime"})
    torch_export: bool = field(default=False, metadata={"help": "a file for torch.export.load too"})
    license: str = field(default="mit", metadata={"help": "of the weights, by the Hub's short name"})
    private: bool = field(default=False, metadata={"help": "make the repository private when it is created"})
    revision: str | None = field(default=None, metadata={"help": "branch to commit to; by default main"})
    dry_run: bool = field(default=False, metadata={"help": "show the files and the card; no network"})


# The directory


def load_published(source: str, training_state: bool) -> tuple[Model, MoCoImageProcessor]:
    """The model of a folder or Hub repository, in evaluation mode, and its image processor.

    Raises:
        ValueError: there is no such model, or it lacks its weights, its image processor or the training state; they are
            damaged; or its images are prepared in a way that other libraries cannot follow.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        config = MoCoConfig.from_pretrained(source)
        classifies = config.architectures == [MoCoForImageClassification.__name__]
        if classifies and training_state:
            raise ValueError(
                f"include_training_state (True) is for encoders, and {source} is a classifier: leave it out, or publish the "
                "run that it was trained on"
            )
        if classifies:
            model, report = MoCoForImageClassification.from_pretrained(source, **SAFELY)
        else:
            kind = _WholeMoCoModel if training_state else MoCoModel
            model, report = kind.from_pretrained(source, momentum_encoder=training_state, **SAFELY)
            model.__class__ = MoCoModel
        processor = MoCoImageProcessor.from_pretrained(source)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last for weights of another shape
        raise ValueError(
            f"{source} holds no MoCo model with its image processor ({_first_line(error)}): pass the folder that a run saved "
            "to, e.g. runs/quickstart, or one of its checkpoints"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if absent := sorted(report["missing_keys"]):
        raise ValueError(f"{source} lacks {absent[0]}: pass the folder that a run saved to, e.g. runs/quickstart")
    exports.check_processor(processor, source)
    _forget_unknown(model.config, MoCoConfig())
    _forget_unknown(processor, MoCoImageProcessor())
    return model.eval(), processor


SAFELY: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True}  # the other kind of weights is a pickle


def _forget_unknown(settings: Any, known: Any) -> None:
    # transformers keeps whatever somebody has written into a file, and would publish it.
    for name in (
        settings.to_dict().keys() - known.to_dict().keys() - {"id2label", "label2id", "architectures", "auto_map"}
    ):
        if name in vars(settings):
            delattr(settings, name)


class _WholeMoCoModel(MoCoModel):
    """Where a key encoder and a queue must be in the file, and are not made anew."""

    _keys_to_ignore_on_load_missing: list[str] = []


def publish(
    source: str, model: Model, processor: MoCoImageProcessor, repo_id: str, args: PublishArguments, folder: Path
):
    """Write everything that is to be uploaded to an empty folder, the card last.

    Args:
        source: folder of the model, which may have its recipe, results and pictures beside it.

    Raises:
        ValueError: an export could not be made, there is no room, or what lies beside the model cannot be read.
    """
    try:
        _publish(source, model, processor, repo_id, args, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{source} could not be written to {folder.parent} ({_first_line(error)}): make room there, or set TMPDIR to "
            "another folder"
        ) from error


def _publish(
    source: str, model: Model, processor: MoCoImageProcessor, repo_id: str, args: PublishArguments, folder: Path
):
    folder.mkdir(parents=True, exist_ok=True)
    _save_weights(model, processor, repo_id, args.license, folder)
    for path in Path(modeling_moco.__file__).parent.glob("*_moco.py"):
        shutil.copyfile(path, folder / path.name)
    if args.onnx or args.torch_export:
        size = processor.crop_size["height"]
        program = exports.export_program(model, size)
        if args.onnx:
            exports.save_onnx(program, size, exports.output_name(model), folder / "onnx")
        if args.torch_export:
            exports.save_torch_export(program, folder / "torch_export")
    origin = read_origin(Path(source), model)
    for picture in origin.pictures:
        shutil.copyfile(picture, folder / picture.name)
    card = render_card(
        repo_id,
        model,
        processor,
        origin,
        list_files(folder),
        license=args.license,
        training_state=args.include_training_state,
    )
    card.save(folder / CARD)
    _check_private(source, folder)


def _save_weights(model: Model, processor: MoCoImageProcessor, repo_id: str, license: str, folder: Path) -> None:
    config = model.config
    config.name_or_path = repo_id  # or it would be a path of this machine
    config.auto_map = AUTO_MAP
    config.architectures = [type(model).__name__]
    if exports.save_timm(model, processor, folder, license):
        section = config.to_dict() | {"transformers_weights": "moco.safetensors"}
        whole = read_json(folder / "config.json") | {"auto_map": AUTO_MAP, "moco": section}
        write_json(folder / "config.json", whole)
        save_file(model.state_dict(), folder / "moco.safetensors", metadata={"format": "pt"})
        shared = {key: whole[key] for key in ("image_processor_type", "pretrained_cfg")}
        write_json(folder / "preprocessor_config.json", processor.to_dict() | shared)
        exports.save_resnet(model, folder / "resnet", whole)
    else:
        model.save_pretrained(folder)
        remote = {"auto_map": {"AutoImageProcessor": PROCESSOR}}
        write_json(folder / "preprocessor_config.json", processor.to_dict() | remote)


def read_origin(source: Path, model: Model) -> Origin:
    """What a run left beside a model: in its folder or, for a checkpoint, a probe or a fine-tuned model, in those above.

    Raises:
        ValueError: a file there is damaged.
    """
    home = source.parent if _is_checkpoint(source) else source
    settings = _read_yaml(home / SAVED_RECIPE)
    evaluated = settings.get("encoder", {})  # of a probe or a fine-tuning, which began with that model
    run, final = _find_run(source)
    recipe = {} if run is None else _read_yaml(run / SAVED_RECIPE)
    encoder = model.moco if isinstance(model, MoCoForImageClassification) else model
    metrics = {} if run is None else _read_json(run / METRICS)
    if not final:  # of later weights: what was read is all that is the same
        metrics = {key: metrics[key] for key in ("data",) if key in metrics}
    return Origin(
        recipe={key: value for key, value in recipe.items() if key != "probe"},  # what a probe would begin with
        evaluation=settings.get("training", {}) if evaluated else {},
        fine_tuned=bool(evaluated.get("fine_tuned")),
        metrics=metrics,
        conversion=_read_json((run or source) / CONVERSION),
        results=_read_own_results(home, run, encoder_digest(encoder), about_encoder=not evaluated),
        pictures=_find_pictures(run) if run and final and not evaluated.get("fine_tuned") else [],
    )


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _find_run(folder: Path) -> tuple[Path | None, bool]:
    """The folder of the pretraining run that a model came from, if it is known, and whether from its final weights."""
    if not folder.is_dir():
        return None, False
    folder = folder.resolve()
    if _is_checkpoint(folder):
        return _find_run(folder.parent)[0], False
    evaluated = _read_yaml(folder / SAVED_RECIPE).get("encoder")
    if evaluated is None:
        return folder, True
    if evaluated.get("random_encoder") or Path(str(evaluated.get("model"))).name != folder.parent.name:
        return None, False
    return _find_run(folder.parent)


def _read_own_results(home: Path, run: Path | None, digest: str, about_encoder: bool) -> list[dict[str, Any]]:
    """Results that were measured on the weights with this digest. Of a classifier none that another classifier had."""
    folders = {folder.resolve(): None for folder in (run, home) if folder is not None and folder.is_dir()}
    results = [(folder, entry) for folder in folders for entry in read_results(folder) if entry.get("model") == digest]
    for folder, entry in results:
        if missing := [key for key in MEASURED if key not in entry]:
            raise ValueError(f"{folder / RESULTS} has an entry without {missing[0]}: mend it, or move the file away")
    if about_encoder:
        return [entry for _, entry in results]
    own = ("weighted kNN", *(probe["protocol"] for probe in _read_json(home / METRICS).get("probes", [])))
    return [entry for folder, entry in results if folder == home.resolve() or entry["protocol"].startswith(own)]


def _find_pictures(folder: Path) -> list[Path]:
    # Links may show what lies elsewhere.
    paths = [folder / f"{name}.png" for name in PICTURES]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """Sections of a file beside a model; none if it is not there or a link."""
    if not path.is_file() or path.is_symlink():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML ({_first_line(error)}): mend it, or move it away") from error
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise ValueError(f"{path} is not made of sections of keys: mend it, or move it away")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.is_symlink():
        return {}
    try:
        return dict(exports.read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON of names and values ({error}): mend it, or move it away") from error


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


def _check_private(source: str, folder: Path) -> None:
    # The last of several guards: nothing above should have let one through.
    places = [text for text in (str(Path.home()), str(Path(source).absolute())) if text != "/"]
    secrets = {text: rf"(?<![\w.~-]){re.escape(text)}(?![\w.-])" for text in places}  # no part of another name
    if token := get_token():
        secrets["your token"] = re.escape(token)
    for name in list_files(folder):
        if name.endswith((".md", ".json")):
            text = (folder / name).read_text(encoding="utf-8")
            if found := [secret for secret, pattern in secrets.items() if re.search(pattern, text)]:
                raise ValueError(
                    f"{name} would publish {found[0]}, which is this machine's: take it out of the recipe, the results or the "
                    f"configuration beside {source}"
                )


# The Hub


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Turn what the client raises into one ValueError that says what to do."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{doing} failed: what answered is no Hub (a proxy, a login page?); check the network"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        # The client puts a RuntimeError around what goes wrong with a large file. Others are not the network's.
        cause: Any = error.__cause__ if type(error) is RuntimeError else error
        if not isinstance(cause, HTTPError | OSError):
            raise
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
        remedy = {
            401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
            403: "use a token that may write there, or choose a name of your own",
            404: "check the name, and that the token may see it",
        }.get(status, "all of it is there or nothing; give the same command again, it sends what is missing")
        raise ValueError(f"{doing} failed ({_first_line(cause)}): {remedy}") from error


def _first_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@dataclass(frozen=True)
class Repository:
    """A model repository on the Hub.

    Args:
        private: make it so, if it is made.
        token: by default that of this machine's login.
        revision: branch to commit to; it is made if it is not there.
    """

    name: str
    private: bool = False
    token: str | None = None
    revision: str | None = None

    def __post_init__(self):
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise ValueError(f"repository ({self.name}) is no name on the Hub: write it as org/name") from error

    @property
    def api(self) -> HfApi:
        return HfApi(token=self.token)

    def prepare(self) -> "Repository":
        """Make sure that one may write there, and make the repository if there is none.

        Returns:
            the same with its whole name.

        Raises:
            ValueError: no token, no right, no network; something else is there, or it is public and is not to be.
        """
        if (self.token or get_token()) is None:
            raise ValueError(
                f"no token to write to {self.name} with: log in with `hf auth login`, or set HF_TOKEN to one that may write"
            )
        with hub_errors(f"opening {self.name}"):
            whole = self.api.create_repo(self.name, private=self.private or None, exist_ok=True).repo_id
            about = self.api.repo_info(whole)
            if self.revision is not None:
                self.api.create_branch(whole, branch=self.revision, exist_ok=True)
        there = {file.rfilename for file in about.siblings or []}
        if "modeling_moco.py" not in there and (others := sorted(there - MADE_BY_HAND)):
            raise ValueError(f"{whole} holds something else ({', '.join(others[:3])}): choose another name")
        if self.private and not about.private:
            raise ValueError(f"private (True) comes too late for {whole}, which is public: make it private on its page")
        return replace(self, name=whole)

    def upload(self, folder: Path, message: str) -> str:
        """Upload a folder in one commit: all of it is there, or nothing. What the Hub has already is not sent again.

        Returns:
            address of the commit.

        Raises:
            ValueError: the Hub refuses the card's metadata, or the connection broke.
        """
        with hub_errors(f"uploading to {self.name}"):
            commit = self.api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message=message,
                revision=self.revision,
                delete_patterns=list(WRITTEN),
            )
        return str(commit.commit_url)


class Uploads:
    """What a run publishes while it trains: in the background, one upload at a time."""

    def __init__(self, repository: Repository):
        self.repository = repository
        self._last: Thread | None = None

    def send(self, source: Path, message: str) -> None:
        """Publish the model of a folder, which may be deleted afterwards. While an upload is under way, leave it out.

        What goes wrong is logged: a run does not end for it. Nor does it wait, if it is stopped.
        """
        if self._last is None or not self._last.is_alive():
            with _warn():
                folder = make_folder()
                self._write(source, Path(folder.name))
                self._last = Thread(target=self._upload, args=(folder, message), daemon=True)
                self._last.start()

    def send_last(self, source: Path, message: str) -> str:
        """Publish the model of a folder after all that is under way.

        Returns:
            address of the commit.

        Raises:
            ValueError: it could not be written or uploaded.
        """
        if self._last is not None:
            self._last.join()
        with make_folder() as name:
            self._write(source, Path(name))
            return self.repository.upload(Path(name), message)

    def _write(self, source: Path, folder: Path) -> None:
        model, processor = load_published(str(source), training_state=False)
        publish(str(source), model, processor, self.repository.name, PublishArguments(), folder)

    def _upload(self, folder: TemporaryDirectory, message: str) -> None:
        with folder as name, _warn():
            self.repository.upload(Path(name), message)


@contextmanager
def _warn() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        logger.warning("%s", error)
