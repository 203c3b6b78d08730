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

import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2  # the client's
import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

import modeling_moco
from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoImageProcessor, MoCoModel

from . import exports
from .cli import SAVED_RECIPE
from .convert import CONVERSION
from .exports import Model, read_json, write_json
from .features import encoder_digest
from .model_card import Origin, render_card
from .report import METRICS, PICTURES
from .results import read_results

logger = logging.getLogger(__name__)

CARD = "README.md"
AUTO_MAP = {
    "AutoConfig": "configuration_moco.MoCoConfig",
    "AutoModel": "modeling_moco.MoCoModel",
    "AutoModelForImageClassification": "modeling_moco.MoCoForImageClassification",
    "AutoBackbone": "modeling_moco.MoCoBackbone",
}
PROCESSOR = "image_processing_moco.MoCoImageProcessorPil"  # the exact one


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
        ValueError: there is no such model, or it lacks its weights, its image processor or the training state.
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
            model, report = MoCoForImageClassification.from_pretrained(source, output_loading_info=True)
        else:
            kind = _WholeMoCoModel if training_state else MoCoModel
            model, report = kind.from_pretrained(source, output_loading_info=True, momentum_encoder=training_state)
            model.__class__ = MoCoModel
        processor = MoCoImageProcessor.from_pretrained(source)
    except OSError as error:
        raise ValueError(
            f"{source} holds no MoCo model with its image processor ({error}): pass the folder that a run saved to, e.g. "
            "runs/quickstart, or one of its checkpoints"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if absent := sorted(report["missing_keys"]):
        raise ValueError(f"{source} lacks {absent[0]}: pass the folder that a run saved to, e.g. runs/quickstart")
    return model.eval(), processor


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
        ValueError: an export could not be made.
    """
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
    """What a run left beside a model, in its folder or, for a probe or a checkpoint, in the one above.

    Pictures that are links are left out: they may show what lies elsewhere.
    """
    folders = [source, source.parent] if source.is_dir() else []
    recipe: dict[str, dict[str, Any]] = {}
    for folder in folders:
        path = folder / SAVED_RECIPE
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "encoder" in found:  # an evaluation's, which names the model by a path
            recipe["probe"] = found.get("training", {})
        else:
            recipe |= {key: value for key, value in found.items() if key not in recipe}
    encoder = model.moco if isinstance(model, MoCoForImageClassification) else model
    digest = encoder_digest(encoder)
    results = [entry for folder in folders for entry in read_results(folder) if entry["model"] == digest]
    found = [folder / f"{name}.png" for folder in folders for name in PICTURES]
    pictures = {path.name: path for path in found if path.is_file() and not path.is_symlink()}
    return Origin(
        recipe,
        metrics=_last_json([folder / METRICS for folder in folders]),  # of the pretraining, not of a probe below it
        conversion=_last_json([folder / CONVERSION for folder in folders]),
        results=results,
        pictures=list(pictures.values()),
    )


def _last_json(paths: list[Path]) -> dict[str, Any]:
    there = [path for path in paths if path.is_file()]
    return read_json(there[-1]) if there else {}


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _check_private(source: str, folder: Path) -> None:
    # The last of several guards: nothing above should have let one through.
    secrets = [text for text in (str(Path.home()), str(Path(source).absolute()), get_token()) if text and text != "/"]
    for name in list_files(folder):
        if name.endswith((".md", ".json")):
            text = (folder / name).read_text(encoding="utf-8")
            found = [secret for secret in secrets if secret in text]
            if found:
                raise ValueError(f"{name} of {source} would publish a path or a token of this machine")


# The Hub


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Turn what the client raises into one ValueError that says what to do."""
    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError, OfflineModeIsEnabled) as error:
        # The client puts a RuntimeError around what goes wrong with a large file. Others are not the network's.
        cause: Any = error.__cause__ if type(error) is RuntimeError else error
        if not isinstance(cause, httpx2.HTTPError | OSError | OfflineModeIsEnabled):
            raise
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
        remedy = {
            401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
            403: "use a token that may write there, or choose a name of your own",
            404: "check the name, and that the token may see it",
        }.get(status, "nothing has been changed there; give the same command again, it sends what is missing")
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
            ValueError: no token, no right, no network, or something else is there.
        """
        if (self.token or get_token()) is None:
            raise ValueError(
                f"no token to write to {self.name} with: log in with `hf auth login`, or set HF_TOKEN to one that may write"
            )
        with hub_errors(f"opening {self.name}"):
            whole = self.api.create_repo(self.name, private=self.private or None, exist_ok=True).repo_id
            there = [name for name in self.api.list_repo_files(whole) if name != ".gitattributes"]
            if self.revision is not None:
                self.api.create_branch(whole, branch=self.revision, exist_ok=True)
        if there and "modeling_moco.py" not in there:
            raise ValueError(f"{whole} holds something else ({', '.join(sorted(there)[:3])}): choose another name")
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
                repo_id=self.name, folder_path=folder, commit_message=message, revision=self.revision
            )
        return str(commit.commit_url)


class Uploads:
    """What a run publishes while it trains: in the background, one upload at a time."""

    def __init__(self, repository: Repository):
        self.repository = repository
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None

    def send(self, source: Path, message: str) -> None:
        """Publish the model of a folder, which may be deleted afterwards. While an upload is under way, leave it out.

        What goes wrong is logged: a run does not end for it.
        """
        if self._last is None or self._last.done():
            folder = TemporaryDirectory()
            with _warn():
                self._write(source, Path(folder.name))
                self._last = self._executor.submit(self._upload, folder, message)

    def send_last(self, source: Path, message: str) -> str:
        """Publish the model of a folder after all that is under way.

        Returns:
            address of the commit.

        Raises:
            ValueError: it could not be uploaded.
        """
        self._executor.shutdown(wait=True)
        with TemporaryDirectory() as name:
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
