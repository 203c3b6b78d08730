"""What a run left, mutated: results, manifests, settings and datasets are read, or refused in one line."""

import json

import pytest
from hypothesis import example, given
from mutations import DEEP, RECIPE_TREES, mutated_json, mutated_yaml, refusal

from training.engine.checkpoints import BatchLayout, check_layout, find_defect, newest_complete, write_manifest
from training.engine.results import read_results
from training.engine.run_folder import (
    DATASET,
    MANIFEST,
    METRICS,
    RESULTS,
    SAVED_RECIPE,
    SPLIT,
    check_same_data,
    check_same_run,
    ended,
    read_metrics,
    recorded_content,
)
from training.evaluation.finetune import read_split

RESULT = {
    **{"protocol": "weighted kNN", "metric": "top1", "value": 93.5, "n": 360, "feature": "backbone", "seed": None},
    **{"settings": {"k": 200, "T": 0.07}, "interval": [90.4, 95.6], "model": "0123456789abcdef"},
    **{"data": {"dataset": "digits", "split": "test"}, "versions": {"torch": "2"}, "date": "2026-01-01T00:00:00+00:00"},
    **{"command": "knn.py x", "hardware": "2 CPU cores", "processes": 1, "commit": None},
}


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@given(data=mutated_json([RESULT, RESULT]))
@example(data=b"{")
@example(data=b"null")
@example(data=b'["protocol"]')
@example(data=b'[{"protocol": 1}]')
@example(data=json.dumps([RESULT | {"interval": [None]}]).encode())
@example(data=json.dumps([RESULT, {key: value for key, value in RESULT.items() if key != "interval"}]).encode())
@example(data=DEEP)
def test_results_are_read_or_refused(place, data):
    with place() as folder:
        (folder / RESULTS).write_bytes(data)
        entries = []
        if refusal(lambda: entries.extend(read_results(folder)), folder / RESULTS, "move it away") is None:
            for entry in entries:
                low, high = entry["interval"]
                f"{entry['value']:.2f} {low:.2f} {high:.2f} {entry['n']:,} {entry['date'][:10]} {entry['data'].get('split')}"


METRICS_TREE = {
    "ended": "2026-01-01T00:00:00+00:00",
    "knn_top1_before": None,
    "knn_top1_after": 93.5,
    "loss": 2,
    "data": {"dataset": "digits", "local": False},
    "probes": [{"name": "official", "protocol": "linear probe", "top1": 90.5, "n": 360}],
}


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@given(data=mutated_json(METRICS_TREE))
@example(data=b"")
@example(data=json.dumps(METRICS_TREE).encode()[:40])
@example(data=b"[]")
@example(data=b'{"probes": [1]}')
@example(data=b'{"probes": [{"name": "official"}]}')
@example(data=b'{"ended": 1}')
@example(data=DEEP)
def test_metrics_are_read_or_refused(place, data):
    with place() as folder:
        path, metrics = folder / METRICS, {}
        path.write_bytes(data)
        if refusal(lambda: metrics.update(read_metrics(path, "move it away")), path, "move it away") is None:
            assert isinstance(ended(folder), str | None)
            for name in ("knn_top1_before", "knn_top1_after", "loss"):
                assert metrics.get(name) is None or f"{metrics[name]:.2f}"
            assert all(
                isinstance(probe[name], str) for probe in metrics.get("probes", []) for name in ("name", "protocol")
            )


@given(data=mutated_json({"dataset": "digits", "seed": 0, "indices": {"0": [3, 5], "1": [2]}}))
@example(data=b"")
@example(data=b'{"indices": {"0": [3, 5]')
@example(data=b'{"indices": {"0": "35"}}')
@example(data=b'{"indices": {"0": [-1]}}')
@example(data=b'{"indices": {}}')
@example(data=b"[]")
@example(data=DEEP)
def test_a_split_is_read_or_refused(place, data):
    with place() as folder:
        path, split = folder / SPLIT, {}
        path.write_bytes(data)
        if refusal(lambda: split.update(read_split(path)), path, "bring it back") is None:
            assert min(i for images in split.values() for i in images) >= 0


LAYOUT = BatchLayout(processes=2, per_device_batch_size=8, accumulation=1, images=100, workers=2, epoch=0.5)
MANIFEST_TREE = {
    "files": {"model.safetensors": 4, "below/rng_state.pth": 2},
    "batch_layout": {
        "processes": 2,
        "per_device_batch_size": 8,
        "accumulation": 1,
        "images": 100,
        "workers": 2,
        "epoch": 0.5,
    },
}


@given(data=mutated_json(MANIFEST_TREE))
@example(data=b'{"files": null}')
@example(data=b"[]")
@example(data=b'{"files": {}, "batch_layout": {}}')
@example(data=json.dumps(MANIFEST_TREE | {"files": {"x" * 300: 1}}).encode())
@example(data=json.dumps(MANIFEST_TREE).replace("0.5", "NaN").encode())
@example(data=json.dumps(MANIFEST_TREE).replace('"accumulation": 1', '"accumulation": 0').encode())
@example(data=DEEP)
def test_a_checkpoint_is_complete_or_passed_over(place, data):
    with place() as folder:
        older, newer = folder / "checkpoint-9", folder / "checkpoint-10"
        for checkpoint in (older, newer):
            (checkpoint / "below").mkdir(parents=True)
            (checkpoint / "model.safetensors").write_bytes(b"1234")
            (checkpoint / "below" / "rng_state.pth").write_bytes(b"12")
        write_manifest(older, LAYOUT)
        (newer / MANIFEST).write_bytes(data)
        defect = find_defect(newer)
        found, damaged = newest_complete(folder)
        assert found == (older if defect else newer)
        assert len(damaged) == (defect is not None)
        assert all(line.isprintable() and str(newer) in line for line in damaged)
        refusal(lambda: check_layout(found, LAYOUT), found)


@given(data=mutated_yaml(RECIPE_TREES))
@example(data=b"")
@example(data=b"data: 1")
@example(data=b"data: {1: 2}")
@example(data=b'data: {"\\e[2J": 1}')
@example(data=b"\xff")
def test_a_folder_holds_the_same_run_or_is_refused(place, data):
    with place() as folder:
        (folder / SAVED_RECIPE).write_bytes(data)
        now = {section: RECIPE_TREES[-1][section] for section in ("data", "model", "training")}
        refusal(lambda: check_same_run(folder, now, {}), folder)


@given(data=mutated_json({"dataset": "digits", "content": {"train": "1,437 images 0123", "test": "360 images 4567"}}))
@example(data=b"{")
@example(data=b"{}")
@example(data=b'{"dataset": "digits", "content": [1]}')
@example(data=b'{"dataset": "digits", "content": {"train": "\\u001f"}}')
def test_a_run_has_the_same_data_or_is_refused(place, data):
    with place() as folder:
        (folder / DATASET).write_bytes(data)
        content = []
        if refusal(lambda: content.append(recorded_content(folder, "digits")), folder / DATASET) is None:
            assert all(isinstance(text, str) for text in content[0].values())
        now = {"dataset": "digits", "content": {"train": "1,437 images 0123"}}
        refusal(lambda: check_same_data(folder, now), folder)
