"""What belongs to this machine or its user stays there: paths, names, tokens, pictures."""

import json
import re
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import TOKEN
from PIL import Image
from published_runs import card_of, copied, push

from training.engine.run_folder import is_public
from training.hub.model_card import public_name
from training.hub.publish import PublishArguments, list_files, load_published, publish
from training.hub.repository import PublishCallback
from training.trainer import MoCoTrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")  # and httpx2: the client's own use of them


def test_links_and_files_of_others_stay_at_home(run, tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (4, 4)).save(outside)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (source / name).write_bytes((run / name).read_bytes())
    (source / "neighbours.png").symlink_to(outside)
    (source / "notes.txt").write_text("mine")
    (source / "features").mkdir()
    (source / ".results.json.lock").touch()
    model, processor = load_published(str(source), training_state=False)
    publish(str(source), model, processor, "org/name", PublishArguments(), tmp_path / "published")
    names = list_files(tmp_path / "published")
    assert not [
        name for name in names if "neighbours" in name or "notes" in name or "lock" in name or "features" in name
    ]
    assert "neighbours" not in (tmp_path / "published" / "README.md").read_text()


def test_settings_that_say_where_something_is_stay_at_home(run, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "metrics.json"):
        (source / name).write_bytes((run / name).read_bytes())
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(content | {"my_path": "/secret/place"}))
    metrics = json.loads((source / "metrics.json").read_text())
    metrics["data"]["local"] = True
    (source / "metrics.json").write_text(json.dumps(metrics))
    training = {"learning_rate": 0.1, "optim": "lars", "lr_milestones": [1], "accelerator_config": "/secret/site.json"}
    training |= {"learning_rate_scaling": "linear", "global_batch_size": 1024}
    training |= {"deepspeed": {"at": "/secret/zero.json"}, "resume_from_checkpoint": "/secret/runs"}
    recipe = {"data": {"dataset_name": "secret/my birds"}, "training": training}
    (source / "recipe.yaml").write_text(json.dumps(recipe))
    text, card = card_of(source, tmp_path / "published")
    for name in list_files(tmp_path / "published"):
        assert b"secret" not in (tmp_path / "published" / name).read_bytes(), name
    assert card.data.datasets is None
    assert "dataset_name: my birds" in text
    for shown in ("learning_rate: 0.1", "optim: lars", "- 1", "Learning rate: 0.1 x 1024/256 = 0.4."):
        assert shown in text
    metrics["data"]["local"] = False
    (source / "metrics.json").write_text(json.dumps(metrics))
    (source / "recipe.yaml").write_text(json.dumps(recipe | {"data": {"dataset_name": "org/birds"}}))
    assert card_of(source, tmp_path / "again")[1].data.datasets == ["org/birds"]
    (tmp_path / "elsewhere.yaml").write_text(json.dumps({"about": {"title": "another's"}}))
    (source / "recipe.yaml").unlink()
    (source / "recipe.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    with pytest.raises(ValueError, match=r"recipe\.yaml leads out of") as refused:
        card_of(source, tmp_path / "linked")
    assert "another's" not in str(refused.value)


def private_words(source: Path) -> dict[str, tuple[str, str]]:
    """Words of a title: what the refusal calls them, and what it must not repeat."""
    return {
        f"birds of {source}/here": ("the folder of the model", "-"),
        "birds of /data/birds": ("a path (/data/birds)", "-"),
        "birds of C:\\data": ("a path (C:", "-"),
        "birds of jane's": ("your user name (jane)", "-"),
        "birds on aviary7": ("the name of this machine (aviary7)", "-"),
        "birds by hf_" + "a1" * 17: ("a token or a password", "a1a1"),
        "birds by ghp_" + "a1" * 18: ("a token or a password", "a1a1"),
        "birds of https://jo:hunter2@host": ("a token or a password", "hunter2"),
        f"birds by {TOKEN}": ("your token", TOKEN),
    }


@pytest.mark.parametrize("number", range(9))
def test_what_belongs_to_this_machine_stops_a_title(number, hub, run, tmp_path, monkeypatch):
    monkeypatch.setenv("LOGNAME", "jane")
    monkeypatch.setattr(socket, "gethostname", lambda: "aviary7.example.org")
    source = copied(run, tmp_path / "source")
    title, (what, secret) = list(private_words(source).items())[number]
    (source / "recipe.yaml").write_text(json.dumps({"about": {"title": title}}))
    with pytest.raises(
        ValueError, match=r"nothing is published, .* in line \d+ of README\.md.*: take it out of"
    ) as refused:
        card_of(source, tmp_path / "published")
    assert what in str(refused.value)
    assert secret == "-" or secret not in str(refused.value)


def test_a_name_that_everybodys_card_has_says_nothing(hub, run, tmp_path, monkeypatch):
    source = copied(run, tmp_path / "source")
    (source / "recipe.yaml").write_text(json.dumps({"about": {"title": "birds of a root"}}))
    for user, host in (("root", "localhost"), ("name", "org"), ("torch", "image")):
        monkeypatch.setenv("LOGNAME", user)
        monkeypatch.setenv("HOME", f"/{user}")  # no part of org/name
        monkeypatch.setattr(socket, "gethostname", lambda name=host: name)
        card_of(source, tmp_path / user)


def test_local_datasets_lose_their_path(tmp_path, monkeypatch):
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path)
    assert public_name(str(tmp_path / "birds")) == public_name("birds") == public_name("./birds") == "birds"
    assert public_name("/gone/birds") == "birds"
    assert public_name("../gone/birds") == "birds"
    assert public_name("ILSVRC/imagenet-1k") == "ILSVRC/imagenet-1k"
    assert public_name("digits") == "digits"


