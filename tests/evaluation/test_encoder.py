"""Which encoder an evaluation looks at, and where its results go."""

import json
import re
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import yaml
from numbered_images import write_folders
from tiny_models import moco_config

from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoModel
from training.commands.evaluations.knn import parse_knn
from training.data.sources import CropDataArguments, DataArguments, EvaluationDataArguments, load_images
from training.engine.files import write_json
from training.engine.results import encoder_digest
from training.engine.run_folder import DATASET, SAVED_RECIPE
from training.evaluation.encoder import Encoder, pretraining_recipe
from training.evaluation.finetune import parse_finetune
from training.evaluation.linear_probe import parse_linear_probe

ASKED_THE_HUB = ", neither here nor as a model that the Hub gives"


@pytest.mark.parametrize(
    ("script_name", "others", "where"),
    [
        ("knn", [], ASKED_THE_HUB),
        ("linear_probe", [], ASKED_THE_HUB),
        ("finetune", [], ASKED_THE_HUB),
        ("push_to_hub", ["org/name", "--dry_run"], ASKED_THE_HUB),
        ("report", [], " as a folder here"),
        ("compare", ["runs/other"], " as a folder here"),
    ],
)
def test_a_path_that_leads_nowhere_is_said_to(script_name, others, where, tmp_path, script, monkeypatch, capsys):
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or it would be asked again and again
    for path, remedy in (("runs/quikstart", "did you mean runs/quickstart?"), ("nothing", "pass the folder")):
        with pytest.raises(SystemExit) as end:
            script(script_name).main([path, *others])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {path} does not exist{where}: {remedy}")


@pytest.mark.parametrize(
    ("parse", "flag", "owner"),
    [
        (parse_knn, "--streaming", "pretrain"),
        (parse_linear_probe, "--push_to_hub", "pretrain"),
        (parse_finetune, "--no_streaming", "pretrain"),
        (parse_finetune, "--queue_size=64", "pretrain"),
        (parse_linear_probe, "--eval-every-n-epochs", "pretrain"),
        (parse_finetune, "--knn_k", "knn"),
    ],
)
def test_a_flag_of_another_command_is_refused_with_the_command_that_has_it(parse, flag, owner, saved):
    name = flag.split("=")[0].replace("-", "_").replace("__", "--", 1)
    with pytest.raises(ValueError, match=rf"flag {name} is unknown here: `python scripts/{owner}\.py` has it"):
        parse([str(saved / "model"), "--dataset_name", "digits", flag])


