"""Where the numbers of an evaluation go: to the results of a model, its report, and the trackers of its run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .page import refresh_report
from .results import Result, append_results
from .trackers import Trackers


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
        trackers.send(results, figures, step)
