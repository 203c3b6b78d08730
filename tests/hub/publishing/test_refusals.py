"""What goes wrong on the way to the Hub is one line, and nothing is published."""

import ast
import json
import re
import shutil
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from published_runs import copied, push, refused

from modeling_moco import MoCoModel
from training.engine.results import encoder_digest
from training.hub import exports
from training.hub.repository import Repository

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")  # and httpx2: the client's own use of them


def damage(folder: Path, name: str) -> None:
    path = folder / name
    if name == "model.safetensors":
        path.write_bytes(path.read_bytes()[:1000])
    elif name == "config.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architecture": "resnet18"}))
    elif name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save({}, path)
    elif name == "results.json":
        digest = encoder_digest(MoCoModel.from_pretrained(folder))
        path.write_text(json.dumps([{"protocol": "kNN", "model": digest}]))
    else:
        path.write_text({"recipe.yaml": "- a list", "metrics.json": "{", "conversion.json": "[1]"}[name])


DAMAGED = ["model.safetensors", "config.json", "pytorch_model.bin"]
DAMAGED += ["results.json", "recipe.yaml", "metrics.json", "conversion.json"]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_in_one_line(name, hub, run, script, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(run, source, ignore=shutil.ignore_patterns("checkpoint*", "linear_probe", "finetune*"))
    damage(source, name)
    line = refused(script, capsys, str(source), "org/run", "--dry_run")
    assert name in line or "holds no MoCo model with its image processor" in line
    assert "weights_only" not in line


@pytest.mark.parametrize(("section", "name"), [("data", "dataset_name"), ("model", "init_from"), ("encoder", "model")])
def test_a_name_in_a_recipe_that_is_none_is_said(section, name, hub, run, script, tmp_path, capsys):
    source = copied(run, tmp_path / "source")
    recipe = yaml.safe_load((source / "recipe.yaml").read_text())
    (source / "recipe.yaml").write_text(yaml.safe_dump(recipe | {section: recipe.get(section, {}) | {name: [5]}}))
    line = refused(script, capsys, str(source), "org/run", "--dry_run")
    assert f"recipe.yaml has [5] as {name} in {section}, which is no name: correct it" in line


def test_without_room_for_a_folder_nothing_happens(hub, run, script, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    assert "set TMPDIR" in refused(script, capsys, str(run), "org/run")


def test_packages_that_a_format_takes_are_asked_for_before_anything_is_made(hub, run, script, capsys, monkeypatch):
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    assert "onnx (True) needs onnx, onnxruntime, onnxscript: pip" in refused(
        script, capsys, str(run), "org/run", "--onnx"
    )
    assert not hub.requests


@pytest.mark.parametrize("command", [("push_to_hub", "org/probe", "--dry_run"), ("export", "exported", "--timm")])
def test_a_checkpoint_of_a_probe_is_not_taken_for_its_encoder(command, run, script, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (checkpoint,) = (run / "linear_probe").glob("checkpoint-*")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        script(command[0]).main([str(checkpoint), *command[1:]])
    assert "is a checkpoint of a linear probe" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_token_or_a_right_nothing_happens(hub, run, script, capsys, monkeypatch):
    hub.may_write = False
    assert "use a token that may write there" in refused(script, capsys, str(run), "org/run")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "HF_TOKEN" in refused(script, capsys, str(run), "org/run")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    assert "no token to write to org/run" in refused(script, capsys, str(run), "org/run")
    assert not hub.repos


@pytest.mark.parametrize("flags", [[], ["--revision", "trial"]])
def test_another_model_is_not_touched(flags, hub, run, script, capsys):
    repo = hub.create("org/bert")
    repo.commits[repo.branches["main"]]["pytorch_model.bin"] = repo.commits[repo.branches["main"]][".gitattributes"]
    assert "org/bert holds something else (pytorch_model.bin)" in refused(script, capsys, str(run), "org/bert", *flags)
    assert not repo.log
    assert list(repo.branches) == ["main"]


@pytest.mark.parametrize("flags", [["--license", "mine"], ["--license", "mit", "--private"]])
def test_no_repository_is_made_for_what_is_then_refused(flags, hub, run, script, capsys, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(run, source, ignore=shutil.ignore_patterns("checkpoint*", "linear_probe", "finetune*"))
    if "mit" in flags:
        recipe = source / "recipe.yaml"
        recipe.write_text(recipe.read_text() + "about: {title: on /data/secret/birds}\n")
    reason = (
        "would show a path"
        if "mit" in flags
        else 'Invalid metadata in README.md. {"errors": [{"message": "license \'mine\''
    )
    assert reason in refused(script, capsys, str(source), "org/run", "--revision", "trial", *flags)
    assert not hub.repos


@pytest.mark.parametrize("branch", ["more epochs", "", "a..b", "trial/", 'x"y'])
def test_no_repository_is_made_for_a_branch_that_git_cannot_have(branch, hub, run, script, capsys):
    line = refused(script, capsys, str(run), "org/run", "--revision", branch)
    assert f"revision ({branch}) is not a valid name of a branch" in line
    assert not hub.requests
    assert Repository("org/run", revision="v2.0/more-epochs_8").revision


@pytest.mark.parametrize("holds", ["main", "trial"])
def test_the_branch_that_is_written_to_is_the_one_that_is_looked_at(holds, hub, run, script, capsys):
    repo = hub.create("org/run")
    main = repo.branches["main"]
    repo.branches["trial"], repo.commits["other"] = main, dict(repo.commits[main])
    repo.commits["other"]["pytorch_model.bin"] = repo.commits[main][".gitattributes"]
    repo.branches[holds] = "other"
    if holds == "trial":
        line = refused(script, capsys, str(run), "org/run", "--revision", "trial")
        assert "org/run holds something else (pytorch_model.bin)" in line
        assert not repo.log
    else:
        push(script, str(run), "org/run", "--revision", "trial")
        assert "modeling_moco.py" in hub.files("org/run", "trial")


def test_a_repository_without_an_owner_is_the_users(hub, run, script):
    push(script, str(run), "mine")
    assert list(hub.repos) == ["tester/mine"]
    assert "tester/mine" in hub.files("tester/mine")["README.md"].decode()


def test_a_broken_connection_publishes_nothing_and_the_same_command_finishes(hub, run, script, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # between the client's retries
    hub.breaks = 1000
    line = refused(script, capsys, str(run), "org/run")
    assert "give the same command again" in line
    assert hub.repos["org/run"].log == []
    hub.breaks = 0
    push(script, str(run), "org/run")
    assert hub.repos["org/run"].log == ["Publish a MoCo model"]
    sent = [path for method, path in hub.requests if method == "PUT"]
    assert len(sent) == len(set(sent))  # nothing twice


def test_without_a_network_there_is_one_line(hub, run, script, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    hub.close()
    assert "give the same command again" in refused(script, capsys, str(run), "org/run")


def test_the_messages_that_the_documentation_quotes_are_those_of_the_code():
    """Word for word between values, which are names, numbers, what stands in brackets, and "..."."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "training/hub").glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [node.value for node in nodes if isinstance(node.value, str)]
    page = (ROOT / "docs/hub.md").read_text(encoding="utf-8")
    quoted = [message for _, message in re.findall(r"(`+)error: (.+?)\1(?!`)", page)]
    assert len(quoted) > 10
    values = r"\.\.\.|\(.*?\)|: |org/name|dictionary\.queue|a path|\d+|README\.md"
    for message in quoted:
        if not message.startswith("Invalid metadata"):  # which is huggingface_hub's
            for words in filter(None, map(str.strip, re.split(values, message))):
                assert any(words in text for text in texts), (words, message)
