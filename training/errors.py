"""One line for the user's errors, and the error that ends a run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError


@contextmanager
def one_line_errors(kinds: tuple[type[Exception], ...] = (ValueError, StrictDataclassError)) -> Iterator[None]:
    """End the program with one line on the main process for an error of these kinds; by default the user's own."""
    try:
        yield
    except kinds as error:
        # A training error with a cause happened on one process alone.
        alone = isinstance(error, TrainingError) and error.__cause__ is not None
        if alone or int(os.environ.get("RANK", "0")) == 0:
            reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
            print("error: " + one_line(reason), file=sys.stderr)
        raise SystemExit(2) from None


def one_line(text: object) -> str:
    """A message as one line. Names from files may hold line ends, and signs that a terminal would obey: those are escaped."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in " ".join(str(text).split()))


class TrainingError(RuntimeError):
    """Ends a run: says what happened at which step, and which checkpoint is left."""


def first_line(error: BaseException | None) -> str:
    """The first line of a message that has any, else the name of its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
