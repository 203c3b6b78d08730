"""The card knows what weights were trained from by what they are, and says no more of them than is recorded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import environment
from published_runs import card_of, model_of, push

from modeling_moco import MoCoForImageClassification, MoCoImageProcessorPil
from training.engine.results import encoder_digest
from training.engine.run_folder import SEEN_LABELS, begin_with, check_same_run

ROOT = Path(__file__).parents[3]
SHORT = ["--use_cpu", "--num_train_epochs", "1", "--disable_tqdm", "True"]
PROBED = "without labels, and a classifier of 10 classes that was trained on it with labels of digits."


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The run in a folder of its own, without the figures and what followed it."""
    unneeded = shutil.ignore_patterns("linear_probe*", "*.png", "*.svg")
    return Path(shutil.copytree(run, tmp_path / "runs" / "run", ignore=unneeded))


def change_recipe(folder: Path, section: str, **values) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe[section] = recipe.get(section, {}) | values
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def told(source: Path, folder: Path) -> tuple[str, str, dict]:
    """What the card of a model says before its first heading and under its limits, and its numbers by their names."""
    text, card = card_of(source, folder)
    numbers = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    return (
        text.split("# name\n")[1].partition("## Use")[0],
        text.split("## Limits\n")[1].partition("## Cit")[0],
        numbers,
    )


def test_a_probe_that_lies_elsewhere_knows_its_encoder_as_long_as_that_is_there(copy, script, tmp_path):
    probe = tmp_path / "elsewhere" / "probe"
    script("linear_probe").main([str(copy / "finetune_100pct"), *SHORT, "--output_dir", str(probe)])
    summary, limits, numbers = told(probe, tmp_path / "known")
    assert "on digits without labels, fine-tuned with labels, and a classifier of 10 classes" in summary
    assert any("linear probe, official" in name for name in numbers)
    _, _, of_tuned = told(copy / "finetune_100pct", tmp_path / "tuned")
    assert of_tuned
    assert all("fine-tuning" in name for name in of_tuned)  # the probe's are of another classifier
    copy.rename(tmp_path / "moved")
    summary, limits, numbers = told(probe, tmp_path / "unknown")
    assert (
        "began with the weights of finetune_100pct, which had been fine-tuned with labels, and a classifier" in summary
    )
    assert not numbers
    assert "without labels" not in summary + limits


def test_the_licence_of_weights_that_began_with_others_is_not_ours_to_say(copy, script, tmp_path, capsys):
    (tmp_path / "alone").mkdir()
    for part in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(copy / part, tmp_path / "alone" / part)
    begun = Path(shutil.copytree(copy, tmp_path / "begun"))
    change_recipe(begun, "model", init_from="org/other")
    converted = Path(shutil.copytree(copy, tmp_path / "converted"))
    (converted / "conversion.json").write_text('{"file": "r50.pth.tar", "format": "official"}')
    for source, license in ((copy, "mit"), (begun, "unknown"), (converted, "unknown"), (tmp_path / "alone", "unknown")):
        capsys.readouterr()
        push(script, str(source), "org/model", "--dry_run")
        shown = capsys.readouterr().out
        assert f"\nlicense: {license}\n" in shown
        others = ", for the weights may have begun with those of others" * (license == "unknown")
        assert f"The licence is {license}{others}: --license names another" in shown
    push(script, str(begun), "org/model", "--dry_run", "--license", "cc-by-nc-4.0")
    shown = capsys.readouterr().out
    assert "\nlicense: cc-by-nc-4.0\n" in shown
    assert "The licence is" not in shown


def test_a_probe_says_the_same_from_whichever_folder_it_was_made_or_is_published(copy, script, tmp_path, monkeypatch):
    monkeypatch.chdir(copy)
    script("linear_probe").main([".", *SHORT, "--output_dir", "probe"])
    assert PROBED in told(Path("probe"), tmp_path / "by_dot")[0]
    monkeypatch.chdir(copy / "probe")
    assert PROBED in told(Path(), tmp_path / "from_within")[0]
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(copy / "probe")
    script("linear_probe").main(["runs/run", *SHORT, "--output_dir", "probe"])
    copy.rename(copy.with_name("renamed"))
    monkeypatch.chdir(tmp_path.parent)
    text, card = card_of(tmp_path / "probe", tmp_path / "gone")
    assert card.data.base_model is None  # runs/run is no name on the Hub
    assert "began with the weights of run, and a classifier" in text


