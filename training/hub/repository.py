"""The way to the Hub: a published folder in one commit, after a run or while it goes on."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, Literal

from huggingface_hub import HfApi, RepoCard, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # httpx's or httpx2's
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from modeling_moco.distributed_moco import rank

from ..engine.run_folder import EMBEDDED, FIGURES, OF_DETECTOR, OF_SEGMENTATION
from ..errors import first_line
from .publish import PublishArguments, load_published, make_folder, publish

logger = logging.getLogger(__name__)

# Files that a push deletes unless it uploads them again: old weights must not stay under the new name.
WRITTEN_DATASET = ("data/*.parquet", "search*.png", "duplicates*.png")
WRITTEN = (
    *("onnx/*", "torch_export/*", "resnet/*", "model.safetensors", "moco.safetensors", "*_moco.py"),
    *(f"{name}.png" for name in {*FIGURES, *OF_DETECTOR, *OF_SEGMENTATION}),
)
BRANCH = re.compile(r"[A-Za-z0-9_-]+(?:[./][A-Za-z0-9_-]+)*")  # a part of what git allows
MADE_BY_HAND = {".gitattributes", "README.md", "LICENSE"}  # files of a repository that was created on the website
OURS = {
    "model": "modeling_moco.py",
    "dataset": EMBEDDED,
}  # the file by which a repository is known to be of this project


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
    """A repository on the Hub.

    Args:
        private: create it private, if it does not exist.
        revision: branch to commit to; it is created if it does not exist.
        kind: of a model, or of a dataset of embeddings.
    """

    name: str
    private: bool = False
    revision: str | None = None
    kind: Literal["model", "dataset"] = "model"

    def __post_init__(self):
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise ValueError(
                f"repository ({self.name}) is not a valid repository name: write it as org/name"
            ) from error
        if self.revision is not None and not BRANCH.fullmatch(self.revision):
            raise ValueError(
                f"revision ({self.revision}) is not a valid name of a branch: use letters, digits, - and _, and . and / "
                "between them"
            )

    @property
    def api(self) -> HfApi:
        return HfApi()  # with the token of HF_TOKEN or of this machine's login

    def check(self) -> "Repository":
        """Check what can be checked without changing anything on the Hub.

        Returns:
            the same with its whole name.

        Raises:
            ValueError: there is no token or no network; the repository holds something else on this branch, or it is public
                and should be private.
        """
        if get_token() is None:
            raise ValueError(
                f"no token to write to {self.name} with: log in with `hf auth login`, or set HF_TOKEN to one that may write"
            )
        with hub_errors(f"opening {self.name}"):
            whole = self.name if "/" in self.name else f"{self.api.whoami()['name']}/{self.name}"
            about = self._about(whole)
        there = {file.rfilename for file in (about and about.siblings) or []}
        if OURS[self.kind] not in there and (others := sorted(there - MADE_BY_HAND)):
            raise ValueError(f"{whole} holds something else ({', '.join(others[:3])}): choose another name")
        if self.private and about is not None and not about.private:
            raise ValueError(f"private (True) does not change {whole}, which is public: make it private on its page")
        return replace(self, name=whole)

    def _about(self, name: str) -> Any:
        """What the Hub knows of the branch, or of main, where a new branch begins; None if there is no repository."""
        for revision in dict.fromkeys((self.revision, None)):
            with suppress(RevisionNotFoundError, RepositoryNotFoundError):
                return self.api.repo_info(name, revision=revision, repo_type=self.kind)
        self.api.whoami()  # without a valid token nothing is there either
        return None

    def check_card(self, content: str) -> None:
        """Ask the Hub whether it takes the metadata of a card.

        Raises:
            ValueError: it does not, e.g. a licence that it does not know; or there is no network.
        """
        with hub_errors(f"checking the card of {self.name}"):
            try:
                RepoCard(content).validate(self.kind)
            except ValueError as error:
                raise ValueError(f"Invalid metadata in README.md. {error}") from error

    def prepare(self) -> "Repository":
        """Check the right to write, and create the repository and its branch if they do not exist.

        Returns:
            the same with its whole name.

        Raises:
            ValueError: as `check`, or there is no right to write.
        """
        checked = self.check()
        with hub_errors(f"opening {checked.name}"):
            self.api.create_repo(checked.name, private=self.private or None, exist_ok=True, repo_type=self.kind)
        if self.revision is not None:
            with hub_errors(f"opening {self.revision} of {checked.name}"):
                self.api.create_branch(checked.name, branch=self.revision, exist_ok=True, repo_type=self.kind)
        return checked

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
                delete_patterns=list(WRITTEN if self.kind == "model" else WRITTEN_DATASET),
                repo_type=self.kind,
            )
        return str(commit.commit_url)


class PublishCallback(TrainerCallback):
    """Publishes what a run saves: its checkpoints in the background, one at a time, and its folder at the end.

    Nothing is done on other processes than the first.

    Args:
        every_save: publish checkpoints too, while the run goes on.
        include_pictures: publish figures that show images of a local, private or gated dataset too.
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
        repository = Repository(name, bool(args.hub_private_repo), args.hub_revision)
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
        args = PublishArguments(include_pictures=self.include_pictures, revision=self.repository.revision)
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
