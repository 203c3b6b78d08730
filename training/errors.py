"""One line for the user's errors, what of a text may be shown, and the error that ends a run."""

import os
import re
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError

# Tokens of the Hub, GitHub, GitLab, OpenAI and others, AWS, Google and Slack; private keys; passwords in a URL.
SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[opsu]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"
    r"|\bsk-(?:proj-|ant-)?\w{20,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{35}|\bxox[abprs]-[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|(?<=://)[^\s/:@]*:[^\s/@]+(?=@)"
)
LONGEST = 1_000  # signs of a message


class DataError(Exception):
    """Images that are there cannot be had: a file of many is damaged or gone, or the Hub is. The message is one line.

    It is of no kind that decoders raise, so that nobody takes it for one broken image, which a run leaves out.
    """


@contextmanager
def one_line_errors(
    kinds: tuple[type[Exception], ...] = (ValueError, StrictDataclassError, DataError),
) -> Iterator[None]:
    """End the program with one line on the main process for an error of these kinds; by default the user's own."""
    try:
        yield
    except kinds as error:
        # A training error with a cause happened on one process alone.
        alone = isinstance(error, DataError) or (isinstance(error, TrainingError) and error.__cause__ is not None)
        if alone or int(os.environ.get("RANK", "0")) == 0:
            reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
            print(
                "error: " + one_line(data_reason(reason) if isinstance(reason, DataError) else reason), file=sys.stderr
            )
        raise SystemExit(2) from None


def data_reason(error: DataError) -> str:
    """What a `DataError` says. One of a worker process comes with the traceback there, whose last line it is."""
    return str(error).rstrip().rpartition("\n")[2].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")


def one_line(text: object) -> str:
    """A message as one line without secrets, cut where it would fill the terminal.

    Names and values from files may hold line ends, and signs that a terminal would obey, and may have any length.
    """
    line = visible(hide_secrets(" ".join(str(text).split())))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def visible(text: str, kept: str = "") -> str:
    """A text with escapes for the signs that show nothing, but may move what is shown: controls and changes of direction.

    Args:
        kept: signs that stay as they are.
    """
    return "".join(sign if sign.isprintable() or sign in kept else repr(sign)[1:-1] for sign in text)


def hide_secrets(text: str) -> str:
    """A text with stars for what has the form of a token or a password."""
    return SECRETS.sub("***", text)


def shown(value: Any) -> str:
    """A value of a file in a message: short, in one line."""
    return one_line(reprlib.repr(value) if isinstance(value, list | dict | tuple) else str(value)[:200])


class TrainingError(RuntimeError):
    """Ends a run: says what happened at which step, and which checkpoint is left."""


def first_line(error: BaseException | None) -> str:
    """The first line of a message that has any, else the name of its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
