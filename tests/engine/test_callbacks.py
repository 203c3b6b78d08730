"""What a person sees of a run under way: a bar on a terminal, and in a log a line once in a while."""

import os
import pty
import re
import sys
import termios
import threading
from contextlib import suppress

import pytest
from tiny_trainer import build, image_rows
from transformers import PrinterCallback

from training.engine.callbacks import ProgressBar, ProgressLines


@pytest.fixture(scope="module")
def rows():
    return image_rows()


def kinds(trainer) -> set[type]:
    return {type(callback) for callback in trainer.callback_handler.callbacks}


def test_a_log_gets_lines_and_no_bar(rows, tmp_path, capfd):
    trainer = build(rows, tmp_path, disable_tqdm=False)
    assert ProgressLines in kinds(trainer)
    assert not {ProgressBar, PrinterCallback} & kinds(trainer)
    trainer.train()
    out, err = capfd.readouterr()
    assert "\r" not in out + err
    # Twelve steps within a minute: the first one and the last one.
    steps = re.findall(r"^step (\d+) of 12, epoch \S+: loss \d+\.\d{3}  contrast \S+%  images/s \d+$", out, re.M)
    assert steps == ["1", "12"]


def test_a_line_comes_once_a_minute_and_at_every_evaluation(rows, tmp_path, capsys):
    seconds = iter(range(0, 10_000, 25))  # 25 between two looks at the clock, of which a printed line takes two
    trainer = build(rows, tmp_path)
    lines = ProgressLines(lambda: next(seconds))
    trainer.add_callback(lines)
    trainer.train()
    steps = [int(step) for step in re.findall(r"^step (\d+) of 12", capsys.readouterr().out, re.M)]
    assert steps == [1, 4, 7, 10, 12]
    trainer.log({"eval_knn_top1": 91.26, "epoch": 2.0})
    trainer.log({"eval_knn_top1": 92.26, "epoch": 2.0})
    shown = capsys.readouterr().out
    assert [float(top1) for top1 in re.findall(r"kNN (\S+)%", shown)] == [91.3, 92.3]
    lines.on_log(
        trainer.args, trainer.state, trainer.control, logs={"loss": 0.5}
    )  # of weights that nobody has evaluated
    shown = capsys.readouterr().out
    assert "loss 0.5" in shown
    assert "kNN" not in shown


def test_rankme_speaks_where_there_are_no_labels(rows, tmp_path, capsys):
    trainer = build(rows, tmp_path)
    trainer.add_callback(ProgressLines())
    trainer.log({"eval_rankme": 12.34, "epoch": 1.0})
    assert ": RankMe 12.3\n" in capsys.readouterr().out
    trainer.log({"eval_rankme": 23.45, "eval_knn_top1": 91.26, "epoch": 2.0})
    assert ": kNN 91.3%\n" in capsys.readouterr().out


def test_a_terminal_gets_a_bar(rows, tmp_path, monkeypatch):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 150))
    shown = []

    def read():
        with suppress(OSError):  # the end of a terminal that was closed
            while True:
                shown.append(os.read(ours, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        trainer = build(rows, tmp_path, disable_tqdm=False)
        assert ProgressBar in kinds(trainer)
        assert ProgressLines not in kinds(trainer)
        trainer.train()
    reader.join()
    os.close(ours)
    screen = b"".join(shown).decode()
    for word in ("loss=", "contrast=", "images/s=", "12/12", "\r"):
        assert word in screen
