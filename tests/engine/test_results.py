"""Results travel: what is appended, and that nothing is lost. Scores against scikit-learn."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from training.engine.results import Result, append_results, interval, read_results, table
from training.engine.run_folder import RESULTS
from training.evaluation.scores import LOGITS_AT_ONCE, in_parts, likeliest, score, score_parts

ROOT = Path(__file__).parents[2]
RESULT = Result("weighted kNN, k 200, T 0.07", "top1", 92.5, 360)
CONDITIONS = {"model": "0123456789abcdef", "data": {"dataset": "digits", "split": "test"}}


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (333, 360), (1, 50_000)])
def test_the_interval_is_wilsons(right, n):
    expected = binomtest(right, n).proportion_ci(0.95, "wilson")
    low, high = interval(100 * right / n, n)
    assert low == pytest.approx(100 * expected.low, abs=1e-4)
    assert high == pytest.approx(100 * expected.high, abs=1e-4)


def test_a_result_is_kept_with_everything_needed_to_repeat_it(tmp_path):
    append_results(tmp_path / "model", [RESULT], **CONDITIONS)
    (entry,) = read_results(tmp_path / "model")
    for key, value in {"protocol": RESULT.protocol, "metric": "top1", "value": 92.5, "n": 360, **CONDITIONS}.items():
        assert entry[key] == value, key
    assert entry["feature"] == "backbone"
    assert entry["interval"] == pytest.approx(interval(92.5, 360))
    assert torch.__version__.startswith(entry["versions"]["torch"])
    assert "CPU" in entry["hardware"] or torch.cuda.is_available()
    assert entry["processes"] == 1
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert commit.startswith(entry["commit"].removesuffix("-dirty"))


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or torch.cuda.is_available(), reason="cores are not chosen here"
)
def test_the_cores_are_those_that_the_process_may_use(tmp_path):
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        append_results(tmp_path, [RESULT], **CONDITIONS)
    finally:
        os.sched_setaffinity(0, mine)
    assert read_results(tmp_path)[0]["hardware"].startswith("1 CPU cores, ")


def test_results_are_appended_and_the_same_one_is_not_repeated(tmp_path):
    append_results(tmp_path, [RESULT], **CONDITIONS)
    first = (tmp_path / RESULTS).read_text()
    append_results(tmp_path, [RESULT], **CONDITIONS)
    assert (tmp_path / RESULTS).read_text() == first
    append_results(tmp_path, [RESULT], model="fedcba9876543210", data=CONDITIONS["data"])
    append_results(tmp_path, [Result(RESULT.protocol, "top5", 99.0, 360)], **CONDITIONS)
    entries = read_results(tmp_path)
    assert [(e["model"][0], e["metric"]) for e in entries] == [("0", "top1"), ("f", "top1"), ("0", "top5")]
    assert entries[:1] == json.loads(first)


def add_results(folder: Path, metric: str) -> None:
    for n in range(1, 21):
        append_results(folder, [Result("p", metric, 50.0, n)], **CONDITIONS)


def test_two_evaluations_that_end_together_lose_nothing(tmp_path):
    with ThreadPoolExecutor() as threads:
        list(threads.map(add_results, [tmp_path] * 2, ["top1", "top5"]))
    entries = read_results(tmp_path)
    assert {(entry["metric"], entry["n"]) for entry in entries} == {
        (m, n) for m in ("top1", "top5") for n in range(1, 21)
    }


@pytest.mark.parametrize("content", ["{", "{}x", '[{"value": 1}]', "3"])
def test_a_file_that_is_not_valid_is_left_alone(content, tmp_path):
    (tmp_path / RESULTS).write_text(content)
    with pytest.raises(ValueError, match="is not a valid results file"):
        append_results(tmp_path, [RESULT], **CONDITIONS)
    assert (tmp_path / RESULTS).read_text() == content


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("value", float("nan"), "has a value, a number of images or a metric that nothing measures"),
        ("n", 0, "has a value, a number of images or a metric that nothing measures"),
        ("metric", " ", "has a value, a number of images or a metric that nothing measures"),
        ("interval", [float("nan"), 1.0], "has an interval of another kind"),
        ("data", {"split": "test"}, "has no dataset in its data"),
        ("data", {"dataset": "digits"}, "has no split in its data"),
        ("data", {"dataset": 5, "split": "test"}, "has a dataset of another kind in its data"),
        ("data", {"dataset": "digits", "split": "test", "config": [1]}, "has a config of another kind in its data"),
    ],
)
def test_an_entry_that_was_edited_into_no_result_is_named(place, value, words, tmp_path):
    append_results(tmp_path, [RESULT], **CONDITIONS)
    (entry,) = read_results(tmp_path)
    (tmp_path / RESULTS).write_text(json.dumps([entry, entry | {place: value}]))
    with pytest.raises(ValueError, match=re.escape(f"(entry 2 {words})")):
        read_results(tmp_path)


def test_tokens_are_not_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["knn.py", "--hub_token", "hf_secret", "--other_token=hf_hidden", "--knn_k", "20"])
    append_results(tmp_path, [RESULT], **CONDITIONS)
    text = (tmp_path / RESULTS).read_text()
    assert "hf_" not in text
    assert read_results(tmp_path)[0]["command"].endswith("--knn_k 20")


def test_the_table_has_a_line_for_each_result_with_its_interval():
    lines = table([RESULT, Result("linear", "top5", 100.0, 50_000, feature="head")]).splitlines()
    assert "92.50 %" in lines[0]
    assert "95 %: 89.3" in lines[0]
    assert [line.index("|") for line in lines] == [len(RESULT.protocol) + 1] * 2


def test_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (300,), generator=generator)
    labels[labels == 5] = 4  # a class without images
    logits = torch.randn(300, 8, generator=generator) + 2 * torch.eye(8)[labels]
    scores = score(likeliest(logits), labels, classes=8)
    everyone = np.arange(8)
    assert scores.top1 == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=1, labels=everyone))
    assert scores.top5 == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=everyone))
    confusion = confusion_matrix(labels, logits.argmax(dim=1), labels=everyone)
    assert scores.confusion.tolist() == [[i, j, confusion[i, j]] for i in everyone for j in everyone if confusion[i, j]]
    assert scores.per_class[5] is None
    assert scores.per_class[4] == pytest.approx(100 * confusion[4, 4] / confusion[4].sum())
    assert scores.n == 300
    assert [(r.metric, r.n, r.value) for r in scores.results("p")] == [
        ("top1", 300, scores.top1),
        ("top5", 300, scores.top5),
    ]


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_a_top5_that_every_answer_would_reach_is_not_a_number(classes):
    scores = score(likeliest(torch.randn(20, classes)), torch.randint(classes, (20,)), classes)
    assert scores.top5 is None
    assert scores.accuracies == {"top1": scores.top1}
    assert [result.metric for result in scores.results("p")] == ["top1"]
    assert "top-5" not in str(scores)
    six = score(likeliest(torch.randn(20, 6)), torch.randint(6, (20,)), 6)
    assert [result.metric for result in six.results("p")] == ["top1", "top5"]
    assert f"top-5 {six.top5:.1f} %" in str(six)


def test_scores_of_a_million_classes_take_the_memory_of_their_images():
    classes, labels = 1_000_000, torch.tensor([7, 7, 999_999])  # a matrix of classes would have 8 TB
    scores = score(torch.tensor([[7, 8], [9, 7], [999_999, 0]]), labels, classes)
    assert len(scores.confusion) == 3
    assert scores.confusion.tolist() == [[7, 7, 1], [7, 9, 1], [999_999, 999_999, 1]]
    assert scores.n == 3
    per_class = scores.per_class
    assert [per_class[i] for i in (0, 7, 999_999)] == [None, 50.0, 100.0]
    assert (scores.top1, scores.top5) == (pytest.approx(200 / 3), 100)


@pytest.mark.parametrize("classes", [3, 10_000, 10**9])
def test_logits_are_made_of_so_many_rows_at_once_that_they_stay_small(classes):
    features, labels = torch.arange(5_000.0)[:, None], torch.arange(5_000)
    parts = list(in_parts(features, labels, classes))
    assert all(len(x) == len(y) and (len(x) == 1 or len(x) * classes <= LOGITS_AT_ONCE) for x, y in parts)
    assert torch.equal(torch.cat([x for x, _ in parts]), features)
    assert torch.equal(torch.cat([y for _, y in parts]), labels)


def test_scores_of_parts_are_those_of_the_whole():
    logits, labels = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 9
    whole, parts = (
        score(likeliest(logits), labels, 9),
        score_parts(zip(logits.split(7), labels.split(7), strict=True), 9),
    )
    assert (parts.top1, parts.top5) == (whole.top1, whole.top5)
    assert torch.equal(parts.confusion, whole.confusion)
