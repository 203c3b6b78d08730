"""The folder that an evaluation writes to: made before any time is spent, with figures that fit the numbers beside them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..engine.checkpoints import decided_by_main
from ..engine.run_folder import METRICS, drawn, read_metrics
from ..errors import one_line
from .recipe import TransferRun


def make_folder(run: TransferRun) -> Path:
    """The folder of the results, which is there afterwards. All processes take part.

    Raises:
        ValueError: it cannot be made. All processes raise it.
    """
    folder = Path(str(run.training.output_dir))

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir ({folder}) cannot be written ({error}): pass another --output_dir") from error

    decided_by_main(make)
    return folder


def shown_instead(run: TransferRun, evaluated: dict[str, Any]) -> str | None:
    """The evaluation that the figures in the folder show and go on to show, in words; None where this one is drawn.

    Reports have the numbers of `metrics.json` beside the figures: one of another model, split or number of images draws none.

    Args:
        evaluated: what `metrics.json` says of an evaluation: protocol, n, metric and data.
    """
    folder = Path(str(run.training.output_dir))
    if not run.eval_only or not (there := read_metrics(folder / METRICS, "correct it, or move it away")):
        return None
    if Path(run.encoder.source).resolve() == folder.resolve() and _conditions(there) == _conditions(evaluated):
        return None
    data = there.get("data", {})
    return f"{there.get('protocol')}, split {data.get('split')} of {data.get('dataset')}, n {there.get('n')}"


def figures_of(run: TransferRun, evaluated: dict[str, Any], names: Iterable[str]) -> list[Path]:
    """PNG files of an evaluation that are in the folder; none, which is said, where they show another one."""
    folder = Path(str(run.training.output_dir))
    if (other := shown_instead(run, evaluated)) is None:
        return drawn(folder, names)
    print(one_line(f"The figures in {folder} stay those of {other}: pass another --output_dir to draw these results."))
    return []


def _conditions(metrics: dict[str, Any]) -> list[Any]:
    data = metrics.get("data", {})
    return [metrics.get(name) for name in ("protocol", "n", "metric")] + [
        data.get(name) for name in ("dataset", "split")
    ]
