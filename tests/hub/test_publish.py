"""Publishing to a Hub on this machine with the true client: pushed once, loaded everywhere; and what goes wrong on the way."""

import ast
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from hub_server import TOKEN, environment, metadata_errors
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from PIL import Image
from tiny_trainer import TINY, build, image_rows

from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoImageProcessorPil, MoCoModel
from training.engine.checkpoints import newest_complete
from training.engine.results import Result, append_results, encoder_digest
from training.evaluation.linear_probe import parse_linear_probe
from training.evaluation.probe_arguments import LinearProbeArguments
from training.hub.model_card import public_name
from training.hub.origin import read_origin
from training.hub.publish import PublishArguments, list_files, load_published, publish
from training.hub.repository import PublishCallback, Repository
from training.trainer import MoCoTrainingArguments

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")  # and httpx2: the client's own use of them
# What a stranger does: no package of ours, an empty cache. Prints a line of JSON.
STRANGER = """
import sys
sys.modules["modeling_moco"] = sys.modules["training"] = None  # an import would raise
import json, timm, torch, transformers
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
image, found = Image.open(sys.argv[1]).convert("RGB"), {}
def logits(name, model, pixels):
    with torch.no_grad():
        outputs = model.eval()(pixels)
    found[name] = (outputs if isinstance(outputs, torch.Tensor) else outputs.logits)[0].tolist()
pixels = AutoImageProcessor.from_pretrained("org/probe")(image, return_tensors="pt").pixel_values
logits("TimmWrapper", AutoModelForImageClassification.from_pretrained("org/probe"), pixels)
remote = AutoModelForImageClassification.from_pretrained("org/probe", trust_remote_code=True)
found["remote class"] = type(remote).__module__
logits("remote code", remote, pixels)
model = timm.create_model("hf-hub:org/probe", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
logits("timm", model, transform(image)[None])
for name, trust in (("pipeline", None), ("remote pipeline", True)):
    classify = pipeline("image-classification", model="org/probe", trust_remote_code=trust, device="cpu")
    found[name] = {entry["label"]: entry["score"] for entry in classify(image, top_k=10)}
encoder = AutoModel.from_pretrained("org/run", trust_remote_code=True).eval()
pixels = AutoImageProcessor.from_pretrained("org/run", trust_remote_code=True)(image, return_tensors="pt").pixel_values
with torch.no_grad():
    found["features"] = encoder(pixels).pooler_output[0].tolist()
extract = pipeline("image-feature-extraction", model="org/run", device="cpu")
found["feature pipeline"] = extract(image, pool=True, return_tensors=True)[0].tolist()
small = AutoModel.from_pretrained("org/small", trust_remote_code=True)
found["small"] = type(small.encoder_q.maxpool).__name__
found["snapshot"] = snapshot_download("org/probe")
try:
    AutoModel.from_pretrained("org/secret", trust_remote_code=True)
except OSError as error:
    found["secret"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    """A pretraining run, the probe and the fine-tuning that followed it, with all that they leave."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    script("pretrain").main([*TINY, "--num_train_epochs", "2", "--output_dir", str(folder)])
    short = ["--use_cpu", "--num_train_epochs", "1", "--disable_tqdm", "True"]
    script("linear_probe").main([str(folder), *short])
    script("finetune").main([str(folder), *short, "--label_fraction", "1", "--global_batch_size", "16"])
    return folder


def push(script, *words: str) -> None:
    script("push_to_hub").main(list(words))