def test_a_run_of_the_same_name_is_another_one(copy, script, tmp_path):
    script("linear_probe").main([str(copy), *SHORT, "--output_dir", str(tmp_path / "probe")])
    other = tmp_path / "others" / "run"
    model = model_of(copy)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(other)
    shutil.copyfile(copy / "recipe.yaml", other / "recipe.yaml")
    change_recipe(other, "data", dataset_name="org/birds")
    shutil.move(tmp_path / "probe", other / "probe")
    assert "on digits without labels" in told(other / "probe", tmp_path / "of_the_first")[0]
    copy.rename(tmp_path / "moved")
    summary, limits, _ = told(other / "probe", tmp_path / "of_none")
    assert "that began with the weights of run, and a classifier" in summary
    assert "without labels" not in summary + limits


def test_a_baseline_was_not_pretrained(copy, script, tmp_path):
    random = ["--random_encoder", *SHORT]
    script("linear_probe").main([str(copy), *random])
    script("finetune").main([str(copy), *random, "--global_batch_size", "16"])
    for name in ("linear_probe", "finetune_100pct"):
        summary, limits, numbers = told(copy / "random_encoder" / name, tmp_path / name)
        assert "that began with random weights, and " in summary
        assert ("and was trained as a whole, with labels" in summary) == (name != "linear_probe")
        assert "a baseline, nothing was pretrained" in summary
        assert any(protocol in " ".join(numbers) for protocol in ("linear probe", "fine-tuning"))
        assert "without labels" not in summary + limits
        assert "Momentum" not in summary


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")
def test_what_was_trained_on_a_model_of_the_hub_has_its_numbers_and_settings(hub, copy, script, tmp_path, monkeypatch):
    push(script, str(copy), "org/first")
    monkeypatch.chdir(tmp_path)
    data = ["--dataset_name", "digits", "--max_train_samples", "64", "--max_eval_samples", "16", "--image_size", "32"]
    ways = {
        "knn": ["--knn_k", "5", "--use_cpu"],
        "linear_probe": [*SHORT, "--output_dir", "probe"],
        "finetune": [*SHORT, "--label_fraction", "0.5"],
    }
    for name, flags in ways.items():
        command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), "org/first", *data, *flags]
        env = environment(hub, tmp_path / "home") | {"PYTHONWARNINGS": "default"}  # the client's own use of httpx warns
        subprocess.run(command, check=True, capture_output=True, env=env)
    text, _ = card_of(Path("probe"), tmp_path / "probed")
    assert "that began with the weights of org/first, and a classifier of 10 classes" in text
    assert "| weighted kNN, k 5" in text
    assert "| linear probe, official" in text
    tuned = Path("runs", "org--first", "finetune_50pct")
    recipe = yaml.safe_load((tuned / "recipe.yaml").read_text())
    text, _ = card_of(tuned, tmp_path / "tuned")
    assert "that began with the weights of org/first, and was trained as a whole, with labels of digits, as a" in text
    assert (
        "\n\nNothing is recorded of how the weights that this began with were trained. These are the settings" in text
    )
    (tuned / "recipe.yaml").write_text(yaml.safe_dump({"encoder": recipe["encoder"]}))
    text, _ = card_of(tuned, tmp_path / "by default")
    assert "began with were trained. All settings had their defaults.\n" in text


def test_of_a_classifier_that_somebody_trained_in_python_nothing_is_claimed(copy, tmp_path):
    MoCoForImageClassification.from_pretrained(copy, num_labels=3).save_pretrained(tmp_path / "mine")
    MoCoImageProcessorPil.from_pretrained(copy).save_pretrained(tmp_path / "mine")
    summary, limits, _ = told(tmp_path / "mine", tmp_path / "published")
    assert "with a classifier of 3 classes; nothing is recorded of how they were trained." in summary
    assert "without labels" not in summary + limits


def test_weights_that_a_run_began_with_may_have_seen_labels(copy, tmp_path):
    change_recipe(copy, "model", init_from="timm/resnet50.a1_in1k")
    summary, limits, _ = told(copy, tmp_path / "published")
    assert "on digits without labels, beginning with the weights of timm/resnet50.a1_in1k: it" in summary
    assert "It was trained without labels, but the weights that it began with may have seen some, and makes" in limits