@pytest.fixture
def of_photographs(run, tmp_path) -> Path:
    """The run as if its images had been a folder of this machine."""
    folder = Path(shutil.copytree(run, tmp_path / "mine"))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["data"] |= {"dataset": str(tmp_path / "photographs"), "local": True}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.mark.parametrize("known", [True, False])
def test_pictures_of_a_local_dataset_stay_here_unless_they_are_asked_for(of_photographs, known, script, capsys):
    if not known:  # a folder of an older version
        metrics = json.loads((of_photographs / "metrics.json").read_text())
        del metrics["data"]["local"]
        (of_photographs / "metrics.json").write_text(json.dumps(metrics))
    for flags, published in (([], False), (["--include_pictures"], True)):
        push(script, str(of_photographs), "org/mine", "--dry_run", *flags)
        shown = capsys.readouterr().out
        files, card = re.findall(r"^(\S+\.png) +[\d.,]+ MB", shown, re.M), shown.partition("---")[2]
        assert ("neighbours.png" in files) == ("](neighbours.png)" in card) == published
        assert {"training_curves.png", "tsne.png"} <= set(files)
        left_out = "and is left out, for not everybody may see the dataset: --include_pictures publishes it"
        (line,) = re.findall(r"^neighbours\.png shows .*$", shown, re.M)
        assert "images of the train split" in line
        assert (left_out in line) == (not published)
        assert "tsne.png shows a point for each image and the names of the classes, no image" in shown


def test_pictures_of_the_digits_are_published(run, script, capsys):
    push(script, str(run), "org/run", "--dry_run")
    shown = capsys.readouterr().out
    assert re.search(r"^neighbours\.png +[\d.,]+ MB", shown, re.M)
    assert "left out" not in shown


def test_a_run_that_publishes_itself_keeps_them_too(of_photographs, hub, tmp_path):
    for include, name in ((False, "without"), (True, "with")):
        args = MoCoTrainingArguments(
            output_dir=str(tmp_path / name), push_to_hub=True, hub_model_id=f"org/{name}", use_cpu=True
        )
        publisher = PublishCallback.of_run(args, include)
        publisher.prepare()
        publisher.send_last(of_photographs)
        names = {file.rfilename for file in huggingface_hub.HfApi().model_info(f"org/{name}").siblings}
        assert ("neighbours.png" in names) == include
        assert "tsne.png" in names


@pytest.mark.parametrize(
    ("private", "gated", "published"), [(False, False, True), (True, False, False), (False, "auto", False)]
)
def test_pictures_of_a_hub_dataset_are_published_where_everybody_may_see_them(
    hub, run, private, gated, published, script, capsys, tmp_path
):
    name = f"org/{'private' if private else 'gated' if gated else 'public'}-birds"  # the answer is kept by name
    hub.create(f"datasets/{name}", private).gated = gated
    folder = Path(shutil.copytree(run, tmp_path / "mine"))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["data"] |= {"dataset": name}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    push(script, str(folder), "org/mine", "--dry_run")
    (line,) = re.findall(r"^neighbours\.png shows .*$", capsys.readouterr().out, re.M)
    assert ("and is left out, for not everybody may see the dataset" in line) == (not published)


def test_pictures_stay_here_where_the_hub_does_not_know_the_dataset_or_cannot_be_asked(hub):
    assert not is_public("org/unknown")
    hub.create("datasets/org/away")
    hub.faults = [["datasets/org/away", 500, 99]]
    assert not is_public("org/away")
    assert is_public("digits")
