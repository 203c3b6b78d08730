"""Runs that are published: pushed, refused, and their cards."""

import shutil
from pathlib import Path

import pytest
from hub_server import metadata_errors
from huggingface_hub import ModelCard

from modeling_moco import MoCoModel
from training.hub.publish import PublishArguments, load_published, publish


def push(script, *words: str) -> None:
    script("push_to_hub").main(list(words))


def model_of(folder: Path) -> MoCoModel:
    return MoCoModel.from_pretrained(folder).eval()


def card_of(source: Path, folder: Path) -> tuple[str, ModelCard]:
    model, processor = load_published(str(source), training_state=False)
    publish(str(source), model, processor, "org/name", PublishArguments(), folder)
    text = (folder / "README.md").read_text()
    assert metadata_errors(text) == []
    return text, ModelCard(text)


def copied(run: Path, source: Path) -> Path:
    """A run without its checkpoints, evaluations and figures."""
    shutil.copytree(run, source, ignore=shutil.ignore_patterns("checkpoint*", "linear_probe*", "finetune*", "*.png"))
    return source


def refused(script, capsys, *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        push(script, *words)
    assert error.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line
