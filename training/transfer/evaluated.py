"""The folder that an evaluation of a trained model writes to: made before any time is spent."""

from pathlib import Path

from ..engine.checkpoints import decided_by_main
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
