"""Commands that are started one after the other, and stop in order."""

import os
import signal
import sys

import pytest

from training.reports.children import Children

NAP = "for i in $(seq 100); do sleep 0.05; done"
SAVES = "trap 'echo saved >> {place}; exit 75' INT TERM; kill -{signal} {parent}; " + NAP


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_a_command_once_and_no_other_is_started(number, tmp_path):
    place, children = tmp_path / "said", Children()
    body = SAVES.format(place=place, signal=number.name.removeprefix("SIG"), parent=os.getpid())
    with children.receiving():
        assert children.run(["bash", "-c", body]) == 75
        assert children.stopped_by == number
        assert children.run(["touch", str(tmp_path / "started")]) == -number
    assert place.read_text() == "saved\n"
    assert not (tmp_path / "started").exists()
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


def test_what_a_launcher_leaves_behind_is_waited_for(tmp_path):
    place, children = tmp_path / "said", Children()
    inner = f"trap 'sleep 0.5; echo saved > {place}; exit 75' INT; touch {place}.ready; {NAP}"
    with children.receiving():
        status = children.run([sys.executable, "-c", LAUNCHER, inner, f"{place}.ready"])
    assert status != 75
    assert place.read_text() == "saved\n"


LAUNCHER = """
import os, signal, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen(["bash", "-c", sys.argv[1]])
while not Path(sys.argv[2]).exists():
    time.sleep(0.02)
signal.signal(signal.SIGINT, lambda *_: os._exit(1))
os.kill(os.getppid(), signal.SIGINT)
child.wait()
"""
