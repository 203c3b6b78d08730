"""A result goes to the file of its model and to the trackers of its run, once."""

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.engine.record import Trackers, record
from training.engine.results import Result, read_results
from training.engine.run_folder import RESULTS

RESULT = Result("weighted kNN, k 200, T 0.07", "top1", 92.5, 360)
CONDITIONS = {"model": "0123456789abcdef", "data": {"dataset": "digits", "split": "test"}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_results_and_figures_reach_the_file_and_the_tracker(tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / "confusion.png")
    trackers = Trackers(["tensorboard"], "moco", "run", run)
    record(model, [RESULT], **CONDITIONS, trackers=trackers, figures=[tmp_path / "confusion.png"], step=7)
    assert [(entry["protocol"], entry["value"]) for entry in read_results(model)] == [(RESULT.protocol, 92.5)]
    sent = EventAccumulator(str(run / "runs" / "results")).Reload()
    (name,) = sent.Tags()["scalars"]
    assert name == "results/weighted kNN, k 200, T 0.07, backbone, top1"
    assert [(event.step, event.value) for event in sent.Scalars(name)] == [(7, 92.5)]
    assert sent.Tags()["images"] == ["figures/confusion"]


def test_without_results_no_file_is_written(tmp_path):
    record(tmp_path, [], **CONDITIONS, trackers=None)
    assert not (tmp_path / RESULTS).exists()
