"""Where the numbers of an evaluation go: to the results of a model, its report, and the trackers of its run.

transformers sends what is logged during training and then closes the run, which is opened again here by its name.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from .files import below
from .page import refresh_report
from .results import Result, append_results
from .run_folder import may_leave

TENSORBOARD = "runs"  # in the folder of a run, its files
TRACKERS = ("trackio", "tensorboard", "wandb")
TRACKIO_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # set, they send its runs to a Space or a server


def run_name(folder: Path) -> str:
    """The name of the run of a folder. No absolute path: trackio files figures under it."""
    return str(folder).lstrip("/")


@dataclass(frozen=True)
class Trackers:
    """The trackers of a run.

    Args:
        names: of `TRACKERS`; other ones that transformers knows get only what is logged during training.
        project, run_name: under which the run is found again.
        folder: that of the run. The files of tensorboard go to `runs/results` in it.
        include_pictures: send figures that show images that not everybody may see to other machines too.
        trackio_elsewhere: whether trackio was given a Space. Otherwise its runs stay here.
    """

    names: list[str]
    project: str
    run_name: str
    folder: Path
    include_pictures: bool = False
    trackio_elsewhere: bool = False

    def check(self) -> None:
        """
        Raises:
            ValueError: a tracker is not installed, or the folder of its files is a link.
        """
        for name in self.names:
            if name in TRACKERS and find_spec(name) is None:
                raise ValueError(f"report_to ({name}) is not installed: pip install {name}")
        below(self.folder, TENSORBOARD)

    def send(
        self, results: Iterable[Result], figures: Iterable[Path], data: dict[str, Any], step: int | None = None
    ) -> None:
        """Send results, and to each tracker the figures that it may have. Call it on the main process.

        Args:
            figures: PNG files, named after their stems.
            data: `ImageSplits.about`.
            step: of the training that they end; None for what is measured later.
        """
        numbers = {f"results/{r.protocol}, {r.feature}, {r.metric}": r.value for r in results}
        drawn = list(figures)
        for name in self.names:
            images = {f"figures/{path.stem}": path for path in drawn if self._may_have(name, path, data)}
            if name in TRACKERS:
                tracker = LOGGER_TYPE_TO_CLASS[name](*self._place(name), **self._run(name))
                tracker.start()
                _SEND[name](tracker, numbers, images, step)
                tracker.finish()

    def kept_back(self, figures: Iterable[Path], data: dict[str, Any]) -> str | None:
        """A sentence about the figures that some tracker does not get; None where each gets all."""
        drawn = list(figures)
        names = [name for name in self.names if name in TRACKERS and self._leaves(name)]
        kept = [path.name for path in drawn if not may_leave(path, data, self.include_pictures)]
        if not names or not kept:
            return None
        return (
            f"{', '.join(kept)} shows images that not everybody may see and is not sent to {', '.join(names)}: "
            "--include_pictures sends it"
        )

    def _may_have(self, name: str, figure: Path, data: dict[str, Any]) -> bool:
        return not self._leaves(name) or may_leave(figure, data, self.include_pictures)

    def _leaves(self, name: str) -> bool:
        """Whether a tracker shows on another machine what it gets."""
        if name == "trackio":
            return self.trackio_elsewhere or any(os.environ.get(variable) for variable in TRACKIO_ELSEWHERE)
        return name != "tensorboard"

    def _place(self, name: str) -> tuple[str, ...]:
        return ("results", str(self.folder / TENSORBOARD)) if name == "tensorboard" else (self.project,)

    def _run(self, name: str) -> dict[str, Any]:
        return {} if name == "tensorboard" else {"name": self.run_name, "resume": "allow"}


def _to_tensorboard(tracker: Any, numbers: dict[str, float], images: dict[str, Path], step: int | None) -> None:
    tracker.log(numbers, step=step)
    pixels = {name: np.asarray(Image.open(path).convert("RGB"))[None] for name, path in images.items()}
    tracker.log_images(pixels, step=step, dataformats="NHWC")


def _to_trackio(tracker: Any, numbers: dict[str, float], images: dict[str, Path], step: int | None) -> None:
    import trackio

    tracker.log(numbers | {name: trackio.Image(path) for name, path in images.items()}, step=step)


def _to_wandb(tracker: Any, numbers: dict[str, float], images: dict[str, Path], step: int | None) -> None:
    import wandb

    # Without a step: wandb drops what comes for one that it has passed.
    tracker.log(numbers | {name: wandb.Image(str(path)) for name, path in images.items()})


_SEND = {"tensorboard": _to_tensorboard, "trackio": _to_trackio, "wandb": _to_wandb}


def record(
    home: Path,
    results: list[Result],
    *,
    model: str,
    data: dict[str, Any],
    trackers: Trackers | None,
    figures: Iterable[Path] = (),
    step: int | None = None,
) -> None:
    """Append results to `home/results.json`, refresh `home/report.html` if it is there, then send results and figures.

    Call it on the main process, with the figures drawn.

    Args:
        home: folder of the model that was measured.
        results: may be empty; then no file is written.
        model: digest of the weights (`encoder_digest`).
        data: `ImageSplits.about`.
        trackers: None sends nothing.
        figures: PNG files, named after their stems.
        step: of the training that the results and figures end; None for what is measured later.

    Raises:
        ValueError: `results.json` is there and is not a valid results file; it is left as it is.
    """
    if results:
        append_results(home, results, model=model, data=data)
        refresh_report(home)
    if trackers is not None:
        trackers.send(results, figures, data, step)
