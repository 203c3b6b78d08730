"""The command line, and what is there already."""

import resource
from contextlib import contextmanager

import pytest
import torch
from foreign_checkpoints import K, lincls, mlp, official
from tiny_models import assert_equal, moco_config

from modeling_moco import MoCoModel
from training.convert.files import FORMATS
from training.hub.publish import PublishArguments, load_published, publish

ENDINGS = dict.fromkeys(FORMATS, "") | {"detectron2": ".pkl"}  # which detectron2 goes by


def test_wrong_commands_are_told_what_would_be_right(refuse, tmp_path):
    lincls(tmp_path / "there.pth.tar")
    MoCoModel(moco_config("resnet18")).save_pretrained(tmp_path / "ours")
    source = tmp_path / "there.pth.tar"
    for words, message in {
        (): "two names are needed: python scripts/convert.py CHECKPOINT OUTPUT [--to FORMAT]",
        (source,): "two names are needed",
        (source, tmp_path / "out", "--to", "offical"): "to ('offical') is unknown: did you mean 'official'?",
        (source, tmp_path / "out", "--too", "official"): "flag --too is unknown: did you mean '--to'?",
        (
            tmp_path / "ours",
            tmp_path / "out",
        ): "is already a model directory: pass --to official or another format",
        (
            source,
            tmp_path / "out.pth",
        ): "looks like a file, but --to moco writes a folder: pass --to official",
    }.items():
        error = refuse(*words)
        print(error.replace(str(tmp_path), ""))
        assert message in error
    assert not list(tmp_path.glob("out*"))


def test_a_folder_without_a_model_and_the_weights_of_one_are_called_what_they_are(refuse, tmp_path):
    (tmp_path / "photos").mkdir()
    assert "photos does not contain a MoCo model" in refuse(tmp_path / "photos", tmp_path / "out")
    for name, options in (("whole", {}), ("encoder", {"momentum_encoder": False})):
        MoCoModel(moco_config("resnet18"), **options).save_pretrained(tmp_path / name)
        error = refuse(tmp_path / name / "model.safetensors", tmp_path / "out")
        assert f"has the weights of a model directory without its settings: pass {tmp_path / name}" in error
    assert not (tmp_path / "out").exists()


def test_names_longer_than_a_file_system_takes_are_refused(refuse, tmp_path):
    lincls(tmp_path / "there.pth.tar")
    for to in FORMATS:
        error = refuse(tmp_path / "there.pth.tar", tmp_path / ("n" * 300 + ENDINGS[to]), "--to", to)
        assert "File name too long" in error
        assert "name another output" in error
    assert "is not a file, a folder or a Hub repository" in refuse("n" * 300, tmp_path / "out")
    assert "does not exist" in refuse("n" * 300 + ".pth", tmp_path / "out")


def test_what_is_there_is_never_overwritten(refuse, tmp_path):
    lincls(tmp_path / "there.pth.tar")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "link"):
        for to in FORMATS:
            error = refuse(tmp_path / "there.pth.tar", tmp_path / name, "--to", to)
            assert f"{name} exists and is not overwritten: name another output" in error
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "folder").iterdir())


@contextmanager
def files_no_larger_than(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("to", FORMATS)
def test_nothing_is_half_written(refuse, tmp_path, to):
    lincls(tmp_path / "there.pth.tar")
    with files_no_larger_than(1_000_000):  # as on a full disk
        error = refuse(tmp_path / "there.pth.tar", tmp_path / "new" / f"out{ENDINGS[to]}", "--to", to)
    print(error.replace(str(tmp_path), ""))
    assert "cannot be written" in error
    assert not list((tmp_path / "new").iterdir())
    below_a_file = tmp_path / "there.pth.tar" / f"out{ENDINGS[to]}"
    assert "cannot be written" in refuse(tmp_path / "there.pth.tar", below_a_file, "--to", to)


def test_what_was_published_is_converted_too_and_its_card_says_where_it_came_from(convert, tmp_path):
    official(tmp_path / "moco.pth.tar", "resnet18", mlp, K, False)
    convert(tmp_path / "moco.pth.tar", tmp_path / "model")
    model, processor = load_published(str(tmp_path / "model"), training_state=True)
    args = PublishArguments(include_training_state=True)
    publish(str(tmp_path / "model"), model, processor, "org/name", args, tmp_path / "published")
    assert (
        "Converted from moco.pth.tar (official MoCo, epoch 200)" in (tmp_path / "published" / "README.md").read_text()
    )
    convert(tmp_path / "published", tmp_path / "back.pth.tar", "--to", "official")
    before, after = (torch.load(tmp_path / f"{name}.pth.tar", weights_only=True) for name in ("moco", "back"))
    assert_equal(after["state_dict"], before["state_dict"])
