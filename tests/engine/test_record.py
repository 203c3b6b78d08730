"""A result goes to the file of its model and to the trackers of its run, once. Pictures of one's own images stay here."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.engine.record import Trackers, record
from training.engine.results import Result, read_results
from training.engine.run_folder import FIGURES, RESULTS
from training.trainer import MoCoTrainingArguments

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


# Pictures of somebody's own images

ALL = {f"figures/{name}" for name in FIGURES}


@pytest.fixture
def drawn(tmp_path):
    for name in FIGURES:
        Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in FIGURES]


@pytest.fixture
def wandb(monkeypatch):
    """What a stand-in for the package, which is not installed, was asked to log."""
    sent: dict = {}
    run = SimpleNamespace(log=lambda values, step=None, **kwargs: sent.update(values), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: run, Image=str))
    return sent


@pytest.mark.parametrize(
    ("data", "asked", "figures"),
    [
        ({"dataset": "/data/mine", "local": True}, False, ALL - {"figures/neighbours"}),
        ({"dataset": "digits"}, False, ALL - {"figures/neighbours"}),  # it is not known where the images were
        ({"dataset": "/data/mine", "local": True}, True, ALL),
        ({"dataset": "digits", "local": False}, False, ALL),
    ],
)
def test_pictures_of_a_local_dataset_leave_for_a_tracker_only_when_asked_for(
    data, asked, figures, drawn, wandb, tmp_path
):
    trackers = Trackers(["wandb"], "moco", "run", tmp_path / "run", include_pictures=asked)
    record(tmp_path / "model", [RESULT], model="0", data=data, trackers=trackers, figures=drawn)
    assert {name for name in wandb if name.startswith("figures/")} == figures
    assert wandb["results/weighted kNN, k 200, T 0.07, backbone, top1"] == 92.5
    said = trackers.kept_back(drawn, data)
    assert said == (
        None
        if figures == ALL
        else "neighbours.png shows images that not everybody may see and is not sent to wandb: --include_pictures sends it"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_a_tracker_on_this_machine_gets_them(drawn, tmp_path):
    trackers = Trackers(["tensorboard"], "moco", "run", tmp_path / "run")
    record(tmp_path / "model", [], model="0", data={"local": True}, trackers=trackers, figures=drawn)
    assert set(EventAccumulator(str(tmp_path / "run" / "runs" / "results")).Reload().Tags()["images"]) == ALL
    assert trackers.kept_back(drawn, {"local": True}) is None


@pytest.mark.parametrize("place", ["here", "trackio_space_id", "trackio_static_space_id", "TRACKIO_SPACE_ID"])
def test_trackio_gets_them_where_its_runs_stay_here(place, drawn, tmp_path, monkeypatch):
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    flags = {place: "org/space"} if place.startswith("trackio") else {}
    if place.isupper():
        monkeypatch.setenv(place, "org/space")
    for asked in (False, True):
        args = MoCoTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="trackio", include_pictures=asked, **flags
        )
        kept = args.trackers.kept_back(drawn, {"local": True})
        assert (kept is None) == (asked or place == "here")