@pytest.mark.slow
def test_what_is_pushed_is_loaded_by_a_stranger_and_equals_ours(hub, run, script, tmp_path):
    small = tmp_path / "small"
    model = MoCoModel.from_pretrained(run)
    model.config.stem, model.encoder_q.maxpool = "no_max_pool", torch.nn.Identity()
    model.save_pretrained(small)
    MoCoImageProcessorPil.from_pretrained(run).save_pretrained(small)
    push(script, str(run), "org/run")
    push(script, str(run / "linear_probe"), "org/probe")
    push(script, str(small), "org/small")
    push(script, str(run), "org/secret", "--private")
    assert hub.repos["org/secret"].private

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "image.png")]
    env = environment(hub, tmp_path / "home")
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])

    classifier = MoCoForImageClassification.from_pretrained(run / "linear_probe").eval()
    pixels = MoCoImageProcessorPil.from_pretrained(run)(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = classifier(pixels).logits[0]
        features = model_of(run)(pixels).pooler_output[0]
    for name in ("TimmWrapper", "remote code", "timm"):
        assert found[name] == pytest.approx(logits.tolist(), abs=1e-6 * logits.abs().max().item()), name
    assert found["remote class"].startswith("transformers_modules.")
    expected = {str(i): p for i, p in enumerate(logits.softmax(dim=0).tolist())}
    for name in ("pipeline", "remote pipeline"):
        assert found[name] == pytest.approx(expected, rel=1e-4), name
    for name in ("features", "feature pipeline"):
        assert found[name] == pytest.approx(features.tolist(), abs=1e-6 * features.abs().max().item()), name
    assert found["small"] == "Identity"
    assert set(list_files(Path(found["snapshot"]))) == set(hub.files("org/probe"))
    assert "401" in found["secret"] or "token" in found["secret"]


def model_of(folder: Path) -> MoCoModel:
    return MoCoModel.from_pretrained(folder).eval()


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


# The card


def test_the_card_says_what_was_measured_and_nothing_else(run, tmp_path):
    model, processor = load_published(str(run / "linear_probe"), training_state=False)
    folder = tmp_path / "published"
    publish(str(run / "linear_probe"), model, processor, "org/probe", PublishArguments(), folder)
    text = (folder / "README.md").read_text()
    assert metadata_errors(text) == []
    card = ModelCard(text)
    origin = read_origin(run / "linear_probe", model)
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "image-classification"
    assert sorted(r.metric_value for r in card.data.eval_results) == sorted(
        round(r["value"], 2) for r in origin.results
    )
    assert {r.dataset_name for r in card.data.eval_results} == {"digits"}
    assert [r.metric_name for r in card.data.eval_results if "kNN" in r.metric_name]
    for figure in ("training_curves.png", "neighbours.png", "tsne.png"):
        assert f"]({figure})" in text
        assert (folder / figure).is_file()
    assert "queue_size: 64" in text  # the recipe
    assert "expected" not in text
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"{metrics['processes']} x {metrics['hardware']}" in text
    assert "emission" not in text.lower()
    assert "{{" not in text
    assert "{%" not in text


def card_of(source: Path, folder: Path) -> tuple[str, ModelCard]:
    model, processor = load_published(str(source), training_state=False)
    publish(str(source), model, processor, "org/name", PublishArguments(), folder)
    text = (folder / "README.md").read_text()
    assert metadata_errors(text) == []
    return text, ModelCard(text)


def test_a_checkpoint_is_not_described_as_the_end_of_its_run(run, tmp_path):
    checkpoint = run / "checkpoint-4"
    assert json.loads((run / "metrics.json").read_text())["steps"] == 8
    text, _ = card_of(checkpoint, tmp_path / "published")
    assert "queue_size: 64" in text
    assert "8 steps" not in text
    assert "](" + "neighbours.png" not in text
    assert "Nothing has been measured on these weights" in text


def test_the_card_of_a_fine_tuned_model_tells_it_from_a_probe(run, tmp_path):
    text, card = card_of(run / "finetune_100pct", tmp_path / "tuned")
    metrics = json.loads((run / "finetune_100pct" / "metrics.json").read_text())
    assert round(metrics["top1"], 2) in [result.metric_value for result in card.data.eval_results]
    assert all("fine-tuning" in result.metric_name for result in card.data.eval_results)
    assert "with labels, as a classifier" in text
    assert "It was trained without labels" not in text
    assert "neighbours.png" not in text  # the encoder's before it was tuned
    assert "fine-tuning:\n" in text
    digest = encoder_digest(MoCoModel.from_pretrained(run))
    data = {"dataset": "digits", "split": "test"}
    append_results(run, [Result("linear probe, cached features", "top1", 50.0, 16)], model=digest, data=data)
    tuned = MoCoForImageClassification.from_pretrained(run / "finetune_100pct").moco
    others = [Result(f"{kind} of 30 epochs", "top1", 99.0, 16) for kind in ("linear probe", "fine-tuning")]
    append_results(run / "finetune_100pct", others, model=encoder_digest(tuned), data=data)
    knn = Result("weighted kNN, k 5, T 0.1", "top1", 75.0, 16)
    append_results(run / "finetune_100pct", [knn], model=encoder_digest(tuned), data=data)
    _, card = card_of(run / "finetune_100pct", tmp_path / "evaluated")  # by classifiers that began with its encoder
    names = [result.metric_name for result in card.data.eval_results]
    assert any("weighted kNN" in name for name in names)
    assert not any("of 30 epochs" in name for name in names)
    probed, card = card_of(run / "linear_probe", tmp_path / "probed")
    names = [result.metric_name for result in card.data.eval_results]
    assert {"official", "kNN"} == {word for word in ("official", "kNN", "cached", "fine-tuning") if word in str(names)}
    assert "probe:\n" in probed
    encoder, card = card_of(run, tmp_path / "encoder")
    assert [result for result in card.data.eval_results if "fine-tuning" in result.metric_name]
    assert "probe:\n" not in encoder


def test_the_card_of_a_probe_on_a_fine_tuned_model_does_not_hide_its_labels(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / run.name)
    tuned = copy / "finetune_100pct"
    for probe in (copy / "linear_probe", shutil.copytree(copy / "linear_probe", tuned / "linear_probe")):
        recipe = yaml.safe_load((probe / "recipe.yaml").read_text())
        recipe["encoder"]["model"] = str(probe.parent)
        (probe / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        text, _ = card_of(probe, tmp_path / f"published_{probe.parent.name}")
        assert ("without labels, fine-tuned with labels, and a classifier" in text) == (probe.parent == tuned)
        assert ("It was trained without labels" in text) == (probe.parent == copy)
        assert ("neighbours.png" in text or "tsne.png" in text) == (probe.parent == copy)  # of the encoder before


def test_a_probe_elsewhere_says_that_its_encoder_was_fine_tuned(run, tmp_path):
    for source, tuned in ((run, False), (run / "finetune_100pct", True)):
        probe = shutil.copytree(run / "linear_probe", tmp_path / f"of_{source.name}")
        again = probe
        for _ in range(2):  # of that model, and of the probe of it
            recipe = yaml.safe_load((probe / "recipe.yaml").read_text())
            parsed = parse_linear_probe([str(source), "--output_dir", str(tmp_path / "new"), "--use_cpu"])
            recipe["encoder"] = parsed.settings["encoder"]
            (again / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            text, _ = card_of(again, tmp_path / f"published_{again.name}")
            assert ("without labels, fine-tuned with labels, and a classifier" in text) == tuned
            assert ("It was trained without labels" in text) == (not tuned)
            source, again = again, shutil.copytree(run / "linear_probe", tmp_path / f"{again.name}_again")
    random = parse_linear_probe([str(run / "finetune_100pct"), "--random_encoder", "--use_cpu"])
    assert "fine_tuned_before" not in random.settings["encoder"]


def test_what_lies_around_a_model_that_is_not_its_run_stays_out(run, tmp_path):
    shutil.copytree(run / "linear_probe", tmp_path / "stranger" / "probe")
    (tmp_path / "stranger" / "recipe.yaml").write_text("- a list")
    (tmp_path / "stranger" / "metrics.json").write_text("{")
    shutil.copyfile(run / "tsne.png", tmp_path / "stranger" / "tsne.png")
    text, _ = card_of(tmp_path / "stranger" / "probe", tmp_path / "published")
    assert "tsne.png" not in text
    assert not (tmp_path / "published" / "tsne.png").exists()


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


def copied(run: Path, source: Path) -> Path:
    """A run without its checkpoints, evaluations and figures."""
    shutil.copytree(run, source, ignore=shutil.ignore_patterns("checkpoint*", "linear_probe*", "finetune*", "*.png"))
    return source


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


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "[here](javascript:alert(1))",
    "![](http://host/pixel.png)",
    "```\n<script>alert(1)</script>\n```",
    "a | b\n|---|---|\n| <b>x</b> |",
    "x\n---\nlicense: other\n---\n",
    "# Free\n\n> of charge\n\n    code",
    "&lt;b&gt; <!-- *a* _b_ ~~c~~ $d$ `e`",
    "\x1b[2J\u202eevil\x07",
]


@pytest.mark.parametrize("words", HOSTILE)
def test_words_of_others_stay_words_in_the_card(words, run, tmp_path):
    source = copied(run, tmp_path / "source")
    recipe = {"about": {"title": words, "source": words}, "data": {"dataset_name": words, "train_split": words}}
    recipe |= {"model": {"```": words}, "training": {"optim": words}}
    (source / "recipe.yaml").write_text(json.dumps(recipe))
    (source / "conversion.json").write_text(json.dumps({"file": words, "format": words}))
    metrics = json.loads((source / "metrics.json").read_text())
    metrics |= {"hardware": words, "commit": words, "versions": {"torch": words}, "data": {"local": False}}
    (source / "metrics.json").write_text(json.dumps(metrics))
    data = {"dataset": words, "split": words, "local": False}
    result = Result(words, words, 50.0, 4, feature=words, settings={words: words})
    append_results(source, [result], model=encoder_digest(model_of(source)), data=data)
    text, card = card_of(source, tmp_path / "published")
    assert metadata_errors(text) == []
    assert card.data.license == "mit"
    body = text.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    kinds = [inner for token in tokens for inner in (token, *(token.children or []))]
    assert not [token for token in kinds if token.type.startswith("html")]
    links = {token.attrs.get("href", token.attrs.get("src")) for token in kinds if token.type in ("link_open", "image")}
    assert links <= {"https://arxiv.org/abs/2003.04297"}
    assert [token.info for token in kinds if token.type == "fence"] == ["python"] * 4 + ["yaml", "bibtex"]
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == ["name", "Use", "Training", "Evaluation", "Limits", "Citation"]
    rows = [token for token in tokens if token.type == "tr_open"]
    assert len(rows) == 1 + len(read_origin(source, model_of(source)).results)
    assert all(line.isprintable() for line in text.splitlines())


def test_a_card_names_the_version_that_its_projection_head_has(tmp_path):
    for head, words in (("linear", "MoCo v1, [arXiv:1911.05722]"), ("mlp", "MoCo v2, [arXiv:2003.04297]")):
        model = MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=64, projection_head=head))
        model.save_pretrained(tmp_path / head)
        MoCoImageProcessorPil().save_pretrained(tmp_path / head)
        assert words in card_of(tmp_path / head, tmp_path / f"{head}_published")[0]


