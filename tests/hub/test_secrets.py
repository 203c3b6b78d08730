"""A token, and a password in a URL, are in nothing that a run leaves, prints or publishes."""

import os
from pathlib import Path

import hub_server
import pytest
import torch
from huggingface_hub import constants, get_token
from tiny_trainer import TINY, build, image_rows

from training.trainer import MoCoTrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")  # and httpx2: the client's own use of them
TOKEN = "hf_" + "Secret0" * 5
COMMANDS = {
    "pretrain": ["--recipe", "quickstart"],
    "knn": ["RUN"],
    "linear_probe": ["RUN"],
    "finetune": ["RUN"],
    "report": ["RUN"],
    "push_to_hub": ["RUN", "org/name", "--dry_run"],
    "convert": ["RUN", "out", "--to", "official"],
    "benchmark": ["step"],
}
GIVEN = {
    "a flag": ["--hub_token", TOKEN],
    "its other spelling": ["--hub-token", TOKEN],
    "one word": [f"--hub_token={TOKEN}"],
    "the other one word": [f"--hub-token={TOKEN}"],
    "another flag": ["--run_name", TOKEN],
    "a URL": [f"--dataset_name=https://user:{TOKEN}@host/data"],
}


def traces(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    return [str(path) for path in (*files, *folder.rglob("*")) if path in files or TOKEN in path.name]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_or_repeats_a_token(command, given, script, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        script(command).main([*COMMANDS[command], *GIVEN[given]])
    assert end.value.code == 2
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err
    assert any(
        words in said.err for words in ("set HF_TOKEN", "has a token or a password", "flag --run_name is unknown")
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_nothing_that_a_run_leaves_has_the_token(hub, script, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setattr(hub_server, "TOKEN", TOKEN)
    home, run = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.delenv("HF_TOKEN")
    assert get_token() == TOKEN
    flags = ["--num_train_epochs", "1", "--report_to", "tensorboard", "--output_dir", str(run), "--push_to_hub", "True"]
    words = [*TINY, *flags, "--hub_model_id", "org/run"]
    script("pretrain").main(words)
    (home / "token").unlink()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    script("linear_probe").main([str(run), "--use_cpu", "--num_train_epochs", "1", "--disable_tqdm", "True"])
    script("push_to_hub").main([str(run), "org/again", "--include_training_state"])
    left = {path.name for path in run.rglob("*")}
    assert {"training_args.bin", "checkpoint-4", "results.json", "recipe.yaml", "report.html", "linear_probe"} <= left
    assert any(name.startswith("events.out.tfevents") for name in left)
    assert set(hub.repos) == {"org/run", "org/again"}
    assert not traces(tmp_path)
    for name, repository in hub.repos.items():
        for files in repository.commits.values():
            assert not [path for path, file in files.items() if TOKEN.encode() in file.data], name
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err + caplog.text


def test_a_program_that_gives_the_arguments_a_token_is_told_where_it_belongs(tmp_path):
    with pytest.raises(
        ValueError, match=r"hub_token must be None, for Trainer writes .*: log in .*, or set HF_TOKEN"
    ) as refused:
        MoCoTrainingArguments(output_dir=str(tmp_path), use_cpu=True, hub_token=TOKEN)
    assert TOKEN not in str(refused.value)


def test_trainers_own_file_has_no_token_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_TOKEN", TOKEN)
    build(image_rows(), tmp_path).save_model()
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).hub_token is None
    assert not traces(tmp_path)
