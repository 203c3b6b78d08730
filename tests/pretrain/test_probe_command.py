"""The table that a probe of a run prints, and what its command refuses."""

import re
from dataclasses import replace

import pytest
from transformers import ResNetConfig, ResNetForImageClassification

from training.commands.evaluations.linear_probe import print_table
from training.engine.files import write_json
from training.engine.results import Result, append_results
from training.pretrain import monitored


def test_the_table_of_a_probe_has_a_knn_that_was_measured_later(tmp_path, capsys):
    write_json(tmp_path / "metrics.json", {"loss": 1.0})
    digits, top1 = {"dataset": "digits", "split": "test", "train_images": 1437}, {"linear probe, official": 50.0}
    print_table(tmp_path, "digest", digits, top1)
    assert "kNN" not in capsys.readouterr().out
    knn = [Result("weighted kNN, k 5, T 0.07", "top1", 61.25, 16)]
    append_results(tmp_path, knn, model="digest", data=digits)
    append_results(tmp_path, [replace(knn[0], value=9.0)], model="of other weights", data=digits)
    for other in ({"dataset": "birds"}, {"split": "train"}, {"train_images": 500}):
        append_results(tmp_path, [replace(knn[0], value=9.0)], model="digest", data=digits | other)
    print_table(tmp_path, "digest", digits, top1)
    assert re.search(r"^kNN after +\|  61\.2 %  weighted kNN, k 5, T 0\.07$", capsys.readouterr().out, re.M)


def test_the_table_of_a_probe_has_the_same_knn_before_and_after_and_none_of_other_weights_or_images(tmp_path, capsys):
    digits = {"dataset": "digits", "split": "test", "train_images": 1437}
    by_monitor = Result("weighted kNN, k 200, T 0.07", "top1", 94.25, 360, settings={"bank": 1437})
    metrics = {"knn_top1_before": 69.25, "knn_top1_after": 94.25, "knn": monitored(by_monitor), "data": digits}
    write_json(tmp_path / "metrics.json", metrics)
    # Other measurements of the same value, by chance.
    others = [{"protocol": "weighted kNN, k 1, T 0.07"}, {"feature": "head"}, {"settings": {"bank": 500}}]
    alike = [replace(by_monitor, **other) for other in others]
    append_results(tmp_path, [*alike, by_monitor], model="digest", data=digits)
    later = replace(by_monitor, protocol="weighted kNN, k 1, T 0.07", value=12.5)
    append_results(tmp_path, [later], model="digest", data=digits)
    append_results(tmp_path, [later], model="digest", data=digits | {"dataset": "birds"})
    print_table(tmp_path, "digest", digits, {"linear probe, official": 50.0})
    before, after, probe = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"kNN before training +\|  69\.2 %  weighted kNN, k 200, T 0\.07", before)
    assert re.fullmatch(r"kNN after +\|  94\.2 %  weighted kNN, k 200, T 0\.07", after)
    write_json(tmp_path / "metrics.json", metrics | {"knn": monitored(replace(by_monitor, settings={"bank": 9}))})
    print_table(tmp_path, "digest", digits, {})  # the monitor's is not there
    assert capsys.readouterr().out == "kNN after |  12.5 %  weighted kNN, k 1, T 0.07\n"
    for digest, data in (("of other weights", digits), ("digest", digits | {"label_column": "parity"})):
        print_table(tmp_path, digest, data, {"linear probe, official": 50.0})
        assert capsys.readouterr().out == f"{probe.split('|')[0].strip()} |  50.0 %\n"


def test_a_probe_suggests_the_flag_that_was_meant(script, capsys):
    with pytest.raises(SystemExit):
        script("linear_probe").main(["runs/x", "--learning_rat", "1"])
    assert "did you mean '--learning_rate'" in capsys.readouterr().err


def test_a_probe_of_a_folder_without_a_model_is_refused(tmp_path, script, capsys):
    for argv in ([str(tmp_path), "--dataset_name", "digits"], []):
        with pytest.raises(SystemExit):
            script("linear_probe").main(argv)
        assert "pass the folder that a run saved to" in capsys.readouterr().err


def test_a_probe_of_another_model_is_refused(tmp_path, script, capsys):
    ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        script("linear_probe").main([str(tmp_path), "--dataset_name", "digits", "--image_size", "32"])
    assert "holds no MoCo model (model_type resnet in config.json)" in capsys.readouterr().err