def test_the_card_has_results_of_these_weights_alone(run, tmp_path):
    model, processor = load_published(str(run), training_state=False)
    source = tmp_path / "source"
    model.save_pretrained(source)
    processor.save_pretrained(source)
    data = {"dataset": str(tmp_path / "secret" / "birds"), "split": "test", "split_revision": "fingerprint 1"}
    append_results(source, [Result("mine", "top1", 50.0, 100)], model=encoder_digest(model), data=data)
    append_results(source, [Result("mine", "top1", 60.0, 100)], model=encoder_digest(model), data=data)  # later: counts
    append_results(source, [Result("other", "top1", 99.0, 100)], model="another digest", data=data)
    publish(str(source), model, processor, "org/name", PublishArguments(), tmp_path / "published")
    (result,) = ModelCard.load(tmp_path / "published" / "README.md").data.eval_results
    assert (result.metric_value, result.dataset_name, result.dataset_revision) == (60.0, "birds", None)
    text = (tmp_path / "published" / "README.md").read_text()
    assert "secret" not in text
    assert "Nothing is recorded of how these weights were trained" in text


def test_the_code_in_the_card_names_what_is_there(run, tmp_path):
    model, processor = load_published(str(run), training_state=False)
    publish(str(run), model, processor, "org/name", PublishArguments(), tmp_path / "published")
    text = (tmp_path / "published" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 4
    for block in blocks:
        compile(block, "README.md", "exec")
        for module, names in re.findall(r"^from (\w+) import (.*)$", block, re.M):
            for name in names.split(", "):
                assert getattr(__import__(module), name)


def test_local_datasets_lose_their_path(tmp_path, monkeypatch):
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path)
    assert public_name(str(tmp_path / "birds")) == public_name("birds") == public_name("./birds") == "birds"
    assert public_name("/gone/birds") == "birds"
    assert public_name("../gone/birds") == "birds"
    assert public_name("ILSVRC/imagenet-1k") == "ILSVRC/imagenet-1k"
    assert public_name("digits") == "digits"


