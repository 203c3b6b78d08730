"""The card says what was measured and how the weights came to be, in words that cannot become anything else."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from hub_server import metadata_errors
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from published_runs import card_of, copied, model_of

from modeling_moco import MoCoConfig, MoCoImageProcessorPil, MoCoModel
from training.cli import offered
from training.engine.results import Result, append_results, encoder_digest
from training.hub.model_card import WORDS
from training.hub.origin import read_origin
from training.hub.publish import PublishArguments, load_published, publish
from training.recipe import WITHOUT_RESULT
from training.trainer import MoCoTrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")  # and httpx2: the client's own use of them


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
    assert "with labels of digits, as a classifier" in text
    assert "It was trained without labels" not in text
    assert "neighbours.png" not in text  # the encoder's before it was tuned
    assert "fine-tuning:\n" in text
    digest = encoder_digest(MoCoModel.from_pretrained(run))
    data = {"dataset": "digits", "split": "test"}
    append_results(run, [Result("linear probe, cached features", "top1", 50.0, 16)], model=digest, data=data)
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
        weights = encoder_digest(model_of(probe.parent))
        recipe["encoder"] |= {"model": str(probe.parent), "weights": weights}
        (probe / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        text, _ = card_of(probe, tmp_path / f"published_{probe.parent.name}")
        assert ("without labels, fine-tuned with labels, and a classifier" in text) == (probe.parent == tuned)
        assert ("It was trained without labels" in text) == (probe.parent == copy)
        assert ("neighbours.png" in text or "tsne.png" in text) == (probe.parent == copy)  # of the encoder before


def test_what_lies_around_a_model_that_is_not_its_run_stays_out(run, tmp_path):
    probe = shutil.copytree(run / "linear_probe", tmp_path / "stranger" / "probe")
    recipe = yaml.safe_load((probe / "recipe.yaml").read_text())
    recipe["encoder"]["model"] = str(tmp_path / "gone" / "run")
    (probe / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "stranger" / "recipe.yaml").write_text("- a list")
    (tmp_path / "stranger" / "metrics.json").write_text("{")
    shutil.copyfile(run / "tsne.png", tmp_path / "stranger" / "tsne.png")
    text, _ = card_of(tmp_path / "stranger" / "probe", tmp_path / "published")
    assert "tsne.png" not in text
    assert not (tmp_path / "published" / "tsne.png").exists()


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
    assert card.data.license == "unknown"  # of what was converted
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


def test_a_card_claims_no_weights_of_timm_that_only_the_architecture_is_named_by(tmp_path):
    model = MoCoModel(MoCoConfig(architecture="resnet18.a1_in1k", queue_size=64))
    model.save_pretrained(tmp_path / "saved")
    MoCoImageProcessorPil().save_pretrained(tmp_path / "saved")
    text, card = card_of(tmp_path / "saved", tmp_path / "published")
    assert "a1_in1k" not in text
    assert "A resnet18 for Momentum Contrast" in text
    assert "resnet18" in card.data.tags
    assert (tmp_path / "published" / "resnet" / "config.json").is_file()


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


def test_no_two_rows_of_the_card_say_the_same_of_two_numbers(run, tmp_path):
    source = copied(run, tmp_path / "source")
    (source / "results.json").unlink()
    digest, result = encoder_digest(model_of(source)), Result("kNN", "top1", 50.0, 100, settings={"bank": 400})
    told = {"dataset": "org/birds", "config": None, "split": "test", "view": "centre 32 px", "label_column": "label"}
    others = [{}, {"config": "small"}, {"view": "centre 48 px"}, {"label_column": "fine_label"}, {"train_split": "all"}]
    for value, changed in enumerate(others, 50):
        append_results(source, [replace(result, value=float(value))], model=digest, data=told | changed)
    append_results(source, [replace(result, value=60.0, settings={"bank": 40})], model=digest, data=told)
    text, card = card_of(source, tmp_path / "published")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| kNN")]
    assert [row[4] for row in rows] == [f"{value:.2f} %" for value in (50, 51, 52, 53, 54, 60)]
    assert len({(row[1], row[7]) for row in rows}) == len(rows)
    assert rows[3][1] == "bank 400; view centre 32 px; label column fine_label"
    numbers = [
        (r.dataset_config, *((name, r.metric_args[name]) for name in sorted(r.metric_args)))
        for r in card.data.eval_results
    ]
    assert len(set(map(str, numbers))) == len(rows)


def test_the_card_shows_every_setting_of_training_that_changes_weights(run, tmp_path):
    source = copied(run, tmp_path / "source")
    recipe = yaml.safe_load((source / "recipe.yaml").read_text())
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'}
    recipe["training"] |= schedule | {"run_name": "of mine"}
    (source / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text, _ = card_of(source, tmp_path / "published")
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["training"]
    assert schedule.items() <= shown.items()
    assert "run_name" not in shown
    of_place = {"output_dir", "hub_model_id", "hub_strategy", "hub_revision"}
    of_speed = {"torch_compile_backend", "torch_compile_mode"}
    in_words = {f.name for f in offered(MoCoTrainingArguments) if re.search("str|dict|Literal", str(f.type))}
    assert in_words - set(WORDS) - WITHOUT_RESULT == of_place | of_speed


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