def test_of_two_probes_each_has_its_own_numbers(copy, script, tmp_path):
    accuracies = {}
    for seed in (0, 3):
        probe = copy / f"probe_{seed}"
        script("linear_probe").main([str(copy), *SHORT, "--seed", str(seed), "--output_dir", str(probe)])
        accuracies[seed] = yaml.safe_load((probe / "metrics.json").read_text())["probes"][0]
    assert accuracies[0]["protocol"] == accuracies[3]["protocol"]
    assert accuracies[0]["top5"] != accuracies[3]["top5"]
    for seed, measured in accuracies.items():
        _, _, numbers = told(copy / f"probe_{seed}", tmp_path / f"published_{seed}")
        name = f"{measured['protocol']} (backbone)"
        assert numbers[f"top5 in per cent: {name}"] == round(measured["top5"], 2)
        assert numbers[f"top1 in per cent: {name}"] == round(measured["top1"], 2)


def test_a_classifier_says_of_which_images_its_labels_are(run, script, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "runs" / "run"))
    for name, words in (("linear_probe", "trained on it"), ("finetune_100pct", "and then as a whole,")):
        change_recipe(copy / name, "data", dataset_name="org/birds", max_train_samples=32)
        text, card = card_of(copy / name, tmp_path / name)
        assert "on digits without labels" in text
        assert f"{words} with labels of org/birds" in text
        assert card.data.datasets == ["org/birds"]
        settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
        assert settings["data"]["dataset_name"] == "digits"
        own = settings["probe" if name == "linear_probe" else "fine-tuning"]
        assert (own["dataset_name"], own["max_train_samples"]) == ("org/birds", 32)
        assert "image_size" not in own  # that of the pretraining
        # The numbers that its encoder's folder has by the same protocol are of other images.
        official = [result for result in card.data.eval_results or [] if "kNN" not in result.metric_name]
        assert not official
    change_recipe(copy / "linear_probe", "data", dataset_name="/home/me/secret/birds")
    text, card = card_of(copy / "linear_probe", tmp_path / "local")
    assert "with labels of birds" in text
    assert "secret" not in text
    assert card.data.datasets is None


def test_a_checkpoint_has_its_own_numbers_and_its_step(copy, script, tmp_path):
    checkpoint = copy / "checkpoint-4"
    script("knn").main([str(checkpoint), "--use_cpu"])
    script("linear_probe").main([str(checkpoint), *SHORT])
    text, card = card_of(checkpoint, tmp_path / "checkpoint")
    names = [result.metric_name for result in card.data.eval_results]
    assert any("kNN" in name for name in names)
    assert "These are the weights after step 4 of 8." in text
    text, card = card_of(checkpoint / "linear_probe", tmp_path / "probe")
    assert any("linear probe" in result.metric_name for result in card.data.eval_results)
    assert "The pretraining was at step 4 of 8 then." in text
    assert PROBED in text
    assert "of 8" not in card_of(copy, tmp_path / "end")[0]


def test_what_an_encoder_has_seen_is_recorded_with_what_begins_with_it(copy, tmp_path):
    tuned = copy / "finetune_100pct"
    assert begin_with(os.path.relpath(tuned), random=False) == {
        "model": str(tuned),
        "random_encoder": False,
        SEEN_LABELS: True,
    }
    assert SEEN_LABELS in begin_with(str(next(tuned.glob("checkpoint-*"))), random=False)
    assert SEEN_LABELS not in begin_with(str(tuned), random=True)
    assert begin_with(str(copy), random=False) == {"model": str(copy), "random_encoder": False}
    assert begin_with("org/name", random=False)["model"] == "org/name"


def test_a_training_that_an_older_version_began_goes_on(copy):
    weights = {"weights": encoder_digest(model_of(copy))}
    now = {"encoder": begin_with(str(copy / "finetune_100pct"), random=False) | weights}
    older = {"encoder": {"model": os.path.relpath(copy / "finetune_100pct"), "random_encoder": False} | weights}
    (copy / "recipe.yaml").write_text(yaml.safe_dump(older))
    check_same_run(copy, now, {})
