"""Folders that others made: what is written lands in them, and what is read lies in them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import save_encoder
from tiny_trainer import build, image_rows, tiny_model

from modeling_moco import MoCoImageProcessor, MoCoModel
from training import plots
from training.convert.files import read
from training.data.images import MapImages
from training.engine import lock
from training.engine.callbacks import ListUnreadable
from training.engine.checkpoints import find_defect, newest_complete
from training.engine.files import UNFINISHED, check_model_files, write_json
from training.engine.page import _figure
from training.engine.record import Trackers
from training.engine.results import Result, append_results
from training.engine.run_folder import drawn, read_sections
from training.evaluation.encoder import Encoder
from training.evaluation.features import cached_features
from training.hub.publish import load_published
from training.views.pil import EvaluationView

MINE = "somebody's own, long enough to be cut\n" * 3


class Unreadable:
    def unreadable(self):
        return ["a.png"]


def save_model(folder):
    build(image_rows(), folder).save_model()


def save_state(folder):
    build(image_rows(), folder).save_state()


def draw(folder):
    plots.confusion(torch.tensor([[0, 1, 2]]), ["a", "b"], folder / "confusion")


def measure(folder):
    append_results(folder, [Result("kNN", "top1", 50.0, 4)], model="0", data={})


WRITTEN = {
    write_json: ["settings.json"],
    measure: ["results.json"],
    draw: ["confusion.png", "confusion.svg"],
    save_model: ["model.safetensors", "config.json", "preprocessor_config.json", "training_args.bin"],
    save_state: ["trainer_state.json"],
}


@pytest.mark.parametrize(("write", "names"), WRITTEN.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_links_with_the_names_of_files_are_replaced_and_not_followed(write, names, tmp_path):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    folder.mkdir()
    victim.write_text(MINE)
    names = {name: folder / name for name in names}
    foreseen = [f"{name}{end}" for name in names for end in ("", ".tmp", f".{os.getpid()}.tmp")]
    for name in foreseen:
        if write is not measure or name != "results.json":  # which is read first
            (folder / name).symlink_to(victim)
    if write is write_json:
        write_json(names["settings.json"], {})
    else:
        write(folder)
    assert victim.read_text() == MINE
    for path in names.values():
        assert path.is_file()
        assert not path.is_symlink()
    assert not list(folder.glob(f"{UNFINISHED}*"))


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "results.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "results.json", {"odd": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert json.loads((tmp_path / "results.json").read_text()) == [1]


def test_new_files_have_the_usual_rights(tmp_path):
    (tmp_path / "usual").touch()
    write_json(tmp_path / "results.json", [])
    assert (tmp_path / "results.json").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_lock_file_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".results.json.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match=r"\.results\.json\.lock leads out of .*: put the file itself there"):
        measure(tmp_path / "run")
    assert not (tmp_path / "victim").exists()


def test_an_output_folder_may_be_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    build(image_rows(), tmp_path / "runs", save_strategy="steps", save_steps=3, max_steps=6).train()
    checkpoint, damaged = newest_complete(tmp_path / "runs")
    assert (checkpoint.name, damaged) == ("checkpoint-6", [])
    check_model_files(checkpoint)


def test_a_checkpoint_is_written_into_a_folder_of_its_own(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("model.safetensors", "trainer_state.json", "optimizer.pt"):
        (victim / name).write_text(MINE)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-3").symlink_to(victim)
    build(image_rows(), tmp_path / "run", save_strategy="steps", save_steps=3, max_steps=3).train()
    assert {path.name: path.read_text() for path in victim.iterdir()} == dict.fromkeys(
        ("model.safetensors", "trainer_state.json", "optimizer.pt"), MINE
    )
    checkpoint, _ = newest_complete(tmp_path / "run")
    assert not checkpoint.is_symlink()
    assert find_defect(checkpoint) is None


def test_a_checkpoint_with_a_way_out_is_passed_over(tmp_path):
    build(image_rows(), tmp_path / "run", save_strategy="steps", save_steps=3, max_steps=3).train()
    good = tmp_path / "run" / "checkpoint-3"
    hostile = [tmp_path / "run" / f"checkpoint-{step}" for step in (4, 5, 6, 7, 8)]
    linked, file, extra, shard, listed = hostile
    linked.symlink_to(good)
    for folder in (file, extra, shard, listed):
        shutil.copytree(good, folder)
    (file / "optimizer.pt").unlink()
    (file / "optimizer.pt").symlink_to(good / "optimizer.pt")
    (extra / "statistics_1.safetensors").symlink_to(good / "model.safetensors")  # no manifest lists it
    (shard / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../checkpoint-3/model.safetensors"}})
    )
    manifest = json.loads((listed / "manifest.json").read_text())
    manifest["files"]["../checkpoint-3/model.safetensors"] = (good / "model.safetensors").stat().st_size
    (listed / "manifest.json").write_text(json.dumps(manifest))
    found, damaged = newest_complete(tmp_path / "run")
    assert found == good
    for folder, words in zip(
        reversed(hostile),
        ("../checkpoint-3/model", "../checkpoint-3/model", "statistics_1", "optimizer.pt", "is a link"),
        strict=True,
    ):
        (line,) = [line for line in damaged if line.startswith(f"{folder} is damaged")]
        assert words in line


# Folders below


def features(folder):
    cached_features(tiny_model(), MapImages(image_rows(), EvaluationView(28, 24)), folder / "features")


def tensorboard(folder):
    Trackers(["tensorboard"], "moco", "run", folder).check()


def random_encoder(folder):
    append_results(Encoder(str(folder), random=True).results_dir, [], model="0", data={})


@pytest.mark.parametrize(
    ("write", "name"), [(features, "features"), (tensorboard, "runs"), (random_encoder, "random_encoder")]
)
def test_a_folder_below_that_is_a_link_is_refused(write, name, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match=f"{name} is a link, and is not written to"):
        write(tmp_path / "run")
    assert not list((tmp_path / "victim").iterdir())


@pytest.mark.parametrize(
    ("script_name", "name"),
    [("linear_probe", "linear_probe"), ("finetune", "finetune_100pct")],
    ids=["probe", "finetune"],
)
def test_the_usual_folder_of_an_evaluation_is_not_written_to_through_a_link(
    script_name, name, script, tmp_path, capsys
):
    folder = saved(tmp_path / "run")
    (tmp_path / "victim").mkdir()
    (folder / name).symlink_to(tmp_path / "victim")
    with pytest.raises(SystemExit):
        script(script_name).main([str(folder), "--dataset_name", "digits", "--use_cpu", "--num_train_epochs", "1"])
    assert f"{name} is a link, and is not written to" in capsys.readouterr().err
    assert not list((tmp_path / "victim").iterdir())


# Reading


def saved(folder: Path) -> Path:
    save_encoder(folder)
    MoCoImageProcessor().save_pretrained(folder)
    return folder


def move_out(name):
    def change(folder, private):
        (folder / name).replace(private / name)
        (folder / name).symlink_to(private / name)

    return change


def shards(folder, private):
    (folder / "model.safetensors").replace(private / "model.safetensors")
    weights = dict.fromkeys(MoCoModel.from_pretrained(private, config=folder / "config.json").state_dict(), 0)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../private/model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def named(folder, private):
    (folder / "model.safetensors").replace(private / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "../private/model.safetensors"}))


HOSTILE = {
    "model.safetensors": move_out("model.safetensors"),
    "config.json": move_out("config.json"),
    "preprocessor_config.json": move_out("preprocessor_config.json"),
    "../private/model.safetensors": shards,
    "transformers_weights": named,
}
LOADERS = {
    "evaluation": lambda folder: Encoder(str(folder)).load(MoCoModel, seed=0),
    "publishing": lambda folder: load_published(str(folder), training_state=False),
    "conversion": lambda folder: read(str(folder)),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_model_outside_its_folder_is_refused_by_name(name, loader, tmp_path):
    folder, private = saved(tmp_path / "model"), tmp_path / "private"
    private.mkdir()
    HOSTILE[name](folder, private)
    words = "../private/model.safetensors" if name == "transformers_weights" else name
    with pytest.raises(ValueError, match="put the file itself there") as refused:
        LOADERS[loader](folder)
    assert f"{folder}/{words} leads out of {folder}" in str(refused.value)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_linked_folder_and_a_snapshot_of_the_hubs_cache_are_loaded(loader, tmp_path):
    folder = saved(tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    LOADERS[loader](tmp_path / "link")
    repository = tmp_path / "hub" / "models--org--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        (repository / "blobs" / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    LOADERS[loader](snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(ValueError, match=r"config\.json leads out of"):
        LOADERS[loader](snapshot)


def test_settings_lists_and_figures_of_elsewhere_are_not_read(tmp_path):
    run, private = tmp_path / "run", tmp_path / "private"
    run.mkdir()
    private.write_text("data: {password: x}\nmodel: {}\n")
    for name in ("recipe.yaml", "unreadable_images.txt", "neighbours.png", "neighbours.svg"):
        (run / name).symlink_to(private)
    with pytest.raises(ValueError, match=r"recipe\.yaml leads out of") as refused:
        read_sections(run / "recipe.yaml", "correct it")
    assert "password" not in str(refused.value)
    with pytest.raises(ValueError, match=r"unreadable_images\.txt leads out of"):
        ListUnreadable(Unreadable()).write(run)
    assert drawn(run) == []
    assert "neighbours is missing" in _figure(run / "neighbours.svg", "", "", None)


def test_the_lock_of_a_run_follows_no_link(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        lock.take(tmp_path)
    assert not (tmp_path / "victim").exists()