# What goes wrong


def refused(script, capsys, *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        push(script, *words)
    assert error.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


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


def test_without_room_for_a_folder_nothing_happens(hub, run, script, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    assert "set TMPDIR" in refused(script, capsys, str(run), "org/run")


def test_without_a_token_or_a_right_nothing_happens(hub, run, script, capsys, monkeypatch):
    hub.may_write = False
    assert "use a token that may write there" in refused(script, capsys, str(run), "org/run")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "HF_TOKEN" in refused(script, capsys, str(run), "org/run")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    assert "no token to write to org/run" in refused(script, capsys, str(run), "org/run")
    assert not hub.repos


def test_another_model_is_not_overwritten(hub, run, script, capsys):
    repo = hub.create("org/bert")
    repo.commits[repo.branches["main"]]["pytorch_model.bin"] = repo.commits[repo.branches["main"]][".gitattributes"]
    assert "org/bert holds something else (pytorch_model.bin)" in refused(script, capsys, str(run), "org/bert")
    assert not repo.log


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
    files["notes.txt"] = files["resnet/config.json"] = files[".gitattributes"]
    push(script, str(run), "org/run")
    names = hub.files("org/run").keys()
    assert "notes.txt" in names
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
    assert ModelCard(hub.files("org/run", "trial")["README.md"].decode()).data.license == "cc0-1.0"
    assert "license 'mine' is not known" in refused(script, capsys, str(run), "org/run", "--license", "mine")
    assert hub.files("org/run") == before


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


# Pretraining


@pytest.mark.slow
def test_a_run_publishes_every_save_and_its_end(hub, script, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = [*TINY, "--num_train_epochs", "3", "--output_dir", str(folder)]
    flags += ["--push_to_hub", "True", "--hub_model_id", "org/live"]
    script("pretrain").main(flags)
    assert "Published: http" in capsys.readouterr().out
    *saves, last = hub.repos["org/live"].log
    assert last == "End of training"
    assert saves  # one that is still under way lets the next go by
    assert set(saves) <= {f"Training in progress, step {step}" for step in (4, 8, 12)}
    assert TOKEN not in (folder / "recipe.yaml").read_text()
    files = hub.files("org/live")
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    assert "knn" in files["README.md"].decode().lower()
    for name, data in files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(data)
    assert encoder_digest(model_of(tmp_path / "pulled")) == encoder_digest(model_of(folder))


def test_transformers_trainer_never_sees_that_a_run_is_published(tmp_path):
    args = MoCoTrainingArguments(output_dir=str(tmp_path), use_cpu=True, push_to_hub=True, hub_model_id="org/live")
    assert args.publish
    assert not args.push_to_hub  # all that makes Trainer upload by itself
    trainer = build(image_rows(), tmp_path)
    with pytest.raises(ValueError, match="a trainer does not publish"):
        trainer.push_to_hub()


def test_one_upload_at_a_time_which_nobody_waits_for_but_the_last(hub, run, monkeypatch):
    uploads = PublishCallback(Repository("org/live"), every_save=True)
    uploads.prepare()
    hub.open.clear()
    late = threading.Timer(300, hub.open.set)  # or a test that fails would not end
    late.daemon = True
    late.start()
    uploads.send(run, "first")
    uploads.send(run / "checkpoint-4", "second, while the first is under way")
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    # The first goes on when the run waits for it; a run that does not wait would have begun the last by then.
    join = threading.Thread.join

    def let_go_and_join(thread, timeout=None):
        if threading.current_thread() is threading.main_thread():
            hub.open.set()
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", let_go_and_join)
    uploads.send_last(run / "checkpoint-8", "last")
    late.cancel()
    steps = [path.split("/")[4] for method, path in hub.requests if method == "POST" and path.startswith("api/models/")]
    assert steps == ["preupload", "commit"] * 2  # nothing of the last was sent while the first was under way
    assert hub.repos["org/live"].log == ["first", "last"]


def test_a_run_that_may_not_publish_does_not_begin(hub, script, tmp_path, capsys):
    flags = [*TINY, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "run"), "--push_to_hub", "True"]
    hub.may_write = False
    for more, words in (
        ([], "use a token that may write there"),
        (["--hub_strategy", "checkpoint"], "are pickles"),
    ):
        with pytest.raises(SystemExit):
            script("pretrain").main([*flags, "--hub_model_id", "org/live", *more])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script("linear_probe").main([str(tmp_path), "--dataset_name", "digits", "--push_to_hub", "True"])
    assert "flag --push_to_hub is unknown" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"scripts/push_to_hub\.py"):
        LinearProbeArguments(output_dir=str(tmp_path), use_cpu=True, push_to_hub=True)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.slow
def test_a_failed_upload_does_not_end_a_run(hub, script, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    hub.breaks = 10**6
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")  # nor is there room
    folder = tmp_path / "run"
    flags = [*TINY, "--num_train_epochs", "1", "--output_dir", str(folder), "--push_to_hub", "True"]
    with pytest.raises(SystemExit):  # its end says so
        script("pretrain").main([*flags, "--hub_model_id", "org/live"])
    assert "set TMPDIR" in caplog.text
    assert "set TMPDIR" in capsys.readouterr().err
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(SystemExit):
        script("pretrain").main([*flags, "--hub_model_id", "org/live"])
    assert "give the same command again" in capsys.readouterr().err
    assert (folder / "results.json").is_file()
    assert newest_complete(folder)[0] == folder / "checkpoint-4"
    assert hub.repos["org/live"].log == []
    hub.breaks = 0
    push(script, str(folder), "org/live")
    assert hub.repos["org/live"].log == ["Publish a MoCo model"]


# The documentation

DOCTEST = """
import doctest, sys
flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
failed, tried = doctest.testfile(sys.argv[1], module_relative=False, optionflags=flags)
sys.exit(f"{failed} of {tried} failed" if failed or tried < 20 else 0)
"""


@pytest.mark.slow
def test_the_examples_of_the_documentation_run_as_printed(hub, script, tmp_path):
    torch.manual_seed(0)
    encoder = MoCoModel(MoCoConfig(queue_size=64))
    labels = {"id2label": {0: "not teal", 1: "teal"}, "label2id": {"not teal": 0, "teal": 1}}
    classifier = MoCoForImageClassification(MoCoConfig(**labels))
    classifier.classifier.weight.data.zero_()
    classifier.classifier.bias.data[1] = 3
    for name, model in (("moco-v2-r50", encoder), ("moco-v2-r50-in1k", classifier)):
        model.save_pretrained(tmp_path / name)
        MoCoImageProcessorPil().save_pretrained(tmp_path / name)
        push(script, str(tmp_path / name), f"org/{name}")
    command = [sys.executable, "-c", DOCTEST, str(ROOT / "docs" / "hub.md")]
    env = environment(hub, tmp_path / "home")
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


BACKBONE = """
import torch
{}
torch.manual_seed(0)
torch.save([stage for stage in backbone.eval()(torch.randn(1, 3, 64, 64)).feature_maps], "maps.pt")
"""


@pytest.mark.slow
def test_auto_backbone_gets_its_weights_from_the_hub(hub, script, tmp_path):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "AutoBackbone.from" in block)
    torch.manual_seed(1)
    model = MoCoModel(MoCoConfig(architecture="resnet18", queue_size=64)).eval()
    model.save_pretrained(tmp_path / "saved")
    MoCoImageProcessorPil().save_pretrained(tmp_path / "saved")
    push(script, str(tmp_path / "saved"), "org/moco-v2-r50")
    command = [sys.executable, "-c", BACKBONE.format(example)]
    env = environment(hub, tmp_path / "home")
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    torch.manual_seed(0)
    stages = model(torch.randn(1, 3, 64, 64), output_hidden_states=True).hidden_states
    for found, expected in zip(torch.load(tmp_path / "maps.pt"), stages[-3:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Pictures of somebody's own images


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
        left_out = "and is left out, for the dataset is local: --include_pictures publishes it"
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
