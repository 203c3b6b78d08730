"""What a push leaves in a repository: one commit, in place of what the push before it wrote."""

from pathlib import Path

import pytest
from hub_server import TOKEN
from huggingface_hub import ModelCard
from published_runs import push, refused

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")  # and httpx2: the client's own use of them


def test_one_commit_holds_what_the_dry_run_showed_and_no_pickle(hub, run, script, tmp_path, capsys):
    push(script, str(run), "org/run", "--dry_run")
    shown = capsys.readouterr().out
    assert not hub.requests
    push(script, str(run), "org/run")
    assert hub.repos["org/run"].log == ["Publish a MoCo model"]
    files = hub.files("org/run")
    assert {name for name in files if name != ".gitattributes"} == {
        line.split()[0] for line in shown.split("\nin all")[0].splitlines()
    }
    assert files["README.md"].decode().strip() in shown
    for name, data in files.items():
        assert Path(name).suffix in (".md", ".json", ".py", ".png", ".safetensors", ""), name
        assert data[:2] not in (b"PK", b"\x80\x02", b"\x80\x04"), name
    private = [str(run), str(Path.home()), TOKEN, "/tmp/"]
    for name, data in files.items():
        assert not [text for text in private if text.encode() in data], name


def test_a_repository_that_was_made_on_the_website_is_filled(hub, run, script, capsys):
    repo = hub.create("org/run")
    files = repo.commits[repo.branches["main"]]
    files["README.md"] = files["LICENSE"] = files[".gitattributes"]
    push(script, str(run), "org/run")
    assert "config.json" in hub.files("org/run")
    hub.create("org/open")
    assert "which is public" in refused(script, capsys, str(run), "org/open", "--private")


def test_weights_of_the_push_before_do_not_stay_behind(hub, run, script, tmp_path):
    push(script, str(run), "org/run", "--torch_export")
    repo = hub.repos["org/run"]
    files = repo.commits[repo.branches["main"]]
    mine = {"notes.txt", "adapter/adapter_model.safetensors", "comparison.png"}
    files |= dict.fromkeys({*mine, "resnet/config.json"}, files[".gitattributes"])
    push(script, str(run), "org/run")
    names = hub.files("org/run").keys()
    assert mine <= names
    assert not [name for name in names if name.startswith(("torch_export/", "resnet/"))]
    assert {"config.json", "model.safetensors", "moco.safetensors", "modeling_moco.py", "tsne.png"} <= names


def test_a_second_push_is_a_new_revision_of_the_same_repository(hub, run, script, capsys):
    push(script, str(run), "org/run")
    push(script, str(run), "org/run", "--license", "apache-2.0")
    assert len(hub.repos["org/run"].log) == 2
    assert ModelCard(hub.files("org/run")["README.md"].decode()).data.license == "apache-2.0"
    before = hub.files("org/run")
    push(script, str(run), "org/run", "--revision", "trial", "--license", "cc0-1.0")
    assert hub.files("org/run") == before
    of_branch = hub.files("org/run", "trial")["README.md"].decode()
    assert ModelCard(of_branch).data.license == "cc0-1.0"
    assert of_branch.count('"org/run", revision="trial"') + of_branch.count('"hf-hub:org/run@trial"') == 5
    assert of_branch.count('"org/run"') + of_branch.count('"hf-hub:') == 5  # none that would load main
    assert "revision=" not in before["README.md"].decode()
    assert "license 'mine' is not known" in refused(script, capsys, str(run), "org/run", "--license", "mine")
    assert hub.files("org/run") == before