def test_a_mistyped_flag_of_the_command_itself_gets_the_nearest(saved):
    with pytest.raises(ValueError, match="flag --kn_k is unknown: did you mean '--knn_k'"):
        parse_knn([str(saved / "model"), "--dataset_name", "digits", "--kn_k", "3"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A classifier and a pretrained model with the same encoder."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(9)
    config = MoCoConfig(architecture="test_resnet", queue_size=64, batch_norm="plain", num_labels=3)
    model = MoCoModel(config)
    classifier = MoCoForImageClassification(config)
    classifier.moco.encoder_q.load_state_dict(model.encoder_q.state_dict())
    torch.nn.init.constant_(classifier.classifier.bias, 7.0)
    model.save_pretrained(folder / "model")
    classifier.save_pretrained(folder / "classifier")
    return folder


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_classifier_starts_anew_even_where_one_was_saved(saved):
    labels = {"num_labels": 3}
    first, second = (
        Encoder(str(saved / name)).load(MoCoForImageClassification, 0, **labels) for name in ("model", "classifier")
    )
    assert same(first.moco, second.moco)
    for model in (first, second):
        assert torch.count_nonzero(model.classifier.bias) == 0
        assert 0.005 < model.classifier.weight.std() < 0.015


def test_a_random_encoder_is_another_for_every_seed_and_the_same_for_one(saved):
    source = str(saved / "model")
    trained = Encoder(source).load(MoCoModel, 0)
    random = [Encoder(source, random=True).load(MoCoModel, seed) for seed in (0, 0, 1)]
    assert same(random[0], random[1])
    assert not same(random[0], random[2])
    assert not same(random[0].encoder_q, trained.encoder_q)
    assert not any(model.training for model in [trained, *random])


STEMS = {"test_resnet": ("default", "no_max_pool", "small"), "test_vit": ("default", "moco_v3")}


@pytest.mark.parametrize(("architecture", "stem"), [(name, stem) for name, stems in STEMS.items() for stem in stems])
def test_a_random_encoder_of_one_seed_is_the_same_for_every_evaluation(architecture, stem, tmp_path):
    for key_encoder, dictionary in (("momentum", "queue"), ("shared", "batch")):
        config = moco_config(architecture, stem=stem, key_encoder=key_encoder, dictionary=dictionary)
        MoCoModel(config).save_pretrained(tmp_path)
        encoder = Encoder(str(tmp_path), random=True)
        model, head = encoder.load(MoCoModel, 3), encoder.load(MoCoModel, 3, head=True)
        classifier = encoder.load_classifier(["a", "b"], 3)
        digests = {encoder_digest(x) for x in (model, head, classifier.moco)}
        assert len(digests) == 1
        assert digests != {encoder_digest(encoder.load(MoCoModel, 4))}
        if key_encoder == "momentum":
            assert same(model.encoder_q, model.encoder_k)


def test_results_of_a_random_encoder_have_a_folder_of_their_own(saved):
    folder = saved / "model"
    assert Encoder(str(folder)).results_dir == folder
    assert Encoder(str(folder), random=True).results_dir == folder / "random_encoder"


def test_results_of_a_model_on_the_hub_have_a_folder_that_no_run_and_no_other_model_has(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved / "model", tmp_path / "runs" / "quickstart")
    assert Encoder("org/quickstart").results_dir == Path("runs/org--quickstart")
    assert Encoder("other/quickstart", random=True).results_dir == Path("runs/other--quickstart/random_encoder")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_evaluated_and_trained_in_single_precision(dtype, tmp_path):
    half = MoCoModel(moco_config()).to(dtype)
    half.save_pretrained(tmp_path)
    assert MoCoModel.from_pretrained(tmp_path).dtype == dtype
    model, classifier = (Encoder(str(tmp_path)).load(kind, 0) for kind in (MoCoModel, MoCoForImageClassification))
    assert {p.dtype for p in [*model.parameters(), *classifier.parameters()]} == {torch.float32}
    assert same(model.encoder_q, half.encoder_q)
    assert encoder_digest(model) == encoder_digest(classifier.moco) == encoder_digest(half)


def test_an_encoder_whose_weights_have_other_shapes_than_its_configuration_is_not_evaluated(tmp_path):
    MoCoModel(moco_config("test_vit")).save_pretrained(tmp_path)
    moco_config("test_vit", model_args={"img_size": 48}).save_pretrained(tmp_path)
    for kind in (MoCoModel, MoCoForImageClassification):
        with pytest.raises(ValueError, match=r"encoder_q\.pos_embed \(1, 5, 64\) in its weights, .* \(1, 10, 64\)"):
            Encoder(str(tmp_path)).load(kind, 0)


def test_the_heads_output_needs_a_saved_head(saved):
    assert Encoder(str(saved / "model")).load(MoCoModel, 0, head=True).projector_q
    with pytest.raises(ValueError, match=r"holds a model without projector_q\.0"):
        Encoder(str(saved / "classifier")).load(MoCoModel, 0, head=True)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no MoCo model"):
        Encoder(str(tmp_path)).load(MoCoModel, 0)


# Flags of the data


@pytest.mark.parametrize("parse", [parse_knn, parse_linear_probe, parse_finetune])
def test_help_offers_only_the_data_flags_that_the_evaluation_uses(parse, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    flags = set(re.findall(r"^  (--\w+) ", capsys.readouterr().out, re.M))
    assert {"--dataset_name", "--image_size", "--eval_resize"} <= flags
    assert ("--horizontal_flip" in flags) == (parse is not parse_knn)
    assert not flags & {"--augmentation", "--view_backend", "--crop_min_scale", "--streaming", "--shuffle_buffer"}


def test_an_evaluation_takes_from_the_recipe_of_pretraining_what_it_has_a_flag_for(tmp_path):
    data = {"dataset_name": "digits", "image_size": 32, "horizontal_flip": False}
    only_for_pretraining = {"view_backend": "cv2", "streaming": True, "crop_min_scale": 0.5}
    recipe = {"data": data | only_for_pretraining, "probe": {"learning_rate": 1.0}}
    (tmp_path / SAVED_RECIPE).write_text(yaml.safe_dump(recipe))
    assert pretraining_recipe(str(tmp_path), CropDataArguments) == recipe | {"data": data}
    assert pretraining_recipe(str(tmp_path), EvaluationDataArguments)["data"] == {
        "dataset_name": "digits",
        "image_size": 32,
    }


def test_an_evaluation_stops_where_the_images_of_the_run_are_others_now(saved, tmp_path, monkeypatch):
    source = write_folders(tmp_path / "data")
    run = tmp_path / "run"
    shutil.copytree(saved / "model", run)
    monkeypatch.chdir(tmp_path)
    place = load_images(DataArguments(dataset_name="data")).place
    write_json(run / DATASET, place)
    (run / SAVED_RECIPE).write_text(yaml.safe_dump({"data": {"dataset_name": place["dataset"], "image_size": 16}}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # another folder of that name here is not the run's
    write_folders(tmp_path / "elsewhere" / "data").joinpath("train", "cat", "0.png").unlink()
    for parse in (parse_knn, parse_linear_probe, parse_finetune):
        data = getattr(parsed := parse([str(run), "--use_cpu"]), "data", None) or parsed[1]
        assert len(load_images(data, labelled=True).train) == 12
    source.joinpath("train", "cat", "0.png").unlink()
    with pytest.raises(ValueError, match=r"split 'train' was 12 images .* and is 11 images"):
        load_images(parse_knn([str(run)])[1])
    assert len(load_images(parse_knn([str(run), "--dataset_name", "data"])[1]).train) == 11


def test_a_folder_here_is_not_the_dataset_of_its_name_that_a_run_was_trained_on(saved, tmp_path, monkeypatch):
    """But one on the Hub, with which an evaluation would compare nothing."""
    run = tmp_path / "run"
    shutil.copytree(saved / "model", run)
    (run / SAVED_RECIPE).write_text(yaml.safe_dump({"data": {"dataset_name": "org/photos", "image_size": 16}}))
    assert parse_knn([str(run)])[1].dataset_name == "org/photos"
    monkeypatch.chdir(tmp_path)
    folder = write_folders(tmp_path / "org" / "photos")
    for parse in (parse_knn, parse_linear_probe, parse_finetune):
        with pytest.raises(
            ValueError, match=rf"^org/photos was no folder .* pass --dataset_name {folder} if it is meant"
        ):
            parse([str(run), "--use_cpu"])
    assert len(load_images(parse_knn([str(run), "--dataset_name", "org/photos"])[1]).train) == 12


DAMAGED = {
    "metrics.json": ('{"knn_top1_after": 9', "metrics.json is not JSON"),
    "another/metrics.json": ('{"probes": ["official"]}', "metrics.json has official for a probe"),
    "results.json": ('[{"protocol": "kNN"}]', "results.json is not a valid results file (entry 1 has no metric)"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("parse", [parse_knn, parse_linear_probe, parse_finetune])
def test_damaged_numbers_of_a_run_are_named_before_any_time_is_spent(parse, name, saved, tmp_path):
    folder = shutil.copytree(saved / "model", tmp_path / "run")
    content, message = DAMAGED[name]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(message)}.*correct it, or move it away"):
        parse([str(folder), "--dataset_name", "digits", "--use_cpu"])


@pytest.mark.parametrize("parse", [parse_knn, parse_linear_probe, parse_finetune])
def test_a_mistyped_folder_is_called_one_and_a_model_of_unknown_data_asks_for_them(parse, saved, tmp_path):
    none = tmp_path / "runs" / "quikstart"
    for place, rule in ((none, "does not exist, neither here nor as a model"), (tmp_path, "holds no MoCo model")):
        with pytest.raises(ValueError, match=f"{place} {rule}.*: pass the folder that a run saved to"):
            parse([str(place)])
    with pytest.raises(ValueError, match="does not say what it was trained on: pass --dataset_name"):
        parse([str(saved / "model")])
    with pytest.raises(ValueError, match="does not say what it was trained on: pass --dataset_name"):
        parse([str(saved / "model"), "--dataset_config_name", "x"])


ON_DIGITS = ["--dataset_name", "digits", "--use_cpu"]


@pytest.mark.parametrize("name", ["knn", "linear_probe", "finetune", "embed"])
def test_images_of_a_size_that_the_encoder_does_not_take_are_refused_in_one_line(name, tmp_path, script, capsys):
    arguments = {"img_size": 32, "dynamic_img_size": False}
    MoCoModel(moco_config("test_vit", model_args=arguments)).save_pretrained(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        script(name).main([str(tmp_path), *ON_DIGITS, "--image_size", "48"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: image_size (48) is refused by test_vit (Input height (48) doesn't match model (32)")
    assert error.endswith("pass the --image_size that it was trained with\n")
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("name", ["knn", "linear_probe", "finetune"])
def test_a_place_where_results_cannot_be_written_is_refused_before_any_time_is_spent(
    name, saved, tmp_path, script, capsys
):
    model = shutil.copytree(saved / "model", tmp_path / "model")
    (model / "random_encoder").write_text("no folder")
    with pytest.raises(SystemExit) as end:
        script(name).main(
            [str(model), *ON_DIGITS, "--image_size", "32", "--random_encoder"]
            + ["--output_dir", str(tmp_path / "out")] * (name != "knn")
        )
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: results cannot be written to {model / 'random_encoder'} (File exists)")
    assert "kNN" not in said.out
    assert not list(tmp_path.glob("out/*"))


# An evaluation that has ended

SHORT = ["--image_size", "32", "--eval_resize", "32", "--use_cpu", "--num_train_epochs", "1", "--disable_tqdm", "True"]
EVALUATIONS = {
    "cached": ("linear_probe", ["--mode", "cached"]),
    "official": ("linear_probe", []),
    "finetune": ("finetune", ["--global_batch_size", "4"]),
}


@pytest.fixture(params=["official", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cached", "finetune"))])
def evaluation(request, saved, tmp_path, script, monkeypatch):
    """An evaluation as its user gives it again and again, the encoder that it is of and the images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # or it would be asked for a folder that is gone
    model = shutil.copytree(saved / "model", tmp_path / "model")
    images = write_folders(tmp_path / "images")
    name, flags = EVALUATIONS[request.param]
    flags = [flag for flag in SHORT if request.param != "cached" or flag not in ("--disable_tqdm", "True")] + flags
    command = [str(model), "--dataset_name", "images", "--output_dir", "evaluated", *flags]
    return lambda: script(name).main(command), model, images


def test_what_an_evaluation_found_is_shown_again_for_the_same_weights_and_images_alone(evaluation, tmp_path, capsys):
    evaluate, model, images = evaluation
    evaluate()
    shutil.rmtree(model / "features", ignore_errors=True)
    files = {path: path.read_bytes() for folder in (model, tmp_path / "evaluated") for path in folder.rglob("*.json")}
    capsys.readouterr()
    evaluate()
    about, ended, *found = capsys.readouterr().out.splitlines()
    assert about.startswith(f"{images}: 24 images")
    assert ended.startswith("evaluated holds this run, which ended at ")
    assert ended.endswith(": nothing to do. Pass another --output_dir to run it again.")
    metrics = json.loads((tmp_path / "evaluated" / "metrics.json").read_text())
    for line, entry in zip(found, metrics.get("probes", [metrics]), strict=True):
        assert line.startswith(entry["protocol"])
        assert f"| {entry['top1']:.2f} % " in line
    assert not (model / "features").exists()

    weights = (model / "model.safetensors").read_bytes()
    assert refused_for_other_weights(evaluate, model, capsys)
    (model / "model.safetensors").write_bytes(weights)
    next(images.rglob("train/*/*.png")).unlink()
    with pytest.raises(SystemExit):
        evaluate()
    assert "is not what the run in evaluated was begun with: split 'train' was" in capsys.readouterr().err

    images.rename(tmp_path / "elsewhere")  # what was measured is known without them
    capsys.readouterr()
    evaluate()
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [ended, *found]
    assert shown.err.startswith(
        "warning: the images were not compared with those of then: dataset_name (images) cannot"
    )
    assert {path: path.read_bytes() for path in files} == files
    (tmp_path / "evaluated" / "metrics.json").unlink()
    with pytest.raises(SystemExit):
        evaluate()
    assert capsys.readouterr().err.startswith("error: dataset_name (images) cannot be opened")


def test_an_evaluation_that_was_stopped_does_not_go_on_with_other_weights(evaluation, tmp_path, capsys):
    evaluate, model, _ = evaluation
    evaluate()
    (tmp_path / "evaluated" / "metrics.json").unlink()
    assert refused_for_other_weights(evaluate, model, capsys)


def refused_for_other_weights(evaluate, model: Path, capsys) -> bool:
    before, now = MoCoModel.from_pretrained(model), MoCoModel.from_pretrained(model)
    with torch.no_grad():
        now.encoder_q.bn1.running_mean[0] += 1
    now.save_pretrained(model)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate()
    (line,) = capsys.readouterr().err.splitlines()
    return line == (
        f"error: {model} is not the encoder that the run in evaluated was begun with: the digest of its weights was "
        f"{encoder_digest(before)} and is {encoder_digest(now)}. Pass another --output_dir, or remove evaluated"
    )


def test_a_probe_shows_other_images_where_the_first_one_cannot_be_read(saved, tmp_path, script, capsys):
    images, out = write_folders(tmp_path / "images"), tmp_path / "probe"
    (images / "test" / "cat" / "12.png").write_bytes(b"broken")
    argv = [str(saved / "model"), "--dataset_name", str(images), "--output_dir", str(out), *SHORT]
    script("linear_probe").main(argv)
    shown = capsys.readouterr().out
    assert shown.count(" is called ") == 4
    assert "Next, with your IMAGE" in shown


ELSEWHERE = {"output_dir": "/elsewhere", "report_to": ["wandb"], "project": "theirs", "run_name": "theirs"}


@pytest.mark.parametrize("section", ["data", "training", "encoder"])
def test_the_recipe_of_a_run_does_not_say_where_evaluations_go(section, saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved / "model", run)
    recipe = {"data": {"dataset_name": "digits"}, "training": {"knn_k": [3]}}
    recipe[section] = recipe.get(section, {}) | ELSEWHERE
    (run / SAVED_RECIPE).write_text(yaml.safe_dump(recipe))
    _, _, knn = parse_knn([str(run), "--use_cpu"])
    assert (knn.knn_k, knn.report_to, knn.project) == ([3], [], "moco")
    for parsed in (parse_linear_probe([str(run), "--use_cpu"]), parse_finetune([str(run), "--use_cpu"])):
        training = parsed.training
        assert (Path(training.output_dir).parent, training.project) == (run, "moco")
        assert not set(training.report_to) & {"wandb"}
        assert "elsewhere" not in str(parsed.settings)
        assert "theirs" not in str(parsed.settings)


@pytest.mark.parametrize("key", [*ELSEWHERE, "hub_token", "push_to_hub"])
def test_the_section_of_a_probe_sets_its_own_flags_alone(key, saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved / "model", run)
    (run / SAVED_RECIPE).write_text(yaml.safe_dump({"data": {"dataset_name": "digits"}, "probe": {key: "x"}}))
    with pytest.raises(ValueError, match=f"key '{key}' in section 'probe' of {run / SAVED_RECIPE} would say where"):
        parse_linear_probe([str(run), "--use_cpu"])


@pytest.mark.parametrize(
    ("parse", "section", "key"), [(parse_knn, "training", "knn_k"), (parse_knn, "data", "image_size")]
)
def test_a_recorded_value_of_another_kind_is_refused(parse, section, key, saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved / "model", run)
    recipe = {"data": {"dataset_name": "digits"}}
    recipe[section] = recipe.get(section, {}) | {key: {"odd": 1}}
    (run / SAVED_RECIPE).write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=f"key '{key}' in section '{section}' of .* is .*odd.*: correct it"):
        parse([str(run), "--use_cpu"])
