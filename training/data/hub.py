"""Read from the Hub with patience: its client waits while the Hub is away or busy, says so, and gives up in one line."""

import logging
import multiprocessing
import re
import time
from typing import Any

import datasets
from huggingface_hub import dataset_info, get_session, set_client_factory
from huggingface_hub.utils import httpx, parse_ratelimit_headers  # the library that the client speaks HTTP with

from ..errors import DataError, one_line

logger = logging.getLogger(__name__)

PATIENCE = 600.0  # s that a request is tried anew for; other processes wait for three times as long (`ddp_timeout`)
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # s between two tries, where the Hub asks for no other wait
SILENCE = 60.0  # s without a sign of the Hub after which a try has failed; also between two lines about it
BUSY = (408, 429, 500, 502, 503, 504)  # status codes after which huggingface_hub tries again too
AWAY = (httpx.TimeoutException, httpx.NetworkError, httpx.ProxyError, httpx.RemoteProtocolError)
READING = re.compile("/datasets/.+/(resolve|tree|paths-info)/")  # paths of requests for the files of a dataset
_said = multiprocessing.Value("d", -SILENCE)  # when a process or one of its workers has last said that it waits


def commit_on_the_hub(name: str) -> str | None:
    """The newest commit of a dataset; None where the Hub does not say it, which `datasets` then explains, or has a cache."""
    try:
        commit: str | None = dataset_info(name).sha
    except (OSError, ValueError, httpx.HTTPError):
        return None
    return commit


def wait_for_the_hub() -> None:
    """Let the client of huggingface_hub wait, in this process and the workers that it starts.

    Its own patience is 5 tries for each request, or as many as often as `datasets` repeats them, with any wait that the Hub
    asks for: 25 minutes to hours, and two lines for every try.
    """
    client = get_session()
    if not isinstance(client, PatientClient):
        hooks = client.event_hooks
        datasets.logging.set_verbosity(logging.CRITICAL)  # the error that ends a run says what it logs
        set_client_factory(lambda: PatientClient(event_hooks=hooks, follow_redirects=True, timeout=SILENCE))


class PatientClient(httpx.Client):
    """Repeats a request for the files of a dataset until the whole answer is there, and others as ever.

    Raises:
        DataError: it is not there after `PATIENCE` seconds.
    """

    def send(self, request: Any, **kwargs: Any) -> Any:
        if not READING.search(request.url.path):
            return super().send(request, **kwargs)
        end, wait = time.monotonic() + PATIENCE, FIRST_WAIT
        while True:
            asked = 0.0
            try:
                response = super().send(request, **kwargs)
                if (reason := _defect(request, response, whole=not kwargs.get("stream"))) is None:
                    return response
                asked = _asked_wait(response.headers)
                response.close()
            except AWAY as error:
                reason = f"{type(error).__name__}: {error}"
            pause, left = max(wait, asked), end - time.monotonic()
            what = one_line(f"{request.url.path} ({reason})")
            if pause > left:
                raise DataError(f"the Hub does not give {what}, and no more than {PATIENCE:g} s are waited for it")
            _say(
                f"waiting for the Hub, which does not give {what}: next try in {pause:.0f} s, for at most {left:.0f} s"
            )
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)


def _defect(request: Any, response: Any, whole: bool) -> str | None:
    """Why to ask again; None for a good answer, or one that another try would not change."""
    if response.status_code in BUSY:
        return f"{response.status_code} {response.reason_phrase}"
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
    if asked is None or not whole or not response.is_success:
        return None
    first, last = map(int, asked.groups())
    sent = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", f"bytes 0-0/{last + 1}"))
    begin, size = map(int, sent.groups()) if sent else (first, last + 1)
    expected, got = min(last + 1, size) - first, len(response.content)
    return (
        None if begin == first and got == expected else f"{got:,} bytes from {begin:,} for {expected:,} from {first:,}"
    )


def _asked_wait(headers: Any) -> float:
    """Seconds that the Hub asks to wait: its own header for limits of rates, or Retry-After."""
    limits = parse_ratelimit_headers(headers)
    if limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    after = headers.get("Retry-After", "")
    return float(after) if after.isdigit() else 0.0


def _say(line: str) -> None:
    with _said.get_lock():
        if time.monotonic() - _said.value < SILENCE:
            return
        _said.value = time.monotonic()
    logger.warning(line)
