"""Publishing: a directory that every library loads by one name, and its way to the Hub in one commit.

The directory of an encoder that timm knows:

    config.json                 timm's, which transformers' TimmWrapper reads too; ours is its section "moco"
    model.safetensors           timm's names: what users without our code load
    moco.safetensors            our names, with --include_training_state key encoder, projector and queue too
    *_moco.py                   our code, for `trust_remote_code=True`
    resnet/                     the same weights as transformers' ResNet
    onnx/, torch_export/        by flag
    README.md, *.png            the model card and its figures

One with a stem for small images, which timm does not know, has our format alone. Nothing in it is a pickle, and only files
written here or figures of the run are in it.
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

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # the last is httpx's or httpx2's
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging as transformers_logging

import modeling_moco
from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoImageProcessor, MoCoModel
from modeling_moco.distributed_moco import rank

from ..cli import INCLUDE_PICTURES
from ..engine.run_folder import FIGURES, write_json
from ..errors import first_line
from . import exports
from .exports import Model, read_json
from .model_card import render_card
from .origin import published_figures, read_origin

logger = logging.getLogger(__name__)

CARD = "README.md"
AUTO_MAP = {
    "AutoConfig": "configuration_moco.MoCoConfig",
    "AutoModel": "modeling_moco.MoCoModel",
    "AutoModelForImageClassification": "modeling_moco.MoCoForImageClassification",
    "AutoBackbone": "modeling_moco.MoCoBackbone",
    "AutoImageProcessor": "image_processing_moco.MoCoImageProcessorPil",  # the exact one
}
REMOTE_PROCESSOR = {"auto_map": {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}}
# Files that a push deletes unless it uploads them again: old weights must not stay under the new name.
WRITTEN = ("onnx/*", "torch_export/*", "resnet/*", "*.safetensors", "*_moco.py", *(f"{name}.png" for name in FIGURES))
MADE_BY_HAND = {".gitattributes", "README.md", "LICENSE"}  # files of a repository that was created on the website


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
    license: str = field(default="mit", metadata={"help": "Licence of the weights, by the Hub's short name."})
    private: bool = field(default=False, metadata={"help": "Make the repository private when it is created."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to; by default main."})
    dry_run: bool = field(default=False, metadata={"help": "Show the files and the card, without a network."})


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
            model, report = MoCoModel.from_pretrained(source, momentum_encoder=training_state, **SAFELY)
        processor = MoCoImageProcessor.from_pretrained(source)
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
    exports.check_processor(processor, source)
    _forget_unknown(model.config, MoCoConfig())
    _forget_unknown(processor, MoCoImageProcessor())
    return model.eval(), processor


SAFELY: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True}  # the other kind of weights is a pickle


def _forget_unknown(settings: Any, known: Any) -> None:
    # transformers keeps whatever somebody has written into a file, and would publish it.
    for name in settings.to_dict().keys() - known.to_dict().keys() - {"id2label", "label2id", "architectures"}:
        if name in vars(settings):
            delattr(settings, name)


def publish(
    source: str, model: Model, processor: MoCoImageProcessor, repo_id: str, args: PublishArguments, folder: Path
):
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
    origin = replace(origin, figures=published_figures(origin, args.include_pictures))
    for figure in origin.figures:
        shutil.copyfile(figure, folder / figure.name)
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
        # Trusted code gets our processor: TimmWrapper's saves no file, so a model tuned with it would have none.
        write_json(folder / "preprocessor_config.json", processor.to_dict() | shared | REMOTE_PROCESSOR)
        exports.save_resnet(model, folder / "resnet", whole)
    else:
        model.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", processor.to_dict() | REMOTE_PROCESSOR)


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
            f"{doing} failed: the answer is not a Hub's (a proxy, a login page?); check the network"
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
        }.get(status, "nothing was committed; give the same command again, it sends what is missing")
        raise ValueError(f"{doing} failed ({first_line(cause)}): {remedy}") from error


@dataclass(frozen=True)
class Repository:
    """A model repository on the Hub.

    Args:
        private: create it private, if it does not exist.
        token: by default that of this machine's login.
        revision: branch to commit to; it is created if it does not exist.
    """

    name: str
    private: bool = False
    token: str | None = None
    revision: str | None = None

    def __post_init__(self):
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise ValueError(
                f"repository ({self.name}) is not a valid repository name: write it as org/name"
            ) from error

    @property
    def api(self) -> HfApi:
        return HfApi(token=self.token)

    def prepare(self) -> "Repository":
        """Check the right to write, and create the repository if it does not exist.

        Returns:
            the same with its whole name.

        Raises:
            ValueError: there is no token, no right or no network; the repository holds something else, or it is public and
                should be private.
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
            raise ValueError(f"private (True) does not change {whole}, which is public: make it private on its page")
        return replace(self, name=whole)

    def upload(self, folder: Path, message: str) -> str:
        """Upload a folder in one commit, so that all of it is there or nothing. Files that the Hub has are not sent again.

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


class PublishCallback(TrainerCallback):
    """Publishes what a run saves: its checkpoints in the background, one at a time, and its folder at the end.

    Nothing is done on other processes than the first.

    Args:
        every_save: publish checkpoints too, while the run goes on.
        include_pictures: publish figures that show images of a local dataset too.
    """

    def __init__(self, repository: Repository, every_save: bool, include_pictures: bool = False):
        self.repository = repository
        self.include_pictures = include_pictures
        self.every_save = every_save
        self._prepared = False
        self._last: Thread | None = None

    @classmethod
    def of_run(cls, args: TrainingArguments, include_pictures: bool = False) -> "PublishCallback":
        """For the settings of a run, whose repository is called like its folder if it has no name.

        Raises:
            ValueError: a strategy that would publish more than models, or a name that cannot be one on the Hub.
        """
        if args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"hub_strategy ({args.hub_strategy.value!r}) would publish optimizer states, which are pickles: choose 'end' "
                "or 'every_save'"
            )
        name = args.hub_model_id or Path(str(args.output_dir)).name
        repository = Repository(name, bool(args.hub_private_repo), args.hub_token, args.hub_revision)
        return cls(repository, args.hub_strategy == HubStrategy.EVERY_SAVE, include_pictures)

    def prepare(self) -> None:
        """Make sure that one may write to the repository, once.

        Raises:
            ValueError: as `Repository.prepare`.
        """
        if not self._prepared and rank() == 0:
            self.repository, self._prepared = self.repository.prepare(), True

    def on_train_begin(self, args, state, control, **kwargs):
        self.prepare()

    def on_save(self, args, state, control, **kwargs):
        if self.every_save and state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.send(checkpoint, f"Training in progress, step {state.global_step}")

    def send(self, source: Path, message: str) -> None:
        """Publish the model of a folder, which may be deleted afterwards, unless an upload is under way.

        What goes wrong is logged and does not end the run. A run that is stopped does not wait for the upload.
        """
        if self._last is None or not self._last.is_alive():
            with _warn():
                folder = make_folder()
                self._write(source, Path(folder.name))
                self._last = Thread(target=self._upload, args=(folder, message), daemon=True)
                self._last.start()

    def send_last(self, source: Path, message: str = "End of training") -> str:
        """Publish the model of a folder after all uploads that are under way.

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
        args = PublishArguments(include_pictures=self.include_pictures)
        publish(str(source), model, processor, self.repository.name, args, folder)

    def _upload(self, folder: TemporaryDirectory, message: str) -> None:
        with folder as name, _warn():
            self.repository.upload(Path(name), message)


@contextmanager
def _warn() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        logger.warning("%s", error)
